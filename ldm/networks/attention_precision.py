"""Precision in which attention is fast."""

import torch
from torch import Tensor


def needs_fp32(q: Tensor) -> bool:
    """Return whether attention with queries q should be computed in fp32: in 16 bits on the CPU, with gradients.

    Torch's backward pass of attention is much slower there in 16 bits than in 32 (benchmarks/choices.py measures it).
    """
    return q.device.type == "cpu" and q.dtype.itemsize < 4 and torch.is_grad_enabled()
