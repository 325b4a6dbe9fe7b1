"""A run whose losses stop being finite keeps only good weights: it recovers, or it ends with status 1."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.errors import RunError
from support.commands import run_script
from support.divergence import Fault, draw_trial, run_trial, run_with, steps_of
from support.processes import run_in_processes
from support.runs import clip_config, ldm_config, logged, vae_config
from train.config.clip import ClipConfig
from train.config.optimizer import OptimizerConfig
from train.config.vae import AdversarialConfig, VaeConfig
from train.engine.checkpoint import Checkpoints, load_tree, pack_tree
from train.engine.loop import saved_if_reading_fails
from train.engine.provenance import is_result
from train.engine.stage import Batch


@pytest.fixture
def config(shapes: Path, tmp_path: Path) -> ClipConfig:
    return clip_config(shapes, tmp_path / "run", steps=20, batch_size=4, checkpoint_every=5, validate_every=20)


def from_step(first: int) -> Fault:
    """Return a fault in all batches from this step on, counted from 0."""
    return Fault(batches=lambda step: step >= first)


def test_a_rate_beyond_all_bounds_ends_with_status_1_and_no_model(shapes: Path, parts: Path, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(lr=1e38, warmup=0)
    change = {"steps": 80, "checkpoint_every": 5, "keep_checkpoints": 2, "optimizer": optimizer}
    config = ldm_config(shapes, tmp_path / "run", parts, roll_back_after=10, **change)
    outcome = run_with(config, Fault())
    assert outcome.end == "failed"
    assert "there is no checkpoint: add --resume-with-changes and a lower --optimizer.lr" in outcome.message
    assert steps_of(tmp_path / "run") == []
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize("lr", ["1e30", "1e4"])
def test_a_command_that_diverges_exits_with_status_1_and_one_line(lr: str, shapes: Path, tmp_path: Path) -> None:
    small = "--text.width 8 --text.layers 1 --text.heads 1 --image.width 8 --image.layers 1 --image.heads 1"
    line = f"--steps 12 --batch-size 4 --optimizer.lr {lr} --optimizer.warmup 0 --input.resolution 32 --trackers"
    ended = run_script("train_clip", "--data", shapes, "--out", tmp_path / "run", *line.split(), *small.split())
    assert ended.status == 1
    assert ended.err.splitlines()[-1].startswith("error: ")
    assert "a lower --optimizer.lr" in ended.err
    assert not (tmp_path / "run/model").exists()


def test_saves_wait_for_the_next_finite_step(config: ClipConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(config, Fault(batches=lambda step: step in (8, 9, 10))).end == "finished"
    assert steps_of(Path(config.out)) == [5, 12, 15, 20]
    printed = capsys.readouterr().out
    assert printed.count("wait for a finite step") == 1
    assert "step 10: the loss or gradient was not finite in the last 2 steps; validation and checkpoint" in printed


def test_a_streak_at_the_end_or_at_a_stop_leaves_the_last_good_checkpoint(
    config: ClipConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(config.out)
    fault = from_step(11)
    fault.stop_at = 13
    assert run_with(config, fault).end == "stopped"
    assert steps_of(out) == [5, 10]
    assert "so it is not saved: the newest checkpoint is that of step 10" in capsys.readouterr().out
    outcome = run_with(config, from_step(18))
    assert outcome.end == "failed"
    assert "not finite in the last 2 steps, and the run ends here: the newest checkpoint is that of step 15" in (
        outcome.message
    )
    assert steps_of(out) == [5, 10, 15]
    assert not is_result(out / "model", 20)
    assert run_with(config, Fault()).end == "finished"


@pytest.mark.parametrize("weights", ["all", "average"])
def test_weights_that_blow_up_in_the_last_step_are_not_handed_over(config: ClipConfig, weights: str) -> None:
    outcome = run_with(config, Fault(weights_at=19, weights=weights, factor=math.inf))  # type: ignore[arg-type]
    assert outcome.end == "failed"
    assert "the weights do not give a finite loss any more, and the run ends here" in outcome.message
    assert not is_result(Path(config.out) / "model", 20)


def test_over_half_of_the_steps_skipped_ends_the_run(config: ClipConfig) -> None:
    """No streak reaches the limit, because every third step is finite."""
    outcome = run_with(config, Fault(batches=lambda step: step > 5 and step % 3 != 0))
    assert outcome.end == "failed"
    assert "was not finite in 4 of the 6 steps since step 10" in outcome.message
    assert steps_of(Path(config.out)) == [5, 10]


def test_going_back_helps_only_if_training_then_works(config: ClipConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """A single finite step between two streaks isn't enough, although something was saved there."""
    config = replace(config, roll_back_after=4)
    outcome = run_with(config, Fault(batches=lambda step: step in range(7, 12) or step >= 13))
    assert "continues with the weights of step 5" in capsys.readouterr().out
    assert outcome.end == "failed"
    assert "did not help" in outcome.message


