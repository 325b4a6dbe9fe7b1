"""A clean stop on SIGTERM and SIGINT, on which all processes agree."""

import signal
from typing import Self

import torch
from accelerate import Accelerator


class Stop:
    """Notes SIGTERM and SIGINT, so that the loop can end between two steps. A second one acts as it always does."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.signal = accelerator, 0

    def __enter__(self) -> Self:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number: int, frame: object) -> None:
        self.signal = number
        self._restore()
        print(f"\n{signal.Signals(number).name}: stopping after this step with a checkpoint", flush=True)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def agreed(self, step: int) -> int:
        """The largest signal number that any process has received, or 0. Several processes ask each other every 10 steps."""
        if self.accelerator.num_processes == 1:
            return self.signal
        if step % 10:
            return 0
        mine = torch.tensor([self.signal], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())
