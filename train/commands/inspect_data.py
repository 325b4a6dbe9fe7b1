"""Collect statistics of images and captions before training.

Each image is decoded once, by prefetching processes; about 300 bytes per image stay in memory. Two images look alike if
their difference hashes are close (Krawetz 2013: which of two neighbours is brighter, in a 9 × 8 grey thumbnail) and
their 8 × 8 colour thumbnails are close too: the hash alone can't distinguish flat images, or one shape in two colours.
"""

import contextlib
import hashlib
import io
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm
from transformers import CLIPTokenizer

from ldm.errors import UserError
from train.data.batches.images import Inputs
from train.data.images.crop import Framing, Size
from train.data.images.decode import FORMATS, DamagedImage
from train.data.sources.catalogue import Row
from train.data.sources.folders import Folder, find_metadata
from train.data.sources.splits import Source
from train.data.sources.tables import Table
from train.data.sources.tars import Tars
from train.data.store.prefetch import read_ahead
from train.engine.open_data import LEFT_OR_RIGHT

Report = dict[str, Any]

_SHAPES = ("3:1", "2:1", "3:2", "4:3", "1:1", "3:4", "2:3", "1:2", "1:3")  # width : height
_BATCH = 64
_READ = 1000  # captions tokenized at once
_NOISE = 2  # of 255: smaller differences between neighbours may be compression artefacts
_BITS = 4  # largest number of different hash bits between images that look alike
_CLOSE = 8  # of 255: the largest difference between the thumbnails of images that look alike
_NEIGHBOURS = 32  # number of neighbours, in the order of hashes, with which an image is compared
_ORIENTATION = 0x0112  # EXIF tag

_LISTED = 5


class Chosen:
    """Images of several sources in order, at most `most` of them, spread evenly (0: all)."""

    def __init__(self, sources: Sequence[Source], most: int = 0) -> None:
        self.sources = sources
        self.begins = np.cumsum([0, *map(len, sources)])
        self.whole = int(self.begins[-1])
        self.count = min(most or self.whole, self.whole)

    def __len__(self) -> int:
        return self.count

    def at(self, k: int) -> tuple[Source, int]:
        """Return the source of the k-th image, and the image's index in it."""
        index = k * self.whole // self.count
        side = int(np.searchsorted(self.begins, index, side="right")) - 1
        return self.sources[side], index - int(self.begins[side])

    def row(self, k: int) -> Row:
        source, index = self.at(k)
        return source[index]

    def name(self, k: int) -> str:
        return self.row(k).name

    def read(self, k: int) -> bytes:
        source, index = self.at(k)
        return source.read(index)

    def captions(self) -> Iterator[tuple[str, ...]]:
        """Return the non-empty captions of each image."""
        return (tuple(filter(None, self.row(k).captions)) for k in range(len(self)))

    def texts(self) -> Iterator[str]:
        """Return all non-empty captions."""
        return itertools.chain.from_iterable(self.captions())


class Inspected(NamedTuple):
    """Properties of an image file."""

    reason: str
    """Reason why the file can't be decoded; empty if it can."""
    digest: bytes = b""
    """SHA-256 of the file."""
    size: Size = (0, 0)
    """Width and height of the upright image."""
    looks: int = 0
    """Difference hash of the image."""
    reduced: bytes = b""
    """Bytes of the 8 × 8 colour thumbnail."""
    format: str = ""
    traits: tuple[str, ...] = ()


class ImageInspector:
    """Reader of the properties of image files."""

    def __init__(self, chosen: Chosen, framing: Framing) -> None:
        self.chosen, self.framing = chosen, framing

    def __getitems__(self, at: Sequence[int], /) -> list[Inspected]:
        return [self.look(k) for k in at]

    def look(self, k: int) -> Inspected:
        try:
            file = self.chosen.read(k)
            image = self.framing.load(file, self.chosen.name(k))
        except DamagedImage as error:
            return Inspected(error.reason)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(file), formats=FORMATS) as header:
                about = str(header.format), tuple(_traits(header))
        reduced = image.resize((8, 8), Image.Resampling.BOX).tobytes()
        return Inspected("", hashlib.sha256(file).digest(), image.size, difference_hash(image), reduced, *about)


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


class Images:
    """Properties of all chosen image files. Raises UserError if none can be read."""

    def __init__(self, chosen: Chosen, framing: Framing, workers: int) -> None:
        n = len(chosen)
        self.chosen, self.framing = chosen, framing
        self.digests, self.sizes = np.zeros(n, "S32"), np.zeros((n, 2), np.int32)
        self.looks, self.reduced = np.zeros(n, np.uint64), np.zeros((n, 8 * 8 * 3), np.uint8)
        self.formats, self.traits = Counter[str](), Counter[str]()
        self.damaged: list[tuple[str, str]] = []
        """(name, reason) pairs."""
        parts = [range(k, min(k + _BATCH, n)) for k in range(0, n, _BATCH)]
        with tqdm(total=n, unit=" images", leave=False, disable=None) as bar:
            for part, batch in zip(parts, read_ahead(ImageInspector(chosen, framing), parts, workers), strict=True):
                for k, seen in zip(part, batch, strict=True):
                    self._note(k, seen)
                bar.update(len(part))
        self.readable = np.flatnonzero(self.sizes[:, 0])
        if not len(self.readable):
            raise UserError(f"not one of {n:,} images can be read, e.g. {': '.join(self.damaged[0])}")

    def _note(self, k: int, seen: Inspected) -> None:
        if seen.reason:
            self.damaged.append((self.chosen.name(k), seen.reason))
            return
        self.digests[k], self.sizes[k] = seen.digest, seen.size
        self.looks[k], self.reduced[k] = seen.looks, np.frombuffer(seen.reduced, np.uint8)
        self.formats[seen.format] += 1
        self.traits.update(seen.traits)

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
        copies = [self.readable[group] for group in equal(self.digests[self.readable])]
        others = np.setdiff1d(self.readable, [k for group in copies for k in group[1:]])
        alike = [others[group] for group in look_alikes(self.looks[others], self.reduced[others])]
        return {"bytes": self._named(copies), "looks": self._named(alike)}

    def _named(self, groups: Sequence[NDArray[np.int64]]) -> list[dict[str, list[str]]]:
        named: list[dict[str, list[str]]] = []
        for group in sorted(group.tolist() for group in groups):
            named.append({"train": [], "test": []})
            for k in group:
                named[-1][self.chosen.at(k)[0].split].append(self.chosen.name(k))
        return named


