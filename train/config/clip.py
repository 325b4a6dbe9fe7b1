"""The configuration of stage 0, a small CLIP."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from train.config.limits import LONGEST_SIDE, MOST_LAYERS, Count, require_possible
from train.config.optimizer import strict
from train.config.resumable import Fixed, Resumable
from train.config.run import RunConfig, require_squares

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from conditioning.contrastive import Contrastive


@dataclass(frozen=True, kw_only=True, config=strict)
class TransformerConfig:
    """Size of a tower, a transformer."""

    width: Count = 256
    """Number of features per token or patch, a multiple of `heads`."""
    layers: int = Field(default=4, gt=0, le=MOST_LAYERS)
    """Number of transformer layers."""
    heads: Count = 4
    """Number of attention heads of each layer."""

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        require_possible([12 * self.layers * self.width**2], f"width {self.width}, layers {self.layers}")
        return self


@dataclass(frozen=True, kw_only=True, config=strict)
class TextTowerConfig(TransformerConfig):
    """Text tower of the CLIP. Stage 2's UNet reads its features by cross-attention."""

    vocab_size: int = Field(default=2000, ge=600, le=49408)
    """Largest number of tokens in the byte-pair vocabulary that is learned from the captions, 600 to 49408."""
    max_length: int = Field(default=77, ge=4, le=2**14)
    """Length of a caption in tokens, including begin and end tokens: longer ones are truncated, shorter ones padded."""


@dataclass(frozen=True, kw_only=True, config=strict)
class ImageTowerConfig(TransformerConfig):
    """Image tower of the CLIP, a vision transformer."""

    patch_size: int = Field(default=8, gt=0, le=LONGEST_SIDE)
    """Side of a square patch, in pixels; the images' resolution must be a multiple of it."""


@dataclass(frozen=True, kw_only=True, config=strict)
class TokenTasksConfig:
    """Additional training tasks of the text tower, which make its tokens more useful to the diffusion model."""

    sketch: Annotated[float, Resumable(on_request=True, never=0.0)] = Field(default=100.0, ge=0)
    """Weight of the task to predict the image from the tokens; 0: no task.
    It makes the tokens encode the positions of objects."""
    echo: Annotated[float, Resumable(on_request=True, never=0.0)] = Field(default=10.0, ge=0)
    """Weight of the task to predict, from each token, that token and the three before it; 0: no task.
    It keeps every word of the caption in the features."""


@dataclass(frozen=True, kw_only=True, config=strict)
class ClipConfig(RunConfig):
    """Stage 0: train a small CLIP (Radford et al. 2021) on captioned images by contrastive learning."""

    stage: ClassVar = "clip"
    fixed: ClassVar = {"input.resolution": "the image tower has a learned position for each patch"}
    text: Annotated[TextTowerConfig, Fixed()] = Field(default_factory=TextTowerConfig)
    """Text tower."""
    image: Annotated[ImageTowerConfig, Fixed()] = Field(default_factory=ImageTowerConfig)
    """Image tower."""
    projection: Annotated[Count, Fixed()] = 256
    """Number of dimensions of the embedding space that images and captions share."""
    tokens: TokenTasksConfig = Field(default_factory=TokenTasksConfig)
    """Additional training tasks of the text tower."""

    @model_validator(mode="after")
    def _requires_squares(self) -> Self:
        return require_squares(self)

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
