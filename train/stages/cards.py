"""Content of each stage's model card, from its configuration and its network."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from ldm.formats.scheduler_config import Process
from ldm.libraries import AutoencoderKL
from ldm.networks.backbone import Backbone
from train.config.clip import ClipConfig
from train.config.distill import DistillConfig
from train.config.latent import LatentConfig
from train.config.ldm import LdmConfig
from train.config.vae import VaeConfig
from train.data.batches.images import Inputs
from train.engine.model_card import About, source_span

if TYPE_CHECKING:
    from transformers import CLIPModel

_LONGEST = 200  # largest number of characters of a prompt in example code
_USE_CLIP = """```python
from conditioning.clip import ClipTextEncoder

features = ClipTextEncoder.load(".").encode([{prompt}])  # (1, tokens, width)
```

or with transformers only:

```python
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

clip, processor = CLIPModel.from_pretrained("."), CLIPProcessor.from_pretrained(".")
image = Image.open("sample.png")
options = {{"padding": "max_length", "truncation": True, "return_tensors": "pt"}}
print(clip(**processor(text=[{prompt}], images=image, **options)).logits_per_image)
```"""
_USE_VAE = """```python
import torch
from autoencoder.model import Autoencoder

autoencoder = Autoencoder.load(".")
pixels = torch.zeros(1, 3, {side}, {side})  # images in [−1, 1]
latents = autoencoder.encode(pixels).mean  # normalised
images = autoencoder.decode(latents)
previews = autoencoder.colours(latents)  # one pixel per latent pixel, without the decoder
```

or with diffusers only:

