"""The trainer of a stage: one step, and its state.

A step is a pure function of its batch and the weights: accumulation, mixed precision with fp32 weights, distribution,
clipping, skipping of non-finite steps without waiting for the device, and the moving average.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from train.engine.optim import load_moments, step_unless
from train.engine.precision import autocast
from train.engine.run import AnyRun
from train.engine.skipped import SkippedSteps
from train.engine.stage import Batch, Hooks, Phase, Stage, StepOutput
from train.engine.subset import Subset, frozen_names


class Trainer:
    """A stage and the state of its training."""

    def __init__(self, run: AnyRun, stage: Stage, hooks: Hooks | None = None) -> None:
        self.run, self.stage, self.hooks = run, stage, hooks or Hooks()
        device = run.accelerator.device
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.config.precision == "fp16")
        self.skipped = SkippedSteps(device)
        self.wrapped = [run.accelerator.prepare_model(p.module) for p in stage.phases]
        self.subsets = {p.name: Subset(p.module, frozen_names(p.module)) for p in stage.phases}
        self.part: list[Batch] = []  # the first part of the last batch, on which the weights are tested

    # -- one step ---------------------------------------------------------------------------------------------

    def step(self, step: int, parts: list[Batch]) -> dict[str, Tensor]:
        """Run every phase once. Returns the metrics as tensors on the device."""
        self.part = []
        parts = self.hooks.begin_step(step, self.stage.prepare(step, parts))
        self.part = parts[:1]
        share = self.run.config.optimizer.lr_share(step, self.run.config.steps)
        metrics: dict[str, Tensor] = {}
        bad = wrong = torch.zeros((), device=self.run.accelerator.device)
        for phase, module in zip(self.stage.phases, self.wrapped, strict=True):
            if step >= phase.start:
                outputs = self._backward(module, parts)
                parts = [output.batch for output in outputs]
                means = self._means(outputs)
                norm, skipped = self._update(phase, phase.lr * share, means["loss"])
                bad = torch.maximum(bad, skipped)
                wrong = torch.maximum(wrong, skipped * (~torch.isfinite(means["loss"]) | (self.scale() <= 1)))
                metrics |= {f"{phase.prefix}loss": means.pop("loss"), f"{phase.prefix}grad_norm": norm} | means
        self.skipped.add(bad, bad - wrong)
        self.scaler.update()
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
        step_unless(optimizer, bad)
        optimizer.zero_grad(set_to_none=True)
        return norm, bad

    def scale(self) -> Tensor:
        """Return fp16's loss scale, on the device; 1 in other precisions."""
        return self.scaler.scale(torch.ones((), device=self.run.accelerator.device))

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

    def restore(self, state: Mapping[str, Any], *, starting: bool = True) -> None:
        """Restore the result of `state`. starting: also the counts of skipped steps.

        Raises UserError if the frozen weights differ.
        """
        for p in self.stage.phases:
            saved, subset = state["phases"][p.name], self.subsets[p.name]
            subset.require(saved.get("frozen", ""))
            subset.load_state_dict(saved["module"])
            load_moments(p.optimizer, saved["optimizer"])
        self.stage.ema.load_state_dict(state["ema"])
        if state["scaler"]:  # empty if the precision was another than fp16
            self.scaler.load_state_dict(state["scaler"])
        if starting:
            self.skipped.total.fill_(int(state["skipped"]))
            self.skipped.in_a_row.fill_(int(state["in_a_row"]))
            self.skipped.unchanged.fill_(int(state["in_a_row"]))
