"""OpenCLIP's text towers (Cherti et al. 2023, arXiv 2212.07143) as text towers of CLIP.

OpenCLIP's CLIP tower is the same transformer with other weight names, and its tokenizer has the same merges. So the
result is trained, saved and loaded as an ordinary CLIP text encoder. Towers of other kinds are refused. Captions are
padded with token 0, as in OpenCLIP and Stable Diffusion 2; elsewhere in this project, with the end token. The causal
mask hides the padding from every token of the caption, but the UNet reads the padding's features too.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from conditioning.tokenizer import END, LARGEST, clip_tokenizer
from ldm.errors import UserError
from ldm.formats.clip_layout import openclip_names
from ldm.formats.hub import fetch
from ldm.libraries import CLIPTextConfig, CLIPTokenizer
from ldm.networks.text_tower import TextTower

PREFIX = "openclip:"
PAD = "!"
"""OpenCLIP's padding, token 0. It is also the token of an exclamation mark inside a word."""
_CONFIG, _WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"  # files of open_clip's own folders
_HUB = "hf-hub:"
_DEFAULTS = {"context_length": 77, "vocab_size": LARGEST, "width": 512, "heads": 8, "layers": 12}
_TOWER = re.compile(r"(?:module\.)?(?:text\.)?((?:token_embedding|positional_embedding|transformer|ln_final)\b.*)")


def load_openclip(name: str) -> tuple[TextTower, CLIPTokenizer]:
    """Load the text tower and the tokenizer of an OpenCLIP. The name is one of

        openclip:ARCHITECTURE/TAG               open_clip's own weights
        openclip:ARCHITECTURE/FILE.safetensors  a checkpoint
        openclip:FOLDER                         with open_clip_config.json and open_clip_model.safetensors
        openclip:hf-hub:OWNER/NAME              a repository with these files

    Raises UserError if open_clip isn't installed or doesn't know the name. Damaged files can raise any error.
    """
    try:
        import open_clip
    except ImportError as error:
        raise UserError("open_clip isn't installed: pip install open-clip-torch") from error
    place = name.removeprefix(PREFIX).removeprefix("local-dir:")
    if place.startswith(_HUB):
        return _read_folder(fetch(place.removeprefix(_HUB), [_CONFIG, _WEIGHTS]))
    if (Path(place) / _CONFIG).is_file():
        return _read_folder(Path(place))
    architecture, _, weights = place.partition("/")
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise UserError(
            f"open_clip has no architecture {architecture!r} (an example is ViT-B-32), and {place!r} is not a folder "
            f"with {_CONFIG}"
        )
    text_config(config)  # refuses other towers before anything is downloaded
    if weights.endswith(".safetensors") and Path(weights).is_file():
        return convert(load_file(weights), config), tokenizer_of(config)
    tag = open_clip.get_pretrained_cfg(architecture, weights)
    if not tag:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise UserError(f"weights {weights!r}: must be a .safetensors file, or one of open_clip's tags: {known}")
    config["quick_gelu"] = bool(tag.get("quick_gelu"))  # the weights decide this, not the architecture
    model = open_clip.create_model(architecture, pretrained=weights, force_quick_gelu=config["quick_gelu"])
    return convert(model.state_dict(), config), tokenizer_of(config)


def _read_folder(folder: Path) -> tuple[TextTower, CLIPTokenizer]:
    for file in (_CONFIG, _WEIGHTS):
        if not (folder / file).is_file():
            raise UserError(f"{file} is missing in the folder (pickled weights are never read)")
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    return convert(load_file(folder / _WEIGHTS), config), tokenizer_of(config)


def text_config(config: Mapping[str, Any]) -> CLIPTextConfig:
    """Convert the configuration of open_clip.get_model_config to that of transformers' text tower.

    Raises UserError if it isn't a CLIP text tower.
    """
    # TextTower doesn't support any other key (another tokenizer, no causal mask, a class token).
    if foreign := sorted(set(config["text_cfg"]) - set(_DEFAULTS)):
        raise UserError(f"its text tower sets {', '.join(foreign)}: only CLIP's text tower is supported")
    text = _DEFAULTS | config["text_cfg"]
    if text["vocab_size"] != LARGEST:
        raise UserError(f"its vocabulary has {text['vocab_size']} tokens: only CLIP's, with {LARGEST}, is supported")
    return CLIPTextConfig(
        hidden_size=text["width"],
        intermediate_size=4 * text["width"],
        num_hidden_layers=text["layers"],
        num_attention_heads=text["heads"],
        hidden_act="quick_gelu" if config.get("quick_gelu") else "gelu",
        vocab_size=text["vocab_size"],
        max_position_embeddings=text["context_length"],
        bos_token_id=text["vocab_size"] - 2,
        eos_token_id=text["vocab_size"] - 1,
        pad_token_id=0,
    )


def convert(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> TextTower:
    """Build a text tower from the state_dict and the configuration of a whole open_clip model.

    Raises UserError if a weight is missing or has no counterpart, RuntimeError if a shape differs.
    """
    theirs = {match[1]: weight for name, weight in state.items() if (match := _TOWER.fullmatch(name))}
    converted = TextTower(text_config(config))
    weights: dict[str, Tensor] = {}
    for name, ours in openclip_names(converted.config.num_hidden_layers).items():
        if name not in theirs:
            raise UserError(f"the weight {name} is missing")
        parts = theirs.pop(name).detach().float().clone().chunk(len(ours))
        weights |= zip(ours, parts, strict=True)
    if theirs:
        raise UserError(f"its text tower has the weight {next(iter(theirs))}: only CLIP's text tower is supported")
    converted.load_state_dict(weights, strict=True)
    return converted


def tokenizer_of(config: Mapping[str, Any]) -> CLIPTokenizer:
    """Build CLIP's tokenizer from the merges in open_clip."""
    return published_tokenizer(text_config(config).max_position_embeddings, 0)


def published_tokenizer(length: int, pad: int | None = None) -> CLIPTokenizer:
    """Build the tokenizer of OpenAI's CLIP. pad: id of the padding, 0 or that of the end token (default).

    Raises UserError if open_clip, which has its merges, isn't installed.
    """
    try:
        from open_clip.tokenizer import SimpleTokenizer
    except ImportError:
        raise UserError(
            "CLIP's tokenizer is missing: give a configuration folder that contains tokenizer/, or "
            "pip install open-clip-torch, which contains it"
        ) from None
    return clip_tokenizer(list(SimpleTokenizer().bpe_ranks), length, PAD if pad == 0 else END)
