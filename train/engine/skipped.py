"""Counts of skipped steps, kept on the device, so that the CPU doesn't wait for them."""

import torch
from torch import Tensor


class SkippedSteps:
    """Counts of the steps that were skipped because a loss or gradient wasn't finite.

    A streak is a row of skipped steps. An overflow of fp16's gradients isn't part of a streak while the loss scale is
    above 1, because the next steps lower the scale: it neither lengthens a streak nor ends one.
    """

    def __init__(self, device: torch.device) -> None:
        self.total = torch.zeros((), device=device)
        """All skipped steps of the run."""
        self.in_a_row = torch.zeros((), device=device)
        """Length of the present streak."""
        self.unchanged = torch.zeros((), device=device)
        """Steps since the weights last changed, overflows included."""
        self.recent = torch.zeros((), device=device)
        """Steps in streaks since the last checkpoint after which training was seen to work."""

    def add(self, skipped: Tensor, overflow: Tensor) -> None:
        """Count a step. skipped: 1 if it was skipped, else 0. overflow: 1 if that is due to the loss scale only."""
        in_streak = skipped - overflow
        self.total += skipped
        self.recent += in_streak
        self.in_a_row = (self.in_a_row + in_streak) * skipped
        self.unchanged = (self.unchanged + skipped) * skipped

    def end_streak(self) -> None:
        """Forget the present streak, because other weights have been restored."""
        self.in_a_row.zero_()
        self.unchanged.zero_()
