"""Interfaces between the training loop and a stage: the stage, the phases of its step, and hooks around each step."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from train.engine.ema import Ema

Batch = Any
"""A record type that the stage defines (train/data/batches/records.py)."""


class StepOutput(NamedTuple):
    """Result of a phase's module for one part of a batch."""

    loss: Tensor
    metrics: dict[str, Tensor]
    """Detached scalars, logged in addition to the loss."""
    batch: Batch
    """Input of the later phases, which replaces the part; detached."""


class Validation(NamedTuple):
    """Result of a validation."""

    metrics: dict[str, float]
    """Metrics to log, by name."""
    losses: Tensor | None = None
    """Loss of each held-out image, (n,) float64 on the CPU, with the same noise in each validation; None: not measured.
    """
    identity: str = ""
    """Identity of images, noise and loss: only losses with the same identity can be compared."""


@dataclass(frozen=True)
class Phase:
    """One network's update in a step: its module's `forward(part)` returns a StepOutput, then its optimizer steps."""

    name: str
    """Name in checkpoints."""
    module: nn.Module
    optimizer: Optimizer
    lr: float
    """Peak learning rate."""
    start: int = 0
    """First step in which the phase runs."""
    prefix: str = ""
    """Prefix of `loss` and `grad_norm` in the metrics."""


class Stage(Protocol):
    """Interface of a training stage."""

    phases: list[Phase]
    ema: Ema[Any]

    def batches(self, start: int) -> Iterator[list[Batch]]:
        """Yield, for each step from `start` on, the parts of this process's share of the batch."""
        ...

    def prepare(self, step: int, parts: list[Batch]) -> list[Batch]:
        """Return the parts with all that the phases need: outputs of frozen networks, and random draws for the step."""
        ...

    def finish(self, step: int) -> None:
        """Do what the stage needs after the last phase of a step; every process calls it."""
        ...

    def validate(self, step: int) -> Validation:
        """Measure the averaged weights on held-out images; every process calls it."""
        ...

    def sheet(self, path: Path) -> None:
        """Write a sample sheet; the main process calls it."""
        ...

    def export(self, folder: Path, *, final: bool) -> dict[str, float]:
        """Write the result into an empty folder. Only the main process writes; the others take part, ignoring `folder`.

        Returns metrics to log.
        """
        ...


class Publish(Protocol):
    """Writer of the files that accompany exported weights for publication; the main process calls it.

    best: whether the weights are those with the smallest held-out loss so far.
    """

    def __call__(self, folder: Path, step: int, *, final: bool, best: bool = False) -> None: ...


class Hooks:
    """Calls around each step, for tests and benchmarks. They do nothing by default: override as needed."""

    def begin_step(self, step: int, parts: list[Batch]) -> list[Batch]:
        """Return the parts that the phases receive; `parts` are the prepared ones."""
        return parts

    def end_step(self, step: int, metrics: dict[str, Tensor]) -> None:
        """Receive a step's metrics, as tensors on the device, after its weights and averages are updated."""
