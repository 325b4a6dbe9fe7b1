"""Batches of one process: its parts of each step's batch, on its device; and the run's position in the examples."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, Self

from accelerate import Accelerator

from train.config.run import RunConfig
from train.data.batches.images import StreamDataset
from train.data.batches.loading import Batch, loader
from train.data.batches.unreadable import UnreadableCounter
from train.data.order.permutation import Epochs
from train.data.store.prefetch import Batch_co, Batched


class Ordered(Batched[Batch_co], Protocol[Batch_co]):
    """A training dataset whose order can start at another position."""

    @property
    def order(self) -> Epochs: ...

    def shifted(self, shift: int, /) -> Self: ...


class Feed:
    """Source of one process's batches, and the position of each step. Checkpoints contain its state.

    A position counts examples since the start of training. Random numbers are drawn by position. The examples follow
    their order from position + `shift` on. If the order has changed since the checkpoint, for example because the data
    are others, a new epoch begins: `shift` is set so that the run continues at the start of an epoch of the new order.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, data: str, print: Callable[[str], object]) -> None:
        """data: fingerprint of the dataset. print: prints a line."""
        self.config, self.accelerator, self.data, self.print = config, accelerator, data, print
        self.first_step = self.first_position = self.shift = self.length = 0
        self.epochs: int | None = 0  # number of epochs begun before the first position; None: not known
        self.order = ""  # identity of the order of the examples; unknown

    def position(self, step: int) -> int:
        """Return the position of a step's first example."""
        return self.first_position + (step - self.first_step) * self.config.batch_size

    def state(self, step: int) -> dict[str, Any]:
        """Return what determines the examples from a step on, for its checkpoint."""
        position = self.position(step)
        epochs = _epochs(position + self.shift, self.length) if self.length else self.epochs
        return {"position": position, "order": self.order, "shift": self.shift, "epochs": epochs}

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Continue at a step with the result of `state`."""
        self.first_step, self.first_position, self.shift = step, int(state["position"]), int(state["shift"])
        self.order, self.epochs = str(state["order"]), state["epochs"] and int(state["epochs"])

    def batches(
        self, dataset: Ordered[Batch] | StreamDataset[Any], start: int, counter: UnreadableCounter | None = None
    ) -> Iterator[list[Batch]]:
        """Yield this process's parts of each step's batch, from step `start` on."""
        config, accelerator = self.config, self.accelerator
        self._follow(dataset.order, start)
        batches = loader(
            dataset.shifted(self.shift) if self.shift else dataset,
            start_step=start,
            steps=config.steps,
            batch_size=config.batch_size,
            offset=self.position(0),
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            accumulation=config.accumulation,
            workers=config.workers,
            pin_memory=accelerator.device.type == "cuda",
            counter=counter,
        )
        return ([part.to(accelerator.device) for part in parts] for parts in batches)

    def _follow(self, order: Epochs, start: int) -> None:
        """Follow an order; begin a new epoch of it at step `start` if the checkpoint's was another."""
        identity = hashlib.sha256(json.dumps([self.data, order.identity]).encode()).hexdigest()[:16]
        if self.order not in ("", identity):
            self.print(f"the order of the training examples has changed: a new epoch begins at step {start}")
            position = self.position(start)
            epochs = _epochs(position, order.length) if self.epochs is None else self.epochs
            self.shift = epochs * order.length - position
        self.order, self.length = identity, order.length


def _epochs(position: int, length: int) -> int:
    """Return the number of epochs that have begun before a position; 0 if their length isn't known."""
    return -(-position // length) if length else 0
