"""Stage 2's step: the outputs of frozen networks for a batch, and the loss of the trained network."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autoencoder.model import Autoencoder
from conditioning.clip import ClipTextEncoder
from ldm.denoiser import with_context
from ldm.editing import inpainting_context, masked_image
from ldm.networks.backbone import Backbone
from ldm.objective import Losses, Objective, Prediction
from ldm.timesteps import Importance
from train.config.run import Precision
from train.data.batches.records import CachedBatch, DrawnNoise, ImageBatch, Record
from train.engine.precision import autocast
from train.engine.stage import StepOutput
from train.stages.caption_warnings import TruncatedCaptions
from train.stages.terms import Term, Terms


@dataclass(frozen=True, eq=False)
class DiffusionBatch(Record):
    """Input of the objective: latents, noise and condition."""

    x0: Tensor
    """Latents, (b, c, h, w)."""
    timestep: Tensor
    """Random numbers that determine the timesteps, (b,), uniform in [0, 1)."""
    noise: Tensor
    """Noise added to the latents, (b, c, h, w)."""
    condition: Tensor
    """Text features, (b, L, d)."""
    context: Tensor | None = None
    """Mask and latents of the masked image, (b, 1 + c, h, w), for a network that inpaints."""
    scale: Tensor | None = None
    """Guidance scales, (b,), for a network that reads them."""
    renoise: Tensor | None = None
    """Noise for a second start of a trajectory, (b, c, h, w)."""


class Completion:
    """Function that adds the outputs of the frozen networks to a batch: latents, text features and masked latents."""

    def __init__(
        self,
        autoencoder: Autoencoder,
        text_encoder: ClipTextEncoder,
        truncated: TruncatedCaptions,
        precision: Precision,
    ) -> None:
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self.truncated, self.precision = truncated, precision

    @torch.no_grad()
    def __call__(self, part: ImageBatch[DrawnNoise] | CachedBatch) -> DiffusionBatch:
        drawn, context = part.drawn, None
        if isinstance(part, CachedBatch):
            mean, std, condition = part.mean, part.std, part.condition
        else:
            mean, std = self._posterior(part.pixels)
            dropped = drawn.dropped.tolist()
            captions = ["" if drop else caption for caption, drop in zip(part.captions, dropped, strict=True)]
            with self.truncated.counted():
                condition = self.text_encoder.encode(captions).float()
        if drawn.masks is not None:
            assert part.pixels is not None
            mask = drawn.masks.mask
            masked_mean, masked_std = self._posterior(masked_image(part.pixels, mask))
            context = inpainting_context(mask, masked_mean + masked_std * drawn.masks.noise)
        x0 = mean + std * drawn.posterior_noise
        return DiffusionBatch(x0, drawn.timestep, drawn.noise, condition, context, drawn.scale, drawn.renoise)

    def _posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents' mean and standard deviation, (b, c, h, w) each; computed in fp32 or bf16, never fp16."""
        with autocast(self.autoencoder.vae.device, "bf16") if self.precision == "bf16" else nullcontext():
            mean, std = self.autoencoder.encode(pixels)
        return mean.float(), std.float()


@dataclass(frozen=True, eq=False)
class Denoising:
    """Input of the terms of stage 2's loss."""

    batch: DiffusionBatch
    index: Tensor
    """Indices of the noise levels, (b,) int64."""
    prediction: Prediction
    """The network's output, and the estimate of x0 computed from it."""
    features: dict[str, Any]
    """Outputs of the network's submodules, by name."""


class LossesOfExamples(Protocol):
    """The losses of a batch, one number per example, (b,)."""

    @property
    def weighted(self) -> Tensor: ...

    @property
    def unweighted(self) -> Tensor: ...


class Loss(nn.Module):
    """A network and its loss; the phase's module, whose `forward` takes a DiffusionBatch and returns a StepOutput."""

    importance: Importance | None

    def __init__(self) -> None:
        super().__init__()
        self.importance = None  # an attribute of the class would hide a module of this name

    def losses(self, batch: DiffusionBatch) -> LossesOfExamples:
        """Return the losses of each example."""
        raise NotImplementedError


class DiffusionLoss(Loss):
    """The network and its loss: the objective on noised latents, plus additional terms."""

    def __init__(self, backbone: Backbone, objective: Objective, terms: Sequence[Term[Denoising]] = ()) -> None:
        super().__init__()
        self.unet = backbone.module  # a fixed name, as checkpoints store the weights under it
        self.backbone, self.objective, self.terms = backbone, objective, Terms(terms)
        # A submodule, so that its state goes into checkpoints.
        self.importance = objective.timesteps if isinstance(objective.timesteps, Importance) else None

    def losses(self, batch: DiffusionBatch) -> Losses:
        """Return the objective's losses of each example."""
        network = self.backbone if batch.context is None else with_context(self.backbone, batch.context)
        return self.objective(network, batch.x0, batch.timestep, batch.noise, batch.condition)

    def forward(self, batch: DiffusionBatch) -> StepOutput:
        with self.terms.captured(self.unet) as features:
            losses = self.losses(batch)
        if self.importance is not None:
            self.importance.record(losses.index, losses.uncorrected, self.objective.schedule.T)
        inputs = Denoising(batch, losses.index, losses.prediction, features)
        loss, metrics = self.terms(losses.weighted.mean(), inputs)
        return StepOutput(loss, {"error": losses.unweighted.detach().mean(), **metrics}, batch)
