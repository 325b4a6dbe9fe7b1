"""Composition, measured on the Emoji dataset in styles: does a model draw a concept in a style it never saw it in?

The right image of a held-out pair of concept and style exists. A generated image is compared with it and with others:

    concept_100  share of images nearer to the right image than to 99 other concepts of the same style
    concept_all  the same among all images of the dataset, of all splits and styles
    style        share of images nearer to the right image than to the concept's images in all other styles
    psnr         peak signal-to-noise ratio to the right image, in dB

The same numbers are given for copying, i.e. for the concept's training image that is nearest to the right one, and for
chance. A model that only knows the training images can't do better than copying.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import UserError
from ldm.files import open_regular
from train.data.order.permutation import choose
from train.data.order.rng import Purpose, generator
from train.data.sources.splits import Source, find_splits
from train.data.synthetic.emoji_styles import ABOUT, SPLITS, Split
from train.evaluation.features import PixelFeatures
from train.evaluation.measures import described
from train.evaluation.neighbours import BLOCK, squared_distances
from train.evaluation.quality import Evaluation
from train.evaluation.results import Part, Sheet, Table
from train.evaluation.sheets import in_rows, save_sheet, sheet, to_uint8

_OTHERS = 99  # other images of the same style
_SHOWN = 16  # pairs of images on a sheet
_TITLES: dict[Split, str] = {
    "train": "concept and style seen together in training",
    "test": "held-out pair of concept and style",
    "concepts": "held-out concept",
}


class Labels(NamedTuple):
    """Labels of all images of a dataset, each (n,)."""

    emoji: NDArray[np.int64]
    style: NDArray[np.int64]
    training: NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """Shares of correct images, see the top of this file."""

    concept_100: float
    concept_all: float
    style: float | None
    """None if no concept has several styles."""


def retrieval(made: Tensor, right: Sequence[int], features: Tensor, labels: Labels, seed: int) -> Scores:
    """Return the scores of images with features `made` (m, d), whose right images are `right` (m,) of all (n, d).

    An image counts as correct only if the right one is nearer than each of the others, so that equal features are
    errors. The 99 others are drawn by seed and right image, so they are the same for all models.
    """
    centre = features.mean(0)
    made, features = made - centre, features - centre
    hundred, everything, styles = [], [], []
    for first in range(0, len(made), BLOCK):
        distances = squared_distances(made[first : first + BLOCK], features).numpy()
        for row, index in zip(distances, right[first : first + BLOCK], strict=True):
            nearer = row <= row[index]
            nearer[index] = False
            hundred.append(not nearer[_others(index, labels, seed)].any())
            everything.append(not nearer.any())
            same = labels.emoji == labels.emoji[index]
            if same.sum() > 1:
                styles.append(not nearer[same].any())
    return Scores(float(np.mean(hundred)), float(np.mean(everything)), float(np.mean(styles)) if styles else None)


def chance(right: Sequence[int], labels: Labels) -> Scores:
    """Return the scores of an image that is equally near to all."""
    sizes = [(labels.emoji == labels.emoji[index]).sum() for index in right]
    hundreds = [min(int((labels.style == labels.style[index]).sum()), _OTHERS + 1) for index in right]
    several = [1 / size for size in sizes if size > 1]
    return Scores(
        float(np.mean([1 / n for n in hundreds])), 1 / len(labels.emoji), float(np.mean(several)) if several else None
    )


def _others(index: int, labels: Labels, seed: int) -> NDArray[np.int64]:
    """Return the other images of the same style with which an image is compared."""
    candidates = np.flatnonzero(labels.style == labels.style[index])
    candidates = candidates[candidates != index]
    random = generator(seed, Purpose.VALIDATION, index)
    return candidates[random.permutation(len(candidates))[:_OTHERS]]


def copies(right: Sequence[int], features: Tensor, labels: Labels) -> list[int]:
    """Return for each image the training image that shows the same concept in another style and is nearest to it.

    If there is none, it is the nearest training image of the same style.
    """
    found = []
    for index in right:
        same = labels.training & (labels.emoji == labels.emoji[index])
        same[index] = False
        if not same.any():
            same = labels.training & (labels.style == labels.style[index])
            same[index] = False
        candidates = torch.from_numpy(np.flatnonzero(same))
        if not len(candidates):
            raise UserError(f"{ABOUT}: the dataset has no training images of a style: make it again")
        distances = (features[candidates] - features[index]).square().sum(1)
        found.append(int(candidates[distances.argmin()]))
    return found


def psnr(images: Sequence[NDArray[np.uint8]], right: Sequence[NDArray[np.uint8]]) -> float | None:
    """Return the mean peak signal-to-noise ratio of 8-bit images, in dB; None if all are equal to the right ones.

    An error of less than half a step of 8 bits counts as that, so that one equal image doesn't make the mean infinite.
    """
    errors = [np.square(a.astype(float) - b).mean() for a, b in zip(images, right, strict=True)]
    return float(np.mean([-10 * np.log10(max(error, 0.25) / 255**2) for error in errors])) if any(errors) else None


@dataclass
class StyledImages:
    """All images of a dataset in styles, of all splits in turn."""

    sources: Sequence[Source]
    rows: list[tuple[Source, int]] = field(default_factory=list)
    """Source and index of each image."""

    def __post_init__(self) -> None:
        self.rows = [(source, k) for source in self.sources for k in range(len(source))]

    def __len__(self) -> int:
        return len(self.rows)

    def caption(self, k: int) -> str:
        source, index = self.rows[k]
        return source[index].captions[0]

    def indices(self, split: Split) -> range:
        """Return the images of a split."""
        ends = np.cumsum([0, *map(len, self.sources)])
        at = SPLITS.index(split)
        return range(int(ends[at]), int(ends[at + 1]))

    def pixels(self, e: Evaluation, indices: Sequence[int]) -> Tensor:
        """Return images (b, 3, h, w) in [−1, 1]."""
        framing, found = e.framing, []
        for k in indices:
            source, index = self.rows[k]
            image = framing.load(source.read(index), source[index].name)
            found.append(framing.apply(image, framing.square, (0.5, 0.5), False))
        return torch.stack(found)

    def batches(self, e: Evaluation) -> Iterator[Tensor]:
        """Yield all images in order."""
        for first in range(0, len(self), e.o.batch_size):
            yield self.pixels(e, range(first, min(first + e.o.batch_size, len(self))))


def open_styles(e: Evaluation) -> tuple[StyledImages, Labels]:
    """Open all splits of the dataset with their labels. Raises UserError if metadata lacks them."""
    columns = e.o.input.columns(True)
    splits = find_splits(e.o.data, columns, ("concepts",))
    if missing := [name for name in SPLITS if name not in splits]:
        raise UserError(f"--data {e.o.data}: has {ABOUT}, but no folder {missing[0]}: make the dataset again")
    images = StyledImages([Source(splits[name]()) for name in SPLITS])
    emoji: dict[str, int] = {}
    styles: dict[str, int] = {}
    labels: list[tuple[int, int]] = []
    for name, source in zip(SPLITS, images.sources, strict=True):
        found = _metadata(Path(e.o.data) / name / "metadata.jsonl")
        for row in source:
            text, style = found.get(row.name, ("", ""))
            labels.append((emoji.setdefault(text, len(emoji)), styles.setdefault(style, len(styles))))
    array = np.array(labels, np.int64)
    return images, Labels(array[:, 0], array[:, 1], np.arange(len(images)) < len(images.sources[0]))


def _metadata(path: Path) -> dict[str, tuple[str, str]]:
    """Return the emoji and the style of each file."""
    try:
        with open_regular(path) as lines:
            rows = [json.loads(line) for line in lines]
        return {row["file_name"]: (row["emoji"], row["style"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: must have file_name, emoji and style in each row: make the dataset again") from None


def measure_styles(e: Evaluation) -> tuple[dict[str, Any], list[Part]]:
    """Generate images of --prompts images of each split, and return their scores, tables and sheets."""
    images, labels = open_styles(e)
    networks = [PixelFeatures(e.framing.resolution), *e.networks]
    features = e.features(networks, images.batches(e))
    report: dict[str, Any] = {}
    parts: list[Part] = []
    for split in SPLITS:
        members = images.indices(split)
        right = [members[k] for k in choose(min(e.o.prompts, len(members)), len(members), e.o.seed)]
        copied = copies(right, features[0], labels)
        generated = e.generated(f"styles_{split}", [images.caption(k) for k in right])
        made = e.features(networks, generated.batches())
        own, true = [generated[k] for k in range(len(right))], to_uint8(images.pixels(e, right))
        found: dict[str, Any] = {"prompts": len(right), "psnr": psnr(own, list(true))}
        if split != "train":
            found["psnr_of_copying"] = psnr(list(to_uint8(images.pixels(e, copied))), list(true))
        for network, all_features, x in zip(networks, features, made, strict=True):
            scores = {"model": retrieval(x, right, all_features, labels, e.o.seed)}
            if split != "train":
                scores["copying"] = retrieval(all_features[copied], right, all_features, labels, e.o.seed)
            scores["chance"] = chance(right, labels)
            found[network.name] = {name: vars(score) for name, score in scores.items()}
        report[split] = found
        parts.append(_sheet(e, split, own, list(true), generated.captions))
    return report, [*(_table(report, network.name, described(network)) for network in networks), *parts]


def _table(report: dict[str, Any], network: str, title: str) -> Table:
    rows: list[list[float | str | None]] = []
    for split, found in report.items():
        psnrs = {"model": found["psnr"], "copying": found.get("psnr_of_copying")}
        for name, scores in found[network].items():
            rows.append([f"{_TITLES[split]}: {name}", *scores.values(), psnrs.get(name)])  # type: ignore[index]
    return Table(
        name=f"styles_{network}",
        title=f"Composition of concepts and styles, in the features {title}",
        columns=["", "right among 100 of its style", "right among all", "right style", "PSNR (dB)"],
        rows=rows,
        note="Share of the images that are nearer to the right image than to each of the others. Copying: the concept's"
        " training image nearest to the right one, or the nearest of the style if there is none.",
    )


def _sheet(
    e: Evaluation,
    split: Split,
    own: Sequence[NDArray[np.uint8]],
    true: Sequence[NDArray[np.uint8]],
    captions: Sequence[str],
) -> Sheet:
    pairs = [image for both in zip(own, true, strict=True) for image in both][: 2 * _SHOWN]
    texts = [text for caption in captions[:_SHOWN] for text in (f"generated: {caption}", "right image")]
    save_sheet(sheet(in_rows(pairs, 8), texts), Path(e.o.out) / f"styles_{split}.png")
    return Sheet(
        name=f"styles_{split}",
        title=f"First images, {_TITLES[split]}",
        file=f"styles_{split}.png",
        note="Pairs of a generated image and, right of it, the right one; not selected.",
    )
