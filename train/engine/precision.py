"""Numeric precision of the networks."""

from contextlib import nullcontext

import torch

from train.config.run import Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> torch.autocast | nullcontext[None]:
    """Return a context in which networks compute in this precision; their weights stay fp32."""
    return nullcontext() if precision == "fp32" else torch.autocast(device.type, DTYPES[precision])
