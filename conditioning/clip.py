"""CLIP's text tower (Radford et al. 2021) as the condition of the diffusion (Rombach et al. 2022, sec. 3.3).

The UNet gets every token's last hidden state after the final layer norm, including the padding, without a mask. This is
the input of Stable Diffusion 1's UNet, so diffusers' own pipeline gives the same numbers with the saved folder. Clip
skip leaves out the last layers and keeps the final norm, as Stable Diffusion 2's checkpoints do.

Prompts that are longer than the tower's input are read in chunks. Each chunk is encoded separately, with its own begin
and end, and the UNet attends to the tokens of all chunks. The number of chunks is fixed for a model, so all conditions,
including the null condition, have one shape.
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
from safetensors.torch import save_file
from torch import Tensor, nn

from conditioning import MOST_CHUNKS, PromptWeights
from conditioning.openclip import PREFIX, load_openclip
from conditioning.tokenizer import fingerprint, load_tokenizer, save_tokenizer, tokenize, tokenize_weighted
from conditioning.weights import apply, fragments
from ldm.errors import UserError, one_line
from ldm.formats.clip_layout import empty_text_model
from ldm.formats.hub import fetch, fill, is_hub_id, model_folder, read_weights, weight_files
from ldm.libraries import CLIPTokenizer
from ldm.networks.text_tower import TextTower

# Names of the text tower's weights in a CLIPModel or a CLIPTextModel, with or without the prefix.
_TOWER = re.compile(r"(?:text_model\.)?((?:embeddings|encoder|final_layer_norm)\..+)")
_PREFIX = "text_model."
_STEM = "model"  # start of the names of the weights' files
_CHUNKS = "prompt_chunks"  # key in the text encoder's config.json, which transformers ignores
_UNUSED = re.compile(  # weights of a whole CLIP that aren't in its text tower's encodings
    r"(?:text_model\.)?embeddings\.position_ids|vision_model\..+|(?:visual|text)_projection\..+|logit_(?:scale|bias)"
)
_FILES = (  # files of a hub repository, besides the weights
    *("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
)


class ClipTextEncoder(nn.Module):
    """Encoder of prompts to (b, tokens, width), without gradients, on the module's device and in its dtype.

    max_length: tokens of a chunk, including begin and end. tokens: tokens of an encoding, chunks · max_length.
    """

    def __init__(self, model: TextTower, tokenizer: CLIPTokenizer, *, chunks: int | None = None) -> None:
        """Wrap a model and a tokenizer. The model isn't frozen: a text tower in training stays trainable.

        chunks: number of chunks in which a prompt is read; None: the saved model's number, or 1.
        Raises UserError if the tokenizer has ids that the model doesn't have, or for chunks out of range.
        """
        super().__init__()
        config = model.config
        chunks = getattr(config, _CHUNKS, 1) if chunks is None else chunks
        if type(chunks) is not int or not 1 <= chunks <= MOST_CHUNKS:
            raise UserError(f"chunks {chunks!r}: must be a whole number from 1 to {MOST_CHUNKS}")
        if len(tokenizer) > config.vocab_size:
            raise UserError(
                f"the tokenizer has {len(tokenizer)} tokens, but the text encoder only {config.vocab_size}: "
                "use a tokenizer and a text encoder of the same model"
            )
        tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
        self.model, self.tokenizer = model, tokenizer
        self.max_length: int = tokenizer.model_max_length
        self.width: int = config.hidden_size
        self.chunks: int = chunks

    @property
    def tokens(self) -> int:
        """Number of tokens of an encoding, over all chunks."""
        return self.chunks * self.max_length

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], rules: PromptWeights = "none") -> Tensor:
        """Return the encodings of prompts, (b, tokens, width).

        rules: those of weights such as (word:1.3); `none`: prompts are plain text. A prompt that is too long is
        truncated, with a warning that quotes the ignored text. Autocast is turned off, so that an encoding depends only
        on the weights and can be cached.
        """
        if rules == "none":
            hidden = self._hidden(tokenize(self.tokenizer, prompts, self.chunks))
            return hidden.view(len(prompts), self.tokens, self.width)
        parts = [fragments(prompt, rules) for prompt in prompts]
        ids, weights = tokenize_weighted(self.tokenizer, parts, self.chunks)
        empty = self._hidden(tokenize(self.tokenizer, [""]))[0]
        weighted = apply(rules, self._hidden(ids), weights.view(-1, self.max_length), empty)
        return weighted.view(len(prompts), self.tokens, self.width)

    def _hidden(self, ids: Tensor) -> Tensor:
        """Return the last hidden states (n, max_length, width) of all chunks."""
        weight = next(self.model.parameters())
        if not len(ids):
            return weight.new_empty(0, self.max_length, self.width)
        with torch.autocast(weight.device.type, enabled=False):
            return self.model(input_ids=ids.view(-1, self.max_length).to(weight.device)).last_hidden_state

    @property
    def digest(self) -> str:
        """SHA-256 of all that an encoding depends on, a key for caches. It reads every weight, so keep the result."""
        config = self.model.config
        about: list[Any] = [config.num_attention_heads, config.hidden_act, config.layer_norm_eps]
        if self.chunks > 1:
            about.append(self.chunks)
        total = hashlib.sha256(json.dumps([fingerprint(self.tokenizer), about]).encode())
        for name, weight in sorted(self._weights().items()):
            total.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            total.update(weight.view(torch.uint8).numpy().data)
        return total.hexdigest()

    @classmethod
    def load(
        cls, source: str | Path, *, dtype: torch.dtype = torch.float32, skip: int = 0, chunks: int | None = None
    ) -> Self:
        """Load a CLIP (whole, or its text tower) with its tokenizer, or a pipeline's, from a folder or a hub id.

        An OpenCLIP is given as `openclip:ViT-B-32/laion2b_s34b_b79k`; see `load_openclip`.

        skip: number of last transformer layers to leave out (clip skip, as in diffusers), also when saving.
        chunks: number of chunks in which a prompt is read; None: the saved model's number, or 1.
        Only safetensors and JSON are read (for an OpenCLIP's tag, open_clip's files, without pickled code). The weights
        are frozen, in evaluation mode, on the CPU. Raises UserError if the source doesn't exist, if a weight is
        missing, or if `skip` leaves no layer.
        """
        name = str(source)
        files = None if name.startswith(PREFIX) else _find(name)
        try:
            model, tokenizer = (_read_tower(files[0]), load_tokenizer(files[1])) if files else load_openclip(name)
            remove_last_layers(model, skip)
            encoder = cls(model, tokenizer, chunks=chunks)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        except Exception as error:  # a broken file makes the libraries raise almost anything
            raise UserError(f"{name} can't be read as a CLIP text encoder: {one_line(error, 300)}") from error
        return encoder.to(dtype).eval().requires_grad_(False)

    def save(self, folder: str | Path) -> None:
        """Write folder/text_encoder/ and folder/tokenizer/, parts of a pipeline, for old and new transformers.

        Older versions need the prefix `text_model.` on every weight and use random weights if it is missing.
        """
        folder = Path(folder)
        self._save_tower(folder / "text_encoder")
        save_tokenizer(self.tokenizer, folder / "tokenizer")

    def save_flat(self, folder: Path) -> None:
        """Write the text encoder and its tokenizer into one folder, which `from_pretrained` of both reads."""
        self._save_tower(folder)
        save_tokenizer(self.tokenizer, folder)

    def _save_tower(self, folder: Path) -> None:
        config = copy.deepcopy(self.model.config)
        config.architectures = ["CLIPTextModel"]
        config.dtype = next(self.model.parameters()).dtype
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(self.tokenizer, name))
        if self.chunks > 1 or hasattr(config, _CHUNKS):
            setattr(config, _CHUNKS, self.chunks)
        config.save_pretrained(folder)
        save_file(self._weights(), folder / "model.safetensors", metadata={"format": "pt"})

    def diffusers_limits(self) -> str | None:
        """Return one line that says what diffusers can't do with this text encoder; None if it can do everything."""
        if self.chunks > 1:
            return (
                f"prompts have up to {self.chunks} chunks: diffusers reads only the first {self.max_length} "
                "tokens of a prompt; use ldm-txt2img or LatentDiffusionPipeline"
            )
        return None

    def _weights(self) -> dict[str, Tensor]:
        """Return the weights by their names on disk, on the CPU."""
        state = self.model.state_dict()
        return {_PREFIX + k.removeprefix(_PREFIX): v.detach().cpu().contiguous() for k, v in state.items()}


