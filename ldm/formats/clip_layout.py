"""File layout of CLIP's text tower: its config.json, and the names of its weights in OpenCLIP (Cherti et al. 2023)."""

from collections.abc import Mapping
from typing import Any

import torch

from ldm.errors import UserError
from ldm.files import require_plausible
from ldm.libraries import CLIPConfig, CLIPTextConfig
from ldm.networks.text_tower import TextTower

_OPENCLIP_LAYER = {  # transformers' name → OpenCLIP's name
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def empty_text_model(stored_config: Mapping[str, Any]) -> TextTower:
    """Build the text tower of a CLIP's config.json, without memory for weights. Raises UserError for other models."""
    config: Any
    require_plausible(stored_config)
    match stored_config.get("model_type"):
        case "clip":
            config = CLIPConfig.from_dict(dict(stored_config)).text_config
        case "clip_text_model":
            config = CLIPTextConfig.from_dict(dict(stored_config))
        case other:
            raise UserError(f"text encoder of model_type {other!r}: must be 'clip' or 'clip_text_model'")
    if type(config.eos_token_id) is not int:  # noticed only when a prompt is encoded
        raise UserError(f"eos_token_id {config.eos_token_id!r}: must be a whole number")
    with torch.device("meta"):
        return TextTower(config)


def openclip_names(layers: int) -> dict[str, tuple[str, ...]]:
    """Return a table from OpenCLIP's name of a weight to the names of a TextTower's weights that it consists of.

    Several weights are concatenated along the rows.
    """
    names: dict[str, tuple[str, ...]] = {
        "positional_embedding": ("embeddings.position_embedding.weight",),
        "token_embedding.weight": ("embeddings.token_embedding.weight",),
    }
    for kind in ("weight", "bias"):
        names[f"ln_final.{kind}"] = (f"final_layer_norm.{kind}",)
        for k in range(layers):
            layer, block = f"encoder.layers.{k}.", f"transformer.resblocks.{k}."
            names[f"{block}attn.in_proj_{kind}"] = tuple(f"{layer}self_attn.{x}_proj.{kind}" for x in "qkv")
            names |= {f"{block}{b}.{kind}": (f"{layer}{a}.{kind}",) for a, b in _OPENCLIP_LAYER.items()}
    return names
