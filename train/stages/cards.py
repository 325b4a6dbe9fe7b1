"""Content of each stage's model card, from its configuration and its network."""

from collections.abc import Iterable
from typing import Any

from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPModel

from ldm.networks.backbone import Backbone
from train.config.clip import ClipConfig
from train.config.ldm import LdmConfig
from train.config.vae import VaeConfig
from train.data.batches.images import Inputs
from train.engine.model_card import About, source_span

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
image, how = Image.open("sample.png"), {{"padding": "max_length", "truncation": True, "return_tensors": "pt"}}
print(clip(**processor(text=[{prompt}], images=image, **how)).logits_per_image)
```"""
_USE_VAE = """```python
import torch
from autoencoder.model import Autoencoder

autoencoder = Autoencoder.load(".")
pixels = torch.zeros(1, 3, {side}, {side})  # images in [−1, 1]
latents = autoencoder.encode(pixels).mean  # normalised
images = autoencoder.decode(latents)
previews = autoencoder.colours(latents)  # a pixel a latent, without the decoder
```

or with diffusers alone:

```python
import torch
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained(".")
pixels = torch.zeros(1, 3, {side}, {side})  # images in [−1, 1]
latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
images = vae.decode(latents / vae.config.scaling_factor).sample
```"""
_PAINT = """```python
from {package} import {pipeline}

pipe = {pipeline}.from_pretrained(".")
pipe({prompt}, num_inference_steps={steps}, guidance_scale={guidance:g}).images[0].save("generated.png")
```"""
_INPAINT = """```python
from PIL import Image
from {package} import {pipeline}

image, mask = Image.open("image.png"), Image.open("mask.png")  # what is white is painted
pipe = {pipeline}.from_pretrained(".")
made = pipe(
    {prompt},
    image=image,
    mask_image=mask,
    num_inference_steps={steps},
    guidance_scale={guidance:g},
)
made.images[0].save("generated.png")
```"""


def about_clip(config: ClipConfig, clip: CLIPModel, inputs: Inputs) -> About:
    text, image = config.text, config.image
    shape: Any = clip.config
    return About(
        name="CLIP",
        summary="A text and an image encoder, trained to condition a diffusion model.",
        library="transformers",
        tags=("clip", "text-encoder"),
        use=_USE_CLIP.format(prompt=_prompt(inputs)),
        sheet="Held-out images, each over the caption found nearest to it.",
        settings={
            "network": f"{_size(clip)}; projections of {config.projection}",
            "text": f"{text.layers} layers of {text.width}, {text.max_length} tokens out of {shape.text_config.vocab_size}",
            "image": f"{image.layers} layers of {image.width}, patches of {image.patch_size}",
        },
    )


def about_vae(config: VaeConfig, vae: AutoencoderKL) -> About:
    shape, adversarial, distance = vae.config, config.adversarial, config.perceptual
    factor = 2 ** (len(shape.block_out_channels) - 1)
    loss = [config.reconstruction, f"KL × {config.kl_weight:g}"]
    loss += [f"{distance.kind} × {distance.weight:g}"] * (distance.kind != "none")
    loss += [f"{adversarial.kind} discriminator × {adversarial.weight:g}"] * (adversarial.kind != "none")
    return About(
        name="autoencoder",
        summary=f"An AutoencoderKL: images to latents of {shape.latent_channels} channels, {factor} times smaller a side, "
        "and back.",
        library="diffusers",
        tags=("autoencoder", "latent-diffusion"),
        use=_USE_VAE.format(side=config.input.resolution),
        sheet="Held-out images, their reconstructions, four times the difference, and the latents' channels.",
        settings=_initialised_from(config.init, ", the decoder alone trained" * config.decoder_only)
        | {"network": f"{_size(vae)}; channels {_list(shape.block_out_channels)}", "loss": ", ".join(loss)},
    )


def about_ldm(config: LdmConfig, backbone: Backbone, inputs: Inputs) -> About:
    d, inpaints = config.diffusion, config.task == "inpaint"
    limits = d.build_process().stock_limits() or backbone.stock_limits()
    example = {
        "prompt": repr(config.prompts[0][:_LONGEST]) if config.prompts else _prompt(inputs),
        "steps": config.sample_steps,
        "guidance": config.guidance_scale,
    }
    code = _INPAINT if inpaints else _PAINT
    ours = code.format(package="ldm", pipeline="LatentDiffusionPipeline", **example)
    stock = code.format(package="diffusers", pipeline="DiffusionPipeline", **example)
    shown = "Held-out images without what is under a mask, each beside what is painted there"
    task = "image-to-image" if inpaints else "text-to-image"
    return About(
        name="inpainting model" if inpaints else "text-to-image model",
        summary=f"A latent diffusion model that paints {'under a mask ' * inpaints}what a prompt says.",
        library="diffusers",
        task=task,
        tags=("latent-diffusion", "inpainting" if inpaints else "text-to-image"),
        use=f"{ours}\n\n" + (f"It has {limits}." if limits else f"or with diffusers alone:\n\n{stock}"),
        sheet=f"{shown if inpaints else 'Images over their prompts'}; {config.sample_steps} steps, guidance "
        f"{config.guidance_scale:g}.",
        settings=_initialised_from(config.init)
        | {
            "network": f"{_size(backbone.module)}; {backbone.describe()}",
            "autoencoder": source_span(config.vae or config.init),
            "text encoder": source_span(config.text_encoder or config.init),
            "noise": f"{d.schedule}, {d.timesteps} timesteps ({d.timestep_sampling}); predicts {d.target}",
            "loss": f"{d.objective}, {d.loss}, {d.weighting} weights",
            "caption dropout": f"{config.caption_dropout:g}",
        },
    )


def _size(network: nn.Module) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.3g} M parameters"


def _prompt(inputs: Inputs) -> str:
    """Return a caption of held-out images, as a Python literal."""
    return repr(next(filter(None, inputs.held_out.captions(100)), "a caption")[:_LONGEST])


def _initialised_from(init: str, how: str = "") -> dict[str, str]:
    return {"begun with": source_span(init) + how} if init else {}


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
