"""The trainer of a stage: one step, and the state that is saved, restored and checked for non-finite values.

A step is a pure function of its batch and the weights: accumulation, mixed precision with fp32 weights, distribution,
clipping, skipping of non-finite steps without waiting for the device, and the moving average.
"""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import RunError
from train.engine.changes import examples_of_earlier_code
from train.engine.checkpoint import Checkpoints, LatestCheckpoint
from train.engine.optim import load_moments
from train.engine.precision import autocast
from train.engine.run import AnyRun
from train.engine.skipped import SkippedSteps
from train.engine.stage import Batch, Hooks, Phase, Stage, StepOutput
from train.engine.subset import Subset, frozen_names
from train.engine.trial import trial


class Trainer:
    """A stage and the state of its training."""

    def __init__(self, run: AnyRun, stage: Stage, hooks: Hooks | None = None) -> None:
        self.run, self.stage, self.hooks = run, stage, hooks or Hooks()
        device = run.accelerator.device
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.config.precision == "fp16")
        self.skipped = SkippedSteps(device)
        self.wrapped = [run.accelerator.prepare_model(p.module) for p in stage.phases]
        self.subsets = {p.name: Subset(p.module, frozen_names(p.module)) for p in stage.phases}
        self.checkpoints = Checkpoints(run.folder.checkpoints, keep=run.config.keep_checkpoints)
        self.part: list[Batch] = []  # the first part of the last batch, on which the weights are tested
        self.tested, self.sound = -1, True  # a step, and whether the weights after it give finite losses
        self.window = 0  # step since which `skipped.recent` counts
        self.rolled_back = False  # in this window
        self.restored = 0  # step of the restored checkpoint
        self.passed_over = False  # whether it isn't the newest

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
                wrong = torch.maximum(wrong, skipped * (~torch.isfinite(means["loss"]) | (self._scale() <= 1)))
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
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, bad

    def _scale(self) -> Tensor:
        """Return fp16's loss scale, on the device; 1 in other precisions."""
        return self.scaler.scale(torch.ones((), device=self.run.accelerator.device))

    # -- weights that give no finite loss ---------------------------------------------------------------------

    def is_sound(self, step: int) -> bool:
        """Return whether the weights may be saved: the step wasn't skipped, and they give finite losses.

        A step can change finite weights into weights whose loss isn't finite, and only the next step would show that.
        So the weights are tested on the step's own batch, whose loss was finite before. The averages are tested too.
        """
        if int(self.skipped.in_a_row):
            return False
        if step != self.tested:
            phases = [p for p in self.stage.phases if p.start < step]
            bad = trial(self.run, phases, self.part[0], scale=self._scale().clamp(max=1))
            with self.stage.ema.swapped():
                bad += trial(self.run, phases[:1], self.part[0], gradient=False)
            bad += not self._weights_are_finite()
            self.tested, self.sound = step, not float(self.run.accelerator.reduce(bad, "sum"))
        return self.sound

    def problem(self) -> str:
        """Return why the weights aren't sound."""
        if steps := int(self.skipped.in_a_row):
            return f"the loss or gradient was not finite in the last {'step' if steps == 1 else f'{steps} steps'}"
        return "the weights do not give a finite loss any more"

    def kept(self) -> str:
        """Return which checkpoint is the newest."""
        step = self.checkpoints.newest_step()
        return f"the newest checkpoint is that of step {step}" if step else "there is no checkpoint"

    def advice(self) -> str:
        """Return what to do about losses that aren't finite."""
        precision = "" if self.run.config.precision == "fp32" else " or --precision fp32"
        return f"add --resume-with-changes and a lower --optimizer.lr{precision}"

    def _weights_are_finite(self) -> bool:
        """Return whether all trainable weights, moments and averages are finite."""
        tensors: list[Tensor] = list(self.stage.ema.module.parameters())
        for phase in self.stage.phases:
            tensors += [p for group in phase.optimizer.param_groups for p in group["params"]]
            entries = [v for state in phase.optimizer.state.values() for v in state.values()]
            tensors += [v for v in entries if torch.is_tensor(v) and v.is_floating_point()]
        with torch.no_grad():
            return bool(torch.isfinite(torch.nn.utils.get_total_norm(tensors, math.inf)))

    def roll_back_if_needed(self, step: int) -> bool:
        """Restore an earlier checkpoint's weights after too many skipped steps in a row, or if the weights are unsound.

        The step number isn't reset. Checkpoints that the streak followed directly have the same weights as now, so
        earlier ones are preferred. Returns whether a checkpoint was restored. Raises RunError if there is none, or if
        training hasn't worked since the last roll-back.
        """
        unsound = self.tested == step and not self.sound
        if int(self.skipped.in_a_row) < self.run.config.roll_back_after and not unsound:
            return False
        problem = self.problem()
        if self.rolled_back:
            raise RunError(f"{problem}, and restoring the last checkpoint did not help: {self.advice()}")
        checkpoint = self._restore_newest(step - int(self.skipped.unchanged)) or self._restore_newest()
        if checkpoint is None:
            raise RunError(f"{problem}, and there is no checkpoint: {self.advice()}")
        self.run.print(f"step {step}: {problem}; training continues with the weights of step {checkpoint.step}")
        self.skipped.end_streak()
        self.tested, self.sound, self.rolled_back = step, False, True  # saved only after another step
        self._set_aside(checkpoint)
        return True

    def _restore_newest(self, before: float = math.inf, *, starting: bool = False) -> LatestCheckpoint | None:
        """Restore the newest valid checkpoint of a step below `before`. Returns None if there is none.

        starting: also the counts of skipped steps and the position in the examples. A checkpoint from a streak or with
        weights that aren't finite, as earlier versions saved, is passed over unless there is no other.
        """
        checkpoint = self.checkpoints.latest(before)
        if checkpoint is None:
            return None
        state = self.checkpoints.load(checkpoint)
        self.restore(state, starting=starting)
        if starting:
            earlier = examples_of_earlier_code(self.run.folder.settings, checkpoint.step, self.run.config)
            self.run.feed.restore(checkpoint.step, state.get("examples") or earlier)
        if state["in_a_row"] or not self._weights_are_finite():
            del state
            return self._restore_newest(checkpoint.step, starting=starting) or checkpoint
        return checkpoint

    def _set_aside(self, restored: LatestCheckpoint) -> None:
        """Set the checkpoints aside that were passed over, so that no later start continues from them."""
        newest, self.restored = restored, restored.step
        if self.checkpoints.newest_step() > restored.step:
            newest = self.checkpoints.latest() or restored
        self.passed_over = newest.step > restored.step
        self.run.accelerator.wait_for_everyone()  # all processes have read them
        if self.passed_over and self.run.main:
            for folder in self.checkpoints.set_aside(restored.step):
                self.run.print(f"{folder} is not used: its weights gave no finite loss")
        self.run.accelerator.wait_for_everyone()

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
            self.skipped.total.fill_(state["skipped"])
            self.skipped.in_a_row.fill_(state["in_a_row"])
            self.skipped.unchanged.fill_(state["in_a_row"])

    def resume(self) -> int:
        """Restore the newest usable checkpoint. Returns the step to start with, 0 if there is no checkpoint."""
        checkpoint = self._restore_newest(starting=True)
        if checkpoint is None:
            return 0
        self._set_aside(checkpoint)
        self.run.print(f"continuing from step {checkpoint.step} ({checkpoint.folder})")
        self.window = checkpoint.step
        return checkpoint.step

    def save(self, step: int, *, stopped: bool) -> None:
        """Commit a checkpoint of weights that are sound.

        Raises RunError if over half of the steps since the last checkpoint were skipped. After a roll-back, or if the
        run is stopped, it is only not yet seen to work.
        """
        skipped, steps = int(self.skipped.recent), step - self.window
        if 2 * skipped <= steps:
            self.skipped.recent.zero_()
            self.window, self.rolled_back = step, False
        elif not (self.rolled_back or stopped):
            raise RunError(
                f"the loss or gradient was not finite in {skipped} of the {steps} steps since step {self.window}: "
                f"{self.advice()}"
            )
        if self.run.main:
            self.checkpoints.save(step, self.state() | {"examples": self.run.feed.state(step)})
        self.run.accelerator.wait_for_everyone()
