"""Initial networks of stage 2: random weights or those of another pipeline, widened for the task."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol, assert_never

import torch

from autoencoder.model import Autoencoder, digest
from conditioning.clip import ClipTextEncoder, remove_last_layers
from conditioning.openclip import PREFIX as OPENCLIP
from conditioning.openclip import published_tokenizer
from ldm.errors import UserError
from ldm.formats.hub import find_pipeline
from ldm.formats.original_names import Parts
from ldm.formats.scheduler_config import Process
from ldm.formats.single_file import load_single_file
from ldm.libraries import UNet2DConditionModel
from ldm.model import tokenizer_of
from ldm.networks.attention import use_attention
from ldm.networks.backbone import Backbone
from ldm.networks.unet import UNet, load_unet, require_same_shape
from ldm.objective import Objective
from ldm.task import Task, context_channels
from train.config.ldm import LdmConfig, UnetConfig
from train.engine.changes import Saved
from train.engine.folder import RunFolder
from train.engine.precision import DTYPES


@dataclass(frozen=True)
class Components:
    """Components of stage 2: the network to train, the frozen autoencoder and text encoder, and the objective."""

    backbone: Backbone
    autoencoder: Autoencoder
    text_encoder: ClipTextEncoder
    objective: Objective
    digests: Mapping[str, str]
    """Digests of the networks that were loaded, by option name."""
    task: Task
    process: Process
    """Process that is saved with the model."""
    attention: str
    """Attention implementation in use: sdpa or xformers."""
    changes: tuple[str, ...]
    """Differences from the training of `init`, one sentence each. They may be intended; the network has to adapt."""


def load_components(
    config: LdmConfig, objective: Objective, device: torch.device, backbone: Backbone | None = None
) -> Components:
    """Load the networks that the configuration names onto a device. backbone: network to train instead of its own.

    Raises UserError if something is missing or doesn't fit.
    """
    if backbone is not None and config.init:
        raise UserError(f"init {config.init!r} with a backbone: both are networks to start from; give only one")
    init = open_init(config.init) if config.init else None
    unet = init.unet().float().train().requires_grad_(True) if init else None
    if unet is not None and unet.config.time_cond_proj_dim:
        raise UserError(
            f"init {config.init!r}: its UNet reads the guidance scale, so it is the result of a distillation; train "
            "its teacher further instead"
        )
    autoencoder = _autoencoder(config, init)
    text_encoder = _text_encoder(config, init)
    if config.input.resolution % autoencoder.factor:
        raise UserError(
            f"input.resolution {config.input.resolution}: must be a multiple of {autoencoder.factor}, "
            "the autoencoder's factor"
        )
    digests = {"vae": autoencoder.digest, "text_encoder": text_encoder.digest, "init": digest(unet) if unet else ""}
    changes: tuple[str, ...] = ()
    if init:
        init_digests = {
            "vae": init.autoencoder().digest if config.vae else digests["vae"],
            "text_encoder": init.text_encoder().digest if config.text_encoder else digests["text_encoder"],
        }
        changes = tuple(changes_since_init(config, init.process(), objective, init_digests, digests))
    backbone = choose_backbone(config, backbone, unet, autoencoder, text_encoder.width)
    backbone.module.to(device)
    attention = backbone.set_attention(config.attention, DTYPES[config.precision])
    autoencoder.vae.to(device)
    text_encoder.to(device)
    process = config.diffusion.build_process()
    return Components(backbone, autoencoder, text_encoder, objective, digests, config.task, process, attention, changes)


class Init(Protocol):
    """Pipeline to start from. Each method reads a part of it."""

    def unet(self) -> UNet2DConditionModel: ...

    def autoencoder(self) -> Autoencoder: ...

    def text_encoder(self, skip: int = 0, chunks: int | None = None) -> ClipTextEncoder: ...

    def process(self) -> Process: ...


@dataclass(frozen=True)
class _Folder:
    """Pipeline in a folder."""

    path: Path

    def unet(self) -> UNet2DConditionModel:
        return load_unet(self.path)

    def autoencoder(self) -> Autoencoder:
        return Autoencoder.load(self.path)

    def text_encoder(self, skip: int = 0, chunks: int | None = None) -> ClipTextEncoder:
        return ClipTextEncoder.load(self.path, skip=skip, chunks=chunks)

    def process(self) -> Process:
        return Process.load(self.path)


@dataclass(frozen=True)
class _File:
    """Pipeline in a single file, which has been read."""

    parts: Parts

    def unet(self) -> UNet2DConditionModel:
        use_attention(self.parts.unet)
        return self.parts.unet

    def autoencoder(self) -> Autoencoder:
        return Autoencoder(self.parts.vae)

    def text_encoder(self, skip: int = 0, chunks: int | None = None) -> ClipTextEncoder:
        model = copy.deepcopy(self.parts.text_encoder)
        remove_last_layers(model, skip)
        return ClipTextEncoder(model, tokenizer_of(self.parts), chunks=chunks)

    def process(self) -> Process:
        return self.parts.process


def open_init(init: str) -> Init:
    """Find a pipeline to start from: a folder, a hub id or a single file. Raises UserError if there is none."""
    if Path(init).is_file():
        return _File(load_single_file(init))
    return _Folder(find_pipeline(init))


def _autoencoder(config: LdmConfig, init: Init | None) -> Autoencoder:
    if init is not None and not config.vae:
        return init.autoencoder()
    return Autoencoder.load(config.vae or _missing("vae"))


def _text_encoder(config: LdmConfig, init: Init | None) -> ClipTextEncoder:
    skip, chunks = config.clip_skip, config.text_chunks or None
    if init is not None and not config.text_encoder:
        return init.text_encoder(skip, chunks)
    encoder = ClipTextEncoder.load(config.text_encoder or _missing("text_encoder"), skip=skip, chunks=chunks)
    return _padded_as_in_the_run(config, encoder) if config.text_encoder.startswith(OPENCLIP) else encoder


def _padded_as_in_the_run(config: LdmConfig, encoder: ClipTextEncoder) -> ClipTextEncoder:
    """Return an OpenCLIP's encoder with the padding of the run in `config.out`.

    Runs that were started before 2026-11-27 pad with the end token.
    """
    settings = RunFolder(Path(config.out)).settings
    if not settings.is_file():
        return encoder
    earlier = ClipTextEncoder(encoder.model, published_tokenizer(encoder.max_length), chunks=encoder.chunks)
    return earlier if Saved.read(settings).inputs.get("text_encoder") == earlier.digest else encoder


def _missing(name: str) -> NoReturn:
    run = "clip" if name == "text_encoder" else name
    raise UserError(
        f"--{name.replace('_', '-')} is missing: give a folder, e.g. runs/{run}/model, or a hub id; or give --init "
        "with a pipeline that has one"
    )


def choose_backbone(
    config: LdmConfig,
    backbone: Backbone | None,
    unet: UNet2DConditionModel | None,
    autoencoder: Autoencoder,
    width: int,
) -> Backbone:
    """Return the network to train: `backbone` if given, else one with the UNet of `init`, else one with random weights.

    width: width of the condition. Raises UserError if a given network doesn't fit.
    """
    c, side = autoencoder.latent_channels, config.input.resolution // autoencoder.factor
    context, learned = context_channels(config.task, c), config.diffusion.variance == "learned"
    source = f"the UNet of init {config.init!r}" if unet else "the given backbone"
    torch.manual_seed(config.seed)  # torch's global generator is used for the initial weights only
    match config.unet:
        case UnetConfig() as shape:
            build = partial(
                shape.build, latent_channels=c, latent_size=side, text_width=width, learned_variance=learned
            )
        case _:
            assert_never(config.unet)
    if backbone is None:
        backbone = UNet.wrap(unet or build(), c).adapt(context, side)
        if unet is None:
            return backbone
    required = {
        "condition_width": width,
        "latent_channels": c,
        "out_channels": c * (1 + learned),
        "in_channels": c + context,
    }
    for name, value in required.items():
        if (actual := getattr(backbone, name)) != value:
            raise UserError(f"{source} has {name} {actual}, but this run needs {value}")
    if config.input.resolution % (multiple := autoencoder.factor * backbone.size_multiple):
        raise UserError(f"input.resolution {config.input.resolution}: must be a multiple of {multiple} for {source}")
    if unet and shape != UnetConfig():
        with torch.device("meta"):
            require_same_shape(
                backbone.module, build(), f"init {config.init!r} has another shape than the configuration's unet"
            )
    return backbone


def changes_since_init(
    config: LdmConfig,
    before: Process,
    now: Objective,
    init_digests: Mapping[str, str],
    digests: Mapping[str, str],
) -> Iterator[str]:
    """Yield a sentence for each difference between a run and the training of the pipeline that it starts from.

    before: the pipeline's process. now: the run's objective. init_digests, digests: of the frozen networks of the
    pipeline and of the run, by option name.
    """
    source = f"init {config.init!r}"
    if init_digests["vae"] != digests["vae"]:
        yield f"{source} was trained on another autoencoder's latents than those of --vae {config.vae!r}"
    if init_digests["text_encoder"] != digests["text_encoder"]:
        yield f"{source} was trained with another text encoder than --text-encoder {config.text_encoder!r}"
    if before.target != now.target:
        yield f"{source} predicts {before.target}, this run {now.target} (--diffusion.target)"
    a, b = before.schedule.alpha, now.schedule.alpha
    if a.shape != b.shape or not torch.allclose(a, b, atol=1e-6):
        yield f"{source} was trained with another noise schedule than this run's (--diffusion.schedule, beta_start, …)"
