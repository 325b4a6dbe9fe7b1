"""Measure how often edits of Shapes images follow the prompt: inpainting, image to image, and both in half precision.

    python benchmarks/editing.py --model runs/demo/model --data data/shapes --out out/editing

Inpainting adds a small object inside a box, away from the one object of a test image ("a small red star above …");
image to image asks for the same object on another background. A checker without learned parts reads the results. The
script prints tables and writes them to editing.json with sheets of examples. Four minutes on one core for two models.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from scipy import ndimage

from ldm.errors import UserError
from ldm.pipeline import LatentDiffusionPipeline
from ldm.samplers import SamplerKind
from train.commands.main import command
from train.config.load import overlay
from train.config.sampling import SamplingOptions
from train.data.batches.images import ImageDataset
from train.data.images.crop import Framing
from train.data.sources.splits import open_source
from train.data.synthetic.shapes import (
    BACKGROUNDS,
    COLOURS,
    GAP,
    HELD_OUT,
    SHAPES,
    Box,
    Object,
    Relation,
    Scene,
    parse_caption,
)
from train.data.synthetic.shapes_checker import ATTRIBUTES, FoundObject, read_scene
from train.engine.precision import DTYPES
from train.engine.provenance import versions
from train.evaluation.sheets import sheet, to_uint8

RED_STAR = Object("star", "red", "small")
BOX_SIDES = (0.36, 0.5)  # of the image's side; the largest small object needs 0.3
STRENGTHS = (0.5, 0.6, 0.7, 0.8)
SAMPLERS: tuple[SamplerKind, ...] = ("dpmpp_2m", "dpmpp_2m_sde")  # for inpainting, where noise drawn at each step helps
NEAR = 0.1  # of the side: an object that moved no farther counts as in place
SHOWN = 10  # examples on a sheet
Images = NDArray[np.float32]
"""(n, side, side, 3) in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """Measure the share of edits of Shapes images that follow the prompt."""

    model: str = "runs/demo/model"
    """Folder of a model trained on the Shapes dataset."""
    inpaint_model: str = ""
    """Folder of a model trained to inpaint, for comparison."""
    data: str = "data/shapes"
    """Folder of the Shapes dataset."""
    out: str = "out/editing"
    """Folder for editing.json and the sheets."""
    images: int = 200
    """Number of test images per edit."""
    seed: int = 0
    """Seed of boxes and prompts; image k has the noise of seed + k."""
    batch_size: int = 50
    """Images generated at once."""


