"""The rows of `peers.py` that compare training steps."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from against.contest import Contestant, Row
from against.equality import as_shipped, compare
from against.models import SHAPES, training_inputs
from against.options import Options
from conditioning.clip import ClipTextEncoder

_NEVER = "1000000"
_ENDLESS = [
    *("--steps", _NEVER, "--validate-every", _NEVER, "--checkpoint-every", _NEVER, "--log-every", "1000"),
    *("--first-samples", "0", "--trackers", "--optimizer.warmup", "0"),
]
_ADAMW = ["--optimizer.kind", "adamw", "--optimizer.lr", "1e-3"]
_COMPILED = ["--compile", "True"]
_GAN = [
    *("--reconstruction", "l1", "--kl-weight", "1e-6", "--model.channels", "64", "128", "256", "--model.groups", "32"),
    *("--model.attention", "True", "--input.resolution", "64", "--perceptual.kind", "lpips_vgg"),
    *("--adversarial.kind", "hinge", "--adversarial.start", "0", "--adversarial.channels", "64"),
    *("--adversarial.layers", "3"),
]


def training_rows(o: Options) -> dict[str, Callable[[], Row]]:
    """Return the rows of training steps: of the demo's three stages, and of Stable Diffusion 1.5's UNet on a GPU."""
    gpu = torch.cuda.is_available()
    found: dict[str, Callable[[], Row]] = {
        "train-ldm": partial(denoising, o, "train-ldm", "demo", 64, 20 if gpu else 4)
    }
    if gpu:
        found["train-sd15"] = partial(denoising, o, "train-sd15", "sd15", 32, 3)
    found["train-vae"] = partial(autoencoding, o, "train-vae", 32, [])
    found["train-vae-gan"] = partial(autoencoding, o, "train-vae-gan", 4, _GAN)
    found["train-clip"] = partial(contrasting, o, "train-clip")
    return found


def ours(
    o: Options, name: str, stage: str, config: str, arguments: list[str]
) -> Callable[[str, list[str]], Contestant]:
    """Return a function of a name and further settings that returns ldm's training as a contestant."""

    def contestant(variant: str, more: list[str]) -> Contestant:
        out = Path(o.work) / "runs" / name / "".join(c if c.isalnum() else "-" for c in variant)
        shutil.rmtree(out.parent, ignore_errors=True)
        how = [config, *_ENDLESS, "--precision", o.precision, "--out", str(out), *arguments, *more]
        spec = {"who": "ldm", "stage": stage, "arguments": how, "threads": torch.get_num_threads()}
        return Contestant(variant, "training.py", spec)

    return contestant


def peer(o: Options, stage: str, spec: dict[str, Any]) -> Callable[[str, str], Contestant]:
    """Return a function of a name and of optimisations that returns a loop of diffusers' kind as a contestant."""
    spec = spec | {"who": "diffusers", "stage": stage, "precision": o.precision, "threads": torch.get_num_threads()}
    return lambda name, how: Contestant(name, "training.py", spec | {"how": how})


def denoising(o: Options, name: str, shape: str, batch: int, calls: int) -> Row:
    """Return the row of stage 2's step, on cached latents and text features."""
    large, shape = shape != "demo", "tiny" if o.tiny else shape
    batch = 4 if o.tiny else batch
    s = SHAPES[shape]
    inputs = training_inputs(shape, Path(o.work), 128 if large else 1024)
    with torch.device("meta"):
        unet = s.unet.build(latent_channels=4, latent_size=s.side, text_width=s.width)
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    arguments = ["--batch-size", str(batch), "--data", inputs["data"], "--vae", inputs["vae"]]
    arguments += ["--text-encoder", inputs["clip"], "--unet.channels", *map(str, s.unet.channels)]
    if large:
        arguments += ["--accumulation", "1", "--gradient-checkpointing", "False"]
    ldm = ours(o, name, "ldm", f"configs/{'sd15' if large else 'shapes'}/ldm.yaml", arguments)
    loop = peer(o, "ldm", {"unet": config, "batch": batch, "condition": [s.tokens, s.width]})
    best = "fused attention" + (" channels_last" if torch.cuda.is_available() else "")
    found = [loop("diffusers' loop", "shipped"), loop("diffusers' loop by hand", best)]
    found += [ldm("ldm, AdamW", _ADAMW), ldm("ldm, Muon", [])] if not large else [ldm("ldm, AdamW", [])]
    found.append(ldm("ldm, AdamW, compiled", [*([] if large else _ADAMW), *_COMPILED]))
    found.append(loop("diffusers' loop by hand, compiled", f"{best} compiled"))
    proof = None
    if o.diffusers and not large:
        found.append(as_shipped(o, name, shape, batch, inputs["data"]))
        proof = partial(compare, o, shape, inputs["data"])
    what = f"stage 2's step, {shape}, batch {batch}"
    return Row(name, what, found, calls, together=not large, base="diffusers' loop", proof=proof)


