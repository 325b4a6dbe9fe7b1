"""The entry points of all commands: txt2img is installed as ldm-txt2img, and is also run by scripts/txt2img.py.

Modules that import torch are imported after the options are read, so that --help and errors in options don't wait.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.commands.main import command, imports
from train.commands.next_command import print_next
from train.config.clip import ClipConfig
from train.config.convert import ConvertOptions
from train.config.distill import DistillConfig
from train.config.generation import Img2ImgOptions, InpaintOptions, InterpolateOptions, Txt2ImgOptions
from train.config.ldm import LdmConfig
from train.config.load import overlay, parse_any, parse_training
from train.config.page import PageOptions
from train.config.reports import (
    CompareOptions,
    EvaluateOptions,
    EvaluateVaeOptions,
    InspectLossesOptions,
    InspectOptions,
    inspection_of,
)
from train.config.vae import VaeConfig


@command
def train_clip() -> None:
    """Train stage 0, a small CLIP: CONFIG --data DATA --out RUN."""
    config, with_changes = parse_training(ClipConfig)
    with imports():
        from train.stages.clip import train

    train(config, with_changes=with_changes)
    print_next(config)


@command
def train_vae() -> None:
    """Train stage 1, the autoencoder: CONFIG --data DATA --out RUN."""
    config, with_changes = parse_training(VaeConfig)
    with imports():
        from train.stages.vae import train

    train(config, with_changes=with_changes)
    print_next(config)


@command
def train_ldm() -> None:
    """Train stage 2, the latent diffusion model: CONFIG --data DATA --out RUN."""
    config, with_changes = parse_training(LdmConfig)
    with imports():
        from train.stages.ldm import train

    train(config, with_changes=with_changes)
    print_next(config)


@command
def distill() -> None:
    """Distil a trained model into a faster one: CONFIG --teacher MODEL --data DATA --out RUN."""
    config, with_changes = parse_training(DistillConfig)
    with imports():
        from train.stages.distillation import train

    train(config, with_changes=with_changes)
    print_next(config)


@command
def txt2img() -> None:
    """Generate images from prompts with a trained model."""
    o = overlay(Txt2ImgOptions, Txt2ImgOptions())
    with imports():
        from train.commands.txt2img import txt2img

    for path in txt2img(o):
        print(path)


@command
def img2img() -> None:
    """Generate images that start from given images."""
    o = overlay(Img2ImgOptions, Img2ImgOptions())
    with imports():
        from train.commands.img2img import img2img

    for path in img2img(o):
        print(path)


@command
def inpaint() -> None:
    """Inpaint the masked part of an image, or extend the image beyond its borders; the rest doesn't change."""
    o = overlay(InpaintOptions, InpaintOptions())
    with imports():
        from train.commands.inpaint import inpaint

    for path in inpaint(o):
        print(path)


@command
def interpolate() -> None:
    """Interpolate from one prompt to another, or from one seed to another: write the frames and an animation."""
    o = overlay(InterpolateOptions, InterpolateOptions())
    with imports():
        from train.commands.interpolate import interpolate

    for path in interpolate(o):
        print(path)


@command
def page() -> None:
    """Serve a web page to generate images, train, look at data and compare models in a browser."""
    o = overlay(PageOptions, PageOptions())
    with imports():
        from train.commands.page import serve

    serve(o, lambda url: print(f"open {url} in a browser; Control-C ends the page", flush=True))


@command
def evaluate() -> None:
    """Measure a trained model on a dataset, and write a report and a sample sheet."""
    o = overlay(EvaluateOptions, EvaluateOptions())
    with imports():
        from train.commands.evaluate import evaluate
        from train.evaluation.results import measure_lines

    report = evaluate(o)
    _print_report(report, ("task", "vae", "latents", "alignment", "styles"))
    for line in measure_lines(report):
        print(line)
    print(f"written to {o.out}/report.html, {o.out}/report.json and {o.out}/samples.png")


@command
def evaluate_vae() -> None:
    """Measure an autoencoder on images: its reconstructions, and whether its latents suit a diffusion model."""
    o = overlay(EvaluateVaeOptions, EvaluateVaeOptions())
    with imports():
        from train.commands.evaluate_vae import evaluate

    _print_report(evaluate(o), ("vae", "channels"))
    print(f"written to {o.out}/report.json and {o.out}/reconstructions.png")


def _print_report(report: Mapping[str, Any], parts: tuple[str, ...]) -> None:
    """Print those of these parts that a report has, and the number of damaged images."""
    print(json.dumps({part: report[part] for part in parts if part in report}, indent=2))
    if damaged := report["damaged"]:
        print(f"{len(damaged)} images can't be read and were replaced by other images, e.g. {': '.join(damaged[0])}")


@command
def convert() -> None:
    """Convert between a diffusers folder and a single safetensors file with the original key names."""
    o = overlay(ConvertOptions, ConvertOptions())
    with imports():
        from train.commands.convert import convert

    convert(o)
    print(o.out)


@command
def inspect_data() -> None:
    """Inspect images and captions before training: write statistics, problems and a contact sheet."""
    arguments = sys.argv[1:]
    given = arguments.pop(0) if arguments and not arguments[0].startswith("-") else ""
    config = parse_any((ClipConfig, LdmConfig, VaeConfig), given) if given else None
    default = InspectOptions() if config is None else inspection_of(config)
    about = (
        "CONFIG, the first argument: configuration of the training to inspect the data for, best of stage 0 or of "
        "stage 2, by path or name, e.g. pictures/clip. Options override its settings."
    )
    o = overlay(InspectOptions, default, arguments, usage="[CONFIG]", about=about)
    with imports():
        from train.commands.inspect import inspect
        from train.commands.inspect_report import describe

    configured = isinstance(config, ClipConfig) and o.text.max_length == default.text.max_length
    report = inspect(o, given if configured else "")
    print(describe(report))
    print(f"\nwritten to {o.out}: {', '.join(sorted(path.name for path in Path(o.out).iterdir()))}")


@command
def compare() -> None:
    """Write one HTML report of one or several evaluated models."""
    o = overlay(CompareOptions, CompareOptions())
    with imports():
        from train.commands.compare import compare

    compare(o)
    print(o.out)


@command
def inspect_losses() -> None:
    """Find odd images and wrong captions by the losses of a trained model."""
    o = overlay(InspectLossesOptions, InspectLossesOptions())
    with imports():
        from train.commands.inspect_losses import inspect_losses

    report = inspect_losses(o)
    for row in report["wrong"][:5]:
        print(f"{row['harm']:+.1%} {row['file']}: {row['caption']}")
    names = ", ".join(sorted(path.name for path in Path(o.out).iterdir()))
    print(f"above: the five captions that helped the model least, of {report['images']:,}; written to {o.out}: {names}")


@command
def make_dataset() -> None:
    """Make a dataset of captioned images."""
    from train.commands.make_dataset import make

    make(sys.argv[1:])
