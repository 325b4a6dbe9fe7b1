"""The page that goes with a model: README.md in model/, with the newest sheet beside it, as hubs and editors show it.

It says what was given, counted and measured, and nothing else. What comes from a user stands in code spans and Python
literals of one line, where no markup, line break or row of dashes means anything.
"""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ldm.networks.unet import stock_limits
from train.config.clip import ClipConfig
from train.config.ldm import LdmConfig
from train.config.run import RunConfig
from train.config.vae import VaeConfig
from train.data.store.atomic import atomic_file
from train.engine.open_data import Inputs
from train.engine.run import Run, told, versions

_LICENCE = "## Licence\n\n"  # the last section
_LONGEST = 200  # characters of a prompt in an example
_USE_CLIP = """```python
from conditioning.clip import ClipTextEncoder

features = ClipTextEncoder.load(".").encode([{prompt}])  # (1, tokens, width)
```

or with transformers alone:

```python
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

clip, processor = CLIPModel.from_pretrained("."), CLIPProcessor.from_pretrained(".")
picture, how = Image.open("sample.png"), {{"padding": "max_length", "truncation": True, "return_tensors": "pt"}}
print(clip(**processor(text=[{prompt}], images=picture, **how)).logits_per_image)
```"""
_USE_VAE = """```python
import torch
from autoencoder.model import Autoencoder

autoencoder = Autoencoder.load(".")
pixels = torch.zeros(1, 3, {side}, {side})  # pictures in [−1, 1]
latents = autoencoder.encode(pixels).mean  # normalised
pictures = autoencoder.decode(latents)
previews = autoencoder.colours(latents)  # a pixel a latent, without the decoder
```

or with diffusers alone:

```python
import torch
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained(".")
pixels = torch.zeros(1, 3, {side}, {side})  # pictures in [−1, 1]
latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
pictures = vae.decode(latents / vae.config.scaling_factor).sample
```"""
_PAINT = """```python
from {package} import {pipeline}

pipe = {pipeline}.from_pretrained(".")
pipe({prompt}, num_inference_steps={steps}, guidance_scale={guidance:g}).images[0].save("painted.png")
```"""
_INPAINT = """```python
from PIL import Image
from {package} import {pipeline}

picture, mask = Image.open("picture.png"), Image.open("mask.png")  # what is white is painted
pipe = {pipeline}.from_pretrained(".")
made = pipe(
    {prompt},
    image=picture,
    mask_image=mask,
    num_inference_steps={steps},
    guidance_scale={guidance:g},
)
made.images[0].save("painted.png")
```"""


class _About(NamedTuple):
    """What differs between the stages."""

    name: str
    what: str
    """A sentence."""
    hub: dict[str, Any]
    """Front matter."""
    use: str
    """Code that works in the model's folder."""
    sheet: str
    """What it shows."""
    settings: dict[str, str]


