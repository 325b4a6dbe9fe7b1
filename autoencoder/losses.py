"""The autoencoder's losses, each a small object; every term is a mean over the batch.

Conventions, stated once: the reconstruction error is a mean over picture elements; the KL divergence is summed over
a latent and divided by the number of picture elements (3·H·W), so that its weight means what it means in Rombach
et al. 2022 (arXiv 2112.10752), where both are sums; perceptual and adversarial terms are means over their maps.
"""

from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel

from ldm.errors import UserError

ReconstructionKind = Literal["l1", "l2"]


def reconstruction_loss(kind: ReconstructionKind, made: Tensor, pixels: Tensor) -> Tensor:
    """Mean |made − pixels| or (made − pixels)², in fp32."""
    match kind:
        case "l1":
            return F.l1_loss(made.float(), pixels.float())
        case "l2":
            return F.mse_loss(made.float(), pixels.float())
        case _:
            assert_never(kind)


def kl_loss(mean: Tensor, logvar: Tensor, elements: int) -> Tensor:
    """KL(N(mean, exp logvar) ‖ N(0, 1)) in nats, summed over a latent, a share of `elements` picture elements."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean() / elements


class ClipPerceptual(nn.Module):
    """Distance of the unit-normalised features of a frozen CLIP image tower, at every layer (after Zhang et al. 2018).

    The tower gets no gradient; the pictures do. Input (b, 3, H, W) in [−1, 1], resized to the tower's side.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, folder: str) -> None:
        super().__init__()
        try:
            self.tower = CLIPVisionModel.from_pretrained(folder, use_safetensors=True).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise UserError(f"perceptual.model {folder!r} is no CLIP with an image tower: {error}") from None
        self.register_buffer("mean", torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1))

    def features(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Hidden states of every layer, (b, tokens, width) each."""
        side = self.tower.config.image_size
        if pixels.shape[-1] != side or pixels.shape[-2] != side:
            pixels = F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
        return self.tower((pixels / 2 + 0.5 - self.mean) / self.std, output_hidden_states=True).hidden_states

    def forward(self, made: Tensor, pixels: Tensor) -> Tensor:
        """Mean over layers of the squared distance of normalised features; a scalar."""
        with torch.no_grad():
            wanted = self.features(pixels)
        pairs = zip(self.features(made), wanted, strict=True)
        each = [
            (F.normalize(a.float(), dim=-1) - F.normalize(b.float(), dim=-1)).square().sum(-1).mean() for a, b in pairs
        ]
        return torch.stack(each).mean()


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator over its patches (Lim & Ye 2017, arXiv 1705.02894)."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """The generator's half of the hinge game: −E[D(fake)]."""
    return -fake.float().mean()
