"""Catalogue of images and captions in columns of a memory-mapped `datasets.Dataset`."""

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.errors import UserError, one_line
from ldm.files import read_regular
from train.data.images import MAX_BYTES
from train.data.images.decode import SYSTEM_ERRORS, DamagedImage
from train.data.sources.catalogue import Catalogue, Columns, Row, repeat_count, require_column

_IMAGES = ("image", "jpg", "png", "img", "picture")
_CAPTIONS = ("text", "caption")
_LABELS = ("label", *_CAPTIONS)  # if captions are made from labels
_MAX_ROWS_PER_NAME = 10  # with more rows per name on average, row numbers are used instead


class Table(Catalogue):
    """Rows of a `datasets.Dataset` in its order, without those that have no image.

    A row's name is its image's path in the table if all rows have a safe one, else its number.
    """

    def __init__(
        self, dataset: Any, columns: Columns, location: str, changed_ns: int, caches: Sequence[str] = ()
    ) -> None:
        """caches: folders whose files may be used in place of an image's bytes."""
        if columns.from_names:
            raise UserError(f"--input.caption-from-names: {location} is a table; accepted for folders and tars")
        self.location, self.columns, self.changed_ns, self.caches = location, columns, changed_ns, caches
        self.image, self.caption = choose_columns(dataset.features, columns, location)
        self.labels: list[str] | None = getattr(_element(dataset.features.get(self.caption)), "names", None)
        self.dataset = dataset.select_columns([c for c in (self.image, self.caption) if c])
        self._check()
        self._open()
        self.repeats = _repeats(dataset, columns.repeats, location) if columns.repeats else None
        sizes, left_out = self._sizes()
        self.sizes, self.left_out = sizes[sizes >= 0], tuple(left_out)
        self.numbers = np.flatnonzero(sizes >= 0) if left_out else None  # table numbers of the kept rows
        if not len(self):
            reason = f", e.g. {': '.join(left_out[0])}" if left_out else ""
            raise UserError(f"{location} has no images: none of its {len(sizes):,} rows has one{reason}")
        paths = [_safe_path(path) for path, size in zip(self.paths, sizes.tolist(), strict=True) if size >= 0]
        self.named = "" not in paths and len(set(paths)) * _MAX_ROWS_PER_NAME >= len(paths)

    def __len__(self) -> int:
        return len(self.sizes)

    def row(self, k: int) -> Row:
        number = self._number(k)
        name = _safe_path(self.paths[number]) if self.named else f"{number:08d}"
        repeats = 1 if self.repeats is None else int(self.repeats[number])
        return Row(name, int(self.sizes[k]), self.changed_ns, self._captions(self.texts[number]), repeats)

    def read(self, k: int) -> bytes:
        number = self._number(k)
        if (data := self.bytes[number]) is not None:
            return data
        if (file := self._cached(self.paths[number])) is None:
            raise DamagedImage(
                self.row(k).name, "its file is no longer in the cache of the datasets library; load the dataset again"
            )
        try:
            return read_regular(file, MAX_BYTES)
        except OSError as error:
            if error.errno in SYSTEM_ERRORS:
                raise
            raise DamagedImage(self.row(k).name, str(error.strerror)) from None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without memory maps: another process maps the files again."""
        return {key: value for key, value in vars(self).items() if key not in ("bytes", "paths", "texts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def _open(self) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        table = self.dataset.data.table
        nulls = pa.chunked_array([pa.nulls(len(table))])
        images = table[self.image]
        parts = {"bytes": nulls, "path": nulls}
        if pa.types.is_struct(images.type):
            parts |= {f.name: pc.struct_field(images, f.name) for f in images.type if f.name in parts}
        else:
            parts["path" if _is_text(images.type) else "bytes"] = images
        self.bytes, self.paths = Cells(parts["bytes"]), Cells(parts["path"])
        self.texts = Cells(table[self.caption] if self.caption else nulls)

    def _check(self) -> None:
        """Raise UserError for offsets outside the file and for text that isn't UTF-8, before training starts."""
        import pyarrow as pa

        for column in filter(None, (self.image, self.caption)):
            try:
                self.dataset.data.table[column].validate(full=True)
            except pa.ArrowInvalid as error:
                raise UserError(f"{self.location}: column {column!r} is damaged: {one_line(error, 300)}") from None

    def _sizes(self) -> tuple[NDArray[np.int64], list[tuple[str, str]]]:
        """Return the size of each image in bytes, −1 for those left out, and the (name, reason) of these."""
        sizes, left_out = self.bytes.sizes(), []
        for number in np.flatnonzero(sizes < 0).tolist():
            if file := self._cached(self.paths[number]):
                sizes[number] = file.stat().st_size
        for number in np.flatnonzero((sizes < 0) | (sizes > MAX_BYTES)).tolist():
            path = self.paths[number]
            reason = (
                "the table contains a path instead of the image's bytes, and paths aren't opened"
                if path
                else "no image"
            )
            if sizes[number] > MAX_BYTES:
                reason = f"{sizes[number]:,} bytes; up to {MAX_BYTES:,} are accepted"
            sizes[number] = -1
            left_out.append((_safe_path(path) or f"{number:08d}", reason))
        return sizes, left_out

    def _cached(self, path: str | None) -> Path | None:
        """Return the file at a path if it is in one of the libraries' caches, else None."""
        if not path or not self.caches or not os.path.isabs(path):
            return None
        real = Path(os.path.realpath(path))
        return real if any(real.is_relative_to(cache) for cache in self.caches) and real.is_file() else None

    def _number(self, k: int) -> int:
        return k if self.numbers is None else int(self.numbers[k])

    def _captions(self, value: Any) -> tuple[str, ...]:
        values = value if isinstance(value, list) else [value]
        if self.labels is not None:
            values = [self.labels[v] if v is not None and 0 <= v < len(self.labels) else None for v in values]
        texts = ("" if v is None else str(v).strip() for v in values)
        if self.columns.template:
            return tuple(self.columns.of_label(text) for text in texts if text) or ("",)
        return tuple(filter(None, texts)) or ("",)


