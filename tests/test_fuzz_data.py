"""Fuzzing of the files that this project keeps on disk and of what users give it: see support/fuzz.py."""

import atexit
import contextlib
import functools
import hashlib
import json
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from ldm.errors import UserError
from ldm.formats.png import png_bytes
from ldm.pipeline import LatentDiffusionPipeline
from support.fuzz import Target, change_tree
from support.images import smooth_images
from support.models import tiny_pipeline
from support.odd_images import chunk, encoded
from train.commands.generate import read_options
from train.commands.outputs import key_of_gif, key_of_png
from train.config.generation import Img2ImgOptions, Txt2ImgOptions
from train.data.images.decode import DamagedImage, load_image
from train.data.sources.catalogue import Row
from train.data.sources.tar_index import NoValidIndex, TarIndex, checksum, open_index, stat_parts
from train.data.store.row_index import about_hash, digests
from train.data.store.shards import ComputedRows, Processes, open_shards
from train.engine.checkpoint import load_tree, pack_tree

QUIET = Processes(print=lambda _: None)


@functools.cache
def scratch(name: str) -> Path:
    """Return a folder in memory, if there is one, because fsync on a disk is slow."""
    memory = Path("/dev/shm")
    folder = tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir=memory if os.access(memory, os.W_OK) else None)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def write_all(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def with_json(change: Callable[[Random, Any], Any]) -> Callable[[Random, bytes], bytes]:
    """Return a mutation of JSON from a change of its tree."""

    def mutate(random: Random, content: bytes) -> bytes:
        try:
            return json.dumps(change(random, json.loads(content))).encode()
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return content

    return mutate


# -- a cache's shards --


class FourRows:
    """Rows of a cache: four texts and their lengths."""

    keys = digests(("a", "bb", "ccc", "dddd"))
    ambiguous = np.zeros(4, bool)

    def weak_keys(self, rows):
        return self.keys[rows]

    def contents(self, rows):
        return np.zeros((len(rows), 2), np.uint64)

    def compute(self, batches):
        for rows in batches:
            bad = ["unreadable" if k == 3 else "" for k in rows]
            yield ComputedRows(np.repeat(rows[:, None] + 1, 2, 1).astype(np.float32), self.contents(rows), bad)


def open_cache(folder: Path):
    return open_shards(folder, "test", {}, FourRows(), (2,), "float32", QUIET, 4)


@functools.cache
def valid_cache() -> tuple[str, dict[str, bytes]]:
    """Return the name of a cache's folder, and its files, of which one shard is called `shard`."""
    open_cache(scratch("cache"))
    (folder,) = scratch("cache").iterdir()
    return folder.name, {f"shard{Path(name).suffix}": content for name, content in read_all(folder).items()}


def read_cache(name: str, content: bytes) -> None:
    folder, files = valid_cache()
    write_all(scratch("cache") / folder, {**files, name: content})
    shards, bad = open_cache(scratch("cache"))
    shards.gather(np.arange(4))
    assert all(isinstance(reason, str) for _, reason in bad)


def with_sum(random: Random, about: Any) -> Any:
    """Change a shard's list of unreadable rows, with the right sum."""
    about["bad"] = change_tree(random, about["bad"])
    return about | {"sum": about_hash(about)}


# -- the index of tars --


def located(part, left_out) -> Iterator[tuple[int, Row]]:
    for k in range(3):
        yield 10 * k, Row(f"{k}.png", 5, part.changed_ns, (f"caption {k}",))


@functools.cache
def valid_index() -> tuple[list[str], dict[str, bytes]]:
    """Return the paths of two tars, and the files of their index, whose generation is called `g`."""
    paths = [str(scratch("tars") / f"{k}.tar") for k in range(2)]
    for path in paths:
        Path(path).write_bytes(bytes(100))
    open_index(scratch("index"), paths, located)
    files = read_all(scratch("index"))
    about = json.loads(files.pop("about.json")) | {"generation": "g"}
    files = {f"g{Path(name).suffix}": content for name, content in files.items() if name != "lock"}
    return paths, files | {"about.json": json.dumps(summed(about)).encode()}


def summed(about: dict[str, Any]) -> dict[str, Any]:
    about = {name: value for name, value in about.items() if name != "sum"}
    return about | {"sum": hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()}


def read_index(name: str, content: bytes) -> None:
    paths, files = valid_index()
    files = {**files, name: content}
    if name == "g.parts":  # else a wrong sum hides the rest
        about = json.loads(files["about.json"])
        files["about.json"] = json.dumps(summed(about | {"parts": hashlib.sha256(content).hexdigest()})).encode()
    write_all(scratch("index"), files)
    with contextlib.suppress(NoValidIndex):
        index = TarIndex(scratch("index"), stat_parts(paths))
        for k in range(len(index)):
            index[k]
    write_all(scratch("index"), {name: content for name, content in files.items() if name != "about.json"})
    rebuilt = open_index(scratch("index"), paths, located)
    assert [rebuilt[k][2].captions for k in range(len(rebuilt))] == [(f"caption {k % 3}",) for k in range(6)]


def record_with_checksum(random: Random, content: bytes) -> bytes:
    """Change an entry's line and record, with the right checksum."""
    if len(content) < 24:
        return content
    start, image, length, _ = struct.unpack("<QQII", content[:24])
    values = [random.choice((v, 0, 2**32 - 1, (v + 1) % 2**64)) for v in (start, image)]
    _, files = valid_index()
    line = files["g.lines"][start : start + length]
    return struct.pack("<QQII", *values, length, checksum(*values, line)) + content[24:]


# -- images and their settings --

SETTINGS = {
    **{"prompt": "a red cat", "negative_prompt": "", "steps": 4, "sampler": "ddim", "guidance_scale": 2.0, "seed": 1},
    **{
        "width": 32,
        "height": 32,
        "model": "runs/ldm/model",
        "sha256": {"model": "0" * 64},
        "compose": [["a dog", 1.0]],
    },
}


def read_settings(name: str, content: bytes) -> None:
    path = scratch("settings") / name
    path.write_bytes(content)
    key_of_gif(path)
    key_of_png(path)
    for kind in (Img2ImgOptions, Txt2ImgOptions) if name == "image.png" else ():
        try:
            read_options(kind, str(path))
        except (ValueError, OSError) as error:
            refused = UserError(str(error))
        else:
            return
        if kind is Txt2ImgOptions:
            raise refused


def in_text_chunk(random: Random, content: bytes) -> bytes:
    """Change the settings in a PNG, with the right checksum."""
    settings = change_tree(random, SETTINGS)
    text = json.dumps(settings, ensure_ascii=random.random() < 0.5).encode(errors="surrogatepass")
    kind, data = random.choice(
        [(b"iTXt", b"ldm\0\0\0\0\0" + text), (b"zTXt", b"ldm\0\0" + zlib.compress(text)), (b"tEXt", b"ldm\0" + text)]
    )
    return content[:33] + chunk(kind, data) + content[33:]


def read_image(name: str, content: bytes) -> None:
    try:
        load_image(content, name=name)
    except DamagedImage as error:
        raise UserError(str(error)) from error


def image_files() -> dict[str, list[bytes]]:
    image = smooth_images(1, (24, 20))[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    forms = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", *(["AVIF"] if features.check("avif") else []))
    files = {f"image.{form.lower()}": [encoded(image, form)] for form in forms}
    files["image.jpeg"] += [encoded(image, "JPEG", progressive=True, exif=exif), encoded(image.convert("CMYK"), "JPEG")]
    files["image.jpeg"] += [encoded(image, "MPO", save_all=True, append_images=[image])]
    files["image.png"] += [encoded(image.quantize(5), "PNG", bits=4), encoded(image.convert("RGBA"), "PNG")]
    files["image.tiff"] += [encoded(image, "TIFF", compression=kind) for kind in ("tiff_lzw", "jpeg", "packbits")]
    files["image.gif"] += [encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)])]
    return files


