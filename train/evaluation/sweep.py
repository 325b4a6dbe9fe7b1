"""Quality by guidance scale and number of steps."""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import UserError
from train.data.synthetic.shapes import Scene, parse_caption
from train.data.synthetic.shapes_checker import score_images
from train.evaluation.measures import caption_values, described, distribution_values
from train.evaluation.quality import Evaluation
from train.evaluation.results import Part, Plot, Series, Table
from train.evaluation.sheets import to_uint8

_LABELS = {
    "frechet_extrapolated": "Fréchet distance, extrapolated",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "clip_score": "CLIP score",
    "all_correct": "all attributes correct",
}


def sweep(e: Evaluation) -> list[Part]:
    """Generate images with each guidance scale and number of steps, and return a table and plots of their quality.

    All use the same captions and noise. Images of captions of the Shapes dataset are also read by its checker. Raises
    UserError if there is nothing to measure with.
    """
    o, options = e.o, e.o.sweep
    captions = e.captions(options.samples)
    try:
        scenes = [parse_caption(caption) for caption in captions]
    except ValueError:
        scenes = []
    if not (e.networks or scenes):
        raise UserError("--sweep.guidance and --sweep.steps need --features, e.g. the folder of a CLIP")
    reference = min(o.images, len(e.source))
    real = e.features(e.networks[:1], (batch.pixels for batch in e.batches(e.source, reference)))
    texts = [text.all(captions, o.batch_size) for text in e.texts[:1] if text is not None]
    scales, steps = options.guidance or (o.guidance_scale,), options.steps or (o.number_of_steps,)
    cells = {
        (scale, count): _cell(e, captions, scenes, real, texts, scale, count) for count, scale in product(steps, scales)
    }
    names = [name for name in _LABELS if name in next(iter(cells.values()))]
    note = f"{options.samples:,} images each, of the same captions and noise"
    note += f"; features: {described(e.networks[0])}, against {reference:,} real images." if real else "."
    rows = [[scale, count, *(cells[scale, count][name] for name in names)] for scale, count in cells]
    columns = ["guidance", "steps", *(_LABELS[name] for name in names)]
    table = Table(name="sweep", title="Quality by guidance and steps", columns=columns, rows=rows, note=note)
    return [table, *(_plot(name, cells, scales, steps, note) for name in names)]


def _cell(
    e: Evaluation,
    captions: list[str],
    scenes: Sequence[Scene],
    real: list[Tensor],
    texts: list[Tensor],
    scale: float,
    steps: int,
) -> dict[str, float | None]:
    """Return the quality of images of one guidance scale and number of steps."""
    folder = f"sweep/guidance-{scale:g}-steps-{steps}"
    generated = e.generated(folder, captions, guidance_scale=scale, num_inference_steps=steps)
    shown: list[NDArray[np.uint8]] = []  # of the Shapes dataset, whose images are small

    def batches() -> Iterator[Tensor]:
        for pixels in generated.batches():
            if scenes:
                shown.extend(to_uint8(pixels))
            yield pixels

    made = e.features(e.networks[:1], batches())
    values: dict[str, float | None] = {}
    for x, y in zip(real, made, strict=True):
        found = distribution_values(x, y, is_clip=False)
        found |= caption_values(y, texts[0]) if texts else {}
        values |= {name: value for name, (value, _) in found.items()}
    if scenes:
        values["all_correct"] = score_images(shown, scenes)["all"]
    return values


def _plot(
    name: str,
    cells: dict[tuple[float, int], dict[str, float | None]],
    scales: Sequence[float],
    steps: Sequence[int],
    note: str,
) -> Plot:
    """Plot one measure over the guidance scale, or over the steps if there is only one scale."""
    title = f"{_LABELS[name]} by guidance and steps"
    if len(scales) > 1:
        series = [Series(name=f"{n} steps", x=scales, y=[cells[s, n][name] for s in scales]) for n in steps]
        return Plot(name=f"sweep_{name}", title=title, x="guidance scale", y=_LABELS[name], series=series, note=note)
    (scale,) = scales
    line = Series(name=f"guidance {scale:g}", x=[float(n) for n in steps], y=[cells[scale, n][name] for n in steps])
    return Plot(name=f"sweep_{name}", title=title, x="steps", y=_LABELS[name], series=[line], note=note)
