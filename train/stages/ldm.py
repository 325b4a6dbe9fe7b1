"""Stage 2: train the UNet on latents and text features, cached or computed in each step, and export a pipeline."""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.editing import masked_image
from ldm.errors import UserError
from ldm.float64 import double, float64_device
from ldm.networks.attention import require_attention
from ldm.networks.backbone import Backbone
from ldm.pipeline import LatentDiffusionPipeline
from ldm.timesteps import uniform
from train.config.latent import LatentConfig
from train.config.ldm import LdmConfig
from train.data.batches.draws import Noising, draw_masking
from train.data.batches.images import ImageDataset, Inputs, StreamDataset
from train.data.batches.records import CachedBatch, DrawnNoise, ImageBatch
from train.data.order.permutation import Cycle, choose
from train.engine.compilation import compile_networks
from train.engine.device import open_accelerator
from train.engine.ema import Ema
from train.engine.loop import fit
from train.engine.model_card import About
from train.engine.open_data import open_inputs, select_images
from train.engine.precision import autocast
from train.engine.provenance import unfinished
from train.engine.publish import publisher
from train.engine.run import Run, open_run
from train.engine.stage import Hooks, Phase, Validation
from train.evaluation.diffusion import generate
from train.evaluation.sheets import in_rows, save_sheet, sheet, to_uint8
from train.stages.caption_warnings import TruncatedCaptions
from train.stages.cards import about_ldm
from train.stages.ldm_data import Examples, open_examples
from train.stages.ldm_evaluation import GeneratedImages
from train.stages.ldm_init import Components, load_components
from train.stages.ldm_step import Completion, Denoising, DiffusionBatch, DiffusionLoss, Loss
from train.stages.terms import Term

Config = TypeVar("Config", bound=LatentConfig)

_SHEET = 16  # images of a sample sheet
_BANDS = 4  # ranges of timesteps of equal length, over which the held-out error is averaged


