"""Stage 1's two players: the autoencoder that makes pictures, and the discriminator that tells them from real ones."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from autoencoder.discriminator import PatchDiscriminator, discriminator_loss, frozen, generator_loss, r1_penalty
from autoencoder.equivariance import Transform
from autoencoder.losses import Known, adaptive_weight, kl_loss, known, likelihood_loss, reconstruction_loss
from train.config.vae import AdversarialConfig, VaeConfig
from train.engine.stage import Batch, StepOutput


class Terms(NamedTuple):
    """What a part of a batch's loss is made of, before the adversarial loss has its weight."""

    made: Tensor
    """Pictures (b, 3, H, W), in the graph."""
    scale: float
    """A power of two by which gradients of means over them are of ordinary size, so that half precision holds them."""
    wanted: Tensor
    """What they should be: the pictures, transformed where the latents were."""
    likeness: Known
    """Reconstruction error and perceptual distance."""
    adversarial: Known | None
    kl: Tensor
    metrics: dict[str, Tensor]


class Reconstruct(nn.Module):
    """The autoencoder's turn: pictures through a posterior sample and back, and every term of the loss.

    The discriminator and the perceptual network stand beside it, not in it: their weights aren't its to train. mean: of
    a tensor over all processes. A batch says what is drawn for its step: the `transform` of the latents before they are
    decoded, whether the loss is `adversarial` yet, and its `adversarial_weight` where that is known already.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        config: VaeConfig,
        perceptual: nn.Module | None,
        critic: PatchDiscriminator | None,
        mean: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.vae, self.config, self.mean = vae, config, mean
        self.logvar = nn.Parameter(torch.zeros((), device=vae.device)) if config.learn_logvar else None
        self._beside = {"perceptual": perceptual, "critic": critic}

    def terms(self, batch: Batch) -> Terms:
        c, pixels = self.config, batch["pixels"]
        q = self.vae.encode(pixels).latent_dist
        z, wanted = q.mean + q.std * batch["posterior_noise"], pixels  # (b, c, h, w), (b, 3, H, W)
        transform: Transform | None = batch.get("transform")
        if transform is not None:
            factor = pixels.shape[-1] // z.shape[-1]
            z, wanted = transform(z), transform(pixels, factor)
        made = self.vae.decode(z).sample.float()
        scale = 2.0 ** math.ceil(math.log2(made.numel()))
        kl = kl_loss(q.mean, q.logvar, pixels[0].numel())
        metrics = {"kl": kl.detach()}
        perceptual, critic = self._beside["perceptual"], self._beside["critic"]

        def likeness(made: Tensor) -> Tensor:
            total = reconstruction_loss(c.reconstruction, made, wanted)
            metrics["reconstruction"] = total.detach()
            if perceptual is not None:
                distance = perceptual(made, wanted)
                metrics["perceptual"] = distance.detach()
                total = total + c.perceptual.weight * distance
            return total

        alike, adversarial = known(likeness, made, scale), None
        if batch.get("adversarial") and critic is not None and c.adversarial.kind != "none":
            game = c.adversarial.kind
            with frozen(critic):
                adversarial = known(lambda made: generator_loss(game, critic(made)), made, scale)
            metrics["adversarial"] = adversarial.value
        return Terms(made, scale, wanted, alike, adversarial, kl, metrics)

    def balance(self, parts: Iterable[Terms]) -> Tensor:
        """The adversarial loss's weight: constant, or adaptive by the gradients of all parts and processes together.

        Of each part, the gradient at the last layer alone has to be there.
        """
        adversarial = self.config.adversarial
        if not adversarial.adaptive:
            return torch.full((), adversarial.weight, device=self.vae.device)
        last = self.vae.decoder.conv_out.weight
        pulls = []
        for part in parts:
            assert part.adversarial is not None
            for gradient in (part.likeness.gradient, part.adversarial.gradient):
                (pull,) = torch.autograd.grad(part.made, last, gradient * part.scale, retain_graph=True)
                pulls.append(pull.float() / part.scale)
            del part  # a generator makes the next one only now that this one's graph is gone
        likeness, game = self.mean(torch.stack([sum(pulls[0::2]), sum(pulls[1::2])]))
        if self.logvar is not None:
            likeness = likeness * torch.exp(-self.logvar.detach())
        return adversarial.weight * adaptive_weight(likeness, game)

    def forward(self, batch: Batch) -> StepOutput:
        terms = self.terms(batch)
        loss = terms.likeness.attach(terms.made)
        if self.logvar is not None:
            loss = likelihood_loss(loss, self.logvar)
            terms.metrics["logvar"] = self.logvar.detach()
        loss = loss + self.config.kl_weight * terms.kl
        if terms.adversarial is not None:
            weight = batch.get("adversarial_weight")
            weight = self.balance([terms]) if weight is None else weight
            loss = loss + weight * terms.adversarial.attach(terms.made)
            terms.metrics["adversarial_weight"] = weight
        return StepOutput(loss, terms.metrics, batch | {"made": terms.made.detach(), "wanted": terms.wanted})


class Judge(nn.Module):
    """The discriminator's turn, on the pictures that the autoencoder has just made."""

    def __init__(self, critic: PatchDiscriminator, config: AdversarialConfig) -> None:
        super().__init__()
        self.critic, self.config = critic, config

    def forward(self, batch: Batch) -> StepOutput:
        assert self.config.kind != "none"
        pictures = torch.cat([batch["wanted"].float(), batch["made"]])
        real, fake = self.critic(pictures).float().chunk(2)
        loss = discriminator_loss(self.config.kind, real, fake)
        metrics = {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}
        if self.config.r1:
            metrics["r1"] = r1_penalty(self.critic, batch["wanted"])
            loss = loss + self.config.r1 * metrics["r1"]
            metrics["r1"] = metrics["r1"].detach()
        return StepOutput(loss, metrics, batch)
