"""The runs in a folder: what each one is, how far it is, and what it has written.

Everything is read from the run's files, so a run looks the same whoever started it, and whether it still trains.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from ldm.errors import UserError, one_line
from ldm.files import open_regular, read_regular
from ldm.formats.plain_yaml import read_yaml
from train.data.store.shards import duration
from train.engine.folder import RunFolder
from train.engine.owner import Owner
from train.engine.provenance import is_result
from train.evaluation.curves import parse_metrics
from train.page.places import shown_names

State = Literal["training", "finished", "stopped"]
_MOST_RUNS = 1000
_MOST_FOLDERS = 20_000  # that are searched for runs
_DEEPEST = 8  # folders below the given one
_RECENT = 10  # lines of metrics from which the speed is computed
_MOST_LINES = 1000  # lines that are shown of a list of damaged images
_MOST_SHEETS = 500
_MOST_METRICS = 200_000  # lines
_READ = 2**24  # bytes that are read of a file of lines
_LONGEST = 500  # characters of a file's name or a reason
_LARGEST = 1e100  # number in metrics that a plot can show
_CARD = 2**20  # bytes of a model card
_NOT_SEARCHED = {"checkpoints", "cache", "samples", "model", "model-best", "tokenizer"}


@dataclass(frozen=True)
class RunView:
    """A run's folder as the page shows it. Its properties are read once."""

    path: Path
    root: Path
    """Folder of all runs; no link in the run may lead out of it."""

    def __post_init__(self) -> None:
        f = self.folder
        for path in (f.settings, f.metrics, f.damaged, f.lock, f.samples, f.model, f.model / "README.md"):
            if not self._is_own(path):
                raise UserError(f"{self.path.name}: {path.name!r} in it is a link that leads out of --runs")

    def _is_own(self, path: Path) -> bool:
        with suppress(OSError, RuntimeError):
            return path.resolve().is_relative_to(self.root.resolve())
        return False

    @property
    def name(self) -> str:
        """Name of the run: its path in the folder of all runs."""
        return str(self.path.relative_to(self.root))

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.path)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Settings of config.yaml; none if it can't be read."""
        with suppress(OSError, UserError):
            if self.folder.settings.is_file():  # reading a pipe would wait
                return read_yaml(self.folder.settings)
        return {}

    @property
    def stage(self) -> Literal["clip", "vae", "ldm", "distill"]:
        """Stage that the run trains."""
        if "teacher" in self.settings:
            return "distill"
        if "unet" in self.settings or "diffusion" in self.settings:
            return "ldm"
        return "clip" if "text" in self.settings else "vae"

    @property
    def steps(self) -> int:
        """Number of steps of the whole run."""
        steps = self.settings.get("steps")
        return steps if isinstance(steps, int) else 0

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """Lines of metrics.jsonl, of which all numbers are finite."""
        return _finite_metrics(self.folder.metrics, _stamp(self.folder.metrics))

    @property
    def step(self) -> int:
        """Number of steps that were done when metrics were last logged."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @cached_property
    def owner(self) -> Owner | None:
        """The process that trains here now."""
        owner = Owner.read(self.folder.lock)
        return owner if owner and owner.runs and owner.has_open(self.folder.lock) is not False else None

    @property
    def state(self) -> State:
        if self.owner:
            return "training"
        return "finished" if self.steps and is_result(self.folder.model, self.steps) else "stopped"

    def seconds_left(self) -> float | None:
        """Return how long the run still takes, from its last lines of metrics, validations included; None: unknown."""
        times = [(line["step"], line["time"]) for line in self.metrics if "time" in line][-_RECENT:]
        if len(times) < 2 or self.steps <= self.step:
            return None
        (first, began), (last, ended) = times[0], times[-1]
        if last <= first or ended < began:
            return None
        return (self.steps - last) * (ended - began) / (last - first)

    def status(self) -> str:
        """Return a line on how far the run is."""
        share = f"step {self.step:,} of {self.steps:,}"
        if self.state == "finished":
            return f"finished: {self.steps:,} steps"
        if self.state == "stopped":
            return f"stopped: {share}" if self.step else "stopped before its first metrics"
        left = self.seconds_left()
        return f"training: {share}" + (f", about {duration(left)} left" if left is not None else "")

    def sheets(self) -> list[tuple[Path, int]]:
        """Return the sample sheets and their steps, in the order of the steps."""
        found = ((path, re.fullmatch(r"step-(\d+)\.png", path.name)) for path in self.folder.samples.glob("step-*.png"))
        own = ((path, int(match[1])) for path, match in found if match and self._is_own(path))
        return sorted(own, key=lambda pair: pair[1])[-_MOST_SHEETS:]

    def damaged(self) -> list[tuple[str, str]]:
        """Return the name of each image that can't be read, and the reason; the first ones only."""
        return read_pairs(self.folder.damaged)

    def card(self) -> str:
        """Return the text of the model's card, without its header for machines; "" if there is none yet."""
        try:
            text = read_regular(self.folder.model / "README.md", _CARD).decode(errors="replace")
        except OSError:
            return ""
        return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)

    def version(self) -> dict[str, Any]:
        """Return a value for each file that the page shows, which changes with the file."""
        f = self.folder
        files = (f.settings, f.metrics, f.damaged, f.samples, f.model, f.lock)
        return {"run": self.name, "state": self.state} | {path.name: _stamp(path) for path in files}


