"""Distillation: train a student that predicts with guidance in one evaluation, or that needs few steps."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.discriminator import PatchDiscriminator, frozen, generator_loss
from autoencoder.model import digest
from ldm import distillation
from ldm.denoiser import ScaledNetwork, with_context
from ldm.distillation import DistillationLosses, Networks, Student, guided
from ldm.errors import UserError
from ldm.formats.scheduler_config import Process
from ldm.libraries import UNet2DConditionModel
from ldm.networks.attention import require_attention
from ldm.networks.backbone import Backbone
from ldm.networks.unet import UNet, add_guidance
from ldm.objective import Objective
from ldm.samplers import make_sampler
from ldm.schedule import BetaSchedule
from ldm.spacing import make_plan
from ldm.task import task_by_channels
from train.config.distill import DistillConfig
from train.config.vae import AdversarialConfig
from train.data.batches.draws import Noising
from train.engine.device import open_accelerator
from train.engine.loop import fit
from train.engine.model_card import About
from train.engine.open_data import select_images
from train.engine.precision import DTYPES
from train.engine.provenance import unfinished
from train.engine.publish import publisher
from train.engine.run import Run, open_run
from train.engine.stage import Hooks, Phase, StepOutput
from train.stages.cards import about_distilled
from train.stages.ldm import LdmStage, open_captioned
from train.stages.ldm_data import open_examples
from train.stages.ldm_init import Components, open_init
from train.stages.ldm_step import Denoising, DiffusionBatch, Loss
from train.stages.terms import Term
from train.stages.vae_step import DiscriminatorBatch, DiscriminatorLoss


@dataclass(frozen=True)
class Teacher:
    """The frozen network of the teacher."""

    backbone: Backbone
    null: Tensor
    """The null condition, (1, L, d)."""

    def __call__(self, context: Tensor | None) -> Student:
        """Return the guided teacher; it needs one evaluation if it reads the scale itself. context: of inpainting."""
        network: ScaledNetwork = self.backbone if context is None else with_context(self.backbone, context)
        return network if self.backbone.guidance_width else guided(network, self.null)


@dataclass(frozen=True)
class DistillComponents(Components):
    """Components of distillation; `backbone` is the student."""

    teacher: Teacher
    discriminator: PatchDiscriminator | None


class DistillationLoss(Loss):
    """The student and its loss. average: the student with averaged weights.

    discriminator, weight: those of the adversarial loss of the predicted latents; it isn't trained here.
    """

    def __init__(
        self,
        student: Backbone,
        average: Backbone,
        teacher: Teacher,
        objective: distillation.Objective,
        discriminator: PatchDiscriminator | None = None,
        weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.unet = student.module  # a fixed name, as checkpoints store the weights under it
        self.student, self.average, self.teacher, self.objective = student, average, teacher, objective
        self.weight, self._not_trained = weight, {"discriminator": discriminator}  # in a dict: not a submodule

    def losses(self, batch: DiffusionBatch) -> DistillationLosses:
        assert batch.scale is not None
        student, average = (
            network if batch.context is None else with_context(network, batch.context)
            for network in (self.student, self.average)
        )
        examples = distillation.Examples(batch.x0, batch.timestep, batch.noise, batch.condition, batch.scale)
        return self.objective(Networks(student, average, self.teacher(batch.context)), examples)

    def forward(self, batch: DiffusionBatch) -> StepOutput:
        losses, discriminator = self.losses(batch), self._not_trained["discriminator"]
        loss, metrics = losses.weighted.mean(), {"error": losses.unweighted.detach().mean()}
        if discriminator is None:
            return StepOutput(loss, metrics, batch)
        assert losses.ends is not None
        with frozen(discriminator):
            adversarial = generator_loss("hinge", discriminator(losses.ends))
        metrics["adversarial"] = adversarial.detach()
        real = batch.x0.repeat(len(losses.ends) // len(batch.x0), 1, 1, 1)
        latents = DiscriminatorBatch(real, losses.ends.detach())
        return StepOutput(loss + self.weight * adversarial, metrics, latents)


class DistillStage(LdmStage[DistillConfig]):
    """Distillation for the training loop."""

    components: DistillComponents

    def __init__(self, run: Run[DistillConfig], components: DistillComponents, *given: Any) -> None:
        config, self.discriminator = run.config, components.discriminator
        super().__init__(run, components, *given)
        if self.discriminator is not None:
            module = DiscriminatorLoss(self.discriminator.to(run.accelerator.device), AdversarialConfig(kind="hinge"))
            lr = config.adversarial_lr
            optimizer = config.optimizer.build(module, lr=lr)
            self.phases.append(Phase("discriminator", module, optimizer, lr, prefix="discriminator_"))

    def networks(self) -> list[nn.Module]:
        return [*super().networks(), self.components.teacher.backbone.module]

    def build_losses(self, terms: Sequence[Term[Denoising]]) -> tuple[Loss, Loss]:
        student, average, teacher = self.components.backbone, self.network, self.components.teacher
        config = self.config
        objective = config.build_objective(self.components.process)
        return (
            DistillationLoss(student, average, teacher, objective, self.discriminator, config.adversarial),
            DistillationLoss(average, average, teacher, objective),
        )

    def loss_settings(self) -> object:
        c = self.config
        shared = c.method, c.scales, c.solver_steps, c.huber, self.components.digests["teacher"]
        if c.weight_noise:
            return (*shared, "weighted")
        return (*shared, c.trajectory, c.levels) if c.trajectory else shared  # validation has no discriminator

    def error_by_noise(self, errors: Tensor) -> dict[str, float]:
        return {} if self.config.trajectory else super().error_by_noise(errors)  # an example trains several levels

    def about(self) -> About:
        return about_distilled(self.config, self.components.process, self.network, self.inputs)


def load_components(config: DistillConfig, device: torch.device) -> DistillComponents:
    """Load the teacher onto a device, and make the student. Raises UserError if it is missing or doesn't fit."""
    if not config.teacher:
        raise UserError("--teacher is missing: give the folder or hub id of a trained model, e.g. runs/ldm/model")
    source, name = open_init(config.teacher), f"teacher {config.teacher!r}"
    unet, autoencoder, text_encoder = source.unet(), source.autoencoder(), source.text_encoder()
    side, channels = config.input.resolution // autoencoder.factor, autoencoder.latent_channels
    teacher = UNet.wrap(unet.float().eval().requires_grad_(False), channels)
    process = student_process(config, source.process(), teacher, name)
    if config.input.resolution % (multiple := autoencoder.factor * teacher.size_multiple):
        raise UserError(f"input.resolution {config.input.resolution}: must be a multiple of {multiple} for {name}")
    if teacher.condition_width != text_encoder.width:
        raise UserError(f"{name}: its UNet needs text features of width {teacher.condition_width}, not its own")
    task = task_by_channels(teacher.context_channels, channels)
    if task == "inpaint" and config.prompts:
        raise UserError("prompts with an inpainting teacher: its sample sheets use held-out images; leave prompts out")
    backbone = student_of(unet, channels, side)
    torch.manual_seed(config.seed)  # torch's global generator is used for the initial weights only
    discriminator = config.build_discriminator(channels, side)
    for network in (unet, backbone.module, autoencoder.vae):
        network.to(device)
    text_encoder.to(device)
    attention = [b.set_attention(config.attention, DTYPES[config.precision]) for b in (teacher, backbone)]
    digests = {
        "teacher": digest(unet, _identity(process)),
        "vae": autoencoder.digest,
        "text_encoder": text_encoder.digest,
    }
    return DistillComponents(
        backbone,
        autoencoder,
        text_encoder,
        Objective(process.schedule, process.target),
        digests,
        task,
        process,
        attention[0],
        changes=(),
        teacher=Teacher(teacher, text_encoder.encode([""]).float()),
        discriminator=discriminator,
    )


