"""Settings of the images and captions: each has its effect on the examples of every stage, computed by other means."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from autoencoder.model import Autoencoder
from conditioning.clip import ClipTextEncoder
from ldm.errors import RunError, UserError
from support.runs import stage_config
from support.stepping import record, stream, uniforms
from train.config.data import DataConfig
from train.config.ldm import LdmConfig
from train.data.batches.images import Inputs
from train.engine.open_data import open_inputs

SIDE = 16
"""Resolution in these tests; one side of each image has it, so that images are cropped and not resized."""


@pytest.fixture(scope="module")
def framed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 30 images, the half of them transparent, 16 × 28 or 28 × 16."""
    folder, rng = tmp_path_factory.mktemp("framed"), np.random.default_rng(0)
    for k in range(30):
        size = (28, SIDE) if k % 3 else (SIDE, 28)
        rgba = rng.integers(0, 256, (*size, 4), dtype=np.uint8)
        if k % 2:
            rgba[..., 3] = 255
        Image.fromarray(rgba).save(folder / f"{k:02d}.png")
        (folder / f"{k:02d}.txt").write_text(f"image {k}")
    return folder


def framed_pixels(file: bytes, background: tuple[int, ...], place: tuple[float, float], mirrored: bool) -> Tensor:
    """Return the square at a place, (3, 16, 16) in [−1, 1]."""
    rgba = np.array(Image.open(io.BytesIO(file))).astype(float)
    share = rgba[..., 3:] / 255
    rgb = np.round(rgba[..., :3] * share + np.array(background) * (1 - share))
    height, width = rgb.shape[:2]
    top, left = (int(p * (n - SIDE + 1)) for p, n in zip(reversed(place), (height, width), strict=True))
    square = rgb[top : top + SIDE, left : left + SIDE]
    return torch.from_numpy((square[:, ::-1] if mirrored else square).copy()).permute(2, 0, 1).float() / 127.5 - 1


FRAMINGS: list[dict[str, Any]] = [
    {},
    {"flip": True, "background": (255, 0, 40)},
    {"crop": "random", "background": (0, 0, 0)},
    {"crop": "random", "flip": True},
]


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("stage", ["clip", "vae", "ldm"])
def test_images_are_framed_as_configured(
    stage: str, framing: dict[str, Any], framed: Path, parts: Path, tmp_path: Path
) -> None:
    """Crops and mirroring follow the positions' random numbers; held-out images are centred and never mirrored."""
    settings: dict[str, Any] = {"seed": 6, "input": DataConfig(resolution=SIDE, **framing)}
    settings |= {"ldm": {"cache": "off"}, "vae": {}, "clip": {}}[stage]
    found: dict[str, Any] = {}

    def read(held: Any, training: Any, stage: Any) -> None:
        found.update(source=stage.inputs.source, other=stage.inputs.held_out, held_out=held, training=training)

    record(
        stage_config(stage, framed, tmp_path / "run", parts, **settings),
        0,
        lambda stage: read(stage.held_out.__getitems__([0]), stage.training.__getitems__(list(range(60))), stage),
    )
    positions = list(range(60))
    places = uniforms(6, 6, positions, 2) if "crop" in framing else np.full((60, 2), 0.5)
    flips = uniforms(6, 7, positions)[:, 0] < 0.5 if "flip" in framing else np.zeros(60, bool)
    background = framing.get("background", (255, 255, 255))
    if "flip" in framing:
        assert abs(flips.sum() - 30) <= 4 * 15**0.5
    for k, index in enumerate(found["training"].index.tolist()):
        place = tuple(places[k]) if "crop" in framing else (_middle(), _middle())
        expected = framed_pixels(found["source"].read(index), background, place, flips[k])
        torch.testing.assert_close(found["training"].pixels[k], expected, atol=0.02, rtol=0)
    index = int(found["held_out"].index[0])
    expected = framed_pixels(found["other"].read(index), background, (_middle(), _middle()), False)
    torch.testing.assert_close(found["held_out"].pixels[0], expected, atol=0.02, rtol=0)


