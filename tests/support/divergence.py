"""Runs that diverge: faults in their rate, weights or batches, and what is left in their folders afterwards."""

import json
import math
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import train.engine.loop
from ldm.errors import RunError
from support.runs import Config, logged, stage_config, train_stage
from train.config.optimizer import OptimizerConfig
from train.engine.checkpoint import Checkpoints, load_tree
from train.engine.provenance import is_result
from train.engine.run import AnyRun
from train.engine.saving import Saving
from train.engine.stage import Batch, Hooks, Stage
from train.engine.trainer import Trainer

Weights = Literal["none", "all", "one", "moment", "average", "last phase"]


@dataclass
class Fault(Hooks):
    """Something that makes losses non-finite, at some steps, counted from 0."""

    batches: Callable[[int], bool] = lambda step: False
    """Steps whose noise or images are multiplied by `factor`."""
    weights_at: int = -1
    """Step after which weights are multiplied by `factor`, once."""
    weights: Weights = "none"
    factor: float = math.nan
    stop_at: int = -1
    """Step in which SIGTERM arrives."""
    trainer: Trainer | None = None
    skipped: dict[int, bool] = field(default_factory=dict)
    """Whether the loss or gradient after each number of steps wasn't finite."""

    def begin_step(self, step: int, parts: list[Batch]) -> list[Batch]:
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return [self._multiplied(part) for part in parts] if self.batches(step) else parts

    def _multiplied(self, part: Batch) -> Batch:
        names = [name for name in ("noise", "pixels") if isinstance(getattr(part, name, None), Tensor)]
        return replace(part, **{name: getattr(part, name) * self.factor for name in names})

    def end_step(self, step: int, metrics: dict[str, Tensor]) -> None:
        norms = [value for name, value in metrics.items() if name.endswith(("loss", "grad_norm"))]
        self.skipped[step + 1] = not all(torch.isfinite(value) for value in norms)
        if step == self.weights_at:
            self.weights_at = -1
            self._damage()

    @torch.no_grad()
    def _damage(self) -> None:
        assert self.trainer is not None
        stage = self.trainer.stage
        phase = stage.phases[-1 if self.weights == "last phase" else 0]
        tensors: list[Tensor] = [p for p in phase.module.parameters() if p.requires_grad]
        match self.weights:
            case "one":
                tensors = [max(tensors, key=lambda p: p.ndim)]
            case "moment":
                tensors = [state["exp_avg"] for state in phase.optimizer.state.values() if "exp_avg" in state][:1]
            case "average":
                tensors = list(stage.ema.module.parameters())
        for tensor in tensors:
            tensor.add_(1e-3).mul_(self.factor)


@dataclass(frozen=True)
class Outcome:
    """End of a run: "finished", "failed" or "stopped"; and the error's message."""

    end: str
    message: str = ""


def run_with(config: Config, fault: Fault) -> Outcome:
    """Start or continue a run with a fault."""

    class Observed(Trainer):
        def __init__(self, run: AnyRun, stage: Stage, hooks: Hooks | None = None) -> None:
            super().__init__(run, stage, hooks)
            fault.trainer = self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.engine.loop, "Trainer", Observed)
        try:
            train_stage(config, fault)
        except RunError as error:
            return Outcome("failed", str(error))
        except SystemExit as stopped:
            return Outcome("stopped" if stopped.code == 128 + signal.SIGTERM else f"status {stopped.code}")
        return Outcome("finished")


def steps_of(out: Path) -> list[int]:
    """Return the steps of a run's checkpoints, which are all valid."""
    checkpoints = Checkpoints(out / "checkpoints")
    newest = checkpoints.latest()
    assert newest is None or not newest.invalid
    return sorted(int(folder.name[5:]) for folder in checkpoints.folder.glob("step-*"))


