"""Prefetching: batches from torch's DataLoader, in its worker processes or in this process."""

import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch.utils.data import DataLoader

from ldm.errors import RunError

Batch_co = TypeVar("Batch_co", covariant=True)
Batch = TypeVar("Batch")


class Batched(Protocol[Batch_co]):
    """A dataset that returns a full batch for a list of positions, as DataLoader requires."""

    def __getitems__(self, positions: Sequence[int], /) -> Batch_co: ...


def read_ahead(
    dataset: Batched[Batch],
    parts: Iterable[Sequence[int]],
    workers: int,
    *,
    ahead: int = 2,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield `dataset.__getitems__(part)` for each part; each worker prefetches `ahead` parts. 0 workers: no prefetch.

    RunError and OSError from a worker are raised unchanged here, without the worker's traceback in their message.
    """
    loader: Any = DataLoader(
        cast(Any, _ErrorsReturned(dataset)),
        batch_sampler=cast(Any, parts),
        collate_fn=_identity,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # leaves torch's global generator unchanged
        worker_init_fn=_delay_signals,
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


class _ErrorsReturned:
    """A dataset that returns the errors meant for users instead of raising them."""

    def __init__(self, dataset: Batched[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, positions: Sequence[int]) -> Any:
        try:
            return self.dataset.__getitems__(positions)
        except (RunError, OSError) as error:
            return error


def _identity(batch: Any) -> Any:
    return batch


def _delay_signals(worker: int) -> None:
    """Ignore Control-C and delay SIGTERM in a worker, because the training process needs its last batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
