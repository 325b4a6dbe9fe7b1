"""Training batches in order: this process's parts of each step, prefetched. Unreadable images are counted."""

from collections.abc import Iterator
from typing import Any, TypeVar

from train.data.batches.images import StreamDataset
from train.data.batches.records import Examples
from train.data.batches.unreadable import UnreadableCounter
from train.data.order.permutation import positions
from train.data.store.prefetch import Batched, read_ahead

Batch = TypeVar("Batch", bound=Examples)


def loader(
    dataset: Batched[Batch] | StreamDataset[Any],
    *,
    start_step: int,
    steps: int,
    batch_size: int,
    offset: int = 0,
    rank: int = 0,
    world: int = 1,
    accumulation: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    counter: UnreadableCounter | None = None,
) -> Iterator[list[Batch]]:
    """Prefetch this rank's `accumulation` parts of the batch of each step start_step … steps − 1, in workers.

    offset: position of step 0's first example; not 0 if earlier steps had another batch size. The batches are the same
    for any number of workers. Raises UserError if the batch size isn't divisible.
    """
    positions(0, batch_size, rank, world, accumulation)  # raise here rather than in a worker
    plan = (
        (p + offset).tolist()
        for step in range(start_step, steps)
        for p in positions(step, batch_size, rank, world, accumulation)
    )
    batches: Iterator[Any]
    if isinstance(dataset, StreamDataset):
        batches = dataset.read(plan, workers, ahead=2 * accumulation)
    else:
        batches = read_ahead(dataset, plan, workers, ahead=2 * accumulation, pin_memory=pin_memory)
    return _steps(batches, accumulation, counter)


def _steps(batches: Iterator[Batch], accumulation: int, counter: UnreadableCounter | None) -> Iterator[list[Batch]]:
    parts = []
    for batch in batches:
        if counter is not None:
            counter.add_to_report(batch.left_out)
            counter.count(len(batch.position), batch.damaged)
        parts.append(batch)
        if len(parts) == accumulation:
            yield parts
            parts = []
