"""The one training loop. A stage supplies its networks, its batches and what to do with the result.

A step is a pure function of its batch and the weights. The loop adds: accumulation, mixed precision with fp32
weights, distribution, clipping, skipping of non-finite steps without waiting for the device, the running average,
logging, validation, checkpoints, and a clean stop on SIGTERM and SIGINT.
"""

import itertools
import math
import resource
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ldm.errors import RunError
from train.data.store.shards import duration
from train.engine.checkpoint import Checkpoints, atomic_folder
from train.engine.ema import Ema
from train.engine.model_card import state_license, write_card
from train.engine.open_data import Inputs
from train.engine.optim import autocast, learning_rate
from train.engine.run import Run

Batch = dict[str, Any]


class StepOutput(NamedTuple):
    """What a phase's module gives for one part of a batch."""

    loss: Tensor
    metrics: dict[str, Tensor]
    """Logged beside the loss; detached scalars."""
    carry: dict[str, Tensor]
    """Added to the batch for the phases after it; detached."""


@dataclass
class Phase:
    """A network's turn in a step: its module's `forward(batch)` gives a StepOutput, its optimizer follows."""

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    lr: float
    start: int = 0
    """First step in which it takes its turn."""


class Stage(Protocol):
    """What differs between the stages."""

    phases: list[Phase]
    ema: Ema[Any]
    inputs: Inputs

    def batches(self, start: int) -> Iterator[list[Batch]]:
        """For each step from `start` on, the parts of this process's share of its batch."""
        ...

    def begin_step(self, step: int, parts: list[Batch], loss_scale: Tensor) -> None:
        """Told the step's number, its batch and what half precision's losses are multiplied by, before its phases run."""
        ...

    def end_step(self) -> None:
        """Told that all its phases have run; every process is."""
        ...

    def validate(self, step: int) -> dict[str, float]:
        """Held-out measures with the averaged weights; every process calls it."""
        ...

    def sheet(self, path: Path) -> None:
        """Write a picture to look at; the main process calls it."""
        ...

    def export(self, folder: Path, *, final: bool) -> dict[str, float]:
        """Write the result into an empty folder (main process only; the others take part with `folder` to ignore).

        Returns figures worth logging.
        """
        ...


class Stop:
    """Notes SIGTERM and SIGINT, so that the loop can end between two steps. A second one acts as it always does."""

    def __enter__(self) -> "Stop":
        self.signal: int | None = None
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


@dataclass
class Health:
    """Counts of steps skipped for a non-finite loss or gradient, kept on the device so that nothing waits for it."""

    skipped: Tensor
    in_a_row: Tensor
    rolled_back: int = 0

    def note(self, bad: Tensor) -> None:
        self.skipped += bad
        self.in_a_row = (self.in_a_row + bad) * bad


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
        """Name → mean; a metric that was never finite is left out."""
        read = {name: entry.tolist() for name, entry in self.sums.items()}
        return {name: total / count for name, (total, count) in read.items() if count}


