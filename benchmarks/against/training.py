"""A process that trains one stage step by step, for `peers.py`: ldm's own training, or a loop of diffusers' kind.

ldm's training is the complete one, with data loading, logging and averages; a hook makes it wait for its turn. The
loops have their inputs in memory:

- stage 2: that of diffusers' train_text_to_image.py, with cached latents and text features (finetuning.py)
- stage 1: that of its train_autoencoderkl.py, corrected: LPIPS has a gradient, and the discriminator's gradient doesn't
  reach the autoencoder
- stage 0: a CLIPModel with its contrastive loss
"""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from against.finetuning import AUTOCAST, EXAMPLES, finetuning, train_peer
from against.served import Server, open_server

Step = Callable[[], object]


def train_ours(spec: Mapping[str, Any], server: Server) -> None:
    """Train with ldm's configuration; the hook answers between two steps. Never returns."""
    from train.config.clip import ClipConfig
    from train.config.ldm import LdmConfig
    from train.config.load import parse
    from train.config.vae import VaeConfig
    from train.engine.stage import Hooks
    from train.stages import clip, ldm, vae

    left = -1

    class Turns(Hooks):
        def begin_step(self, step: int, parts: list[Any]) -> list[Any]:
            nonlocal left
            if left < 0:
                server.forget_memory()
                server.answer(ready=True)
            if left == 0:
                server.called()
            left = (left if left > 0 else server.next_calls()) - 1
            return parts

    kind, train = {
        "clip": (ClipConfig, clip.train),
        "vae": (VaeConfig, vae.train),
        "ldm": (LdmConfig, ldm.train),
    }[spec["stage"]]
    train(parse(kind, spec["arguments"]), Turns())  # type: ignore[operator, type-var]


def autoencoding(spec: Mapping[str, Any], device: torch.device) -> Step:
    """Return a step of stage 1, with one forward pass for both networks; see the module's docstring."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(**spec["vae"]).to(device)
    b, side, words = spec["batch"], spec["side"], spec["how"].split()
    images, fused = torch.rand(EXAMPLES, 3, side, side, device=device) * 2 - 1, "fused" in words or None
    optimizer = torch.optim.AdamW(vae.parameters(), 1e-4, weight_decay=0.01, fused=fused)
    average = [w.detach().clone() for w in vae.parameters()]
    adversary = _Adversary(spec, device, fused) if spec.get("vgg") else None
    dtype = AUTOCAST[spec["precision"]]
    if "compiled" in words:
        vae.encoder.compile()
        vae.decoder.compile()
        if adversary is not None:
            adversary.lpips.compile()

    def step() -> None:
        pixels = images[torch.randint(EXAMPLES, (b,), device=device)]
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
            kl = posterior.kl().sum() / b
            if adversary is None:
                loss = F.mse_loss(decoded.float(), pixels) + spec["kl_weight"] * kl
            else:
                loss = adversary.loss(decoded, pixels, vae.decoder.conv_out.weight) + spec["kl_weight"] * kl
        _update(loss, vae, optimizer)
        with torch.no_grad():
            torch._foreach_lerp_(average, list[Tensor](vae.parameters()), 0.01)
        if adversary is not None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = adversary.own_loss(decoded.detach(), pixels)
            _update(loss, adversary.discriminator, adversary.optimizer)

    return step


class _Adversary:
    """LPIPS and a discriminator, as the script combines them."""

    def __init__(self, spec: Mapping[str, Any], device: torch.device, fused: bool | None) -> None:
        from safetensors.torch import load_file
        from torchmetrics.functional.image.lpips import _LPIPS

        from autoencoder.discriminator import PatchDiscriminator

        self.discriminator = PatchDiscriminator(*spec["discriminator"]).to(device)
        self.optimizer = torch.optim.AdamW(self.discriminator.parameters(), 1e-4, weight_decay=0.01, fused=fused)
        self.lpips = _LPIPS(net="vgg", pnet_rand=True)
        weights = load_file(spec["vgg"])
        for name, value in self.lpips.net.state_dict().items():
            value.copy_(weights[f"features.{name.split('.', 1)[1]}"])
        self.lpips.to(device)

    def loss(self, decoded: Tensor, pixels: Tensor, last: Tensor) -> Tensor:
        decoded, n = decoded.float(), len(pixels)
        nll = (F.l1_loss(decoded, pixels, reduction="none") + self.lpips(decoded, pixels)).sum() / n
        generator = -self.discriminator(decoded).mean()
        one, two = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, generator))
        return nll + 0.5 * (one / (two + 1e-4)).clamp(0, 1e4).detach() * generator

    def own_loss(self, fake: Tensor, real: Tensor) -> Tensor:
        self.discriminator.zero_grad(set_to_none=True)  # of the autoencoder's loss
        return 0.5 * (F.relu(1 - self.discriminator(real)).mean() + F.relu(1 + self.discriminator(fake)).mean())


def contrasting(spec: Mapping[str, Any], device: torch.device) -> Step:
    """Return a step of transformers' CLIPModel with its contrastive loss, on random inputs in memory."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    model: Any = CLIPModel(CLIPConfig(**spec["clip"]))
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused="fused" in spec["how"].split() or None)
    average = [w.detach().clone() for w in model.parameters()]
    if "compiled" in spec["how"].split():
        model.compile()
    text, vision, b = model.config.text_config, model.config.vision_config, spec["batch"]
    ids = torch.randint(text.vocab_size, (EXAMPLES, text.max_position_embeddings), device=device)
    images = torch.rand(EXAMPLES, 3, vision.image_size, vision.image_size, device=device) * 2 - 1
    dtype = AUTOCAST[spec["precision"]]

    def step() -> None:
        index = torch.randint(EXAMPLES, (b,), device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids[index], pixel_values=images[index], return_loss=True).loss
        _update(loss, model, optimizer)
        with torch.no_grad():
            torch._foreach_lerp_(average, list[Tensor](model.parameters()), 0.01)

    return step


def _update(loss: Tensor, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


_LOOPS: dict[str, Callable[..., Step]] = {"ldm": finetuning, "vae": autoencoding, "clip": contrasting}


def main() -> None:
    spec = json.loads(sys.argv[1])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(spec["threads"])
    if "out" in spec:
        train_peer(spec, device)
        return
    server = open_server(device.type)
    if spec["who"] == "ldm":
        train_ours(spec, server)
    step = _LOOPS[spec["stage"]](spec, device)
    server.forget_memory()
    server.answer(ready=True)
    server.serve(step)


if __name__ == "__main__":
    main()