class LdmStage(Generic[Config]):
    """Stage 2 for the training loop: batches, loss, validation and export."""

    def __init__(
        self,
        run: Run[Config],
        components: Components,
        inputs: Inputs,
        training: Examples | StreamDataset[DrawnNoise],
        held_out: Examples,
        terms: Sequence[Term[Denoising]] = (),
    ) -> None:
        self.run, self.config, self.components, self.inputs = run, run.config, components, inputs
        self.training, self.held_out = training, held_out
        config, backbone = run.config, components.backbone
        if config.gradient_checkpointing:
            backbone.enable_gradient_checkpointing()
        self.ema = Ema(backbone.module, config.ema_decay)
        self.network = replace(backbone, module=self.ema.module)
        truncated = TruncatedCaptions(run.print, "--text-chunks")
        self.complete = Completion(components.autoencoder, components.text_encoder, truncated, config.precision)
        loss, self.validation_loss = self.build_losses(terms)
        self.importance = loss.importance
        self.phases = [Phase("unet", loss, config.optimizer.build(loss), config.optimizer.lr)]
        self.evaluation = GeneratedImages(config, inputs, run.accelerator.device) if config.evaluate_every else None
        hooked = any(term.features for term in terms)
        compile_networks(run, self.networks(), hooked=hooked)

    def networks(self) -> list[nn.Module]:
        """Return the networks that run in each step."""
        return [self.components.backbone.module]

    def build_losses(self, terms: Sequence[Term[Denoising]]) -> tuple[Loss, Loss]:
        """Return the loss of the trained network, and the validation loss of the averaged one."""
        backbone, objective = self.components.backbone, self.components.objective
        loss = DiffusionLoss(backbone, objective, terms).to(self.run.accelerator.device)
        return loss, DiffusionLoss(self.network, replace(objective, timesteps=uniform))

    def loss_settings(self) -> object:
        """Return the settings that validation losses depend on; only those with the same can be compared."""
        assert isinstance(self.config, LdmConfig)
        return self.config.diffusion

    def batches(self, start: int) -> Iterator[list[ImageBatch[DrawnNoise] | CachedBatch]]:
        reads_images = self.config.cache == "off" or self.components.task == "inpaint"  # else only the caches are read
        counter = self.run.damage.counter(self.inputs.source.left_out, self.inputs.count) if reads_images else None
        return self.run.feed.batches(self.training, start, counter)

    def prepare(self, step: int, parts: list[ImageBatch[DrawnNoise] | CachedBatch]) -> list[DiffusionBatch]:
        if self.importance is not None:
            self.importance.discard()
        return [self.complete(part) for part in parts]

    def finish(self, step: int) -> None:
        if self.importance is not None:
            self.importance.update()

    @torch.no_grad()
    def validate(self, step: int) -> Validation:
        """Measure the loss of held-out images, with the same timesteps (stratified), noise and captions each time.

        Each image is measured `validation_draws` times, at evenly spaced timesteps.
        """
        config, device, b = self.config, self.run.accelerator.device, self.config.batch_size
        images = min(len(self.held_out), config.validation_examples)
        count = images * config.validation_draws
        held_out = copy.copy(self.held_out)
        held_out.order = Cycle(self.held_out.order, images)
        total = torch.zeros(2, dtype=torch.float64, device=float64_device(device))
        measured: list[Tensor] = []
        starts = range(0, count, b)
        for first in self.run.print.progress(starts, len(starts), "validating"):
            places = list(range(first, min(first + b, count)))
            batch = self.complete(held_out.__getitems__(places).to(device))
            batch = replace(batch, timestep=(torch.tensor(places, device=device) + 0.5) / count)
            with autocast(device, config.precision):
                losses = self.validation_loss.losses(batch)
            total += len(places) * double(torch.stack([losses.weighted.mean(), losses.unweighted.mean()]))
            measured.append(double(torch.stack([losses.weighted, losses.unweighted])))
        loss, error = (total / count).tolist()
        self.run.print(f"step {step}: validation loss {loss:.5f} on {count} held-out examples")
        metrics = {"val_loss": loss, "val_error": error}
        if self.run.main and self.evaluation is not None and self.evaluation.is_due(step):
            metrics |= self.evaluation.measure(self.pipeline())
        weighted, unweighted = torch.cat(measured, 1).cpu()
        draws = config.validation_draws
        inputs = (self.run.inputs["data"], config.seed, images, draws, config.input, self.loss_settings())
        return Validation(
            metrics | self.error_by_noise(unweighted),
            weighted.view(config.validation_draws, images).mean(0),
            hashlib.sha256(repr(inputs).encode()).hexdigest()[:16],
        )

    def error_by_noise(self, errors: Tensor) -> dict[str, float]:
        """Return the mean error of some ranges of timesteps, by name. errors: as in the function of this name."""
        return error_by_noise(errors)

    def pipeline(self) -> LatentDiffusionPipeline:
        """Return a pipeline with the averaged network."""
        return LatentDiffusionPipeline(
            self.network,
            self.components.autoencoder,
            self.components.text_encoder,
            self.components.process,
            self.components.task,
        )

    def sheet(self, path: Path) -> None:
        config = self.config
        if self.components.task == "inpaint":
            save_sheet(self._inpainted(), path)
            return
        held_out = self.inputs.held_out
        shown = choose(_SHEET, len(held_out), config.seed)
        prompts = config.prompts or [held_out[k].captions[0] for k in shown]
        images = generate(
            self.pipeline(),
            prompts,
            num_inference_steps=config.sample_steps,
            guidance_scale=config.guidance_scale,
            seed=config.seed,
            precision=config.sampling_precision,
        )
        save_sheet(sheet(in_rows(list(images), 4), prompts), path)

    def _inpainted(self) -> Image.Image:
        """Return a sheet of held-out images whose masked area is grey, each beside its inpainted version."""
        config, count = self.config, min(_SHEET // 2, len(self.inputs.held_out))
        framing = config.input.center_framing(config.input.resolution)
        draws = partial(draw_masking, shape=(1, 1, 1))
        batch = ImageDataset(self.inputs.held_out, framing, config.seed, draws=draws).__getitems__(range(count))
        output = self.pipeline()(
            batch.captions,
            image=batch.pixels / 2 + 0.5,
            mask_image=batch.drawn.mask,
            num_inference_steps=config.sample_steps,
            guidance_scale=config.guidance_scale,
            output_type="pt",
            generator=[torch.Generator().manual_seed(config.seed + k) for k in range(count)],
        ).images
        assert isinstance(output, Tensor)
        pairs = torch.stack([masked_image(batch.pixels, batch.drawn.mask), output.cpu() * 2 - 1], 1).flatten(0, 1)
        captions = [text for caption in batch.captions for text in ("", caption)]
        return sheet(in_rows(list(to_uint8(pairs)), 8), captions)

    def export(self, folder: Path, *, final: bool) -> dict[str, float]:
        if self.run.main:
            self.pipeline().save_pretrained(folder)
        return {}

    def about(self) -> About:
        assert isinstance(self.config, LdmConfig)
        return about_ldm(self.config, self.network, self.inputs)


def error_by_noise(errors: Tensor) -> dict[str, float]:
    """Return the mean error in each quarter of the timesteps, by name: 0-25 has the least noise.

    errors: errors at evenly spaced timesteps in ascending order, (n,).
    """
    edges = [k * len(errors) // _BANDS for k in range(_BANDS + 1)]
    parts = {f"{100 * k // _BANDS}-{100 * (k + 1) // _BANDS}": errors[edges[k] : edges[k + 1]] for k in range(_BANDS)}
    return {f"val_error_noise_{band}": float(part.mean()) for band, part in parts.items() if len(part)}


def open_captioned(config: LatentConfig) -> Inputs:
    """Open the images and captions of a run. Raises UserError for a stream with a cache or buckets."""
    inputs = open_inputs(config.data, config.input)
    if inputs.stream is not None and (config.cache != "off" or config.input.buckets):
        raise UserError(
            f"--data {config.data!r} is a stream, which has no cache and no known image sizes: "
            "set --cache off and no input.buckets, or download the data"
        )
    return inputs


def train(
    config: LdmConfig,
    hooks: Hooks | None = None,
    terms: Sequence[Term[Denoising]] = (),
    *,
    backbone: Backbone | None = None,
    with_changes: bool = False,
) -> None:
    """Train stage 2 into `config.out`, or continue the run in it.

    terms: additional terms of the loss. backbone: network to train instead of the configuration's `unet` or `init`.
    with_changes: whether the run may continue with other settings, as with --resume-with-changes.
    """
    objective = config.build_objective()
    accelerator = open_accelerator(config)
    require_attention(config.attention)
    components = load_components(config, objective, accelerator.device, backbone)
    inputs = open_captioned(config)
    digests = {"data": inputs.fingerprint, **components.digests}
    with open_run(config, accelerator, digests, components.attention, with_changes=with_changes) as run:
        parts = {"--vae": config.vae, "--text-encoder": config.text_encoder, "--init": config.init}
        for line in (*(line for part in parts.items() for line in unfinished(*part)), *components.changes):
            run.print(line)
        inputs = select_images(inputs, run, components.autoencoder.factor * components.backbone.size_multiple)
        noising = Noising(
            dropout=config.caption_dropout,
            strata=config.batch_size if config.diffusion.stratified else 1,
            offset=config.diffusion.offset_noise,
        )
        stage = LdmStage(run, components, inputs, *open_examples(run, components, inputs, noising), terms)
        fit(run, stage, publisher(run, stage), hooks)
