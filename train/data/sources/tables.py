"""Images in tables: parquet files, folders saved by `datasets`, and datasets on the Hugging Face hub.

The `datasets` library reads them into memory-mapped Arrow files. It receives a list of files (parquet files, or those
listed in a saved folder, all inside the folder), so instructions in a folder's README or scripts are never followed.
Nothing is decoded. Images must be bytes in the table. Paths and addresses aren't opened, except for files that the
libraries have put into their own caches.
"""

import errno
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ldm.errors import RunError, UserError, one_line
from ldm.files import read_regular
from train.data.sources.arrow import Table, choose_columns
from train.data.sources.catalogue import Columns, Splits, require_column, split_named, split_prefix
from train.data.sources.files import outside_message

_HUB_ID = re.compile(
    r"(?P<hub>hf://datasets/)?(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?",
    re.ASCII,
)
_BUILDERS = ("parquet", "arrow", "imagefolder", "webdataset", "json", "csv", "cache")  # readers of the hub's files
_PROGRESS_BYTES = 2**29  # above this size, the library's progress bars are shown


def find_tables(data: str, columns: Columns, names: Sequence[str]) -> Splits | None:
    """Return the splits of parquet files, of a folder saved by `datasets`, or of a hub dataset; None for anything else.

    data: a .parquet file, a glob of such files, a folder that has some (in it, in its data/, or in folders named after
    splits), a folder written by save_to_disk, or a name on the hub: owner/name, owner/name:config, owner/name@revision,
    with hf://datasets/ before it if there is a local folder `owner`. names: names of the possible splits. A parquet
    file belongs to the split whose folder contains it, or whose name begins its name (train-00000-of-00002.parquet).

    This function and the openers that it returns raise UserError for input that can't be read, for missing columns and
    for files outside the folder, and RunError for a full disk.
    """
    path = Path(data)
    if path.is_dir():
        root = path.resolve()
        if _is_saved(root) or (root / "dataset_dict.json").is_file():
            return _saved_splits(root, columns)
        return _parquet_splits(root, _parquet_files(root, columns, names), columns, names)
    if path.is_file():
        return _parquet_splits(path.parent, [path] if path.suffix == ".parquet" else [], columns, names)
    if glob.has_magic(data):
        files = [Path(f) for f in sorted(glob.glob(data, recursive=True)) if f.endswith(".parquet")]
        root = Path(os.path.commonpath([str(f.parent) for f in files])) if files else Path()
        return _parquet_splits(root, files, columns, names)
    found = _HUB_ID.fullmatch(data)
    if found and (
        found["hub"] or not os.path.isdir(found["id"].partition("/")[0])
    ):  # if the folder exists, `data` is a misspelt path
        return _hub_splits(found["id"], found["config"], found["revision"], columns)
    return None


# -- parquet --------------------------------------------------------------------------------------------------------


def _parquet_files(root: Path, columns: Columns, names: Sequence[str]) -> list[Path]:
    inside = (name for name in sorted(os.listdir(root)) if split_named(name, names, columns.reading))
    folders = (root, root / "data", *(root / name for name in inside))
    files = [f for folder in folders if folder.is_dir() for f in sorted(folder.iterdir())]
    files = [f for f in files if f.suffix == ".parquet" and f.name[0] != "." and f.name != "metadata.parquet"]
    return [_inside(root, f, columns) for f in files]


def _parquet_splits(root: Path, files: Sequence[Path], columns: Columns, names: Sequence[str]) -> Splits | None:
    splits: dict[str, list[Path]] = {}
    for file in files:
        folders = [split_named(part, names, columns.reading) for part in file.parent.relative_to(root).parts]
        split = next(filter(None, reversed(folders)), "") or split_prefix(file.name, names, columns.reading)
        splits.setdefault(split, []).append(file)
    location = str(files[0] if len(files) == 1 else root)
    return {split: partial(_open_parquet, splits[split], columns, location) for split in splits} or None


def _open_parquet(files: Sequence[Path], columns: Columns, location: str) -> Table:
    import datasets
    import pyarrow.parquet as pq

    chosen: list[str] = []
    non_empty = []
    for file in files:
        with _reading(str(file)), pq.ParquetFile(file) as parquet:
            schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
            features = datasets.Features.from_arrow_schema(schema)
        if columns.repeats:
            require_column(columns.repeats, schema.names, str(file))
        if not chosen:
            names = (*choose_columns(features, columns, location), columns.repeats)
            chosen = list(dict.fromkeys(filter(None, names)))
        if missing := [c for c in chosen if c not in schema.names]:
            raise UserError(f"{file} has no column {', '.join(missing)}, but {files[0].name} has")
        non_empty += [file] if rows else []
    if not non_empty:
        raise UserError(f"{location} has no images: it has no rows")
    patterns = [glob.escape(os.path.abspath(file)) for file in non_empty]
    progress = sum(file.stat().st_size for file in non_empty) > _PROGRESS_BYTES
    with _reading(location, progress):
        # load_dataset("parquet") does the same, but contacts the hub first.
        dataset = datasets.Dataset.from_parquet(patterns, columns=chosen, keep_in_memory=False)
    return Table(dataset, columns, location, max(file.stat().st_ctime_ns for file in files))


