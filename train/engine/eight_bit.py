"""AdamW whose moments are stored in 8 bits per number (Dettmers et al. 2022, arXiv 2110.02861).

Each block of 256 numbers has one scale, its largest magnitude. A number is stored as a code c: scale · (c / n)⁴, with a
sign for the first moment. Neighbouring levels then differ by about 4 / c, and the smallest is scale / n⁴.

A step changes the second moment by 1 − β₂, usually .1 %, which is less than the distance to the next level: rounding to
the nearest level would often undo the change. So a number is rounded up or down with shares that keep its mean over the
steps. They follow a fixed sequence instead of random numbers, so a continued run is the same bit for bit.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from train.engine.adamw import AdamW

BLOCK = 256
SMALLEST = 4096
"""Number of elements from which a weight's moments are stored in 8 bits, if BLOCK divides it. Others are small."""
_GOLDEN = 40503  # 2¹⁶ divided by the golden ratio: multiples of it, modulo 2¹⁶, are spread evenly


class _Code(NamedTuple):
    dtype: torch.dtype
    levels: int
    smallest: int
    """Smallest code of a number's magnitude. The second moment is never rounded to 0: AdamW divides by its root."""


_CODES = {"exp_avg": _Code(torch.int8, 127, 0), "exp_avg_sq": _Code(torch.uint8, 255, 1)}


def empty_state(weight: Tensor) -> dict[str, Tensor]:
    """Return the state of a weight before its first step."""
    state = {"step": torch.zeros((), device=weight.device)}
    for name, code in _CODES.items():
        state[name] = torch.zeros(weight.numel() // BLOCK, BLOCK, dtype=code.dtype, device=weight.device)
        state[f"{name}_scale"] = torch.zeros(weight.numel() // BLOCK, 1, device=weight.device)
    return state


def encode(name: str, x: Tensor, position: Tensor | int) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of a moment (blocks, BLOCK). position: place in the sequence of the rounding."""
    code = _CODES[name]
    scale = x.abs().amax(1, keepdim=True)
    magnitude = x.abs() / scale.clamp_min(torch.finfo(x.dtype).tiny)
    c = magnitude.sqrt().sqrt_().mul_(code.levels).floor_().clamp_(code.smallest, code.levels - 1)
    low, high = (step.div(code.levels).square_().square_() for step in (c, c + 1))
    place = torch.arange(BLOCK, device=x.device) + position
    share = (place.long() * _GOLDEN % 2**16).float() / 2**16  # (BLOCK,), in [0, 1)
    c += magnitude.sub_(low) > high.sub_(low).mul_(share)
    return c.copysign_(x).to(code.dtype), scale


def decode(name: str, codes: Tensor, scale: Tensor) -> Tensor:
    """Return the numbers of codes and scales, float32."""
    magnitude = codes.float() / _CODES[name].levels
    return magnitude.square().square_().copysign_(magnitude).mul_(scale)


class AdamW8bit(AdamW):
    """AdamW with moments in 8 bits for large weights of groups marked `eight_bit`, and in float32 for all others.

    Like the fused AdamW, it leaves weights and moments unchanged when `found_inf` is 1, without waiting for the device.
    """

    @property
    def large(self) -> list[tuple[nn.Parameter, dict[str, Any]]]:
        """The weights whose moments are stored in 8 bits, with their groups."""
        marked = [group for group in self.param_groups if group.get("eight_bit")]
        return [(p, g) for g in marked for p in g["params"] if p.numel() >= SMALLEST and p.numel() % BLOCK == 0]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p, group in self.large:
            if p.grad is not None:
                self._step(p, group)
                p.grad = None  # AdamW skips weights without a gradient
        super().step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # converts all moments to the weights' dtype, which keeps the codes' values
        for state in self.state.values():
            if f"{next(iter(_CODES))}_scale" in state:
                state |= {name: state[name].to(code.dtype) for name, code in _CODES.items() if name in state}

    def _step(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        on_cpu, found_inf = p.device.type == "cpu", getattr(self, "found_inf", None)
        finite = torch.ones((), device=p.device) if found_inf is None else 1 - found_inf.to(p.device)
        if on_cpu and not finite:  # reading a number on the CPU doesn't wait
            return

        def unless_skipped(new: Tensor, old: Tensor) -> Tensor:
            return new if on_cpu else torch.where(finite > 0, new, old)

        if not self.state[p]:
            self.state[p] |= empty_state(p)
        state, (beta1, beta2) = self.state[p], group["betas"]
        step = state["step"].add_(finite)
        assert p.grad is not None
        gradient = p.grad.reshape(-1, BLOCK).float()
        moments = {name: decode(name, state[name], state[f"{name}_scale"]) for name in _CODES}
        moments["exp_avg"].lerp_(gradient, 1 - beta1)
        moments["exp_avg_sq"].lerp_(gradient.square(), 1 - beta2)
        for name, moment in moments.items():
            codes, scale = encode(name, moment, step)
            state[name].copy_(unless_skipped(codes, state[name]))
            state[f"{name}_scale"].copy_(unless_skipped(scale, state[f"{name}_scale"]))
        root = moments["exp_avg_sq"].div_(1 - beta2**step).sqrt_().add_(group["eps"])
        update = moments["exp_avg"].div_(root).mul_(group["lr"] / (1 - beta1**step))
        p.mul_(1 - group["lr"] * group["weight_decay"] * finite)
        p.sub_(unless_skipped(update, torch.zeros_like(update)).view(p.shape))