def _find(source: str) -> tuple[Path, Path]:
    """Return the folders of a text encoder's weights and of its tokenizer."""
    folder = Path(model_folder(source)).resolve() if os.path.isdir(source) else _download(source)
    beside: tuple[Path, ...]
    if (folder / "text_encoder" / "config.json").is_file():
        weights, beside = folder / "text_encoder", (folder / "tokenizer", folder / "text_encoder", folder)
    elif (folder / "config.json").is_file():
        weights, beside = folder, (folder, folder / "tokenizer")
        if folder.name == "text_encoder":  # inside a pipeline
            beside += (folder.with_name("tokenizer"),)
    else:
        raise UserError(f"{source} contains no text encoder: must contain config.json or text_encoder/config.json")
    tokens = next((f for f in beside if _has_tokenizer(f)), None)
    if tokens is None:
        raise UserError(
            f"{source} contains no tokenizer: it must have tokenizer.json, or vocab.json and merges.txt, in "
            + " or ".join(map(str, beside))
        )
    return weights, tokens


def remove_last_layers(model: TextTower, skip: int) -> None:
    """Remove a text tower's last `skip` layers, in place. Raises UserError if none would remain."""
    encoder = model.encoder
    count = len(encoder.layers)
    if not 0 <= skip < count:
        raise UserError(f"clip_skip {skip}: must be 0 to {count - 1} for a text encoder of {count} layers")
    encoder.layers = encoder.layers[: count - skip]
    model.config.num_hidden_layers = count - skip


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file() or all((folder / f).is_file() for f in ("vocab.json", "merges.txt"))


def _read_tower(folder: Path) -> TextTower:
    """Read only the text tower, in its stored dtype; every weight must be present.

    transformers' own loader fills missing weights with random numbers, and loads adapters and quantisations that a
    folder names. Here only weights and configuration values are read.
    """
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = empty_text_model(stored)  # without memory or random numbers until the shapes are checked
    weights = read_weights(weight_files(folder, _STEM))
    fill(
        model,
        {
            match[1] if (match := _TOWER.fullmatch(name)) else name: value
            for name, value in weights.items()
            if not _UNUSED.fullmatch(name)
        },
    )
    return model


def _download(name: str) -> Path:
    """Download only the text encoder and the tokenizer of a hub repository, and never pickles."""
    if not is_hub_id(name):
        raise UserError(f"{name}: must be an existing folder or a hub id (owner/name)")
    files = [part + file for part in ("", "text_encoder/", "tokenizer/") for file in _FILES]
    return fetch(name, files, {"": _STEM, "text_encoder/": _STEM})
