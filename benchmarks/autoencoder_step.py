"""Compare a training step of stage 1 with diffusers' train_autoencoderkl.py, corrected to do the same work, in one run.

The script of diffusers 0.42 gives LPIPS no gradient and lets the discriminator's gradient into the autoencoder. Both
are corrected here. Three variants are measured. `ldm` is the step of train_vae.py. `diffusers script` is the script's
loop, where one batch updates the autoencoder and the next the discriminator, each with a full forward pass.
`diffusers by hand` is that loop optimized by hand: one forward pass for both, fused optimizers, and nothing is read
from the device. All three have the same networks, losses, batch and clipping, and update each network once per step.

    python benchmarks/autoencoder_step.py --steps 8

Times are process times (CPU) or device times. Steps alternate; medians are printed. VGG has random weights, which don't
change the amount of work.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision.models import vgg16

from autoencoder.discriminator import PatchDiscriminator
from autoencoder.model import build_autoencoder
from autoencoder.perceptual import Lpips
from train.config.optimizer import OptimizerConfig
from train.config.run import Precision
from train.config.vae import AdversarialConfig, VaeConfig
from train.engine.precision import autocast
from train.engine.provenance import versions
from train.stages.vae_step import AutoencoderLoss, DiscriminatorLoss, VaeBatch

Step = Callable[[VaeBatch], float]


def ldm_step(vae_shape: dict, vgg: str, device: torch.device, precision: Precision) -> Step:
    """Return ldm's training step, as in train/engine/trainer.py but without logging and averaging."""
    torch.manual_seed(0)
    config = VaeConfig(adversarial=AdversarialConfig(kind="hinge", channels=64, layers=3))
    vae, discriminator = build_autoencoder(**vae_shape).to(device), PatchDiscriminator(64, 3).to(device)
    modules = (
        AutoencoderLoss(vae, config, Lpips("vgg", vgg).to(device), discriminator),
        DiscriminatorLoss(discriminator, config.adversarial),
    )
    phases = [(m, OptimizerConfig().build(m)) for m in modules]

    def step(batch: VaeBatch) -> float:
        part: Any = batch
        for module, optimizer in phases:
            with autocast(device, precision):
                out = module(part)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            part = out.batch
        return 0.0

    return step


def diffusers_step(vae_shape: dict, vgg: str, device: torch.device, precision: Precision, by_hand: bool) -> Step:
    """Return the step of diffusers' script, rewritten here. by_hand: optimize it by hand."""
    from safetensors.torch import load_file

    torch.manual_seed(0)
    vae, discriminator = build_autoencoder(**vae_shape).to(device), PatchDiscriminator(64, 3).to(device)
    lpips = _LPIPS(net="vgg", pnet_rand=True)
    weights = load_file(vgg)
    for name, value in lpips.net.state_dict().items():
        value.copy_(weights[f"features.{name.split('.', 1)[1]}"])
    lpips.to(device)
    fused = True if by_hand else None
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-4, weight_decay=0.01, fused=fused) for m in (vae, discriminator)]

    def reconstruct(batch: VaeBatch) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(batch.pixels).latent_dist
        z = posterior.mean + posterior.std * batch.posterior_noise
        return vae.decode(z).sample, posterior.kl()

    def update(k: int, loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_([vae, discriminator][k].parameters(), 1.0)
        optimizers[k].step()
        optimizers[k].zero_grad(set_to_none=True)

    def step(batch: VaeBatch) -> float:
        pixels, logged = batch.pixels, 0.0
        with autocast(device, precision):
            decoded, kl = reconstruct(batch)
            n = len(pixels)
            nll = (F.l1_loss(decoded.float(), pixels, reduction="none") + lpips(decoded.float(), pixels)).sum() / n
            generator, last = -discriminator(decoded).mean(), vae.decoder.conv_out.weight
            one = torch.autograd.grad(nll, last, retain_graph=True)[0]
            two = torch.autograd.grad(generator, last, retain_graph=True)[0]
            weight = 0.5 * (one.norm() / (two.norm() + 1e-4)).clamp(0, 1e4).detach()
            loss = nll + 1e-6 * kl.sum() / n + weight * generator
        update(0, loss)
        discriminator.zero_grad(set_to_none=True)
        logged += 0.0 if by_hand else sum(x.item() for x in (loss, nll, kl.mean(), weight, generator))
        with autocast(device, precision):
            decoded = decoded if by_hand else reconstruct(batch)[0]
            real, fake = discriminator(pixels), discriminator(decoded.detach())
            loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        update(1, loss)
        return logged + (0.0 if by_hand else sum(x.item() for x in (loss, real.mean(), fake.mean())))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    o = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = {"channels": o.channels, "layers": o.layers, "latent_channels": 4, "attention": True}
    side = o.side // 2 ** (len(o.channels) - 1)
    batch = VaeBatch(
        pixels=torch.rand(o.batch_size, 3, o.side, o.side, device=device) * 2 - 1,
        posterior_noise=torch.randn(o.batch_size, 4, side, side, device=device),
        adversarial=True,
    )

    def seconds(step: Step) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            started = time.perf_counter()
            step(batch)
            torch.cuda.synchronize()
            return time.perf_counter() - started
        started = time.process_time()
        step(batch)
        return (time.process_time() - started) / torch.get_num_threads()

    print(f"{versions()}, {device}, {torch.get_num_threads()} threads, {vars(o)}")
    with tempfile.TemporaryDirectory() as folder:
        vgg = str(Path(folder) / "vgg.safetensors")
        save_file({f"features.{k}": v for k, v in vgg16().features.state_dict().items()}, vgg)
        for precision in o.precision:
            steps = {
                "ldm": ldm_step(shape, vgg, device, precision),
                "diffusers script": diffusers_step(shape, vgg, device, precision, by_hand=False),
                "diffusers by hand": diffusers_step(shape, vgg, device, precision, by_hand=True),
            }
            times: dict[str, list[float]] = {name: [] for name in steps}
            for k in range(o.steps + 2):
                for name, step in steps.items():
                    took = seconds(step)
                    if k >= 2:
                        times[name].append(took)
            median = {name: statistics.median(t) for name, t in times.items()}
            for name, t in times.items():
                spread = f"{min(t) * 1e3:.0f} to {max(t) * 1e3:.0f}"
                print(
                    f"{precision} {name}: {median[name] * 1e3:.0f} ms ({spread}), {median[name] / median['ldm']:.2f}×"
                )


if __name__ == "__main__":
    main()