class Timed(Iterator[list[Batch]]):
    """Batches, and the seconds that were spent waiting for them."""

    def __init__(self, batches: Iterator[list[Batch]]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __next__(self) -> list[Batch]:
        begun = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - begun


@dataclass
class Trainer:
    """A stage under way: its state, and how to save and restore it."""

    run: Run
    stage: Stage
    scaler: torch.amp.GradScaler = field(init=False)
    wrapped: list[nn.Module] = field(init=False)
    health: Health = field(init=False)

    def __post_init__(self) -> None:
        run, config = self.run, self.run.config
        device = run.accelerator.device
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.health = Health(torch.zeros((), device=device), torch.zeros((), device=device))
        self.wrapped = [run.accelerator.prepare_model(p.module) for p in self.stage.phases]
        self.checkpoints = Checkpoints(run.out / "checkpoints", keep=config.keep_checkpoints)
        self.generation = 0  # checkpoints written, to tell a second roll-back without progress

    # -- state ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "phases": {
                p.name: {"module": p.module.state_dict(), "optimizer": p.optimizer.state_dict()}
                for p in self.stage.phases
            },
            "ema": self.stage.ema.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": int(self.health.skipped),
            "in_a_row": int(self.health.in_a_row),
        }

    def restore(self, state: Mapping[str, Any], *, weights_only: bool = False) -> None:
        for p in self.stage.phases:
            p.module.load_state_dict(state["phases"][p.name]["module"])
            p.optimizer.load_state_dict(state["phases"][p.name]["optimizer"])
        self.stage.ema.load_state_dict(state["ema"])
        if not weights_only:
            self.scaler.load_state_dict(state["scaler"])
            self.health.skipped.fill_(state["skipped"])
            self.health.in_a_row.fill_(state["in_a_row"])

    def resume(self) -> int:
        """The step to begin with: 0, or where the newest valid checkpoint ends."""
        found = self.checkpoints.latest()
        if found is None:
            return 0
        self.restore(self.checkpoints.load(found))
        self.run.say(f"continuing from step {found.step} ({found.folder})")
        return found.step

    def save(self, step: int, *, final: bool) -> None:
        """Commit a checkpoint and refresh model/."""
        if int(self.health.in_a_row):
            self.run.say(f"step {step}: the last {int(self.health.in_a_row)} steps were not finite and were skipped")
        if self.run.main:
            self.checkpoints.save(step, self.state())
        self.run.accelerator.wait_for_everyone()
        self.generation += 1
        self.export(step, final=final)

    def export(self, step: int, *, final: bool) -> None:
        model = self.run.out / "model"
        if self.run.main:
            with atomic_folder(model) as folder:
                figures = self.stage.export(folder, final=final)
                self.run.write_provenance(folder, step=step, final=final)
                write_card(folder, self.run, self.stage.inputs, self.stage.ema.module, step=step, final=final)
        else:
            figures = self.stage.export(model, final=final)
        if figures:
            self.run.log(step, figures)
        if final and not self.run.config.license:
            self.run.say(
                f"{model}/README.md states no licence, so nobody may assume any: the same command with, for one, --license "
                "apache-2.0 adds it"
            )
        self.run.accelerator.wait_for_everyone()

    def validate(self, step: int) -> None:
        """Held-out measures and a sheet, with the averaged weights."""
        self.run.log(step, self.stage.validate(step))
        if self.run.main:
            sheet = self.run.out / "samples" / f"step-{step:08d}.png"
            sheet.parent.mkdir(exist_ok=True)
            self.stage.sheet(sheet)
        self.run.accelerator.wait_for_everyone()

    # -- one step ---------------------------------------------------------------------------------------------

    def step(self, step: int, parts: list[Batch]) -> dict[str, Tensor]:
        """Every phase once. Returns its metrics as tensors on the device."""
        config, accelerator = self.run.config, self.run.accelerator
        metrics: dict[str, Tensor] = {}
        self.stage.begin_step(step, parts, self.scaler.scale(torch.ones((), device=accelerator.device)))
        bad = torch.zeros((), device=accelerator.device)
        share = learning_rate(config.optimizer, step, config.steps)
        for phase, module in zip(self.stage.phases, self.wrapped, strict=True):
            if step < phase.start:
                continue
            for group in phase.optimizer.param_groups:
                group["lr"] = phase.lr * share
            outputs = []
            for last, part in ((i == len(parts) - 1, p) for i, p in enumerate(parts)):
                with nullcontext() if last else accelerator.no_sync(module):
                    with autocast(accelerator.device, config.precision):
                        output = module(part)
                    self.scaler.scale(output.loss / len(parts)).backward()
                part.update(output.carry)
                outputs.append(output)
            parts_of = {"loss": [o.loss for o in outputs]} | {
                n: [o.metrics[n] for o in outputs] for n in outputs[0].metrics
            }
            means = torch.stack([torch.stack(values).detach().float().mean() for values in parts_of.values()])
            read = dict(zip(parts_of, accelerator.reduce(means, "mean"), strict=True))
            loss = read.pop("loss")
            norm, skipped = self._update(phase, loss)
            bad = torch.maximum(bad, skipped)
            prefix = "" if phase is self.stage.phases[0] else f"{phase.name}_"
            metrics |= {f"{prefix}loss": loss, f"{prefix}grad_norm": norm}
            metrics |= read
        self.scaler.update()
        self.health.note(bad)
        self.stage.ema.update(step)
        self.stage.end_step()
        return metrics

    def _update(self, phase: Phase, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip and step; the gradient's norm, and 1 where the step was skipped, else 0.

        It is where the loss or the gradient of any process is not finite, and nothing waits for the device to know it.

        The optimizer itself leaves weights and moments as they are when its `found_inf` is 1. That is ours, not the
        scaler's, which knows of gradients alone. Gradients are averages over all processes by now, so one process's NaN
        is everybody's, and all skip together.
        """
        optimizer = phase.optimizer
        self.scaler.unscale_(optimizer)
        weights = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(weights, self.run.config.optimizer.clip or math.inf)
        bad = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, bad

    def check_health(self, step: int) -> None:
        """After too many skipped steps in a row, return to the last checkpoint's weights; the data goes on."""
        if int(self.health.in_a_row) < self.run.config.roll_back_after:
            return
        found = self.checkpoints.latest()
        if found is None or self.health.rolled_back > self.generation:
            raise RunError(
                f"the last {int(self.health.in_a_row)} steps gave no finite loss and gradient, and going back has not "
                "helped: try a lower --optimizer.lr, or --precision bf16 or fp32"
            )
        self.run.say(f"step {step}: too many steps were not finite; back to the weights of step {found.step}")
        self.restore(self.checkpoints.load(found), weights_only=True)
        self.health.in_a_row.zero_()
        self.health.rolled_back = self.generation + 1

    def estimate(self, parts: list[Batch], steps: int) -> None:
        """Say what a step will cost in time and memory, from one part of a batch tried twice, before training starts."""
        config, device = self.run.config, self.run.accelerator.device
        for _ in range(2):
            begun, part = time.perf_counter(), dict(parts[0])
            self.stage.begin_step(config.steps - 1, [part], torch.ones((), device=device))
            for phase in (p for p in self.stage.phases if p.start < config.steps):
                with autocast(device, config.precision):
                    output = phase.module(part)
                output.loss.backward()
                phase.module.zero_grad(set_to_none=True)
                part.update(output.carry)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - begun) * len(parts)
        weights = sum(p.numel() for q in self.stage.phases for p in q.module.parameters())
        trained = sum(p.numel() for q in self.stage.phases for p in q.module.parameters() if p.requires_grad)
        held = 4 * (weights + 4 * trained) / 2**20  # weights; gradient, two moments, running average
        peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else _resident_mib()
        self.run.say(
            f"{trained / 1e6:.2f} M parameters train; weights, gradient, optimizer and average take {held:,.0f} MiB, "
            f"about {max(peak, held):,.0f} MiB in all; a step takes about {seconds:.3g} s (without the optimizer), "
            f"{steps} steps about {duration(seconds * steps)}"
        )


