"""CLIP's text tower (Radford et al. 2021) as the condition of the diffusion (Rombach et al. 2022, sec. 3.3).

The UNet is given every token's last hidden state after the final layer norm, padding included, nothing
masked: what Stable Diffusion 1 feeds its UNet, so a stock pipeline over the saved folder gives the same
numbers.
"""

import copy
import hashlib
import json
import os.path
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from conditioning.openclip import PREFIX, load_openclip
from conditioning.tokenizer import fingerprint, load_tokenizer, save_tokenizer, tokenize
from ldm.errors import UserError

# The text tower's weights wherever they are stored: a CLIPModel, a CLIPTextModel, with or without the prefix.
_TOWER = re.compile(r"(?:text_model\.)?((?:embeddings|encoder|final_layer_norm)\..+)")
_PREFIX = "text_model."
_WANTED = (  # of a hub repository
    *("config.json", "model.safetensors", "model-*-of-*.safetensors"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
)


class ClipTextEncoder(nn.Module):
    """Prompts → (b, max_length, width), without gradients, on the module's device and in its dtype."""

    def __init__(self, model: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        """Takes both as they are; the text tower of a CLIPModel in training stays trainable.

        Raises UserError when the tokenizer has ids that the model doesn't.
        """
        super().__init__()
        config = model.config
        if len(tokenizer) > config.vocab_size:
            raise UserError(f"{len(tokenizer)} tokens in the tokenizer, only {config.vocab_size} in its text encoder")
        tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
        self.model, self.tokenizer = model, tokenizer
        self.max_length: int = tokenizer.model_max_length
        self.width: int = config.hidden_size

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """(b, max_length, width). A prompt that is too long is cut, with a warning that quotes what was lost.

        Autocast is left outside: an encoding depends on the weights alone, so a stored one is as good.
        """
        ids = tokenize(self.tokenizer, prompts)
        weight = next(self.model.parameters())
        if not len(ids):
            return weight.new_empty(0, self.max_length, self.width)
        with torch.autocast(weight.device.type, enabled=False):
            return self.model(input_ids=ids.to(weight.device)).last_hidden_state

    def null(self) -> Tensor:
        """The null condition, (1, max_length, width): the encoding of ""."""
        return self.encode([""])

    @property
    def digest(self) -> str:
        """SHA-256 of all that an encoding depends on, a key for caches. Reads every weight: keep the result."""
        config = self.model.config
        shape = [config.num_attention_heads, config.hidden_act, config.layer_norm_eps]
        total = hashlib.sha256(json.dumps([fingerprint(self.tokenizer), shape]).encode())
        for name, weight in sorted(self._weights().items()):
            total.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            total.update(weight.view(torch.uint8).numpy().data)
        return total.hexdigest()

    @classmethod
    def load(cls, source: str | Path, *, dtype: torch.dtype = torch.float32) -> Self:
        """Reads a folder or a hub id: a CLIP (whole, or its text tower) with its tokenizer, or a pipeline.

        Or an OpenCLIP, as `openclip:ViT-B-32/laion2b_s34b_b79k`.

        Only safetensors and JSON are read (of an OpenCLIP's tag, what open_clip has, without pickled code). The weights come frozen, in evaluation mode, on the CPU. Raises
        UserError when there is no such thing, or when a weight is missing.
        """
        if str(source).startswith(PREFIX):
            return cls(*load_openclip(str(source))).to(dtype).eval().requires_grad_(False)
        folder = Path(source).resolve() if os.path.isdir(source) else _download(str(source))
        beside: tuple[Path, ...]
        if (folder / "text_encoder" / "config.json").is_file():
            weights, beside = folder / "text_encoder", (folder / "tokenizer", folder / "text_encoder", folder)
        elif (folder / "config.json").is_file():
            weights, beside = folder, (folder, folder / "tokenizer")
            if folder.name == "text_encoder":  # inside a pipeline
                beside += (folder.with_name("tokenizer"),)
        else:
            raise UserError(f"{source} has no text encoder: looked for text_encoder/config.json and config.json")
        tokens = next((f for f in beside if _has_tokenizer(f)), None)
        if tokens is None:
            raise UserError(
                f"{source} has no tokenizer: looked for tokenizer.json, or vocab.json and merges.txt, in "
                + ", ".join(map(str, beside))
            )
        try:
            encoder = cls(_read_tower(weights), load_tokenizer(tokens))
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        except Exception as error:  # a broken file makes the libraries raise almost anything
            raise UserError(f"{source} can't be read as a CLIP text encoder: {_line(error)}") from error
        return encoder.to(dtype).eval().requires_grad_(False)

    def save(self, folder: str | Path) -> None:
        """Writes folder/text_encoder/ and folder/tokenizer/, parts of a pipeline, for old and new transformers.

        Older versions want the prefix `text_model.` on every weight, and put random ones where it is missing.
        """
        folder = Path(folder)
        config = copy.deepcopy(self.model.config)
        config.architectures = ["CLIPTextModel"]
        config.dtype = next(self.model.parameters()).dtype
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(self.tokenizer, name))
        config.save_pretrained(folder / "text_encoder")
        save_file(self._weights(), folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
        save_tokenizer(self.tokenizer, folder / "tokenizer")

    def _weights(self) -> dict[str, Tensor]:
        """By their names on disk, on the CPU."""
        state = self.model.state_dict()
        return {_PREFIX + k.removeprefix(_PREFIX): v.detach().cpu().contiguous() for k, v in state.items()}


def _has_tokenizer(folder: Path) -> bool:
    whole, halves = folder / "tokenizer.json", (folder / "vocab.json", folder / "merges.txt")
    return whole.is_file() or all(half.is_file() for half in halves)


def _read_tower(folder: Path) -> CLIPTextModel:
    """The text tower alone, strictly, in the dtype it was stored in.

    transformers' own loader fills what is missing with random numbers, and follows the adapters and
    quantisations that a folder may name. Here a folder is weights and numbers.
    """
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config: Any
    match stored.get("model_type"):
        case "clip":
            config = CLIPConfig.from_dict(stored).text_config
        case "clip_text_model":
            config = CLIPTextConfig.from_dict(stored)
        case other:
            raise UserError(f'model_type {other!r} in config.json: "clip" and "clip_text_model" are accepted')
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        raise UserError("looked for model.safetensors beside config.json (pickled weights are never read)")
    weights = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in list(tensors.keys()):
                if (name := _TOWER.fullmatch(key)) and not key.endswith("position_ids"):
                    weights[name[1]] = tensors.get_tensor(key)
    with torch.device("meta"):  # no memory and no random numbers before the shapes are known to agree
        model = CLIPTextModel(config)
    tower = getattr(model, "text_model", model)  # older transformers have a module in between
    tower.load_state_dict(weights, strict=True, assign=True)
    tower.embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]
    return model


def _download(name: str) -> Path:
    """The text encoder and tokenizer of a hub repository; nothing else is fetched, so no pickles either."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or os.path.exists(name) or os.path.isdir(os.path.dirname(name)):
        raise UserError(f"{name} is neither a folder nor the id (owner/name) of a hub repository")
    wanted = [part + file for part in ("", "text_encoder/", "tokenizer/") for file in _WANTED]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the hub's client and its transport have many errors and no common one
        raise UserError(f"{name} is no folder, and the hub gave no such repository: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
