"""Trial passes: the phases of a step without the optimizers. They measure a step, and test weights."""

import torch
from torch import Tensor

from train.engine.precision import autocast
from train.engine.run import AnyRun
from train.engine.stage import Batch, Phase


def trial(
    run: AnyRun, phases: list[Phase], part: Batch, *, scale: float | Tensor = 1.0, gradient: bool = True
) -> Tensor:
    """Run the phases on a part of a batch. Returns 1 if a loss or a gradient isn't finite, else 0. No weight changes.

    scale: factor of the loss while gradients are computed. gradient: whether to compute and test gradients.
    """
    finite = torch.ones((), dtype=torch.bool, device=run.accelerator.device)
    for phase in phases:
        with autocast(run.accelerator.device, run.config.precision):
            output = phase.module(part)
        finite &= torch.isfinite(output.loss.detach())
        if gradient:
            (output.loss * scale).backward()
            gradients = [p.grad for p in phase.module.parameters() if p.grad is not None]
            finite &= torch.isfinite(torch.nn.utils.get_total_norm(gradients))
            phase.module.zero_grad(set_to_none=True)
        part = output.batch
    return (~finite).float()
