"""The configuration of stage 0, a small CLIP."""

from typing import Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from train.config.optimizer import strict
from train.config.run import RunConfig, on_squares


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
