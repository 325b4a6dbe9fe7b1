"""The held-out loss: its minimum, its significant rise, and the weights that are kept at the minimum."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel
from torch import Tensor

import train.stages.ldm_evaluation
from ldm.files import read_json
from ldm.pipeline import LatentDiffusionPipeline
from support.runs import Crash, final_state, ldm_config, logged, train_stage
from train.data.batches.images import ImageDataset
from train.data.images.crop import Framing
from train.data.order.permutation import choose
from train.data.sources.splits import open_source
from train.engine.overfitting import HeldOutLoss, standard_errors
from train.engine.stage import Validation
from train.evaluation.features import load_features
from train.stages.ldm import LdmStage


def normals(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def reports(losses: Tensor) -> list[tuple[int, str]]:
    """Return the reports while the losses of the images take these values, (validations, n), with their numbers."""
    held_out = HeldOutLoss()
    found = []
    for k, row in enumerate(losses):
        held_out.add(k, row, "")
        found.append((k, held_out.report(k, row, "model-best")))
    return [(k, line) for k, line in found if line]


# -- the rule -----------------------------------------------------------------------------------------------------


def test_standard_errors_are_those_of_a_paired_test() -> None:
    now, before = normals(0, 50) + 0.3, normals(1, 50)
    assert standard_errors(now - before) == pytest.approx(ttest_rel(now, before).statistic)
    assert standard_errors(torch.ones(5)) == standard_errors(torch.ones(1)) == 0.0


def test_a_rise_is_reported_once_and_names_the_minimum() -> None:
    """The images differ 100 times more from each other than the rise is large, which a test of means wouldn't find."""
    image, change = 10 * normals(2, 1, 200), 0.1 * normals(3, 12, 200)
    trend = torch.tensor([0.5, 0.3, 0.1, 0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4], dtype=torch.float64)
    ((k, line),) = reports(image + change + trend[:, None])
    assert k in (5, 6, 7)
    assert "since step 3" in line
    assert "model-best has the weights of step 3" in line


@pytest.mark.parametrize("images", [25, 500])
def test_noise_alone_is_not_reported(images: int) -> None:
    """60 runs of 100 validations with the same expected loss."""
    assert not any(reports(normals(seed, 100, images)) for seed in range(60))


def test_one_high_validation_is_not_reported() -> None:
    trend = torch.tensor([0.2, 0, 0.5, 0.0001, 0.5, 0.0001, 0.5], dtype=torch.float64)
    assert not reports(trend[:, None] + 1e-3 * normals(4, 7, 100))


def test_losses_that_cannot_be_compared_start_anew() -> None:
    held_out = HeldOutLoss()
    assert held_out.add(1, torch.ones(3).double(), "a")
    assert not held_out.add(2, torch.tensor([0.0, 0.0, torch.nan]).double(), "a")
    assert not held_out.add(3, torch.ones(3).double(), "a")
    assert held_out.add(4, 2 * torch.ones(4).double(), "b")
    assert held_out.step == 4
    assert len(held_out.state()["losses"]) == 4


# -- the run ------------------------------------------------------------------------------------------------------

TREND = dict(zip(range(1, 9), [0.5, 0.2, 0.3, 0.1, 0.2, 0.3, 0.4, 0.5], strict=True))
"""Held-out loss after each step; the minimum is after step 4."""


@pytest.fixture
def no_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.engine.loop.draw_sheet", lambda *_: None)


@pytest.fixture
def seen(no_sheets: None, monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, Tensor]]:
    """Give the validations of stage 2 the losses of TREND. Returns the averaged weights of each validation, by step."""
    weights: dict[int, dict[str, Tensor]] = {}

    def validate(stage: LdmStage, step: int) -> Validation:
        weights[step] = {name: value.clone() for name, value in stage.ema.module.state_dict().items()}
        losses = TREND[step] + 1e-3 * normals(step, 30)
        return Validation({"val_loss": float(losses.mean())}, losses, "same")

    monkeypatch.setattr(LdmStage, "validate", validate)
    return weights


