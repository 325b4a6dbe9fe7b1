"""The losses of stages 0 and 1, written from the papers' formulas with plain torch and differentiated by autograd."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.stepping import uniforms
from train.config.clip import ClipConfig
from train.config.vae import VaeConfig

Distance = Callable[[Tensor, Tensor], Tensor]
"""Perceptual distance of decoded images and their targets."""


# -- stage 0 --------------------------------------------------------------------------------------------------


def clip_terms(net: Any, part: Any) -> dict[str, Tensor]:
    """Return the terms of stage 0's loss for a part of a batch, without their weights."""
    clip, ids = net.clip, part.input_ids
    read = clip.text_model(input_ids=ids)
    image = clip.visual_projection(clip.vision_model(pixel_values=part.pixels).pooler_output)
    text = clip.text_projection(read.pooler_output)
    cosines = F.cosine_similarity(image[:, None], text[None], dim=-1)  # (b images, b captions)
    logits = clip.logit_scale.exp() * cosines
    equal = (ids[:, None] == ids[None]).all(-1)
    share = equal / equal.sum(1, keepdim=True)
    entropies = [-(share * x.log_softmax(1)).sum(1).mean() for x in (logits, logits.T)]
    terms = {"contrastive": sum(entropies, torch.zeros(())) / 2}
    tokens = read.last_hidden_state
    if hasattr(net.tasks, "sketch"):
        terms["sketch"] = (net.tasks.sketch(tokens) - part.pixels).square().mean()
    if hasattr(net.tasks, "echo"):
        terms["echo"] = echo(net.tasks.echo, tokens, ids, clip.config.text_config.eos_token_id)
    return terms


def echo(task: Any, tokens: Tensor, ids: Tensor, end: int) -> Tensor:
    """Return the mean squared error of the codes of each token and of the three before it."""
    predicted, means = task.repeat(tokens).unflatten(-1, (4, 32)), []
    for back in range(4):
        for row, caption in enumerate(ids.tolist()):
            last = caption.index(end)
            errors = [
                (predicted[row, t, back] - task.codes[caption[t - back]]).square().mean() for t in range(back, last + 1)
            ]
            means.append(torch.stack(errors).mean())
    return torch.stack(means).mean()


def clip_losses(c: ClipConfig, nets: Sequence[Any], parts: Sequence[Any], step: int) -> list[Tensor]:
    weights = {"contrastive": 1.0, "sketch": c.tokens.sketch, "echo": c.tokens.echo}
    each = [sum(weights[name] * term for name, term in clip_terms(nets[0], part).items()) for part in parts]
    return [sum(each, torch.zeros(())) / len(each)]


# -- stage 1 --------------------------------------------------------------------------------------------------


def transformed(c: VaeConfig, step: int, latents: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate and scale latents and images by a step's random numbers, if the step does."""
    use, height, width, turns = uniforms(c.seed, 12, [step], 4)[0]
    if use >= c.equivariance.share:
        return latents, images
    smallest, side = c.equivariance.smallest, latents.shape[-1]
    sides = [max(1, round(side * (smallest + (1 - smallest) * u))) for u in (height, width)]
    factor = images.shape[-1] // side
    out = []
    for x, scale in ((latents, 1), (images, factor)):
        size = [scale * s for s in sides]
        if list(x.shape[-2:]) != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
        out.append(torch.rot90(x, int(turns * 4), (-2, -1)))
    return out[0], out[1]


def error_of(kind: str, decoded: Tensor, target: Tensor) -> Tensor:
    d = (decoded - target).abs()
    huber = torch.where(d < 0.1, d**2 / 0.2, d - 0.05)
    return {"l1": d, "l2": d**2, "huber": huber}[kind].mean()


def vae_terms(
    c: VaeConfig, nets: Sequence[Any], parts: Sequence[Any], step: int, perceptual: Distance | None = None
) -> dict[str, Tensor]:
    """Return the terms of stage 1's losses for a batch, and the losses of its two phases: `loss`, `critic`."""
    vae, logvar = nets[0].vae, nets[0].logvar
    pixels = torch.cat([part.pixels for part in parts])
    noise = torch.cat([part.posterior_noise for part in parts])
    mean, logvariance = vae.quant_conv(vae.encoder(pixels)).chunk(2, 1)
    z = mean + (logvariance / 2).exp() * noise
    latents, target = transformed(c, step, z, pixels)
    decoded = vae.decoder(vae.post_quant_conv(latents))
    terms = {"reconstruction": error_of(c.reconstruction, decoded, target)}
    distance = terms["reconstruction"]
    if perceptual is not None:
        terms["perceptual"] = perceptual(decoded, target)
        distance = distance + c.perceptual.weight * terms["perceptual"]
    if logvar is not None:
        distance = distance / logvar.exp() + logvar
    nats = (mean**2 + logvariance.exp() - 1 - logvariance).sum((1, 2, 3)) / 2
    terms["kl"] = nats.mean() / pixels[0].numel()
    loss = distance + c.kl_weight * terms["kl"]
    a = c.adversarial
    if a.kind != "none" and step >= a.start:
        fake = nets[1](decoded)
        generator = {
            "hinge": -fake,
            "non_saturating": -fake.sigmoid().log(),
            "saturating": (1 - fake.sigmoid()).log(),
        }[a.kind].mean()
        weight = torch.tensor(a.weight)
        if a.adaptive:
            last = vae.decoder.conv_out.weight
            norms = [torch.autograd.grad(t, last, retain_graph=True)[0].norm() for t in (distance, generator)]
            weight = a.weight * norms[0] / norms[1]
        terms |= {"adversarial": generator, "adversarial_weight": weight}
        loss = loss + weight.detach() * generator
        terms["critic"] = critic_loss(c, nets[1], target, decoded.detach())
    return terms | {"loss": loss}


def critic_loss(c: VaeConfig, critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss with its R1 penalty."""
    images = real.clone().requires_grad_()
    on_real, on_fake = critic(images), critic(fake)
    if c.adversarial.kind == "hinge":
        loss = ((1 - on_real).clamp(min=0).mean() + (1 + on_fake).clamp(min=0).mean()) / 2
    else:
        loss = -(on_real.sigmoid().log().mean() + (1 - on_fake.sigmoid()).log().mean()) / 2
    (gradient,) = torch.autograd.grad(on_real.mean((1, 2, 3)).sum(), images, create_graph=True)
    return loss + c.adversarial.r1 * gradient.square().sum((1, 2, 3)).mean() / 2


def vae_losses(c: VaeConfig, nets: Sequence[Any], parts: Sequence[Any], step: int) -> list[Tensor]:
    terms = vae_terms(c, nets, parts, step)
    return [terms[name] for name in ("loss", "critic") if name in terms]
