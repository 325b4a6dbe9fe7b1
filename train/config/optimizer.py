"""The configuration of the optimizer, and the rule that configurations reject unknown keys and non-finite numbers."""

import math
from typing import TYPE_CHECKING, Annotated, Literal, assert_never

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from train.config.limits import MOST_STEPS
from train.config.resumable import ON_REQUEST, Fixed

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import AdamW

strict = ConfigDict(extra="forbid", allow_inf_nan=False)
NewtonSchulz = Literal["jordan", "polar_express"]
Decay = Annotated[float, Field(ge=0, lt=1)]
_WSD_DECAY = 0.2  # share of the steps after the warm-up in which the schedule wsd decays


@dataclass(frozen=True, kw_only=True, config=strict)
class OptimizerConfig:
    """Optimizer and its learning rate over time."""

    kind: Annotated[Literal["adamw", "muon", "adamw_8bit"], Fixed("the optimizer's state has another form")] = "adamw"
    """Optimizer: `adamw` (Loshchilov & Hutter 2019), `muon` (Jordan et al. 2024) or `adamw_8bit`.
    Muon updates the matrices; AdamW updates all other weights.
    Muon makes more progress per step, but its steps take longer; small networks gain most.
    `adamw_8bit` stores AdamW's moments of large matrices in 8 bits: a quarter of their memory, slightly inexact."""
    lr: Annotated[float, ON_REQUEST] = Field(default=1e-4, gt=0)
    """Peak learning rate, reached after the warm-up."""
    schedule: Annotated[Literal["constant", "cosine", "linear", "wsd"], ON_REQUEST] = "constant"
    """Shape of the learning rate's decay after the warm-up, from the peak to `final` times the peak.
    `wsd` (warm-up, stable, decay; Hägele et al. 2024) stays at the peak for 80 % of the steps after the warm-up, then
    falls as 1 − √x. A run continued with more `steps` before its decay is the run that had them from the start."""
    final: Annotated[float, ON_REQUEST] = Field(default=0.0, ge=0, le=1)
    """Learning rate at the last step as a share of the peak, 0 to 1, in schedules cosine, linear and wsd."""
    warmup: Annotated[int, ON_REQUEST] = Field(default=500, ge=0, le=MOST_STEPS)
    """Number of steps in which the learning rate rises linearly from 0 to its peak."""
    betas: Annotated[tuple[Decay, Decay], ON_REQUEST] = (0.9, 0.999)
    """Decay rates of AdamW's running means of the gradient and of its square, each at least 0 and less than 1."""
    eps: Annotated[float, ON_REQUEST] = Field(default=1e-8, gt=0)
    """Small constant in the denominator of AdamW's update, which keeps the update finite if the gradient is 0."""
    momentum: Annotated[float, ON_REQUEST] = Field(default=0.95, ge=0, lt=1)
    """Decay rate of Muon's running mean of the gradient, 0 to 1."""
    newton_schulz: Annotated[NewtonSchulz, ON_REQUEST] = "jordan"
    """Iteration that orthogonalises Muon's matrices.
    `jordan`: five steps (Jordan et al. 2024).
    `polar_express`: three steps with better coefficients (Amsel et al. 2025), which take about 0.6 of the time."""
    weight_decay: Annotated[float, ON_REQUEST] = Field(default=0.01, ge=0)
    """Strength of the decoupled weight decay, on matrices and convolution kernels only; 0: none."""
    clip: Annotated[float, ON_REQUEST] = Field(default=1.0, ge=0)
    """Largest norm of the gradient over all parameters; a larger gradient is scaled down to it. 0: no clipping."""

    def lr_share(self, step: int, steps: int) -> float:
        """Return the learning rate at `step` of `steps` as a share of the peak: a linear rise, then a decay."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, steps - self.warmup)
        match self.schedule:
            case "constant":
                return 1.0
            case "linear":
                return 1 - (1 - self.final) * progress
            case "cosine":
                return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
            case "wsd":
                decay = max(0.0, progress - (1 - _WSD_DECAY)) / _WSD_DECAY
                return 1 - (1 - self.final) * math.sqrt(min(1.0, decay))
            case _:
                assert_never(self.schedule)

    def build(self, module: "Module", *, lr: float | None = None) -> "AdamW":
        """Return the optimizer of a module's trainable weights. lr: peak rate; default: this configuration's."""
        from train.engine.adamw import AdamW
        from train.engine.eight_bit import AdamW8bit
        from train.engine.optim import Muon, parameter_groups

        marked = {"orthogonal": self.kind == "muon", "eight_bit": self.kind == "adamw_8bit"}
        groups = parameter_groups(module, self.weight_decay, **marked)
        rate = self.lr if lr is None else lr
        match self.kind:
            case "adamw":
                return AdamW(groups, rate, self.betas, self.eps)
            case "muon":
                return Muon(
                    groups, rate, self.betas, self.eps, momentum=self.momentum, newton_schulz=self.newton_schulz
                )
            case "adamw_8bit":
                return AdamW8bit(groups, rate, self.betas, self.eps)
            case _:
                assert_never(self.kind)
