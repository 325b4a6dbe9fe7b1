"""Measure an autoencoder on images: its reconstructions, and whether its latents suit a diffusion model."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from autoencoder.model import Autoencoder
from ldm.errors import UserError
from train.commands.main import require_at_least, require_folder, tiles, use_device
from train.config.reports import EvaluateVaeOptions
from train.config.vae import PerceptualConfig
from train.data.batches.draws import PosteriorNoise
from train.data.batches.images import ImageDataset
from train.data.store.atomic import write_text
from train.engine.open_data import open_inputs
from train.engine.provenance import versions
from train.evaluation.autoencoder import LAGS, LatentHealth, LatentSums, measure_reconstruction
from train.evaluation.features import load_features
from train.evaluation.sheets import reconstruction_sheet, save_sheet


def evaluate(o: EvaluateVaeOptions) -> dict[str, Any]:
    """Measure an autoencoder and return the report, which is also written to `o.out` with sample reconstructions."""
    for name, example in (("vae", "runs/vae/model"), ("data", "data/shapes")):
        if not getattr(o, name):
            raise UserError(f"--{name} is missing: give e.g. --{name} {example}")
    require_folder(o.out)
    require_at_least(0, o, "seed")
    require_at_least(1, o, "images", "batch_size")
    device = use_device(o.device)
    autoencoder = Autoencoder.load(o.vae)
    autoencoder.vae.to(device)
    autoencoder.tiles = tiles(o.tile)
    if o.resolution < 8 or o.resolution % autoencoder.factor:
        raise UserError(
            f"--resolution {o.resolution}: must be at least 8, and a multiple of {autoencoder.factor} for this model"
        )
    if o.perceptual == "clip" and not o.perceptual_model:
        raise UserError("--perceptual clip: needs --perceptual-model, the folder of a CLIP model")
    if o.perceptual == "none" and o.perceptual_model:
        raise UserError(f"--perceptual-model {o.perceptual_model!r}: has no effect without --perceptual; give both")
    perceptual = PerceptualConfig(kind=o.perceptual, model=o.perceptual_model).build()
    features = load_features(o.features).to(device) if o.features else None
    inputs = open_inputs(o.data, o.input, captioned=False)
    folder = Path(o.out)
    folder.mkdir(parents=True, exist_ok=True)  # before the work, so that an error costs no time
    source = inputs.held_out if o.split == "test" else inputs.source
    draws = PosteriorNoise(autoencoder.latent_channels, autoencoder.factor)
    images = ImageDataset(source, o.input.center_framing(o.resolution), o.seed, draws=draws)
    count = min(o.images, len(source))

    damaged: set[tuple[str, str]] = set()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, count, o.batch_size):
            batch = images.__getitems__(range(first, min(first + o.batch_size, count)))
            damaged.update(batch.damaged)
            yield batch.pixels, batch.drawn

    latents = LatentSums(autoencoder.latent_channels, device)
    scores = measure_reconstruction(
        autoencoder,
        batches(),
        perceptual=None if perceptual is None else perceptual.to(device),
        features=features,
        latents=latents,
    )
    report: dict[str, Any] = {
        "vae": scores,
        "channels": _channels(latents.health()),
        "settings": asdict(o) | {"images": count, "device": str(device)},
        "damaged": [list(pair) for pair in sorted(damaged)],
        "versions": versions(),
    }
    write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    shown = images.__getitems__(range(min(8, count, o.batch_size))).pixels
    save_sheet(reconstruction_sheet(autoencoder, shown), folder / "reconstructions.png")
    return report


def _channels(health: LatentHealth) -> list[dict[str, float]]:
    """Return the statistics of each latent channel by name."""
    names = ("mean", "std", "signal", "noise", "kl", "skewness", "kurtosis", "w1")
    rows = zip(*(getattr(health, name).tolist() for name in names), strict=True)
    return [
        dict(zip(names, row, strict=True))
        | {f"autocorrelation_{lag}": value for lag, value in zip(LAGS, auto, strict=True)}
        for row, auto in zip(rows, health.autocorrelation.T.tolist(), strict=True)
    ]