def require_good_weights(trainer: Trainer, skipped: dict[int, bool]) -> None:
    """Assert that all checkpoints of a run, and model/, have finite weights with finite losses, and no skipped step.

    trainer: of the run, which has ended. The losses are those of the run's first batch, and of the validation.
    """
    run, stage, out = trainer.run, trainer.stage, trainer.run.folder.path
    steps = steps_of(out)
    assert not [step for step in steps if skipped.get(step)], (steps, skipped)
    for file in out.glob("model/**/*.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(file).values()), file
    if not steps:
        assert not (out / "model").exists()
        return
    if (out / "model").exists():
        assert json.loads((out / "model/training.json").read_text())["step"] in steps
    raw = next(stage.batches(0))[0]
    for step in steps:
        state = load_tree(out / f"checkpoints/step-{step:08d}")
        trainer.restore(state)
        assert Saving(trainer).weights_are_finite(), step
        assert not state["in_a_row"], step
        part: Any = stage.prepare(step, [raw])[0]
        with stage.ema.swapped():
            assert torch.isfinite(stage.phases[0].module(part).loss), step
        for phase in [p for p in stage.phases if p.start < step]:
            output = phase.module(part)
            assert torch.isfinite(output.loss), (step, phase.name)
            part = output.batch
    metrics = stage.validate(run.config.steps).metrics
    assert all(map(math.isfinite, metrics.values())), metrics


@dataclass(frozen=True)
class Trial:
    """One divergence, drawn from a seed."""

    stage: str
    kind: str
    settings: dict[str, Any]
    fault: Fault
    repeats: bool
    """Whether the fault remains when the run is started again."""


def draw_trial(seed: int) -> Trial:
    """Return a divergence at a random moment; consecutive seeds go through the stages and the kinds of faults."""
    rng = random.Random(seed)
    stage, kind = ("clip", "vae", "ldm")[seed % 3], ("rate", "weights", "batches")[seed // 3 % 3]
    steps = 16
    settings: dict[str, Any] = {
        "steps": steps,
        "batch_size": 4,
        "checkpoint_every": rng.choice((1, 2, 3, 5, 8)),
        "validate_every": rng.choice((5, steps)),
        "log_every": rng.choice((1, 4, 50)),
        "roll_back_after": rng.choice((2, 3, 6)),
        "ema_decay": rng.choice((0.0, 0.9, 0.9999)),
    }
    warmup = 0 if kind == "rate" else 3
    lr = 10 ** rng.uniform(0, 38) if kind == "rate" else 1e-3
    settings["optimizer"] = OptimizerConfig(kind=rng.choice(("adamw", "muon")), lr=lr, warmup=warmup)
    at, fault = rng.randrange(steps), Fault(factor=rng.choice((math.nan, math.inf, 1e30, 1e38)))
    if kind == "weights":
        fault.weights_at = at
        fault.weights = rng.choice(("all", "one", "moment", "average", "last phase"))
    elif kind == "batches":
        length, share = rng.choice((1, 2, 4, 8, steps)), rng.choice((1.0, 1.0, 0.6))
        bad = {step for step in range(at, min(at + length, steps)) if rng.random() < share}
        fault.batches = bad.__contains__
    if rng.random() < 0.2:
        fault.stop_at = min(steps - 1, at + rng.randrange(1, 5))
    return Trial(stage, kind, settings, fault, repeats=rng.random() < 0.3)


def run_trial(trial: Trial, data: Path, out: Path, parts: Path) -> list[Outcome]:
    """Run a divergence and start the run again until it finishes or fails twice. Tests its folder each time."""
    config, fault = stage_config(trial.stage, data, out, parts, **trial.settings), trial.fault
    outcomes: list[Outcome] = []
    skipped: dict[int, bool] = {}
    for _ in range(2 if trial.kind == "rate" else 3):
        outcomes.append(run_with(config, fault))
        skipped |= fault.skipped
        assert fault.trainer is not None
        require_good_weights(fault.trainer, skipped)
        assert is_result(out / "model", config.steps) == (outcomes[-1].end == "finished"), outcomes
        assert "--optimizer.lr" in outcomes[-1].message or outcomes[-1].end != "failed"
        if outcomes[-1].end == "finished":
            assert steps_of(out)[-1] == config.steps
            break
        fault.stop_at = -1
        if trial.kind != "rate" and not trial.repeats:
            fault = Fault()
    lines = logged(out) if (out / "metrics.jsonl").is_file() else []
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    return outcomes