def _middle() -> float:
    """Return the place of a centred square of 16 in 28 pixels: 6 of 12."""
    return 6.5 / 13


@pytest.mark.parametrize("crops", [0, 3])
def test_cached_crops_are_those_of_the_images(crops: int, framed: Path, parts: Path, tmp_path: Path) -> None:
    """The latents of 1000 positions are those of as many places per image as there are crops, mirrored or not."""
    setting = {"crop": "random", "crops": crops} if crops else {}
    config = stage_config(
        "ldm", framed, tmp_path / "run", parts, seed=2, input=DataConfig(resolution=SIDE, flip=True, **setting)
    )
    found: dict[str, Any] = {}
    record(
        config,
        0,
        lambda stage: found.update(batch=stage.training.__getitems__(list(range(1000))), source=stage.inputs.source),
    )
    batch = found["batch"]
    codec = Autoencoder.load(parts / "vae/model")
    kept: dict[int, set[tuple[Any, ...]]] = {}
    for k, index in enumerate(batch.index.tolist()):
        kept.setdefault(index, set()).add(tuple(batch.mean[k].flatten()[:8].tolist()))
    most = max(len(values) for values in kept.values())
    assert most == 2 * max(1, crops)  # crops, each plain and mirrored
    flips = uniforms(2, 7, range(1000))[:, 0] < 0.5
    if not crops:
        for k in range(20):
            file = found["source"].read(int(batch.index[k]))
            pixels = framed_pixels(file, (255, 255, 255), (_middle(), _middle()), flips[k])
            torch.testing.assert_close(batch.mean[k], codec.encode(pixels[None]).mean[0], atol=0.05, rtol=0.02)


def test_the_resolution_resizes_images(shapes: Path, parts: Path, tmp_path: Path) -> None:
    for stage in ("clip", "vae", "ldm"):
        settings: dict[str, Any] = {"input": DataConfig(resolution=16), "cache": "off"}
        recorded = record(stage_config(stage, shapes, tmp_path / stage, parts, **settings))
        (raw,), source = recorded.read[0], recorded.stage.inputs.source
        image = Image.open(io.BytesIO(source.read(int(raw.index[0])))).convert("RGB")
        small = np.array(image.resize((16, 16), Image.Resampling.LANCZOS))
        expected = torch.from_numpy(small).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(raw.pixels[0], expected, atol=0.01, rtol=0)


# -- datasets ---------------------------------------------------------------------------------------------------


