"""Output files that never replace a file with other content."""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.files import open_regular
from ldm.formats.png import png_bytes, read_png
from ldm.kinds import Spacing
from train.data.store.atomic import atomic_file, plain_errors

MODELS = ("model", "weak_model")
"""Settings that are paths of models."""
INPUTS = ("image", "mask")
"""Settings that are paths of input images."""


def image_key(settings: Mapping[str, Any]) -> str:
    """Return a hash of an image's settings, in which models and input images count by their SHA-256, not their path."""
    content = {name: value for name, value in settings.items() if name not in (*MODELS, *INPUTS)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def key_of_png(path: Path) -> str | None:
    """Return the hash of the settings in a PNG; None if it can't be read or has none."""
    try:
        return image_key(read_png(path))
    except (OSError, ValueError):
        return None


def key_of_gif(path: Path) -> str | None:
    """Return the hash in the comment of a GIF; None if it can't be read or has none."""
    try:
        with open_regular(path) as file, Image.open(file, formats=["GIF"]) as image:
            return bytes(image.info.get("comment", b"")).decode("ascii")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def write_png(
    image: Image.Image,
    folder: Path,
    name: str,
    settings: Mapping[str, Any],
    ending: str = ".png",
    spacing: Spacing | None = None,
) -> Path:
    """Write an image and its settings as `write_file` does, and return its path.

    ending: end of its name. spacing: the model's own, which is used if the settings have none.
    """
    stem, content = name.removesuffix(ending), png_bytes(image, settings, spacing)
    return write_file(content, folder, stem, ending, image_key(settings), key_of_png)


def would_replace(existing: Path, folder: Path, name: str, settings: Mapping[str, Any]) -> bool:
    """Return whether `write_png` would replace an existing PNG with an image of the same settings."""
    here = existing.resolve().parent == folder.resolve() and existing.name.startswith(Path(name).stem)
    return here and key_of_png(existing) == image_key(settings)


def write_file(
    content: bytes, folder: Path, stem: str, ending: str, key: str, key_of: Callable[[Path], str | None]
) -> Path:
    """Write a file under a name that no file with another key has, and return its path. key_of: reads a file's key.

    The name is STEM + ENDING. If another file has this name, a part of the key is added to the stem. So the same
    settings get the same name again, and replace only their own file.
    """
    short = f"-{key[:8]}"
    for suffix in itertools.chain(("", short), (f"{short}-{k}" for k in itertools.count(2))):
        path = folder / f"{stem}{suffix}{ending}"
        try:
            file = path.open("xb")  # fails if the file exists, also if another process makes it at this moment
        except FileExistsError:
            if key_of(path) == key:
                with atomic_file(path) as replacement:
                    replacement.write(content)
                return path
            continue
        try:
            with plain_errors(path), file:
                file.write(content)
        except BaseException:
            path.unlink()
            raise
        return path
    raise AssertionError("unreachable")
