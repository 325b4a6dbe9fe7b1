"""The checked inputs of a pipeline call: texts, input images, and the number of images to generate."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, get_args

from torch import Tensor

from conditioning import PromptWeights
from ldm.editing import Pixels, to_mask, to_pixels
from ldm.errors import UserError
from ldm.model import Model


@dataclass(frozen=True)
class Texts:
    """Prompts and their features, one for all images or one for each."""

    prompts: list[str]
    """Prompts; empty if the caller gives features instead."""
    condition: Tensor
    """Features of the prompts, (1 or n, tokens, width)."""
    negative: Tensor
    """Features of the negative prompts, (1 or n, tokens, width)."""
    rules: PromptWeights = "none"
    """Rules of weights in prompts."""
    has_negative: bool = False
    """Whether any negative prompt is other than the empty one."""

    @classmethod
    def read(
        cls,
        model: Model,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        rules: PromptWeights = "none",
    ) -> Self:
        """Encode the prompts, or take the features that are given instead.

        Raises UserError for unknown rules, if a prompt has neither or both, or if features have a wrong shape.
        """
        if rules not in get_args(PromptWeights):
            raise UserError(f"prompt_weights {rules!r}: choose {', '.join(get_args(PromptWeights))}")
        prompts = _texts(prompt, prompt_embeds, "prompt")
        negatives = _texts(negative_prompt or "", negative_prompt_embeds, "negative_prompt")
        rows, n = model.encode([*prompts, *negatives], rules), len(prompts)
        condition = rows[:n] if prompt_embeds is None else _checked(model, prompt_embeds, "prompt_embeds")
        negative = (
            rows[n:]
            if negative_prompt_embeds is None
            else _checked(model, negative_prompt_embeds, "negative_prompt_embeds")
        )
        has_negative = negative_prompt_embeds is not None or any(negative_prompt or ())
        return cls(prompts, condition, negative, rules, has_negative)


def _texts(texts: str | Sequence[str] | None, embeds: Tensor | None, argument: str) -> list[str]:
    """Return the texts to encode; empty if features are given. Raises UserError if there are neither or both."""
    prompts = [texts] if isinstance(texts, str) and (texts or embeds is None) else list(texts or ())
    if embeds is None and not prompts:
        raise UserError(f"{argument} {texts!r}: give at least one, or {argument}_embeds")
    if embeds is not None and prompts:
        raise UserError(f"{argument} and {argument}_embeds are both given: give only one of them")
    return prompts


def _checked(model: Model, embeds: Tensor, argument: str) -> Tensor:
    """Return features (b, tokens, width) for the backbone. Raises UserError if they have a wrong shape."""
    shape = (model.text_encoder.tokens, model.text_encoder.width)
    if embeds.ndim != 3 or not len(embeds) or embeds.shape[1:] != shape:
        raise UserError(f"{argument} of shape {tuple(embeds.shape)}: must be (b, {shape[0]}, {shape[1]})")
    return embeds.to(model.device, model.backbone.dtype)


@dataclass(frozen=True)
class ImageInput:
    """Input images and masks, one for all generated images or one for each."""

    pixels: Tensor
    """Images, (1 or n, 3, H, W) in [0, 1]."""
    mask: Tensor | None
    """Masks, (1 or n, 1, H, W) in [0, 1], white in the area to inpaint; None: the whole image changes."""
    strength: float
    """Share of the steps that are taken, 0 to 1; 0 keeps the images."""

    @classmethod
    def read(cls, image: Pixels | None, mask_image: Pixels | None, strength: float | None) -> Self | None:
        """Read the images and masks; None without an image.

        Raises UserError for invalid images, or for a mask or a strength without an image.
        """
        if image is None:
            if mask_image is not None or strength is not None:
                raise UserError("mask_image and strength need an input image: give image too")
            return None
        pixels = to_pixels(image)
        mask = None if mask_image is None else to_mask(mask_image, (pixels.shape[2], pixels.shape[3]))
        return cls(pixels, mask, (0.8 if mask is None else 1.0) if strength is None else strength)


@dataclass(frozen=True)
class Request:
    """Inputs of n different images, each of which is generated `copies` times, with different noise.

    Raises UserError if the numbers of inputs don't fit together.
    """

    texts: Texts
    image: ImageInput | None
    copies: int

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise UserError(f"num_images_per_prompt {self.copies}: must be at least 1")
        lengths = self._lengths()
        largest = max(lengths, key=lambda name: lengths[name])
        for name, length in lengths.items():
            if length not in (1, self.n):
                raise UserError(f"{self.n} {largest} but {length} {name}: give 1 or {self.n} {name}")

    def _lengths(self) -> dict[str, int]:
        lengths = {"prompts": len(self.texts.condition), "negative prompts": len(self.texts.negative)}
        if self.image is not None:
            lengths["images"] = len(self.image.pixels)
            if self.image.mask is not None:
                lengths["masks"] = len(self.image.mask)
        return lengths

    @property
    def n(self) -> int:
        """Number of different images."""
        return max(self._lengths().values())

    def expand(self, x: Tensor) -> Tensor:
        """Repeat the rows of a tensor, which has one for all images or one for each: (1 or n, …) → (n · copies, …)."""
        return x.expand(self.n, *x.shape[1:]).repeat_interleave(self.copies, 0)

    def shape(self, model: Model, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """Return the shape of all latents, (n · copies, c, h, w). Raises UserError for an unsupported size."""
        if self.image is not None:
            if (height, width) != (None, None):
                raise UserError(
                    f"height {height}, width {width}: can't be used with an input image, whose size is kept; leave "
                    "them out"
                )
            # The size is rounded up to multiples, and the result is cropped.
            height, width = (side + -side % model.size_multiple for side in self.image.pixels.shape[2:])
        return self.n * self.copies, model.autoencoder.latent_channels, *model.latent_size(height, width)
