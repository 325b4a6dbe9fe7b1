"""The configuration of distillation, the training of a faster model from a trained one."""

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from ldm.errors import UserError
from train.config.latent import LatentConfig
from train.config.optimizer import strict
from train.config.resumable import ON_REQUEST, Fixed, Location, Resumable

if TYPE_CHECKING:
    from autoencoder.discriminator import PatchDiscriminator
    from ldm.distillation import Objective
    from ldm.formats.scheduler_config import Process


@dataclass(frozen=True, kw_only=True, config=strict)
class DistillConfig(LatentConfig):
    """Distillation: train a student of a model, the teacher, that needs fewer evaluations of its network."""

    stage: ClassVar = "distill"
    teacher: Location = ""
    """Model to distil: folder, hub id or single file of a pipeline like Stable Diffusion. Required.
    The student starts with its weights, and has its autoencoder and text encoder."""
    method: Annotated[Literal["guidance", "consistency"], Fixed()] = "guidance"
    """Kind of student. `guidance`: one evaluation per step, as it reads the guidance scale (Meng et al. 2023).
    `consistency`: also few steps, with sampler lcm (Song et al. 2023; Luo et al. 2023)."""
    scales: Annotated[tuple[float, float], ON_REQUEST] = (1.0, 8.0)
    """Smallest and largest guidance scale that the student learns; each example draws one, uniformly."""
    weight_noise: Annotated[bool, ON_REQUEST] = False
    """Multiply the error of guidance distillation by max(sigma / alpha, 1), divided by the mean over all levels.
    It is for a teacher that predicts eps, whose errors change images more at high noise."""
    solver_steps: Annotated[int, Fixed()] = Field(default=50, gt=0, le=100_000)
    """Number of steps into which consistency distillation divides the teacher's trajectory.
    The student can be sampled with up to this many steps."""
    huber: Annotated[float, ON_REQUEST] = Field(default=1e-3, gt=0, le=100)
    """Constant of the pseudo-Huber distance of consistency distillation, which is squared far below it, else linear."""
    trajectory: Annotated[int, ON_REQUEST] = Field(default=0, ge=0, le=100_000)
    """Number of steps of DPM++ 2M in which the teacher generates latents from each example's noise, in consistency
    distillation. The student learns these latents from all states on the way (Luhman & Luhman 2021). The images
    aren't used, only the captions. 0: it learns from single steps of DDIM (Song et al. 2023)."""
    levels: Annotated[int, ON_REQUEST] = Field(default=1, gt=0, le=100_000)
    """Number of states of each trajectory that train the student: those at which `lcm` with as many steps evaluates the
    network. It must divide `trajectory`. The network's batch is `levels` times as large as `batch_size`."""
    on_policy: Annotated[float, ON_REQUEST] = Field(default=0.0, ge=0, lt=1)
    """Share of the examples whose trajectories start at the student's own states: those that `lcm` with two steps
    reaches (Kohler et al. 2024). They have half of the levels. It needs `trajectory` and an even number of `levels`."""

    adversarial: Annotated[float, Resumable(on_request=True, never=0.0)] = Field(default=0.0, ge=0, le=1e6)
    """Weight of an adversarial loss of consistency distillation (hinge: Lim & Ye 2017). 0: no discriminator.
    A patch discriminator, trained with the student, distinguishes its predicted clean latents from those of images."""
    adversarial_lr: Annotated[float, ON_REQUEST] = Field(default=1e-4, gt=0)
    """Peak learning rate of the discriminator; it follows the schedule of the optimizer settings."""

    @model_validator(mode="after")
    def _scales_are_a_range(self) -> Self:
        low, high = self.scales
        if not 0 <= low <= high < math.inf:
            raise ValueError(f"scales {low:g} {high:g}: must be two guidance scales, 0 <= smallest <= largest")
        return self

    @model_validator(mode="after")
    def _sheets_have_levels(self) -> Self:
        if self.method == "consistency" and self.sample_steps > self.solver_steps:
            raise ValueError(
                f"sample_steps {self.sample_steps}: must be at most {self.solver_steps} (solver_steps), e.g. 4"
            )
        return self

    @model_validator(mode="after")
    def _weights_have_an_objective(self) -> Self:
        if self.weight_noise and self.method != "guidance":
            raise ValueError("weight_noise: only with method guidance; leave it out")
        if self.adversarial and self.method != "consistency":
            raise ValueError(f"adversarial {self.adversarial:g}: only with method consistency; leave it out")
        return self

    @model_validator(mode="after")
    def _trajectories_fit(self) -> Self:
        if self.trajectory and self.method != "consistency":
            raise ValueError(f"trajectory {self.trajectory}: only with method consistency; set it to 0")
        if self.trajectory > self.solver_steps:
            raise ValueError(f"trajectory {self.trajectory}: must be at most {self.solver_steps} (solver_steps)")
        if not self.trajectory and self.levels > 1:
            raise ValueError(f"levels {self.levels}: only with a trajectory; set it to 1")
        if self.trajectory % self.levels:
            raise ValueError(f"levels {self.levels}: must divide {self.trajectory}, the steps of a trajectory")
        if self.on_policy and self.levels % 2:
            raise ValueError(
                f"on_policy {self.on_policy:g}: needs a trajectory with an even number of levels, not {self.levels}"
            )
        return self

    @model_validator(mode="after")
    def _evaluations_have_features(self) -> Self:
        if self.evaluate_every and not self.evaluation_features:
            raise ValueError(
                f"evaluate_every {self.evaluate_every}: needs evaluation_features, e.g. inception or runs/clip/model"
            )
        return self

    def build_discriminator(self, channels: int, side: int) -> "PatchDiscriminator | None":
        """Return the discriminator of latents (channels, side, side), or None. Raises UserError if they are too small.

        It has two strided layers, or one for small latents.
        """
        from autoencoder.discriminator import PatchDiscriminator

        if not self.adversarial:
            return None
        discriminators = (PatchDiscriminator(layers=layers, inputs=channels) for layers in (2, 1))
        if found := next((d for d in discriminators if d.smallest <= side), None):
            return found
        raise UserError(f"adversarial {self.adversarial:g}: latents of {side} × {side} are too small; leave it out")

    def build_objective(self, teacher: "Process") -> "Objective":
        """Return the training objective. Raises UserError if the teacher's process doesn't fit."""
        from ldm.distillation import ConsistencyDistillation, GuidanceDistillation, TrajectoryDistillation

        if self.weight_noise and teacher.target != "eps":
            raise UserError(f"weight_noise: is for a teacher that predicts eps, not {teacher.target}; leave it out")
        if self.method == "guidance":
            return GuidanceDistillation(teacher.schedule, weighted=self.weight_noise)
        common = teacher.schedule, teacher.target, self.solver_steps, self.huber
        if not self.trajectory:
            return ConsistencyDistillation(*common)
        return TrajectoryDistillation(*common, self.trajectory, self.levels, self.on_policy)