def image(path: Path, size: tuple[int, int] = (20, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def folder(root: Path) -> str:
    """Write images with columns, captions, splits and folders of every kind, and return the folder."""
    for split, count in (("train", 6), ("test", 3), ("dev", 2), ("more", 4)):
        lines = []
        for k in range(count):
            for name in ("a", "b"):
                image(root / split / f"{name}{k}.png", (20 + k, 20))
            fields = {"file_name": f"a{k}.png", "other_file_name": f"b{k}.png", "text": f"text {k}"}
            lines.append(json.dumps(fields | {"alt": f"alt {k}", "label": f"big_{k}", "times": k + 1}))
        (root / split / "metadata.jsonl").write_text("\n".join(lines))
    return str(root)


def loose(root: Path) -> str:
    """Write 40 images with caption files, one of them in another encoding."""
    for k in range(40):
        image(root / f"a_name-{k}.png")
        (root / f"a_name-{k}.txt").write_bytes(f"first é {k}\nsecond {k}".encode("cp437" if k else "utf-8"))
    return str(root)


def parted(root: Path) -> str:
    """Write images whose caption files contain a control character that isn't a line feed."""
    for k in range(40):
        image(root / f"{k}.png")
        (root / f"{k}.txt").write_text(f"one {k}\x0btwo")
    return str(root)


def table(root: Path) -> str:
    """Write a parquet file with two columns of images and two of captions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir()
    made = []
    for k in range(2):
        file = io.BytesIO()
        Image.new("RGB", (20 + k, 20)).save(file, "PNG")
        made.append([{"bytes": file.getvalue(), "path": None}] * 30)
    columns = {"one": made[0], "two": made[1], "text": ["t"] * 30, "alt": ["other"] * 30}
    pq.write_table(pa.table(columns), root / "train.parquet")
    return str(root)


def all_captions(inputs: Inputs) -> set[str]:
    return {caption for row in inputs.source for caption in row.captions}


READS: list[tuple[Callable[[Path], str], dict[str, Any], Callable[[Inputs], Any], Any]] = [
    (folder, {}, lambda i: [row.name.split("/")[-1] for row in i.source][:2], ["a0.png", "a1.png"]),
    (folder, {"image_column": "other_file_name"}, lambda i: [r.name.split("/")[-1] for r in i.source][:1], ["b0.png"]),
    (folder, {"caption_column": "alt"}, lambda i: i.source[3].captions, ("alt 3",)),
    (
        folder,
        {"caption_template": "a {} one", "caption_column": "label"},
        lambda i: i.source[3].captions,
        ("a big 3 one",),
    ),
    (folder, {"train_split": "more"}, lambda i: len(i.source), 4),
    (folder, {"validation_split": "dev"}, lambda i: len(i.held_out), 2),
    (folder, {"repeats": "times"}, lambda i: i.source.repeats.tolist(), [1, 2, 3, 4, 5, 6]),
    (loose, {"encoding": "cp437"}, lambda i: "first é 7" in all_captions(i), True),
    (loose, {"encoding": "cp1252"}, lambda i: "first é 7" in all_captions(i), False),
    (loose, {"caption_from_names": True}, lambda i: "a name-7" in all_captions(i), True),
    (loose, {"encoding": "cp437", "caption_files": "whole"}, lambda i: "first é 7\nsecond 7" in all_captions(i), True),
    (parted, {"reading": 1}, lambda i: "two" in all_captions(i), True),
    (parted, {}, lambda i: "two" in all_captions(i), False),
    (table, {"image_column": "two"}, lambda i: Image.open(io.BytesIO(i.source.read(0))).size, (21, 20)),
    (table, {"image_column": "one"}, lambda i: Image.open(io.BytesIO(i.source.read(0))).size, (20, 20)),
]


@pytest.mark.parametrize(("write", "settings", "read", "expected"), READS)
def test_datasets_are_read_as_configured(
    write: Callable[[Path], str], settings: dict[str, Any], read: Callable[[Inputs], Any], expected: Any, tmp_path: Path
) -> None:
    settings = {"image_column": "two", **settings} if write is table else settings
    assert read(open_inputs(write(tmp_path / "data"), DataConfig(**settings))) == expected


@pytest.mark.parametrize("way", ["clip", "vae", "ldm", "cached ldm"])
def test_an_epoch_repeats_images(way: str, parts: Path, tmp_path: Path) -> None:
    """The first 21 positions are an epoch of six images, which appear 1 to 6 times."""
    settings: dict[str, Any] = {"cache": str(tmp_path / "cache") if way == "cached ldm" else "off"}
    data, stage = folder(tmp_path / "data"), way.removeprefix("cached ")
    config = stage_config(
        stage, data, tmp_path / "run", parts, input=DataConfig(resolution=16, repeats="times"), **settings
    )
    found: list[int] = []
    record(config, 0, lambda stage: found.extend(stage.training.__getitems__(list(range(21))).index.tolist()))
    assert np.bincount(found).tolist() == [1, 2, 3, 4, 5, 6]


def varied(caption: str, seed: int, dropout: float, shuffle: bool, count: int) -> list[str]:
    """Return the variants of a caption, from the stream of purpose 18 at the caption's hash."""
    tags = caption.split(", ")
    place = int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=8).digest(), "little")
    u, places = stream(seed, 19, place).random((2, count, len(tags)))
    found = []
    for k in range(count):
        kept = [t for t in range(len(tags)) if u[k, t] >= dropout] or [int(u[k].argmax())]
        found.append(", ".join(tags[t] for t in (sorted(kept, key=lambda t: places[k, t]) if shuffle else kept)))
    return found


