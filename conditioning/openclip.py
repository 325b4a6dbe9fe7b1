"""OpenCLIP's text towers (Cherti et al. 2023, arXiv 2212.07143) as transformers' CLIPTextModel.

A CLIP's tower is the same transformer under other names, and its tokenizer the same merges, so what is trained, saved
and loaded afterwards is an ordinary CLIP text encoder. Towers of other kinds are refused. Captions are padded with the end token, as everywhere in this
project; the causal mask hides the padding from every token of the caption.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from conditioning.tokenizer import LARGEST, clip_tokenizer
from ldm.errors import UserError

PREFIX = "openclip:"
_KNOWN = {"context_length", "vocab_size", "width", "heads", "layers"}
_NAMES = {  # of a layer: ours ← theirs
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def load_openclip(name: str) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """`openclip:ARCHITECTURE/WEIGHTS` → text tower and tokenizer; WEIGHTS is a tag of open_clip's or a .safetensors file.

    Raises UserError when open_clip isn't installed, or has no such thing.
    """
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"{name} needs open_clip: pip install -e '.[openclip]'") from error
    architecture, _, weights = name.removeprefix(PREFIX).partition("/")
    config = open_clip.get_model_config(architecture)
    if config is None:
        raise UserError(f"{name}: open_clip has no architecture {architecture!r}; one of its is ViT-B-32")
    text = config["text_cfg"]
    # Whatever else stands there (another tokenizer, no causal mask, a class token) CLIPTextModel hasn't got.
    if foreign := sorted(set(text) - _KNOWN):
        raise UserError(f"{name}: the text tower of {architecture} isn't CLIP's ({', '.join(foreign)})")
    if text["vocab_size"] != LARGEST:
        raise UserError(
            f"{name}: {text['vocab_size']} tokens in the vocabulary of {architecture}, not CLIP's {LARGEST}"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights not in tags and not (weights.endswith(".safetensors") and Path(weights).is_file()):
        known = ", ".join(tags) or "none of open_clip's own"
        raise UserError(f"{name}: weights {weights!r} are neither a .safetensors file nor one of: {known}")
    try:
        model = open_clip.create_model(architecture, pretrained=weights)
    except Exception as error:  # the hub's client, its transport and damaged files have no common error
        raise UserError(f"{name} can't be loaded: {' '.join(str(error).split())[:300]}") from error
    return convert(model, config), tokenizer_of(config)


def convert(model: nn.Module, config: dict[str, Any]) -> CLIPTextModel:
    """The text tower of an open_clip model whose configuration (open_clip.get_model_config) is given."""
    theirs: Any = getattr(model, "text", model)
    text, blocks = config["text_cfg"], theirs.transformer.resblocks
    converted = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=text["width"],
            intermediate_size=4 * text["width"],
            num_hidden_layers=text["layers"],
            num_attention_heads=text["heads"],
            hidden_act="quick_gelu" if type(blocks[0].mlp.gelu).__name__ == "QuickGELU" else "gelu",
            vocab_size=text["vocab_size"],
            max_position_embeddings=text["context_length"],
            bos_token_id=text["vocab_size"] - 2,
            eos_token_id=text["vocab_size"] - 1,
            pad_token_id=text["vocab_size"] - 1,
        )
    )
    weights: dict[str, Tensor] = {
        "embeddings.token_embedding.weight": theirs.token_embedding.weight,
        "embeddings.position_embedding.weight": theirs.positional_embedding,
        "final_layer_norm.weight": theirs.ln_final.weight,
        "final_layer_norm.bias": theirs.ln_final.bias,
    }
    for k, block in enumerate(blocks):
        layer, state = f"encoder.layers.{k}.", block.state_dict()
        for kind in ("weight", "bias"):
            parts = state[f"attn.in_proj_{kind}"].chunk(3)
            weights |= {f"{layer}self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}
            weights |= {f"{layer}{ours}.{kind}": state[f"{name}.{kind}"] for ours, name in _NAMES.items()}
    tower = getattr(converted, "text_model", converted)  # older transformers have a module in between
    missing, unexpected = tower.load_state_dict({k: w.detach().clone() for k, w in weights.items()}, strict=False)
    if unexpected or set(missing) - {"embeddings.position_ids"}:
        raise UserError(f"this open_clip text tower isn't CLIP's: {(unexpected or missing)[0]} has no counterpart")
    return converted.float()


def tokenizer_of(config: dict[str, Any]) -> CLIPTokenizer:
    """CLIP's tokenizer, from the merges that open_clip brings along."""
    from open_clip.tokenizer import SimpleTokenizer

    return clip_tokenizer(list(SimpleTokenizer().bpe_ranks), config["text_cfg"]["context_length"])
