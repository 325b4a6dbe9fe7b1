"""A model's process in diffusers' scheduler_config.json, read from any scheduler and written with every key."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from ldm.consistency import SOLVER_STEPS, TIME_SCALE, solver_indices
from ldm.errors import UserError, one_line
from ldm.files import read_json
from ldm.kinds import BetaKind
from ldm.libraries import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, SchedulerMixin
from ldm.parameterization import PREDICTION_TYPE, Target, check_target, target_from_diffusers
from ldm.process import VarianceKind
from ldm.samplers import SamplerKind
from ldm.schedule import MOST_TIMESTEPS, BetaSchedule, RectifiedFlow, Schedule, make_betas, rescale_to_zero_terminal_snr
from ldm.spacing import Spacing

_VARIANCES: dict[str, VarianceKind] = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned",
}
"""Variance for each of diffusers' names. "learned" is left out: unlike "learned_range", it has no bounds."""
_LEADING = ("DDIM", "DDPM", "PNDM", "LCM", "TCD")
"""Schedulers whose default timestep_spacing is leading; the default of all others is linspace."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """Settings of training and sampling that are saved with a model.

    Raises UserError if target and schedule don't fit together, or for an unknown spacing or variance.
    """

    schedule: Schedule
    target: Target
    spacing: Spacing = "trailing"
    variance: VarianceKind = "fixed_small"
    """Variance of the ddpm sampler's steps."""
    steps_offset: int = 1
    """Number that is added to the timesteps of leading spacing."""
    set_alpha_to_one: bool = True
    """Whether ddim ends at t = 0 instead of index 0, where noise remains in the image (docs/LOG.md, 2026-11-27)."""

    solver_steps: int = 0
    """Number of steps of the solver that a consistency model was distilled from; 0: the model isn't one."""

    def __post_init__(self) -> None:
        if self.solver_steps:
            solver_indices(self.schedule.T, self.solver_steps)
        if self.spacing not in get_args(Spacing):
            raise UserError(f"timestep spacing {self.spacing!r}: choose {', '.join(get_args(Spacing))}")
        if self.variance not in get_args(VarianceKind):
            raise UserError(f"variance {self.variance!r}: choose {', '.join(get_args(VarianceKind))}")
        check_target(self.target, self.schedule)

    @property
    def sampler(self) -> SamplerKind:
        """The model's default sampler."""
        return "lcm" if self.solver_steps else "dpmpp_2m"

    @classmethod
    def load(cls, folder: str | Path) -> "Process":
        """Read the process of a pipeline's folder. Raises UserError if it can't be read."""
        try:
            return cls.from_diffusers(read_json(Path(folder) / "scheduler" / "scheduler_config.json"))
        except UserError:
            raise
        except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
            raise UserError(f"can't load the scheduler of {str(folder)!r}: {one_line(error, 300)}") from None

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "Process":
        """Read any scheduler's scheduler_config.json, using its defaults. Raises UserError for unknown values."""
        name = str(config.get("_class_name", "DDIMScheduler"))
        flow = name.startswith("FlowMatch")
        variance = config.get("variance_type") or "fixed_small"
        if variance not in _VARIANCES:
            raise UserError(f"scheduler config: variance_type {variance!r}: choose {', '.join(_VARIANCES)}")
        spacing = config.get("timestep_spacing") or (
            "trailing" if flow else "leading" if name.startswith(_LEADING) else "linspace"
        )
        offset = config.get("steps_offset", 0)
        if not isinstance(offset, int) or abs(offset) > MOST_TIMESTEPS:
            raise UserError(f"scheduler config: steps_offset {str(offset)[:30]!r}: must be a whole number")
        solver_steps = config.get("original_inference_steps", SOLVER_STEPS) if name == "LCMScheduler" else 0
        if not isinstance(solver_steps, int):
            raise UserError(f"scheduler config: original_inference_steps {solver_steps!r}: must be a whole number")
        if solver_steps and config.get("timestep_scaling", TIME_SCALE) != TIME_SCALE:
            raise UserError(f"scheduler config: timestep_scaling {config['timestep_scaling']!r}: must be {TIME_SCALE}")
        return cls(
            schedule=Schedule.from_diffusers(config),
            target=target_from_diffusers(config.get("prediction_type") or ("flow_prediction" if flow else "epsilon")),
            spacing="karras" if config.get("use_karras_sigmas") else spacing,  # type: ignore[arg-type]  # checked above
            variance=_VARIANCES[variance],
            steps_offset=offset,
            set_alpha_to_one=bool(config.get("set_alpha_to_one", name != "PNDMScheduler")),
            solver_steps=solver_steps,
        )

    def to_diffusers(self) -> SchedulerMixin:
        """Return a scheduler with an explicit configuration, from which `from_config` makes every other scheduler.

        It is a DDPMScheduler for a learned variance, a FlowMatchEulerDiscreteScheduler for a flow, an LCMScheduler for
        a consistency model, and otherwise a DDIMScheduler, since diffusers' pipelines can then sample with any
        scheduler. Its configuration also has keys of this project, which the scheduler ignores.
        """
        T = self.schedule.T
        shared: dict[str, Any] = {
            "prediction_type": PREDICTION_TYPE[self.target],
            "steps_offset": self.steps_offset,
            "timestep_spacing": "linspace" if self.spacing == "karras" else self.spacing,
        }
        extra: dict[str, Any] = {
            "set_alpha_to_one": self.set_alpha_to_one,
            "variance_type": "learned_range" if self.variance == "learned" else self.variance,
        }
        scheduler: SchedulerMixin
        if isinstance(self.schedule, RectifiedFlow):
            scheduler = FlowMatchEulerDiscreteScheduler(T, self.schedule.shift)
            scheduler.register_to_config(**shared, **extra)
            return scheduler
        assert isinstance(self.schedule, BetaSchedule)
        betas = self.schedule.betas.tolist()
        kind, start, end = name_betas(self.schedule) or ("linear", betas[0], betas[-1])
        shared |= {
            "beta_schedule": kind,  # for readers that ignore trained_betas
            "beta_start": start,
            "beta_end": end,
            "trained_betas": betas,
            "clip_sample": False,
            "rescale_betas_zero_snr": self.schedule.zero_terminal_snr,
        }
        if self.variance == "learned":
            scheduler = DDPMScheduler(T, **shared)
        elif self.solver_steps:
            steps = {"original_inference_steps": self.solver_steps, "timestep_scaling": TIME_SCALE}
            scheduler = LCMScheduler(T, **shared, **steps)
        else:
            scheduler = DDIMScheduler(T, **shared)
        if self.spacing == "karras":
            extra["use_karras_sigmas"] = True
        scheduler.register_to_config(**extra)
        return scheduler

    def diffusers_limits(self) -> str | None:
        """Return one line that says what diffusers can't do with this process; None if it can do everything."""
        if isinstance(self.schedule, RectifiedFlow) or self.target == "flow":
            return (
                "schedule or target flow: diffusers' StableDiffusionPipeline can't sample this model; use "
                "ldm-txt2img or LatentDiffusionPipeline"
            )
        if self.variance == "learned":
            return (
                "variance learned: diffusers can sample this model only with DDPMScheduler, the scheduler that "
                "is saved with it"
            )
        if self.spacing == "karras":
            return (
                "spacing karras: diffusers' DDIM uses linspace instead; choose one that supports it, such "
                "as DPMSolverMultistepScheduler.from_config"
            )
        return None