def fit(run: Run, stage: Stage) -> None:
    """Train the stage to the configured step, from wherever the run's folder stands."""
    trainer, config = Trainer(run, stage), run.config
    start = trainer.resume()
    if start >= config.steps:
        if run.finished(start):
            if run.main and run.config.license:
                state_license(run.out / "model", run.config.license)
            run.say(f"{run.out} is finished ({start} steps); give more --steps to go on, or another --out")
        else:
            trainer.export(start, final=True)
        return
    run.forget_after(start)
    batches = Timed(stage.batches(start))
    first = next(batches)
    trainer.estimate(first, config.steps - start)
    means, begun, batches.seconds = Means(), time.perf_counter(), 0.0
    with Stop() as stop, tqdm(
        initial=start * config.batch_size, total=config.steps * config.batch_size, unit="img", disable=not run.main,
        dynamic_ncols=True, desc=run.name, mininterval=0.5,
    ) as bar:  # fmt: skip
        for done, parts in enumerate(itertools.chain([first], batches), start + 1):
            means.add(trainer.step(done - 1, parts))
            bar.update(config.batch_size)
            last = done == config.steps
            if done % config.log_every == 0 or last:
                logged = means.read()
                seconds = time.perf_counter() - begun
                speed = {
                    "images_per_second": means.steps * config.batch_size / seconds,
                    "loading": batches.seconds / seconds,
                }
                lr = stage.phases[0].optimizer.param_groups[0]["lr"]
                run.log(done, logged | {"lr": lr, **speed, "skipped": int(trainer.health.skipped)})
                bar.set_postfix(step=done, loss=f"{logged.get('loss', math.nan):.4g}")
                trainer.check_health(done)
                means, begun, batches.seconds = Means(), time.perf_counter(), 0.0
            if done % config.validate_every == 0 or last:
                paused = time.perf_counter()
                trainer.validate(done)
                begun += time.perf_counter() - paused  # the speed is that of training alone
            stopped = run.agree(stop.signal or 0, done)
            if done % config.checkpoint_every == 0 or last or stopped:
                paused = time.perf_counter()
                trainer.save(done, final=last)
                begun += time.perf_counter() - paused
            if last:
                return
            if stopped:
                run.say(f"stopped at step {done} of {config.steps}; run the same command to go on")
                raise SystemExit(128 + stopped)


def _resident_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
