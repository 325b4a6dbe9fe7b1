"""What stage 2 begins with: a network from random weights, or another pipeline's, widened for its task."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NoReturn, assert_never

import torch
from diffusers import UNet2DConditionModel

from autoencoder.model import Autoencoder, digest
from conditioning.clip import ClipTextEncoder
from ldm.errors import UserError
from ldm.formats.hub import find_pipeline
from ldm.formats.scheduler_config import Process
from ldm.networks.backbone import Backbone
from ldm.networks.unet import UNet, load_unet, require_same_shape
from ldm.objective import Objective
from ldm.task import context_channels
from train.config.ldm import LdmConfig, UnetConfig
from train.engine.precision import DTYPES


@dataclass(frozen=True)
class Parts:
    """What stage 2 stands on: the network that is trained, the frozen ones on either side of it, and what it is to learn."""

    backbone: Backbone
    autoencoder: Autoencoder
    text_encoder: ClipTextEncoder
    objective: Objective
    made_from: Mapping[str, str]
    """Digests of what was given, by the names of the options."""
    attention: str
    """What computes the attention."""
    changes: tuple[str, ...]
    """Where this run isn't what the pipeline begun with has learned: it may be meant, and then has to be learned."""


def load_parts(
    config: LdmConfig, objective: Objective, device: torch.device, backbone: Backbone | None = None
) -> Parts:
    """Load what the configuration names onto a device: the backbone from random weights or of `init`, unless it is given.

    Raises UserError where something is missing or doesn't fit.
    """
    if backbone is not None and config.init:
        raise UserError(f"init {config.init!r} with a backbone given: one of them is what to begin with")
    init = find_pipeline(config.init) if config.init else None
    unet = load_unet(init).float().train().requires_grad_(True) if init else None
    autoencoder = Autoencoder.load(config.vae or init or _missing("vae"))
    text_encoder = ClipTextEncoder.load(
        config.text_encoder or init or _missing("text_encoder"),
        skip=config.clip_skip,
        chunks=config.text_chunks or None,
    )
    if config.input.resolution % autoencoder.factor:
        raise UserError(
            f"input.resolution {config.input.resolution} isn't a multiple of {autoencoder.factor}, the autoencoder's factor"
        )
    made_from = {"vae": autoencoder.digest, "text_encoder": text_encoder.digest, "init": digest(unet) if unet else ""}
    changes: tuple[str, ...] = ()
    if init:
        theirs, was = (
            {
                "vae": Autoencoder.load(init).digest if config.vae else made_from["vae"],
                "text_encoder": ClipTextEncoder.load(init).digest if config.text_encoder else made_from["text_encoder"],
            },
            Process.load(init),
        )
        changes = tuple(changes_since(config, was, objective, theirs, made_from))
    backbone = choose_backbone(config, backbone, unet, autoencoder, text_encoder.width)
    backbone.module.to(device)
    attention = backbone.set_attention(config.attention, DTYPES[config.precision])
    autoencoder.vae.to(device)
    text_encoder.to(device)
    return Parts(backbone, autoencoder, text_encoder, objective, made_from, attention, changes)


def _missing(name: str) -> NoReturn:
    raise UserError(
        f"--{name.replace('_', '-')} is missing: a folder such as runs/{name.split('_')[0]}/model or a hub id, or "
        "--init with a pipeline, which has one"
    )


def choose_backbone(
    config: LdmConfig,
    backbone: Backbone | None,
    unet: UNet2DConditionModel | None,
    autoencoder: Autoencoder,
    width: int,
) -> Backbone:
    """Return the network to begin with: the one given, else around the UNet of `init`, else from random weights.

    width: of the condition. Raises UserError where one that is given doesn't fit.
    """
    c, side = autoencoder.latent_channels, config.input.resolution // autoencoder.factor
    context, learned = context_channels(config.task, c), config.diffusion.variance == "learned"
    what = f"the UNet of init {config.init!r}" if unet else "the backbone given"
    torch.manual_seed(config.seed)  # the only use of torch's global generator: initial weights
    match config.unet:
        case UnetConfig() as shape:
            build = partial(
                shape.build, latent_channels=c, latent_size=side, text_width=width, learned_variance=learned
            )
        case _:
            assert_never(config.unet)
    if backbone is None:
        backbone = UNet.of(unet or build(), c).adapted(context, side)
        if unet is None:
            return backbone
    wanted = {
        "condition_width": width,
        "latent_channels": c,
        "out_channels": c * (1 + learned),
        "in_channels": c + context,
    }
    for name, value in wanted.items():
        if (found := getattr(backbone, name)) != value:
            raise UserError(f"{what} has {name} {found}, this run needs {value}")
    if config.input.resolution % (multiple := autoencoder.factor * backbone.size_multiple):
        raise UserError(
            f"input.resolution {config.input.resolution} isn't a multiple of {multiple}, which {what} needs"
        )
    if unet and shape != UnetConfig():
        with torch.device("meta"):
            require_same_shape(
                backbone.module, build(), f"init {config.init!r} has another shape than the configuration's unet"
            )
    return backbone


def changes_since(
    config: LdmConfig, was: Process, now: Objective, theirs: Mapping[str, str], ours: Mapping[str, str]
) -> Iterator[str]:
    """What a run changes of what the pipeline it begins with has learned, a sentence each.

    theirs, ours: digests of the frozen networks, by the names of the options.
    """
    what = f"init {config.init!r}"
    if theirs["vae"] != ours["vae"]:
        yield f"{what} has learned another autoencoder's latents than those of --vae {config.vae!r}"
    if theirs["text_encoder"] != ours["text_encoder"]:
        yield f"{what} has learned to read another text encoder than {config.text_encoder!r}"
    if was.target != now.target:
        yield f"{what} predicts {was.target}, this run {now.target} (--diffusion.target)"
    a, b = was.schedule.alpha, now.schedule.alpha
    if a.shape != b.shape or not torch.allclose(a, b, atol=1e-6):
        yield f"{what} has another noise schedule than this run (--diffusion.schedule, beta_start, …)"
