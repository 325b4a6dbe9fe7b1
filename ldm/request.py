"""The request of a pipeline call, read and checked: texts, given images, and the number of images to generate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from ldm.editing import Pixels, to_mask, to_pixels
from ldm.errors import UserError
from ldm.model import Model


@dataclass(frozen=True)
class Texts:
    """Prompts and their features, one for all images or one for each."""

    prompts: list[str]
    """Prompts; empty if features are given instead."""
    condition: Tensor
    """Features of the prompts, (1 or n, tokens, width)."""
    negative: Tensor
    """Features of the negative prompts, (1 or n, tokens, width)."""

    @classmethod
    def read(
        cls,
        model: Model,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
    ) -> Self:
        """Encode the prompts unless features are given. Raises UserError for neither, for both, or for wrong shapes."""
        prompts, condition = _features(model, prompt, prompt_embeds, "prompt")
        _, negative = _features(model, negative_prompt or "", negative_prompt_embeds, "negative_prompt")
        return cls(prompts, condition, negative)


def _features(
    model: Model, given: str | Sequence[str] | None, embeds: Tensor | None, what: str
) -> tuple[list[str], Tensor]:
    if embeds is None:
        prompts = [given] if isinstance(given, str) else list(given or ())
        if not prompts:
            raise UserError(f"{what} {given!r}: give at least one, or {what}_embeds")
        return prompts, model.encode(prompts)
    if given:
        raise UserError(f"{what} and {what}_embeds are both given: give one of them")
    shape = (model.text_encoder.tokens, model.text_encoder.width)
    if embeds.ndim != 3 or not len(embeds) or embeds.shape[1:] != shape:
        raise UserError(f"{what}_embeds of shape {tuple(embeds.shape)}: (b, {shape[0]}, {shape[1]}) is accepted")
    return [], embeds.to(model.device, model.backbone.dtype)


@dataclass(frozen=True)
class Given:
    """Given images and masks, one for all or one for each."""

    pixels: Tensor
    """Images, (1 or n, 3, H, W) in [0, 1]."""
    mask: Tensor | None
    """Masks, (1 or n, 1, H, W) in [0, 1]; white is painted; None: everything is painted."""
    strength: float
    """Share of the steps that are walked, 0 to 1; 0 keeps the images."""

    @classmethod
    def read(cls, image: Pixels | None, mask_image: Pixels | None, strength: float | None) -> Self | None:
        """Read the images and masks; None without an image.

        Raises UserError for invalid images, or for a mask or a strength without an image.
        """
        if image is None:
            if mask_image is not None or strength is not None:
                raise UserError("mask_image and strength speak of an image: give image too")
            return None
        pixels = to_pixels(image)
        mask = None if mask_image is None else to_mask(mask_image, (pixels.shape[2], pixels.shape[3]))
        return cls(pixels, mask, (0.8 if mask is None else 1.0) if strength is None else strength)


@dataclass(frozen=True)
class Request:
    """Inputs of n different images, with `copies` of each. Raises UserError if the numbers don't fit."""

    texts: Texts
    given: Given | None
    copies: int

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise UserError(f"num_images_per_prompt {self.copies}: at least 1")
        lengths = self._lengths()
        most = max(lengths, key=lambda name: lengths[name])
        for what, length in lengths.items():
            if length not in (1, self.n):
                raise UserError(f"{self.n} {most} for {length} {what}: give one for all, or as many")

    def _lengths(self) -> dict[str, int]:
        lengths = {"prompts": len(self.texts.condition), "negative prompts": len(self.texts.negative)}
        if self.given is not None:
            lengths["images"] = len(self.given.pixels)
            if self.given.mask is not None:
                lengths["masks"] = len(self.given.mask)
        return lengths

    @property
    def n(self) -> int:
        """Number of different images."""
        return max(self._lengths().values())

    def spread(self, x: Tensor) -> Tensor:
        """Repeat a tensor with one row for all images, or one for each: (1 or n, …) → (n · copies, …)."""
        return x.expand(self.n, *x.shape[1:]).repeat_interleave(self.copies, 0)

    def shape(self, model: Model, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """Return the shape of all latents. Raises UserError for a size that the model doesn't support."""
        if self.given is not None:
            if (height, width) != (None, None):
                raise UserError(f"height {height} and width {width} with an image: its own size holds")
            # Sizes that aren't multiples are rounded up, and the result is cropped.
            height, width = (side + -side % model.size_multiple for side in self.given.pixels.shape[2:])
        return self.n * self.copies, model.autoencoder.latent_channels, *model.latent_size(height, width)
