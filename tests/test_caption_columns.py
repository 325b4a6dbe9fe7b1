"""Captions from several columns: every form of dataset gives them, and they are drawn in proportion to the weights."""

import csv
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from conditioning.clip import ClipTextEncoder
from ldm.errors import UserError
from support.runs import Crash, final_state, stage_config, train_stage
from support.stepping import record, uniforms
from train.config.data import DataConfig
from train.config.ldm import LdmConfig
from train.data.order.rng import Purpose, uniform, weighted_choice
from train.data.sources.caption_columns import caption_columns
from train.data.sources.variants import TagVariants
from train.engine.open_data import open_inputs

ROWS = 8
WEIGHTED = "long:3 short:1 tags:0.5"


def texts(k: int) -> dict[str, Any]:
    """Return the captions of image k: every other one has no tags, and the last has none at all."""
    if k == ROWS - 1:
        return {"long": "", "short": "", "tags": ""}
    return {"long": f"a long one {k}", "short": f"short {k}", "tags": "" if k % 2 else f"tag, {k}"}


def several(k: int) -> dict[str, Any]:
    """Return two texts in one column."""
    return texts(k) | {"short": [f"short {k}", f"brief {k}"]} if k < ROWS - 1 else texts(k)


def expected(k: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
    pairs = [(text, weight) for text, weight in zip(texts(k).values(), (3, 1, 0.5), strict=True) if text]
    return (tuple(text for text, _ in pairs), tuple(w for _, w in pairs)) if pairs else (("",), (1,))


def write(form: str, root: Path, row: Any = texts) -> str:
    for split, count in (("train", ROWS), ("test", 2)):
        rows, files = [row(k) for k in range(count)], []
        for k in range(count):
            file = io.BytesIO()
            Image.new("RGB", (16, 16), (20 * k, 0, 40)).save(file, "PNG")
            files.append(file.getvalue())
        root.mkdir(exist_ok=True)
        if form == "parquet":
            images = [{"bytes": file, "path": f"{k}.png"} for k, file in enumerate(files)]
            columns = {name: [row[name] or None for row in rows] for name in rows[0]}
            pq.write_table(pa.table({"image": images, **columns}), root / f"{split}.parquet")
            continue
        if form == "tar":
            with tarfile.open(root / f"{split}.tar", "w") as tar:
                for k, file in enumerate(files):
                    about = {name: text for name, text in rows[k].items() if text}
                    for name, data in ((f"{k}.png", file), (f"{k}.json", json.dumps(about).encode())):
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
            continue
        (root / split).mkdir()
        for k, file in enumerate(files):
            (root / split / f"{k}.png").write_bytes(file)
            if form == "files":
                for name, text in rows[k].items():
                    if text:
                        (root / split / f"{k}.{name}").write_text(text)
        named = [{"file_name": f"{k}.png", **row} for k, row in enumerate(rows)]
        if form == "jsonl":  # the keys of empty texts are missing, also in the first row
            kept = [{name: text for name, text in row.items() if text} for row in reversed(named)]
            (root / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        if form == "csv":
            with open(root / split / "metadata.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, list(named[0]))
                writer.writeheader()
                writer.writerows(named)
    return str(root)


@pytest.fixture(autouse=True)
def _caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "tar", "files"])
def test_every_form_has_columns(tmp_path: Path, form: str) -> None:
    data = write(form, tmp_path / "data")
    inputs = open_inputs(data, DataConfig(caption_column=WEIGHTED))
    assert [(row.captions, row.weights) for row in inputs.source] == [expected(k) for k in range(ROWS)]
    assert inputs.source.catalogue.uncaptioned == 1
    assert len(inputs.held_out) == 2
    one = open_inputs(data, DataConfig(caption_column="long"))
    assert [row.name for row in one.source] == [row.name for row in inputs.source]
    assert [inputs.source.read(k) for k in range(ROWS)] == [one.source.read(k) for k in range(ROWS)]
    other = open_inputs(data, DataConfig(caption_column="long:1 short:1 tags:1"))
    assert inputs.fingerprint == other.fingerprint != one.fingerprint


def test_several_captions_share_the_weight_of_their_column(tmp_path: Path) -> None:
    inputs = open_inputs(write("jsonl", tmp_path / "data", several), DataConfig(caption_column=WEIGHTED))
    assert inputs.source[0].captions == ("a long one 0", "short 0", "brief 0", "tag, 0")
    assert inputs.source[0].weights == (3, 0.5, 0.5, 0.5)
    row = TagVariants(0, 0.0, True, 2)(inputs.source[0])
    assert row.captions[:6] == ("a long one 0",) * 2 + ("short 0",) * 2 + ("brief 0",) * 2
    assert row.weights == (3, 3, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5)


def test_columns_are_drawn_in_proportion_to_their_weights(tmp_path: Path) -> None:
    source = open_inputs(write("jsonl", tmp_path / "data", several), DataConfig(caption_column=WEIGHTED)).source
    n = 20_000
    numbers = uniform(3, Purpose.CAPTION, np.arange(n)).tolist()
    drawn = np.bincount([source[0].choose(u) for u in numbers], minlength=4)
    shares = np.array([3, 0.5, 0.5, 0.5]) / 4.5
    statistic = ((drawn - n * shares) ** 2 / (n * shares)).sum()
    assert statistic < 16.3  # of χ² with three degrees of freedom, one in a thousand is larger
    assert [weighted_choice((1, 2, 1), u) for u in (0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("way", ["clip", "ldm", "cached ldm"])
def test_captions_are_drawn_from_the_columns(way: str, parts: Path, tmp_path: Path) -> None:
    """The captions, and the features in the cache, are those of the first number of the example's stream."""
    data = DataConfig(resolution=16, caption_column=WEIGHTED)
    settings: dict[str, Any] = {"cache": str(tmp_path / "cache") if way == "cached ldm" else "off", "seed": 7}
    stage = way.removeprefix("cached ")
    config = stage_config(stage, write("jsonl", tmp_path / "data"), tmp_path / "run", parts, input=data, **settings)
    if isinstance(config, LdmConfig):
        config = replace(config, caption_dropout=0.0)
    found: list[Any] = []
    positions = list(range(60))
    record(config, 0, lambda stage: found.append(stage.training.__getitems__(positions)))
    right = []
    for index, u in zip(found[0].index.tolist(), uniforms(7, 4, positions)[:, 0], strict=True):
        captions, weights = expected(index)
        right.append(captions[int((np.cumsum(weights) / sum(weights) <= u).sum())])
    if way == "cached ldm":
        encoder = ClipTextEncoder.load(str(parts / "clip" / "model"))
        torch.testing.assert_close(found[0].condition, encoder.encode(right), rtol=2e-3, atol=2e-3)
    else:
        assert found[0].captions == right
    assert len(set(right)) > 12


def test_a_run_with_columns_is_continued_exactly(tmp_path: Path, parts: Path) -> None:
    change: dict[str, Any] = {"input": DataConfig(resolution=32, caption_column=WEIGHTED), "cache": str(tmp_path / "c")}
    data = write("jsonl", tmp_path / "data")
    train_stage(stage_config("ldm", data, tmp_path / "whole", parts, **change))
    config = stage_config("ldm", data, tmp_path / "run", parts, **change)
    with pytest.raises(KeyboardInterrupt):
        train_stage(config, Crash(5))
    train_stage(config)
    assert final_state(tmp_path / "run") == final_state(tmp_path / "whole")
    other = DataConfig(resolution=32, caption_column="long:1 short:1 tags:1")
    with pytest.raises(UserError, match=r"caption.column"):
        train_stage(replace(config, input=other, steps=9))


@pytest.mark.parametrize(
    ("form", "column", "message"),
    [
        ("jsonl", "long:1 title:2", "--input.caption-column title: .* has no column title; its columns are: "),
        ("parquet", "long:1 title:2", "--input.caption-column title: .* has no column title; its columns are: image, "),
        ("tar", "long:1 title:2", "--input.caption-column title: .*no captions"),
    ],
)
def test_a_missing_column_is_named(tmp_path: Path, form: str, column: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_inputs(write(form, tmp_path / "data"), DataConfig(caption_column=column))


@pytest.mark.parametrize("form", ["jsonl", "csv", "tar", "files"])
def test_a_missing_column_is_named_where_captions_are_not_required(tmp_path: Path, form: str) -> None:
    config = DataConfig(caption_column="long:1 title:2")
    with pytest.raises(UserError, match=r"--input.caption-column title: .*"):
        open_inputs(write(form, tmp_path / "data"), config, captioned=False)


def test_a_column_that_damages_rows_is_named(tmp_path: Path) -> None:
    data = write("tar", tmp_path / "data", lambda k: texts(k) | {"tags": {"not": "a text"} if k == 2 else "x"})
    with pytest.raises(UserError, match=r"--input.caption-column tags: gives other images than long, e.g. .*must be a"):
        open_inputs(data, DataConfig(caption_column=WEIGHTED))


def test_a_stream_has_one_column(tmp_path: Path) -> None:
    data = f"pipe:cat {write('tar', tmp_path / 'data')}/train.tar"
    with pytest.raises(UserError, match="'long:1 short:1': a stream's captions are in one column"):
        open_inputs(data, DataConfig(caption_column="long:1 short:1"))


def test_weights_are_read() -> None:
    assert caption_columns("long:3 short:1") == {"long": 3, "short": 1}
    assert caption_columns(" long caption:0.5  b:c:2 ") == {"long caption": 0.5, "b:c": 2}
    for name in ("", "text", "a b", "a:b", "txt"):
        assert caption_columns(name) == {}
    for wrong in ("a:3 b", "a:0 b:1", "a:-1 b:1", "a:1 a:2", "a:1,b:2", "a: 3 b:1", ":3", "a:1e400", "a:9999999 b:1"):
        with pytest.raises(ValueError, match="must"):
            caption_columns(wrong)
