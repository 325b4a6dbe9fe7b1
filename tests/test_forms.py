"""Every form of the same images gives the same training batches and continues at any example."""

import hashlib
import io
import json
import shutil
import tarfile
import warnings
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm.errors import UserError
from support.batches import same
from support.odd_images import write_odd_images
from train.config.data import DataConfig
from train.data.batches.draws import LatentNoise, Noising
from train.data.batches.images import ImageDataset, Inputs
from train.data.batches.loading import loader
from train.data.batches.records import Record
from train.data.batches.unreadable import UnreadableCounter
from train.data.images.crop import Framing
from train.engine.open_data import open_inputs

COUNT, TESTS = 500, 20
CONFIG = DataConfig(resolution=16, crop="random", flip=True)
DRAWS = LatentNoise(Noising(dropout=0.1, strata=8), 2, 4)
FORMS = ("jsonl", "csv", "texts", "parquet", "saved", "tars", "named tars", "tar of json")
STREAM = "stream"


@pytest.fixture(scope="module", autouse=True)
def _caches(tmp_path_factory):
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("caches")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


def images() -> dict[str, tuple[bytes, list[str]]]:
    """Return each image's name, file and captions."""
    rng, made = np.random.default_rng(0), {}
    for k in range(COUNT + TESTS):
        shape = (16 + k % 7, 16 + k % 5, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(file := io.BytesIO(), "PNG")
        made[f"{k:05d}.png"] = file.getvalue(), [f"caption {j} of {k}" for j in range(1 + k % 3)]
    return made


def split(name: str) -> str:
    return "train" if int(name[:5]) < COUNT else "test"


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write(form: str, folder: Path) -> Path:
    """Write the images in this form. Return the value of --data."""
    import datasets

    made = images()
    for part in ("train", "test"):
        own = {name: of for name, of in made.items() if split(name) == part}
        inside = folder / part
        inside.mkdir(parents=True)
        match form:
            case "jsonl" | "csv" | "texts":
                for name, (file, _) in own.items():
                    (inside / name).write_bytes(file)
                rows = [(name, text) for name, (_, texts) in own.items() for text in texts]
                if form == "jsonl":
                    lines = [json.dumps({"file_name": name, "text": texts}) for name, (_, texts) in own.items()]
                    (inside / "metadata.jsonl").write_text("\n".join(lines))
                elif form == "csv":
                    (inside / "metadata.csv").write_text("file_name,text\n" + "".join(f"{n},{t}\n" for n, t in rows))
                else:
                    for name, (_, texts) in own.items():
                        (inside / name).with_suffix(".txt").write_text("\n".join(texts))
            case "parquet" | "saved":
                columns = {
                    "image": [{"bytes": file, "path": name} for name, (file, _) in own.items()],
                    "text": [texts for _, texts in own.values()],
                }
                if form == "parquet":
                    inside.rmdir()
                    for k in range(2):
                        rows = {
                            name: values[k::1][: len(values) // 2] if not k else values[len(values) // 2 :]
                            for name, values in columns.items()
                        }
                        pq.write_table(pa.table(rows), folder / f"{part}-{k:05d}-of-00002.parquet")
                else:
                    inside.rmdir()
                    features = datasets.Features(
                        {"image": datasets.Image(decode=False), "text": datasets.List(datasets.Value("string"))}
                    )
                    datasets.Dataset.from_dict(columns, features).save_to_disk(inside)
            case "tars" | "named tars" | "tar of json":
                names = list(own)
                for k, shard in enumerate((names[: len(names) // 3], names[len(names) // 3 :])):
                    path = inside / f"{k:03d}.tar" if form == "tars" else folder / f"{part}-{k:03d}.tar"
                    with tarfile.open(path, "w") as tar:
                        for name in shard:
                            file, texts = own[name]
                            add(tar, name, file)
                            if form == "tar of json":
                                add(tar, f"{name[:5]}.json", json.dumps({"caption": texts}).encode())
                            else:
                                add(tar, f"{name[:5]}.txt", "\n".join(texts).encode())
    if form == "saved":
        splits = {part: datasets.load_from_disk(str(folder / part)) for part in ("train", "test")}
        datasets.DatasetDict(splits).save_to_disk(folder / "all")
        return folder / "all"
    return folder


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> dict[str, Inputs]:
    root = tmp_path_factory.mktemp("forms")
    opened = {form: open_inputs(str(write(form, root / form)), CONFIG) for form in FORMS}
    tars = root / "tars" / "train"
    opened[STREAM] = open_inputs(f"pipe:cat {tars}/{{000,001}}.tar", CONFIG)
    return opened


def batches(inputs: Inputs, start: int = 0, steps: int = 80, **how):
    return loader(inputs.images(CONFIG.framing(), 7, DRAWS), start_step=start, steps=steps, batch_size=8, **how)


def rows_of(part, rows: slice):
    """Return these rows of a batch's tensors and lists."""
    if isinstance(part, Record):
        return replace(part, **{f.name: rows_of(getattr(part, f.name), rows) for f in fields(part)})
    return part if part is None else part[rows]


@pytest.mark.parametrize("form", FORMS[1:])
def test_every_form_gives_the_same_batches_bit_by_bit(forms, form):
    assert len(forms[form].source) == COUNT
    assert len(forms[form].held_out) == TESTS
    for (one,), (other,) in zip(batches(forms[FORMS[0]]), batches(forms[form]), strict=True):
        assert same(one, other)
    assert [row.captions for row in forms[form].held_out] == [row.captions for row in forms[FORMS[0]].held_out]


@pytest.mark.parametrize("form", [*FORMS[::3], "saved", STREAM])
def test_each_form_continues_at_any_example(forms, form):
    """The number of workers and processes makes no difference."""
    inputs = forms[form]
    expected = [parts[0] for parts in batches(inputs)]
    for start, workers in ((1, 0), (33, 2), (63, 0), (79, 2)):
        assert all(map(same, expected[start:], (parts[0] for parts in batches(inputs, start, workers=workers))))
    for rank in range(2):
        half = slice(4 * rank, 4 * rank + 4)
        for step, (part,) in enumerate(batches(inputs, 40, 60, workers=2 * rank, rank=rank, world=2), 40):
            assert same(part, rows_of(expected[step], half))


@pytest.mark.parametrize("form", [FORMS[0], STREAM])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_order_can_start_at_another_position(forms, form, workers):
    """Random numbers go on by position, and the examples are those of the order's start."""
    images = forms[form].images(CONFIG.framing(), 7, DRAWS)
    first, moved = (
        list(loader(data, start_step=start, steps=start + 3, batch_size=8, workers=workers))
        for data, start in ((images, 0), (images.shifted(-32), 4))
    )
    there = list(loader(images, start_step=4, steps=7, batch_size=8))
    for (a,), (b,), (c,) in zip(first, moved, there, strict=True):
        assert b.position.tolist() == c.position.tolist() == [p + 32 for p in a.position.tolist()]
        shown = [[caption.split(" of ")[1] for caption in part.captions] for part in (a, b, c)]
        assert shown[0] == shown[1] != shown[2]
        assert same(b.drawn, c.drawn)


def test_a_stream_shows_each_image_once_an_epoch(forms):
    inputs = forms[STREAM]
    n = len(inputs.source)
    assert n + len(inputs.held_out) == COUNT
    epoch = [example[0] for example in islice(inputs.stream.examples(7), 2 * n)]
    for part in (epoch[:n], epoch[n:]):
        assert sorted(example.name for example in part) == sorted(row.name for row in inputs.source)
    assert [e.name for e in epoch[:n]] != [e.name for e in epoch[n:]]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "tars"])
def test_without_a_split_the_same_images_are_held_out(tmp_path, form):
    root = write(form, tmp_path)
    if form == "parquet":
        for path in root.glob("test-*"):
            path.unlink()
        for path in root.glob("train-*"):
            path.rename(root / path.name.removeprefix("train-"))
    else:
        shutil.rmtree(root / "test")
    inputs = open_inputs(str(root if form == "parquet" else root / "train"), CONFIG)
    names = [row.name for row in inputs.held_out]
    assert len(names) + len(inputs.source) == COUNT
    expected = [n for n in images() if split(n) == "train"]
    lowest = sorted(expected, key=lambda n: hashlib.blake2b(n.encode(), digest_size=8).digest()[::-1])
    assert names == sorted(lowest[: len(names)])
    assert 10 < len(names) < 45


# -- a thousand odd images ----------------------------------------------------------------------------------------


def test_a_thousand_odd_images_are_used_or_reported(tmp_path):
    """All readable images are used, the report is exact, and nothing is deleted."""
    folder = tmp_path / "data"
    good, odd, damaged, either = write_odd_images(folder)
    before = {path: path.stat() for path in folder.rglob("*")}
    inputs = open_inputs(str(folder), DataConfig(validation_fraction=1e-9))
    names = {row.name for source in (inputs.source, inputs.held_out) for row in source}
    assert names == good | odd | damaged | either
    assert len(good) == 1000 <= len(names) - len(good)
    report, seen = tmp_path / "damaged.jsonl", set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (inputs.source, inputs.held_out):
            damage = UnreadableCounter(report, limit=1.0, print=lambda _: None)
            dataset = ImageDataset(source, Framing(resolution=16), 0)
            steps = -(-len(source) // 8)
            for (batch,) in loader(dataset, start_step=0, steps=steps, batch_size=8, counter=damage):
                seen |= {source[k].name for k in batch.index.tolist()}
    listed = [json.loads(line)["file"] for line in report.read_text().splitlines()]
    assert len(set(listed)) == len(listed)
    assert good | odd <= seen
    assert damaged <= set(listed)
    assert set(listed) <= damaged | either
    assert not seen & set(listed)
    assert {path: path.stat().st_mtime_ns for path in before} == {p: s.st_mtime_ns for p, s in before.items()}


# -- harm -----------------------------------------------------------------------------------------------------------


def test_incompatible_options_are_refused(forms, tmp_path):
    with pytest.raises(UserError, match=r"must be an existing folder, .parquet or .tar file"):
        open_inputs(str(tmp_path / "nowhere"), CONFIG)
    with pytest.raises(UserError, match="'dev': there is no such split"):
        open_inputs(str(Path(forms["jsonl"].source.location).parent), DataConfig(validation_split="dev"))
    with pytest.raises(ValueError, match=r"must contain \{\}"):
        DataConfig(caption_template="a photo")
    with pytest.raises(ValueError, match="only random crops can be cached several times"):
        DataConfig(crops=3)