def equal(keys: NDArray[Any]) -> list[NDArray[np.int64]]:
    """Return the indices of each key that occurs more than once."""
    order = np.argsort(keys, kind="stable")
    changes = np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1
    return [group for group in np.split(order, changes) if len(group) > 1]


def look_alikes(looks: NDArray[np.uint64], reduced: NDArray[np.uint8]) -> list[NDArray[np.int64]]:
    """Return the indices of images that look alike, by their hashes (n,) and thumbnails (n, 192).

    Images are compared if they are near in the order of the hashes, rotated by each multiple of eight bits: if few bits
    differ, two images are near in at least some of these orders.
    """
    found = []
    for turn in range(0, 64, 8):
        order = np.argsort(looks >> turn | looks << -turn % 64, kind="stable")
        for gap in range(1, _NEIGHBOURS + 1):
            pairs = np.stack((order[:-gap], order[gap:]))
            pairs = pairs[:, np.bitwise_count(looks[pairs[0]] ^ looks[pairs[1]]) <= _BITS]
            one, other = reduced[pairs].astype(np.int16)
            found.append(pairs[:, np.abs(one - other).max(1, initial=0) <= _CLOSE])
    edges = np.concatenate(found, 1)
    graph = coo_array((np.ones(edges.shape[1]), edges), (len(looks), len(looks)))
    return equal(connected_components(graph, directed=False)[1])


def data_report(inputs: Inputs) -> Report:
    """Return the dataset's form and the sizes of its splits."""
    match inputs.source.catalogue:
        case Folder() as found:
            metadata = find_metadata(found.folder)
            form = f"a folder with {metadata.name}" if metadata else "a folder of images"
        case Table():
            form = "a table"
        case Tars():
            form = "tar files"
        case _:
            form = "a stream, of which the first images are looked at"
    return {"form": form, "train": len(inputs.source), "test": len(inputs.held_out)}


def names_left_out(inputs: Inputs) -> list[tuple[str, str]]:
    """Return (name, reason) for each file that was found but is not used."""
    if inputs.stream is not None:
        return list(inputs.stream.left_out)
    return list(dict.fromkeys((*inputs.source.left_out, *inputs.held_out.left_out)))


def caption_report(chosen: Chosen, tokenizer: CLIPTokenizer, chunks: int = 1) -> Report:
    """Return statistics of all captions. Token counts include begin and end. chunks: windows per caption."""
    numbers = np.fromiter(map(len, chosen.captions()), np.int64, len(chosen))
    n, size = int(numbers.sum()), tokenizer.model_max_length - 2
    report: Report = {
        "count": n, "mean": n / len(chosen), "several": int((numbers > 1).sum()), "without": int((numbers == 0).sum())
    }  # fmt: skip
    if not n:
        return report
    hashes, tokens, sides, longest = np.zeros(n, np.int64), np.zeros(n, np.int64), 0, ""
    texts = chosen.texts()
    for first in range(0, n, _READ):
        some = list(itertools.islice(texts, _READ))
        whole = [text.encode(errors="replace").decode() for text in some]  # replaces lone surrogates
        ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        place = slice(first, first + len(some))
        hashes[place], tokens[place] = list(map(hash, some)), [len(row) + 2 for row in ids]
        sides += sum(bool(LEFT_OR_RIGHT.search(text)) for text in some)
        if tokens[place].max() > tokens[:first].max(initial=0):
            longest = some[int(tokens[place].argmax())]
    keys, times = np.unique(hashes, return_counts=True)
    often = {int(keys[k]): int(times[k]) for k in np.argsort(-times, kind="stable")[:3] if times[k] > 1}
    repeated = {text: often[hash(text)] for text in chosen.texts() if hash(text) in often}
    return report | {
        "distinct": len(keys),
        "most_frequent": dict(sorted(repeated.items(), key=lambda item: (-item[1], item[0]))),
        "median": int(np.median(tokens)),
        "95_percent": int(np.percentile(tokens, 95, method="inverted_cdf")),
        "longest": int(tokens.max()),
        "longest_caption": longest,
        "room": chunks * size + 2,
        "too_long": int((tokens > chunks * size + 2).sum()),
        "chunks_for_all": math.ceil((int(tokens.max()) - 2) / size),
        "left_or_right": sides,
    }


def duplicate_report(groups: Sequence[dict[str, list[str]]]) -> Report:
    """Return statistics of groups of duplicates, given as names by split."""
    return {
        "groups": len(groups),
        "copies": sum(len(group["train"]) + len(group["test"]) - 1 for group in groups),
        "leaks": sum(len(group["test"]) for group in groups if group["train"]),
        "first": list(groups[:_LISTED]),
    }


def list_report(names: Sequence[tuple[str, str]]) -> Report:
    """Return the number of (name, reason) pairs, and the first of them."""
    return {"count": len(names), "first": [list(pair) for pair in names[:_LISTED]]}
