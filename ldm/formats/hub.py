"""Models by name: a local folder or a hub repository."""

import os.path
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ldm.errors import UserError, one_line

_NETWORK = "diffusion_pytorch_model"  # diffusers' name of the weights' file or files
_WANTED = [
    "model_index.json",
    "*/*config.json",
    "tokenizer/*.json",
    "tokenizer/*.txt",
    "vae/preview.json",
    *(
        f"{part}/{_NETWORK}{kind}"
        for part in ("unet", "vae")
        for kind in (".safetensors", "-*-of-*.safetensors", ".safetensors.index.json")
    ),
    *(f"text_encoder/model{kind}" for kind in (".safetensors", "-*-of-*.safetensors")),
]
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def is_hub_id(place: str) -> bool:
    """Return whether a missing path can be a hub id owner/name. It can't if a local folder `owner` exists."""
    return (
        re.fullmatch(r"[\w.-]+/[\w.-]+", place) is not None
        and not os.path.exists(place)
        and not os.path.isdir(os.path.dirname(place))
    )


def model_folder(where: str | Path) -> str | Path:
    """Return `where`, or for the folder of a training run, e.g. runs/ldm, the model/ in it.

    Raises UserError for a run that has no model/ yet.
    """
    folder = Path(where)
    if not folder.is_dir() or _is_model(folder):
        return where
    if _is_model(folder / "model"):
        return folder / "model"
    if (folder / "config.yaml").is_file() and any((folder / name).exists() for name in (".lock", "checkpoints")):
        raise UserError(f"the run {str(where)!r} has no model/ yet: its first checkpoint will write it")
    return where


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "model_index.json"))


def fetch(name: str, wanted: Sequence[str]) -> Path:
    """Download the matching files of a repository and return their folder. Raises UserError if the hub has none."""
    try:
        return Path(snapshot_download(name, allow_patterns=[*wanted]))
    except Exception as error:  # the hub's client raises many errors without a common base class
        said = one_line(error, 300)
        raise UserError(f"{name!r} is no folder, and the hub gave no such repository: {said}") from error


def load_network(kind: Any, place: str | Path, what: str) -> Any:
    """Load a network of diffusers' class `kind` from a folder or a hub id, on the CPU, from safetensors only.

    Raises UserError if it can't be read. what: the network's name in that message, e.g. "the UNet of 'runs/ldm/model'".
    """
    try:
        named = kind.load_config(str(place)).get("_class_name", kind.__name__)
        if named != kind.__name__:  # diffusers only warns, and draws the weights that don't fit at random
            raise ValueError(f"its config.json says {named}, not {kind.__name__}")
        network = kind.from_pretrained(str(place), use_safetensors=True, low_cpu_mem_usage=False)
        network.register_to_config(_name_or_path="")  # else saved files would contain this machine's paths
        return network
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        said = one_line(error)
        weights = [*Path(place).glob(f"{_NETWORK}.safetensors"), *Path(place).glob(f"{_NETWORK}-*")]
        if os.path.isdir(place) and not weights:
            said = f"it has no {_NETWORK}.safetensors; pickles and variants (fp16) aren't read"
        raise UserError(f"can't load {what}: {said}") from None


def find_pipeline(where: str | Path, parts: Sequence[str] = PARTS) -> Path:
    """Return the folder of a pipeline; download it first for a hub id (safetensors, JSON and text, no pickles).

    Raises UserError if there is no such folder or repository, or if parts are missing.
    """
    folder = Path(model_folder(where))
    if not folder.is_dir():
        if not is_hub_id(str(where)):
            raise UserError(
                f"no pipeline at {str(where)!r}: give a folder such as runs/ldm/model, or a hub id owner/name"
            )
        folder = fetch(str(where), _WANTED)
    if missing := [part for part in parts if not (folder / part).is_dir()]:
        raise UserError(f"{str(where)!r} is no pipeline folder: it lacks {', '.join(f'{m}/' for m in missing)}")
    return folder
