"""Distillation: train a student that predicts with guidance in one evaluation, or that needs few steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoencoder.discriminator import PatchDiscriminator, frozen, generator_loss
from ldm import distillation
from ldm.denoiser import with_context
from ldm.distillation import DistillationLosses, Networks
from ldm.networks.attention import require_attention
from ldm.networks.backbone import Backbone
from train.config.distill import DistillConfig
from train.config.vae import AdversarialConfig
from train.data.batches.draws import Noising
from train.engine.device import open_accelerator
from train.engine.loop import fit
from train.engine.model_card import About
from train.engine.open_data import select_images
from train.engine.publish import publisher
from train.engine.run import Run, open_run
from train.engine.stage import Hooks, Phase, StepOutput
from train.stages.cards import about_distilled
from train.stages.distillation_init import DistillComponents, Teacher, load_components, warnings_of
from train.stages.ldm import LdmStage, open_captioned
from train.stages.ldm_data import open_examples
from train.stages.ldm_step import Denoising, DiffusionBatch, Loss
from train.stages.terms import Term
from train.stages.vae_step import DiscriminatorBatch, DiscriminatorLoss


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
        examples = distillation.Examples(
            batch.x0, batch.timestep, batch.noise, batch.condition, batch.scale, batch.context, batch.renoise
        )
        return self.objective(self.networks, examples)

    def networks(self, context: Tensor | None) -> Networks:
        """Return the networks, for examples with a context or without one."""
        student, average = (n if context is None else with_context(n, context) for n in (self.student, self.average))
        return Networks(student, average, self.teacher(context))

    def forward(self, batch: DiffusionBatch) -> StepOutput:
        losses, discriminator = self.losses(batch), self._not_trained["discriminator"]
        loss, metrics = losses.weighted.mean(), {"error": losses.unweighted.detach().mean()}
        if discriminator is None:
            return StepOutput(loss, metrics, batch)
        assert losses.ends is not None
        with frozen(discriminator):
            adversarial = generator_loss("hinge", discriminator(losses.ends))
        metrics["adversarial"] = adversarial.detach()
        places = torch.arange(len(losses.ends), device=batch.x0.device) % len(batch.x0)  # as many real latents
        latents = DiscriminatorBatch(batch.x0[places], losses.ends.detach())
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
        if c.on_policy:
            return (*shared, c.trajectory, c.levels, c.on_policy)
        return (*shared, c.trajectory, c.levels) if c.trajectory else shared  # validation has no discriminator

    def error_by_noise(self, errors: Tensor) -> dict[str, float]:
        return {} if self.config.trajectory else super().error_by_noise(errors)  # an example trains several levels

    def about(self) -> About:
        return about_distilled(self.config, self.components.process, self.network, self.inputs)


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
        noising = Noising(strata=config.batch_size, scales=config.scales, renoise=config.on_policy > 0)
        examples = open_examples(run, components, inputs, noising, noising._replace(strata=1))
        stage = DistillStage(run, components, inputs, *examples)
        fit(run, stage, publisher(run, stage), hooks)