def find_runs(folder: Path) -> list[str]:
    """Return the names of all runs in a folder, at any depth, the one that was changed last first. Links are skipped.

    A run is a folder with config.yaml and something that training wrote, or one that the page has started.
    """
    found: dict[Path, float] = {}
    for parent in _folders(folder):
        names = {entry.name for entry in os.scandir(parent)}
        if "config.yaml" in names and names & {".lock", "metrics.jsonl", "checkpoints", "model"}:
            found[parent] = _changed(parent)
        for name in names:
            if (match := re.fullmatch(r"\.(.+)\.page\.json", name)) and match[1] not in (".", ".."):
                found.setdefault(parent / match[1], _stamp(parent / name)[0])
        if len(found) >= _MOST_RUNS:
            break
    return shown_names(str(path.relative_to(folder)) for path in sorted(found, key=lambda path: (-found[path], path)))


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """Return the files and reasons of a damaged.jsonl, the first ones only; lines of another kind are left out."""
    pairs: list[tuple[str, str]] = []
    with suppress(OSError):
        for line in _part(file, end=False).split(b"\n", _MOST_LINES)[:_MOST_LINES]:
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                entry = json.loads(line)
                pairs.append((one_line(entry["file"], _LONGEST), one_line(entry["reason"], _LONGEST)))
    return pairs


@lru_cache(maxsize=4)
def _finite_metrics(path: Path, stamp: tuple[float, int]) -> list[dict[str, float]]:
    """Return a file's lines of metrics. They are kept until its stamp changes, because the page asks often."""
    with suppress(OSError):
        lines = parse_metrics(_part(path, end=True).rsplit(b"\n", _MOST_METRICS)[-_MOST_METRICS:])
        return [line for line in lines if all(abs(value) <= _LARGEST for value in line.values())]
    return []


def _part(path: Path, *, end: bool) -> bytes:
    """Return the first or the last 16 MB of a file, of which a hostile one may have any number. Raises OSError."""
    with open_regular(path) as file:
        if end:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _READ))
        return file.read(_READ)


def _folders(root: Path) -> Iterator[Path]:
    """Yield the folders in which a run may be, not those that a run has itself."""
    for seen, (parent, folders, _) in enumerate(os.walk(root)):
        depth = len(Path(parent).relative_to(root).parts)
        keep = [name for name in sorted(folders) if not name.startswith(".") and name not in _NOT_SEARCHED]
        folders[:] = keep if depth < _DEEPEST else []
        if seen > _MOST_FOLDERS:
            return
        yield Path(parent)


def _changed(folder: Path) -> float:
    return max(_stamp(folder / name)[0] for name in ("metrics.jsonl", "config.yaml"))


def _stamp(path: Path) -> tuple[float, int]:
    try:
        status = path.stat()
    except OSError:
        return 0.0, 0
    return status.st_mtime, status.st_size
