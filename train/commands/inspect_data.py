"""Collect statistics of images and captions before training.

Each image is decoded once, by prefetching processes; about 300 bytes per image stay in memory. Two images look alike if
their difference hashes are close (Krawetz 2013: each bit compares the brightness of two neighbouring pixels in a 9 × 8
grey thumbnail) and their 8 × 8 colour thumbnails are close too. The hash alone can't distinguish flat images, or the
same shape in two colours.
"""

import contextlib
import hashlib
import io
import itertools
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from ldm.errors import UserError
from ldm.libraries import CLIPTokenizer
from train.data.batches.images import Inputs
from train.data.images.crop import Framing, Size
from train.data.images.decode import FORMATS, DamagedImage
from train.data.sources.caption_columns import SeveralColumns
from train.data.sources.catalogue import Row
from train.data.sources.folders import Folder
from train.data.sources.splits import Source
from train.data.sources.tables import Table
from train.data.sources.tars import Tars
from train.data.store.prefetch import read_ahead
from train.engine.open_data import LEFT_OR_RIGHT

Report = dict[str, Any]

_SHAPES = ("3:1", "2:1", "3:2", "4:3", "1:1", "3:4", "2:3", "1:2", "1:3")  # width : height
_IMAGE_BATCH = 64  # images read at once
_CAPTION_BATCH = 1000  # captions tokenized at once
_NOISE = 2  # of 255: smaller differences between neighbouring pixels may be compression artefacts
_MAX_BITS = 4  # largest number of different hash bits between images that look alike
_MAX_DIFFERENCE = 8  # of 255: the largest difference between the thumbnails of images that look alike
_NEIGHBOURS = 32  # number of neighbours, in the order of hashes, with which an image is compared
_ORIENTATION = 0x0112  # EXIF tag
SHORT = 8  # words: captions with fewer count as short
_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|\w+(?:['’-]\w+)*")
"""A word; in scripts without spaces, a character."""
_EXAMPLES = 5  # names or groups listed in the report


class Selection:
    """Images of several sources in order, at most `most` of them, spread evenly (0: all)."""

    def __init__(self, sources: Sequence[Source], most: int = 0) -> None:
        self.sources = sources
        self.starts = np.cumsum([0, *map(len, sources)])
        self.total = int(self.starts[-1])
        self.count = min(most or self.total, self.total)

    def __len__(self) -> int:
        return self.count

    def locate(self, k: int) -> tuple[Source, int]:
        """Return the source of the k-th image, and the image's index in it."""
        index = k * self.total // self.count
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.sources[number], index - int(self.starts[number])

    def row(self, k: int) -> Row:
        source, index = self.locate(k)
        return source[index]

    def name(self, k: int) -> str:
        return self.row(k).name

    def read(self, k: int) -> bytes:
        source, index = self.locate(k)
        return source.read(index)

    def captions(self) -> Iterator[tuple[str, ...]]:
        """Yield the non-empty captions of each image."""
        return (tuple(filter(None, self.row(k).captions)) for k in range(len(self)))

    def texts(self) -> Iterator[str]:
        """Yield all non-empty captions."""
        return itertools.chain.from_iterable(self.captions())


class ImageProperties(NamedTuple):
    """Properties of an image file."""

    reason: str
    """Reason why the file can't be decoded; empty if it can."""
    digest: bytes = b""
    """SHA-256 of the file."""
    size: Size = (0, 0)
    """Width and height of the upright image."""
    hash: int = 0
    """Difference hash of the image."""
    thumbnail: bytes = b""
    """Bytes of the 8 × 8 colour thumbnail."""
    format: str = ""
    traits: tuple[str, ...] = ()


class ImageInspector:
    """Reader of the properties of image files."""

    def __init__(self, selection: Selection, framing: Framing) -> None:
        self.selection, self.framing = selection, framing

    def __getitems__(self, at: Sequence[int], /) -> list[ImageProperties]:
        return [self.inspect(k) for k in at]

    def inspect(self, k: int) -> ImageProperties:
        try:
            file = self.selection.read(k)
            image = self.framing.load(file, self.selection.name(k))
        except DamagedImage as error:
            return ImageProperties(error.reason)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(file), formats=FORMATS) as header:
                format, traits = str(header.format), tuple(_traits(header))
        return ImageProperties(
            reason="",
            digest=hashlib.sha256(file).digest(),
            size=image.size,
            hash=difference_hash(image),
            thumbnail=image.resize((8, 8), Image.Resampling.BOX).tobytes(),
            format=format,
            traits=traits,
        )


def difference_hash(image: Image.Image) -> int:
    """Return the 64-bit difference hash of an image, row by row."""
    grey = np.asarray(image.resize((9, 8), Image.Resampling.BOX).convert("L"), np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] - grey[:, :-1] > _NOISE).tobytes(), "big")


def _traits(header: Image.Image) -> Iterator[str]:
    if header.has_transparency_data:
        yield "with alpha"
    if header.mode == "CMYK":
        yield "CMYK"
    if header.mode in ("1", "L", "LA") or header.mode.startswith("I;16"):
        yield "greyscale"
    with contextlib.suppress(Exception):  # frames after the first may be broken
        if getattr(header, "is_animated", False):
            yield "animated"
    with contextlib.suppress(Exception):
        if Image.Image.getexif(header).get(_ORIENTATION, 1) != 1:  # the PNG class's own method would decode the image
            yield "turned by EXIF"


