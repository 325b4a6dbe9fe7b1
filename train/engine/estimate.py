"""Estimates of a run's memory, from trial passes before training starts, and of its duration, from its first steps."""

import resource
import sys
import time

import torch

from train.data.store.shards import duration
from train.engine.run import AnyRun
from train.engine.stage import Batch, Stage
from train.engine.stopwatch import Stopwatch
from train.engine.trial import trial

_WARM_UP = 2  # steps before the timed ones
_TIMED = range(3, 21)  # number of timed steps: from 3 on if they took _SECONDS, at most 20
_SECONDS = 3.0


def estimate(run: AnyRun, stage: Stage, parts: list[Batch], start: int) -> float:
    """Print the number of parameters and the memory of a step, after trial passes over one part. No weight changes.

    start: the run's next step. Returns the time of the run's last step divided by the time of step `start`. It is more
    than 1 if a phase, such as the discriminator's training, starts later.
    """
    config, device = run.config, run.accelerator.device
    last = config.steps - 1
    preparing, seconds = _trial(run, stage, parts, last)
    early = sum(_trial(run, stage, parts, start)) if _next_phase(stage, start, last) else 0.0
    weights = sum(p.numel() for q in stage.phases for p in q.module.parameters())
    trained = sum(p.numel() for q in stage.phases for p in q.module.parameters() if p.requires_grad)
    moments = 0.5 if config.optimizer.kind == "adamw_8bit" else 2
    known = 4 * (weights + (2 + moments) * trained) / 2**20  # weights; gradient, moving average, moments
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else _resident_mib()
    run.print(
        f"{trained / 1e6:.2f} M trainable parameters; memory: about {max(peak, known):,.0f} MiB, of which weights, "
        f"gradient, optimizer and moving average take {known:,.0f} MiB"
    )
    if preparing > 0.01 * (preparing + seconds):
        images = config.batch_size / run.accelerator.num_processes
        run.print(f"preparing a batch (e.g. encoding) takes {1000 * preparing / images:.3g} ms of each step per image")
    return (preparing + seconds) / early if early else 1.0


class Duration:
    """Report of a run's duration, printed once, after its first steps.

    growth: time of a step after the start of the last phase, divided by the time of a step before.
    """

    def __init__(self, run: AnyRun, stage: Stage, start: int, growth: float, training: Stopwatch) -> None:
        self.run, self.start, self.growth, self.training = run, start, growth, training
        steps = run.config.steps
        self.change = _next_phase(stage, start, steps - 1) or steps
        self.warm, self.reported = 0.0, False

    def step(self, done: int) -> None:
        """Record that `done` steps are done, and print the line when enough of them have been timed."""
        timed = done - self.start - _WARM_UP
        if self.reported or timed < 0:
            return
        if timed == 0:
            self.warm = self._seconds()
        elif timed in _TIMED and (self.training.seconds - self.warm > _SECONDS or timed == _TIMED[-1]):
            self.reported = True
            self._print((self._seconds() - self.warm) / timed)

    def _print(self, seconds: float) -> None:
        steps = self.run.config.steps
        later = max(0, steps - self.change)
        total = seconds * (steps - self.start - later + later * self.growth)
        later_step = f", {seconds * self.growth:.2g} s from step {self.change:,} on" if later else ""
        rest = f"the remaining {steps - self.start:,}" if self.start else f"{steps:,}"
        self.run.print(
            f"about {duration(total)} for {rest} steps, {seconds:.2g} s per step{later_step}, without validation"
        )

    def _seconds(self) -> float:
        _clock(self.run.accelerator.device)
        return self.training.seconds


def _next_phase(stage: Stage, step: int, last: int) -> int:
    """Return the first step in which all phases run, if it is after `step` and up to `last`, else 0."""
    return max((p.start for p in stage.phases if step < p.start <= last), default=0)


def _trial(run: AnyRun, stage: Stage, parts: list[Batch], step: int) -> tuple[float, float]:
    """Return the time of a step's preparation and of its phases, without the optimizer. The first pass warms up."""
    device = run.accelerator.device
    phases = [p for p in stage.phases if p.start <= step]
    for _ in range(2):
        started = _clock(device)
        (part,) = stage.prepare(step, parts[:1])
        prepared = _clock(device)
        trial(run, phases, part)
        preparing, seconds = (len(parts) * span for span in (prepared - started, _clock(device) - prepared))
    return preparing, seconds


def _clock(device: torch.device) -> float:
    """Return the time in seconds, after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def _resident_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB; on macOS, in bytes
    return peak / (2**20 if sys.platform == "darwin" else 1024)
