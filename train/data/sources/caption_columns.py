"""Captions from several columns, with weights: --input.caption-column "long:3 short:1".

Each column is read as a dataset of its own, by the reader of its format. An example's caption is drawn in two steps:
first one of the columns that have a text for the image, with a probability in proportion to its weight, then one of
that column's captions. It depends on the seed and the position in training only.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, partial
from itertools import chain

from ldm.errors import UserError
from train.data.sources.catalogue import Catalogue, Row, Splits

_PAIRS = re.compile(r"(\S.*?):(\d+(?:\.\d+)?)(?:\s+|$)")
_ATTEMPT = re.compile(r":\s*[-+]?\.?\d")
_MOST = 1e6  # largest weight


def caption_columns(text: str) -> dict[str, float]:
    """Return the weights of columns such as "long:3 short:1", by name; empty for the name of one column.

    Raises ValueError for weights that can't be read.
    """
    text = text.strip()
    pairs = [(found[1], float(found[2])) for found in _PAIRS.finditer(text)]
    if not _ATTEMPT.search(text):
        return {}
    unclear = _PAIRS.sub("", text) or any(_ATTEMPT.search(name) for name, _ in pairs)
    if unclear or not all(0 < weight <= _MOST for _, weight in pairs):
        raise ValueError("must be the name of a column, or names with weights above 0, e.g. 'long:3 short:1'")
    if len(weights := dict(pairs)) < len(pairs):
        raise ValueError("must name each column once")
    return weights


class SeveralColumns(Catalogue):
    """Images of a dataset that was read once for each column, with the captions of all of them."""

    def __init__(self, columns: Mapping[str, Catalogue], weights: Sequence[float]) -> None:
        """Raises UserError if a column gives other images, because some of its captions can't be read."""
        self.columns, self.weights = tuple(columns.values()), tuple(weights)
        self.first = self.columns[0]
        self.location, self.left_out = self.first.location, self.first.left_out
        self.notes = tuple(dict.fromkeys(chain.from_iterable(column.notes for column in self.columns)))
        for name, column in columns.items():
            if (differing := set(column.left_out) ^ set(self.left_out)) or len(column) != len(self):
                example = ": ".join(min(differing, default=("", "the number of images differs")))
                raise UserError(
                    f"--input.caption-column {name}: gives other images than {next(iter(columns))}, e.g. {example}"
                )

    def __len__(self) -> int:
        return len(self.first)

    def row(self, k: int) -> Row:
        rows = [column.row(k) for column in self.columns]
        texts = [tuple(filter(None, row.captions)) for row in rows]
        weights = (w / len(own) for w, own in zip(self.weights, texts, strict=True) for _ in own)
        return rows[0]._replace(captions=tuple(chain(*texts)) or ("",), weights=tuple(weights) or (1.0,))

    def read(self, k: int) -> bytes:
        return self.first.read(k)

    @cached_property
    def lowest_hashes(self) -> list[tuple[float, int]]:
        return self.first.lowest_hashes


def join_columns(weights: Mapping[str, float], find: Callable[[str], Splits]) -> Splits:
    """Return the splits of a dataset with the captions of all columns. find: function that reads it with one column.

    It and the returned openers raise UserError for a column that is missing or empty.
    """
    found: dict[str, Splits] = {}
    for name in weights:
        with _naming(name):
            found[name] = find(name)
    return {split: cache(partial(_join, split, found, weights)) for split in next(iter(found.values()))}


def _join(split: str, found: Mapping[str, Splits], weights: Mapping[str, float]) -> SeveralColumns:
    columns: dict[str, Catalogue] = {}
    for name, splits in found.items():
        with _naming(name):
            if split not in splits:
                raise UserError(f"no captions in the split {split!r}")
            columns[name] = column = splits[split]()
            if column.uncaptioned == len(column):  # also where captions aren't required, e.g. in inspect_data.py
                raise UserError(f"{column.location} has no captions in this column")
    return SeveralColumns(columns, list(weights.values()))


@contextmanager
def _naming(column: str) -> Iterator[None]:
    """Name the column in errors."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--input.caption-column {column}: {error}") from None
