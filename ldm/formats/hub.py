"""Models by name: a local folder or a hub repository."""

import os.path
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ldm.errors import UserError, one_line

_WEIGHTS = "diffusion_pytorch_model"  # start of the names of diffusers' weight files
_PATTERNS = [  # files that are downloaded
    "model_index.json",
    "*/*config.json",
    "tokenizer/*.json",
    "tokenizer/*.txt",
    "vae/preview.json",
    *(
        f"{part}/{_WEIGHTS}{kind}"
        for part in ("unet", "vae")
        for kind in (".safetensors", "-*-of-*.safetensors", ".safetensors.index.json")
    ),
    *(f"text_encoder/model{kind}" for kind in (".safetensors", "-*-of-*.safetensors")),
]
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
"""Subfolders of a pipeline's folder."""


def is_hub_id(name: str) -> bool:
    """Return whether a name can be a hub id owner/name. It can't if that path or a local folder `owner` exists."""
    return (
        re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
        and not os.path.exists(name)
        and not os.path.isdir(os.path.dirname(name))
    )


def model_folder(folder_or_id: str | Path) -> str | Path:
    """Return the folder model/ in the folder of a training run, e.g. runs/ldm; any other folder or id unchanged.

    Raises UserError for a run that has no model/ yet.
    """
    folder = Path(folder_or_id)
    if not folder.is_dir() or _is_model(folder):
        return folder_or_id
    if _is_model(folder / "model"):
        return folder / "model"
    if (folder / "config.yaml").is_file() and any((folder / name).exists() for name in (".lock", "checkpoints")):
        raise UserError(f"the run {str(folder_or_id)!r} has no model/ yet: its first checkpoint will write it")
    return folder_or_id


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "model_index.json"))


def fetch(name: str, patterns: Sequence[str]) -> Path:
    """Download the files of a hub repository that match the patterns, and return their folder.

    Raises UserError if that fails.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=[*patterns]))
    except Exception as error:  # the hub's client raises many errors without a common base class
        reason = one_line(error, 300)
        raise UserError(f"{name!r} is not a local folder, and can't be downloaded from the hub: {reason}") from error


def load_network(network_class: Any, folder: str | Path, description: str) -> Any:
    """Load a network of a diffusers class from a folder or a hub id, on the CPU, from safetensors only.

    Raises UserError if it can't be read. description: the network in that message, e.g. "the UNet of 'runs/ldm/model'".
    """
    try:
        expected = network_class.__name__
        class_name = network_class.load_config(str(folder)).get("_class_name", expected)
        if class_name != expected:  # diffusers only warns, and initialises weights that don't fit at random
            raise ValueError(f"its config.json has _class_name {class_name}, not {expected}")
        network = network_class.from_pretrained(str(folder), use_safetensors=True, low_cpu_mem_usage=False)
        network.register_to_config(_name_or_path="")  # else saved files would contain this machine's paths
        return network
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = one_line(error)
        weights = [*Path(folder).glob(f"{_WEIGHTS}.safetensors"), *Path(folder).glob(f"{_WEIGHTS}-*")]
        if os.path.isdir(folder) and not weights:
            reason = f"it has no {_WEIGHTS}.safetensors; pickles and variants such as fp16 aren't read"
        raise UserError(f"can't load {description}: {reason}") from None


def find_pipeline(folder_or_id: str | Path, parts: Sequence[str] = PARTS) -> Path:
    """Return the folder of a pipeline; download it first for a hub id (safetensors, JSON and text, no pickles).

    Raises UserError if there is no such folder or repository, or if parts are missing.
    """
    folder = Path(model_folder(folder_or_id))
    if not folder.is_dir():
        if not is_hub_id(str(folder_or_id)):
            raise UserError(
                f"no pipeline at {str(folder_or_id)!r}: give a folder such as runs/ldm/model, or a hub id owner/name"
            )
        folder = fetch(str(folder_or_id), _PATTERNS)
    if missing := [part for part in parts if not (folder / part).is_dir()]:
        subfolders = ", ".join(f"{part}/" for part in missing)
        raise UserError(f"{str(folder_or_id)!r} is not a complete pipeline folder: missing {subfolders}")
    return folder
