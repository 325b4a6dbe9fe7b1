"""Measure a trained model on a dataset, and write a report and a sheet of sample images."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import UserError
from ldm.pipeline import LatentDiffusionPipeline
from train.commands.main import use_device
from train.config.reports import EvaluateOptions
from train.data.batches.draws import PosteriorNoise
from train.data.batches.images import ImageDataset
from train.data.batches.records import ImageBatch
from train.data.synthetic.shapes import prompts
from train.engine.open_data import open_inputs
from train.engine.provenance import versions
from train.evaluation.autoencoder import measure_reconstruction
from train.evaluation.diffusion import alignment, bits_per_dimension, generate
from train.evaluation.sheets import in_rows, sheet


def evaluate(o: EvaluateOptions) -> dict[str, Any]:
    """Measure a model and return the report, also written to `o.out` with a sheet."""
    for name in ("model", "data"):
        if not getattr(o, name):
            raise UserError(f"--{name} is missing")
    if o.seed < 0:
        raise UserError(f"--seed {o.seed}: at least 0")
    for name in ("prompts", "images", "likelihoods", "batch_size"):
        if getattr(o, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(o, name)}: at least 1")
    pipe = LatentDiffusionPipeline.from_pretrained(o.model).to(use_device(o.device))
    side = pipe.backbone.sample_size[0] * pipe.autoencoder.factor
    inputs = open_inputs(o.data, o.input)
    folder = Path(o.out)
    folder.mkdir(parents=True, exist_ok=True)  # if this fails, it fails before the work
    source = inputs.held_out if o.split == "test" else inputs.source
    draws = PosteriorNoise(pipe.autoencoder.latent_channels, pipe.autoencoder.factor)
    dataset = ImageDataset(source, o.input.center_framing(side), o.seed, shuffle=False, draws=draws)
    count, b = min(o.images, len(dataset.source)), o.batch_size

    damaged: set[tuple[str, str]] = set()

    def batches(count: int) -> Iterator[ImageBatch[Tensor]]:
        for first in range(0, count, b):
            batch = dataset.__getitems__(range(first, min(first + b, count)))
            damaged.update(batch.damaged)
            yield batch

    pairs = ((batch.pixels, batch.drawn) for batch in batches(count))
    report: dict[str, Any] = {"vae": measure_reconstruction(pipe.autoencoder, pairs, levels=(0.2,))}
    few = batches(min(o.likelihoods, count))
    bits, error = bits_per_dimension(pipe, ((batch.pixels, batch.captions) for batch in few), o.seed)
    report["latents"] = {"bits_per_dimension": bits, "standard_error": error}
    how: dict[str, Any] = {**o.sampling(), "seed": o.seed, "batch_size": b}
    if (Path(o.data) / "shapes.json").is_file():
        report["alignment"] = {"prompts": o.prompts}
        images, captions = [], []
        for kind in ("seen", "unseen"):
            scenes = prompts(kind, o.prompts, o.seed)
            report["alignment"][kind], generated = alignment(pipe, scenes, **how)
            images += list(generated[:16])
            captions += [scene.caption for scene in scenes[:16]]
    else:
        captions = [row.captions[0] for row in islice(dataset.source, min(16, count))]
        images = list(generate(pipe, captions, **how))
    if pipe.inpaints:
        report["task"] = "text to image, by a model that inpaints, under a mask that is white all over"
    report["damaged"] = [list(pair) for pair in sorted(damaged)]
    report["settings"] = how | {"model": o.model, "data": o.data, "split": o.split, "images": count}
    report["versions"] = versions()
    sheet(in_rows(images, 8), captions).save(folder / "samples.png")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report
