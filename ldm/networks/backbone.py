"""The interface of a network, for the code that uses it: pipeline, training, guidance, saving and model cards."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm.denoiser import ScaledNetwork
from ldm.errors import UserError
from ldm.networks.attention import AttentionBackend


@dataclass(frozen=True)
class Backbone(ABC):
    """A network and its properties. `dataclasses.replace(backbone, module=copy)` wraps a copy of the network."""

    module: nn.Module
    """Module with all the weights."""
    latent_channels: int
    """Channels c of the state x_t (b, c, h, w)."""
    out_channels: int
    """Channels of the output: c, or 2c with a learned variance (Nichol & Dhariwal 2021)."""
    condition_width: int
    """Width of the condition (b, tokens, width). The network accepts any number of tokens."""
    sample_size: tuple[int, int]
    """Height and width of the latents that the network was built for, the default for sampling."""
    context_channels: int = 0
    """Input channels besides the state; see `ldm.task`."""
    guidance_width: int = 0
    """Width of the embedding from which the network reads a guidance scale; 0: it reads none."""
    size_multiple: int = 1
    """Number that must divide the height and the width of the latents."""

    part: ClassVar[str]
    """Folder of the weights in a saved pipeline, and their name in model_index.json."""

    @property
    def in_channels(self) -> int:
        """Number of channels of the state and its context together."""
        return self.latent_channels + self.context_channels

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.module.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.module.parameters()).device

    def __call__(self, x: Tensor, time: Tensor, condition: Tensor, scale: Tensor | None = None) -> Tensor:
        """Predict (b, out_channels, h, w) from (b, in_channels, h, w) at model times (b,), in the weights' dtype.

        scale: guidance scales (b,), for a network that reads them; None: 1.
        """
        return self.module(x.to(self.dtype), time, condition)

    def for_sampling(self, reuse_features: int = 1) -> ScaledNetwork:
        """Return the same network for many steps with the same conditions; each call returns a new one.

        What depends only on the condition is computed in the first step. reuse_features: number of steps in which the
        output of the deep layers is used, which is approximate above 1. Raises UserError if the network can't.
        """
        if reuse_features != 1:
            raise UserError(f"reuse features: {type(self.module).__name__} can't reuse them; leave it out")
        return self

    def core(self) -> nn.Module:
        """Return the part that is called in each step: (x, the output of `per_step`, *the output of `per_prompt`)."""
        return self.module

    def per_step(self, time: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return what `core` needs in each step; default: the time."""
        return time

    def per_prompt(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Return what `core` needs of the condition, which is the same in all steps; default: the condition."""
        return (condition,)

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the weights, and the files needed to load them, into a separate folder."""

    def diffusers_limits(self) -> str | None:
        """Return one line that says what diffusers can't do with this network; None if it can do everything."""
        return (
            f"network {type(self.module).__name__}: diffusers can't load this model; load it with "
            "LatentDiffusionPipeline.from_pretrained(folder, backbone=...)"
        )

    def describe(self) -> str:
        """Return the network's shape in a few words, for the model card."""
        return type(self.module).__name__

    def set_attention(
        self, backend: AttentionBackend, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Literal["sdpa", "xformers"]:
        """Set the attention backend and return the one in use, e.g. for `auto`. Raises UserError if unavailable."""
        if backend == "xformers":
            raise UserError(f"attention xformers: {type(self.module).__name__} doesn't support it; choose sdpa")
        return "sdpa"

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass to save memory. Raises UserError if the network can't."""
        raise UserError(f"gradient checkpointing: {type(self.module).__name__} doesn't support it; leave it out")
