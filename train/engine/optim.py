"""Muon, and parameter groups with and without weight decay."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from train.config.optimizer import NewtonSchulz
from train.engine.adamw import AdamW
from train.engine.eight_bit import AdamW8bit, empty_state
from train.engine.orthogonal import orthogonalised

_MOMENTS = ({"step", "exp_avg", "exp_avg_sq"}, {"step", "momentum"})
"""Names of the entries of AdamW's and Muon's state of a weight."""


def parameter_groups(
    module: nn.Module, decay: float, *, orthogonal: bool, eight_bit: bool = False
) -> list[dict[str, Any]]:
    """Return a module's trainable weights as parameter groups; weights of one dimension get no weight decay.

    orthogonal, eight_bit: mark matrices and kernels for Muon or AdamW8bit. AdamW still trains embeddings, biases and
    normalisation weights.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    weights = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in weights if p.ndim > 1 and id(p) not in embeddings],
            "weight_decay": decay,
            "orthogonal": orthogonal,
            **({"eight_bit": True} if eight_bit else {}),
        },
        {"params": [p for p in weights if p.ndim > 1 and id(p) in embeddings], "weight_decay": decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimizer's state, except its settings, such as betas and weight decay: they may have changed.

    Raises ValueError for moments that don't fit the weights, because the fused optimizer doesn't check them.
    """
    settings = [{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    large = {id(p): empty_state(p.to("meta")) for p, _ in optimizer.large} if isinstance(optimizer, AdamW8bit) else {}
    for weight, moments in optimizer.state.items():
        if (empty := large.get(id(weight))) is not None:
            if _forms(moments) != _forms(empty):
                raise ValueError(f"the optimizer's moments don't fit a weight of shape {tuple(weight.shape)}")
            continue
        if not isinstance(weight, Tensor) or set(moments) not in _MOMENTS:
            raise ValueError(f"the optimizer's state has the unknown entries {', '.join(map(str, moments))}")
        for name, value in moments.items():
            fits = isinstance(value, Tensor) and _layout(value) == ([] if name == "step" else _layout(weight))
            if not fits or not value.is_floating_point():
                raise ValueError(f"the optimizer's {name} doesn't fit a weight of shape {tuple(weight.shape)}")


def _forms(state: dict[str, Any]) -> dict[str, Any]:
    """Return the shape and dtype of each entry of a state; of something other than a tensor, its type."""
    return {name: (v.shape, v.dtype) if isinstance(v, Tensor) else type(v) for name, v in state.items()}


def _layout(value: Tensor) -> list[tuple[int, int]]:
    """Return size and stride of each dimension, in the memory order of the optimizer's moments for such a weight."""
    strides = torch.empty_like(value, device="meta").stride()
    return [(n, stride) for n, stride in zip(value.shape, strides, strict=True) if n > 1]


class Muon(AdamW):
    """Optimizer: momentum with orthogonalised matrices (Jordan et al. 2024), and AdamW for all other weights.

    Groups marked `orthogonal` contain weights of two or more dimensions; a kernel (out, in, h, w) is treated as the
    matrix (out, in·h·w). Their step is 0.2 √max(rows, columns) · UVᵀ of the Nesterov momentum USVᵀ. Its elements are
    then as large as AdamW's, so that one learning rate serves both (Liu et al. 2025, arXiv 2502.16982, sec. 2.2). Like
    the fused AdamW, it leaves weights and momenta unchanged when `found_inf` is 1, without waiting for the device.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        *,
        momentum: float = 0.95,
        newton_schulz: NewtonSchulz = "jordan",
    ) -> None:
        super().__init__(groups, lr, betas, eps)
        self.momentum, self.newton_schulz = momentum, newton_schulz

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group.get("orthogonal"):
                by_shape = defaultdict(list)  # matrices of one shape are stacked
                for p in group["params"]:
                    if p.grad is not None:
                        by_shape[p.flatten(1).shape].append(p)
                if by_shape:
                    self._orthogonal_step(list(by_shape.values()), group["lr"], group["weight_decay"])
                for p in group["params"]:
                    p.grad = None  # AdamW skips weights without a gradient
        super().step()

    def _orthogonal_step(self, stacks: list[list[nn.Parameter]], lr: float, weight_decay: float) -> None:
        device, found_inf = stacks[0][0].device, getattr(self, "found_inf", None)
        finite = torch.ones((), device=device) if found_inf is None else 1 - found_inf.to(device)
        momenta = [[self._momentum(p) for p in weights] for weights in stacks]
        on_cpu = device.type == "cpu"
        if on_cpu and not finite:  # reading a number on the CPU doesn't wait
            return
        share = (1 - self.momentum) * (1 if on_cpu else finite)
        kept = 1 - lr * weight_decay * finite
        nesterov = []
        for weights, running in zip(stacks, momenta, strict=True):
            stack = torch.empty(len(weights), *weights[0].flatten(1).shape, dtype=torch.bfloat16, device=device)
            for p, momentum, matrix in zip(weights, running, stack, strict=True):
                assert p.grad is not None
                # No effect in a finite step. In a skipped step, the momentum adds 0 times the gradient.
                gradient = p.grad if on_cpu else p.grad.nan_to_num_(0, 0, 0)
                momentum.lerp_(gradient, share)
                matrix.copy_(gradient.lerp_(momentum, self.momentum).flatten(1))
            nesterov.append(stack)
        for weights, updates in zip(stacks, orthogonalised(nesterov, self.newton_schulz), strict=True):
            updates *= lr * finite * 0.2 * max(updates.shape[1:]) ** 0.5
            for p, update in zip(weights, updates, strict=True):
                if weight_decay:
                    p.mul_(kept)
                p.sub_(update.view_as(p))

    def _momentum(self, p: nn.Parameter) -> Tensor:
        state = self.state[p]
        if not state:  # AdamW needs a step in every state when it is loaded
            state |= {"step": torch.zeros((), device=p.device), "momentum": torch.zeros_like(p)}
        return state["momentum"]


def step_unless(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Do a step of a fused optimizer; if `bad`, on the weights' device, is 1, weights and moments stay unchanged."""
    if bad.device.type == "mps" and bad.item():  # the fused kernels of mps ignore found_inf
        return
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    optimizer.step()
