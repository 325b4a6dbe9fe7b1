"""CLIP's text tower (Radford et al. 2021, sec. 2.4), for encoding.

It computes what transformers' CLIPTextModel does, digit for digit, with the same names of weights. The library's class
isn't used for encoding, because importing it takes longer than generating a small image.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.libraries import CLIPTextConfig


class Encoded(NamedTuple):
    """Output of a text tower."""

    last_hidden_state: Tensor  # (b, tokens, width)
    """Features of each token after the final layer norm."""


def _norm(config: CLIPTextConfig) -> nn.LayerNorm:
    assert config.layer_norm_eps is not None
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class TextTower(nn.Module):
    """Transformer whose tokens attend only to themselves and to earlier ones. Its weights must be loaded."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        self.encoder = _Layers(config)
        self.final_layer_norm = _norm(config)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights. diffusers' pipelines read it."""
        return self.final_layer_norm.weight.dtype

    def forward(self, input_ids: Tensor, attention_mask: None = None) -> Encoded:
        """Encode ids (b, tokens). attention_mask: argument of diffusers' pipelines, which must be None."""
        assert attention_mask is None
        x = self.embeddings(input_ids)
        for layer in self.encoder.layers:
            x = layer(x)
        return Encoded(self.final_layer_norm(x))


class _Embeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding, self.position_embedding = (
            # Not nn.Embedding(n, width): without memory, its random numbers make torch import its compiler.
            nn.Embedding.from_pretrained(torch.empty(n, config.hidden_size), freeze=False)
            for n in (config.vocab_size, config.max_position_embeddings)
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class _Layers(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class _Layer(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.layer_norm1 = _norm(config)
        self.self_attn = _Attention(config)
        self.layer_norm2 = _norm(config)
        self.mlp = _Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Attention(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        if width % self.heads:
            raise ValueError(f"hidden_size {width}: must be a multiple of num_attention_heads {self.heads}")
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (  # (b, heads, tokens, width of a head) each
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.activation = _activation(config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    """Return the activation that a config.json names; transformers has those that CLIP's own towers don't use."""
    match name:
        case "quick_gelu":
            return _quick_gelu
        case "gelu":
            return F.gelu
        case _:
            from transformers.activations import ACT2FN

            return ACT2FN[name]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)
