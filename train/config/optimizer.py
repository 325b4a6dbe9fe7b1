"""The optimizer's configuration; and of every one, that unknown keys and non-finite numbers are refused."""

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
    """`adamw` (Loshchilov & Hutter 2019); `muon` (Jordan et al. 2024) for the matrices, AdamW for the rest: more progress
    a step at the price of longer steps, which small networks repay well."""
    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the rate falls from its peak to `final` of it over the steps after the warm-up."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak rate that is left at the last step (cosine, linear)."""
    warmup: int = Field(default=500, ge=0)
    """Steps over which the rate rises linearly from 0 to its peak."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square (AdamW)."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the running mean square."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of Muon's running mean of the gradient."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled decay, on matrices and convolution kernels only (not on biases and normalisation weights)."""
    clip: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient over all parameters; 0 leaves it as it is."""

    def share(self, step: int, steps: int) -> float:
        """Return the share of the peak rate at `step` of `steps`: a linear rise, then the chosen fall."""
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
        """The optimizer of a module's trainable weights, at peak rate `lr`, else this configuration's."""
        from torch.optim import AdamW

        from train.engine.optim import Muon, decayed

        groups = decayed(module, self.weight_decay, orthogonal=self.kind == "muon")
        rate = self.lr if lr is None else lr
        match self.kind:
            case "adamw":
                return AdamW(groups, rate, self.betas, self.eps, fused=True)
            case "muon":
                return Muon(groups, rate, self.betas, self.eps, momentum=self.momentum)
            case _:
                assert_never(self.kind)
