"""What the network predicts, and the conversions between predictions, for x_t = alpha x0 + sigma eps.

eps: Ho et al. 2020 (arXiv 2006.11239), eq. 12; x0: the data; v = alpha eps - sigma x0: Salimans & Ho 2022
(arXiv 2202.00512), section 4 and appendix D. All assume alpha^2 + sigma^2 = 1. Given x_t and its level,
each is an affine function of any other.

alpha and sigma are floats, or tensors that broadcast against the pictures: (b, 1, 1, 1) for (b, c, h, w).
"""

from typing import Literal, assert_never

from torch import Tensor

from ldm.errors import UserError

Target = Literal["eps", "x0", "v"]
Number = float | Tensor

PREDICTION_TYPE: dict[Target, str] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
"""diffusers' name of each target."""


def target_from_diffusers(prediction_type: str) -> Target:
    """The target of that `prediction_type` of a scheduler_config.json; UserError if there is none."""
    for kind, name in PREDICTION_TYPE.items():
        if name == prediction_type:
            return kind
    raise UserError(f"prediction_type {prediction_type!r}: known are {', '.join(PREDICTION_TYPE.values())}")


def target_of(kind: Target, x0: Tensor, eps: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """What the network should have said of x_t = alpha x0 + sigma eps."""
    match kind:
        case "eps":
            return eps
        case "x0":
            return x0
        case "v":
            return alpha * eps - sigma * x0
        case _:
            assert_never(kind)


def to_x0(kind: Target, output: Tensor, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """The clean picture that an output means."""
    match kind:
        case "eps":
            return (x_t - sigma * output) / alpha
        case "x0":
            return output
        case "v":
            return alpha * x_t - sigma * output
        case _:
            assert_never(kind)


def to_eps(kind: Target, output: Tensor, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
    """The noise that an output means."""
    match kind:
        case "eps":
            return output
        case "x0":
            return (x_t - alpha * output) / sigma
        case "v":
            return alpha * output + sigma * x_t
        case _:
            assert_never(kind)


def error_ratio(kind: Target, snr: Tensor) -> Tensor:
    """A prediction's squared error in this target over that in x0 (Salimans & Ho 2022, section 4)."""
    match kind:
        case "eps":
            return snr
        case "x0":
            return snr.new_ones(()).expand_as(snr)
        case "v":
            return snr + 1
        case _:
            assert_never(kind)