@pytest.mark.parametrize(
    ("way", "dropout", "shuffle", "count"),
    [("clip", 0.5, True, 3), ("ldm", 0.9, False, 8), ("ldm", 0.0, True, 4), ("cached ldm", 0.4, True, 5)],
)
def test_tags_are_left_out_and_shuffled(
    way: str, dropout: float, shuffle: bool, count: int, parts: Path, tmp_path: Path
) -> None:
    texts = [f"a, b, c, {k}" for k in range(8)] + ["one tag"]
    for k, text in enumerate(texts):
        image(tmp_path / f"data/train/{k}.png")
        (tmp_path / f"data/train/{k}.txt").write_text(text)
    image(tmp_path / "data/test/0.png")
    (tmp_path / "data/test/0.txt").write_text("held out, as it is")
    data = DataConfig(resolution=16, tag_dropout=dropout, tag_shuffle=shuffle, tag_variants=count)
    settings: dict[str, Any] = {"cache": str(tmp_path / "cache") if way == "cached ldm" else "off", "seed": 7}
    stage = way.removeprefix("cached ")
    config = stage_config(stage, tmp_path / "data", tmp_path / "run", parts, input=data, **settings)
    if isinstance(config, LdmConfig):
        config = replace(config, caption_dropout=0.0)
    found: list[Any] = []
    positions = list(range(60))
    record(config, 0, lambda stage: found.append(stage.training.__getitems__(positions)))
    batch = found[0]
    expected = []
    for index, number in zip(batch.index.tolist(), uniforms(7, 4, positions)[:, 0], strict=True):
        variants = [texts[index]] * count if index == 8 else varied(texts[index], 7, dropout, shuffle, count)
        expected.append(variants[int(number * count)])
    if way == "cached ldm":
        encoder = ClipTextEncoder.load(str(parts / "clip" / "model"))
        torch.testing.assert_close(batch.condition, encoder.encode(expected), rtol=2e-3, atol=2e-3)
    else:
        assert batch.captions == expected
    assert len(set(expected)) > 8


