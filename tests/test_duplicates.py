"""Copies that inspect_data.py finds are left out of training or of the held-out images."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from support.commands import run_script
from support.runs import clip_config, train_stage
from train.config.data import DataConfig
from train.engine.open_data import open_inputs


def dataset(root: Path, split: bool) -> Path:
    for folder, names in (("train", "abcdef"), ("test", "axyz")) if split else (("", "abcdefghijkl"),):
        (root / folder).mkdir(parents=True)
        for k, name in enumerate(names):
            Image.new("RGB", (16, 16), (9 * k, 0, 0)).save(root / folder / f"{name}.png")
            (root / folder / f"{name}.txt").write_text(name)
    return root


def opened(data: Path, *groups: tuple[list[str], list[str]], **settings: str):
    lines = [json.dumps({"same": "bytes", "train": train, "test": test}) + "\n" for train, test in groups]
    (data.parent / "duplicates.jsonl").write_text("".join(lines))
    settings = {"duplicates": str(data.parent / "duplicates.jsonl")} | settings
    inputs = open_inputs(str(data), DataConfig(**settings))
    return inputs, [row.name[0] for row in inputs.source], [row.name[0] for row in inputs.held_out]


GROUPS = ((["b.png"], ["x.png"]), (["b.png", "c.png"], []), ([], ["y.png", "z.png"]))


def test_copies_are_left_out(tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", True)
    inputs, train, test = opened(data, *GROUPS)
    assert (train, test) == (list("abcdef"), list("ayz"))  # a.png of both folders isn't in the list
    assert "left out 1 held-out and 0 training images" in inputs.notes[0]
    fewer, train, test = opened(data, *GROUPS, copies="all")
    assert (train, test) == (list("abdef"), list("ay"))
    assert ("c.png", "a copy of b.png (--input.duplicates)") in fewer.source.left_out
    plain = open_inputs(str(data), DataConfig())
    assert len({x.fingerprint for x in (inputs, fewer, plain)}) == 3
    assert opened(data, *GROUPS)[0].fingerprint == inputs.fingerprint


def test_a_held_out_share_is_separated_from_its_copies(tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", False)
    held = [row.name for row in open_inputs(str(data), DataConfig(validation_fraction=0.4)).held_out]
    other = next(f"{n}.png" for n in "abcdefghijkl" if f"{n}.png" not in held)
    _, train, test = opened(data, ([held[0], other], []), validation_fraction=0.4)  # the report's split was another
    assert len(held) > 1
    assert held[0][0] not in train + test
    assert other[0] in train


def test_groups_are_kept_on_one_side(tmp_path: Path) -> None:
    data, share = dataset(tmp_path / "data", False), 0.4
    plain = open_inputs(str(data), DataConfig(validation_fraction=share))
    held, trained = ([row.name for row in images] for images in (plain.held_out, plain.source))
    assert len(held) > 2
    groups = ([held[0], trained[0]], []), (held[1:3], [])  # the second group is on one side already
    inputs, train, test = opened(data, *groups, validation_fraction=share, copies="one_side")
    assert train == sorted(name[0] for name in [*trained, held[0]])
    assert test == [name[0] for name in held[1:]]
    assert "1 held-out images are trained on" in inputs.notes[0]
    assert not inputs.held_out.left_out
    with pytest.raises(UserError, match="one_side: the dataset has its own splits"):
        opened(dataset(tmp_path / "split/data", True), *GROUPS, copies="one_side")


@pytest.mark.parametrize("copies", ["held_out", "one_side", "all"])
def test_a_report_changes_a_run(copies: str, tmp_path: Path) -> None:
    """The images 0 … 39 are different; 40 … 59 are copies of the first 20."""
    data = tmp_path / "data"
    data.mkdir()
    for k in range(60):
        noise = np.random.default_rng(k % 40).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(data / f"{k:02}.png")
        (data / f"{k:02}.txt").write_text(f"noise {k}")
    report = tmp_path / "report"
    ended = run_script("inspect_data", "--data", data, "--out", report, "--workers", 0)
    assert ended.status == 0, ended.err
    settings = {"validation_fraction": 0.3, "duplicates": str(report / "duplicates.jsonl"), "copies": copies}
    plain = open_inputs(str(data), DataConfig(validation_fraction=0.3))
    held = {int(row.name[:2]) for row in plain.held_out}
    lost = {k for k in held if (k < 20 and k + 40 not in held) or (k >= 40 and k - 40 not in held)}
    assert lost
    train_stage(clip_config(data, tmp_path / "run", steps=1, input=DataConfig(resolution=32, **settings)))
    card = (tmp_path / "run/model/README.md").read_text()
    trained, tested = (int(re.search(rf"(\d+) {what} images", card)[1]) for what in ("training", "held-out"))
    twice = len([k for k in range(20) if not {k, k + 40} & held])
    both = len([k for k in range(20) if {k, k + 40} <= held])
    assert trained == len(plain.source) + {"held_out": 0, "one_side": len(lost), "all": -twice}[copies]
    assert tested == len(held) - len(lost) - (both if copies == "all" else 0)


def test_other_files_are_refused(tmp_path: Path) -> None:
    data = dataset(tmp_path / "data", True)
    with pytest.raises(UserError, match="names no image of"):
        opened(data, (["q.png"], ["r.png"]))
    with pytest.raises(UserError, match="all held-out images are copies"):
        opened(data, (["b.png"], ["a.png", "x.png", "y.png", "z.png"]))
    with pytest.raises(UserError, match="can't be read"):
        opened(data, duplicates=str(tmp_path / "missing"))
    (tmp_path / "bad").write_text("{}")
    with pytest.raises(UserError, match="must be duplicates"):
        opened(data, duplicates=str(tmp_path / "bad"))
