"""The datasets in a folder as the page shows them: search by caption, and small copies of images.

Only small copies are given to the page, decoded with the limits of training, never the files themselves.
"""

import json
import random
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ldm.errors import UserError, printable
from ldm.files import read_regular
from train.config.data import SourceConfig
from train.data.images.decode import DamagedImage
from train.data.sources.splits import Source
from train.engine.open_data import open_inputs
from train.page.places import Places, shown_names

_KEPT_SECONDS = 60.0  # after which a dataset's list of files is read again
_SIDE = 256  # longest side of a small copy, in pixels
_LONGEST_CAPTION = 2000  # characters of a line that are shown
_MOST_GROUPS, _MOST_IN_GROUP = 24, 4
_FORMS = (".parquet", ".tar", ".arrow", ".jsonl", ".csv", ".json")
_OPENED: dict[Path, tuple[float, list[Source]]] = {}


class Found(NamedTuple):
    """An image of a dataset."""

    image: Image.Image
    name: str
    caption: str


def dataset_names(places: Places) -> list[str]:
    """Return the names of what may be datasets: the folders and archives directly in --data."""
    with suppress(OSError):
        entries = [path for path in places.data.iterdir() if not path.name.startswith(".")]
        return sorted(shown_names(path.name for path in entries if path.is_dir() or path.suffix in _FORMS[:2]))
    return []


def open_dataset(path: Path) -> list[Source]:
    """Return the training and held-out images of a dataset. Raises UserError."""
    kept = _OPENED.get(path)
    if kept is None or time.monotonic() - kept[0] > _KEPT_SECONDS:
        inputs = open_inputs(str(path), SourceConfig(), captioned=False)
        _OPENED.clear()  # one at a time, because large ones take memory
        kept = _OPENED[path] = (time.monotonic(), [inputs.source, inputs.held_out])
    return kept[1]


def search(path: Path, words: str, first: int, most: int) -> tuple[int, list[Found]]:
    """Return the number of images with a caption that contains all words, in any case, and `most` from the `first` on.

    Without words, these are all images.
    """
    wanted = words.casefold().split()
    sources = open_dataset(path)
    hits: list[tuple[Source, int, str]] = []
    count = 0
    for source in sources:
        for k, row in enumerate(source):
            caption = next((c for c in row.captions if all(word in c.casefold() for word in wanted)), None)
            if caption is not None:
                if first <= count < first + most:
                    hits.append((source, k, caption))
                count += 1
    return count, [_found(source, k, caption) for source, k, caption in hits]


def duplicate_groups(path: Path, report: Path) -> list[list[Found]]:
    """Return the images of the first groups of duplicates in a report's folder."""
    groups: list[list[str]] = []
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        for line in read_regular(report / "duplicates.jsonl", 2**27).splitlines()[:_MOST_GROUPS]:
            entry = json.loads(line)
            groups.append([f"{split}\0{name}" for split in ("train", "test") for name in entry[split]][:_MOST_IN_GROUP])
    found = _by_name(open_dataset(path), {key for group in groups for key in group})
    return [members for group in groups if len(members := [found[key] for key in group if key in found]) > 1]


def _by_name(sources: Iterable[Source], wanted: set[str]) -> dict[str, Found]:
    """Return the images with these splits and names, as "split NUL name"."""
    found: dict[str, Found] = {}
    for source in sources:
        for k, row in enumerate(source):
            if (key := f"{source.split}\0{row.name}") in wanted:
                found[key] = _found(source, k, f"{row.name} ({source.split})")
    return found


def _found(source: Source, k: int, caption: str) -> Found:
    return Found(small_copy(source, k), printable(source[k].name), printable(caption, _LONGEST_CAPTION))


def small_copy(source: Source, k: int) -> Image.Image:
    """Return an image whose longer side has at most 256 pixels, a small one enlarged; grey if it can't be read."""
    try:
        image = SourceConfig().center_framing(_SIDE).load(source.read(k), source[k].name)
    except (DamagedImage, OSError, UserError):
        return Image.new("RGB", (64, 64), (128, 128, 128))
    image.thumbnail((_SIDE, _SIDE))
    return enlarged(image)


def enlarged(image: Image.Image, side: int = _SIDE // 2) -> Image.Image:
    """Return a small image with larger pixels, so that its longer side is about as long as `side`."""
    factor = max(1, round(side / max(image.size)))
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)


def captions(path: Path, count: int, seed: int) -> Sequence[str]:
    """Return different captions of held-out images, at most `count`, chosen by the seed."""
    texts = list(dict.fromkeys(filter(None, (row.captions[0] for row in open_dataset(path)[-1]))))
    return random.Random(seed).sample(texts, min(count, len(texts)))
