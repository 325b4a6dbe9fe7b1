"""Exponential moving average of the weights: a_{t+1} = d_t a_t + (1 − d_t) w_{t+1}.

d_t = min(decay, (1 + t) / (10 + t)): the warm-up of TensorFlow's ExponentialMovingAverage. During the warm-up, the
share of the initial weights falls as 1 / C(n + 9, 9) after n updates, rather than as decay^n.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from train.engine.subset import Subset, frozen_names

Module = TypeVar("Module", bound=nn.Module)


class Ema(Generic[Module]):
    """Moving average of a module: `module` is a copy with averaged parameters and the current buffers, all fp32.

    The copy is in eval mode, takes no gradient, and shares the frozen parameters with the module. Create it after the
    module has been moved to its device and its parameters have been frozen as needed.
    """

    def __init__(self, module: Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: must be at least 0 and less than 1")
        self.decay = decay
        shared = {id(p): p for p in module.parameters() if not p.requires_grad and p.dtype == torch.float32}
        self.module: Module = copy.deepcopy(module, shared).float().eval().requires_grad_(False)
        self._source, self._subset = module, Subset(self.module, frozen_names(module))

    def decay_at(self, step: int) -> float:
        """Return the decay of update `step` = 0, 1, …"""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the module's current weights to the average. The decay depends only on `step`."""
        if trainable := self._pairs():
            averages: list[Tensor] = [average for average, _ in trainable]
            torch._foreach_lerp_(averages, [w.to(a) for a, w in trainable], 1 - self.decay_at(step))
        for copied, buffer in zip(self.module.buffers(), self._source.buffers(), strict=True):
            copied.copy_(buffer)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Exchange the module's trainable weights and their averages, without a copy."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for average, weight in self._pairs():
            average.data, weight.data = weight.data, average.data

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return each average with its weight, without the frozen ones that are shared."""
        pairs = zip(self.module.parameters(), self._source.parameters(), strict=True)
        return [(average, weight) for average, weight in pairs if average is not weight]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages of the trainable parameters, and the buffers, by their names in the module."""
        return self._subset.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state_dict`. Raises the same errors as `Subset.load_state_dict`."""
        self._subset.load_state_dict(state)
