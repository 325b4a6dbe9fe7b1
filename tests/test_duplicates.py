"""Copies that inspect_data.py finds are left out of training or of the held-out images."""

import json
from pathlib import Path

import pytest
from PIL import Image

from ldm.errors import UserError
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
