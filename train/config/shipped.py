"""The configurations that come with the packages. Each has a name: shapes/ldm is configs/shapes/ldm.yaml."""

import os
from collections.abc import Iterable
from pathlib import Path

from ldm.errors import UserError

_TRAIN = Path(__file__).parent.parent
_FOLDERS = (_TRAIN / "configs", _TRAIN.parent / "configs")  # an installed wheel's, a checkout's


def shipped(stage: str) -> dict[str, Path]:
    """Return the files of a stage's configurations by name, sorted."""
    folder = next(filter(Path.is_dir, _FOLDERS))
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(folder.glob(f"*/{stage}*.yaml"))}


def find_config(given: str, stage: str) -> Path:
    """Return the file of a configuration that is given by its path, or else by its name.

    Raises UserError if there is neither, with the names that the stage has.
    """
    if os.path.exists(given) and not os.path.isdir(given):  # not is_file(): a pipe can be read too
        return Path(given)
    names = shipped(stage)
    if given not in names:
        raise unknown_config(given, names)
    return names[given]


def unknown_config(given: str, names: Iterable[str]) -> UserError:
    """Return the error on a configuration that is neither a file nor one of these names."""
    if os.path.isdir(given):
        return UserError(f"{given!r}: is a folder, not a configuration; give images as --data {given}")
    return UserError(
        f"{given!r}: no such file, and not the name of a configuration of this command; names: {', '.join(names)}"
    )
