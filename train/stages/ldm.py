"""Stage 2: train the UNet on latents and text features, cached or made anew, and hand over a whole pipeline."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from autoencoder.model import Autoencoder
from conditioning.clip import ClipTextEncoder
from ldm.editing import without
from ldm.errors import UserError
from ldm.formats.hub import find_pipeline
from ldm.networks.attention import require_attention
from ldm.networks.backbone import Backbone
from ldm.pipeline import LatentDiffusionPipeline
from ldm.timesteps import uniform
from train.config.ldm import LdmConfig
from train.data.batches.buckets import Buckets
from train.data.batches.cached import CachedDataset, Originals
from train.data.batches.draws import PLAIN, LatentNoise, Noising, masking
from train.data.batches.latent_cache import LatentCache
from train.data.batches.pictures import PictureDataset, StreamDataset
from train.data.batches.records import CachedBatch, DrawnNoise, PictureBatch
from train.data.batches.text_cache import TextCache
from train.data.sources.splits import Source
from train.data.store.shards import Stored
from train.engine.device import open_accelerator
from train.engine.ema import Ema
from train.engine.loop import fit
from train.engine.model_card import About
from train.engine.open_data import Inputs, build_buckets, open_inputs
from train.engine.optim import DTYPES, autocast
from train.engine.publish import publisher
from train.engine.run import Run, open_run
from train.engine.stage import Hooks, Phase
from train.evaluation.diffusion import paint
from train.evaluation.sheets import in_rows, sheet, to_uint8
from train.stages.caption_warnings import CutCaptions
from train.stages.cards import about_ldm
from train.stages.ldm_init import first_backbone, require_fit, tell_changes
from train.stages.ldm_step import Completion, Denoising, DiffusionBatch, DiffusionLoss
from train.stages.terms import Term

_SHEET = 16  # pictures of a sample sheet
Pictures = CachedDataset | PictureDataset[DrawnNoise]


class LdmStage:
    """What the loop asks of stage 2."""

    def __init__(
        self, run: Run, config: LdmConfig, backbone: Backbone, autoencoder: Autoencoder,
        text_encoder: ClipTextEncoder, inputs: Inputs, training: Pictures | StreamDataset[DrawnNoise],
        held_out: Pictures, terms: Sequence[Term[Denoising]] = (),
    ) -> None:  # fmt: skip
        self.run, self.config, self.inputs = run, config, inputs
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self.training, self.held_out = training, held_out
        cut = CutCaptions(run.say, "--text-chunks")
        self.complete = Completion(autoencoder, text_encoder, cut, config.precision)
        backbone.module.to(run.accelerator.device)
        backend = backbone.set_attention(config.attention, DTYPES[config.precision])
        if config.attention == "auto":
            run.say(f"attention: {backend}")
        if config.gradient_checkpointing:
            backbone.enable_gradient_checkpointing()
        objective = config.diffusion.build_objective()
        loss = DiffusionLoss(backbone, objective, terms).to(run.accelerator.device)
        self.importance = loss.importance
        self.phases = [Phase("unet", loss, config.optimizer.build(loss), config.optimizer.lr)]
        self.ema = Ema(backbone.module, config.ema_decay)
        self.network = replace(backbone, module=self.ema.module)
        self.averaged = DiffusionLoss(self.network, replace(objective, timesteps=uniform))

    def batches(self, start: int) -> Iterator[list[PictureBatch[DrawnNoise] | CachedBatch]]:
        read = self.config.cache == "off" or self.config.task == "inpaint"  # else the caches alone are
        return self.run.feed.batches(
            self.training, start, self.run.damage.of(self.inputs.source.left_out) if read else None
        )

    def prepare(self, step: int, parts: list[PictureBatch[DrawnNoise] | CachedBatch]) -> list[DiffusionBatch]:
        if self.importance is not None:
            self.importance.forget()
        return [self.complete(part) for part in parts]

    def finish(self, step: int) -> None:
        if self.importance is not None:
            self.importance.fold()

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """The loss on held-out examples, whose timesteps (stratified), noise and captions are the same at each call."""
        b = self.config.batch_size
        count = min(len(self.held_out), self.config.validation_examples)
        device = self.run.accelerator.device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for first in range(0, count, b):
            places = list(range(first, min(first + b, count)))
            batch = self.complete(self.held_out.__getitems__(places).to(device))
            batch = replace(batch, timestep=(torch.tensor(places, device=device) + 0.5) / count)
            with autocast(device, self.config.precision):
                out = self.averaged(batch)
            total += len(places) * torch.stack([out.loss, out.metrics["error"]]).double()
        loss, error = (total / count).tolist()
        self.run.say(f"step {step}: validation loss {loss:.5f} on {count} held-out examples")
        return {"val_loss": loss, "val_error": error}

    def pipeline(self) -> LatentDiffusionPipeline:
        """The averaged network with everything else it needs."""
        return LatentDiffusionPipeline(
            self.network, self.autoencoder, self.text_encoder, self.config.diffusion.build_process(), self.config.task
        )

    def sheet(self, path: Path) -> None:
        config = self.config
        if config.task == "inpaint":
            self._inpainted().save(path)
            return
        prompts = config.prompts or [row.captions[0] for row in islice(self.inputs.held_out, _SHEET)]
        pictures = paint(
            self.pipeline(), prompts, num_inference_steps=config.sample_steps, guidance_scale=config.guidance_scale,
            seed=config.seed,
        )  # fmt: skip
        sheet(in_rows(list(pictures), 4), prompts).save(path)

    def _inpainted(self) -> Image.Image:
        """Held-out pictures without what is under a mask, each beside what is painted there by its caption."""
        config, rows = self.config, list(islice(self.inputs.held_out, _SHEET // 2))
        framing = config.input.plain(config.input.resolution)
        draws = partial(masking, shape=(1, 1, 1))
        batch = PictureDataset(self.inputs.held_out, framing, config.seed, shuffle=False, draws=draws).__getitems__(
            range(len(rows))
        )
        made = self.pipeline()(
            batch.captions, image=batch.pixels / 2 + 0.5, mask_image=batch.drawn.mask,
            num_inference_steps=config.sample_steps, guidance_scale=config.guidance_scale, output_type="pt",
            generator=[torch.Generator().manual_seed(config.seed + k) for k in range(len(rows))],
        ).images  # fmt: skip
        assert isinstance(made, Tensor)
        pairs = torch.stack([without(batch.pixels, batch.drawn.mask), made.cpu() * 2 - 1], 1).flatten(0, 1)
        captions = [text for caption in batch.captions for text in ("", caption)]
        return sheet(in_rows(list(to_uint8(pairs)), 8), captions)

    def export(self, folder: Path, *, final: bool) -> dict[str, float]:
        if self.run.main:
            self.pipeline().save_pretrained(folder)
        return {}

    def about(self) -> About:
        return about_ldm(self.config, self.network, self.inputs)


def train(
    config: LdmConfig, hooks: Hooks | None = None, terms: Sequence[Term[Denoising]] = (), *,
    backbone: Backbone | None = None,
) -> None:  # fmt: skip
    """Train stage 2 into `config.out`, or continue what stands there.

    terms: added to the loss. backbone: the network to train, in place of the configuration's `unet` and `init`.
    """
    config.check()
    if backbone is not None and config.init:
        raise UserError(f"init {config.init!r} with a backbone given: one of them is what to begin with")
    init = find_pipeline(config.init) if config.init else None
    where: dict[str, str | Path] = {n: getattr(config, n) or init or "" for n in ("vae", "text_encoder")}
    for name, given in where.items():
        if not given:
            raise UserError(
                f"--{name.replace('_', '-')} is missing: a folder such as runs/{name.split('_')[0]}/model or a hub id, or "
                "--init with a pipeline, which has one"
            )
    accelerator = open_accelerator(config)
    require_attention(config.attention)
    inputs = open_inputs(config.data, config.input)
    if inputs.stream is not None and (config.cache != "off" or config.input.buckets):
        raise UserError(
            f"--data {config.data!r} is a stream, of which nothing can be kept and no sizes are known: "
            "give --cache off and no input.buckets, or copy it to a disk"
        )
    autoencoder = Autoencoder.load(where["vae"])
    text_encoder = ClipTextEncoder.load(where["text_encoder"], skip=config.clip_skip, chunks=config.text_chunks or None)
    if config.input.resolution % autoencoder.factor:
        raise UserError(
            f"input.resolution {config.input.resolution} isn't a multiple of {autoencoder.factor}, the autoencoder's factor"
        )
    given = ""
    if backbone is None:
        backbone, given = first_backbone(config, init, autoencoder, text_encoder)
    else:
        require_fit(backbone, "the backbone given", config, autoencoder, text_encoder)
    made_from = {
        "data": inputs.fingerprint, "vae": autoencoder.digest, "text_encoder": text_encoder.digest, "init": given
    }  # fmt: skip
    with open_run(config, accelerator, made_from) as run:
        if init:
            tell_changes(run, config, init, made_from)
        autoencoder.vae.to(accelerator.device)
        text_encoder.to(accelerator.device)
        inputs, buckets = inputs.prepared(run), None
        if config.input.buckets:
            source, buckets = build_buckets(inputs.source, run, autoencoder.factor * backbone.size_multiple)
            inputs = replace(inputs, source=source)
        # Held-out pictures are squares whatever the training ones are, so that measures can be compared.
        noising = Noising(
            dropout=config.caption_dropout, strata=config.batch_size if config.diffusion.stratified else 1,
            offset=config.diffusion.offset_noise,
        )  # fmt: skip
        training: Pictures | StreamDataset[DrawnNoise]
        held_out: Pictures
        if config.cache == "off":
            c, f, masks = autoencoder.latent_channels, autoencoder.factor, config.task == "inpaint"
            training = inputs.pictures(config.input, config.seed, LatentNoise(noising, c, f, masks), buckets)
            plain = config.input.plain(config.input.resolution)
            draws = LatentNoise(PLAIN, c, f, masks)
            held_out = PictureDataset(inputs.held_out, plain, config.seed, shuffle=False, draws=draws)
        else:
            training = cached(run, config, inputs.source, autoencoder, text_encoder, noising, buckets)
            held_out = cached(run, config, inputs.held_out, autoencoder, text_encoder)
        stage = LdmStage(run, config, backbone, autoencoder, text_encoder, inputs, training, held_out, terms)
        fit(run, stage, publisher(run, stage), hooks)


def cached(
    run: Run, config: LdmConfig, source: Source, autoencoder: Autoencoder, text_encoder: ClipTextEncoder,
    noising: Noising = PLAIN, buckets: Buckets | None = None,
) -> CachedDataset:  # fmt: skip
    """Latents and text features of a source, from the cache or computed into it now; without noising, for measuring."""
    training = source.split == "train"
    dtype: Stored = "float32" if config.precision == "fp32" else "float16"
    framing = config.input.framing() if training else config.input.plain(config.input.resolution)
    latents = LatentCache.open(
        run.cache, source, autoencoder.encode, digest=autoencoder.digest, framing=framing,
        channels=autoencoder.latent_channels, factor=autoencoder.factor, crops=max(1, config.input.crops) if training else 1, buckets=buckets, dtype=dtype,
        workers=config.workers, processes=run.processes, note=partial(run.damage.of(source.left_out).note, whole=True),
    )  # fmt: skip
    cut = CutCaptions(run.say, "--text-chunks")
    with cut.counted():
        text = TextCache.open(
            run.cache, source, text_encoder.encode, digest=text_encoder.digest,
            shape=(text_encoder.tokens, text_encoder.width), dtype=dtype, processes=run.processes,
        )  # fmt: skip
    if cut.count > 1:
        run.say(f"{cut.count:,} captions were cut")
    originals = Originals(source, framing, buckets) if config.task == "inpaint" else None
    return CachedDataset(latents, text, config.seed, noising, shuffle=training, originals=originals)
