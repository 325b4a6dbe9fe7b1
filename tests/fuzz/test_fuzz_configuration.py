"""Fuzzing the configuration: its file, and the command line."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from support import ROOT
from support.fuzz import Target
from train.config.clip import ClipConfig
from train.config.distill import DistillConfig
from train.config.generation import Txt2ImgOptions
from train.config.ldm import LdmConfig
from train.config.load import overlay, parse
from train.config.vae import VaeConfig

STAGES = {
    "clip.yaml": ClipConfig,
    "vae.yaml": VaeConfig,
    "ldm.yaml": LdmConfig,
    "distill_consistency.yaml": DistillConfig,
}


def read_file(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder, name)).write_bytes(content)
        parse(STAGES[name], [str(file)])


def read_words(name: str, content: bytes) -> None:
    """Read a command line, stored as a JSON list of words."""
    try:
        words = json.loads(content)
    except (ValueError, RecursionError):
        return
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        return
    if {"--help", "-h", "--print-config"} & set(words):
        return
    if name == "txt2img.json":
        overlay(Txt2ImgOptions, Txt2ImgOptions(), words)
    else:
        parse(STAGES[name.replace("json", "yaml")], words)


def seeds(stage: str) -> Sequence[bytes]:
    return [path.read_bytes() for path in sorted((ROOT / "configs").glob(f"*/{stage}"))]


def words(text: str) -> bytes:
    return json.dumps(text.split()).encode()


FILE = Target("configuration", {name: seeds(name) for name in STAGES}, read_file)
WORDS = Target(
    "command_line",
    {
        "clip.json": [words("--data d --out o --steps 3 --text.width 64 --input.background 0 1 2")],
        "vae.json": [words("--data d --out o --model.channels 32 64 --adversarial.layers 2 --input.flip True")],
        "ldm.json": [words("--data d --out o --unet.channels 32 64 --unet.heads 1 2 --vae v --text-encoder t")],
        "txt2img.json": [words("--model m --prompt p --compose a 1 b 2 --guidance-interval 0.5 4 --tile None --slice")],
    },
    read_words,
)
KEPT = [(target, path) for target in (FILE, WORDS) for path in target.kept()]


@pytest.mark.parametrize(("target", "path"), KEPT, ids=[f"{t.name}-{p.name}" for t, p in KEPT])
def test_an_input_that_once_failed_is_read_or_refused(target: Target, path: Path) -> None:
    target.replay(path)


@pytest.mark.slow
@pytest.mark.parametrize("target", [FILE, WORDS], ids=lambda target: target.name)
def test_a_changed_configuration_is_read_or_refused(target: Target) -> None:
    target.fuzz()
