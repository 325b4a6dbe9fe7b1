"""Losses of stage 1's two networks: the autoencoder, and the discriminator of its reconstructions."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autoencoder.discriminator import PatchDiscriminator, discriminator_loss, frozen, generator_loss, r1_penalty
from autoencoder.equivariance import Transform
from autoencoder.losses import (
    Known,
    adaptive_weight,
    kl_loss,
    known,
    likelihood_loss,
    reconstruction_loss,
    underflow_scale,
)
from ldm.libraries import AutoencoderKL
from train.config.vae import AdversarialConfig, VaeConfig
from train.data.batches.records import Record
from train.engine.stage import StepOutput
from train.stages.terms import Term, Terms


@dataclass(frozen=True, eq=False)
class VaeBatch(Record):
    """Images, and the settings of the step."""

    pixels: Tensor
    """Pixels, (b, 3, H, W) in [−1, 1]."""
    posterior_noise: Tensor
    """Noise for the sample of the posterior, (b, c, h, w)."""
    transform: Transform | None = None
    """Transform of the latents before they are decoded."""
    adversarial: bool = False
    """Whether the adversarial loss is part of the step."""
    adversarial_weight: Tensor | None = None
    """Weight of the adversarial loss, a scalar; None: computed from this batch."""


@dataclass(frozen=True, eq=False)
class DiscriminatorBatch(Record):
    """Original and reconstructed images, (b, 3, H, W) each."""

    real: Tensor
    fake: Tensor


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """The autoencoder's outputs for a batch, with gradients: the input of the terms of stage 1's loss."""

    pixels: Tensor
    """Original images, (b, 3, H, W)."""
    mean: Tensor
    """Mean of the latents' posterior, (b, c, h, w)."""
    logvar: Tensor
    """Log variance of the posterior, (b, c, h, w)."""
    latents: Tensor
    """A sample of the posterior, before any transform, (b, c, h, w)."""
    decoded: Tensor
    """Images decoded from the latents, (b, 3, H, W)."""
    target: Tensor
    """Target of `decoded`, (b, 3, H, W): the original images, transformed if the latents were."""
    features: dict[str, Any]
    """Outputs of the autoencoder's submodules, by name."""


class ImageLosses(NamedTuple):
    """A reconstruction and the losses of its images, with gradients that are computed before the backward pass."""

    reconstruction: Reconstruction
    distance: Known
    """Reconstruction error and perceptual distance."""
    adversarial: Known | None
    metrics: dict[str, Tensor]


