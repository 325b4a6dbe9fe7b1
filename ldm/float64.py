"""float64 on any device: Apple's mps doesn't have it, so that these computations run on the CPU there."""

import torch
from torch import Tensor


def float64_device(device: torch.device | str) -> torch.device:
    """Return the device, or the CPU if the device has no float64."""
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


def double(x: Tensor) -> Tensor:
    """Return x in float64; on the CPU if its device has no float64."""
    return x.to(float64_device(x.device)).double()
