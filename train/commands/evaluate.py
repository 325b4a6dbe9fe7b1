"""Measure a trained model on a dataset, and write a report and a sample sheet."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import UserError
from ldm.pipeline import LatentDiffusionPipeline
from train.commands.generate import warn_if_untrained
from train.commands.main import require_at_least, require_folder, use_device
from train.config.reports import EvaluateOptions
from train.data.batches.draws import PosteriorNoise
from train.data.batches.images import ImageDataset
from train.data.batches.records import ImageBatch
from train.data.order.permutation import choose
from train.data.store.atomic import write_text
from train.data.synthetic.emoji_styles import ABOUT
from train.data.synthetic.shapes import prompts
from train.engine.open_data import open_inputs
from train.engine.provenance import versions
from train.evaluation.autoencoder import measure_reconstruction
from train.evaluation.curves import training_plots
from train.evaluation.diffusion import alignment, bits_per_dimension, generate
from train.evaluation.losses import error_by_level, image_losses
from train.evaluation.quality import Evaluation, measure_generated
from train.evaluation.report import Model, save_samples, standard_parts, write_report
from train.evaluation.results import Part, lists
from train.evaluation.sheets import in_rows, save_sheet, sheet
from train.evaluation.styles import measure_styles
from train.evaluation.sweep import sweep

_LEVELS = 16  # noise levels of the curve of held-out errors
_SHOWN = 16  # images on the sheet; of Shapes, of each kind of prompts


def _check(o: EvaluateOptions) -> None:
    """Raise UserError for a missing option or a number out of range."""
    for name, example in (("model", "runs/ldm/model"), ("data", "data/shapes")):
        if not getattr(o, name):
            raise UserError(f"--{name} is missing: give e.g. --{name} {example}")
    require_folder(o.out)
    require_at_least(0, o, "seed", "copies")
    require_at_least(1, o, "prompts", "images", "likelihoods", "batch_size")
    for name in ("samples", "seeds"):
        if (value := getattr(o, name)) < 2 and value != 0:
            raise UserError(f"--{name} {value}: must be 0 or at least 2")
    if o.sweep.samples < 2:
        raise UserError(f"--sweep.samples {o.sweep.samples}: must be at least 2")
    if min(o.sweep.steps, default=1) < 1:
        raise UserError(f"--sweep.steps {min(o.sweep.steps)}: must be at least 1")


def evaluate(o: EvaluateOptions) -> dict[str, Any]:
    """Measure a model and return the report, which is also written to `o.out` with a sample sheet."""
    _check(o)
    pipe = LatentDiffusionPipeline.from_pretrained(o.model).to(use_device(o.device))
    o = o.for_sampler(pipe.process.sampler)
    warn_if_untrained(o, pipe)
    if o.optimize != "auto":
        pipe.optimize(o.optimize)
    side = pipe.backbone.sample_size[0] * pipe.autoencoder.factor
    inputs = open_inputs(o.data, o.input)
    evaluation = Evaluation.open(pipe, inputs, o)
    curves = training_plots(o.model)
    folder = Path(o.out)
    folder.mkdir(parents=True, exist_ok=True)  # before the work, so that an error costs no time
    source = inputs.held_out if o.split == "test" else inputs.source
    draws = PosteriorNoise(pipe.autoencoder.latent_channels, pipe.autoencoder.factor)
    dataset = ImageDataset(source, o.input.center_framing(side), o.seed, draws=draws)
    count, b = min(o.images, len(dataset.source)), o.batch_size

    damaged: set[tuple[str, str]] = set()

    def batches(count: int) -> Iterator[ImageBatch[Tensor]]:
        for first in range(0, count, b):
            batch = dataset.__getitems__(range(first, min(first + b, count)))
            damaged.update(batch.damaged)
            yield batch

    pairs = ((batch.pixels, batch.drawn) for batch in batches(count))
    reconstructed: list[list[Tensor]] = []  # features of each batch, for the search of copies, which needs them again

    def keep(decoded: Tensor) -> None:
        if o.split == "test" and o.samples and o.copies:
            reconstructed.append(evaluation.features(evaluation.with_pixels, [decoded]))

    quality = measure_reconstruction(pipe.autoencoder, pairs, levels=(0.2,), on_decoded=keep)
    report: dict[str, Any] = {"vae": quality}
    bounded = batches(min(o.likelihoods, count))
    bits, error = bits_per_dimension(pipe, ((batch.pixels, batch.captions) for batch in bounded), o.seed)
    report["latents"] = {"bits_per_dimension": bits, "standard_error": error}
    sampling: dict[str, Any] = {**o.generation(), "seed": o.seed, "batch_size": b}
    if (Path(o.data) / "shapes.json").is_file():
        report["alignment"], images, captions = _alignment(pipe, o, sampling)
    else:
        captions = [source[k].captions[0] for k in choose(min(_SHOWN, count), len(source), o.seed)]
        images = list(generate(pipe, captions, **sampling))
    parts: list[Part] = standard_parts(report, count)
    if o.samples:
        parts += measure_generated(evaluation, [torch.cat(each) for each in zip(*reconstructed, strict=True)])
    if (Path(o.data) / ABOUT).is_file():
        report["styles"], styled = measure_styles(evaluation)
        parts += styled
    if o.sweep.guidance or o.sweep.steps:
        parts += sweep(evaluation)
    losses = image_losses(pipe, batches(min(o.likelihoods, count)), levels=_LEVELS, seed=o.seed)
    report |= lists([*parts, error_by_level(losses, f"{o.split} images"), *curves])
    report["samples"] = save_samples(folder, images, captions)
    if pipe.inpaints:
        report["task"] = "text to image by an inpainting model, with a mask that is white everywhere"
    report["damaged"] = [list(pair) for pair in sorted(damaged)]
    report["settings"] = sampling | {"model": o.model, "data": o.data, "split": o.split, "images": count}
    report["versions"] = versions()
    save_sheet(sheet(in_rows(images, 8), captions), folder / "samples.png")
    write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_report([Model(o.model, report, folder)], folder / "report.html")
    return report


def _alignment(
    pipe: LatentDiffusionPipeline, o: EvaluateOptions, sampling: Mapping[str, Any]
) -> tuple[dict[str, Any], list[NDArray[np.uint8]], list[str]]:
    """Return how well images of Shapes follow seen and unseen prompts, and the first of them with their prompts."""
    report: dict[str, Any] = {"prompts": o.prompts}
    images, captions = [], []
    for kind in ("seen", "unseen"):
        scenes, auto = prompts(kind, o.prompts, o.seed), o.optimize == "auto" and kind == "seen"
        report[kind], generated = alignment(pipe, scenes, optimize=auto, **sampling)
        images += list(generated[:_SHOWN])
        captions += [scene.caption for scene in scenes[:_SHOWN]]
    return report, images, captions