```python
import torch
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained(".")
pixels = torch.zeros(1, 3, {side}, {side})  # images in [−1, 1]
latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
images = vae.decode(latents / vae.config.scaling_factor).sample
```"""
_GENERATE = """```python
from {package} import {pipeline}

pipe = {pipeline}.from_pretrained(".")
pipe({prompt}, num_inference_steps={steps}, guidance_scale={guidance:g}).images[0].save("generated.png")
```"""
_INPAINT = """```python
from PIL import Image
from {package} import {pipeline}

image, mask = Image.open("image.png"), Image.open("mask.png")  # white: the area to inpaint
pipe = {pipeline}.from_pretrained(".")
output = pipe(
    {prompt},
    image=image,
    mask_image=mask,
    num_inference_steps={steps},
    guidance_scale={guidance:g},
)
output.images[0].save("generated.png")
```"""


def about_clip(config: ClipConfig, clip: "CLIPModel", inputs: Inputs) -> About:
    text, image = config.text, config.image
    shape: Any = clip.config
    return About(
        name="CLIP",
        summary="A text encoder for a diffusion model, trained together with an image encoder.",
        library="transformers",
        tags=("clip", "text-encoder"),
        use=_USE_CLIP.format(prompt=_prompt(inputs)),
        sheet="Held-out images, each above the held-out caption that is nearest to it in the embedding space.",
        settings={
            "network": f"{_size(clip)}; embeddings of {config.projection} dimensions",
            "text": f"{text.layers} layers of {text.width} features, {text.max_length} tokens, "
            f"vocabulary of {shape.text_config.vocab_size}",
            "image": f"{image.layers} layers of {image.width} features, patches of {image.patch_size} pixels per side",
        },
    )


def about_vae(config: VaeConfig, vae: AutoencoderKL) -> About:
    shape, adversarial, distance = vae.config, config.adversarial, config.perceptual
    factor = 2 ** (len(shape.block_out_channels) - 1)
    loss = [config.reconstruction, f"KL × {config.kl_weight:g}"]
    loss += [f"{distance.kind} × {distance.weight:g}"] * (distance.kind != "none" and distance.weight > 0)
    loss += [f"{adversarial.kind} discriminator × {adversarial.weight:g}"] * (adversarial.kind != "none")
    return About(
        name="autoencoder",
        summary=f"An AutoencoderKL. It encodes images as latents with {shape.latent_channels} channels and sides "
        f"{factor} times shorter, and decodes them.",
        library="diffusers",
        tags=("autoencoder", "latent-diffusion"),
        use=_USE_VAE.format(side=config.input.resolution),
        sheet="In rows: held-out images, reconstructions, four times the difference, and each channel of the latents.",
        settings=_initialised_from(config.init, ", only the decoder is trained" * config.decoder_only)
        | {"network": f"{_size(vae)}; channels {_list(shape.block_out_channels)}", "loss": ", ".join(loss)},
    )


def about_ldm(config: LdmConfig, backbone: Backbone, inputs: Inputs) -> About:
    d, inpaints = config.diffusion, config.task == "inpaint"
    limits = d.build_process().diffusers_limits() or backbone.diffusers_limits()
    task = "image-to-image" if inpaints else "text-to-image"
    purpose = (
        "fills the masked area of an image from a text prompt" if inpaints else "generates images from text prompts"
    )
    return About(
        name="inpainting model" if inpaints else "text-to-image model",
        summary=f"A latent diffusion model that {purpose}.",
        library="diffusers",
        task=task,
        tags=("latent-diffusion", "inpainting" if inpaints else "text-to-image"),
        use=_use(config, inputs, inpaints, limits),
        sheet=_sheet(config, inpaints),
        settings=_initialised_from(config.init)
        | {
            "network": f"{_size(backbone.module)}; {backbone.describe()}",
            "autoencoder": source_span(config.vae or config.init),
            "text encoder": source_span(config.text_encoder or config.init),
            "noise schedule": f"{d.schedule}, {d.timesteps} timesteps ({d.timestep_sampling} in training)",
            "prediction target": d.target,
            "loss": f"objective {d.objective}, error {d.loss}, weighting {d.weighting}",
            "caption dropout": f"{config.caption_dropout:g}",
        },
    )


def about_distilled(config: DistillConfig, process: Process, backbone: Backbone, inputs: Inputs) -> About:
    """Return the description of a student. process: the one that is saved with it."""
    inpaints, few = bool(backbone.context_channels), config.method == "consistency"
    limits = process.diffusers_limits() or backbone.diffusers_limits()
    low, high = config.scales
    solver = f"DDIM, {config.solver_steps} steps"
    if config.trajectory:
        solver = f"DPM++ 2M, {config.trajectory} steps from noise, of which {config.levels} are learned"
        solver += f", {config.on_policy:.0%} of them from the student's own states" * (config.on_policy > 0)
    loss = f"pseudo-Huber, c = {config.huber:g}; solver {solver}" if few else "squared error"
    loss += ", weighted by max(sigma / alpha, 1)" * config.weight_noise
    loss += f"; hinge discriminator × {config.adversarial:g}" * (config.adversarial > 0)
    return About(
        name=f"distilled {'inpainting' if inpaints else 'text-to-image'} model",
        summary="A latent diffusion model, distilled from another one. It evaluates its network once per step, "
        f"because it reads the guidance scale, from {low:g} to {high:g}"
        + ("; and few steps are enough, such as 4." if few else "."),
        library="diffusers",
        task="image-to-image" if inpaints else "text-to-image",
        tags=("latent-diffusion", "inpainting" if inpaints else "text-to-image", "distillation")
        + (("lcm",) if few else ()),
        use=_use(config, inputs, inpaints, limits),
        sheet=_sheet(config, inpaints),
        settings={
            "teacher": source_span(config.teacher),
            "network": f"{_size(backbone.module)}; {backbone.describe()}",
            "distillation": f"{config.method}, guidance scales {low:g} to {high:g}",
            "loss": loss,
        },
    )


def _use(config: LatentConfig, inputs: Inputs, inpaints: bool, limits: str | None) -> str:
    """Return example code. limits: what diffusers can't do with the model."""
    example = {
        "prompt": repr(config.prompts[0][:_LONGEST]) if config.prompts else _prompt(inputs),
        "steps": config.sample_steps,
        "guidance": config.guidance_scale,
    }
    code = _INPAINT if inpaints else _GENERATE
    ours = code.format(package="ldm", pipeline="LatentDiffusionPipeline", **example)
    stock = code.format(package="diffusers", pipeline="DiffusionPipeline", **example)
    return f"{ours}\n\n" + (f"Note: {limits}." if limits else f"or with diffusers only:\n\n{stock}")


def _sheet(config: LatentConfig, inpaints: bool) -> str:
    shown = "Held-out images without the masked area, each beside the image inpainted from its caption"
    return (
        f"{shown if inpaints else 'Images, each above its prompt'}; {config.sample_steps} steps, guidance "
        f"{config.guidance_scale:g}."
    )


def _size(network: nn.Module) -> str:
    return f"{sum(p.numel() for p in network.parameters()) / 1e6:.3g} M parameters"


def _prompt(inputs: Inputs) -> str:
    """Return a caption of held-out images, as a Python literal."""
    return repr(next(filter(None, inputs.held_out.captions(100)), "a caption")[:_LONGEST])


def _initialised_from(init: str, note: str = "") -> dict[str, str]:
    return {"initialised from": source_span(init) + note} if init else {}


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