def _repeats(dataset: Any, column: str, location: str) -> NDArray[np.int64]:
    """Return each row's number of repeats. Raises UserError."""
    require_column(column, dataset.column_names, location)
    counts = []
    for number, value in enumerate(Cells(dataset.data.table[column])):
        try:
            counts.append(repeat_count(value))
        except ValueError:
            raise UserError(
                f"{location}, row {number}: {column} {str(value)[:80]!r}: must be a whole number of repeats"
            ) from None
    return np.array(counts, np.int64)


class Cells:
    """Values of a column; None for a missing value."""

    def __init__(self, column: Any) -> None:
        """column: pyarrow.ChunkedArray"""
        self.chunks = column.chunks
        self.ends = list(accumulate(map(len, self.chunks)))

    def __getitem__(self, row: int) -> Any:
        k = bisect_right(self.ends, row)
        return self.chunks[k][row - self.ends[k]].as_py()  # a negative index, counted from the chunk's end

    def __iter__(self) -> Iterator[Any]:
        return (value for chunk in self.chunks for value in chunk.to_pylist())

    def sizes(self) -> NDArray[np.int64]:
        """Return the size of each value in bytes, computed from the offsets only; −1 for a missing value."""
        import pyarrow as pa
        import pyarrow.compute as pc

        binary = (c if pa.types.is_large_binary(c.type) else c.cast(pa.binary()) for c in self.chunks)
        sizes = [pc.fill_null(pc.binary_length(chunk), -1).to_numpy(zero_copy_only=False) for chunk in binary]
        return np.concatenate(sizes or [[]]).astype(np.int64)


def choose_columns(features: Any, columns: Columns, location: str) -> tuple[str, str]:
    """Return the columns of images and captions among datasets.Features; "" for no captions, if they aren't required.

    Raises UserError if a column is missing or has the wrong type.
    """
    types = {field.name: field.type for field in features.arrow_schema}
    images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    image_names = (columns.image,) if columns.image else tuple(images) if len(images) == 1 else _IMAGES
    image = next((name for name in image_names if name in types), None)
    caption_names = (columns.caption,) if columns.caption else _LABELS if columns.template else _CAPTIONS
    caption = next((name for name in caption_names if name in types), None)
    missing = [" or ".join(image_names)] if image is None else []
    missing += [" or ".join(caption_names)] if caption is None and (columns.captioned or columns.caption) else []
    if missing:
        labels = [name for name, feature in features.items() if hasattr(_element(feature), "names")]
        hint = "choose other columns with --input.image-column and --input.caption-column"
        if labels and image:
            hint = f"to make captions from the labels in {labels[0]}, set --input.caption-template 'a photo of a {{}}'"
        raise UserError(
            f"{location} has no column {', '.join(missing)}; its columns are: {', '.join(types)[:300]}; {hint}"
        )
    assert image is not None
    if not _is_image(types[image]):
        raise UserError(
            f"{location}: column {image!r} has the type {types[image]!s:.80}; must contain the bytes of images"
        )
    if caption is not None:
        _check_captions(types[caption], _element(features[caption]), columns, f"{location}: column {caption!r}")
    return image, caption or ""


def _check_captions(kind: Any, element: Any, columns: Columns, where: str) -> None:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if not (_is_text(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        raise UserError(f"{where} has the type {kind!s:.80}; must contain texts, lists of texts, or labels")
    if pa.types.is_integer(kind) and not columns.template:
        example = f", e.g. {element.names[0][:80]!r}" if getattr(element, "names", None) else ""
        raise UserError(
            f"{where} contains labels{example}, not captions: "
            "to make captions from them, set --input.caption-template 'a photo of a {}'"
        )


def _element(feature: Any) -> Any:
    """Return the type of a list's elements, or the type itself if it isn't a list."""
    return feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", feature)


def _is_image(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        parts = {field.name: field.type for field in kind}
        return "bytes" in parts and (pa.types.is_null(parts["bytes"]) or _is_image(parts["bytes"]))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _safe_path(path: str | None) -> str:
    """Return a normalised relative path, or the last part of an absolute path; "" if there is no safe one."""
    if not path or len(path) > 1000 or "\0" in path or "::" in path or "://" in path:
        return ""
    parts = re.split(r"[/\\]", path)
    if ".." in parts:
        return ""
    if path[0] in "/\\" or path[1:2] == ":":  # on POSIX or on Windows
        return parts[-1]
    return "/".join(part for part in path.split("/") if part not in ("", "."))
