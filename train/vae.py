"""Stage 1: train the autoencoder, measure its latents, and fold their normalisation into the weights it hands over."""

import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from autoencoder.discriminator import PatchDiscriminator
from autoencoder.losses import (
    ClipPerceptual,
    hinge_discriminator_loss,
    hinge_generator_loss,
    kl_loss,
    reconstruction_loss,
)
from autoencoder.model import build_autoencoder, fold, latent_statistics, measure
from ldm.errors import UserError
from train.config import VaeConfig
from train.data.dataset import PictureDataset
from train.data.randomness import Purpose
from train.data.sources import Source
from train.ema import Ema
from train.evaluation import reconstruction_quality
from train.loop import Batch, Phase, StepOutput, fit
from train.optim import build_optimizer
from train.run import Run, open_accelerator, open_sources
from train.sheets import sheet, to_uint8

_REFRESH = 2048  # pictures that normalise the model/ of an unfinished run


class Reconstruct(nn.Module):
    """The autoencoder's turn: pictures through a posterior sample and back, and every term of the loss.

    The discriminator and the perceptual network stand beside it, not in it: their weights aren't its to train.
    """

    def __init__(
        self, vae: AutoencoderKL, config: VaeConfig, perceptual: nn.Module | None, critic: nn.Module | None
    ) -> None:
        super().__init__()
        self.vae, self.config = vae, config
        self._beside = {"perceptual": perceptual, "critic": critic}
        self.adversarial = False  # set by the stage once the discriminator plays

    def forward(self, batch: Batch) -> StepOutput:
        c, pixels = self.config, batch["pixels"]
        q = self.vae.encode(pixels).latent_dist
        made = self.vae.decode(q.mean + q.std * batch["posterior_noise"]).sample
        rec = reconstruction_loss(c.reconstruction, made, pixels)
        kl = kl_loss(q.mean, q.logvar, pixels[0].numel())
        loss, metrics = rec + c.kl_weight * kl, {"reconstruction": rec, "kl": kl}
        if (perceptual := self._beside["perceptual"]) is not None:
            metrics["perceptual"] = perceptual(made, pixels)
            loss = loss + c.perceptual.weight * metrics["perceptual"]
        if self.adversarial and (critic := self._beside["critic"]) is not None:
            critic.requires_grad_(False)  # the gradient goes through it, not into it
            metrics["adversarial"] = hinge_generator_loss(critic(made))
            critic.requires_grad_(True)
            loss = loss + c.adversarial.weight * metrics["adversarial"]
        return StepOutput(loss, {k: v.detach() for k, v in metrics.items()}, {"made": made.detach()})


