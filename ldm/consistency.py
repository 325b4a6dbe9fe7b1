"""Consistency models: one evaluation maps a state to the end of its trajectory, so that a few steps are enough.

Song et al. 2023 (arXiv 2303.01469); in latents and with guidance: Luo et al. 2023 (arXiv 2310.04378). The model is

    f(x_t, t) = skip(t) x_t + out(t) x̂0(x_t, t),   skip(0) = 1 and out(0) = 0

so that f(x, 0) = x. The constants are those of diffusers' LCMScheduler.
"""

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.parameterization import Number

SOLVER_STEPS = 50
"""Number of the solver's steps in Luo et al. 2023, and diffusers' default."""
TIME_SCALE = 10.0
"""Factor of the model's time in `boundary`, as in LCMScheduler."""
_SIGMA_DATA = 0.5


def boundary(time: Number) -> tuple[Number, Number]:
    """Return skip and out at model times, a number or a tensor of any shape: Song et al. 2023, eq. 5 and appendix C."""
    scaled = time * TIME_SCALE
    norm = scaled**2 + _SIGMA_DATA**2
    return _SIGMA_DATA**2 / norm, scaled / norm**0.5


def solver_indices(T: int, steps: int = SOLVER_STEPS) -> list[int]:
    """Return the indices at which the solver's steps start, in increasing order. Raises UserError if they don't fit T.

    A step ends where the one before it starts; the first ends at t = 0.
    """
    if not 1 <= steps <= T:
        raise UserError(f"{steps} steps of the solver: must be 1 to {T}, the model's number of timesteps")
    return [T // steps * k - 1 for k in range(1, steps + 1)]


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """Return the input (b, width) from which a UNet reads its guidance scale (b,), in float32.

    It is the embedding of timesteps, of 1000 (scale - 1): Luo et al. 2023, section 4.2, as in diffusers' pipelines.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half, device=scale.device) * (-torch.log(torch.tensor(1e4)) / max(half - 1, 1)))
    angles = 1000 * (scale.float() - 1)[:, None] * rates
    embedding = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.nn.functional.pad(embedding, (0, width % 2))