def _identity(process: Process) -> str:
    """Return a text that is equal for processes in which a network's outputs have the same meaning."""
    return repr((process.target, process.schedule.alpha.tolist(), process.schedule.sigma.tolist()))


def student_of(unet: UNet2DConditionModel, channels: int, side: int) -> UNet:
    """Return a trainable copy of the teacher's UNet that reads the guidance scale, for latents of this side."""
    student = copy.deepcopy(unet).train().requires_grad_(True)
    if not student.config.time_cond_proj_dim:
        add_guidance(student)
    return UNet.wrap(student, channels).adapt(0, side)


def student_process(config: DistillConfig, process: Process, teacher: Backbone, name: str) -> Process:
    """Return the process that is saved with the student. Raises UserError if the teacher's doesn't fit the method."""
    if process.solver_steps:
        raise UserError(f"{name}: is a consistency model, which needs few steps already; give its teacher")
    if teacher.out_channels != teacher.latent_channels:
        raise UserError(f"{name}: has a learned variance, which can't be distilled; give a model without one")
    if config.method == "guidance":
        if teacher.guidance_width:
            raise UserError(f"{name}: its guidance is distilled already; choose --method consistency")
    else:
        if not isinstance(process.schedule, BetaSchedule):
            raise UserError(f"method consistency: needs a beta schedule, but {name} has a flow; choose guidance")
        process = replace(process, solver_steps=config.solver_steps)
    grid = make_sampler(process.sampler).grid
    make_plan(
        process.schedule,
        grid,
        config.sample_steps,
        process.spacing,
        process.steps_offset,
        process.set_alpha_to_one,
        config.solver_steps,
    )  # raises UserError for sample_steps that don't fit
    return process


def warnings_of(config: DistillConfig, components: DistillComponents) -> Iterator[str]:
    """Yield a line on each setting that the student's quality will suffer from."""
    yield from unfinished("--teacher", config.teacher)
    (low, high), scale, resolution = config.scales, config.guidance_scale, config.input.resolution
    if not low <= scale <= high:
        yield (
            f"warning: guidance_scale {scale:g}: the student learns {low:g} to {high:g}, so its sample sheets will be "
            "poor; choose a scale in this range"
        )
    height, width = (side * components.autoencoder.factor for side in components.teacher.backbone.sample_size)
    if (height, width) != (resolution, resolution):
        yield (
            f"warning: input.resolution {resolution}: the student will generate {resolution} × {resolution} pixels, "
            f"but its teacher was trained for {width} × {height}; add --input.resolution {min(width, height)} unless "
            "this is intended"
        )


def train(config: DistillConfig, hooks: Hooks | None = None, *, with_changes: bool = False) -> None:
    """Distil a model into `config.out`, or continue the run in it.

    with_changes: whether the run may continue with other settings, as with --resume-with-changes.
    """
    accelerator = open_accelerator(config)
    require_attention(config.attention)
    components = load_components(config, accelerator.device)
    inputs = open_captioned(config)
    digests = {"data": inputs.fingerprint, **components.digests}
    with open_run(config, accelerator, digests, components.attention, with_changes=with_changes) as run:
        for line in warnings_of(config, components):
            run.print(line)
        inputs = select_images(inputs, run, components.autoencoder.factor * components.backbone.size_multiple)
        noising = Noising(strata=config.batch_size, scales=config.scales)
        examples = open_examples(run, components, inputs, noising, noising._replace(strata=1))
        stage = DistillStage(run, components, inputs, *examples)
        fit(run, stage, publisher(run, stage), hooks)
