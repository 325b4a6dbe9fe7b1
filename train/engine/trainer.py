"""The trainer of a stage: one step, and the state that is saved, restored and checked for non-finite values.

A step is a pure function of its batch and the weights: accumulation, mixed precision with fp32 weights, distribution,
clipping, skipping of non-finite steps without waiting for the device, and the moving average.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import RunError
from train.engine.checkpoint import Checkpoints
from train.engine.precision import autocast
from train.engine.run import AnyRun
from train.engine.stage import Batch, Hooks, Phase, Stage, StepOutput
from train.engine.subset import Subset, frozen_names


@dataclass
class Health:
    """Counts of steps skipped for a non-finite loss or gradient, kept on the device so that nothing waits for it."""

    skipped: Tensor
    in_a_row: Tensor
    rolled_back: int = 0

    def note(self, bad: Tensor) -> None:
        self.skipped += bad
        self.in_a_row = (self.in_a_row + bad) * bad


class Trainer:
    """A stage and the state of its training."""

    def __init__(self, run: AnyRun, stage: Stage, hooks: Hooks | None = None) -> None:
        self.run, self.stage, self.hooks = run, stage, hooks or Hooks()
        device = run.accelerator.device
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.config.precision == "fp16")
        self.health = Health(torch.zeros((), device=device), torch.zeros((), device=device))
        self.wrapped = [run.accelerator.prepare_model(p.module) for p in stage.phases]
        self.subsets = {p.name: Subset(p.module, frozen_names(p.module)) for p in stage.phases}
        self.checkpoints = Checkpoints(run.folder.checkpoints, keep=run.config.keep_checkpoints)
        self.generation = 0  # checkpoints written, to detect a second roll-back without progress

    # -- one step ---------------------------------------------------------------------------------------------

    def step(self, step: int, parts: list[Batch]) -> dict[str, Tensor]:
        """Run every phase once. Returns the metrics as tensors on the device."""
        parts = self.hooks.begin_step(step, self.stage.prepare(step, parts))
        share = self.run.config.optimizer.lr_share(step, self.run.config.steps)
        metrics: dict[str, Tensor] = {}
        bad = torch.zeros((), device=self.run.accelerator.device)
        for phase, module in zip(self.stage.phases, self.wrapped, strict=True):
            if step >= phase.start:
                outputs = self._backward(module, parts)
                parts = [output.batch for output in outputs]
                read = self._means(outputs)
                norm, skipped = self._update(phase, phase.lr * share, read["loss"])
                bad = torch.maximum(bad, skipped)
                metrics |= {f"{phase.prefix}loss": read.pop("loss"), f"{phase.prefix}grad_norm": norm} | read
        self.scaler.update()
        self.health.note(bad)
        self.stage.ema.update(step)
        self.stage.finish(step)
        self.hooks.end_step(step, metrics)
        return metrics

    def _backward(self, module: nn.Module, parts: list[Batch]) -> list[StepOutput]:
        """Accumulate the gradients of the parts. Processes exchange gradients once, with the last part."""
        accelerator, outputs = self.run.accelerator, []
        for k, part in enumerate(parts, 1):
            with nullcontext() if k == len(parts) else accelerator.no_sync(module):
                with autocast(accelerator.device, self.run.config.precision):
                    output = module(part)
                self.scaler.scale(output.loss / len(parts)).backward()
            outputs.append(output)
        return outputs

    def _means(self, outputs: list[StepOutput]) -> dict[str, Tensor]:
        """Return the mean loss and metrics over all parts and processes."""
        each = [{"loss": o.loss} | o.metrics for o in outputs]
        means = torch.stack([torch.stack([one[name] for one in each]).detach().float().mean() for name in each[0]])
        return dict(zip(each[0], self.run.accelerator.reduce(means, "mean"), strict=True))

    def _update(self, phase: Phase, lr: float, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradient and step. Returns the gradient's norm, and 1 if the step was skipped, else 0.

        A step is skipped if the loss or the gradient of any process isn't finite; nothing waits for the device to know
        it.

        The optimizer leaves weights and moments unchanged when its `found_inf` is 1. We set `found_inf` rather than
        leave it to the scaler, which sees only gradients. Gradients are already averages over all processes here, so a
        NaN in one process reaches all of them, and all skip together.
        """
        optimizer = phase.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(optimizer)
        weights = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(weights, self.run.config.optimizer.clip or math.inf)
        bad = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, bad

    def check_health(self, step: int) -> None:
        """Return to the last checkpoint's weights after too many skipped steps in a row; the data continues."""
        if int(self.health.in_a_row) < self.run.config.roll_back_after:
            return
        found = self.checkpoints.latest()
        if found is None or self.health.rolled_back > self.generation:
            raise RunError(
                f"the last {int(self.health.in_a_row)} steps gave no finite loss and gradient, and going back has not "
                "helped: try a lower --optimizer.lr, or --precision bf16 or fp32"
            )
        self.run.print(f"step {step}: too many steps were not finite; back to the weights of step {found.step}")
        self.restore(self.checkpoints.load(found), weights_only=True)
        self.health.in_a_row.zero_()
        self.health.rolled_back = self.generation + 1

    # -- state ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the tensors that training changes, and everything else that the next step depends on."""
        phases: dict[str, dict[str, Any]] = {}
        for p in self.stage.phases:
            subset = self.subsets[p.name]
            phases[p.name] = {"module": subset.state_dict(), "optimizer": p.optimizer.state_dict()}
            if subset.frozen:
                phases[p.name]["frozen"] = subset.digest
        return {
            "phases": phases,
            "ema": self.stage.ema.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": int(self.health.skipped),
            "in_a_row": int(self.health.in_a_row),
        }

    def restore(self, state: Mapping[str, Any], *, weights_only: bool = False) -> None:
        for p in self.stage.phases:
            saved, subset = state["phases"][p.name], self.subsets[p.name]
            subset.require(saved.get("frozen", ""))
            subset.load_state_dict(saved["module"])
            p.optimizer.load_state_dict(saved["optimizer"])
        self.stage.ema.load_state_dict(state["ema"])
        if not weights_only:
            self.scaler.load_state_dict(state["scaler"])
            self.health.skipped.fill_(state["skipped"])
            self.health.in_a_row.fill_(state["in_a_row"])

    def resume(self) -> int:
        """Restore the newest valid checkpoint. Returns the step to begin with, 0 if there is no checkpoint."""
        found = self.checkpoints.latest()
        if found is None:
            return 0
        self.restore(self.checkpoints.load(found))
        self.run.print(f"continuing from step {found.step} ({found.folder})")
        return found.step

    def save(self, step: int) -> None:
        """Commit a checkpoint."""
        if int(self.health.in_a_row):
            self.run.print(f"step {step}: the last {int(self.health.in_a_row)} steps were not finite and were skipped")
        if self.run.main:
            self.checkpoints.save(step, self.state())
        self.run.accelerator.wait_for_everyone()
        self.generation += 1