def write_card(folder: Path, run: Run, inputs: Inputs, network: Any, *, step: int, final: bool) -> None:
    """Write README.md, and the run's newest sheet as sample.png, into a model's folder.

    network: the one that was trained, of diffusers or transformers.
    """
    config, optimizer, side = run.config, run.config.optimizer, run.config.input.resolution
    about = _about(config, network, inputs)
    hub = about.hub | ({"license": config.license.lower()} if config.license else {})
    front = yaml.safe_dump(hub, sort_keys=False)
    progress = "the run is finished." if final else "the run is **not finished**, and this not its result yet."
    blocks = [
        f"# {_code(run.name or 'model')}: {about.name}",
        f"{about.what} Step {step:,} of {config.steps:,}: {progress}",
    ]
    sheets = [path for path in (run.out / "samples").glob("step-*.png") if path.stem <= f"step-{step:08d}"]
    if sheets:
        newest = max(sheets)
        shutil.copyfile(newest, folder / "sample.png")
        blocks += ["![Samples](sample.png)", f"*{about.sheet} At step {int(newest.stem[5:]):,}.*"]
    many = "" if inputs.stream is not None else f"{len(inputs.source):,} pictures to train on, "
    settings = about.settings | {
        "pictures": f"{'about ' * bool(config.input.buckets)}{side} × {side} pixels, {config.batch_size} a step",
        "optimizer": f"{optimizer.kind}, learning rate {optimizer.lr:g} ({optimizer.schedule}), {config.precision}",
        "average of the weights": f"decay {config.ema_decay:g}",
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
    measured, figures = run.validated(step)
    rows = [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in figures.items()]
    blocks += [
        "## Use",
        "In this folder, or with its path in place of `.`:",
        about.use,
        "## Data",
        f"{_place(config.data)}: {many}{len(inputs.held_out):,} held out; fingerprint `{run.inputs['data']}`.",
        "## Training",
        "\n".join(f"- {name}: {value}" for name, value in settings.items()),
        "All settings are in `training.json`.",
        "## Measured",
        f"On held-out pictures, with the averaged weights, at step {measured:,}:" if rows else "Nothing yet.",
        "\n".join(["| figure | value |", "|---|---|", *rows]) if rows else "",
        _LICENCE.strip(),
        f"`{config.license}`"
        if config.license
        else "Its maker hasn't stated a licence, so nobody may assume any: ask before you use or share this model.",
    ]
    page = "\n\n".join(filter(None, blocks))
    (folder / "README.md").write_text(f"---\n{front}---\n\n{page}\n", encoding="utf-8")


def state_license(folder: Path, license: str) -> None:
    """Write a licence into the card and the training.json of a finished model, and leave all else as it is."""
    page, about = folder / "README.md", folder / "training.json"
    if not page.is_file():
        return
    _, front, text = page.read_text(encoding="utf-8").split("---\n", 2)
    hub = yaml.safe_load(front) | {"license": license.lower()}
    text = text[: text.rindex(_LICENCE)] + f"{_LICENCE}`{license}`\n"
    told = json.loads(about.read_text(encoding="utf-8"))
    told["config"]["license"] = license
    for path, new in (
        (page, f"---\n{yaml.safe_dump(hub, sort_keys=False)}---\n{text}"), (about, json.dumps(told, indent=2) + "\n")
    ):  # fmt: skip
        with atomic_file(path) as file:
            file.write(new.encode())


def _about(config: RunConfig, network: Any, inputs: Inputs) -> _About:
    shape = network.config
    size = f"{sum(p.numel() for p in network.parameters()) / 1e6:.3g} M parameters"
    match config:
        case ClipConfig():
            text, image = config.text, config.image
            return _About(
                name="CLIP",
                what="A text and an image encoder, trained to condition a diffusion model.",
                hub={"library_name": "transformers", "tags": ["clip", "text-encoder"]},
                use=_USE_CLIP.format(prompt=_prompt(inputs)),
                sheet="Held-out pictures, each over the caption found nearest to it.",
                settings={
                    "network": f"{size}; projections of {config.projection}",
                    "text": f"{text.layers} layers of {text.width}, {text.max_length} tokens out of {shape.text_config.vocab_size}",
                    "image": f"{image.layers} layers of {image.width}, patches of {image.patch_size}",
                },
            )
        case VaeConfig():
            game, distance = config.adversarial, config.perceptual
            factor = 2 ** (len(shape.block_out_channels) - 1)
            loss = [config.reconstruction, f"KL × {config.kl_weight:g}"]
            loss += [f"{distance.kind} × {distance.weight:g}"] * (distance.kind != "none")
            loss += [f"{game.kind} discriminator × {game.weight:g}"] * (game.kind != "none")
            return _About(
                name="autoencoder",
                what=f"An AutoencoderKL: pictures to latents of {shape.latent_channels} channels, {factor} times smaller a "
                "side, and back.",
                hub={"library_name": "diffusers", "tags": ["autoencoder", "latent-diffusion"]},
                use=_USE_VAE.format(side=config.input.resolution),
                sheet="Held-out pictures, their reconstructions, four times the difference, and the latents' channels.",
                settings=_begun(config.init, ", the decoder alone trained" * config.decoder_only)
                | {"network": f"{size}; channels {_list(shape.block_out_channels)}", "loss": ", ".join(loss)},
            )
        case LdmConfig():
            d, inpaints = config.diffusion, config.task == "inpaint"
            how = {
                "prompt": repr(config.prompts[0][:_LONGEST]) if config.prompts else _prompt(inputs),
                "steps": config.sample_steps, "guidance": config.guidance_scale,
            }  # fmt: skip
            code, limits = (
                _INPAINT if inpaints else _PAINT,
                d.build_process().stock_limits() or stock_limits(network, inpaints),
            )
            ours = code.format(package="ldm", pipeline="LatentDiffusionPipeline", **how)
            stock = code.format(package="diffusers", pipeline="DiffusionPipeline", **how)
            return _About(
                name="inpainting model" if inpaints else "text-to-image model",
                what=f"A latent diffusion model that paints {'under a mask ' * inpaints}what a prompt says.",
                hub={
                    "library_name": "diffusers",
                    "pipeline_tag": "image-to-image" if inpaints else "text-to-image",
                    "tags": ["latent-diffusion", "inpainting" if inpaints else "text-to-image"],
                },
                use=f"{ours}\n\n" + (f"It has {limits}." if limits else f"or with diffusers alone:\n\n{stock}"),
                sheet=(
                    "Held-out pictures without what is under a mask, each beside what is painted there"
                    if inpaints
                    else "Pictures over their prompts"
                )
                + f"; {config.sample_steps} steps, guidance {config.guidance_scale:g}.",
                settings=_begun(config.init)
                | {
                    "network": f"{size}; channels {_list(shape.block_out_channels)}",
                    "autoencoder": _place(config.vae or config.init),
                    "text encoder": _place(config.text_encoder or config.init),
                    "noise": f"{d.schedule}, {d.timesteps} timesteps ({d.timestep_sampling}); predicts {d.target}",
                    "loss": f"{d.objective}, {d.loss}, {d.weighting} weights",
                    "caption dropout": f"{config.caption_dropout:g}",
                },
            )
        case _:
            raise TypeError(f"no card is known for a {type(config).__name__}")


def _prompt(inputs: Inputs) -> str:
    """A caption of held-out pictures, as a Python literal."""
    return repr(next(filter(None, inputs.held_out.captions(100)), "a caption")[:_LONGEST])


def _begun(init: str, how: str = "") -> dict[str, str]:
    return {"begun with": _place(init) + how} if init else {}


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _place(given: str) -> str:
    return "the output of a command" if given.startswith("pipe:") else _code(told(given))


def _code(text: str) -> str:
    """A code span of one line."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " * (len(fence) > 1)  # keeps the line's own backticks from joining the fence
    return f"{fence}{pad}{line}{pad}{fence}"
