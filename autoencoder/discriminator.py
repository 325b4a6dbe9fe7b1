"""PatchGAN's discriminator (Isola et al. 2017, arXiv 1611.07004, app. 6.1.2) and the adversarial losses.

The discriminator classifies overlapping patches. It uses group normalisation instead of batch normalisation, so that an
image's logits depend neither on the rest of the batch nor on the number of processes.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from autoencoder import AdversarialKind


class PatchDiscriminator(nn.Module):
    """Discriminator: (b, 3, H, W) → logits (b, 1, h, w), one per patch. `inputs` channels replace the 3 of images.

    It has `layers` strided convolutions and two more, all 4×4. A patch has 70 pixels per side for 3 layers, 34 for 2.
    spectral: every convolution's largest singular value is kept at 1 (Miyato et al. 2018, arXiv 1802.05957). The
    network is always in eval mode, in which its output depends only on its weights; `refresh`, once per step, updates
    the singular values.
    """

    def __init__(self, channels: int = 32, layers: int = 2, *, spectral: bool = False, inputs: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(inputs, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            wider = channels * 2 if layer < 4 else channels  # at most 8 times the first width
            parts += [
                nn.Conv2d(channels, wider, 4, stride=2 if layer < layers else 1, padding=1),
                nn.GroupNorm(math.gcd(wider, max(1, min(32, channels // 4))), wider),
                nn.LeakyReLU(0.2),
            ]
            channels = wider
        self.body = nn.Sequential(*parts, nn.Conv2d(channels, 1, 4, padding=1))
        self.smallest = 3 * 2**layers
        """Side in pixels of the smallest images that it accepts."""
        if spectral:
            for part in self.body:
                if isinstance(part, nn.Conv2d):
                    spectral_norm(part)
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.body(pixels)

    @torch.no_grad()
    def refresh(self) -> None:
        """Run one power iteration of each spectral norm; the weights don't change."""
        self.train()
        for layer in self.body:
            if isinstance(layer, nn.Conv2d):
                _ = layer.weight  # reading it in train mode runs the iteration
        self.eval()


@contextmanager
def frozen(module: nn.Module, keep_trainable: nn.Parameter | None = None) -> Iterator[None]:
    """Freeze the module's weights within the context; gradients still go through the module.

    keep_trainable: parameter that isn't frozen.
    """
    trained = [p for p in module.parameters() if p.requires_grad and p is not keep_trainable]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def discriminator_loss(kind: AdversarialKind, real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss, a mean over patches.

    real, fake: logits (b, 1, h, w) of images and of reconstructions.
    hinge: Lim & Ye 2017 (arXiv 1705.02894). Others: Goodfellow et al. 2014 (arXiv 1406.2661), half the cross-entropies.
    """
    real, fake = real.float(), fake.float()
    match kind:
        case "hinge":
            return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        case "non_saturating" | "saturating":
            return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
        case _:
            assert_never(kind)


def generator_loss(kind: AdversarialKind, fake: Tensor) -> Tensor:
    """Return the generator's loss: −E[D] (hinge), −E[log p(real)] (non_saturating), E[log p(fake)] (saturating)."""
    fake = fake.float()
    match kind:
        case "hinge":
            return -fake.mean()
        case "non_saturating":
            return F.softplus(-fake).mean()
        case "saturating":
            return -F.softplus(fake).mean()
        case _:
            assert_never(kind)


def r1_penalty(discriminator: nn.Module, real: Tensor) -> Tensor:
    """Return ½ E ‖∇ D(x)‖² at real images (b, 3, H, W), where D is the mean over patches.

    Mescheder et al. 2018 (arXiv 1801.04406), eq. 9. It is computed in float32 even under autocast, since squared
    gradients are mostly zero in half precision.
    """
    with torch.autocast(real.device.type, enabled=False):
        pixels = real.detach().float().requires_grad_()
        logits = discriminator(pixels).mean(dim=(1, 2, 3)).sum()
        (gradient,) = torch.autograd.grad(logits, pixels, create_graph=True)
    return 0.5 * gradient.square().sum(dim=(1, 2, 3)).mean()
