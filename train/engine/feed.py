"""Batches of one process: its parts of each step's batch, on its device."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from train.config.run import RunConfig
from train.data.batches.images import StreamDataset
from train.data.batches.loading import Batch, loader
from train.data.batches.unreadable import UnreadableCounter
from train.data.store.prefetch import Batched


@dataclass(frozen=True)
class Feed:
    """Source of one process's batches."""

    config: RunConfig
    accelerator: Accelerator

    def batches(
        self, dataset: Batched[Batch] | StreamDataset[Any], start: int, counter: UnreadableCounter | None = None
    ) -> Iterator[list[Batch]]:
        """Yield this process's parts of each step's batch, from step `start` on."""
        config, accelerator = self.config, self.accelerator
        batches = loader(
            dataset,
            start_step=start,
            steps=config.steps,
            batch_size=config.batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            accumulation=config.accumulation,
            workers=config.workers,
            pin_memory=accelerator.device.type == "cuda",
            counter=counter,
        )
        for parts in batches:
            yield [part.to(accelerator.device) for part in parts]
