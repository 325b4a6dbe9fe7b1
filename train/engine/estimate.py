"""Estimate of a run's time and memory, from two trial passes over one part of a batch before training starts."""

import resource
import time

import torch

from train.data.store.shards import duration
from train.engine.precision import autocast
from train.engine.run import AnyRun
from train.engine.stage import Batch, Stage


def estimate(run: AnyRun, stage: Stage, parts: list[Batch], steps: int) -> None:
    """Print the cost of one step on these parts, and of `steps` steps. The first pass warms up; no weight changes."""
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
        preparing, seconds = (len(parts) * (end - started) for end in (prepared, _clock(device)))
    weights = sum(p.numel() for q in stage.phases for p in q.module.parameters())
    trained = sum(p.numel() for q in stage.phases for p in q.module.parameters() if p.requires_grad)
    known = 4 * (weights + 4 * trained) / 2**20  # weights; gradient, two moments, moving average
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else _resident_mib()
    run.print(
        f"{trained / 1e6:.2f} M trainable parameters; memory: about {max(peak, known):,.0f} MiB, of which weights, "
        f"gradient, optimizer and moving average take {known:,.0f} MiB; time: about {seconds:.3g} s per step (without "
        f"the optimizer), {duration(seconds * steps)} for {steps} steps"
    )
    if preparing > 0.01 * seconds:
        images = config.batch_size / run.accelerator.num_processes
        run.print(f"preparing a batch (e.g. encoding) takes {1000 * preparing / images:.3g} ms of this time per image")


def _clock(device: torch.device) -> float:
    """Return the time in seconds, after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _resident_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
