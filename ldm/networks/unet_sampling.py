"""The UNet in sampling, where many steps have the same condition.

The keys and values of cross-attention depend only on the condition, so they are computed once. The results are the
same, bit for bit. `DeepFeatures` also reuses the deep layers' output, which is approximate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldm.errors import UserError
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
        return self.run(x, time, prompt)[0]

    def run(
        self, x: Tensor, time: Tensor, prompt: tuple[Tensor, ...], deep: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict, and return the deep features too: the input of the last block.

        deep: deep features to use; only the first and the last block run then. None: all blocks run.
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
        (first, *lower), (*upper, last) = unet.down_blocks, unet.up_blocks

        def attends(block: nn.Module) -> dict[str, object]:
            return {"cross_attention_kwargs": given} if getattr(block, "has_cross_attention", False) else {}

        x = unet.conv_in(2 * x - 1 if self.center_input else x)
        skips = [x]
        x, outputs = first(x, embedding, **attends(first))
        skips += outputs
        if deep is None:
            for block in lower:
                x, outputs = block(x, embedding, **attends(block))
                skips += outputs
            if unet.mid_block is not None:
                x = unet.mid_block(x, embedding, **attends(unet.mid_block))
            for block in upper:
                n = len(block.resnets)
                skips, given_skips = skips[:-n], tuple(skips[-n:])
                x = block(x, given_skips, embedding, **attends(block))
            deep = x
        x = last(deep, tuple(skips[: len(last.resnets)]), embedding, **attends(last))
        if unet.conv_norm_out is not None:
            x = unet.conv_act(unet.conv_norm_out(x))
        return unet.conv_out(x), deep


class DeepFeatures:
    """A UNet `(x, time, condition) → prediction` whose deep blocks run only in every n-th call of a trajectory.

    The other calls reuse their output, which changes slowly from step to step, and run only the blocks at full
    resolution. This is approximate: DeepCache (Ma et al. 2023, arXiv 2312.00858) with its deepest branch.
    """

    def __init__(self, unet: UNet, every: int) -> None:
        """every: n; 1: all blocks run in all calls. Raises UserError if the UNet's attention isn't ldm's."""
        if not _can_reuse(unet.module):
            raise UserError(f"reuse features {every}: needs ldm's attention, without torch.compile; leave it out")
        self.unet, self.every, self.core = unet, every, UNetCore(unet.module)
        self.condition: Tensor | None = None
        self.prompt: tuple[Tensor, ...] = ()
        self.deep: Tensor | None = None
        self.calls = 0
        """Number of calls since the deep blocks ran."""

    def __call__(self, x: Tensor, time: Tensor, condition: Tensor, scale: Tensor | None = None) -> Tensor:
        if condition is not self.condition:  # e.g. outside of the guidance interval: other features, of another batch
            self.condition, self.prompt, self.deep = condition, self.unet.per_prompt(condition), None
        if self.calls >= self.every:
            self.deep = None
        self.calls = 1 if self.deep is None else self.calls + 1
        features = self.unet.per_step(time, scale)
        output, self.deep = self.core.run(x.to(self.unet.dtype), features, self.prompt, self.deep)
        return output
