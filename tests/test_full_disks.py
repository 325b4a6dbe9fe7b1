"""A disk that is full ends whatever is written with one line that names the file, and leaves nothing half-written."""

import contextlib
import io
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conditioning.tokenizer import train_tokenizer
from ldm.errors import RunError
from support.images import smooth_images
from train.commands.interpolate import animate
from train.commands.outputs import key_of_gif, write_file, write_png
from train.data.batches.unreadable import UnreadableCounter
from train.data.sources.catalogue import Row
from train.data.sources.tar_index import open_index
from train.data.store.atomic import atomic_folder, write_text
from train.data.store.row_index import digests
from train.data.store.shards import ComputedRows, Processes, open_shards
from train.data.synthetic.shapes import write_shapes
from train.engine.metrics import Metrics
from train.evaluation.sheets import save_sheet

IMAGE = smooth_images(1, (200, 200))[0]
SETTINGS = {"prompt": "x" * 9000, "steps": 1, "sampler": "ddim", "guidance_scale": 1.0, "seed": 0}


class Rows:
    """Rows of a cache: 64 times 100 zeros."""

    keys, ambiguous = digests(map(str, range(64))), np.zeros(64, bool)

    def weak_keys(self, rows):
        return self.keys[rows]

    def contents(self, rows):
        return np.zeros((len(rows), 2), np.uint64)

    def compute(self, batches):
        for rows in batches:
            yield ComputedRows(np.zeros((len(rows), 100), np.float32), self.contents(rows), [""] * len(rows))


def write_cache(folder: Path) -> None:
    quiet = Processes(print=lambda _: None)
    open_shards(folder / "cache", "numbers", {}, Rows(), (100,), "float32", quiet, 16)


def write_metrics(folder: Path) -> None:
    accelerator: Any = SimpleNamespace(is_main_process=True, log=lambda *_, **__: None)
    Metrics(folder / "metrics.jsonl", accelerator).log(1, {f"metric_{k}": 0.5 for k in range(1000)})


def write_unreadable(folder: Path) -> None:
    names = [(f"{k}.png", "damaged") for k in range(1000)]
    UnreadableCounter(folder / "damaged.jsonl", print=lambda _: None).add_to_report(names)


def write_index(folder: Path) -> None:
    (folder / "a.tar").write_bytes(b"")
    rows = ((0, Row(f"{k}.png", 0, 0, ("x" * 100,))) for k in range(1000))
    open_index(folder / "index", [str(folder / "a.tar")], lambda part, left_out: rows)


def write_model(folder: Path, write: Callable[[Path], object]) -> None:
    with atomic_folder(folder / "model") as model:
        write(model)


def write_weights(folder: Path) -> None:
    write_model(folder, lambda model: save_file({"a": torch.ones(9000)}, model / "a.safetensors"))


def write_tokenizer(folder: Path) -> None:
    words = [f"word{k} {k}" for k in range(900)]
    write_model(folder, lambda model: train_tokenizer(words, 2000, 16).save_pretrained(str(model)))


WRITERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cache": (write_cache, r"cache/numbers-\w+/\w+\.npy"),
    "index of tars": (write_index, "index"),
    "metrics": (write_metrics, r"metrics\.jsonl"),
    "unreadable images": (write_unreadable, r"damaged\.jsonl"),
    "sheet": (lambda folder: save_sheet(IMAGE, folder / "sheet.png"), r"sheet\.png"),
    "report": (lambda folder: write_text(folder / "report.json", "x" * 9000), r"report\.json"),
    "generated image": (lambda folder: write_png(IMAGE, folder, "a.png", SETTINGS), r"a\.png"),
    "animation": (
        lambda folder: write_file(animate([IMAGE] * 2, 9, True, "key"), folder, "a", ".gif", "key", key_of_gif),
        r"a\.gif",
    ),
    "weights": (write_weights, "model"),
    "tokenizer": (write_tokenizer, "model"),
    "dataset": (lambda folder: write_shapes(folder / "shapes", 64, 40, 0, 0), "shapes"),
}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def limited_files(size: int) -> Iterator[None]:
    """Let writing fail beyond this size of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", WRITERS)
def test_the_error_names_the_file(tmp_path: Path, what: str) -> None:
    write, name = WRITERS[what]
    with pytest.raises(RunError) as error, limited_files(4096):
        write(tmp_path)
    assert error.match(rf"{tmp_path}/{name}\b.* can't be written: |disk full while writing .*{tmp_path}/{name}\b")
    assert "\n" not in str(error.value)
    kept = [name for name in files(tmp_path) if not name.startswith(("index/", "a.tar"))]
    assert kept == {"metrics": ["metrics.jsonl"], "unreadable images": ["damaged.jsonl"]}.get(what, [])


def test_a_full_disk_is_named_so(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small tmpfs here")
    try:
        for what in WRITERS:
            (tmp_path / "filler").write_bytes(bytes(90_000))
            if what == "cache":  # which looks at the free space first
                with pytest.raises(RunError, match=r"needs .* more, but its disk has only"):
                    write_cache(tmp_path)
                continue
            with pytest.raises(RunError, match=f"disk full while writing .*{WRITERS[what][1]}"):
                WRITERS[what][0](tmp_path)
            for path in (tmp_path / "metrics.jsonl", tmp_path / "damaged.jsonl"):
                path.unlink(missing_ok=True)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
