"""Estimate of a run's time and memory: one part of a batch is tried twice before training starts."""

import resource
import time

import torch

from train.data.store.shards import duration
from train.engine.precision import autocast
from train.engine.run import AnyRun
from train.engine.stage import Batch, Stage


def estimate(run: AnyRun, stage: Stage, parts: list[Batch], steps: int) -> None:
    """Print the cost of one step on these parts, and of `steps` steps. The first try warms up; no weight changes."""
    config, device = run.config, run.accelerator.device
    phases = [p for p in stage.phases if p.start < config.steps]
    for _ in range(2):
        started = _clock(device)
        (part,) = stage.prepare(config.steps - 1, parts[:1])
        prepared = _clock(device)
        for phase in phases:
            with autocast(device, config.precision):
                output = phase.module(part)
            output.loss.backward()
            phase.module.zero_grad(set_to_none=True)
            part = output.batch
        preparing, seconds = (len(parts) * (then - started) for then in (prepared, _clock(device)))
    weights = sum(p.numel() for q in stage.phases for p in q.module.parameters())
    trained = sum(p.numel() for q in stage.phases for p in q.module.parameters() if p.requires_grad)
    held = 4 * (weights + 4 * trained) / 2**20  # weights; gradient, two moments, moving average
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else _resident_mib()
    run.print(
        f"{trained / 1e6:.2f} M parameters train; weights, gradient, optimizer and average take {held:,.0f} MiB, "
        f"about {max(peak, held):,.0f} MiB in all; a step takes about {seconds:.3g} s (without the optimizer), "
        f"{steps} steps about {duration(seconds * steps)}"
    )
    if preparing > 0.01 * seconds:
        images = config.batch_size / run.accelerator.num_processes
        run.print(f"encoding takes {1000 * preparing / images:.3g} ms of each image's time")


def _clock(device: torch.device) -> float:
    """Return the time in seconds, after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _resident_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
