"""The configuration of stage 0, a small CLIP."""

from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from train.config.optimizer import strict
from train.config.run import RunConfig, on_squares

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from conditioning.contrastive import Contrastive


@dataclass(frozen=True, kw_only=True, config=strict)
class TextTowerConfig:
    """Text tower of a small CLIP."""

    vocab_size: int = Field(default=2000, ge=600)
    """Size of the byte-pair vocabulary learned from the captions; it must hold all bytes and their word-end forms."""
    max_length: int = Field(default=77, ge=4)
    """Number of tokens to which a caption is padded or cut, including the begin and end tokens."""
    width: int = Field(default=256, gt=0)
    """Features per token, as read by the UNet's cross-attention."""
    layers: int = Field(default=4, gt=0)
    """Transformer layers."""
    heads: int = Field(default=4, gt=0)
    """Attention heads."""


@dataclass(frozen=True, kw_only=True, config=strict)
class ImageTowerConfig:
    """Image tower of a small CLIP (a vision transformer)."""

    patch_size: int = Field(default=8, gt=0)
    """Side of a patch, in pixels."""
    width: int = Field(default=256, gt=0)
    """Features per patch."""
    layers: int = Field(default=4, gt=0)
    """Transformer layers."""
    heads: int = Field(default=4, gt=0)
    """Attention heads."""


@dataclass(frozen=True, kw_only=True, config=strict)
class TokenTasksConfig:
    """Additional training tasks of the text tower, which make its tokens more useful to the diffusion model."""

    sketch: float = Field(default=100.0, ge=0)
    """Weight of predicting the image from the tokens, so that they encode where objects are; 0 turns it off."""
    echo: float = Field(default=10.0, ge=0)
    """Weight of predicting the most recent words at each token, so that no word is lost; 0 turns it off."""


@dataclass(frozen=True, kw_only=True, config=strict)
class ClipConfig(RunConfig):
    """Stage 0: a small CLIP (Radford et al. 2021) by contrastive learning on captioned images."""

    stage: ClassVar = "clip"
    text: TextTowerConfig = Field(default_factory=TextTowerConfig)
    """Text tower."""
    image: ImageTowerConfig = Field(default_factory=ImageTowerConfig)
    """Image tower."""
    projection: int = Field(default=256, gt=0)
    """Dimensions of the joint embedding space of images and captions."""
    tokens: TokenTasksConfig = Field(default_factory=TokenTasksConfig)
    """Additional training tasks of the text tower."""

    @model_validator(mode="after")
    def _sees_squares(self) -> Self:
        return on_squares(self)

    def build(self, tokenizer: "CLIPTokenizer") -> "Contrastive":
        """Return the two towers and the heads of the additional text tasks, with random weights."""
        import torch

        from conditioning.contrastive import Contrastive, build_clip
        from conditioning.token_tasks import TokenTasks

        torch.manual_seed(self.seed)  # torch's global generator is used for the initial weights only
        text, image, side = self.text, self.image, self.input.resolution
        clip = build_clip(
            tokenizer,
            text_width=text.width,
            text_layers=text.layers,
            text_heads=text.heads,
            vision_width=image.width,
            vision_layers=image.layers,
            vision_heads=image.heads,
            patch_size=image.patch_size,
            image_size=side,
            projection_dim=self.projection,
        )
        tasks = TokenTasks(
            sketch_weight=self.tokens.sketch,
            echo_weight=self.tokens.echo,
            width=text.width,
            vocab_size=len(tokenizer),
            patch_size=image.patch_size,
            image_size=side,
        )
        return Contrastive(clip, tasks)
