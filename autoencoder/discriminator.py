"""PatchGAN's discriminator (Isola et al. 2017, arXiv 1611.07004): judges overlapping patches, not whole pictures.

Group normalisation in place of batch normalisation: a picture's verdict doesn't depend on its neighbours in the
batch, nor on how many processes the batch is spread over.
"""

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """(b, 3, H, W) → a map of logits (b, 1, h, w), one a patch; `layers` strided convolutions deep."""

    def __init__(self, channels: int = 32, layers: int = 2) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for _ in range(1, layers):
            parts += [
                nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
                nn.GroupNorm(min(32, channels // 4), 2 * channels),
                nn.LeakyReLU(0.2),
            ]
            channels *= 2
        self.body = nn.Sequential(*parts, nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.body(pixels)
