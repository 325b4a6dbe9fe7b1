"""Compare rules for the latents at a mask's edge when inpainting by blending (docs/adr/0013-two-ways-to-inpaint.md).

    python benchmarks/blending.py --model runs/demo/model --data data/shapes

The task is that of benchmarks/editing.py: add a small red star in a box. Prints the share of images with the right
object in the box, for each rule and sampler. Two minutes on one core.
"""

from dataclasses import dataclass
from unittest import mock

from editing import RED_STAR, SAMPLERS, Options, check_inpainting, generate, given_images, shares, to_inpaint
from numpy.random import default_rng
from torch import Tensor

import ldm.preparation
from ldm.editing import InpaintMasks, latent_mask
from ldm.pipeline import LatentDiffusionPipeline
from train.commands.main import command
from train.config.load import overlay


@dataclass(frozen=True, kw_only=True)
class BlendingOptions(Options):
    """Compare rules for the latents at a mask's edge."""

    images: int = 200
    """Number of test images."""


def always(mask: Tensor, factor: int, mask_is_input: bool) -> InpaintMasks:
    """Inpaint every latent of which any pixel is masked."""
    return InpaintMasks(*2 * [latent_mask(mask, factor) > 0])


def never(mask: Tensor, factor: int, mask_is_input: bool) -> InpaintMasks:
    """Inpaint only latents of which all pixels are masked."""
    return InpaintMasks(*2 * [latent_mask((mask < 0.5).float(), factor) == 0])


RULES = {
    "partly masked latents always inpainted": always,
    "never": never,
    "once there is more signal than noise (used)": ldm.preparation.inpaint_masks,
}


@command
def main() -> None:
    o = overlay(BlendingOptions, BlendingOptions())
    pipe = LatentDiffusionPipeline.from_pretrained(o.model)
    given = given_images(o.data, pipe.backbone.sample_size[0] * pipe.autoencoder.factor)
    edits = to_inpaint(given, o.images, default_rng(o.seed), lambda: RED_STAR)
    for sampler in SAMPLERS:
        for name, rule in RULES.items():
            with mock.patch.object(ldm.preparation, "inpaint_masks", rule):
                images = generate(pipe, edits, o, sampler=sampler)
            print(f"{sampler}, {name}: {shares(check_inpainting, images, edits)['object']:.3f}", flush=True)


if __name__ == "__main__":
    main()
