"""Prefetching: batches from torch's DataLoader, in its worker processes or in this process."""

import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from multiprocessing.connection import wait
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

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
    Raises RunError if a worker is killed, or if memory or shared memory run out.
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
    batches = _without_handler(loader)
    while True:
        try:
            batch = next(batches, None)
        except (RuntimeError, OSError, EOFError) as error:
            if killed := _killed(getattr(batches, "_workers", ())):
                raise killed from error
            raise
        if batch is None:
            return
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _without_handler(loader: Any) -> Iterator[Any]:
    """Start a loader's workers without torch's handler of SIGCHLD.

    The handler raises an error anywhere in the training step when a worker is killed. Without it, the loader reports
    that when the next batch is missing, at most 5 s later.
    """
    before = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return batches


def _killed(processes: Sequence[Any]) -> RunError | None:
    """Return the error for workers of which one has died. The others are killed, because they may hang."""
    wait([process.sentinel for process in processes], 1)  # one that is just ending
    codes = [process.exitcode for process in processes if process.exitcode]
    if not codes:
        return None
    for process in processes:
        process.kill()
    number = -min(codes)
    name = signal.Signals(number).name if number in set(signal.Signals) else f"status {max(codes)}"
    what = "shared memory (/dev/shm)" if number == signal.SIGBUS else "memory"
    return RunError(
        f"a process that reads images was killed ({name}), probably because {what} ran short: run the same command "
        f"again with fewer --workers than {len(processes)}"
    )


class _ErrorsReturned:
    """A dataset that returns the errors meant for users instead of raising them."""

    def __init__(self, dataset: Batched[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, positions: Sequence[int]) -> Any:
        try:
            batch = self.dataset.__getitems__(positions)
        except (RunError, OSError) as error:
            return error
        except MemoryError:
            return RunError("out of memory while reading images: run the same command again with fewer --workers")
        try:
            if get_worker_info() is not None:
                _share(batch)
        except RuntimeError:
            return RunError(
                "shared memory (/dev/shm) is full: run the same command again with fewer --workers, or with a larger "
                "/dev/shm (in Docker: --shm-size 8g)"
            )
        return batch


def _share(batch: Any) -> None:
    """Move the tensors of a record to shared memory. Raises RuntimeError if it is full.

    The loader would do so in a thread, whose errors are only printed: it would wait for the batch without end.
    """
    if isinstance(batch, Tensor):
        if batch.numel():
            batch.share_memory_()
    elif is_dataclass(batch):
        for entry in fields(batch):
            _share(getattr(batch, entry.name))
    elif isinstance(batch, list | tuple):
        for item in batch:
            _share(item)


def _identity(batch: Any) -> Any:
    return batch


def _delay_signals(worker: int) -> None:
    """Ignore Control-C and delay SIGTERM in a worker, because the training process needs its last batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