class Judge(nn.Module):
    """The discriminator's turn, on the pictures that the autoencoder has just made."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, batch: Batch) -> StepOutput:
        real, fake = self.critic(torch.cat([batch["pixels"], batch["made"].to(batch["pixels"].dtype)])).chunk(2)
        return StepOutput(hinge_discriminator_loss(real, fake), {}, {})


class VaeStage:
    """What the loop asks of stage 1."""

    def __init__(self, run: Run, config: VaeConfig, source: Source, held_out: Source) -> None:
        self.run, self.config = run, config
        device = run.accelerator.device
        shape = config.model
        torch.manual_seed(config.seed)  # the only use of torch's global generator: initial weights
        vae = build_autoencoder(
            channels=shape.channels, layers=shape.layers, latent_channels=shape.latent_channels, groups=shape.groups,
            attention=shape.attention, resolution=config.input.resolution,
        ).to(device)  # fmt: skip
        factor = 2 ** (len(shape.channels) - 1)
        if config.input.resolution % factor:
            raise UserError(
                f"input.resolution {config.input.resolution} isn't a multiple of {factor}, the autoencoder's factor"
            )
        adversarial = config.adversarial
        critic = perceptual = None
        if adversarial.kind == "hinge":
            critic = PatchDiscriminator(adversarial.channels, adversarial.layers).to(device)
        if config.perceptual.kind == "clip":
            perceptual = ClipPerceptual(config.perceptual.model).to(device)
        self.reconstruct = Reconstruct(vae, config, perceptual, critic)
        self.phases = [Phase("vae", self.reconstruct, build_optimizer(vae, config.optimizer), config.optimizer.lr)]
        if critic is not None:
            judge = Phase(
                "discriminator",
                Judge(critic),
                build_optimizer(critic, config.optimizer, lr=adversarial.lr),
                adversarial.lr,
                adversarial.start,
            )
            self.phases.append(judge)
        self.ema = Ema(vae, config.ema_decay)
        self.latent_shape = (shape.latent_channels, *(2 * [config.input.resolution // factor]))
        draws = {"posterior_noise": (Purpose.POSTERIOR, self.latent_shape)}
        crop, flip = config.input.crop, config.input.flip
        self.training = PictureDataset(source, config.input.resolution, config.seed, crop=crop, flip=flip, draws=draws)
        # In order, each picture once, uncropped by chance: for the statistics and for validation.
        self.plain = PictureDataset(source, config.input.resolution, config.seed, draws=draws, shuffle=False)
        self.held_out = PictureDataset(held_out, config.input.resolution, config.seed, shuffle=False)

    def batches(self, start: int) -> Iterator[list[Batch]]:
        return self.run.batches(self.training, start, self.run.damage(self.training.source))

    def begin_step(self, step: int) -> None:
        self.reconstruct.adversarial = step >= self.config.adversarial.start

    def end_step(self) -> None:
        pass

    @torch.no_grad()
    def reconstructions(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Held-out pictures and their reconstructions by the averaged weights, on the device."""
        device = self.run.accelerator.device
        for first in range(0, count, self.config.batch_size):
            places = range(first, min(first + self.config.batch_size, count))
            pixels = self.held_out.__getitems__(list(places))["pixels"].to(device)
            yield pixels, self.ema.module.decode(self.ema.module.encode(pixels).latent_dist.mode()).sample

    def validate(self, step: int) -> dict[str, float]:
        count = min(len(self.held_out.source), self.config.validation_examples)
        scores = np.array([(len(x), *reconstruction_quality(made, x)) for x, made in self.reconstructions(count)])
        _, psnr, ssim = np.average(scores, axis=0, weights=scores[:, 0])
        self.run.say(f"step {step}: PSNR {psnr:.2f} dB, SSIM {ssim:.4f} on {count} held-out pictures")
        return {"val_psnr": float(psnr), "val_ssim": float(ssim)}

    def sheet(self, path: Path) -> None:
        """Original over reconstruction over eight times their difference."""
        pixels, made = next(iter(self.reconstructions(min(8, len(self.held_out.source)))))
        rows = [to_uint8(x) for x in (pixels[:8], made[:8], ((made - pixels)[:8] * 8))]
        sheet([list(row) for row in rows]).save(path)

    def export(self, folder: Path, *, final: bool) -> dict[str, float]:
        """The averaged weights, their latents normalised over the training set (a part of it until the end)."""
        accelerator, b = self.run.accelerator, self.config.batch_size
        count = len(self.plain.source) if final else min(_REFRESH, len(self.plain.source))
        mine = range(accelerator.process_index * b, count, accelerator.num_processes * b)
        parts = (self.plain.__getitems__(list(range(first, min(first + b, count)))) for first in mine)
        vae = copy.deepcopy(self.ema.module)
        c = self.latent_shape[0]
        sums = measure(vae, ((p["pixels"], p["posterior_noise"]) for p in parts), channels=c)
        statistics = latent_statistics(accelerator.reduce(sums, "sum").cpu())
        if statistics.dead:
            self.run.say(
                f"latent channels {statistics.dead} carry nothing: fewer latent channels, or a lower --kl-weight"
            )
        fold(vae, statistics.mean.to(vae.device), statistics.std.to(vae.device))
        if self.run.main:
            vae.save_pretrained(str(folder), safe_serialization=True)
        return {"dead_channels": len(statistics.dead)}


def train(config: VaeConfig) -> None:
    """Train stage 1 into `config.out`, or continue what stands there."""
    accelerator = open_accelerator(config)
    source, held_out = open_sources(config.data, config.input)
    with Run(config, accelerator, {"data": source.fingerprint}) as run:
        fit(run, VaeStage(run, config, source, held_out))
