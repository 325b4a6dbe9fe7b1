"""The folders that the page may read and write. Every name that a visitor chooses becomes a path here, or is refused.

A visitor of the page may be someone else's web page or program. So a name must be relative, and must lead to something
inside its folder, also after all links are followed.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ldm.errors import UserError, is_printable

Place = Literal["models", "runs", "data", "out"]
_LONGEST_NAME = 500
_LONGEST_PART = 230  # bytes of a file's name, so that files can be written beside it whose names contain it
_DEEPEST = 5  # folders below --models in which models are searched
_MOST_FILES = 10_000  # in a model's folder


@dataclass(frozen=True)
class Places:
    """The given folders. The page touches nothing else."""

    models: Path
    """Folder in which models are searched, at any depth up to five."""
    runs: Path
    """Folder of the runs."""
    data: Path
    """Folder of the datasets."""
    out: Path
    """Folder of all that the page writes, except for runs: images, uploads, votes."""

    def inside(self, place: Place, name: object) -> Path:
        """Return the path of a name in one of the folders; nothing needs to exist there yet.

        Raises UserError for a name that is absolute, leads out of the folder, or isn't a file's name at all.
        """
        if place not in get_args(Place):
            raise UserError(f"place {place!r}: choose {', '.join(get_args(Place))}")
        folder, shown = self.folder(place), _shown(name)
        if not isinstance(name, str) or not name or len(name) > _LONGEST_NAME or not is_name(name):
            raise UserError(f"{shown}: isn't the name of a file; choose one inside --{place}")
        if name.lower().startswith("pipe:"):
            raise UserError(f"{shown}: commands aren't accepted in the page; choose a name inside --{place}")
        if "://" in name:
            raise UserError(f"{shown}: addresses aren't accepted in the page; choose a name inside --{place}")
        if name.startswith(("/", "~", "\\")) or ".." in name.replace("\\", "/").split("/"):
            raise UserError(f"{shown}: leads out of --{place}; choose a name inside it")
        if any(len(part.encode()) > _LONGEST_PART for part in name.split("/")):
            raise UserError(f"{shown}: a file's name has up to {_LONGEST_PART} bytes; choose a shorter one")
        path = folder / name
        if not _is_inside(path, folder) or (path != folder and not _is_inside(path.parent, folder)):
            raise UserError(f"{shown}: a link leads out of --{place}; choose a name inside it")
        return path

    def existing(self, place: Place, name: object) -> Path:
        """Return the path of an existing name in one of the folders. Raises UserError, also for a hub id."""
        path = self.inside(place, name)
        if not path.exists():
            raise UserError(f"{_shown(name)}: isn't in --{place}; hub ids and new files aren't accepted here")
        return path

    def model(self, name: object) -> Path:
        """Return the folder of a model in --models, in which no link leads out. Raises UserError."""
        path = self.existing("models", name)
        if not is_model(path):
            raise UserError(f"{_shown(name)}: isn't the folder of a model (it has no model_index.json)")
        self.require_own_files(path, ("models",), _shown(name))
        return path

    def require_own_files(self, path: Path, places: Sequence[Place], shown: str) -> None:
        """Raise UserError if a link in the folder of a model leads out of all these places."""
        folders = [self.folder(place) for place in places]
        for count, file in enumerate(_walk(path)):
            if count > _MOST_FILES:
                raise UserError(f"{shown}: has more than {_MOST_FILES:,} files, so it isn't a model's folder")
            if not any(_is_inside(file, folder) for folder in folders):
                raise UserError(f"{shown}: {file.name!r} is a link that leads out of --{', --'.join(places)}")

    def model_names(self) -> list[str]:
        """Return the names of all models in --models, the least deep first."""
        found = [Path(folder) for folder, _, files in _walk_down(self.models) if "model_index.json" in files]
        names = shown_names(str(path.relative_to(self.models)) for path in found)
        return sorted(names, key=lambda name: (name.count("/"), name))

    def name(self, place: Place, path: Path) -> str | None:
        """Return the name of a path in one of the folders; None: it isn't inside."""
        folder = self.folder(place).resolve()
        return str(path.resolve().relative_to(folder)) if _is_inside(path, folder) else None

    def folder(self, place: Place) -> Path:
        """Return one of the folders."""
        return getattr(self, place)


def shown_names(names: Iterable[str]) -> list[str]:
    """Return the names that a page can show; `inside` refuses the others, e.g. those that aren't UTF-8."""
    return [name for name in names if is_name(name)]


def is_name(text: str) -> bool:
    """Return whether a text is one printable line, which a name must be."""
    return is_printable(text) and "\n" not in text


def is_model(folder: Path) -> bool:
    """Return whether a folder contains a whole model."""
    return (folder / "model_index.json").is_file()


def _shown(name: object) -> str:
    return repr(name if isinstance(name, str) else str(name))[:100]


def _is_inside(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of links, or a name that can't exist
        return False


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in (*folders, *files))


def _walk_down(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk like os.walk, up to a depth, and not into models."""
    for parent, folders, files in os.walk(folder):
        depth = len(Path(parent).relative_to(folder).parts)
        if "model_index.json" in files or depth >= _DEEPEST:
            folders.clear()
        yield parent, folders, files
