"""A term of the loss that has its own parameter and sees an intermediate feature."""

from typing import Any

import torch
from torch import Tensor, nn

from train.stages.ldm_step import Denoising
from train.stages.terms import Term
from train.stages.vae_step import Reconstruction

MIDDLE = {"vae": "decoder.mid_block.resnets.0", "ldm": "mid_block.resnets.0"}
"""Name of a module in each stage's network; gradient checkpointing computes its output twice."""


class Predict(nn.Module):
    """Error of a linear map from the mean of an intermediate feature to the mean of x0 or of the latents."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.name, self.calls = MIDDLE[stage], 0
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, {"vae": 16, "ldm": 32}[stage], generator=generator) / 4)

    def forward(self, seen: Reconstruction | Denoising) -> Tensor:
        self.calls += 1
        latents = seen.batch.x0 if isinstance(seen, Denoising) else seen.latents
        return (seen.features[self.name].float().mean((2, 3)) @ self.weight.T - latents.mean((2, 3))).square().mean()


def predict(stage: str, weight: float = 1.0) -> Term[Any]:
    return Term("toy", weight, Predict(stage), (MIDDLE[stage],))
