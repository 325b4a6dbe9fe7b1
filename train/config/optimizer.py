"""The configuration of the optimizer, and the rule that configurations reject unknown keys and non-finite numbers."""

import math
from typing import TYPE_CHECKING, Literal, assert_never

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    from torch.nn import Module
    from torch.optim import AdamW

strict = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=strict)
class OptimizerConfig:
    """The optimizer and its learning rate over time."""

    kind: Literal["adamw", "muon"] = "adamw"
    """Optimizer: `adamw` (Loshchilov & Hutter 2019), or `muon` (Jordan et al. 2024) for matrices and AdamW for
    the rest. Muon makes more progress per step, but its steps take longer; small networks gain most."""
    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Decay of the learning rate after the warm-up, from the peak to `final` times the peak."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak learning rate at the last step (cosine, linear)."""
    warmup: int = Field(default=500, ge=0)
    """Steps over which the learning rate rises linearly from 0 to its peak."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square (AdamW)."""
    eps: float = Field(default=1e-8, gt=0)
    """Constant added to the root of the running mean square."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of Muon's running mean of the gradient."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay of matrices and convolution kernels (not of biases and normalisation weights)."""
    clip: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient over all parameters; 0 turns clipping off."""

    def share(self, step: int, steps: int) -> float:
        """Return the learning rate at `step` of `steps` as a share of the peak: linear rise, then the chosen decay."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, steps - self.warmup)
        match self.schedule:
            case "constant":
                return 1.0
            case "linear":
                return 1 - (1 - self.final) * done
            case "cosine":
                return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))
            case _:
                assert_never(self.schedule)

    def build(self, module: "Module", *, lr: float | None = None) -> "AdamW":
        """Return the optimizer of a module's trainable weights. lr: peak rate; default: this configuration's."""
        from torch.optim import AdamW

        from train.engine.optim import Muon, parameter_groups

        groups = parameter_groups(module, self.weight_decay, orthogonal=self.kind == "muon")
        rate = self.lr if lr is None else lr
        match self.kind:
            case "adamw":
                return AdamW(groups, rate, self.betas, self.eps, fused=True)
            case "muon":
                return Muon(groups, rate, self.betas, self.eps, momentum=self.momentum)
            case _:
                assert_never(self.kind)