def name_betas(schedule: BetaSchedule) -> tuple[str, float, float] | None:
    """Return diffusers' beta_schedule, beta_start and beta_end of a schedule; None if it isn't one that has a name.

    For zero terminal SNR, they are those before the rescaling. Only Stable Diffusion's betas are recognised then.
    """
    betas = schedule.betas
    first, last = betas[0].item(), betas[-1].item()
    candidates: list[tuple[str, BetaKind, float, float]] = [("squaredcos_cap_v2", "cosine", first, last)]
    if schedule.zero_terminal_snr:
        candidates += [("scaled_linear", "scaled_linear", 0.00085, 0.012), ("linear", "linear", 0.0001, 0.02)]
    else:
        lowest = 1 / (1 + math.exp(6))  # the sigmoid schedule's range is that from −6 to 6
        range_ = (last - first) / (1 - 2 * lowest)
        start = first - range_ * lowest
        candidates += [("scaled_linear", "scaled_linear", first, last), ("linear", "linear", first, last)]
        candidates += [("sigmoid", "sigmoid", start, start + range_)]
    for name, kind, start, end in candidates:
        named = make_betas(kind, schedule.T, start, end)
        if schedule.zero_terminal_snr:
            named = rescale_to_zero_terminal_snr(named)
        if torch.allclose(named, betas, rtol=1e-5, atol=0):
            return name, start, end
    return None
