"""Random numbers with a fixed seed."""

import torch
from torch import Tensor


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    """Return `count` generators with the seeds `first`, `first` + 1, …"""
    return [torch.Generator().manual_seed(first + k) for k in range(count)]
