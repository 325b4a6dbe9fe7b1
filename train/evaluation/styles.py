"""Composition, measured on the Emoji dataset in styles: does a model draw a concept in a style it never saw it in?

The right image of a held-out pair of concept and style exists. A generated image is compared with it and with others:

    concept_100  share of images nearer to the right image than to 99 other concepts of the same style
    concept_all  the same among all images of the dataset, of all splits and styles
    style        share of images nearer to the right image than to the concept's images in all other styles
    psnr         peak signal-to-noise ratio to the right image, in dB
    lpips        LPIPS to the right image, if the weights of its AlexNet or VGG16 are on this machine already

The same numbers are given for copying, i.e. for the concept's training image that is nearest to the right one, and for
chance. A model that only knows the training images can't do better than copying.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoencoder.perceptual import Backbone, Lpips, downloaded_weights
from ldm.errors import UserError
from ldm.files import open_regular
from train.data.images.crop import Framing
from train.data.order.permutation import choose
from train.data.sources.catalogue import Columns
from train.data.sources.splits import Source, find_splits
from train.data.synthetic.emoji_styles import ABOUT, SPLITS, Split
from train.engine.provenance import text_encoder_of
from train.evaluation.features import PixelFeatures
from train.evaluation.measures import described
from train.evaluation.quality import Evaluation
from train.evaluation.results import Part, Sheet, Table
from train.evaluation.retrieval import Labels, chance, copies, retrieval
from train.evaluation.sheets import in_rows, save_sheet, sheet, to_uint8

_BACKBONES: tuple[Backbone, ...] = ("alex", "vgg")
_SHOWN = 16  # pairs of images on a sheet
_TITLES: dict[Split, str] = {
    "train": "concept and style seen together in training",
    "test": "held-out pair of concept and style",
    "concepts": "held-out concept",
}


def psnr(images: Sequence[NDArray[np.uint8]], right: Sequence[NDArray[np.uint8]]) -> float | None:
    """Return the mean peak signal-to-noise ratio of 8-bit images, in dB; None if all are equal to the right ones.

    An error of less than half a step of 8 bits counts as that, so that one equal image doesn't make the mean infinite.
    """
    errors = [np.square(a.astype(float) - b).mean() for a, b in zip(images, right, strict=True)]
    return float(np.mean([-10 * np.log10(max(error, 0.25) / 255**2) for error in errors])) if any(errors) else None


def open_lpips() -> tuple[Lpips | None, str]:
    """Return LPIPS by a network whose weights were downloaded before, and its name; or None, and why it's left out."""
    files = {backbone: downloaded_weights(backbone) for backbone in _BACKBONES}
    backbone = next((name for name, file in files.items() if file.is_file()), None)
    if backbone is None:
        return None, f"LPIPS is left out, because neither {' nor '.join(map(str, files.values()))} exists."
    try:
        return Lpips(backbone, str(files[backbone])), f"LPIPS ({backbone})"
    except UserError as error:
        return None, f"LPIPS is left out: {error}."


def perceptual_distance(lpips: Lpips, made: Tensor, right: Tensor) -> float:
    """Return the mean LPIPS of images (n, 3, h, w) to the right ones."""
    pairs = zip(made.split(1), right.split(1), strict=True)
    return float(torch.stack([lpips(one, other) for one, other in pairs]).mean())


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

    def pixels(self, framing: Framing, indices: Sequence[int]) -> Tensor:
        """Return images (b, 3, h, w) in [−1, 1]."""
        found = []
        for k in indices:
            source, index = self.rows[k]
            image = framing.load(source.read(index), source[index].name)
            found.append(framing.apply(image, framing.square, (0.5, 0.5), False))
        return torch.stack(found)

    def batches(self, framing: Framing, size: int) -> Iterator[Tensor]:
        """Yield all images in order."""
        for first in range(0, len(self), size):
            yield self.pixels(framing, range(first, min(first + size, len(self))))