class AutoencoderLoss(nn.Module):
    """The autoencoder and its loss, the module of the phase that trains it.

    The discriminator and the perceptual network aren't submodules: their weights aren't trained here. mean: averages a
    tensor over all processes. terms: additional terms of the loss, after the KL divergence.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        config: VaeConfig,
        perceptual: nn.Module | None,
        discriminator: PatchDiscriminator | None,
        mean: Callable[[Tensor], Tensor] = lambda x: x,
        terms: Sequence[Term[Reconstruction]] = (),
    ) -> None:
        super().__init__()
        self.vae, self.config, self.mean = vae, config, mean
        self.logvar = nn.Parameter(torch.zeros((), device=vae.device)) if config.learn_logvar else None
        self.distances = Terms(_distances(config, perceptual))
        self.terms = Terms([*_latent_terms(config), *terms])
        self._not_trained = {"discriminator": discriminator}  # in a dict, so that it isn't a submodule

    def reconstruct(self, batch: VaeBatch) -> Reconstruction:
        """Encode the images, sample the posterior, transform the sample if the step does, and decode it."""
        pixels, transform = batch.pixels, batch.transform
        with self.terms.captured(self.vae) as features:
            q = self.vae.encode(pixels).latent_dist
            z = q.mean + q.std * batch.posterior_noise  # (b, c, h, w)
            if transform is None:
                latents, target = z, pixels
            else:
                latents, target = transform(z), transform(pixels, pixels.shape[-1] // z.shape[-1])
            decoded = self.vae.decode(latents).sample.float()
        return Reconstruction(pixels, q.mean, q.logvar, z, decoded, target, features)

    def image_losses(self, batch: VaeBatch) -> ImageLosses:
        """Reconstruct a batch and compute the losses of its images, and their gradients."""
        kind, metrics = self.config.adversarial.kind, {}
        reconstruction, discriminator = self.reconstruct(batch), self._not_trained["discriminator"]

        def distance(decoded: Tensor) -> Tensor:
            inputs = replace(reconstruction, decoded=decoded)
            loss, values = self.distances(torch.zeros((), device=decoded.device), inputs)
            metrics.update(values)
            return loss

        distance_known, adversarial = known(distance, reconstruction.decoded), None
        if batch.adversarial and discriminator is not None and kind != "none":
            with frozen(discriminator):
                adversarial = known(
                    lambda decoded: generator_loss(kind, discriminator(decoded)), reconstruction.decoded
                )
            metrics["adversarial"] = adversarial.value
        return ImageLosses(reconstruction, distance_known, adversarial, metrics)

    def balance(self, parts: Iterable[ImageLosses]) -> Tensor:
        """Return the weight of the adversarial loss: constant, or adapted to the gradients of all parts and processes.

        The gradients are those at the decoder's last layer.
        """
        adversarial = self.config.adversarial
        if not adversarial.adaptive:
            return torch.full((), adversarial.weight, device=self.vae.device)
        last = self.vae.decoder.conv_out.weight
        gradients = []
        for part in parts:
            assert part.adversarial is not None
            decoded = part.reconstruction.decoded
            scale = underflow_scale(decoded)
            for loss in (part.distance, part.adversarial):
                (gradient,) = torch.autograd.grad(decoded, last, loss.gradient * scale, retain_graph=True)
                gradients.append(gradient.float() / scale)
            del part, decoded  # frees this part's graph before the next one is computed
        distance, generator = self.mean(torch.stack([sum(gradients[0::2]), sum(gradients[1::2])]))
        if self.logvar is not None:
            distance = distance * torch.exp(-self.logvar.detach())
        return adversarial.weight * adaptive_weight(distance, generator)

    def forward(self, batch: VaeBatch) -> StepOutput:
        losses = self.image_losses(batch)
        reconstruction, metrics = losses.reconstruction, losses.metrics
        loss = losses.distance.attach(reconstruction.decoded)
        if self.logvar is not None:
            loss = likelihood_loss(loss, self.logvar)
            metrics["logvar"] = self.logvar.detach()
        loss, values = self.terms(loss, reconstruction)
        if losses.adversarial is not None:
            weight = self.balance([losses]) if batch.adversarial_weight is None else batch.adversarial_weight
            loss = loss + weight * losses.adversarial.attach(reconstruction.decoded)
            metrics["adversarial_weight"] = weight
        images = DiscriminatorBatch(reconstruction.target, reconstruction.decoded.detach())
        return StepOutput(loss, metrics | values, images)


def _distances(config: VaeConfig, perceptual: nn.Module | None) -> list[Term[Reconstruction]]:
    """Return the terms that compare images; `adaptive_weight` compares the adversarial gradient with their gradient."""
    kind = config.reconstruction
    terms = [Term[Reconstruction]("reconstruction", 1.0, lambda r: reconstruction_loss(kind, r.decoded, r.target))]
    if perceptual is not None and config.perceptual.weight:
        terms.append(Term("perceptual", config.perceptual.weight, lambda r: perceptual(r.decoded, r.target)))
    return terms


def _latent_terms(config: VaeConfig) -> list[Term[Reconstruction]]:
    """Return the terms that depend on the latents."""
    return [Term("kl", config.kl_weight, lambda r: kl_loss(r.mean, r.logvar, r.pixels[0].numel()))]


class DiscriminatorLoss(nn.Module):
    """The discriminator and its loss on the step's reconstructions, the module of the phase that trains it."""

    def __init__(self, discriminator: PatchDiscriminator, config: AdversarialConfig) -> None:
        super().__init__()
        self.critic, self.config = discriminator, config  # `critic` is the name in checkpoints

    def forward(self, batch: DiscriminatorBatch) -> StepOutput:
        assert self.config.kind != "none"
        real, fake = self.critic(torch.cat([batch.real.float(), batch.fake])).float().chunk(2)
        loss = discriminator_loss(self.config.kind, real, fake)
        metrics = {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}
        if self.config.r1:
            metrics["r1"] = r1_penalty(self.critic, batch.real)
            loss = loss + self.config.r1 * metrics["r1"]
            metrics["r1"] = metrics["r1"].detach()
        return StepOutput(loss, metrics, batch)
