"""Unreadable images: each is counted once, and a run that they stopped can be continued."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ldm.errors import RunError, UserError
from support.runs import losses, stage_config, train_stage
from train.config.data import DataConfig
from train.data.batches import unreadable
from train.data.batches.images import ImageDataset
from train.data.batches.loading import loader
from train.data.batches.unreadable import UnreadableCounter, UnreadableReport
from train.data.images.crop import Framing
from train.data.sources.splits import open_source


def start_stage(stage: str, data: Path, out: Path, parts: Path, with_changes: bool = False, **change: Any) -> None:
    train_stage(stage_config(stage, data, out, parts, **change), with_changes=with_changes)


LIMIT = DataConfig(resolution=32, max_damaged=0.1)
HIGHER = DataConfig(resolution=32, max_damaged=0.5)


def write_images(folder: Path, bad: int, count: int = 28) -> Path:
    rng = np.random.default_rng(0)
    for split, n in (("train", count), ("test", 8)):
        (folder / split).mkdir(parents=True)
        for k in range(n):
            path = folder / split / f"{k:02d}.png"
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
            path.with_suffix(".txt").write_text(f"image {k}")
            if split == "train" and k < bad:
                path.write_bytes(path.read_bytes()[:60])
    return folder


def listed_in(out: Path) -> list[str]:
    return [json.loads(line)["file"] for line in (out / "damaged.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_counts_once_however_often_it_is_drawn(tmp_path: Path, start: int, workers: int) -> None:
    source = open_source(write_images(tmp_path, bad=2), "train")
    images = ImageDataset(source, Framing(resolution=32), 0)
    damage = UnreadableCounter(tmp_path / "damaged.jsonl", 0.1, print=lambda _: None, total=len(source))
    for _ in loader(images, start_step=start, steps=40, batch_size=8, workers=workers, counter=damage):
        pass
    assert (damage.unreadable, damage.images) == (2, 28)  # two of 28 are less than a tenth
    assert damage.failures > 10


def test_the_share_of_a_small_dataset_is_exact(tmp_path: Path) -> None:
    images = ImageDataset(open_source(write_images(tmp_path, bad=3), "train"), Framing(resolution=32), 0)
    damage = UnreadableCounter(tmp_path / "damaged.jsonl", 0.1, print=lambda _: None, total=28)
    with pytest.raises(RunError, match=r"^3 of \d+ images can't be read, but --input.max-damaged 0\.1 .*higher limit"):
        list(loader(images, start_step=0, steps=40, batch_size=8, counter=damage))
    assert damage.images <= 28


@pytest.mark.parametrize("stage", ["clip", "vae", "ldm"])
@pytest.mark.parametrize("way", ["a higher limit", "without the files", "repaired"])
def test_a_run_stopped_by_damage_is_continued(tmp_path: Path, parts: Path, stage: str, way: str) -> None:
    data, intact, out = (
        write_images(tmp_path / "data", bad=9),
        write_images(tmp_path / "intact", bad=0),
        tmp_path / "run",
    )
    run: dict[str, Any] = {"steps": 4, "checkpoint_every": 1, "validate_every": 4, "log_every": 1}
    run["cache"] = str(tmp_path / "cache") if stage == "ldm" else ""
    start_stage(stage, data, out, parts, **run | {"steps": 1}, input=HIGHER)
    with pytest.raises(RunError, match=r"of \d+ images can't be read"):
        start_stage(stage, data, out, parts, **run, input=LIMIT)
    listed = listed_in(out)
    assert len(listed) >= 3
    match way:
        case "a higher limit":
            start_stage(stage, data, out, parts, **run, input=HIGHER)
        case "repaired":
            for name in [f"{k:02d}.png" for k in range(9)]:
                (data / "train" / name).write_bytes((intact / "train" / name).read_bytes())
            with pytest.raises(UserError, match="--data: not the same content"):  # another file has another size
                start_stage(stage, data, out, parts, **run, input=LIMIT)
            start_stage(stage, data, out, parts, **run, input=LIMIT, with_changes=True)
            assert not listed_in(out)
        case "without the files":
            for name in [f"{k:02d}.png" for k in range(9)]:
                (data / "train" / name).unlink()
            with pytest.raises(UserError, match=r"--data: not the same content .* --resume-with-changes"):
                start_stage(stage, data, out, parts, **run, input=LIMIT)
            start_stage(stage, data, out, parts, **run, input=LIMIT, with_changes=True)
    assert losses(out)[-1][0] == 4
    about = yaml.safe_load((out / "config.yaml").read_text())["about"]
    assert [change["setting"] for change in about.get("changes", [])] == ["data"] * (way != "a higher limit")
    assert ("trained on other data before" in (out / "model/README.md").read_text()) == (way != "a higher limit")


def test_accepting_a_change_changes_nothing_without_one(tmp_path: Path, parts: Path) -> None:
    data = write_images(tmp_path / "data", bad=0)
    for name, accept in (("one", False), ("two", True)):
        start_stage("vae", data, tmp_path / name, parts, steps=2)
        start_stage("vae", data, tmp_path / name, parts, steps=4, with_changes=accept)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert "changes" not in (tmp_path / "two/config.yaml").read_text()


def test_a_report_lists_only_what_is_still_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_images(tmp_path / "data", bad=4)
    train, test = (open_source(data, split) for split in ("train", "test"))
    report = tmp_path / "damaged.jsonl"
    names = ["00.png", "01.png", "02.png", "gone.png", "left_out.txt"]
    report.write_text("".join(json.dumps({"file": name, "reason": "?"}) + "\n" for name in names) + '{"fi')
    train.left_out = (("left_out.txt", "no image"),)
    UnreadableReport(report, 0.1, print, main=False).remove_repaired((train, test), 10**6)
    assert "gone.png" in report.read_text()
    (data / "train/01.png").write_bytes((data / "train/20.png").read_bytes())  # repaired
    (data / "test/02.png").write_bytes(b"")  # one of the two images of this name is still damaged
    (data / "train/02.png").write_bytes((data / "train/20.png").read_bytes())
    UnreadableReport(report, 0.1, print).remove_repaired((train, test), 10**6)
    assert listed_in(tmp_path) == ["00.png", "02.png", "left_out.txt"]
    monkeypatch.setattr(unreadable, "_MOST_READ", 2)
    (data / "test/02.png").write_bytes((data / "train/20.png").read_bytes())
    UnreadableReport(report, 0.1, print).remove_repaired((train, test), 10**6)
    assert "02.png" in listed_in(tmp_path)
