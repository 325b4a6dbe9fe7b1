"""The network's prediction targets and the conversions between them, for x_t = alpha x0 + sigma eps.

eps   the noise: Ho et al. 2020 (arXiv 2006.11239), eq. 12
x0    the data
v     alpha eps - sigma x0: Salimans & Ho 2022 (arXiv 2202.00512), section 4 and appendix D
flow  eps - x0, the velocity of the straight path: Liu et al. 2022 (arXiv 2209.03003), eq. 1, with time reversed

Given x_t and its level, each target is an affine function of any other, on any path (ldm/schedule.py).

alpha and sigma are floats, or tensors that broadcast against the images: (b, 1, 1, 1) for (b, c, h, w).
"""

from typing import assert_never

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.kinds import Target
from ldm.schedule import Schedule

Number = float | Tensor

PREDICTION_TYPE: dict[Target, str] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction", "flow": "flow_prediction"}
"""diffusers' name of each target."""


def target_from_diffusers(prediction_type: str) -> Target:
    """Return the target of a scheduler_config.json's `prediction_type`. Raises UserError for an unknown one."""
    for kind, name in PREDICTION_TYPE.items():
        if name == prediction_type:
            return kind
    raise UserError(f"prediction_type {prediction_type!r}: choose {', '.join(PREDICTION_TYPE.values())}")


def check_target(kind: Target, schedule: Schedule) -> None:
    """Raise UserError for a target that doesn't determine x0 at every level of the schedule."""
    if kind == "eps" and schedule.zero_terminal_snr:
        raise UserError(
            "target eps: can't be used with a schedule that ends in pure noise (zero terminal SNR, or a flow), where "
            "the noise doesn't determine the image; choose v, x0 or flow"
        )


def target_of(kind: Target, x0: Tensor, eps: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """Return the value that the network should predict from x_t = alpha x0 + sigma eps."""
    match kind:
        case "eps":
            return eps
        case "x0":
            return x0
        case "v":
            return alpha * eps - sigma * x0
        case "flow":
            return eps - x0
        case _:
            assert_never(kind)


def to_x0(kind: Target, output: Tensor, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """Return x0 computed from a network's output for x_t."""
    match kind:
        case "eps":
            return (x_t - sigma * output) / alpha
        case "x0":
            return output
        case "v":  # the divisor is 1 on a variance-preserving path
            return (alpha * x_t - sigma * output) / (alpha**2 + sigma**2)
        case "flow":  # the divisor is 1 on the straight path
            return (x_t - sigma * output) / (alpha + sigma)
        case _:
            assert_never(kind)


def to_eps(kind: Target, output: Tensor, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """Return eps computed from a network's output for x_t."""
    match kind:
        case "eps":
            return output
        case "x0":
            return (x_t - alpha * output) / sigma
        case "v":
            return (alpha * output + sigma * x_t) / (alpha**2 + sigma**2)
        case "flow":
            return (x_t + alpha * output) / (alpha + sigma)
        case _:
            assert_never(kind)


def error_ratio(kind: Target, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return a prediction's squared error in this target, divided by that in x0 (Salimans & Ho 2022, section 4)."""
    match kind:
        case "eps":
            return (alpha / sigma) ** 2
        case "x0":
            return torch.ones_like(alpha)
        case "v":
            return ((alpha**2 + sigma**2) / sigma) ** 2
        case "flow":
            return ((alpha + sigma) / sigma) ** 2
        case _:
            assert_never(kind)
