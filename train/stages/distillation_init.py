"""The networks of distillation: a teacher, and the student that starts with its weights; checks that they fit."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autoencoder.discriminator import PatchDiscriminator
from autoencoder.model import digest
from ldm.denoiser import ScaledNetwork, with_context
from ldm.distillation import Student, guided
from ldm.errors import UserError
from ldm.formats.scheduler_config import Process
from ldm.libraries import UNet2DConditionModel
from ldm.networks.backbone import Backbone
from ldm.networks.unet import UNet, add_guidance
from ldm.objective import Objective
from ldm.samplers import make_sampler
from ldm.schedule import BetaSchedule
from ldm.spacing import make_plan
from ldm.task import task_by_channels
from train.config.distill import DistillConfig
from train.engine.precision import DTYPES
from train.engine.provenance import unfinished
from train.stages.ldm_init import Components, open_init


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
