"""What stage 2 begins with: a network from random weights, or another pipeline's, widened for its task."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import assert_never

import torch

from autoencoder.model import Autoencoder, digest
from conditioning.clip import ClipTextEncoder
from ldm.errors import UserError
from ldm.formats.scheduler_config import Process
from ldm.networks.backbone import Backbone
from ldm.networks.unet import UNet, load_unet, require_same_shape
from ldm.task import context_channels
from train.config.ldm import LdmConfig, UnetConfig
from train.engine.run import Run


def first_backbone(
    config: LdmConfig, init: Path | None, autoencoder: Autoencoder, text_encoder: ClipTextEncoder
) -> tuple[Backbone, str]:
    """Return the network to begin with, from random weights or the pipeline at `init`; and the digest of what was given.

    Raises UserError where the pipeline's doesn't fit.
    """
    c, side = autoencoder.latent_channels, config.input.resolution // autoencoder.factor
    context = context_channels(config.task, c)
    torch.manual_seed(config.seed)  # the only use of torch's global generator: initial weights
    match config.unet:
        case UnetConfig() as shape:
            build = partial(
                shape.build, latent_channels=c, latent_size=side, text_width=text_encoder.width,
                learned_variance=config.diffusion.variance == "learned",
            )  # fmt: skip
        case _:
            assert_never(config.unet)
    if init is None:
        return UNet.of(build(), c).adapted(context, side), ""
    unet = load_unet(init).float().train().requires_grad_(True)
    given, backbone = digest(unet), UNet.of(unet, c).adapted(context, side)
    require_fit(backbone, f"the UNet of init {config.init!r}", config, autoencoder, text_encoder)
    if shape != UnetConfig():
        with torch.device("meta"):
            require_same_shape(unet, build(), f"init {config.init!r} has another shape than the configuration's unet")
    return backbone, given


def require_fit(
    backbone: Backbone, what: str, config: LdmConfig, autoencoder: Autoencoder, text_encoder: ClipTextEncoder
) -> None:
    """Raises UserError where a network doesn't fit the run."""
    c = autoencoder.latent_channels
    wanted = {
        "condition_width": text_encoder.width,
        "latent_channels": c,
        "out_channels": c * (1 + (config.diffusion.variance == "learned")),
        "in_channels": c + context_channels(config.task, c),
    }
    for name, value in wanted.items():
        if (found := getattr(backbone, name)) != value:
            raise UserError(f"{what} has {name} {found}, this run needs {value}")
    if config.input.resolution % (multiple := autoencoder.factor * backbone.size_multiple):
        raise UserError(
            f"input.resolution {config.input.resolution} isn't a multiple of {multiple}, which {what} needs"
        )


def tell_changes(run: Run, config: LdmConfig, init: Path, made_from: Mapping[str, str]) -> None:
    """Say where this run isn't what the given UNet has learned: it may be meant, and then has to be learned."""
    if config.vae and Autoencoder.load(init).digest != made_from["vae"]:
        run.say(f"init {config.init!r} has learned another autoencoder's latents than those of --vae {config.vae!r}")
    if config.text_encoder and ClipTextEncoder.load(init).digest != made_from["text_encoder"]:
        run.say(f"init {config.init!r} has learned to read another text encoder than {config.text_encoder!r}")
    was, now = Process.load(init), config.diffusion.build_process()
    if was.target != now.target:
        run.say(f"init {config.init!r} predicts {was.target}, this run {now.target} (--diffusion.target)")
    a, b = was.schedule.alpha, now.schedule.alpha
    if a.shape != b.shape or not torch.allclose(a, b, atol=1e-6):
        run.say(f"init {config.init!r} has another noise schedule than this run (--diffusion.schedule, beta_start, …)")
