"""training.json: the settings and library versions of the weights beside it, in a form that may be published."""

import json
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ldm import __version__
from ldm.errors import UserError
from ldm.files import read_json
from ldm.formats.hub import model_folder
from ldm.formats.plain_yaml import read_yaml
from train.config.resumable import published
from train.config.run import RunConfig

_FILE = "training.json"
_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "tokenizers", "numpy")


def write_provenance(
    folder: Path,
    config: RunConfig,
    changes: Sequence[Mapping[str, Any]] = (),
    *,
    step: int,
    final: bool,
    best: bool = False,
) -> None:
    """Write training.json into a folder of weights. It contains no private paths or credentials.

    changes: settings that were changed during the run, in a form that may be published. best: whether the weights are
    those with the smallest held-out loss so far.
    """
    about = {
        "step": step,
        "final": final,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "config": published(config, redacted),
    }
    about |= {"best": True} if best else {}
    about |= {"changes": list(changes)} if changes else {}
    (folder / _FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def is_result(folder: Path, step: int) -> bool:
    """Return whether a folder's weights are the final result of a run that ended at this step."""
    try:
        about = read_json(folder / _FILE)
    except (OSError, ValueError):
        return False
    return about.get("final") is True and about.get("step") == step


def unfinished(option: str, folder_or_id: str) -> list[str]:
    """Return a line if a model was exported by a run that hadn't finished. Other models, and hub ids, give none."""
    try:
        about = read_json(Path(model_folder(folder_or_id)) / _FILE)
        step, steps = int(about["step"]), int(about["config"]["steps"])
        if about["final"] is not False or about.get("best") or step >= steps:
            return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []
    return [
        f"warning: {option} {folder_or_id} was written at step {step:,} of {steps:,}, before its run finished: finish "
        "that run first for better results; a model that is trained now fits these weights only"
    ]


def text_encoder_of(model: str) -> str:
    """Return the text encoder that a model of this project was trained with, as its run names it; "" if unknown."""
    folder = Path(model_folder(model))
    try:
        stored = folder.with_name("config.yaml")  # training.json has no absolute paths
        config = read_yaml(stored) if stored.is_file() else read_json(folder / _FILE)["config"]
        return text_encoder_of(str(config["teacher"])) if "teacher" in config else str(config["text_encoder"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError, UserError):  # a model may name itself as teacher
        return ""


def trained_scales(model: str | Path) -> tuple[float, float] | None:
    """Return the smallest and largest guidance scale that a student was distilled with; None if unknown."""
    try:
        low, high = read_json(Path(model_folder(model)) / _FILE)["config"]["scales"]
        return float(low), float(high)
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, UserError):
        return None


def redacted(place: str) -> str:
    """Return a path or address without its private parts: parent folders of an absolute path, credentials, queries."""
    if place.startswith("pipe:"):
        return "pipe:"
    if "://" in place and not place.startswith("file:"):
        return re.sub(r"(?<=://)[^/]*@|[?#].*", "", place)  # without password, and without tokens in the query
    scheme, path = re.fullmatch(
        r"((?:file:(?://)?|openclip:|inception:|dinov2:|clip:)?)(.*)", place, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    return scheme + Path(path).name if path.startswith(("/", "~")) else place


def versions() -> dict[str, str]:
    """Return the versions of Python, of ldm and of the libraries that results depend on."""
    return {"python": platform.python_version(), "ldm": __version__} | {name: version(name) for name in _LIBRARIES}


def commit() -> str:
    """Return the commit of the checkout that this code belongs to, or an empty text for an installed copy."""
    file = Path(__file__).name
    if _git("ls-files", file) != file:  # an environment may be inside the checkout of another project
        return ""
    return _git("describe", "--always", "--dirty")


def _git(*arguments: str) -> str:
    """Return the output of a git command in this folder, or an empty text if it fails."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
