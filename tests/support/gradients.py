"""Comparison of gradients and weights."""

import torch
from torch import Tensor, nn


def gradient(module: nn.Module) -> Tensor:
    """Return the gradients of all parameters as one vector, 0 where there is none."""
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in module.parameters()])


def relative_distance(a: Tensor, b: Tensor) -> float:
    """Return ‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())
