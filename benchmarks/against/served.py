"""The child's side of a comparison: a process that runs one program's calls when it is asked to.

The parent writes one JSON request per line to the child's standard input and reads one JSON answer per line from its
standard output. Only the standard library is used, so that a process in another environment can import this file too.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Call = Callable[[], Any]


class Server:
    """Runs calls on request and measures them: wall-clock seconds, CPU seconds of all threads, and memory."""

    def __init__(
        self,
        synchronise: Call = lambda: None,
        memory: Callable[[], float] | None = None,
        forget_memory: Call | None = None,
        cpu: Callable[[], float] = time.process_time,
    ) -> None:
        """synchronise: waits for the device. memory: returns the peak in MiB; default: this process's resident peak.

        forget_memory: starts the measurement of the peak anew. cpu: clock of the CPU time that the calls use.
        """
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not be read as answers
        self.synchronise, self.memory, self.cpu = synchronise, memory or resident_peak, cpu
        self.forget_memory = forget_memory or forget_peak
        self.output: Callable[[str], None] | None = None
        """Function that writes the program's output into a file."""
        self.started = (0.0, 0.0)
        self.calls = 0

    def answer(self, **values: object) -> None:
        print(json.dumps(values), file=self.answers, flush=True)

    def next_calls(self) -> int:
        """Answer requests until one asks for calls, and return how many. Ends the process when there are no more."""
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "calls":
                self.calls = request["n"]
                self.synchronise()
                self.started = time.perf_counter(), self.cpu()
                return self.calls
            if request["do"] == "forget memory":
                self.forget_memory()
            elif request["do"] == "save" and self.output is not None:
                self.output(request["path"])
            self.answer(memory=self.memory())
        os._exit(0)

    def called(self) -> None:
        """Answer with the seconds per call since `next_calls` returned."""
        self.synchronise()
        wall, cpu = time.perf_counter() - self.started[0], self.cpu() - self.started[1]
        self.answer(wall=wall / self.calls, cpu=cpu / self.calls)

    def serve(self, call: Call) -> None:
        """Run a call as often as it is asked for; never returns."""
        while True:
            for _ in range(self.next_calls()):
                call()
            self.called()


def open_server(device: str) -> Server:
    """Return a server for calls on a device, `cpu` or `cuda`, whose memory is measured."""
    if device != "cuda":
        return Server()
    from torch import cuda

    def forget_memory() -> None:
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()

    return Server(cuda.synchronize, lambda: cuda.max_memory_reserved() / 2**20, forget_memory)


def resident_peak() -> float:
    """Return the peak of this process's resident memory in MiB, since the last `forget_peak`."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):  # not Linux
        return float("nan")


def forget_peak() -> None:
    """Start the measurement of the resident peak anew."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
