"""The autoencoder's losses. All of them follow these conventions:

- Every loss is a mean over the batch's images, so that splitting a batch changes nothing.
- The reconstruction error is a mean over image elements, 3·H·W of them, with images in [−1, 1].
- The perceptual distance is one number per image.
- The KL divergence is a sum over a latent's elements, in nats, divided by the number of image elements.
- The adversarial losses are means over an image's patches (autoencoder/discriminator.py).

Rombach et al. 2022 (arXiv 2112.10752) sum reconstruction, perceptual distance and KL over an image's elements instead,
and weigh the adversarial loss by gradients (`adaptive_weight`). Divided by 3·H·W, this gives the losses here, so their
weights can be used: KL 1e-6 and adversarial 0.5. (Their limit on the adaptive weight, 1e4, is for weights 3·H·W times
as large.)
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder import ReconstructionKind
from ldm.float64 import double

_HUBER = 0.1  # error at which huber changes from squared to absolute: 13 of 255 grey levels
LARGEST_WEIGHT = 1e4  # limit on the adaptive weight if the adversarial loss has nearly no gradient


def reconstruction_loss(kind: ReconstructionKind, decoded: Tensor, pixels: Tensor) -> Tensor:
    """Return the mean of |d|, d² or Huber(d) / 0.1 for d = decoded − pixels.

    Huber's threshold is 0.1, so above it the last one is |d| − 0.05.
    """
    match kind:
        case "l1":
            return F.l1_loss(decoded.float(), pixels.float())
        case "l2":
            return F.mse_loss(decoded.float(), pixels.float())
        case "huber":
            return F.smooth_l1_loss(decoded.float(), pixels.float(), beta=_HUBER)
        case _:
            assert_never(kind)


def kl_loss(mean: Tensor, logvar: Tensor, elements: int) -> Tensor:
    """Return KL(N(mean, exp logvar) ‖ N(0, 1)) in nats, summed over a latent and divided by `elements`."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean() / elements


def likelihood_loss(distance: Tensor, logvar: Tensor) -> Tensor:
    """Return distance / exp(logvar) + logvar, which weighs a distance by a learned scale.

    For a Laplace distribution with scale exp(logvar), it is −log p of the absolute error up to a constant. The name and
    the formula are from Rombach et al.'s code.
    """
    return distance * torch.exp(-logvar) + logvar


class Known(NamedTuple):
    """A loss and its gradient with respect to the reconstructions, computed before the autoencoder's backward pass."""

    value: Tensor
    """Loss, a scalar, float32."""
    gradient: Tensor
    """Gradient of the loss with respect to the reconstructions, (b, 3, H, W), float32."""

    def attach(self, decoded: Tensor) -> Tensor:
        """Return the value as a function of the reconstructions (b, 3, H, W), so that autograd uses the gradient."""
        return _Attach.apply(decoded.float(), self.value, self.gradient)


def known(loss: Callable[[Tensor], Tensor], decoded: Tensor) -> Known:
    """Compute a loss of images and its gradient, and free the graph.

    The gradient is used both for `adaptive_weight` and for the backward pass, so that the perceptual network and the
    discriminator run only once.
    """
    leaf, scale = decoded.detach().float().requires_grad_(), underflow_scale(decoded)
    with torch.enable_grad():
        value = loss(leaf).float()
        (gradient,) = torch.autograd.grad(value * scale, leaf)
    return Known(value.detach(), gradient / scale)


def underflow_scale(images: Tensor) -> float:
    """Return the power of two that scales gradients of a loss of these images while they are computed in fp16.

    For n elements, an element's gradient is about 1/n, which fp16 rounds to few bits or to 0. A weight's gradient is a
    sum over elements, about 1. Times √n, both are far from the limits of fp16. In fp32 and bf16, a power of two changes
    no digit.
    """
    return 2.0 ** math.ceil(math.log2(images.numel()) / 2)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decoded: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return outer[0] * gradient, None, None


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, limit: float = LARGEST_WEIGHT) -> Tensor:
    """Return the adversarial loss's weight ‖∇ reconstruction‖ / ‖∇ adversarial‖ at one layer's weights, in [0, limit].

    Esser et al. 2021 (arXiv 2012.09841), eq. 7. The gradients are those of the whole batch, over all processes. With
    this weight, the adversarial loss changes the layer as much as the reconstruction does. The result is NaN if a
    gradient isn't finite, so that the step is skipped.
    """
    base, other = (torch.linalg.vector_norm(double(g)) for g in (reconstruction, adversarial))  # no overflow
    weight = torch.nan_to_num(base / other, nan=0.0, posinf=limit).clamp(0, limit)  # 0 / 0 gives 0
    weight = torch.where(torch.isfinite(base) & torch.isfinite(other), weight, torch.nan)
    return weight.float().detach().to(reconstruction.device)
