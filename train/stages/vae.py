"""Stage 1: train the autoencoder, and fold the normalisation of its latents into the exported weights."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import assert_never

import numpy as np
import torch
from torch import Tensor, nn

from autoencoder.discriminator import frozen
from autoencoder.equivariance import draw
from autoencoder.model import Autoencoder, Posterior, digest
from autoencoder.normalisation import (
    LatentStatistics,
    by_channels,
    by_pixels,
    fold,
    latent_statistics,
    latent_sums,
    measure,
    sensitivity,
)
from autoencoder.preview import fit_colours
from ldm.errors import UserError
from ldm.float64 import float64_device
from ldm.libraries import AutoencoderKL
from train.config.vae import VaeConfig
from train.data.batches.draws import PosteriorNoise
from train.data.batches.images import ImageDataset, Inputs
from train.data.batches.records import ImageBatch
from train.data.order.rng import Purpose, uniforms
from train.data.store.prefetch import read_ahead
from train.engine.compilation import compile_networks
from train.engine.device import open_accelerator
from train.engine.ema import Ema
from train.engine.loop import fit
from train.engine.model_card import About
from train.engine.open_data import open_inputs, select_images
from train.engine.precision import autocast
from train.engine.publish import publisher
from train.engine.run import Run, open_run
from train.engine.stage import Hooks, Phase, Validation
from train.evaluation.autoencoder import measure_reconstruction
from train.evaluation.features import load_features
from train.evaluation.sheets import reconstruction_sheet, save_sheet
from train.stages.cards import about_vae
from train.stages.latents import open_latents
from train.stages.terms import Term
from train.stages.vae_step import AutoencoderLoss, DiscriminatorLoss, Reconstruction, VaeBatch

_REFRESH = 2048  # most images whose latents determine the normalisation of an unfinished run's model/
_NUDGED = 128  # most images that show how the decoder depends on its latents
_COLOURS = 512  # most images to which the preview colours are fitted; 2,048 give the same
_READ = 256  # images whose latents are read from the cache at once
_SHEET = 8  # number of images in a sheet
_NOISE = (0.2,)  # noise levels added to latents in validation; scripts/evaluate_vae.py has more


class VaeStage:
    """Stage 1 for the training loop: batches, losses, validation and export."""

    def __init__(
        self,
        run: Run[VaeConfig],
        vae: AutoencoderKL,
        perceptual: nn.Module | None,
        inputs: Inputs,
        terms: Sequence[Term[Reconstruction]] = (),
    ) -> None:
        self.run, self.config, self.inputs = run, run.config, inputs
        config = run.config
        device, resolution = run.accelerator.device, config.input.resolution
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_side = resolution // self.factor
        if resolution % self.factor:
            raise UserError(
                f"input.resolution {resolution}: must be a multiple of the autoencoder's factor {self.factor}"
            )
        if config.decoder_only:
            for part in (vae.encoder, vae.quant_conv):
                if part is not None:
                    part.requires_grad_(False)
        elif vae.quant_conv is None or vae.post_quant_conv is None:
            raise UserError(
                f"init {config.init!r} has no quant convolutions, so new latents can't be normalised exactly: "
                "set decoder_only, or use another autoencoder"
            )
        if config.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        vae.to(device)
        self.perceptual = None if perceptual is None else perceptual.to(device)
        adversarial = config.adversarial
        self.discriminator = discriminator = config.build_discriminator(self.factor)
        if discriminator is not None:
            discriminator.to(device)
            if adversarial.start >= config.steps:
                run.print(
                    f"adversarial.start {adversarial.start}: the discriminator isn't trained, "
                    f"because the run ends at step {config.steps}"
                )
        self.features = load_features(config.validation_features).to(device) if config.validation_features else None
        if self.features is not None and min(len(inputs.held_out), config.validation_examples) < 2:
            raise UserError(
                f"validation_features {config.validation_features!r}: a Fréchet distance needs at least 2 held-out "
                "images; leave it out, or raise input.validation_fraction or validation_examples"
            )
        self.reconstruct = AutoencoderLoss(vae, config, self.perceptual, discriminator, self._mean, terms).to(device)
        self.phases = [Phase("vae", self.reconstruct, config.optimizer.build(self.reconstruct), config.optimizer.lr)]
        if discriminator is not None:
            module = DiscriminatorLoss(discriminator, adversarial)
            optimizer = config.optimizer.build(module, lr=adversarial.lr)
            self.phases.append(
                Phase("discriminator", module, optimizer, adversarial.lr, adversarial.start, "discriminator_")
            )
        self.ema = Ema(vae, config.ema_decay)
        # The discriminator isn't compiled, because R1 differentiates it twice.
        hooked = any(term.features for term in terms)
        compile_networks(run, [n for n in (vae.encoder, vae.decoder, perceptual) if n is not None], hooked=hooked)
        self.latent_channels: int = vae.config.latent_channels
        draws = PosteriorNoise(self.latent_channels, self.factor)
        self.training = inputs.images(config.input.framing(), config.seed, draws)
        # Without random crops: training images in order for statistics, held-out images for validation.
        center = config.input.center_framing(config.input.resolution)
        self.unshuffled = ImageDataset(inputs.source, center, config.seed, draws=draws, shuffle=False)
        self.held_out = ImageDataset(inputs.held_out, center, config.seed, draws=draws)

    def _mean(self, x: Tensor) -> Tensor:
        return self.run.accelerator.reduce(x, "mean")

    def _sum(self, x: Tensor) -> Tensor:
        return self.run.accelerator.reduce(x, "sum")

    def batches(self, start: int) -> Iterator[list[ImageBatch[Tensor]]]:
        counter = self.run.damage.counter(self.inputs.source.left_out, self.inputs.count)
        return self.run.feed.batches(self.training, start, counter)

    def adversarial_at(self, step: int) -> bool:
        """Return whether this step has the adversarial loss."""
        return self.discriminator is not None and step >= self.config.adversarial.start

    def prepare(self, step: int, parts: list[ImageBatch[Tensor]]) -> list[VaeBatch]:
        c, vae = self.config, self.reconstruct.vae
        u = uniforms(c.seed, Purpose.TRANSFORM, [step], 4)[0]
        share, smallest = c.equivariance.share, c.equivariance.smallest
        transform = draw((u[1], u[2], u[3]), self.latent_side, smallest) if u[0] < share else None
        adversarial = self.adversarial_at(step)
        batches = [VaeBatch(part.pixels, part.drawn, transform, adversarial) for part in parts]
        if adversarial and c.adversarial.adaptive and len(parts) > 1:
            # The weight depends on the whole batch, so it is computed before the first part's loss.
            last_layer = vae.decoder.conv_out.weight
            with autocast(self.run.accelerator.device, c.precision), frozen(vae, keep_trainable=last_layer):
                weight = self.reconstruct.balance(map(self.reconstruct.image_losses, batches))
            batches = [replace(batch, adversarial_weight=weight) for batch in batches]
        return batches

    def finish(self, step: int) -> None:
        if self.discriminator is not None and self.adversarial_at(step) and self.config.adversarial.spectral_norm:
            self.discriminator.refresh()

    def _own_batches(self, images: ImageDataset[Tensor], indices: range, doing: str) -> Iterator[ImageBatch[Tensor]]:
        """Yield this process's share of the images with these indices, in batches and in order.

        doing: the text of the progress bar.
        """
        accelerator = self.run.accelerator
        b = max(1, self.config.batch_size // (accelerator.num_processes * self.config.accumulation))  # as in training
        starts = range(accelerator.process_index * b, len(indices), accelerator.num_processes * b)
        parts = [indices[start : start + b] for start in starts]
        batches = self.run.print.progress(read_ahead(images, parts, self.config.workers), len(parts), doing)
        return (batch.to(accelerator.device) for batch in batches)

    def _normalised(
        self, images: ImageDataset[Tensor], indices: range, once: bool = False
    ) -> tuple[AutoencoderKL, LatentStatistics | None]:
        """Return a copy of the averaged network whose latents are normalised over these images, and their statistics.

        If only the decoder is trained, latents aren't normalised again, and the statistics are None. once: encode all
        training images for stage 2 too.
        """
        vae = copy.deepcopy(self.ema.module)
        if self.config.decoder_only:
            return vae, None
        if once:
            statistics = self._training_statistics(vae)
        else:
            parts = self._own_batches(images, indices, "normalising the latents")
            sums = measure(vae, ((part.pixels, part.drawn) for part in parts), channels=self.latent_channels)
            statistics = latent_statistics(self._sum(sums))
        match self.config.normalisation:
            case "channels":
                matrix = by_channels(statistics)
            case "pixels":
                parts = self._own_batches(images, _spread(indices, _NUDGED), "measuring the decoder")
                changes = sensitivity(vae, ((part.pixels, part.drawn) for part in parts), statistics.std)
                matrix = by_pixels(statistics, self._sum(changes))
            case _:
                assert_never(self.config.normalisation)
        fold(vae, statistics, matrix)
        return vae, statistics

    def _training_statistics(self, vae: AutoencoderKL) -> LatentStatistics:
        """Return the statistics of the latents of all readable training images, from the cache that stage 2 uses."""
        accelerator, source = self.run.accelerator, self.inputs.source
        autoencoder = Autoencoder(vae)
        latents = open_latents(self.run, autoencoder, source, framing=self.unshuffled.builder.framing)
        readable, size = np.flatnonzero(~latents.damaged), self.unshuffled.builder.framing.square
        sums = torch.zeros(self.latent_channels, 5 + self.latent_channels, dtype=torch.float64)
        starts = range(accelerator.process_index * _READ, len(readable), accelerator.num_processes * _READ)
        for indices in (readable[start : start + _READ] for start in starts):
            mean, std = (latents.gather(indices) / autoencoder.scale).unbind(1)
            noise = PosteriorNoise(self.latent_channels, self.factor)(self.config.seed, indices, size)
            sums += latent_sums(Posterior(mean, std), noise)
        return latent_statistics(self._sum(sums.to(float64_device(accelerator.device))))

    def validate(self, step: int) -> Validation:
        count = min(len(self.held_out.source), self.config.validation_examples)
        vae, _ = self._normalised(self.held_out, range(count))
        metrics = measure_reconstruction(
            Autoencoder(vae),
            ((p.pixels, p.drawn) for p in self._own_batches(self.held_out, range(count), "validating")),
            perceptual=self.perceptual,
            features=self.features,
            levels=_NOISE,
            reduce=self._sum,
        )
        self.run.print(
            f"step {step}: PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.4f} on {count} held-out images"
        )
        return Validation({f"val_{name}": value for name, value in metrics.items()})

    def sheet(self, path: Path) -> None:
        images = self.held_out.__getitems__(list(range(min(_SHEET, len(self.held_out.source)))))
        save_sheet(reconstruction_sheet(Autoencoder(self.ema.module), images.pixels), path)

    def export(self, folder: Path, *, final: bool) -> dict[str, float]:
        """Export the averaged weights and preview colours.

        Latents are normalised over all training images at the end of the run, and over a part of them before.
        """
        everything = range(len(self.unshuffled.source))
        indices = everything if final else _spread(everything, _REFRESH)
        vae, statistics = self._normalised(self.unshuffled, indices, once=final and self.config.encode_once)
        autoencoder = Autoencoder(vae)
        batches = self._own_batches(self.unshuffled, _spread(everything, _COLOURS), "fitting the preview's colours")
        images = (part.pixels for part in batches)
        autoencoder.colours = fit_colours(autoencoder, images, reduce=self._sum)
        if self.run.main:
            autoencoder.save(folder)
        if statistics is None:
            return {}
        if statistics.dead:
            self.run.print(
                f"latent channels {statistics.dead} hardly depend on the image: "
                "reduce --model.latent-channels or --kl-weight"
            )
        return {"dead_channels": len(statistics.dead)}

    def about(self) -> About:
        return about_vae(self.config, self.ema.module)


def _spread(indices: range, most: int) -> range:
    """Return at most `most` of the indices, spread evenly, because a dataset may be sorted."""
    return indices[:: max(1, math.ceil(len(indices) / most))]


def train(
    config: VaeConfig,
    hooks: Hooks | None = None,
    terms: Sequence[Term[Reconstruction]] = (),
    *,
    with_changes: bool = False,
) -> None:
    """Train stage 1 into `config.out`, or continue the run in it.

    terms: additional terms of the loss. with_changes: whether the run may continue with other settings, as with
    --resume-with-changes.
    """
    accelerator = open_accelerator(config)
    inputs = open_inputs(config.data, config.input, captioned=False)
    vae, perceptual = config.build(), config.perceptual.build()
    digests = {
        "data": inputs.fingerprint,
        "init": digest(vae, str(vae.config.scaling_factor)) if config.init else "",
        "perceptual.model": "" if perceptual is None else digest(perceptual),
    }
    with open_run(config, accelerator, digests, with_changes=with_changes) as run:
        inputs = select_images(inputs, run)
        stage = VaeStage(run, vae, perceptual, inputs, terms)
        fit(run, stage, publisher(run, stage), hooks)
