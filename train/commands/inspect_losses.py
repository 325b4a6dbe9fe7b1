"""Find odd images and wrong captions in a dataset, by the losses of a model that was trained on it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.errors import RunError, UserError
from ldm.pipeline import LatentDiffusionPipeline
from train.commands.inspect import write_lines
from train.commands.main import require_at_least, require_folder, use_device
from train.config.reports import InspectLossesOptions
from train.data.batches.draws import PosteriorNoise
from train.data.batches.images import ImageDataset
from train.data.batches.records import ImageBatch
from train.data.store.atomic import write_text
from train.engine.open_data import open_inputs
from train.engine.provenance import versions
from train.evaluation.losses import ImageLosses, error_by_level, image_losses
from train.evaluation.report import Model, write_report
from train.evaluation.results import Part, Sheet, lists
from train.evaluation.sheets import in_rows, save_sheet, sheet, to_uint8

_COLUMNS = 8
_ODD = (
    "The images with the highest loss, mean over the noise levels, highest first: damaged, cropped or unusual images, "
    "or detailed ones. The number is the loss divided by the mean of all images."
)
_WRONG = (
    "The images whose caption helps the model least, wrong captions first. The number is the relative change of the "
    "error by the caption, compared with the empty caption at the same noise: above 0, the caption misleads the model."
)


def inspect_losses(o: InspectLossesOptions) -> dict[str, Any]:
    """Measure the images and return the report, which is also written to `o.out`, with two sheets and losses.jsonl."""
    for name, example in (("model", "runs/ldm/model-best"), ("data", "data/shapes")):
        if not getattr(o, name):
            raise UserError(f"--{name} is missing: give e.g. --{name} {example}")
    require_folder(o.out)
    require_at_least(0, o, "seed", "limit")
    require_at_least(1, o, "levels", "shown", "batch_size")
    pipe = LatentDiffusionPipeline.from_pretrained(o.model).to(use_device(o.device))
    inputs = open_inputs(o.data, o.input)
    if inputs.stream is not None:
        raise UserError(f"--data {o.data!r} is a stream, whose images can't be read again for the sheets: download it")
    folder = Path(o.out)
    folder.mkdir(parents=True, exist_ok=True)  # before the work, so that an error costs no time
    source = inputs.held_out if o.split == "test" else inputs.source
    side = pipe.backbone.sample_size[0] * pipe.autoencoder.factor
    draws = PosteriorNoise(pipe.autoencoder.latent_channels, pipe.autoencoder.factor)
    images = ImageDataset(source, o.input.center_framing(side), o.seed, shuffle=False, draws=draws)
    count = min(o.limit or len(source), len(source))
    chosen = [k * len(source) // count for k in range(count)]
    damaged: set[tuple[str, str]] = set()

    def batches() -> Iterator[ImageBatch[Tensor]]:
        for k in tqdm(range(0, count, o.batch_size), desc="measuring", unit="batch", dynamic_ncols=True):
            batch = images.__getitems__(chosen[k : k + o.batch_size])
            damaged.update(batch.damaged)
            if len((own := readable(batch)).captions):
                yield own

    found = image_losses(pipe, batches(), levels=o.levels, seed=o.seed)
    if not len(found.indices):
        raise RunError(f"none of the {count:,} images of {o.data} can be read, e.g. {': '.join(sorted(damaged)[0])}")
    names = [source[int(k)].name for k in found.indices]
    relative = found.loss / found.loss.mean()
    columns = (names, found.captions, found.loss.tolist(), found.harm.tolist())
    fields = ("file", "caption", "loss", "harm")
    write_lines(folder / "losses.jsonl", [dict(zip(fields, row, strict=True)) for row in zip(*columns, strict=True)])
    odd, wrong = (np.argsort(-values, kind="stable")[: o.shown] for values in (found.loss, found.harm))
    save_sheet(_sheet(images, found, names, odd, [f"{v:.2f}×" for v in relative]), folder / "odd_images.png")
    save_sheet(_sheet(images, found, names, wrong, [f"{v:+.1%}" for v in found.harm]), folder / "wrong_captions.png")
    parts: list[Part] = [
        Sheet(name="odd_images", title="Images with the highest loss", file="odd_images.png", note=_ODD),
        Sheet(name="wrong_captions", title="Possibly wrong captions", file="wrong_captions.png", note=_WRONG),
        error_by_level(found, "the inspected images"),
    ]
    report = {"images": len(names), "damaged": [list(pair) for pair in sorted(damaged)], **lists(parts)}
    report |= {"settings": asdict(o), "versions": versions()}
    write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_report([Model(o.data, report, folder)], folder / "report.html", f"Losses of the images in {o.data}")
    report["wrong"] = [{"file": names[k], "caption": found.captions[k], "harm": float(found.harm[k])} for k in wrong]
    return report


def readable(batch: ImageBatch[Tensor]) -> ImageBatch[Tensor]:
    """Return a batch in order without the images that replace unreadable ones."""
    own = (batch.index == batch.position).nonzero().flatten()
    return ImageBatch(
        position=batch.position[own],
        index=batch.index[own],
        pixels=batch.pixels[own],
        captions=[batch.captions[k] for k in own.tolist()],
        drawn=batch.drawn[own],
    )


def _sheet(
    images: ImageDataset[Tensor],
    found: ImageLosses,
    names: Sequence[str],
    rows: NDArray[np.int64],
    numbers: Sequence[str],
) -> Image.Image:
    """Draw the images of these rows, each above its name, its number and its caption."""
    pixels = images.__getitems__(found.indices[rows]).pixels
    captions = [f"{Path(names[k]).name} {numbers[k]} {found.captions[k]}" for k in rows.tolist()]
    return sheet(in_rows(list(to_uint8(pixels)), _COLUMNS), captions)
