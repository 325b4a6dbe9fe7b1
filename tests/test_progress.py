"""The progress of a run on the console, in samples/ and in the trackers."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train.engine.estimate
from support.runs import Crash, Start, clip_config, final_state, losses, train_stage, vae_config
from train.config.vae import AdversarialConfig
from train.data.store.shards import duration
from train.engine.metrics import Metrics

ALWAYS = 1e-9
"""A number of minutes that every first step exceeds."""


def sheets(out: Path) -> list[str]:
    return sorted(path.stem for path in (out / "samples").glob("*.png"))


def test_the_first_sheet_is_drawn_by_time_and_changes_nothing(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path / "none", first_samples=0)
    assert "first samples" not in capsys.readouterr().out
    assert sheets(tmp_path / "none") == ["step-00000008"]
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", Crash(5), first_samples=ALWAYS)
    assert f"step 1: first samples: {tmp_path / 'run/samples/step-00000001.png'}" in capsys.readouterr().out
    assert sheets(tmp_path / "run") == ["step-00000001"]
    start(tmp_path / "run", first_samples=ALWAYS)
    assert sheets(tmp_path / "run") == ["step-00000001", "step-00000008"]  # not repeated when the run is continued
    assert final_state(tmp_path / "run") == final_state(tmp_path / "none")


def test_a_validation_comes_before_the_first_sheet(start: Start, tmp_path: Path) -> None:
    start(tmp_path / "run", validate_every=1, first_samples=ALWAYS, steps=3)
    assert sheets(tmp_path / "run") == [f"step-{step:08d}" for step in (1, 2, 3)]
    start(tmp_path / "other", first_samples=60, steps=3)
    assert sheets(tmp_path / "other") == ["step-00000003"]


def test_the_duration_is_printed_once_after_the_first_steps(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.engine.estimate, "_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train_stage(clip_config(shapes, tmp_path / "clip", steps=2000), Crash(9))
    line = r"^about ([\w ]+) for 2,000 steps, ([\d.e-]+) s per step, without validation$"
    ((total, each),) = re.findall(line, capsys.readouterr().out, re.MULTILINE)
    around = (
        duration(2000 * float(each) * share) for share in np.linspace(0.9, 1.1, 1000)
    )  # because the duration is rounded
    assert total in set(around)
    with pytest.raises(KeyboardInterrupt):
        train_stage(clip_config(shapes, tmp_path / "clip", steps=2000), Crash(16))
    assert re.search("^about .* for the remaining 1,991 steps, ", capsys.readouterr().out, re.MULTILINE)


def test_the_duration_includes_a_phase_that_starts_later(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.engine.estimate, "_SECONDS", 0.0)
    adversarial = AdversarialConfig(kind="hinge", start=1000, channels=64, layers=3)
    with pytest.raises(KeyboardInterrupt):
        train_stage(vae_config(shapes, tmp_path / "vae", steps=2000, adversarial=adversarial), Crash(9))
    line = r"for 2,000 steps, ([\d.e-]+) s per step, ([\d.e-]+) s from step 1,000 on, without validation$"
    ((early, late),) = re.findall(line, capsys.readouterr().out, re.MULTILINE)
    assert float(late) > 1.2 * float(early)


def test_tensorboard_has_each_step_once_and_the_sheets(start: Start, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"trackers": ("tensorboard",), "log_every": 1, "validate_every": 2}
    for at in (2, 5, 7):  # before the first checkpoint, and after the first and the second
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "run", Crash(at), **settings)
    start(tmp_path / "run", **settings)
    events = EventAccumulator(str(tmp_path / "run/run")).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in logged] == list(range(1, 9))
    assert dict(logged) == pytest.approx(dict(losses(tmp_path / "run")), rel=1e-6)
    assert [image.step for image in events.Images("samples")] == [2, 4, 6, 8]
    sheet = Image.open(tmp_path / "run/samples/step-00000008.png")
    assert (events.Images("samples")[-1].width, events.Images("samples")[-1].height) == sheet.size


@pytest.mark.parametrize(("name", "as_list"), [("wandb", True), ("clearml", False), ("aim", False)])
def test_other_trackers_receive_the_sheets(name: str, as_list: bool, tmp_path: Path) -> None:
    sheet = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(sheet).save(tmp_path / "sheet.png")
    received: list[tuple[dict[str, Any], int]] = []
    tracker = SimpleNamespace(name=name, log_images=lambda values, step: received.append((values, step)))
    accelerator: Any = SimpleNamespace(trackers=[tracker, SimpleNamespace(name="mlflow")])
    Metrics(tmp_path / "metrics.jsonl", accelerator).log_image("samples", tmp_path / "sheet.png", 7)
    ((values, step),) = received
    image = values["samples"][0] if as_list else values["samples"]
    assert step == 7
    assert np.array_equal(image, sheet)
