"""Time of training, without the time of validation and saving."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from train.engine.stage import Batch


class Stopwatch:
    """Timer since the last restart, and of the part that was spent waiting for batches."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.started, self.waited = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def waiting(self, batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        """Yield the batches, and count the time spent waiting for each."""
        while True:
            started = time.perf_counter()
            parts = next(batches, None)
            self.waited += time.perf_counter() - started
            if parts is None:
                return
            yield parts

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside."""
        started = time.perf_counter()
        yield
        self.started += time.perf_counter() - started
