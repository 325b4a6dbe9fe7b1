"""The optimizer, its learning rate over time, and the arithmetic of the networks."""

import math
from contextlib import nullcontext
from typing import assert_never

import torch
from torch import nn

from train.config import OptimizerConfig, Precision


def adamw(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101), fused; decay on weights of two and more dimensions only."""
    weights = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], config.lr, config.betas, config.eps, fused=True)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Share of the peak rate at `step` of `steps`: a linear rise, then the chosen fall. A function of nothing else."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, steps - config.warmup)
    match config.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1 - (1 - config.final) * done
        case "cosine":
            return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * done))
        case _:
            assert_never(config.schedule)


def autocast(device: torch.device, precision: Precision) -> torch.autocast | nullcontext[None]:
    """The arithmetic of the networks; weights stay fp32."""
    match precision:
        case "fp32":
            return nullcontext()
        case "bf16":
            return torch.autocast(device.type, torch.bfloat16)
        case "fp16":
            return torch.autocast(device.type, torch.float16)
        case _:
            assert_never(precision)
