"""The training loop of all stages: steps, logging, validation, checkpoints, and a clean stop."""

import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.errors import RunError
from train.data.store.atomic import atomic_folder
from train.engine.changes import record_changes
from train.engine.estimate import Duration, estimate
from train.engine.provenance import is_result
from train.engine.run import AnyRun
from train.engine.saving import Saving
from train.engine.stage import Batch, Hooks, Publish, Stage, Validation
from train.engine.stop import Stop
from train.engine.stopwatch import Stopwatch
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


def fit(run: AnyRun, stage: Stage, publish: Publish, hooks: Hooks | None = None) -> None:
    """Train the stage to the configured step, starting from the state of the run's folder."""
    trainer, config = Trainer(run, stage, hooks), run.config
    saving = Saving(trainer)
    start = saving.resume()
    if start >= config.steps:
        conclude(run, stage, publish, start)
        return
    run.metrics.remove_after(start)
    if run.main:
        record_changes(run.folder, start, run.feed.position(start), run.print)
    if saving.passed_over:
        export(run, stage, publish, start, final=False, log=False)
    stopwatch, means = Stopwatch(), Means()
    batches = stopwatch.waiting(saved_if_reading_fails(saving, stage.batches(start), start))
    first = next(batches)
    growth = estimate(run, stage, first, start)
    training = Stopwatch()
    duration = Duration(run, stage, start, growth, training)
    sheet_is_due = run.main and config.first_samples > 0 and not any(run.folder.samples.glob("step-*.png"))
    stopwatch.restart()
    with (
        Stop(run.accelerator) as stop,
        tqdm(
            initial=run.feed.position(start),
            total=run.feed.position(config.steps),
            unit="img",
            disable=not run.main,
            dynamic_ncols=True,
            desc=run.folder.name,
            mininterval=0.5,
        ) as bar,
    ):
        due = Due(run, stage, publish, saving, stop)
        for done, parts in enumerate(itertools.chain([first], batches), start + 1):
            means.add(trainer.step(done - 1, parts))
            bar.update(config.batch_size)
            duration.step(done)
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
                means = Means()
                stopwatch.restart()
            with stopwatch.paused(), training.paused():
                validated = due.after(done)
                if sheet_is_due and not validated and training.seconds >= 60 * config.first_samples:
                    run.print(f"step {done}: first samples: {draw_sheet(run, stage, done)}")
                    sheet_is_due = False
            sheet_is_due = sheet_is_due and not validated


class Due:
    """Validation, checkpoints and the end of a run. What is due waits while steps are skipped."""

    def __init__(self, run: AnyRun, stage: Stage, publish: Publish, saving: Saving, stop: Stop) -> None:
        self.run, self.stage, self.publish, self.saving, self.stop = run, stage, publish, saving, stop
        self.validation = self.checkpoint = False

    def after(self, step: int) -> bool:
        """Do what is due after a step. Returns whether the run was validated.

        Raises SystemExit if the run has been stopped, and RunError if it can't go on or ends among skipped steps.
        """
        config, saving = self.run.config, self.saving
        last, waiting = step == config.steps, self.validation or self.checkpoint
        self.validation |= step % config.validate_every == 0 or last
        if validated := self.validation and saving.is_sound(step):
            if last:
                model = self.run.folder.model
                self.run.print(f"all {step:,} steps are done; what remains: validation, checkpoint, {model}")
            self._compare(step, validate(self.run, self.stage, step))
            self.validation = False
        stopped = self.stop.agreed(step)
        self.checkpoint |= step % config.checkpoint_every == 0 or last or stopped > 0
        if self.checkpoint and saving.is_sound(step):
            saving.save(step, stopped=stopped > 0 and not last)
            export(self.run, self.stage, self.publish, step, final=last)
            self.checkpoint = False
        if last and self.checkpoint:
            raise RunError(f"{saving.problem()}, and the run ends here: {saving.kept()}; {saving.advice()}")
        if stopped and not last:
            if self.checkpoint:
                self.run.print(f"step {step}: {saving.problem()}, so it is not saved: {saving.kept()}")
            self.run.print(f"stopped at step {step} of {config.steps}; run the same command again to continue")
            raise SystemExit(128 + stopped)
        if self.validation or self.checkpoint or step % config.log_every == 0:
            self._check(step, waiting)
        return validated

    def _compare(self, step: int, validation: Validation) -> None:
        """Keep the weights if their held-out loss is the smallest so far; report a significant rise."""
        if validation.losses is None:
            return
        run, held_out, keep = self.run, self.saving.held_out, self.run.config.keep_best
        if keep and not run.folder.best.is_dir():
            held_out.forget()  # weights with a smaller loss weren't kept
        smallest = held_out.add(step, validation.losses, validation.identity)
        if keep and _of_main(run, smallest):
            export(run, self.stage, self.publish, step, final=False, best=True, log=False)
        if line := held_out.report(step, validation.losses, str(run.folder.best) if keep else ""):
            run.print(line)

    def _check(self, step: int, waiting: bool) -> None:
        """Go back to an earlier checkpoint if needed, or report once that something waits."""
        problem = self.saving.problem()
        if self.saving.roll_back_if_needed(step):
            export(self.run, self.stage, self.publish, self.saving.restored, final=False, log=False)
        elif (self.validation or self.checkpoint) and not waiting:
            self.run.print(f"step {step}: {problem}; validation and checkpoint wait for a finite step")