class InspectedImages:
    """Properties of all selected image files. Raises UserError if none can be read."""

    def __init__(
        self,
        selection: Selection,
        framing: Framing,
        workers: int,
        progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        """progress: called with the share of the images that are read, 0 to 1."""
        n = len(selection)
        self.selection, self.framing = selection, framing
        self.digests, self.sizes = np.zeros(n, "S32"), np.zeros((n, 2), np.int32)
        self.hashes, self.thumbnails = np.zeros(n, np.uint64), np.zeros((n, 8 * 8 * 3), np.uint8)
        self.formats, self.traits = Counter[str](), Counter[str]()
        self.damaged: list[tuple[str, str]] = []
        """(name, reason) pairs."""
        parts = [range(k, min(k + _IMAGE_BATCH, n)) for k in range(0, n, _IMAGE_BATCH)]
        with tqdm(total=n, unit=" images", leave=False, disable=None) as bar:
            for part, batch in zip(parts, read_ahead(ImageInspector(selection, framing), parts, workers), strict=True):
                for k, properties in zip(part, batch, strict=True):
                    self._add(k, properties)
                bar.update(len(part))
                progress((part[-1] + 1) / n)
        self.readable = np.flatnonzero(self.sizes[:, 0])
        if not len(self.readable):
            raise UserError(f"none of the {n:,} images can be read, e.g. {': '.join(self.damaged[0])}")

    def _add(self, k: int, properties: ImageProperties) -> None:
        if properties.reason:
            self.damaged.append((self.selection.name(k), properties.reason))
            return
        self.digests[k], self.sizes[k] = properties.digest, properties.size
        self.hashes[k], self.thumbnails[k] = properties.hash, np.frombuffer(properties.thumbnail, np.uint8)
        self.formats[properties.format] += 1
        self.traits.update(properties.traits)

    def report(self, resolution: int) -> Report:
        """Return statistics of the readable images. smaller: images whose shorter side is below the resolution."""
        sizes = self.sizes[self.readable]
        sizes = sizes[np.argsort(sizes.prod(1, dtype=np.int64), kind="stable")]
        sides, ratios = sizes.min(1), np.log(sizes[:, 0] / sizes[:, 1])
        known = np.log([int(shape[0]) / int(shape[2]) for shape in _SHAPES])
        shapes = np.bincount(np.abs(ratios[:, None] - known).argmin(1), minlength=len(known))
        return {
            "read": len(sizes),
            "smallest": sizes[0].tolist(),
            "median": sizes[len(sizes) // 2].tolist(),
            "largest": sizes[-1].tolist(),
            "median_side": int(np.median(sides)),
            "resolution": resolution,
            "smaller": int((sides < resolution).sum()),
            "shapes": dict(zip(_SHAPES, shapes.tolist(), strict=True)),
            "square": float((sides / sizes.max(1)).mean()),
            "formats": dict(self.formats.most_common()),
            "traits": dict(self.traits.most_common()),
        }

    def duplicates(self) -> dict[str, list[dict[str, list[str]]]]:
        """Return groups of equal files (bytes) and of different files that look alike (looks), as names by split."""
        copies = [self.readable[group] for group in equal_groups(self.digests[self.readable])]
        distinct = np.setdiff1d(self.readable, [k for group in copies for k in group[1:]])
        alike = [distinct[group] for group in look_alikes(self.hashes[distinct], self.thumbnails[distinct])]
        return {"bytes": self._named(copies), "looks": self._named(alike)}

    def _named(self, groups: Sequence[NDArray[np.int64]]) -> list[dict[str, list[str]]]:
        named: list[dict[str, list[str]]] = []
        for group in sorted(group.tolist() for group in groups):
            named.append({"train": [], "test": []})
            for k in group:
                named[-1][self.selection.locate(k)[0].split].append(self.selection.name(k))
        return named


def equal_groups(keys: NDArray[Any]) -> list[NDArray[np.int64]]:
    """Return the groups of indices that have the same key, without groups of one."""
    order = np.argsort(keys, kind="stable")
    changes = np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1
    return [group for group in np.split(order, changes) if len(group) > 1]


def look_alikes(hashes: NDArray[np.uint64], thumbnails: NDArray[np.uint8]) -> list[NDArray[np.int64]]:
    """Return the groups of indices of images that look alike, from their hashes (n,) and thumbnails (n, 192).

    The images are sorted eight times, by their hashes rotated by each multiple of eight bits. Only neighbours in one of
    these orders are compared: if few bits differ, two images are neighbours in at least some orders.
    """
    found = []
    for rotation in range(0, 64, 8):
        order = np.argsort(hashes >> rotation | hashes << -rotation % 64, kind="stable")
        for gap in range(1, _NEIGHBOURS + 1):
            pairs = np.stack((order[:-gap], order[gap:]))
            pairs = pairs[:, np.bitwise_count(hashes[pairs[0]] ^ hashes[pairs[1]]) <= _MAX_BITS]
            one, other = thumbnails[pairs].astype(np.int16)
            found.append(pairs[:, np.abs(one - other).max(1, initial=0) <= _MAX_DIFFERENCE])
    edges = np.concatenate(found, 1)
    graph = coo_array((np.ones(edges.shape[1]), edges), (len(hashes), len(hashes)))
    return equal_groups(connected_components(graph, directed=False)[1])


def data_report(inputs: Inputs) -> Report:
    """Return the dataset's form and the numbers of images in its splits."""
    catalogue = inputs.source.catalogue
    match catalogue.first if isinstance(catalogue, SeveralColumns) else catalogue:
        case Folder() as found:
            form = found.form
        case Table():
            form = "a table"
        case Tars():
            form = "tar files"
        case _:
            form = "a stream, of which the first images are inspected"
    notes = list(dict.fromkeys((*inputs.source.notes, *inputs.held_out.notes)))
    return {"form": form, "train": len(inputs.source), "test": len(inputs.held_out), "notes": notes}


def left_out_files(inputs: Inputs) -> list[tuple[str, str]]:
    """Return the (name, reason) of each file that is left out of the dataset."""
    if inputs.stream is not None:
        return list(inputs.stream.left_out)
    return list(dict.fromkeys((*inputs.source.left_out, *inputs.held_out.left_out)))


def caption_report(selection: Selection, tokenizer: CLIPTokenizer, chunks: int = 1) -> Report:
    """Return statistics of all captions. Token counts include begin and end. chunks: chunks per caption.

    `lengths` in the result is the number of captions with each number of tokens.
    """
    numbers = np.fromiter(map(len, selection.captions()), np.int64, len(selection))
    n, size = int(numbers.sum()), tokenizer.model_max_length - 2
    report: Report = {
        "count": n,
        "mean": n / len(selection),
        "several": int((numbers > 1).sum()),
        "without": int((numbers == 0).sum()),
    }
    if not n:
        return report
    hashes, tokens, left_or_right, longest = np.zeros(n, np.int64), np.zeros(n, np.int64), 0, ""
    words, distinct_words = np.zeros(n, np.int64), set[str]()
    texts = selection.texts()
    for first in range(0, n, _CAPTION_BATCH):
        batch = list(itertools.islice(texts, _CAPTION_BATCH))
        valid = [text.encode(errors="replace").decode() for text in batch]  # replaces lone surrogates
        ids = tokenizer(valid, add_special_tokens=False, verbose=False)["input_ids"]
        rows = slice(first, first + len(batch))
        hashes[rows], tokens[rows] = list(map(hash, batch)), [len(caption) + 2 for caption in ids]
        split = [_WORD.findall(text.lower()) for text in batch]
        words[rows] = list(map(len, split))
        distinct_words.update(*split)
        left_or_right += sum(bool(LEFT_OR_RIGHT.search(text)) for text in batch)
        if tokens[rows].max() > tokens[:first].max(initial=0):
            longest = batch[int(tokens[rows].argmax())]
    keys, counts = np.unique(hashes, return_counts=True)
    lengths, numbers_of = np.unique(tokens, return_counts=True)
    frequent = {int(keys[k]): int(counts[k]) for k in np.argsort(-counts, kind="stable")[:3] if counts[k] > 1}
    repeated = {text: frequent[hash(text)] for text in selection.texts() if hash(text) in frequent}
    shared = dict(zip(keys.tolist(), counts.tolist(), strict=True))
    return report | {
        "distinct": len(keys),
        "words": {
            "median": float(np.median(words)),
            "short": int((words < SHORT).sum()),
            "distinct": len(distinct_words),
            "shared": sum(all(shared[hash(text)] > 1 for text in texts) for texts in selection.captions() if texts),
        },
        "most_frequent": dict(sorted(repeated.items(), key=lambda item: (-item[1], item[0]))),
        "median": int(np.median(tokens)),
        "95_percent": int(np.percentile(tokens, 95, method="inverted_cdf")),
        "longest": int(tokens.max()),
        "lengths": dict(zip(map(str, lengths.tolist()), numbers_of.tolist(), strict=True)),
        "longest_caption": longest,
        "room": chunks * size + 2,
        "too_long": int((tokens > chunks * size + 2).sum()),
        "chunks_for_all": math.ceil((int(tokens.max()) - 2) / size),
        "left_or_right": left_or_right,
    }


def duplicate_report(groups: Sequence[dict[str, list[str]]]) -> Report:
    """Return statistics of groups of duplicates, which are given as names by split."""
    return {
        "groups": len(groups),
        "copies": sum(len(group["train"]) + len(group["test"]) - 1 for group in groups),
        "leaks": sum(len(group["test"]) for group in groups if group["train"]),
        "first": list(groups[:_EXAMPLES]),
    }


def list_report(names: Sequence[tuple[str, str]]) -> Report:
    """Return the number of (name, reason) pairs, and the first of them."""
    return {"count": len(names), "first": [list(pair) for pair in names[:_EXAMPLES]]}
