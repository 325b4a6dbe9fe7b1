"""What the loop asks of a stage, what a phase of its step gives, and what may be hooked in around each step."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from train.engine.ema import Ema

Batch = Any
"""A record of a stage's own (train/data/batches/records.py)."""


class StepOutput(NamedTuple):
    """What a phase's module gives for one part of a batch."""

    loss: Tensor
    metrics: dict[str, Tensor]
    """Logged beside the loss; detached scalars."""
    batch: Batch
    """What the later phases are given in place of the part; detached."""


@dataclass(frozen=True)
class Phase:
    """A network's turn in a step: its module's `forward(part)` gives a StepOutput, its optimizer follows."""

    name: str
    """Its name in checkpoints."""
    module: nn.Module
    optimizer: Optimizer
    lr: float
    """Peak learning rate."""
    start: int = 0
    """First step in which it takes its turn."""
    prefix: str = ""
    """What `loss` and `grad_norm` are preceded by in the metrics."""


class Stage(Protocol):
    """What differs between the stages."""

    phases: list[Phase]
    ema: Ema[Any]

    def batches(self, start: int) -> Iterator[list[Batch]]:
        """For each step from `start` on, the parts of this process's share of its batch."""
        ...

    def prepare(self, step: int, parts: list[Batch]) -> list[Batch]:
        """The parts with all that the phases need: what frozen networks add, and what is drawn for the whole step."""
        ...

    def finish(self, step: int) -> None:
        """Do what follows the last phase of a step; every process calls it."""
        ...

    def validate(self, step: int) -> dict[str, float]:
        """Held-out measures with the averaged weights; every process calls it."""
        ...

    def sheet(self, path: Path) -> None:
        """Write a picture to look at; the main process calls it."""
        ...

    def export(self, folder: Path, *, final: bool) -> dict[str, float]:
        """Write the result into an empty folder (main process only; the others take part with `folder` to ignore).

        Returns figures worth logging.
        """
        ...


class Publish(Protocol):
    """Writes what goes with the weights that a stage has exported, when others are to use them; the main process calls it."""

    def __call__(self, folder: Path, step: int, *, final: bool) -> None: ...


class Hooks:
    """Calls around each step, for tests and benchmarks. These do nothing: override what is needed."""

    def begin_step(self, step: int, parts: list[Batch]) -> list[Batch]:
        """The prepared parts that the phases are given in place of `parts`."""
        return parts

    def end_step(self, step: int, metrics: dict[str, Tensor]) -> None:
        """See the metrics of a step, as tensors on the device, once its weights and averages are updated."""