# -- folders saved by datasets --------------------------------------------------------------------------------------


def _is_saved(folder: Path) -> bool:
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def _saved_splits(root: Path, columns: Columns) -> Splits:
    if _is_saved(root):
        return {"": partial(_open_saved, root, root, columns)}
    index = root / "dataset_dict.json"
    splits = _json(_inside(root, index, columns)).get("splits")
    if not isinstance(splits, list) or not splits or not all(isinstance(s, str) for s in splits):
        raise UserError(f"{index} lists no splits")
    return {split: partial(_open_saved, root, _inside(root, root / split, columns), columns) for split in splits}


def _open_saved(root: Path, folder: Path, columns: Columns) -> Table:
    import datasets

    state = _json(_inside(root, folder / "state.json", columns))
    _inside(root, folder / "dataset_info.json", columns)
    listed = state.get("_data_files")
    names = [f.get("filename") if isinstance(f, dict) else None for f in listed] if isinstance(listed, list) else []
    files = [_inside(root, folder / name, columns) for name in names if isinstance(name, str)]
    if not files or len(files) < len(names):
        raise UserError(f"{folder / 'state.json'} lists no files")
    with _reading(str(folder)):
        dataset = datasets.load_from_disk(str(folder), keep_in_memory=False)
    return Table(dataset, columns, str(folder), max(file.stat().st_ctime_ns for file in files))


def _inside(root: Path, file: Path, columns: Columns) -> Path:
    """Return `file` if it is inside `root`, else raise UserError. A path with "::" makes `datasets` look elsewhere."""
    if ".." in file.parts or "\0" in str(file) or "::" in str(file) or not file.is_relative_to(root):
        raise UserError(f"{str(file)[:300]!r} is outside {root}; only paths inside it are accepted")
    if not columns.follow_links and not Path(os.path.realpath(file)).is_relative_to(root):
        raise UserError(outside_message(file, "file", root))
    if not file.exists():
        raise UserError(f"{file!s:.300} is missing")
    return file


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_regular(file))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} can't be read: {one_line(error, 300)}") from None
    return found if isinstance(found, dict) else {}


# -- the hub --------------------------------------------------------------------------------------------------------


def _hub_splits(name: str, config: str | None, revision: str | None, columns: Columns) -> Splits:
    import datasets

    with _reading(f"{name!r} is not a local file or folder, and the dataset of this name on the hub", progress=True):
        builder = datasets.load_dataset_builder(name, config, revision=revision)
    files = {split: list(files) for split, files in (builder.config.data_files or {}).items()}
    external = [str(f) for found in files.values() for f in found if not str(f).startswith("hf://datasets/")]
    if external:
        raise UserError(
            f"{name} on the hub lists files outside its repository, which aren't read, e.g. {external[0][:200]!r}"
        )
    if builder.name not in _BUILDERS:
        raise UserError(f"{name} on the hub has the format {builder.name!r}; accepted: {', '.join(_BUILDERS)}")
    splits = map(str, files or builder.info.splits)
    return {split: partial(_open_hub, builder, split, columns, name) for split in splits}


def _open_hub(builder: Any, split: str, columns: Columns, name: str) -> Table:
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    with _reading(name, progress=True):
        builder.download_and_prepare()
        dataset = builder.as_dataset(split=split, in_memory=False)
    caches = [os.path.realpath(cache) for cache in (datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)]
    revision = hashlib.sha256(dataset._fingerprint.encode()).digest()  # identifies the revision that was read
    return Table(dataset, columns, name, int.from_bytes(revision[:7], "little"), caches)


@contextmanager
def _reading(what: str, progress: bool = False) -> Iterator[None]:
    """Silence `datasets`, and convert its errors into an error of one line. progress: keep its progress bars."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    loggers = datasets.logging, hub_logging
    verbosities, bars = [log.get_verbosity() for log in loggers], not datasets.are_progress_bars_disabled()
    for log in loggers:
        log.set_verbosity(logging.CRITICAL)
    if bars and not progress:
        datasets.disable_progress_bars()
    try:
        yield
    except Exception as error:  # the library's readers raise nearly every kind of exception
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
            causes.append(cause)
        if any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
            cache = datasets.config.HF_DATASETS_CACHE
            raise RunError(
                f"{what} can't be read: disk full in {cache}; free some space, or set HF_DATASETS_CACHE to another disk"
            ) from error
        raise UserError(f"{what} can't be read: {one_line(error.__cause__ or error, 300)}") from error
    finally:
        for log, verbosity in zip(loggers, verbosities, strict=True):
            log.set_verbosity(verbosity)
        if bars and not progress:
            datasets.enable_progress_bars()