def autoencoding(o: Options, name: str, batch: int, settings: list[str]) -> Row:
    """Return a row of stage 1's step; settings: those of adversarial training, or none."""
    gan, shape = bool(settings), "tiny" if o.tiny else "demo"
    s, channels = SHAPES[shape], (64, 128, 256)
    side = 64 if gan else s.side * s.factor
    inputs = training_inputs(shape, Path(o.work), 1024, side)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels if gan else s.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32 if gan else s.vae_groups,
        mid_block_add_attention=gan,
    )
    spec = {"vae": {k: v for k, v in vae.config.items() if not k.startswith("_")}, "batch": batch, "side": side}
    spec |= (
        {"kl_weight": 1e-6, "vgg": inputs["vgg.safetensors"], "discriminator": [64, 3]} if gan else {"kl_weight": 1e-2}
    )
    arguments = ["--batch-size", str(batch), "--data", inputs["data"]]
    arguments += [*settings, "--perceptual.model", inputs["vgg.safetensors"]] if gan else _channels(s.vae_channels)
    ldm, loop = ours(o, name, "vae", "configs/shapes/vae.yaml", arguments), peer(o, "vae", spec)
    found = [
        loop("diffusers' loop", ""),
        loop("diffusers' loop by hand", "fused"),
        ldm("ldm, AdamW", _ADAMW),
        ldm("ldm, Muon", []),
        ldm("ldm, AdamW, compiled", [*_ADAMW, *_COMPILED]),
        loop("diffusers' loop by hand, compiled", "fused compiled"),
    ]
    what = f"stage 1's step, {'LPIPS and discriminator, ' if gan else ''}{side} pixels, batch {batch}"
    return Row(name, what, found, 4, base="diffusers' loop")


def contrasting(o: Options, name: str) -> Row:
    """Return the row of stage 0's step, with the contrastive loss only."""
    batch, inputs = 8 if o.tiny else 128, training_inputs("tiny" if o.tiny else "demo", Path(o.work), 1024)
    text = ClipTextEncoder.load(inputs["clip"]).model.config
    tower = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = {
        "text_config": {**tower, "vocab_size": text.vocab_size, "max_position_embeddings": 16, "eos_token_id": 1},
        "vision_config": {**tower, "image_size": 32, "patch_size": 8},
    }
    loop = peer(o, "clip", {"clip": config | {"projection_dim": 96}, "batch": batch})
    arguments = ["--batch-size", str(batch), "--data", inputs["data"], "--tokens.sketch", "0", "--tokens.echo", "0"]
    ldm = ours(o, name, "clip", "configs/shapes/clip.yaml", arguments)
    found = [
        loop("transformers' loop", ""),
        loop("transformers' loop by hand", "fused"),
        ldm("ldm, AdamW", _ADAMW),
        ldm("ldm, Muon", []),
        ldm("ldm, AdamW, compiled", [*_ADAMW, *_COMPILED]),
        loop("transformers' loop by hand, compiled", "fused compiled"),
    ]
    return Row(name, f"stage 0's step, batch {batch}", found, 4, base="transformers' loop")


def _channels(channels: tuple[int, ...]) -> list[str]:
    return ["--model.channels", *map(str, channels)]
