"""Pipelines by name: a folder, or a repository of the hub."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from ldm.errors import UserError

_WANTED = [
    "model_index.json", "*/*config.json", "tokenizer/*.json", "tokenizer/*.txt", "vae/preview.json",
    *(f"{part}/diffusion_pytorch_model{kind}" for part in ("unet", "vae") for kind in (".safetensors", "-*-of-*.safetensors", ".safetensors.index.json")),
    *(f"text_encoder/model{kind}" for kind in (".safetensors", "-*-of-*.safetensors")),
]  # fmt: skip


def find_pipeline(where: str | Path) -> Path:
    """The folder of a pipeline, which a hub id (owner/name) is first copied to: safetensors, JSON and text, no pickles.

    Raises UserError where there is neither, or parts are missing.
    """
    folder = Path(where)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(where)) or folder.exists() or folder.parent.is_dir():
            raise UserError(
                f"no pipeline at {str(where)!r}: give a folder such as runs/ldm/model, or a hub id owner/name"
            )
        try:
            folder = Path(snapshot_download(str(where), allow_patterns=_WANTED))
        except Exception as error:  # the hub's client and its transport have many errors and no common one
            said = " ".join(str(error).split())[:300]
            raise UserError(f"{str(where)!r} is no folder, and the hub gave no such repository: {said}") from None
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    if missing := [part for part in parts if not (folder / part).is_dir()]:
        raise UserError(f"{str(where)!r} is no pipeline folder: it lacks {', '.join(f'{m}/' for m in missing)}")
    return folder
