"""Repeats: an epoch contains each image its number of times, whatever states the number."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm.errors import UserError
from support.batches import joined, same
from support.runs import Crash, final_state, losses, stage_config, train_stage
from train.config.data import DataConfig
from train.data.batches.buckets import Buckets, bucket_sizes
from train.data.batches.images import ImageDataset, Inputs
from train.data.batches.loading import loader
from train.data.images.crop import Framing
from train.data.order.permutation import Repeated, Shuffled, shuffled
from train.engine.open_data import open_inputs

TIMES = {"10_cat": 10, "3_dog": 3, "bird": 1, "0_draft": 0}
"""Repeats by folder; each folder has three images."""


def content(folder: str, k: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (20 * k, len(folder), 40)).save(file, "PNG")
    return file.getvalue()


def write(form: str, root: Path) -> tuple[str, str]:
    """Write a dataset with a held-out split. Returns --data and --input.repeats."""
    rows = [(f"{folder}/{k}.png", times, content(folder, k)) for folder, times in TIMES.items() for k in range(3)]
    test = [("held/0.png", 7, content("held", 0))]
    for split, listed in (("train", rows), ("test", test)):
        folder = root / split
        if form == "parquet":
            root.mkdir(exist_ok=True)
            images = [{"bytes": file, "path": name} for name, _, file in listed]
            table = {"image": images, "text": [name for name, *_ in listed], "n": [n for _, n, _ in listed]}
            pq.write_table(pa.table(table), root / f"{split}-0.parquet")
            continue
        if form == "tar":
            root.mkdir(exist_ok=True)
            with tarfile.open(root / f"{split}-0.tar", "w") as tar:
                for name, n, file in sorted(listed):
                    about = json.dumps({"text": name} | ({"n": n} if n != 1 else {})).encode()
                    for path, data in ((name, file), (f"{name[:-4]}.json", about)):
                        info = tarfile.TarInfo(path)
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
            continue
        for name, _, file in listed:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(file)
            if form == "folders":
                (folder / name).with_suffix(".txt").write_text(name)
        if form == "jsonl":
            lines = [
                json.dumps({"file_name": name, "text": name} | ({"n": n} if n != 1 else {})) + "\n"
                for name, n, _ in reversed(listed)
            ]
            (folder / "metadata.jsonl").write_text("".join(lines))
        if form == "csv":
            with open(folder / "metadata.csv", "w", newline="") as file:
                cells = [(name, name, n if n != 1 else "") for name, n, _ in listed]
                csv.writer(file).writerows([("file_name", "text", "n"), *cells])
    return str(root), "folders" if form == "folders" else "n"


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


def opened(form: str, root: Path, **settings: str) -> Inputs:
    data, repeats = write(form, root)
    return open_inputs(data, DataConfig(**{"repeats": repeats} | settings))


@pytest.mark.parametrize("repeats", [[1, 1, 1], [3, 0, 1], [10, 2], [1000, 1, 500]])
def test_an_epoch_has_each_example_its_number_of_times(repeats: list[int]) -> None:
    total = sum(repeats)
    order = Repeated(np.array(repeats), 5)
    epochs = order.at(np.arange(3 * total)).reshape(3, total)
    for epoch in epochs:
        np.testing.assert_array_equal(np.bincount(epoch, minlength=len(repeats)), repeats)
    if total > 6:
        assert (epochs[0] != epochs[1]).any()
    some = np.array([total + 1, 0, 2 * total])
    np.testing.assert_array_equal(order.at(some), epochs.ravel()[some])  # a position needs no others
    drawn = np.bincount([order.substitute(p, 1) for p in range(300)], minlength=len(repeats))
    assert not drawn[np.array(repeats) == 0].any()


def test_one_repeat_each_changes_nothing() -> None:
    plain, repeated = Shuffled(5000, 3), shuffled(5000, 3, np.ones(5000, np.int64))
    at = np.arange(4000, 11000)
    np.testing.assert_array_equal(plain.at(at), repeated.at(at))
    assert [plain.substitute(p, 2) for p in range(50)] == [repeated.substitute(p, 2) for p in range(50)]
    assert shuffled(5000, 3) == plain


@pytest.mark.parametrize("form", ["folders", "jsonl", "csv", "parquet", "tar"])
def test_every_form_states_repeats(tmp_path: Path, form: str) -> None:
    inputs = opened(form, tmp_path / "data")
    source = inputs.source
    assert source.repeats is not None
    found = {row.name: int(n) for row, n in zip(source, source.repeats, strict=True)}
    assert found == {f"{folder}/{k}.png": n for folder, n in TIMES.items() if n for k in range(3)}
    assert inputs.held_out.repeats is None
    images = ImageDataset(source, Framing(resolution=16), 0)
    epoch = images.__getitems__(np.arange(42)).index.numpy()
    np.testing.assert_array_equal(np.bincount(epoch), source.repeats)
    for workers, world in ((2, 1), (0, 2)):  # the same examples for any workers and processes
        parts = [
            list(loader(images, start_step=3, steps=9, batch_size=8, rank=r, world=world, workers=workers))
            for r in range(world)
        ]
        steps = [joined([part for rank in parts for part in rank[step]]) for step in range(6)]
        whole = list(loader(images, start_step=0, steps=9, batch_size=8))[3:]
        assert all(same(step, joined(batch)) for step, batch in zip(steps, whole, strict=True))


@pytest.mark.parametrize("form", ["jsonl", "tar", "parquet"])
def test_repeats_in_a_column_are_part_of_the_fingerprint(tmp_path: Path, form: str, monkeypatch) -> None:
    one, without = opened(form, tmp_path / "one"), opened(form, tmp_path / "one", repeats="")
    monkeypatch.setitem(TIMES, "3_dog", 4)
    assert len({one.fingerprint, without.fingerprint, opened(form, tmp_path / "two").fingerprint}) == 3


@pytest.mark.parametrize(
    ("form", "settings", "message"),
    [
        ("folders", {"repeats": "n"}, "has no metadata.jsonl"),
        ("jsonl", {"repeats": "m"}, "--input.repeats m: .* has no such column; its columns are: file_name, text, n"),
        ("parquet", {"repeats": "m"}, "--input.repeats m: .*no such column"),
        ("jsonl", {"repeats": "text"}, "row 1: text '0_draft/2.png': must be a whole number"),
        ("parquet", {"repeats": "text"}, "must be a whole number"),
    ],
)
def test_repeats_that_cannot_be_used_are_refused(tmp_path: Path, form: str, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        opened(form, tmp_path / "data", **settings)


def test_folders_without_numbers_and_zeros_only_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("test_repeats.TIMES", {"cat": 1, "dog_3": 1})
    with pytest.raises(UserError, match=r"no folder in .* is named like 10_cat"):
        opened("folders", tmp_path / "one")
    monkeypatch.setattr("test_repeats.TIMES", {"0_cat": 0, "0_dog": 0})
    for form in ("folders", "jsonl"):
        with pytest.raises(UserError, match="all images have 0 repeats"):
            opened(form, tmp_path / form)


def test_a_number_of_repeats_is_no_part_of_a_label(tmp_path: Path) -> None:
    source = opened("folders", tmp_path / "data", caption_template="a {}").source
    assert {row.captions for row in source} == {("a cat",), ("a dog",), ("a bird",)}


def test_buckets_repeat_images() -> None:
    sizes = bucket_sizes(64, 16, 2.0)
    shapes = np.array([(64, 64)] * 10 + [(64, 32)] * 2 + [(32, 64)] * 9)
    repeats = np.array([1] * 10 + [4] * 2 + [2] * 9)
    buckets = Buckets.assigned(shapes, sizes, 4, 0, repeats)
    epoch = buckets.at(np.arange(4 * int(buckets.batches.sum())))
    assert (np.bincount(epoch, minlength=21) >= repeats).all()
    assert len(epoch) == repeats.sum() + buckets.filled
    assert len({buckets.size(k) for k in epoch}) == 3  # two images that repeat four times fill batches of their own
    assert len({Buckets.assigned(shapes, sizes, 4, 0).size(k) for k in range(21)}) == 2
    for batch in epoch.reshape(-1, 4):
        assert len({buckets.size(k) for k in batch}) == 1


@pytest.mark.parametrize("buckets", [0, 16])
def test_a_run_with_repeats_is_continued_exactly(
    tmp_path: Path, parts: Path, buckets: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data, repeats = write("folders", tmp_path / "data")
    change = {"input": DataConfig(resolution=32, repeats=repeats, buckets=buckets), "cache": str(tmp_path / "cache")}
    train_stage(stage_config("ldm", data, tmp_path / "whole", parts, **change))
    config = stage_config("ldm", data, tmp_path / "run", parts, **change)
    with pytest.raises(KeyboardInterrupt):
        train_stage(config, Crash(5))
    train_stage(config)
    assert final_state(tmp_path / "run") == final_state(tmp_path / "whole")
    said = capsys.readouterr().out
    assert "an epoch has 42 examples of 9 images, which appear 1 to 10 times" in said
    assert ("--input.buckets 16 has no effect" in said) == bool(buckets)
    train_stage(stage_config("ldm", data, tmp_path / "off", parts, **change | {"cache": "off"}))
    for one, other in zip(losses(tmp_path / "off"), losses(tmp_path / "whole"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