def saved_if_reading_fails(saving: Saving, batches: Iterator[list[Batch]], start: int) -> Iterator[list[Batch]]:
    """Yield the batches of the steps from `start` on. If one can't be read, save the steps that are done, if sound.

    Several processes don't save, because the others may wait for each other in a step.
    """
    done = start
    try:
        for parts in batches:
            yield parts
            done += 1  # when the next batch is requested
    except (RunError, OSError):
        if done > start and saving.run.accelerator.num_processes == 1 and saving.is_sound(done):
            saving.save(done, stopped=True)
            saving.run.print(f"step {done}: saved, because the next images can't be read")
        raise


def conclude(run: AnyRun, stage: Stage, publish: Publish, step: int) -> None:
    """Export the final result of a run whose last step is done, unless it has been exported already."""
    if not is_result(run.folder.model, step):
        export(run, stage, publish, step, final=True)
        return
    if run.main:
        publish(run.folder.model, step, final=True)
    run.print(f"{run.folder} is finished ({step} steps): give a larger --steps to continue it, or another --out")


def validate(run: AnyRun, stage: Stage, step: int) -> Validation:
    """Measure the averaged weights on held-out data, log the metrics, and write a sample sheet."""
    validation = stage.validate(step)
    run.metrics.log(step, validation.metrics)
    if run.main:
        draw_sheet(run, stage, step)
    run.accelerator.wait_for_everyone()
    return validation


def _of_main(run: AnyRun, flag: bool) -> bool:
    """Return the main process's flag in all processes."""
    return bool(run.accelerator.reduce(torch.tensor(float(flag and run.main), device=run.accelerator.device), "sum"))


def draw_sheet(run: AnyRun, stage: Stage, step: int) -> Path:
    """Write a sample sheet, and send it to the trackers. Only the main process calls this."""
    path = run.folder.sheet(step)
    path.parent.mkdir(exist_ok=True)
    stage.sheet(path)
    run.metrics.log_image("samples", path, step)
    return path


def export(
    run: AnyRun, stage: Stage, publish: Publish, step: int, *, final: bool, best: bool = False, log: bool = True
) -> None:
    """Update model/ with the averaged weights, or model-best/ if `best`. log: whether to log the export's metrics."""
    target = run.folder.best if best else run.folder.model
    if run.main:
        with atomic_folder(target) as folder:
            metrics = stage.export(folder, final=final)
            publish(folder, step, final=final, best=best)
    else:
        metrics = stage.export(target, final=final)
    if metrics and log:
        run.metrics.log(step, metrics)
    run.accelerator.wait_for_everyone()