# -- weights --


@functools.cache
def valid_model() -> bytes:
    """Return a single-file model; its diffusers folder is in `scratch("model")`."""
    pipe = tiny_pipeline()
    pipe.save_pretrained(scratch("model"))
    pipe.save_single_file(path := scratch("single") / "model.safetensors")
    return path.read_bytes()


def read_model(name: str, content: bytes) -> None:
    path = scratch("single") / name
    path.write_bytes(content)
    LatentDiffusionPipeline.from_single_file(path, config=str(scratch("model")))


TREE = pack_tree({"weights": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.int64)}, "step": 3})


@functools.cache
def valid_state() -> dict[str, bytes]:
    write_all(scratch("state"), {})
    TREE.write(scratch("state"))
    return read_all(scratch("state"))


def read_state(name: str, content: bytes) -> None:
    write_all(scratch("state"), {**valid_state(), name: content})
    load_tree(scratch("state"))


def change_header(random: Random, content: bytes) -> bytes:
    """Change the header of a safetensors file, with the right length."""
    try:
        length = int.from_bytes(content[:8], "little")
        header = change_tree(random, json.loads(content[8 : 8 + length]))
        text = json.dumps(header).encode()
    except (ValueError, TypeError, RecursionError):
        return content
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


# -- the targets --


@functools.cache
def target(name: str) -> Target:
    """Return a parser to fuzz; its valid files are made on demand."""
    match name:
        case "cache":
            return Target(name, {n: [c] for n, c in valid_cache()[1].items()}, read_cache,
                          {"shard.json": [with_json(with_sum)]})  # fmt: skip
        case "tar-index":
            return Target(name, {n: [c] for n, c in valid_index()[1].items()}, read_index,
                          {"about.json": [with_json(lambda r, t: summed(change_tree(r, t)))],
                           "g.rows": [record_with_checksum]})  # fmt: skip
        case "png-settings":
            image = smooth_images(1, (8, 8))[0]
            return Target(name, {"image.png": [png_bytes(image, SETTINGS)],
                                 "image.gif": [encoded(image, "GIF", comment=b"0" * 64)]}, read_settings,
                          {"image.png": 3 * [in_text_chunk]})  # fmt: skip
        case "image":
            return Target(name, image_files(), read_image)
        case "safetensors":
            return Target(name, {"model.safetensors": [valid_model()]}, read_model,
                          {"model.safetensors": 3 * [change_header]})  # fmt: skip
        case "state":
            return Target(name, {n: [c] for n, c in valid_state().items()}, read_state,
                          {"state.safetensors": 3 * [change_header]})  # fmt: skip
    raise AssertionError(name)


PARSERS = ("cache", "tar-index", "png-settings", "image", "safetensors", "state")
KEPT = [(name, path) for name in PARSERS for path in Target(name, {}, print).kept()]


@pytest.mark.parametrize(("name", "path"), KEPT, ids=[f"{name}/{path.name}" for name, path in KEPT])
def test_found_inputs_are_read_or_refused(name: str, path: Path) -> None:
    target(name).replay(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARSERS)
def test_changed_files_are_read_or_refused(name: str) -> None:
    target(name).fuzz()
