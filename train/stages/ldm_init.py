"""What stage 2 begins with: a UNet from random weights, or another pipeline's, widened for its task."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from autoencoder.model import Autoencoder, digest
from conditioning.clip import ClipTextEncoder
from ldm.errors import UserError
from ldm.formats.scheduler_config import Process
from ldm.networks.unet import build_unet, load_unet, widen
from train.config.ldm import LdmConfig, UnetConfig
from train.engine.run import Run


def first_unet(
    config: LdmConfig, init: Path | None, autoencoder: Autoencoder, text_encoder: ClipTextEncoder
) -> tuple[UNet2DConditionModel, str]:
    """From random weights or the pipeline at `init`, and widened for its task; and the digest of what was given.

    Raises UserError where it doesn't fit.
    """
    shape, c, side = config.unet, autoencoder.latent_channels, config.input.resolution // autoencoder.factor
    build = partial(
        build_unet, channels=shape.channels, layers=shape.layers, attention=shape.attention, heads=shape.heads,
        depth=shape.depth, modulation=shape.modulation, groups=shape.groups, latent_channels=c, latent_size=side,
        learned_variance=config.diffusion.variance == "learned", text_width=text_encoder.width,
    )  # fmt: skip
    torch.manual_seed(config.seed)  # the only use of torch's global generator: initial weights
    given = ""
    if init is None:
        unet = build()
    else:
        unet = load_unet(init).float().train().requires_grad_(True)
        given = digest(unet)
        wanted: dict[str, int] = {"cross_attention_dim": text_encoder.width}
        wanted["out_channels"] = c * (1 + (config.diffusion.variance == "learned"))
        if config.task == "txt2img" or unet.config.in_channels != 2 * c + 1:
            wanted["in_channels"] = c
        for name, value in wanted.items():
            if unet.config[name] != value:
                raise UserError(
                    f"the UNet of init {config.init!r} has {name} {unet.config[name]}, this run needs {value}"
                )
        multiple = autoencoder.factor * 2 ** (len(unet.config.block_out_channels) - 1)
        if config.input.resolution % multiple:
            raise UserError(
                f"input.resolution {config.input.resolution} isn't a multiple of {multiple}, which the UNet of init "
                f"{config.init!r} needs"
            )
        if shape != UnetConfig():
            with torch.device("meta"):
                _same_shape(unet, build(), f"init {config.init!r} has another shape than the configuration's unet")
        unet.register_to_config(sample_size=side)
    if config.task == "inpaint" and unet.config.in_channels == c:
        widen(unet, 2 * c + 1)
    return unet, given


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


def _same_shape(unet: nn.Module, configured: nn.Module, what: str) -> None:
    """Raises UserError where the networks differ, but in the first layer's width."""
    ours, theirs = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (configured, unet))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name) and name != "conv_in.weight":
            raise UserError(
                f"{what}: {name} {theirs.get(name, 'absent')}, not {ours.get(name, 'absent')}; leave it out"
            )