@pytest.mark.parametrize("dead", ["NaN", "finite"])
def test_a_dead_checkpoint_of_an_earlier_version_is_passed_over(
    config: ClipConfig, dead: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier versions saved at step 10 what blew up in step 8. Its weights are NaN, or finite but too large."""
    config, out = replace(config, roll_back_after=3, keep_checkpoints=2), Path(config.out)
    fault = Fault()
    fault.stop_at = 4
    run_with(replace(config, checkpoint_every=100), fault)
    state = load_tree(out / "checkpoints/step-00000005")
    for tensor in state["phases"]["clip"]["module"].values():
        if tensor.is_floating_point():
            tensor.mul_(math.nan if dead == "NaN" else 1e30)
    Checkpoints(out / "checkpoints").save(10, state)
    assert run_with(config, Fault()).end == "finished"
    printed = capsys.readouterr().out
    assert "step-00000010 is not used: its weights gave no finite loss" in printed
    assert "step 5 " in printed
    assert steps_of(out) == [15, 20]
    assert not list((out / "checkpoints").glob("diverged-*"))


def test_a_checkpoint_that_a_streak_follows_is_set_aside_until_the_next_one(config: ClipConfig) -> None:
    config, out = replace(config, roll_back_after=2), Path(config.out)
    assert run_with(config, Fault(batches=lambda step: 10 <= step < 13, stop_at=12)).end == "stopped"
    assert steps_of(out) == [5]
    assert (out / "checkpoints/diverged-step-00000010/manifest.json").is_file()
    assert run_with(config, Fault()).end == "finished"
    assert steps_of(out) == [5, 10, 15, 20]
    assert not list((out / "checkpoints").glob("diverged-*"))


def test_an_overflow_of_the_loss_scale_is_not_a_streak(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k | {"init_scale": 2.0**26}))
    change = {"precision": "fp16", "steps": 16, "log_every": 1, "checkpoint_every": 4, "roll_back_after": 4}
    assert run_with(clip_config(shapes, tmp_path / "run", batch_size=2, **change), Fault()).end == "finished"
    assert steps_of(tmp_path / "run") == [4, 8, 12, 16]
    assert 4 < max(line.get("skipped", 0) for line in logged(tmp_path / "run")) < 16


def test_a_discriminator_that_diverges_is_restored(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adversarial = AdversarialConfig(kind="hinge", start=1, channels=8, layers=2)
    change = {"steps": 8, "checkpoint_every": 3, "roll_back_after": 2, "log_every": 1, "adversarial": adversarial}
    config = vae_config(shapes, tmp_path / "run", batch_size=2, **change)
    fault = Fault(weights_at=3, weights="last phase", factor=math.inf)
    assert run_with(config, fault).end == "finished"
    assert "continues with the weights of step 3" in capsys.readouterr().out
    state = load_tree(tmp_path / "run/checkpoints/step-00000008")
    assert all(value.isfinite().all() for value in state["phases"]["discriminator"]["module"].values())


def test_steps_in_a_streak_are_not_saved_when_images_can_not_be_read() -> None:
    saved: list[int] = []

    def batches() -> Iterator[list[Batch]]:
        yield []
        raise RunError("a reading process was killed")

    for sound in (False, True):
        saving: Any = SimpleNamespace(
            run=SimpleNamespace(accelerator=SimpleNamespace(num_processes=1), print=print),
            is_sound=lambda step, sound=sound: sound,
            save=lambda step, stopped: saved.append(step),
        )
        with pytest.raises(RunError, match="killed"):
            list(saved_if_reading_fails(saving, batches(), 7))
    assert saved == [8]


# -- several processes -----------------------------------------------------------------------------------------


def train_with_faults(rank: int, count: int, config: VaeConfig) -> None:
    """Train with NaN in the images of one process in steps 6 and 7, and weights that blow up in step 9."""
    fault = Fault(batches=lambda step: rank == 1 and step in (5, 6), weights_at=8, weights="all", factor=math.inf)
    assert run_with(config, fault).end == "finished"
    assert fault.trainer is not None
    torch.save(fault.trainer.state(), Path(config.out) / f"{rank}.pt")


@pytest.mark.slow
def test_all_processes_go_back_together(shapes: Path, tmp_path: Path) -> None:
    change = {"steps": 12, "checkpoint_every": 4, "validate_every": 3, "roll_back_after": 8, "log_every": 1}
    run_in_processes(train_with_faults, 2, vae_config(shapes, tmp_path / "run", **change))
    assert steps_of(tmp_path / "run") == [4, 12]
    one, two = (pack_tree(torch.load(tmp_path / f"run/{k}.pt", weights_only=True)).tensors for k in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


# -- many ------------------------------------------------------------------------------------------------------


FAST = (0, 11, 12, 34, 35)
"""Seeds of the trials that are part of the ordinary tests: short ones, of all stages and kinds of faults."""


@pytest.mark.parametrize("seed", [s if s in FAST else pytest.param(s, marks=pytest.mark.slow) for s in range(200)])
def test_a_divergence_leaves_only_good_weights(seed: int, shapes: Path, parts: Path, tmp_path: Path) -> None:
    trial = draw_trial(seed)
    outcomes = run_trial(trial, shapes, tmp_path / "run", parts)
    print("trial", seed, trial.stage, trial.kind, *(outcome.end for outcome in outcomes))
