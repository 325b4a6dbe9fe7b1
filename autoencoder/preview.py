"""Fast previews by a linear map from latents to colours, one pixel per latent, without the decoder.

The mean colour at a latent's position is nearly a linear function of the latent and its eight neighbours, so it is
fitted by least squares on some images (benchmarks/trained_autoencoder.py measures the gain from the neighbours). The
fit is over posterior samples z = μ + σ ε, since diffusion learns to generate those. No samples are drawn: the normal
equations need only E[z zᵀ] = μ μᵀ + diag(σ²) and E[z] = μ. Channels of pure noise thus get no weight.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder.tiling import pad_to_multiple
from ldm.errors import RunError, UserError, one_line
from ldm.files import read_json
from ldm.float64 import double, float64_device

_FILE = "preview.json"  # next to the weights
_DELETE = "delete it, only previews need it"


class Colours(NamedTuple):
    """Linear map from normalised latents to colours, float32."""

    weight: Tensor  # (3, c, 3, 3), of a convolution
    bias: Tensor  # (3,)

    def __call__(self, latents: Tensor) -> Tensor:
        """Map normalised latents (b, c, h, w) to images (b, 3, h, w) in [−1, 1], float32, on the latents' device."""
        z = _padded(latents.float())
        return F.conv2d(z, self.weight.to(z), self.bias.to(z)).clamp(-1, 1)

    def save(self, folder: str | Path) -> None:
        """Write preview.json into an autoencoder's folder."""
        numbers = {name: value.tolist() for name, value in self._asdict().items()}
        (Path(folder) / _FILE).write_text(json.dumps(numbers) + "\n")

    @classmethod
    def load(cls, folder: str | Path, channels: int) -> "Colours | None":
        """Read an autoencoder's folder; None if it has no colours. Raises UserError for colours of other latents."""
        path = Path(folder) / _FILE
        if not path.is_file():
            return None
        try:
            numbers = read_json(path)
            colours = cls(*(torch.tensor(numbers[name], dtype=torch.float32) for name in cls._fields))
        except (OSError, ValueError, TypeError, LookupError, RuntimeError, OverflowError) as error:
            reason = one_line(f"{type(error).__name__}: {error}", 200)
            raise UserError(f"{str(path)!r} can't be read ({reason}): {_DELETE}") from None
        shapes = [tuple(value.shape) for value in colours]
        if shapes != [(3, channels, 3, 3), (3,)] or not all(value.isfinite().all() for value in colours):
            raise UserError(
                f"{str(path)!r} doesn't fit this autoencoder: its weight and bias have the shapes {shapes[0]} and "
                f"{shapes[1]}, but must be finite and have (3, {channels}, 3, 3) and (3,); {_DELETE}"
            )
        return colours


class Codec(Protocol):
    """Part of an `Autoencoder` that the fit needs."""

    latent_channels: int
    factor: int
    vae: Any

    def encode(self, pixels: Tensor) -> Any:
        """Return the posterior of images (b, 3, H, W): `mean` and `std`, (b, c, h, w)."""


@torch.no_grad()
def fit_colours(
    autoencoder: Codec, batches: Iterable[Tensor], *, reduce: Callable[[Tensor], Tensor] = lambda sums: sums
) -> Colours:
    """Fit the colours of an autoencoder's latents to batches of images (b, 3, H, W) in [−1, 1].

    reduce: function that sums a tensor over all processes. Every process must call this, with or without images.
    Raises UserError if no process has an image, RunError if latents aren't finite.
    """
    c, f = autoencoder.latent_channels, autoencoder.factor
    n = 9 * c
    # Σ [z, 1] [z, 1]ᵀ and next to it Σ [z, 1] yᵀ, for rows [z, 1], (n + 1,), and colours y, (3,).
    sums = torch.zeros(n + 1, n + 1 + 3, dtype=torch.float64, device=float64_device(autoencoder.vae.device))
    for pixels in batches:
        q = autoencoder.encode(pixels)
        y = F.avg_pool2d(double(pad_to_multiple(pixels, f)).to(sums.device), f).flatten(2)  # (b, 3, h w)
        mean, variance = (F.unfold(_padded(double(x)), 3) for x in (q.mean, q.std**2))  # (b, n, h w)
        rows = torch.cat([mean, torch.ones_like(mean[:, :1]), y], 1).movedim(1, 0).flatten(1)  # (n + 1 + 3, b h w)
        sums += rows[: n + 1] @ rows.T
        sums[:n, :n] += variance.sum((0, 2)).diag()
    sums = reduce(sums).cpu()
    if not sums[n, n]:
        raise UserError("no images to fit preview colours to: at least one is needed")
    if not sums.isfinite().all():
        raise RunError("the autoencoder's latents aren't finite, so no preview colours can be fitted to them")
    # The pseudo-inverse also handles images that all have one colour, when the equations are singular.
    both = (torch.linalg.pinv(sums[:, : n + 1], hermitian=True) @ sums[:, n + 1 :]).T.float()  # (3, n + 1)
    return Colours(both[:, :n].reshape(3, c, 3, 3), both[:, n].contiguous())


def _padded(x: Tensor) -> Tensor:
    """Add a border in which the last row and column are repeated."""
    return F.pad(x, (1, 1, 1, 1), mode="replicate")
