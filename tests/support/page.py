"""The web page, served in this process, with a small model."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import pytest
import torch

from autoencoder.preview import fit_colours
from support.models import tiny_pipeline
from train.page.app import build
from train.page.isolation import isolate
from train.page.places import Places
from train.page.server import Address, start
from train.page.shared import Page


@dataclass(frozen=True)
class Served:
    """A page and its address."""

    url: str
    page: Page
    root: Path
    blocks: gr.Blocks


def make_folders(root: Path) -> Places:
    """Make the given folders with two models, small and other, and return them."""
    places = Places(root / "models", root / "runs", root / "data", root / "out")
    for folder in (places.models, places.runs, places.data, places.out):
        folder.mkdir()
    for name in ("other", "small"):
        pipe = tiny_pipeline()
        if name == "other":
            with torch.no_grad():
                pipe.unet.conv_out.weight.mul_(0.5)
        pipe.save_pretrained(places.models / name)
        fit_colours(pipe.autoencoder, [torch.rand(4, 3, 32, 32) * 2 - 1]).save(places.models / name / "vae")
    return places


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def serving(
    root: Path, auth: tuple[str, str] | None = None, places: Places | None = None, share: bool = False
) -> Iterator[Served]:
    """Serve a page on loopback."""
    page = Page(places or make_folders(root), device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "GRADIO_ANALYTICS_CACHE_FREQUENCY"):
            patch.setenv(name, "")  # restored at the end
        before = dict(os.environ)
        isolate(page.places.out)
        blocks = build(page)
        try:
            url = start(blocks, page, Address("127.0.0.1", free_port(), auth, share))
            yield Served(url.rstrip("/"), page, root, blocks)
        finally:
            page.jobs.close()
            blocks.close(verbose=False)
            os.environ.clear()
            os.environ.update(before)
