"""What predicts: the contract between a network and everything else (pipeline, training, guidance, saving, cards)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.networks.attention import AttentionBackend


@dataclass(frozen=True)
class Backbone(ABC):
    """A network, and the facts about it that others need. `dataclasses.replace(b, module=copy)` is the same around a copy."""

    module: nn.Module
    """All the weights: what is trained, averaged and moved."""
    latent_channels: int
    """Channels c of the state x_t (b, c, h, w)."""
    out_channels: int
    """Channels of the output: c, or 2c with a learned variance (Nichol & Dhariwal 2021)."""
    condition_width: int
    """Width of the condition (b, tokens, width). Any number of tokens is taken."""
    sample_size: tuple[int, int]
    """Height and width of the latents that the network is made for."""
    context_channels: int = 0
    """Channels that the network sees beside the state; see `ldm.task`."""
    size_multiple: int = 1
    """Number of which both sides of the latents must be multiples."""

    part: ClassVar[str]
    """Folder of the weights in a saved pipeline, and their name in model_index.json."""

    @property
    def in_channels(self) -> int:
        """Channels of the state and its context."""
        return self.latent_channels + self.context_channels

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    def __call__(self, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Return the prediction (b, out_channels, h, w) for (b, in_channels, h, w) at model times (b,), in the weights' dtype."""
        return self.module(x.to(self.dtype), time, condition)

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the weights, and what is needed to load them, into a folder of their own."""

    def stock_limits(self) -> str | None:
        """Return in one line what stock diffusers can't do with this network; None: nothing."""
        return f"a {type(self.module).__name__}: stock diffusers can't load it; our pipeline is given it as an object"

    def describe(self) -> str:
        """Return the network's shape in a few words, for the model card."""
        return type(self.module).__name__

    def set_attention(
        self, backend: AttentionBackend, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Literal["sdpa", "xformers"]:
        """Choose what computes the attention, and return what `auto` came to. Raises UserError where it can't be had."""
        if backend == "xformers":
            raise UserError(f"attention xformers isn't to be had with a {type(self.module).__name__}; take sdpa")
        return "sdpa"

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass. Raises UserError for a network that can't."""
        raise UserError(f"a {type(self.module).__name__} has no gradient checkpointing: leave it out")
