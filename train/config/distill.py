"""The configuration of distillation, the training of a faster model from a trained one."""

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from train.config.latent import LatentConfig
from train.config.optimizer import strict
from train.config.resumable import ON_REQUEST, Fixed, Location

if TYPE_CHECKING:
    from ldm.distillation import ConsistencyDistillation, GuidanceDistillation
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
    solver_steps: Annotated[int, Fixed()] = Field(default=50, gt=0, le=100_000)
    """Number of steps into which consistency distillation divides the teacher's trajectory.
    The student can be sampled with up to this many steps."""
    huber: Annotated[float, ON_REQUEST] = Field(default=1e-3, gt=0, le=100)
    """Constant of the pseudo-Huber distance of consistency distillation, which is squared far below it, else linear."""

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

    @property
    def own_features(self) -> str:
        return self.teacher

    def build_objective(self, teacher: "Process") -> "GuidanceDistillation | ConsistencyDistillation":
        """Return the training objective. Raises UserError if the teacher's process doesn't fit."""
        from ldm.distillation import ConsistencyDistillation, GuidanceDistillation

        if self.method == "guidance":
            return GuidanceDistillation(teacher.schedule)
        return ConsistencyDistillation(teacher.schedule, teacher.target, self.solver_steps, self.huber)
