"""Orthogonalisation of matrices in bf16: USVᵀ becomes nearly UVᵀ, by odd polynomials of fifth degree.

A step maps X to (a + b G + c G²) X, where G = XXᵀ. Each singular value s then becomes a s + b s³ + c s⁵.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import assert_never

import torch
from torch import Tensor

from train.config.optimizer import NewtonSchulz

Quintic = tuple[float, float, float]
"""Coefficients a, b, c of a step."""
POLAR_EXPRESS: tuple[Quintic, ...] = (
    (8.013236, -22.925757, 16.599415),
    (3.600580, -2.641875, 0.510505),
    (2.661300, -1.977155, 0.452616),
)
"""Steps of Polar Express for singular values between 0.01 and 1, which end between 0.7 and 1.3. Each is the best
polynomial for the interval that the steps before it leave (Amsel et al. 2025, arXiv 2505.16932, sec. 3.1). All but the
last are those for an interval 1 % wider, because of rounding (their sec. 3.4)."""
_MARGIN = 1.02  # for rounding to bf16
_SMALLEST = 1e-7  # norm below which a matrix is not scaled up further
_WIDE = 2  # from this ratio of the sides on, two steps with one Gram matrix cost less than two with their own


def orthogonalised(stacks: Sequence[Tensor], iteration: NewtonSchulz) -> list[Tensor]:
    """Orthogonalise stacks of matrices (k, rows, columns) of any scale."""
    match iteration:
        case "jordan":
            return [orthogonal(stack) for stack in stacks]
        case "polar_express":
            return polar_express(stacks)
        case _:
            assert_never(iteration)


def orthogonal(matrices: Tensor) -> Tensor:
    """Orthogonalise matrices (k, rows, columns) of any scale: each USVᵀ becomes nearly UVᵀ.

    The singular values end between about 0.7 and 1.2. Uses five Newton-Schulz steps in bf16 with the quintic of Jordan
    et al. 2024, which grows small singular values fastest.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_SMALLEST)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)


def polar_express(stacks: Sequence[Tensor], steps: Sequence[Quintic] = POLAR_EXPRESS) -> list[Tensor]:
    """Orthogonalise stacks of matrices (k, rows, columns) of any scale with Polar Express, in bf16.

    Three steps suffice, because the matrices are first divided by a close bound of their largest singular value, and
    not by their Frobenius norm. Most products are those of small Gram matrices G, so all matrices whose smaller sides
    are equal are computed together. For wide and tall ones, two steps are combined into one polynomial of G. More than
    two aren't, since rounding errors of G grow with the polynomial's degree.
    """
    result = [stack.bfloat16() for stack in stacks]
    together = defaultdict(list)
    for i, x in enumerate(result):
        side, other = sorted(x.shape[1:])
        together[side, other >= _WIDE * side].append(i)
    for (_, wide), members in together.items():
        count = 2 if wide else 1
        for first in range(0, len(steps), count):
            gram = torch.cat([_gram(result[i]) for i in members])  # (k, side, side)
            p = _polynomial(gram, steps[first : first + count], normalise=first == 0)
            parts = p.split([len(result[i]) for i in members])
            for i, part in zip(members, parts, strict=True):
                result[i] = result[i] @ part if _is_tall(result[i]) else part @ result[i]
    return result


def _is_tall(x: Tensor) -> bool:
    return x.shape[1] > x.shape[2]


def _gram(x: Tensor) -> Tensor:
    return x.mT @ x if _is_tall(x) else x @ x.mT


def _polynomial(gram: Tensor, steps: Iterable[Quintic], *, normalise: bool) -> Tensor:
    """Return the product of the steps' polynomials in Gram matrices (k, n, n).

    normalise: divide the matrices before the first step by a bound of their largest singular value: the root of
    ‖G²‖_F^½, which is the 8-norm of the singular values.
    """
    scale, product = None, None
    if normalise:
        trace = gram.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float32).clamp(min=_SMALLEST**2)[:, None, None]
        gram = gram.div_(trace)  # so that G² neither overflows nor underflows
        bound = torch.linalg.matrix_norm(gram @ gram, dtype=torch.float32, keepdim=True).sqrt()
        bound = bound.clamp(min=_SMALLEST) * _MARGIN**2
        gram, scale = gram.div_(bound), (trace * bound).rsqrt()
    for a, b, c in steps:
        if product is not None:
            gram = product @ gram @ product  # the Gram matrix after the steps so far
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        product = p if product is None else p @ product
    assert product is not None
    return product if scale is None else product.mul_(scale)