@dataclass(frozen=True)
class Edit:
    """Image of one object, and the requested edit."""

    image: NDArray[np.uint8]
    """(side, side, 3)."""
    before: Scene
    after: Scene
    """Requested scene: its caption is the prompt, and the object that inpainting adds is its first object."""
    box: Box | None = None
    """Region to inpaint; None: the whole image."""

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Mask of the edited region (side, side, 1)."""
        rows, columns = np.indices(self.image.shape[:2])[..., None]
        if self.box is None:
            return np.ones_like(rows, bool)
        left, top, right, bottom = self.box
        return (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)


def given_images(data: str, side: int) -> list[Edit]:
    """Return the test images of one object, each as an edit that requests no change."""
    if not (Path(data) / "shapes.json").is_file():
        raise UserError(f"--data {data!r}: must be a Shapes dataset; write one with scripts/make_dataset.py shapes")
    dataset = ImageDataset(open_source(data, "test"), Framing(resolution=side), 0, shuffle=False)
    batch = dataset.__getitems__(range(len(dataset.source)))
    scenes = map(parse_caption, batch.captions)
    pairs = zip(to_uint8(batch.pixels), scenes, strict=True)
    return [Edit(image, scene, scene) for image, scene in pairs if len(scene.objects) == 1]


def to_inpaint(given: Sequence[Edit], count: int, rng: Generator, choose: Callable[[], Object]) -> list[Edit]:
    """Return `count` edits that add the object of `choose()` inside a box, placed at random where it fits."""
    edits = []
    for edit in given:
        side, thing = len(edit.image), choose()
        least, most = (round(share * side) for share in BOX_SIDES)
        h, w = rng.integers(least, most, size=2, endpoint=True).tolist()
        taken = (edit.image != np.array(BACKGROUNDS[edit.before.background], np.uint8)).any(-1)
        near = ndimage.binary_dilation(taken, np.ones((3, 3)), round(GAP * side))
        corners = np.argwhere(~sliding_window_view(near, (h, w)).any((-2, -1)))
        if thing == edit.before.objects[0] or not len(corners):
            continue
        top, left = corners[rng.integers(len(corners))].tolist()
        y, x = ndimage.center_of_mass(taken)
        relation = direction(left + (w - 1) / 2 - x, top + (h - 1) / 2 - y)
        after = replace(edit.before, objects=(thing, *edit.before.objects), relation=relation)
        edits.append(replace(edit, after=after, box=Box(left, top, left + w, top + h)))
    if len(edits) < count:
        raise UserError(f"--images {count}: must be at most {len(edits)}, the images with room for another object")
    return edits[:count]


def direction(right: float, down: float) -> Relation:
    """Return the relation of an object to another, given its offset to the right and down."""
    if abs(right) > abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"


def to_recolour(given: Sequence[Edit], count: int, rng: Generator) -> list[Edit]:
    """Return `count` edits that change the background."""
    if len(given) < count:
        raise UserError(f"--images {count}: must be at most {len(given)}, the test images of one object in --data")
    others = [[name for name in BACKGROUNDS if name != edit.before.background] for edit in given[:count]]
    return [
        replace(edit, after=replace(edit.before, background=names[rng.integers(len(names))]))
        for edit, names in zip(given, others, strict=False)
    ]


def generate(pipe: LatentDiffusionPipeline, edits: Sequence[Edit], o: Options, **how: Any) -> Images:
    """Return the edited images; with `from_image=False`, images generated from noise alone."""
    generated, from_image = [], how.pop("from_image", True)
    for first in range(0, len(edits), o.batch_size):
        part = edits[first : first + o.batch_size]
        if from_image:
            how["image"] = np.stack([edit.image for edit in part]) / np.float32(255)
            if part[0].box is not None:
                how["mask_image"] = np.stack([edit.mask for edit in part])
        generators = [torch.Generator().manual_seed(o.seed + first + k) for k in range(len(part))]
        prompts = [edit.after.caption for edit in part]
        arguments: dict[str, Any] = {**o.sampling(), **how}
        images = pipe(prompts, generator=generators, output_type="np", **arguments).images
        generated.append(np.asarray(images))
    return np.concatenate(generated)


def eight_bits(images: Images) -> NDArray[np.uint8]:
    return (images * 255).round().astype(np.uint8)


def matches(found: FoundObject, thing: Object) -> bool:
    return all(getattr(found, name) == getattr(thing, name) for name in ATTRIBUTES)


def check_inpainting(image: NDArray[np.uint8], edit: Edit) -> dict[str, bool]:
    """Check the attributes of the new object in the box, and that the rest is unchanged. image: (side, side, 3)."""
    assert edit.box is not None
    side, (thing, other) = len(image), edit.after.objects
    left, top, right, bottom = (edge / side for edge in edit.box)
    objects = read_scene(image).objects
    inside = [f for f in objects if left <= f.x < right and top <= f.y < bottom]
    kept = ~edit.mask[..., 0]
    passed = {name: any(getattr(f, name) == getattr(thing, name) for f in inside) for name in ATTRIBUTES}
    passed["object"] = any(matches(f, thing) for f in inside)
    passed["two"] = len(objects) == 2
    passed["other"] = any(matches(f, other) for f in objects if f not in inside)
    passed["outside"] = bool((image == edit.image)[kept].all())
    return passed | {"all": all(passed.values())}


def check_background(image: NDArray[np.uint8], edit: Edit) -> dict[str, bool]:
    """Check whether the background follows the prompt and the object is unchanged. image: (side, side, 3)."""
    before, found = read_scene(edit.image).objects[0], read_scene(image)
    passed = {"background": found.background == edit.after.background}
    passed["object"] = len(found.objects) == 1 and matches(found.objects[0], edit.before.objects[0])
    moved = [np.hypot(f.x - before.x, f.y - before.y) for f in found.objects]
    passed["place"] = passed["object"] and bool(moved[0] <= NEAR)
    return passed | {"all": all(passed.values())}


Check = Callable[[NDArray[np.uint8], Edit], dict[str, bool]]


def shares(check: Check, images: Images, edits: Sequence[Edit]) -> dict[str, float]:
    """Return the share of images that pass each check."""
    passed = [check(*pair) for pair in zip(eight_bits(images), edits, strict=True)]
    return {name: round(float(np.mean([t[name] for t in passed])), 3) for name in passed[0]}


def differences(images: Images, exact: Images) -> dict[str, float | bool]:
    """Return the differences of images in two precisions, in levels of 255: of all values, and per image."""
    levels = 255 * np.abs(images - exact)
    return {
        "finite": bool(np.isfinite(images).all()),
        "mean": round(float(levels.mean()), 2),
        "max": round(float(levels.max()), 1),
        "median image": round(float(np.median(levels.mean((1, 2, 3)))), 2),
        "worst image": round(float(levels.mean((1, 2, 3)).max()), 2),
    }


def show(title: str, table: dict[str, dict[str, Any]]) -> None:
    """Print a table, one row per entry."""
    width = max(map(len, table))
    columns = list(next(iter(table.values())))
    print(f"\n{title}\n{'':{width}}  {'  '.join(columns)}")
    for name, row in table.items():
        print(f"{name:{width}}  {'  '.join(f'{row[c]!s:>{len(c)}}' for c in columns)}", flush=True)


def marked(edit: Edit) -> NDArray[np.uint8]:
    """Return the image with its box shaded."""
    return edit.image if edit.box is None else np.where(edit.mask, edit.image // 2 + 64, edit.image)


def save_sheet(path: Path, edits: Sequence[Edit], generated: Sequence[Images]) -> None:
    """Save a sheet: a row of the given images, the prompts, and a row of results for each method."""
    captions = [edit.after.caption for edit in edits[:SHOWN]]
    rows = [[marked(edit) for edit in edits[:SHOWN]], *(list(eight_bits(p[:SHOWN])) for p in generated)]
    sheet(rows, captions).save(path)


@command
def main() -> None:
    o = overlay(Options, Options())
    if o.images < 1 or o.batch_size < 1 or o.seed < 0:
        raise UserError(f"--images {o.images} --batch-size {o.batch_size} --seed {o.seed}: must be at least 1, 1 and 0")
    rng = default_rng(o.seed)
    models = {"blending": o.model} | ({"trained to inpaint": o.inpaint_model} if o.inpaint_model else {})
    pipes = {name: LatentDiffusionPipeline.from_pretrained(folder) for name, folder in models.items()}
    pipe, out = pipes["blending"], Path(o.out)
    own = pipe.process.sampler
    samplers, o = SAMPLERS if own in SAMPLERS else (own,), o.for_sampler(own)
    given = given_images(o.data, pipe.backbone.sample_size[0] * pipe.autoencoder.factor)
    out.mkdir(parents=True, exist_ok=True)
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    small = [Object(shape, colour, "small") for colour, shape in pairs]
    tasks = {
        "a small red star": to_inpaint(given, o.images, rng, lambda: RED_STAR),
        "any small object": to_inpaint(given, o.images, rng, lambda: small[rng.integers(len(small))]),
    }
    report: dict[str, Any] = {"options": asdict(o), "versions": versions()}
    report["red star held out of training"] = ("red", "star") in HELD_OUT
    print(f"a red star is {'' if report['red star held out of training'] else 'not '}held out of training")

    report["inpainting"] = {}
    for what, edits in tasks.items():
        generated = {
            f"{name}, {sampler}": generate(pipe, edits, o, sampler=sampler)
            for name, pipe in pipes.items()
            for sampler in samplers
        }
        table = {f"{what}, {name}": shares(check_inpainting, p, edits) for name, p in generated.items()}
        show("Inpainting: shares correct", table)
        report["inpainting"] |= table
        save_sheet(out / f"inpainting-{what.rpartition(' ')[2]}.png", edits, list(generated.values()))

    edits = to_recolour(given, o.images, rng)
    by_strength = {s: generate(pipe, edits, o, strength=s) for s in STRENGTHS}
    report["image to image"] = {f"strength {s}": shares(check_background, p, edits) for s, p in by_strength.items()}
    # A black background inverts objects in the autoencoder's latents and dominates the result: counted separately.
    for black in (True, False):
        which = [k for k, e in enumerate(edits) if black == ("black" in (e.before.background, e.after.background))]
        if which:
            chosen = shares(check_background, by_strength[0.6][which], [edits[k] for k in which])
            report["image to image"][f"strength 0.6, {'to or from' if black else 'without'} black"] = chosen
    show("Image to image: shares correct", report["image to image"])
    save_sheet(out / "img2img.png", edits, list(by_strength.values()))

    some = {"text to image": edits, "image to image": edits, "inpainting": tasks["a small red star"]}
    how: dict[str, dict[str, Any]] = {"text to image": {"from_image": False}, "image to image": {"strength": 0.6}}
    made: dict[str, dict[str, Images]] = {what: {} for what in some}
    for precision in ("fp32", "bf16", "fp16"):
        pipe = LatentDiffusionPipeline.from_pretrained(o.model).to(dtype=DTYPES[precision])
        for what in some:
            made[what][precision] = generate(pipe, some[what][: o.batch_size], o, **how.get(what, {}))
    report["precision"] = {
        f"{what}, {precision}": differences(images, by_precision["fp32"])
        for what, by_precision in made.items()
        for precision, images in by_precision.items()
        if precision != "fp32"
    }
    show("Against fp32, in levels of 255", report["precision"])
    save_sheet(out / "precision.png", edits, list(made["image to image"].values()))
    (out / "editing.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
