"""The held-out loss during training: its minimum, and whether it has risen significantly since.

Each validation measures the same images with the same noise, so two validations are compared image by image. With the
differences d_i = l_i(now) − l_i(minimum) of n images, the mean of d has the standard error std(d) / √n. This is much
smaller than the error of either loss, because most of the variation between images and noises is common to both and
cancels. A rise counts if it has p < 10⁻⁵ in the one-sided t-test of d (4.3 standard errors for many images) in two
successive validations. The threshold is this strict because the minimum is the smallest of many numbers, which later
ones exceed by chance: if the expected loss doesn't change at all, fewer than 1 in 300 runs of 100 validations report a
rise (simulated with 5 to 500 images).
"""

import math
from collections.abc import Mapping
from typing import Any

from scipy.special import stdtr
from torch import Tensor

_PROBABILITY = 1e-5  # of such a rise by chance
_IN_A_ROW = 2  # validations


class HeldOutLoss:
    """The validation with the smallest held-out loss, and the rise of the loss since. Checkpoints contain its state."""

    def __init__(self) -> None:
        self.step = 0
        """Step of the minimum."""
        self.losses: Tensor | None = None
        """Loss of each image at the minimum, (n,) float64; None: nothing was measured yet."""
        self.identity = ""
        """Identity of images, noise and loss (`Validation.identity`)."""
        self.above = 0
        """Number of successive validations, up to the last one, that were significantly above the minimum."""

    def add(self, step: int, losses: Tensor, identity: str) -> bool:
        """Add a validation with the loss of each image, (n,). Returns whether its mean is the smallest so far.

        Losses with another identity can't be compared with earlier ones: they start anew.
        """
        if not losses.isfinite().all():
            return False
        if self.losses is None or identity != self.identity or losses.mean() < self.losses.mean():
            self.step, self.losses, self.identity, self.above = step, losses, identity, 0
            return True
        errors = standard_errors(losses - self.losses)
        chance = float(stdtr(len(losses) - 1, -errors)) if len(losses) > 1 else 1.0
        self.above = self.above + 1 if chance < _PROBABILITY else 0
        return False

    def report(self, step: int, losses: Tensor, kept: str) -> str:
        """Return a line on the rise after `add`, if it has just become significant, else "".

        kept: folder of the weights with the smallest loss; "" if they aren't kept.
        """
        if self.losses is None or self.above != _IN_A_ROW:
            return ""
        errors = standard_errors(losses - self.losses)
        advice = f"{kept} has the weights of step {self.step:,}" if kept else "--keep-best True keeps such weights"
        return (
            f"step {step:,}: overfitting: the held-out loss has been rising since step {self.step:,}, from "
            f"{float(self.losses.mean()):.5f} to {float(losses.mean()):.5f} ({errors:.1f} standard errors, over "
            f"{len(losses):,} images); {advice}; more images or a smaller network would help"
        )

    def forget(self) -> None:
        """Forget the minimum, so that the next validation is the smallest so far."""
        self.losses, self.above = None, 0

    def state(self) -> dict[str, Any]:
        """Return the state, {} if nothing was measured."""
        if self.losses is None:
            return {}
        return {"step": self.step, "losses": self.losses, "identity": self.identity, "above": self.above}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        if state:
            self.step, self.losses = int(state["step"]), state["losses"]
            self.identity, self.above = str(state["identity"]), int(state["above"])


def standard_errors(differences: Tensor) -> float:
    """Return the mean of these numbers (n,), divided by its standard error; 0 for fewer than two or equal numbers."""
    n = len(differences)
    spread = float(differences.std()) if n > 1 else 0.0
    return float(differences.mean()) * math.sqrt(n) / spread if spread > 0 else 0.0
