"""Stage 2: train the UNet on cached latents and text features, and hand over a whole pipeline."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from autoencoder.model import Autoencoder
from conditioning.clip import ClipTextEncoder
from ldm.errors import UserError
from ldm.objective import Objective
from ldm.pipeline import LatentDiffusionPipeline
from ldm.timesteps import Importance, uniform
from ldm.unet import build_unet, require_attention, use_attention
from train.config import LdmConfig
from train.data.cache import LatentCache, TextCache
from train.data.dataset import CachedDataset
from train.data.shards import Stored
from train.data.sources import Source
from train.ema import Ema
from train.evaluation import paint
from train.loop import Batch, Phase, StepOutput, fit
from train.optim import autocast, build_optimizer
from train.run import Run, open_accelerator, open_sources
from train.sheets import in_rows, sheet

_SHEET = 16  # pictures of a sample sheet


class DiffusionLoss(nn.Module):
    """The UNet's turn: a latent sampled from its posterior, noised, and the weighted error of the prediction."""

    def __init__(self, unet: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.unet, self.objective = unet, objective
        # As a module of this one, its state goes into checkpoints.
        self.importance = objective.timesteps if isinstance(objective.timesteps, Importance) else None

    def network(self, x: Tensor, index: Tensor, condition: Tensor) -> Tensor:
        return self.unet(x, index, condition, return_dict=False)[0]

    def forward(self, batch: Batch) -> StepOutput:
        x0 = batch["mean"] + batch["std"] * batch["posterior_noise"]  # (b, c, h, w)
        losses = self.objective(self.network, x0, batch["timestep"], batch["noise"], batch["condition"])
        if self.importance is not None:
            self.importance.note(losses.index, losses.uncorrected, self.objective.schedule.T)
        return StepOutput(losses.weighted.mean(), {"error": losses.unweighted.detach().mean()}, {})


class LdmStage:
    """What the loop asks of stage 2."""

    def __init__(
        self, run: Run, config: LdmConfig, autoencoder: Autoencoder, text_encoder: ClipTextEncoder,
        training: CachedDataset, held_out: CachedDataset,
    ) -> None:  # fmt: skip
        self.run, self.config = run, config
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self.training, self.held_out = training, held_out
        shape, d = config.unet, config.diffusion
        torch.manual_seed(config.seed)  # the only use of torch's global generator: initial weights
        unet = build_unet(
            channels=shape.channels, layers=shape.layers, attention=shape.attention, heads=shape.heads,
            depth=shape.depth, modulation=shape.modulation, groups=shape.groups, learned_variance=d.variance == "learned",
            latent_channels=autoencoder.latent_channels, latent_size=config.input.resolution // autoencoder.factor, text_width=text_encoder.width,
        ).to(run.accelerator.device)  # fmt: skip
        use_attention(unet, config.attention)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        objective = d.build_objective()
        loss = DiffusionLoss(unet, objective).to(run.accelerator.device)
        self.importance = loss.importance
        self.phases = [Phase("unet", loss, build_optimizer(unet, config.optimizer), config.optimizer.lr)]
        self.ema = Ema(unet, config.ema_decay)
        self.averaged = DiffusionLoss(self.ema.module, replace(objective, timesteps=uniform))

    def batches(self, start: int) -> Iterator[list[Batch]]:
        return self.run.batches(self.training, start)

    def begin_step(self, step: int, parts: list[Batch], loss_scale: Tensor) -> None:
        if self.importance is not None:
            self.importance.forget()

    def end_step(self) -> None:
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
            batch = {
                k: v.to(device) if torch.is_tensor(v) else v for k, v in self.held_out.__getitems__(places).items()
            }
            batch["timestep"] = (torch.tensor(places, device=device) + 0.5) / count
            with autocast(device, self.config.precision):
                out = self.averaged(batch)
            total += len(places) * torch.stack([out.loss, out.metrics["error"]]).double()
        loss, error = (total / count).tolist()
        self.run.say(f"step {step}: validation loss {loss:.5f} on {count} held-out examples")
        return {"val_loss": loss, "val_error": error}

    def pipeline(self) -> LatentDiffusionPipeline:
        """The averaged network with everything else it needs."""
        return LatentDiffusionPipeline(
            self.ema.module, self.autoencoder, self.text_encoder, self.config.diffusion.build_process()
        )

    def sheet(self, path: Path) -> None:
        config = self.config
        prompts = config.prompts or self.held_out.captions(_SHEET)
        pictures = paint(
            self.pipeline(), prompts, num_inference_steps=config.sample_steps, guidance_scale=config.guidance_scale,
            seed=config.seed,
        )  # fmt: skip
        sheet(in_rows(list(pictures), 4), prompts).save(path)

    def export(self, folder: Path, *, final: bool) -> dict[str, float]:
        if self.run.main:
            self.pipeline().save_pretrained(folder)
        return {}


def train(config: LdmConfig) -> None:
    """Train stage 2 into `config.out`, or continue what stands there."""
    for name in ("vae", "text_encoder"):
        if not getattr(config, name):
            raise UserError(
                f"--{name.replace('_', '-')} is missing: a folder such as runs/{name.split('_')[0]}/model, or a hub id"
            )
    if config.input.crop != "center":
        raise UserError(
            f"input.crop {config.input.crop} can't be had in stage 2, whose latents are stored: accepted is center"
        )
    require_attention(config.attention)
    accelerator = open_accelerator(config)
    source, held_out = open_sources(config.data, config.input)
    autoencoder = Autoencoder.load(config.vae)
    text_encoder = ClipTextEncoder.load(config.text_encoder)
    if config.input.resolution % autoencoder.factor:
        raise UserError(
            f"input.resolution {config.input.resolution} isn't a multiple of {autoencoder.factor}, the autoencoder's factor"
        )
    inputs = {"data": source.fingerprint, "vae": autoencoder.digest, "text_encoder": text_encoder.digest}
    with Run(config, accelerator, inputs) as run:
        autoencoder.vae.to(accelerator.device)
        text_encoder.to(accelerator.device)
        training, validation = (cached(run, config, s, autoencoder, text_encoder) for s in (source, held_out))
        fit(run, LdmStage(run, config, autoencoder, text_encoder, training, validation))


def cached(
    run: Run, config: LdmConfig, source: Source, autoencoder: Autoencoder, text_encoder: ClipTextEncoder
) -> CachedDataset:
    """Latents and text features of a source, from the cache or computed into it now."""
    folder = Path(config.cache) if config.cache else run.out.parent / "cache"
    dtype: Stored = "float32" if config.precision == "fp32" else "float16"
    side = config.input.resolution // autoencoder.factor
    latents = LatentCache.open(
        folder, source, autoencoder.encode, digest=autoencoder.digest, resolution=config.input.resolution,
        shape=(autoencoder.latent_channels, side, side), flip=config.input.flip, dtype=dtype, batch_size=64,
        workers=config.workers, processes=run.processes, note=run.damage(source).note,
    )  # fmt: skip
    text = TextCache.open(
        folder, source, text_encoder.encode, digest=text_encoder.digest,
        shape=(text_encoder.max_length, text_encoder.width), dtype=dtype, processes=run.processes,
    )  # fmt: skip
    training = source.split == "train"
    return CachedDataset(
        latents, text, config.seed, dropout=config.caption_dropout if training else 0.0, shuffle=training,
        strata=config.batch_size if config.diffusion.stratified and training else 1,
        offset_noise=config.diffusion.offset_noise if training else 0.0,
    )  # fmt: skip
