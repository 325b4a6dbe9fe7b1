"""Evaluation of generated images during the training of stage 2."""

from typing import Any

import torch
from torch import Tensor

from ldm.errors import UserError
from ldm.pipeline import LatentDiffusionPipeline
from train.config.latent import LatentConfig
from train.data.batches.images import ImageDataset, Inputs
from train.data.order.permutation import choose
from train.evaluation.diffusion import generate
from train.evaluation.features import load_features
from train.evaluation.frechet import FrechetSums, frechet
from train.evaluation.kernels import kid


class GeneratedImages:
    """Distance of images that are generated from held-out captions to the held-out images with these captions.

    The captions and the noise are the same each time, so the values of a run can be compared with each other; as there
    are few images, they can't be compared with those of scripts/evaluate.py. All random numbers come from generators of
    their own, so the training isn't changed.
    """

    def __init__(self, config: LatentConfig, inputs: Inputs, device: torch.device) -> None:
        """Raises UserError if the feature network can't be loaded, or if there are fewer than two held-out images."""
        self.config, self.held_out = config, inputs.held_out
        name = config.evaluation_features or config.own_features
        try:
            self.features = load_features(name).to(device)
        except UserError as error:
            if config.evaluation_features:
                raise
            raise UserError(
                f"evaluate_every {config.evaluate_every}: {error}; choose the network with --evaluation-features"
            ) from None
        self.chosen = choose(config.evaluation_images, len(self.held_out), config.seed)
        if len(self.chosen) < 2:
            raise UserError(f"evaluate_every {config.evaluate_every}: needs at least 2 held-out images; set it to 0")
        self.reference: Tensor | None = None

    def is_due(self, step: int) -> bool:
        """Return whether a validation at this step is the first one after `evaluate_every` steps, or the last one."""
        every, since = self.config.evaluate_every, step - self.config.validate_every
        return step // every > since // every or step == self.config.steps

    @torch.no_grad()
    def measure(self, pipe: LatentDiffusionPipeline) -> dict[str, float]:
        """Generate the images and return their metrics."""
        config = self.config
        if self.reference is None:
            framing = config.input.center_framing(config.input.resolution)
            pixels = ImageDataset(self.held_out, framing, config.seed, shuffle=False).__getitems__(self.chosen).pixels
            self.reference = self._features(pixels)
        prompts = [self.held_out[k].captions[0] for k in self.chosen]
        sampling: dict[str, Any] = {
            "num_inference_steps": config.sample_steps,
            "guidance_scale": config.guidance_scale,
            "precision": config.sampling_precision,
        }
        images = generate(pipe, prompts, seed=config.seed, batch_size=config.batch_size, **sampling)
        generated = self._features(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
        sums = [FrechetSums(self.features.dim, self.reference.device) for _ in range(2)]
        for total, features in zip(sums, (self.reference, generated), strict=True):
            total.add(features)
        unbiased, _ = kid(self.reference, generated, subsets=1, size=len(generated))
        return {"val_frechet": frechet(*sums), "val_kid": unbiased}

    def _features(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.features(part) for part in pixels.split(self.config.batch_size)])
