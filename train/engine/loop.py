"""The training loop of all stages: steps, logging, validation, checkpoints, and a clean stop."""

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from train.data.store.atomic import atomic_folder
from train.engine.estimate import estimate
from train.engine.provenance import is_result
from train.engine.run import AnyRun
from train.engine.stage import Batch, Hooks, Publish, Stage
from train.engine.stop import Stop
from train.engine.trainer import Trainer


class Means:
    """Running means of metrics over the finite steps, kept on the device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        self.steps += 1
        for name, value in metrics.items():
            finite = torch.isfinite(value)
            entry = torch.stack([torch.where(finite, value, 0).float(), finite.float()])
            self.sums[name] = self.sums[name] + entry if name in self.sums else entry

    def read(self) -> dict[str, float]:
        """Return the mean of each metric by name. A metric that was never finite is left out."""
        sums = {name: entry.tolist() for name, entry in self.sums.items()}
        return {name: total / count for name, (total, count) in sums.items() if count}


class Stopwatch:
    """Timer of training since the last restart, and of the part that was spent waiting for batches."""

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
        """Exclude the time spent inside, so that the speed is that of training only."""
        started = time.perf_counter()
        yield
        self.started += time.perf_counter() - started


def fit(run: AnyRun, stage: Stage, publish: Publish, hooks: Hooks | None = None) -> None:
    """Train the stage to the configured step, starting from the state of the run's folder."""
    trainer, config = Trainer(run, stage, hooks), run.config
    start = trainer.resume()
    if start >= config.steps:
        conclude(run, stage, publish, start)
        return
    run.metrics.remove_after(start)
    stopwatch, means = Stopwatch(), Means()
    batches = stopwatch.waiting(stage.batches(start))
    first = next(batches)
    estimate(run, stage, first, config.steps - start)
    stopwatch.restart()
    with (
        Stop(run.accelerator) as stop,
        tqdm(
            initial=start * config.batch_size,
            total=config.steps * config.batch_size,
            unit="img",
            disable=not run.main,
            dynamic_ncols=True,
            desc=run.folder.name,
            mininterval=0.5,
        ) as bar,
    ):
        for done, parts in enumerate(itertools.chain([first], batches), start + 1):
            means.add(trainer.step(done - 1, parts))
            bar.update(config.batch_size)
            last = done == config.steps
            if done % config.log_every == 0 or last:
                averages = means.read()
                seconds = stopwatch.seconds
                progress = {
                    "lr": config.optimizer.lr * config.optimizer.lr_share(done - 1, config.steps),
                    "images_per_second": means.steps * config.batch_size / seconds,
                    "loading": stopwatch.waited / seconds,
                    "skipped": int(trainer.skipped.total),
                }
                run.metrics.log(done, averages | progress)
                bar.set_postfix(step=done, loss=f"{averages.get('loss', math.nan):.4g}")
                trainer.roll_back_if_needed(done)
                means = Means()
                stopwatch.restart()
            if done % config.validate_every == 0 or last:
                with stopwatch.paused():
                    validate(run, stage, done)
            stopped = stop.agreed(done)
            if done % config.checkpoint_every == 0 or last or stopped:
                with stopwatch.paused():
                    trainer.save(done)
                    export(run, stage, publish, done, final=last)
            if last:
                return
            if stopped:
                run.print(f"stopped at step {done} of {config.steps}; run the same command again to continue")
                raise SystemExit(128 + stopped)


def conclude(run: AnyRun, stage: Stage, publish: Publish, step: int) -> None:
    """Export the final result of a run whose last step is done, unless it has been exported already."""
    if not is_result(run.folder.model, step):
        export(run, stage, publish, step, final=True)
        return
    if run.main:
        publish(run.folder.model, step, final=True)
    run.print(f"{run.folder} is finished ({step} steps): give a larger --steps to continue it, or another --out")


def validate(run: AnyRun, stage: Stage, step: int) -> None:
    """Measure the averaged weights on held-out data, and write a sample sheet."""
    run.metrics.log(step, stage.validate(step))
    if run.main:
        sheet = run.folder.sheet(step)
        sheet.parent.mkdir(exist_ok=True)
        stage.sheet(sheet)
    run.accelerator.wait_for_everyone()


def export(run: AnyRun, stage: Stage, publish: Publish, step: int, *, final: bool) -> None:
    """Update model/ with the averaged weights."""
    if run.main:
        with atomic_folder(run.folder.model) as folder:
            metrics = stage.export(folder, final=final)
            publish(folder, step, final=final)
    else:
        metrics = stage.export(run.folder.model, final=final)
    if metrics:
        run.metrics.log(step, metrics)
    run.accelerator.wait_for_everyone()
