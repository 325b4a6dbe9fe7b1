"""Fixtures that several test files share."""

import gc
from pathlib import Path

import pytest
import torch

from conditioning.contrastive import save_clip
from conditioning.tokenizer import train_tokenizer
from support.models import small_clip_model
from support.runs import Start, clip_config, ldm_config, train_stage, vae_config
from train.data.synthetic.shapes import write_shapes

torch.set_num_threads(1)  # tests run side by side
gc.set_threshold(10_000, 10, 10)  # the libraries' many objects make each collection slow


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Shapes dataset of 64 training and 24 test images."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, 32, 64, 24, 0)
    return folder


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CLIP of random weights."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red star"], 600, 8)
    clip = small_clip_model(tokenizer, text_width=16, text_layers=1, vision_width=24, vision_layers=2)
    folder = tmp_path_factory.mktemp("clip")
    save_clip(clip, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def parts(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with finished runs of stage 0, clip/, and stage 1, vae/."""
    runs = tmp_path_factory.mktemp("runs")
    train_stage(clip_config(shapes, runs / "clip"))
    train_stage(vae_config(shapes, runs / "vae"))
    return runs


@pytest.fixture(params=["clip", "vae", "ldm"])
def start(request: pytest.FixtureRequest, shapes: Path) -> Start:
    """start(out, hooks=None, **changed settings) trains a stage."""
    match request.param:
        case "clip":
            return lambda out, hooks=None, **change: train_stage(clip_config(shapes, out, **change), hooks)
        case "vae":
            return lambda out, hooks=None, **change: train_stage(vae_config(shapes, out, **change), hooks)
        case _:
            parts = request.getfixturevalue("parts")
            return lambda out, hooks=None, **change: train_stage(ldm_config(shapes, out, parts, **change), hooks)