def kept(out: Path) -> tuple[int, dict[str, Tensor]]:
    """Return the step and the UNet's weights of model-best/."""
    pipe = LatentDiffusionPipeline.from_pretrained(out / "model-best")
    return read_json(out / "model-best/training.json")["step"], pipe.backbone.module.state_dict()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_weights_at_the_minimum_are_kept(
    seen: dict[int, dict[str, Tensor]], shapes: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interruption at any step changes neither model-best/, nor the checkpoints, nor what is reported."""

    def train(out: Path, **change: Any) -> None:
        cuts = change.pop("cuts", ())
        config = ldm_config(shapes, out, parts, validate_every=1, keep_best=True, **change)
        for cut in cuts:
            with pytest.raises(KeyboardInterrupt):
                train_stage(config, Crash(cut))
        train_stage(config)

    train(tmp_path / "whole")
    assert capsys.readouterr().out.count("held-out loss has been rising since step 4,") == 1
    step, weights = kept(tmp_path / "whole")
    assert step == 4
    assert equal(weights, seen[4])
    assert "smallest held-out loss" in (tmp_path / "whole/model-best/README.md").read_text()
    train(tmp_path / "cut", cuts=(3, 5, 7))
    assert final_state(tmp_path / "cut") == final_state(tmp_path / "whole")
    step, again = kept(tmp_path / "cut")
    assert step == 4
    assert equal(again, weights)


def test_weights_are_kept_only_if_configured(
    seen: dict[int, dict[str, Tensor]], shapes: Path, parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """When it is switched on later, the smallest loss from then on counts, because earlier weights weren't kept."""
    out = tmp_path / "run"
    train_stage(ldm_config(shapes, out, parts, validate_every=1, steps=6, checkpoint_every=6))
    assert "--keep-best" in capsys.readouterr().out
    assert not (out / "model-best").exists()
    train_stage(ldm_config(shapes, out, parts, validate_every=1, steps=8, keep_best=True))
    step, weights = kept(out)
    assert step == 7
    assert equal(weights, seen[7])


# -- evaluation of generated images -----------------------------------------------------------------------------------


def test_evaluation_does_not_change_the_training(
    no_sheets: None, shapes: Path, parts: Path, small_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Fréchet distance of the generated images, computed here with the network of the setting, is logged."""
    made: list[np.ndarray] = []
    inner = train.stages.ldm_evaluation.generate

    def noted(*args: Any, **how: Any) -> np.ndarray:
        assert (how["seed"], how["precision"]) == (7, "bf16")
        made.append(inner(*args, **how))
        return made[-1]

    monkeypatch.setattr(train.stages.ldm_evaluation, "generate", noted)
    brief: dict[str, Any] = {
        "seed": 7,
        "steps": 4,
        "validate_every": 1,
        "checkpoint_every": 4,
        "precision": "bf16",
    }
    train_stage(ldm_config(shapes, tmp_path / "without", parts, **brief))
    settings: dict[str, Any] = {"evaluation_images": 6, "evaluation_features": str(small_clip)}
    train_stage(ldm_config(shapes, tmp_path / "with", parts, evaluate_every=2, **brief, **settings))
    lines = [(line["step"], line.get("val_frechet")) for line in logged(tmp_path / "with") if "val_loss" in line]
    assert [step for step, value in lines if value is not None] == [2, 4]
    assert [step for step, _ in lines] == [1, 2, 3, 4]
    assert final_state(tmp_path / "with", 4) == final_state(tmp_path / "without", 4)
    held_out = open_source(shapes, "test")
    chosen = choose(6, len(held_out), 7)
    real = ImageDataset(held_out, Framing(resolution=32), 7, shuffle=False).__getitems__(chosen).pixels
    features = load_features(str(small_clip))
    x, y = features(real), features(torch.from_numpy(made[-1]).permute(0, 3, 1, 2) / 127.5 - 1)
    (a, b), (m, n) = ((np.cov(f.double().numpy(), rowvar=False) for f in (x, y)), (f.double().mean(0) for f in (x, y)))
    expected = float((m - n).square().sum()) + np.trace(a + b) - 2 * np.sqrt(np.linalg.eigvals(a @ b) + 0j).real.sum()
    assert lines[-1][1] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    last = logged(tmp_path / "with")[-1]
    kernels = [(a.double() @ b.double().T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    within = sum(float(k.sum() - k.trace()) / 30 for k in kernels[:2])
    assert last["val_kid"] == pytest.approx(within - 2 * float(kernels[2].mean()), rel=1e-3, abs=1e-6)
    assert len(made[-1]) == 6