def open_styles(data: str, columns: Columns) -> tuple[StyledImages, Labels]:
    """Open all splits of the dataset with their labels. Raises UserError if metadata lacks them."""
    splits = find_splits(data, columns, ("concepts",))
    if missing := [name for name in SPLITS if name not in splits]:
        raise UserError(f"--data {data}: has {ABOUT}, but no folder {missing[0]}: make the dataset again")
    images = StyledImages([Source(splits[name]()) for name in SPLITS])
    emoji: dict[str, int] = {}
    styles: dict[str, int] = {}
    labels: list[tuple[int, int]] = []
    for name, source in zip(SPLITS, images.sources, strict=True):
        found = _metadata(Path(data) / name / "metadata.jsonl")
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
    images, labels = open_styles(e.o.data, e.o.input.columns(True))
    networks = [PixelFeatures(e.framing.resolution), *e.networks]
    features = e.features(networks, images.batches(e.framing, e.o.batch_size))
    lpips, about_lpips = open_lpips()
    report: dict[str, Any] = {}
    parts: list[Part] = []
    for split in SPLITS:
        members = images.indices(split)
        right = [members[k] for k in choose(min(e.o.prompts, len(members)), len(members), e.o.seed)]
        copied = copies(right, features[0], labels)
        generated = e.generated(f"styles_{split}", [images.caption(k) for k in right])
        made = e.features(networks, generated.batches())
        own, true = [generated[k] for k in range(len(right))], list(to_uint8(images.pixels(e.framing, right)))
        found: dict[str, Any] = {"prompts": len(right), **_distances(own, true, lpips)}
        if split != "train":
            of_copying = _distances(list(to_uint8(images.pixels(e.framing, copied))), true, lpips)
            found |= {f"{name}_of_copying": value for name, value in of_copying.items()}
        for network, all_features, x in zip(networks, features, made, strict=True):
            scores = {"model": retrieval(x, right, all_features, labels, e.o.seed)}
            if split != "train":
                scores["copying"] = retrieval(all_features[copied], right, all_features, labels, e.o.seed)
            scores["chance"] = chance(right, labels)
            found[network.name] = {name: vars(score) for name, score in scores.items()}
        report[split] = found
        parts.append(_sheet(e, split, own, true, generated.captions))
    own_clip = text_encoder_of(e.o.model)
    tables = []
    for network in networks:
        apart = "; trained together with the model's text encoder" if network.name == own_clip else ""
        tables.append(_table(report, network.name, described(network) + apart, about_lpips))
    return report, [*tables, *parts]


def _distances(
    images: Sequence[NDArray[np.uint8]], right: Sequence[NDArray[np.uint8]], lpips: Lpips | None
) -> dict[str, float | None]:
    """Return the mean distances of 8-bit images to the right ones."""
    found = {"psnr": psnr(images, right)}
    if lpips is not None:
        made, true = (torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2) / 127.5 - 1 for x in (images, right))
        found["lpips"] = perceptual_distance(lpips, made, true)
    return found


def _table(report: dict[str, Any], network: str, title: str, about_lpips: str) -> Table:
    measured = [name for name in ("psnr", "lpips") if name in report["test"]]
    rows: list[list[float | str | None]] = []
    for split, found in report.items():
        for name, scores in found[network].items():
            suffix = {"model": "", "copying": "_of_copying"}.get(name, "_of_chance")
            rows.append(
                [f"{_TITLES[split]}: {name}", *scores.values(), *(found.get(f"{d}{suffix}") for d in measured)]  # type: ignore[index]
            )
    columns = ["", "right among 100 of its style", "right among all", "right style", "PSNR (dB)"]
    return Table(
        name=f"styles_{network}",
        title=f"Composition of concepts and styles, in the features {title}",
        columns=[*columns, about_lpips] if "lpips" in measured else columns,
        rows=rows,
        note="Share of the images that are nearer to the right image than to each of the others. Copying: the concept's"
        " training image nearest to the right one, or the nearest of the style if there is none."
        + ("" if "lpips" in measured else f" {about_lpips}"),
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
