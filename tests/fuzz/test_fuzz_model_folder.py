"""Fuzzing the JSON files of a model's folder: the configurations of its parts, its tokenizer and its preview."""

import functools
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from autoencoder.perceptual import ClipPerceptual
from ldm.pipeline import LatentDiffusionPipeline
from support.fuzz import Target
from support.models import save_models
from train.evaluation.features import load_features


@functools.cache
def saved() -> Path:
    """Return a folder with a pipeline, model/, and a CLIP, clip/. Its files are the same in every process."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-model-"))
    save_models(folder)
    return folder


def read_model(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(saved(), folder, dirs_exist_ok=True, copy_function=os.link)
        file = Path(folder, name.replace("=", "/"))
        file.unlink()
        file.write_bytes(content)
        match name.split("="):
            case ["clip", _]:
                ClipPerceptual(f"{folder}/clip")
                load_features(f"{folder}/clip")
            case _ if len(content) % 2:
                pipe = LatentDiffusionPipeline.from_pretrained(f"{folder}/model")
                pipe("a red star", num_inference_steps=2, height=32, width=32)
            case _:
                LatentDiffusionPipeline.from_single_file(f"{folder}/single.safetensors", config=f"{folder}/model")


def seeds(part: str) -> dict[str, list[bytes]]:
    """Return the JSON files of a part, by their path with = instead of /."""
    files = sorted((saved() / part).rglob("*.json"))
    return {str(file.relative_to(saved())).replace("/", "="): [file.read_bytes()] for file in files}


def targets() -> list[Target]:
    return [Target("model_folder", seeds("model"), read_model), Target("clip_folder", seeds("clip"), read_model)]


KEPT = [(name, path) for name in ("model_folder", "clip_folder") for path in Target(name, {}, read_model).kept()]


@pytest.mark.parametrize(("name", "path"), KEPT, ids=[f"{name}-{path.name}" for name, path in KEPT])
def test_an_input_that_once_failed_is_read_or_refused(name: str, path: Path) -> None:
    Target(name, {}, read_model).replay(path)


@pytest.mark.slow
@pytest.mark.parametrize("k", [0, 1], ids=["model_folder", "clip_folder"])
def test_a_changed_folder_is_read_or_refused(k: int) -> None:
    targets()[k].fuzz()
