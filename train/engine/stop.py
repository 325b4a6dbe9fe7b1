"""Clean stop on SIGTERM and SIGINT, agreed between all processes."""

import signal
from typing import Self

import torch
from accelerate import Accelerator


class Stop:
    """Handler that records SIGTERM or SIGINT, so that the loop can end after a step. The next signal isn't handled."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.signal = accelerator, 0

    def __enter__(self) -> Self:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: object) -> None:
        self.signal = number
        self._restore()
        print(
            f"\n{signal.Signals(number).name} received: training will save a checkpoint and the model after this step, "
            "and stop; again: stop at once",
            flush=True,
        )

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def agreed(self, step: int) -> int:
        """Return the largest signal number received by any process, or 0. Processes exchange it every 10 steps."""
        if self.accelerator.num_processes == 1:
            return self.signal
        if step % 10:
            return 0
        own = torch.tensor([self.signal], device=self.accelerator.device)
        return int(self.accelerator.gather(own).max())
