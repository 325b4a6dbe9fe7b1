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
from train.engine.changes import examples_of_earlier_code
from train.engine.checkpoint import Checkpoints
from train.engine.optim import load_moments
from train.engine.precision import autocast
from train.engine.run import AnyRun
from train.engine.stage import Batch, Hooks, Phase, Stage, StepOutput
from train.engine.subset import Subset, frozen_names


@dataclass
class SkippedSteps:
    """Counts of steps skipped because of a non-finite loss or gradient, kept on the device so that nothing waits."""

    total: Tensor
    in_a_row: Tensor
    """Skipped steps since the last step that wasn't skipped."""
    rolled_back: int = 0
    """Value of `Trainer.checkpoints_saved` plus 1 at the last roll-back."""

    def add(self, bad: Tensor) -> None:
        """Count a step. bad: 1 if it was skipped, else 0."""
        self.total += bad
        self.in_a_row = (self.in_a_row + bad) * bad


class Trainer:
    """A stage and the state of its training."""

    def __init__(self, run: AnyRun, stage: Stage, hooks: Hooks | None = None) -> None:
        self.run, self.stage, self.hooks = run, stage, hooks or Hooks()
        device = run.accelerator.device
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.config.precision == "fp16")
        self.skipped = SkippedSteps(torch.zeros((), device=device), torch.zeros((), device=device))
        self.wrapped = [run.accelerator.prepare_model(p.module) for p in stage.phases]
        self.subsets = {p.name: Subset(p.module, frozen_names(p.module)) for p in stage.phases}
        self.checkpoints = Checkpoints(run.folder.checkpoints, keep=run.config.keep_checkpoints)
        self.checkpoints_saved = 0  # to detect a second roll-back without a new checkpoint

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
                means = self._means(outputs)
                norm, skipped = self._update(phase, phase.lr * share, means["loss"])
                bad = torch.maximum(bad, skipped)
                metrics |= {f"{phase.prefix}loss": means.pop("loss"), f"{phase.prefix}grad_norm": norm} | means
        self.scaler.update()
        self.skipped.add(bad)
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
        values = [{"loss": o.loss} | o.metrics for o in outputs]
        means = torch.stack([torch.stack([v[name] for v in values]).detach().float().mean() for name in values[0]])
        return dict(zip(values[0], self.run.accelerator.reduce(means, "mean"), strict=True))

    def _update(self, phase: Phase, lr: float, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip the gradient and step. Returns the gradient's norm, and 1 if the step was skipped, else 0.

        A step is skipped if the loss or the gradient of any process isn't finite. The device decides this, so the CPU
        doesn't wait: an optimizer leaves weights and moments unchanged when its `found_inf` is 1. We set `found_inf`
        ourselves because the scaler sees only gradients. Gradients are already averages over all processes here, so a
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

    def roll_back_if_needed(self, step: int) -> None:
        """Restore the last checkpoint's weights after too many skipped steps in a row; the step number isn't reset.

        Raises RunError if there is no checkpoint, or if none was saved since the last roll-back.
        """
        if int(self.skipped.in_a_row) < self.run.config.roll_back_after:
            return
        checkpoint = self.checkpoints.latest()
        problem = f"the loss or gradient was not finite in the last {int(self.skipped.in_a_row)} steps"
        if checkpoint is None or self.skipped.rolled_back > self.checkpoints_saved:
            tried = "there is no checkpoint" if checkpoint is None else "restoring the last checkpoint did not help"
            raise RunError(
                f"{problem}, and {tried}: add --resume-with-changes and a lower --optimizer.lr, or --precision bf16 "
                "or fp32"
            )
        self.run.print(f"step {step}: {problem}; training continues with the weights of step {checkpoint.step}")
        self.restore(self.checkpoints.load(checkpoint), weights_only=True)
        self.skipped.in_a_row.zero_()
        self.skipped.rolled_back = self.checkpoints_saved + 1

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
            "skipped": int(self.skipped.total),
            "in_a_row": int(self.skipped.in_a_row),
        }

    def restore(self, state: Mapping[str, Any], *, weights_only: bool = False) -> None:
        """Restore the result of `state`. weights_only: without the gradient scale and the counts of skipped steps.

        Raises UserError if the frozen weights differ.
        """
        for p in self.stage.phases:
            saved, subset = state["phases"][p.name], self.subsets[p.name]
            subset.require(saved.get("frozen", ""))
            subset.load_state_dict(saved["module"])
            load_moments(p.optimizer, saved["optimizer"])
        self.stage.ema.load_state_dict(state["ema"])
        if not weights_only:
            if state["scaler"]:  # empty if the precision was another than fp16
                self.scaler.load_state_dict(state["scaler"])
            self.skipped.total.fill_(state["skipped"])
            self.skipped.in_a_row.fill_(state["in_a_row"])

    def resume(self) -> int:
        """Restore the newest valid checkpoint. Returns the step to start with, 0 if there is no checkpoint."""
        checkpoint = self.checkpoints.latest()
        if checkpoint is None:
            return 0
        state = self.checkpoints.load(checkpoint)
        self.restore(state)
        self.run.feed.restore(
            checkpoint.step,
            state.get("examples")
            or examples_of_earlier_code(self.run.folder.settings, checkpoint.step, self.run.config),
        )
        self.run.print(f"continuing from step {checkpoint.step} ({checkpoint.folder})")
        return checkpoint.step

    def save(self, step: int) -> None:
        """Commit a checkpoint."""
        if int(self.skipped.in_a_row):
            self.run.print(
                f"step {step}: the last {int(self.skipped.in_a_row)} steps were skipped, because the loss or gradient "
                "was not finite"
            )
        if self.run.main:
            self.checkpoints.save(step, self.state() | {"examples": self.run.feed.state(step)})
        self.run.accelerator.wait_for_everyone()
        self.checkpoints_saved += 1
