"""The machine that a measurement ran on, and the rate of its matrix products beside each figure."""

import platform
import statistics
import time
from datetime import UTC, datetime
from typing import Any

import torch

from train.engine.provenance import commit, versions


def about() -> dict[str, Any]:
    """Return the device, the versions and the date."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def matrix_rates() -> dict[str, float]:
    """Return the GFLOP/s of products of two 2048³ matrices (on a GPU 8192³) of random numbers, by precision.

    The clock is that of the tables: for one thread of a CPU, CPU time.
    """
    gpu = torch.cuda.is_available()
    clock = time.process_time if not gpu and torch.get_num_threads() == 1 else time.perf_counter
    n = 8192 if gpu else 2048
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(n, n, device="cuda" if gpu else "cpu").to(dtype) for _ in range(2))
        seconds = []
        for _ in range(4):
            if gpu:
                torch.cuda.synchronize()
            started = clock()
            a @ b
            if gpu:
                torch.cuda.synchronize()
            seconds.append(clock() - started)
        rates[name] = 2 * n**3 / statistics.median(seconds[1:]) / 1e9
    return rates


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
