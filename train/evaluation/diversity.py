"""Diversity of a set of images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def vendi(features: Tensor) -> float:
    """Return the Vendi score (Friedman & Dieng 2023, arXiv 2210.02410) of features (n, d) with the cosine kernel.

    It is exp of the entropy of the eigenvalues of K / n, where K contains the cosines of all pairs: the effective
    number of different images, from 1 to n. K / n = X Xᵀ / n has the same non-zero eigenvalues as Xᵀ X / n. Returns nan
    if a feature isn't finite.
    """
    x = F.normalize(features.double().cpu(), dim=1)
    if not x.isfinite().all():
        return math.nan
    gram = x.T @ x if x.shape[1] < len(x) else x @ x.T
    eigenvalues = torch.linalg.eigvalsh(gram / len(x)).clamp_min(0)
    return float(torch.special.entr(eigenvalues).sum().exp())


def pairwise_distance(features: Tensor) -> tuple[float, float]:
    """Return the mean cosine distance between images of the same prompt, and its standard error over prompts.

    features: (prompts, seeds, d), with at least two seeds; the error is nan for one prompt. For unit vectors,
    Σ_{i≠j} x_i·x_j = ‖Σ x_i‖² − s.
    """
    x = F.normalize(features.double().cpu(), dim=2)
    s = x.shape[1]
    distances = 1 - (x.sum(1).square().sum(1) - s) / (s * (s - 1))  # (prompts,)
    error = float(distances.std()) / len(distances) ** 0.5 if len(distances) > 1 else math.nan
    return float(distances.mean()), error
