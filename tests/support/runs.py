"""Short training runs of small models: their configurations, interruptions and results."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train.stages.clip
import train.stages.distillation
import train.stages.ldm
import train.stages.vae
from support.processes import run_in_processes
from train.config.clip import ClipConfig, ImageTowerConfig, TextTowerConfig
from train.config.data import DataConfig
from train.config.distill import DistillConfig
from train.config.ldm import LdmConfig, UnetConfig
from train.config.optimizer import OptimizerConfig
from train.config.vae import AdversarialConfig, AutoencoderConfig, VaeConfig
from train.engine.stage import Batch, Hooks

COMMON: dict[str, Any] = {
    "steps": 8,
    "batch_size": 8,
    "checkpoint_every": 3,
    "validate_every": 8,
    "log_every": 2,
    "ema_decay": 0.9,
    "trackers": (),
    "keep_checkpoints": 9,
    "optimizer": OptimizerConfig(lr=1e-3, schedule="cosine", warmup=3),
    "input": DataConfig(resolution=32),
}
"""Settings of every stage."""

Config = ClipConfig | VaeConfig | LdmConfig | DistillConfig

Start = Callable[..., None]
"""A function start(out, hooks=None, **changed settings) that trains one stage."""


def clip_config(data: Path | str, out: Path, **change: Any) -> ClipConfig:
    small = {"width": 32, "layers": 1, "heads": 2}
    return ClipConfig(
        data=str(data),
        out=str(out),
        text=TextTowerConfig(vocab_size=700, max_length=16, **small),
        image=ImageTowerConfig(patch_size=8, **small),
        projection=16,
        **COMMON | change,
    )


def vae_config(data: Path | str, out: Path, **change: Any) -> VaeConfig:
    # Two groups rather than one per channel: with one per channel, the normalisation removes a convolution's bias. Its
    # gradient is then only rounding error, from which Adam makes full steps.
    model = AutoencoderConfig(channels=(8, 16), layers=1, groups=2, attention=False)
    adversarial = AdversarialConfig(kind="hinge", start=4, channels=8, layers=2)
    return VaeConfig(data=str(data), out=str(out), **COMMON | {"model": model, "adversarial": adversarial} | change)


def ldm_config(data: Path | str, out: Path, parts: Path, **change: Any) -> LdmConfig:
    """Return a configuration that trains on the autoencoder and the text encoder in `parts`."""
    unet = UnetConfig(channels=(16, 32), attention=(False, True), heads=(2, 2), groups=8)
    settings = COMMON | {"cache": str(parts / "cache"), "validation_examples": 8, "sample_steps": 2} | change
    return LdmConfig(
        data=str(data),
        out=str(out),
        vae=str(parts / "vae/model"),
        text_encoder=str(parts / "clip/model"),
        unet=unet,
        caption_dropout=0.3,
        **settings,
    )


def distill_config(data: Path | str, out: Path, teacher: Path | str, **change: Any) -> DistillConfig:
    """Return a configuration that distils a pipeline."""
    prompts = () if "inpaint" in str(teacher) else ("a red star",)
    settings = COMMON | {"validation_examples": 8, "sample_steps": 2, "prompts": prompts} | change
    return DistillConfig(data=str(data), out=str(out), teacher=str(teacher), **settings)


def stage_config(stage: str, data: Path | str, out: Path, parts: Path, **change: Any) -> Config:
    """Return the configuration of "clip", "vae" or "ldm", which trains on the models in `parts`."""
    match stage:
        case "clip":
            return clip_config(data, out, **change)
        case "vae":
            return vae_config(data, out, **change)
        case _:
            return ldm_config(data, out, parts, **change)


def train_stage(config: Config, hooks: Hooks | None = None, **how: Any) -> None:
    """Train the stage that `config` describes."""
    match config:
        case ClipConfig():
            train.stages.clip.train(config, hooks=hooks, **how)
        case VaeConfig():
            train.stages.vae.train(config, hooks=hooks, **how)
        case LdmConfig():
            train.stages.ldm.train(config, hooks=hooks, **how)
        case DistillConfig():
            train.stages.distillation.train(config, hooks=hooks, **how)


def train_in_processes(config: Config, processes: int, **how: Any) -> None:
    """Train the stage that `config` describes in new processes on the CPU, which communicate through Gloo."""
    run_in_processes(_train, processes, config, how)


def _train(rank: int, count: int, config: Config, how: dict[str, Any]) -> None:
    train_stage(config, **how)


@dataclass
class Crash(Hooks):
    """Interruption of a run just before step `at`, counted from 0."""

    at: int

    def begin_step(self, step: int, parts: list[Batch]) -> list[Batch]:
        if step == self.at:
            raise KeyboardInterrupt
        return parts


def final_state(out: Path, step: int = 8) -> tuple[bytes, bytes]:
    """Return the contents of a checkpoint."""
    folder = out / f"checkpoints/step-{step:08d}"
    return (folder / "state.safetensors").read_bytes(), (folder / "state.json").read_bytes()


def logged(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float]]:
    """Return the steps at which a run logged its loss, and the losses."""
    return [(line["step"], line["loss"]) for line in logged(out) if "loss" in line]
