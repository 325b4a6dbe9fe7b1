"""Held-out images in validation, sheets and reports are chosen by the seed: a dataset may be sorted by class."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train.commands.evaluate
import train.stages.ldm
from support.runs import Start, ldm_config, train_stage
from train.commands.evaluate import evaluate
from train.config.reports import EvaluateOptions
from train.data.batches.cached import CachedDataset
from train.data.batches.images import ImageDataset
from train.data.order.permutation import choose
from train.data.order.rng import Positions
from train.data.sources.splits import open_source

HELD_OUT = 24
"""Number of held-out images in the `shapes` dataset, which has 64 to train on."""


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices of the used held-out images, in order."""
    indices: list[int] = []

    def recorded(method: Callable[..., Any]) -> Callable[..., Any]:
        def get(self: Any, positions: Positions) -> Any:
            batch = method(self, positions)
            if len(self) == HELD_OUT:
                indices.extend(batch.index.tolist())
            return batch

        return get

    for dataset in (CachedDataset, ImageDataset):
        monkeypatch.setattr(dataset, "__getitems__", recorded(dataset.__getitems__))
    return indices


@pytest.mark.parametrize("seed", [0, 1])
def test_validation_uses_the_seeds_choice(start: Start, tmp_path: Path, used: list[int], seed: int) -> None:
    start(tmp_path / "run", steps=1, seed=seed)
    assert used[:8] == choose(8, HELD_OUT, seed)
    assert used[:8] != list(range(8))


@pytest.mark.parametrize("change", [{"cache": "off"}, {"task": "inpaint"}])
def test_other_validations_of_stage_2_use_the_same_choice(
    shapes: Path, parts: Path, tmp_path: Path, used: list[int], change: dict[str, Any]
) -> None:
    train_stage(ldm_config(shapes, tmp_path / "run", parts, steps=1, **change))
    for first in range(0, len(used), 8):  # the validation, then the inpainted sheet
        assert used[first : first + 8] == choose(8, HELD_OUT, 0)


def test_sheets_show_the_captions_of_the_seeds_choice(
    shapes: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[list[str]] = []
    draw = train.stages.ldm.sheet
    for module in (train.stages.ldm, train.commands.evaluate):
        monkeypatch.setattr(module, "sheet", lambda rows, captions: (shown.append(list(captions)), draw(rows))[1])
    train_stage(ldm_config(shapes, tmp_path / "run", parts, steps=1, seed=3))
    held_out = open_source(shapes, "test")
    assert shown == [[held_out[k].captions[0] for k in choose(16, HELD_OUT, 3)]]

    (shapes / "shapes.json").rename(shapes / "hidden.json")  # otherwise the report's sheet shows other prompts
    try:
        settings: dict[str, Any] = {"model": str(tmp_path / "run/model"), "data": str(shapes), "steps": 1}
        evaluate(EvaluateOptions(**settings, out=str(tmp_path / "report"), images=8, samples=0, likelihoods=1, seed=5))
    finally:
        (shapes / "hidden.json").rename(shapes / "shapes.json")
    assert shown[1:] == [[held_out[k].captions[0] for k in choose(8, HELD_OUT, 5)]]


@pytest.mark.parametrize("n", [160, 1600])  # below and above the limit up to which the order is drawn directly
def test_a_choice_from_a_sorted_dataset_covers_its_classes_and_noise_levels(n: int) -> None:
    classes = np.arange(n) * 16 // n
    assert len(set(classes[choose(16, n, 0)])) >= 8
    timesteps = (np.arange(n) + 0.5) / n
    order = choose(n, n, 0)
    assert sorted(order) == list(range(n))
    means = [timesteps[classes[order] == k].mean() for k in range(16)]
    assert np.abs(np.array(means) - 0.5).max() < 0.25
