"""The configuration of stage 0, a small CLIP."""

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from train.config.optimizer import strict
from train.config.run import RunConfig, on_squares

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from conditioning.contrastive import Contrastive


@dataclass(frozen=True, kw_only=True, config=strict)
class TextTowerConfig:
    """The text half of a small CLIP."""

    vocab_size: int = Field(default=2000, ge=600)
    """Tokens of the byte-pair encoding learned from the captions (at least the bytes and their word-end forms)."""
    max_length: int = Field(default=77, ge=4)
    """Tokens a caption is padded or cut to, begin and end included."""
    width: int = Field(default=256, gt=0)
    """Features of a token: what the UNet's cross-attention sees."""
    layers: int = Field(default=4, gt=0)
    """Transformer layers."""
    heads: int = Field(default=4, gt=0)
    """Attention heads."""


@dataclass(frozen=True, kw_only=True, config=strict)
class ImageTowerConfig:
    """The picture half of a small CLIP (a vision transformer)."""

    patch_size: int = Field(default=8, gt=0)
    """Side of a patch in pixels."""
    width: int = Field(default=256, gt=0)
    """Features of a patch."""
    layers: int = Field(default=4, gt=0)
    """Transformer layers."""
    heads: int = Field(default=4, gt=0)
    """Attention heads."""


@dataclass(frozen=True, kw_only=True, config=strict)
class TokenTasksConfig:
    """What the text tower learns besides telling captions apart, for the diffusion that will read its tokens."""

    sketch: float = Field(default=100.0, ge=0)
    """Weight of sketching the picture from the tokens, so that they say what stands where; 0 leaves it out."""
    echo: float = Field(default=10.0, ge=0)
    """Weight of repeating at each token the words just said, so that none is lost; 0 leaves it out."""


@dataclass(frozen=True, kw_only=True, config=strict)
class ClipConfig(RunConfig):
    """Stage 0: a small CLIP (Radford et al. 2021) by contrastive learning on the captioned pictures."""

    text: TextTowerConfig = Field(default_factory=TextTowerConfig)
    """Text tower."""
    image: ImageTowerConfig = Field(default_factory=ImageTowerConfig)
    """Image tower."""
    projection: int = Field(default=256, gt=0)
    """Dimensions of the space in which pictures and captions meet."""
    tokens: TokenTasksConfig = Field(default_factory=TokenTasksConfig)
    """Further tasks of the text tower."""

    @model_validator(mode="after")
    def _sees_squares(self) -> Self:
        return on_squares(self)

    def build(self, tokenizer: "CLIPTokenizer") -> "Contrastive":
        """The towers and what else the text tower learns, from random weights."""
        import torch

        from conditioning.contrastive import Contrastive, build_clip
        from conditioning.token_tasks import TokenTasks

        torch.manual_seed(self.seed)  # the only use of torch's global generator: initial weights
        text, image, side = self.text, self.image, self.input.resolution
        clip = build_clip(
            tokenizer, text_width=text.width, text_layers=text.layers, text_heads=text.heads, vision_width=image.width,
            vision_layers=image.layers, vision_heads=image.heads, patch_size=image.patch_size, image_size=side,
            projection_dim=self.projection,
        )  # fmt: skip
        tasks = TokenTasks(
            sketch_weight=self.tokens.sketch, echo_weight=self.tokens.echo, width=text.width, vocab_size=len(tokenizer),
            patch_size=image.patch_size, image_size=side,
        )  # fmt: skip
        return Contrastive(clip, tasks)
