"""Records of training that are measured with tiny numbers, in this process."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tracks import records, trainings
from tracks.options import Options

import train.stages.ldm
import train.stages.vae
from support import ROOT
from train.config.ldm import LdmConfig
from train.config.load import parse
from train.config.vae import VaeConfig

SETTINGS = (
    "--unet.channels 16 32 --unet.attention False True --unet.heads 2 2 --unet.groups 8 --batch-size 4 --trackers "
    "--validation-examples 4 --sample-steps 1 --precision fp32 --first-samples 0 --keep-best False"
)
SAMPLING: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "sampler": "dpmpp_2m"}


def tiny_options(shapes: Path, parts: Path, work: Path) -> Options:
    return Options(
        name="tiny",
        steps=2,
        settings=SETTINGS,
        seeds=(4, 5),
        prompts=3,
        data=str(shapes),
        vae=str(parts / "vae/model"),
        text_encoder=str(parts / "clip/model"),
        work=str(work / "work"),
        records=str(work / "records"),
        calls=1,
        turns=2,
    )


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample with few steps, and take the CPU seconds of a step as known: 1.5, and 3 in the record before."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(trainings, "SAMPLING", SAMPLING)
    monkeypatch.setattr(records.machine, "matrix_rates", lambda: {"fp32": 1.0})
    seconds = {"before": {"cpu": 3.0}, "this": {"cpu": 1.5}}
    monkeypatch.setattr(trainings.contest, "run", lambda row, *_: {c.name: seconds[c.name] for c in row.contestants})


def train_here(o: Options, program: Callable[[int], Sequence[str]]) -> None:
    """Train the seeds as `train_seeds` does, but in this process."""
    for seed in o.seeds:
        _, script, *arguments = program(seed)
        match Path(script).relative_to(ROOT).as_posix():
            case "scripts/train_ldm.py":
                train.stages.ldm.train(parse(LdmConfig, arguments))
            case "scripts/train_vae.py":
                train.stages.vae.train(parse(VaeConfig, arguments))
            case other:
                raise AssertionError(other)
