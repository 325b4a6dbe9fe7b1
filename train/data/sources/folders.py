"""Images in an untrusted folder, with metadata files, caption files beside the images, or one folder per class.

Only images and the files with captions are opened (metadata.py, captions.py). After links are followed, every path in
the metadata and the target of every link must be inside the folder, unless --input.follow-links is set.
"""

import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from ldm.errors import UserError
from ldm.files import read_regular
from train.data.images import MAX_BYTES
from train.data.images.decode import SYSTEM_ERRORS, DamagedImage
from train.data.sources.captions import caption_file, read_captions, require_no_column
from train.data.sources.catalogue import Catalogue, Columns, Opener, Row, Splits, ignored, split_named
from train.data.sources.files import Files, by_kind, scan, suffixes
from train.data.sources.metadata import find_metadata, is_standard, other_metadata, read_metadata

_MOST_NAMED = 5  # folders that a note names


class Strings:
    """Sequence of str in two arrays: small, and shared with forked workers without a copy."""

    def __init__(self, strings: Iterable[str]) -> None:
        parts = [s.encode("utf-8", "surrogateescape") for s in strings]  # in any locale
        self.ends = np.cumsum([0, *map(len, parts)])
        self.bytes = np.frombuffer(b"".join(parts), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return self.bytes[self.ends[index] : self.ends[index + 1]].tobytes().decode("utf-8", "surrogateescape")


class Folder(Catalogue):
    """Images ordered by name. A row's name is its path inside the folder."""

    def __init__(
        self,
        folder: Path,
        rows: Iterable[Row],
        left_out: Iterable[tuple[str, str]] = (),
        *,
        form: str = "a folder of images",
        notes: Iterable[str] = (),
        from_root: bool = False,
    ) -> None:
        """form: the folder's format, for reports. from_root: whether a metadata file of the folder itself was read."""
        rows = sorted(rows)
        self.folder, self.location, self.left_out = folder, str(folder), tuple(left_out)
        self.form, self.notes, self.from_root = form, tuple(notes), from_root
        self.names = Strings(r.name for r in rows)
        self.sizes = np.array([r.size for r in rows], np.int64)
        self.changed_ns = np.array([r.changed_ns for r in rows], np.int64)
        self.repeats = np.array([r.repeats for r in rows], np.int32)
        self.texts = Strings(text for r in rows for text in r.captions)
        self.first_text = np.cumsum([0, *(len(r.captions) for r in rows)])

    def __len__(self) -> int:
        return len(self.sizes)

    def row(self, k: int) -> Row:
        texts = range(self.first_text[k], self.first_text[k + 1])
        captions = tuple(self.texts[t] for t in texts)
        return Row(self.names[k], int(self.sizes[k]), int(self.changed_ns[k]), captions, int(self.repeats[k]))

    def read(self, k: int) -> bytes:
        try:
            return read_regular(os.path.join(self.folder, self.names[k]), MAX_BYTES)
        except OSError as error:
            if error.errno in SYSTEM_ERRORS:
                raise
            raise DamagedImage(self.names[k], str(error.strerror)) from None

    def subfolder(self, name: str) -> "Folder":
        """Return the images of one subfolder; their names don't change."""
        prefix = f"{name}/"
        rows = (row for row in self if row.name.startswith(prefix))
        left_out = [entry for entry in self.left_out if entry[0].startswith(prefix)]
        return Folder(self.folder, rows, left_out, form=self.form, notes=self.notes)


def find_folder(data: str, columns: Columns, names: Sequence[str]) -> Splits:
    """Return the splits of a folder of images.

    A split is a subfolder with one of `names` or, with metadata, the images whose paths begin with that name.

    Raises UserError, at once or from the returned openers, for a folder without images (with a list of what was
    searched for), for unreadable metadata, and for a row or a link that leads out of the folder.
    """
    root = Path(data).resolve()
    present = split_folders(root, names, columns)
    folder: Folder | None = None
    if find_metadata(root, columns) is None and present:
        if columns.reading > 1 and other_metadata(os.listdir(root)):
            folder = list_folder(root, columns)
        if folder is None or not folder.from_root:
            notes = _beside_splits(root, present, columns)
            return {name: partial(_split_folder, root, actual, columns, notes) for name, actual in present.items()}
    folder = folder or list_folder(root, columns)
    first_parts = {row.name.partition("/")[0] for row in folder}
    found: dict[str, Opener] = {
        name: partial(folder.subfolder, actual) for name, actual in present.items() if actual in first_parts
    }
    return found if found and first_parts <= set(present.values()) else found | {"": lambda: folder}


def split_folders(root: Path, names: Sequence[str], columns: Columns) -> dict[str, str]:
    """Return the names of the subfolders that are splits, by split; "Train" is one if there is no "train"."""
    folders = sorted(name for name in os.listdir(root) if (root / name).is_dir())
    present = {name: name for name in names if name in folders}
    for name in folders:
        if name not in present.values() and (split := split_named(name, names, columns.reading)):
            present.setdefault(split, name)
    return present


def _beside_splits(root: Path, present: dict[str, str], columns: Columns) -> tuple[str, ...]:
    """Return a line on the images and folders of a dataset that are in none of its splits."""
    if columns.reading == 1:
        return ()
    entries = [e for e in sorted(os.listdir(root)) if e not in present.values() and not ignored(e)]
    images = [e for e in entries if e.lower().endswith(suffixes(columns.reading))]
    folders = [e for e in entries if (root / e).is_dir()]
    listed = [f"{len(images):,} image{'s' * (len(images) > 1)}"] * bool(images)
    listed += [f"the folder {name!r}" for name in folders[:_MOST_NAMED]] + ["more"] * (len(folders) > _MOST_NAMED)
    return (
        (f"not read, because beside the splits {', '.join(present.values())}: {', '.join(listed)}",) if listed else ()
    )


def _split_folder(root: Path, name: str, columns: Columns, notes: tuple[str, ...]) -> Folder:
    folder = Path(os.path.realpath(root / name))
    if not folder.is_relative_to(root) and not columns.follow_links:
        raise UserError(
            f"{root / name} is a link to a folder outside {root}: give the target of the link as --data, or set "
            "--input.follow-links True"
        )
    found = list_folder(folder, columns, root)
    found.notes = (*notes, *found.notes)
    return found


def list_folder(folder: Path, columns: Columns, root: Path | None = None) -> Folder:
    """List the images of a resolved folder with their captions. Raises as `find_folder`.

    root: folder of the dataset, if this is the folder of a split.
    """
    files, listed = Files(folder, columns, root), _Listed()
    _add_metadata(files, listed)
    if not listed.standard:
        _add_images(files, listed)
    if columns.reading > 1:
        unnamed = [name for name in files.found if files.is_image(name) and name not in listed.seen]
        if unnamed:
            where = next(iter(listed.tables), "the metadata")
            listed.notes.append(
                f"images that {where} doesn't name are left out: {by_kind(unnamed)}, e.g. {unnamed[0][-80:]!r}"
            )
        listed.notes += files.notes(listed.used)
    if columns.captioned and not listed.tables and not any(any(row.captions) for row in listed.rows):
        hint = "".join(f"; {note}" for note in listed.notes if "not read" in note)
        raise UserError(
            f"{folder} has {len(listed.rows):,} images but no captions: looked for metadata.jsonl, metadata.csv, and a "
            f".txt{'' if columns.reading == 1 else ', .caption or .json'} beside each image; for one folder per class, "
            f"set --input.caption-template 'a photo of a {{}}'{hint}"
        )
    if columns.repeats and not listed.tables:
        raise UserError(
            f"--input.repeats {columns.repeats}: {folder} has no metadata.jsonl or metadata.csv with columns; add one, "
            "or set --input.repeats folders for folders such as 10_cat"
        )
    form = f"a folder with {', '.join(listed.tables[:3])}" if listed.tables else "a folder of images"
    return Folder(folder, listed.rows, listed.left_out, form=form, notes=listed.notes, from_root=listed.from_root)


@dataclass
class _Listed:
    """Images and captions found so far in the listing of a folder."""

    rows: list[Row] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    repeats: dict[str, int] = field(default_factory=dict)
    """Numbers of repeats that metadata gives, by image."""
    seen: set[str] = field(default_factory=set)
    """Images that are rows or are left out."""
    used: set[str] = field(default_factory=set)
    """Files with captions that were read, or that a note names."""
    tables: list[str] = field(default_factory=list)
    """Metadata files that were read."""
    standard: bool = False
    """Whether the folder itself has metadata.jsonl or metadata.csv, which is then all that is read."""
    from_root: bool = False
    """Whether a metadata file of the folder itself was read."""


def _add_metadata(files: Files, listed: _Listed) -> None:
    """Add the rows of metadata files."""
    folder, columns = files.folder, files.columns
    if columns.from_names:
        return
    if metadata := find_metadata(folder, columns):
        name = next((n for n in files.found if n.lower() == metadata.name.lower()), metadata.name)
        captions = read_metadata(metadata, files, "", listed.notes, listed.repeats)
        count = len(captions)
        _add_rows(captions, files, listed)
        if not listed.rows:
            example = repr(listed.left_out[0][0][:200])
            raise UserError(f"{metadata} lists {count:,} files, but none of them is in {folder}, e.g. {example}")
        listed.used.add(name)
        listed.tables.append(metadata.name)
        listed.standard = listed.from_root = True
        return
    if columns.reading == 1 or (columns.template and not columns.caption):
        return
    images = sorted(files.images)
    for name in other_metadata(files.found):
        prefix = name[: name.rfind("/") + 1]
        inside = images[bisect_left(images, prefix) : bisect_left(images, prefix[:-1] + "0")] if prefix else images
        if not inside or (not is_standard(name) and any(caption_file(image, files) for image in inside)):
            continue
        notes: list[str] = []
        try:
            captions = read_metadata(folder / name, files, prefix, notes, listed.repeats) if files.stat(name) else {}
            if not any(image in files.found for image in captions):
                raise UserError(f"{folder / name}: names none of the images")
        except UserError as error:
            if is_standard(name):
                raise
            listed.notes.append(f"seen, but not read: {error}")
            listed.used.add(name)
            continue
        _add_rows(captions, files, listed)
        listed.notes += notes
        listed.used.add(name)
        listed.tables.append(name)
        listed.from_root |= not prefix


def _add_rows(captions: dict[str, list[str]], files: Files, listed: _Listed) -> None:
    for name, texts in captions.items():
        if found := files.stat(name):
            captions_of = tuple(t for t in texts if t) or ("",)
            listed.rows.append(Row(name, *found, captions_of, listed.repeats.get(name, 1)))
            listed.seen.add(name)
        else:
            listed.left_out.append((name, "listed in the metadata, but the file doesn't exist"))


def _add_images(files: Files, listed: _Listed) -> None:
    """Add the images that no metadata file names: all of them or, beside metadata, those that have captions."""
    folder, columns = files.folder, files.columns
    names = [name for name in files.images if name not in listed.seen]
    if not names and not listed.rows:
        seen = "".join(f"; {note}" for note in files.notes(())) if columns.reading > 1 else ""
        raise UserError(
            f"no images in {folder}: looked for metadata.jsonl, metadata.csv, and "
            f"{', '.join(suffixes(columns.reading))} files{seen}"
        )
    beside_too = columns.reading == 1 or not (columns.from_names or (columns.template and not columns.caption))
    texts = {name: caption_file(name, files) if beside_too else "" for name in names}
    if listed.tables:
        texts = {name: text for name, text in texts.items() if text}
    beside = {name: text for name, text in texts.items() if text}
    labels = columns.template and not columns.from_names and (columns.reading == 1 or not beside)
    if not listed.tables and not (columns.caption and columns.reading > 1 and beside and not columns.image):
        require_no_column(folder, columns)
    captions, reasons = read_captions(beside, files, listed.notes)
    listed.used.update(beside.values())
    for name in texts:
        listed.seen.add(name)
        if name in reasons:
            listed.left_out.append((name, reasons[name]))
            continue
        own = captions.get(name, [])
        if columns.from_names:
            own = [columns.of_name(os.path.splitext(name)[0].rpartition("/")[2])]
        elif labels:
            label = os.path.basename(os.path.dirname(name))
            label = re.sub(r"^\d+_", "", label) if columns.numbered else label
            own = [columns.of_label(label)] if label else []
        elif columns.template:
            own = [columns.of_label(text) for text in own if text]
        listed.rows.append(Row(name, *(files.stat(name) or (0, 0)), tuple(filter(None, own)) or ("",)))


def has_images(folder: Path, columns: Columns) -> bool:
    """Return whether a folder or any of its subfolders contains an image file."""
    return any(name.lower().endswith(suffixes(columns.reading)) for name, _ in scan(folder, columns))