def test_a_streams_tags_are_not_varied(tmp_path: Path, parts: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for k in range(4):
            image(tmp_path / f"{k}.png")
            (tmp_path / f"{k}.txt").write_text("a, b")
            for suffix in ("png", "txt"):
                tar.add(tmp_path / f"{k}.{suffix}", f"{k}.{suffix}")
    data = DataConfig(resolution=16, tag_shuffle=True)
    config = stage_config("clip", f"pipe:cat {tmp_path}/0.tar", tmp_path / "run", parts, input=data)
    with pytest.raises(UserError, match="a stream's captions can't be varied"):
        record(config, 0, lambda stage: None)


@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_a_share_of_the_images_is_held_out(fraction: float, tmp_path: Path) -> None:
    for k in range(200):
        image(tmp_path / f"a cat {k}.png")
    inputs = open_inputs(str(tmp_path), DataConfig(caption_from_names=True, validation_fraction=fraction))
    assert len(inputs.source) + len(inputs.held_out) == 200
    assert abs(len(inputs.held_out) - 200 * fraction) <= 4 * (200 * fraction * (1 - fraction)) ** 0.5


def test_a_stream_is_shuffled_in_a_buffer_of_this_size(tmp_path: Path) -> None:
    """The examples keep their order with a buffer of 1; a larger buffer mixes them over its length."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for k in range(60):
            file = io.BytesIO()
            Image.new("RGB", (8, 8)).save(file, "PNG")
            for name, data in ((f"{k:02d}.png", file.getvalue()), (f"{k:02d}.txt", f"{k}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    orders = []
    for buffer in (1, 20):
        config = DataConfig(stream_buffer=buffer, validation_fraction=0.05)
        stream = open_inputs(f"pipe:cat {tmp_path}/a.tar", config).stream
        assert stream is not None
        examples = stream.examples(0, 0)
        orders.append([int(next(examples)[0].captions[0]) for _ in range(30)])
    assert orders[0] == sorted(orders[0])
    assert orders[1] != sorted(orders[1])
    assert max(orders[1][:5]) < 5 + 20 + 10  # 20 in the buffer; few are held out


@pytest.mark.parametrize("min_size", [0, 24])
@pytest.mark.parametrize("stage", ["clip", "vae", "ldm"])
def test_images_above_and_below_the_sizes_are_left_out(stage: str, min_size: int, parts: Path, tmp_path: Path) -> None:
    """Images are 20, 24 or 28 × 24. Those that are too large count as damaged, when they are opened or before."""
    for k in range(40):
        image(tmp_path / f"data/a cat {k}.png", (20 + 4 * (k % 3), 24))
    settings: dict[str, Any] = {"max_damaged": 1.0, "validation_fraction": 0.4, "caption_from_names": True}
    data = DataConfig(resolution=16, min_size=min_size, max_pixels=24 * 24, **settings)
    config = stage_config(stage, tmp_path / "data", tmp_path / "run", parts, input=data, cache="off")
    sizes: set[tuple[int, int]] = set()

    def read(stage: Any) -> None:
        for dataset, source in (
            (stage.training, stage.inputs.source),
            (stage.held_out, stage.inputs.held_out),
        ):
            indices = set(dataset.__getitems__(list(range(60))).index.tolist())
            sizes.update(Image.open(io.BytesIO(source.read(k))).size for k in indices)

    record(config, 0, read)
    assert sizes == ({(24, 24)} if min_size else {(20, 24), (24, 24)})


@pytest.mark.parametrize("way", ["clip", "vae", "ldm", "cached ldm"])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_training_stops_above_the_share_of_damaged_images(way: str, share: float, parts: Path, tmp_path: Path) -> None:
    """A quarter of 40 images is damaged."""
    for k in range(40):
        image(tmp_path / f"data/a cat {k}.png")
        if k % 4 == 0:
            (tmp_path / f"data/a cat {k}.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    data = DataConfig(resolution=16, caption_from_names=True, max_damaged=share)
    settings: dict[str, Any] = {"cache": str(tmp_path / "cache") if way == "cached ldm" else "off"}
    stage = way.removeprefix("cached ")
    config = stage_config(stage, tmp_path / "data", tmp_path / "run", parts, input=data, batch_size=20, **settings)
    if share > 0.25:
        record(config, 4)
    else:
        with pytest.raises(RunError):
            record(config, 4)


@pytest.mark.parametrize(("side", "ratio"), [(8, 2.0), (4, 1.5)])
def test_buckets_have_multiples_of_their_number_within_the_ratio(
    side: int, ratio: float, parts: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(1)
    for k in range(60):
        image(tmp_path / f"data/a cat {k}.png", tuple(rng.integers(20, 90, 2).tolist()))
    data = DataConfig(resolution=32, caption_from_names=True, buckets=side, bucket_ratio=ratio)
    config = stage_config("ldm", tmp_path / "data", tmp_path / "run", parts, input=data, cache="off")
    shapes: set[tuple[int, int]] = set()
    record(
        config,
        0,
        lambda stage: shapes.update(
            tuple(stage.training.__getitems__(list(range(8 * k, 8 * k + 8))).pixels.shape[2:]) for k in range(8)
        ),
    )
    assert len(shapes) > 2
    assert all(h % side == w % side == 0 and max(h, w) <= ratio * min(h, w) for h, w in shapes)
    assert max(max(s) / min(s) for s in shapes) > 1 + 0.5 * (ratio - 1)
    assert all(abs(h * w / 32**2 - 1) < 0.3 for h, w in shapes)


def test_links_out_of_the_folder_are_followed_only_if_configured(tmp_path: Path) -> None:
    for k in range(30):
        image(tmp_path / f"data/a cat {k}.png")
    image(tmp_path / "elsewhere/linked dog.png")
    (tmp_path / "data/linked dog.png").symlink_to(tmp_path / "elsewhere/linked dog.png")
    with pytest.raises(UserError, match="is a link to a file outside"):
        open_inputs(str(tmp_path / "data"), DataConfig(caption_from_names=True))
    inputs = open_inputs(str(tmp_path / "data"), DataConfig(caption_from_names=True, follow_links=True))
    assert "linked dog" in all_captions(inputs) | {c for row in inputs.held_out for c in row.captions}
