"""Checkpoints of a trainer. Only states whose weights give finite losses are saved and restored."""

import math

import torch
from torch import Tensor

from ldm.errors import RunError
from train.engine.changes import examples_of_earlier_code
from train.engine.checkpoint import Checkpoints, LatestCheckpoint, of_this_run
from train.engine.overfitting import HeldOutLoss
from train.engine.trainer import Trainer
from train.engine.trial import trial


class Saving:
    """Checkpoints of a trainer, and the test that its weights pass before they are saved."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.run = trainer, trainer.run
        self.checkpoints = Checkpoints(self.run.folder.checkpoints, keep=self.run.config.keep_checkpoints)
        self.tested, self.sound = -1, True  # a step, and whether the weights after it give finite losses
        self.window = 0  # step since which `skipped.recent` counts
        self.rolled_back = False  # in this window
        self.restored = 0  # step of the restored checkpoint
        self.passed_over = False  # whether it isn't the newest
        self.held_out = HeldOutLoss()

    # -- the test ---------------------------------------------------------------------------------------------

    def is_sound(self, step: int) -> bool:
        """Return whether the weights may be saved: the step wasn't skipped, and the weights give finite losses.

        A step can change finite weights into weights whose loss isn't finite, and only the next step would show that.
        So the weights are tested on the step's own batch, whose loss was finite before. The averages are tested too.
        """
        if int(self.trainer.skipped.in_a_row):
            return False
        if step != self.tested:
            phases = [p for p in self.trainer.stage.phases if p.start < step]
            bad = trial(self.run, phases, self.trainer.part[0], scale=self.trainer.scale().clamp(max=1))
            with self.trainer.stage.ema.swapped():
                bad += trial(self.run, phases[:1], self.trainer.part[0], gradient=False)
            bad += not self.weights_are_finite()
            self.tested, self.sound = step, not float(self.run.accelerator.reduce(bad, "sum"))
        return self.sound

    def problem(self) -> str:
        """Return why the weights aren't sound."""
        if steps := int(self.trainer.skipped.in_a_row):
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

    def weights_are_finite(self) -> bool:
        """Return whether all trainable weights, moments and averages are finite."""
        tensors: list[Tensor] = list(self.trainer.stage.ema.module.parameters())
        for phase in self.trainer.stage.phases:
            tensors += [p for group in phase.optimizer.param_groups for p in group["params"]]
            entries = [v for state in phase.optimizer.state.values() for v in state.values()]
            tensors += [v for v in entries if torch.is_tensor(v) and v.is_floating_point()]
        with torch.no_grad():
            return bool(torch.isfinite(torch.nn.utils.get_total_norm(tensors, math.inf)))

    # -- checkpoints ------------------------------------------------------------------------------------------

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

        Raises RunError if over half of the steps since the last checkpoint were skipped. A run that has been rolled
        back or is being stopped may save them all the same, because it hasn't had the steps to show that it works.
        """
        skipped, steps = int(self.trainer.skipped.recent), step - self.window
        if 2 * skipped <= steps:
            self.trainer.skipped.recent.zero_()
            self.window, self.rolled_back = step, False
        elif not (self.rolled_back or stopped):
            raise RunError(
                f"the loss or gradient was not finite in {skipped} of the {steps} steps since step {self.window}: "
                f"{self.advice()}"
            )
        if self.run.main:
            held_out = {"held_out": state} if (state := self.held_out.state()) else {}
            self.checkpoints.save(step, self.trainer.state() | {"examples": self.run.feed.state(step)} | held_out)
        self.run.accelerator.wait_for_everyone()

    def roll_back_if_needed(self, step: int) -> bool:
        """Restore an earlier checkpoint's weights after too many skipped steps in a row, or if the weights are unsound.

        The step number isn't reset. Checkpoints that the streak followed directly are passed over, if there are earlier
        ones. Returns whether a checkpoint was restored. Raises RunError if there is none, or if training hasn't worked
        since the last roll-back.
        """
        unsound = self.tested == step and not self.sound
        if int(self.trainer.skipped.in_a_row) < self.run.config.roll_back_after and not unsound:
            return False
        problem = self.problem()
        if self.rolled_back:
            raise RunError(f"{problem}, and restoring the last checkpoint did not help: {self.advice()}")
        # The last step that changed the weights made them so: a checkpoint directly before it may lead there again.
        changed = step - int(self.trainer.skipped.unchanged)
        checkpoint = self._restore_newest(changed - 1) or self._restore_newest()
        if checkpoint is None:
            raise RunError(f"{problem}, and there is no checkpoint: {self.advice()}")
        self.run.print(f"step {step}: {problem}; training continues with the weights of step {checkpoint.step}")
        self.trainer.skipped.end_streak()
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
        with of_this_run(checkpoint):
            self.trainer.restore(state, starting=starting)
            if starting:
                earlier = examples_of_earlier_code(self.run.folder.settings, checkpoint.step, self.run.config)
                self.run.feed.restore(checkpoint.step, state.get("examples") or earlier)
                self.held_out.restore(state.get("held_out", {}))
            in_streak = int(state["in_a_row"]) > 0
        if in_streak or not self.weights_are_finite():
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
