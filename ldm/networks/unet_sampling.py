"""The UNet in sampling, where many steps have the same condition.

The keys and values of cross-attention depend only on the condition, so they are computed once. The results are the
same, bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldm.libraries import Attention, UNet2DConditionModel
from ldm.networks.attention import AttentionProcessor, KeysValues

if TYPE_CHECKING:
    from ldm.networks.unet import UNet


def cross_attentions(unet: UNet2DConditionModel) -> list[Attention]:
    """Return the UNet's cross-attention layers in a fixed order."""
    return [m for m in unet.modules() if isinstance(m, Attention) and m.is_cross_attention]


def keys_values(unet: UNet2DConditionModel, condition: Tensor) -> dict[Attention, tuple[Tensor, Tensor]]:
    """Return the keys and values of a condition (b, tokens, width) in each cross-attention, (b, tokens, c) each."""
    return {attn: (attn.to_k(condition), attn.to_v(condition)) for attn in cross_attentions(unet)}


def time_features(unet: UNet2DConditionModel, time: Tensor, guidance: Tensor | None = None) -> Tensor:
    """Return the sinusoids (b, c) of model times (b,), from which the UNet's layers make the time embedding.

    guidance: embedding of the guidance scales, whose projection is added, for a UNet that reads them.
    """
    features = unet.time_proj(time).to(next(unet.parameters()).dtype)
    return features if guidance is None else features + unet.time_embedding.cond_proj(guidance)


def pooled_text(unet: UNet2DConditionModel, condition: Tensor) -> Tensor | None:
    """Return what a condition (b, tokens, width) adds to the time embedding, (b, e); None: nothing."""
    return unet.get_aug_embed(emb=condition, encoder_hidden_states=condition, added_cond_kwargs={})


class PromptOnce:
    """A UNet `(x, time, condition) → prediction` that computes each condition's keys and values once.

    It stores those of the last condition, which it recognises by identity: a condition must not be changed in place.
    """

    def __init__(self, unet: UNet) -> None:
        self.unet = unet
        self.condition: Tensor | None = None
        self.keys_values: KeysValues = {}

    def __call__(self, x: Tensor, time: Tensor, condition: Tensor, scale: Tensor | None = None) -> Tensor:
        module = self.unet.module
        if torch.is_grad_enabled() or not _can_reuse(module):
            return self.unet(x, time, condition, scale)
        if condition is not self.condition:
            self.condition, self.keys_values = condition, keys_values(module, condition)
        return self.unet(x, time, condition, scale, self.keys_values)


def _can_reuse(unet: UNet2DConditionModel) -> bool:
    """Return whether the UNet accepts given keys and values: its attention is ldm's, and it isn't compiled."""
    if unet._compiled_call_impl is not None:
        return False
    return all(isinstance(p, AttentionProcessor) for p in unet.attn_processors.values())


class UNetCore(nn.Module):
    """A UNet without the sinusoids of the time and the projections of the condition, whose inputs are only tensors.

    Its weights are those of the UNet, and its forward pass is that of diffusers' UNet2DConditionModel with the inputs
    that ldm supports.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.attentions = cross_attentions(unet)
        self.center_input: bool = unet.config.center_input_sample

    def forward(self, x: Tensor, time: Tensor, *prompt: Tensor) -> Tensor:
        """Predict from states (b, c, h, w), `time_features` (b, c), and what depends on the condition.

        The latter are `pooled_text` (b, e) if there is one, then the keys and values of each cross-attention.
        """
        unet = self.unet
        embedding = unet.time_embedding(time)
        n = len(prompt) - 2 * len(self.attentions)
        embedding = sum(prompt[:n], embedding)
        if unet.time_embed_act is not None:
            embedding = unet.time_embed_act(embedding)
        keys_values = prompt[n:]
        pairs = zip(keys_values[::2], keys_values[1::2], strict=True)
        given = {"keys_values": dict(zip(self.attentions, pairs, strict=True))}

        def attends(block: nn.Module) -> dict[str, object]:
            return {"cross_attention_kwargs": given} if getattr(block, "has_cross_attention", False) else {}

        x = unet.conv_in(2 * x - 1 if self.center_input else x)
        skips = [x]
        for block in unet.down_blocks:
            x, outputs = block(x, embedding, **attends(block))
            skips += outputs
        if unet.mid_block is not None:
            x = unet.mid_block(x, embedding, **attends(unet.mid_block))
        for block in unet.up_blocks:
            n = len(block.resnets)
            skips, given_skips = skips[:-n], tuple(skips[-n:])
            x = block(x, given_skips, embedding, **attends(block))
        if unet.conv_norm_out is not None:
            x = unet.conv_act(unet.conv_norm_out(x))
        return unet.conv_out(x)
