"""Comparison of training batches."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from support.draws import draw
from support.images import smooth_pixels
from train.data.batches.records import Record
from train.stages.vae_step import VaeBatch


def vae_batch(count: int = 4) -> VaeBatch:
    """Return a batch of stage 1, with noise for latents of factor 2."""
    noise = draw(count, 4, 16, 16, seed=1, dtype=torch.float32)
    return VaeBatch(smooth_pixels(count), noise, adversarial=True)


def flat(batch: Any) -> dict[str, Any]:
    """Return a batch's fields by name, including those of the records inside it."""
    if isinstance(batch, dict):
        return batch
    found = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {k: v for k, v in found.items() if not isinstance(v, Record)} | {
        f"{name}.{k}": v for name, part in found.items() if isinstance(part, Record) for k, v in flat(part).items()
    }


def joined(parts: Sequence[Any]) -> dict[str, Any]:
    """Return the fields of several batches, concatenated."""
    fields = [{k: v for k, v in flat(part).items() if v is not None} for part in parts]
    return {
        k: torch.cat([f[k] for f in fields]) if torch.is_tensor(fields[0][k]) else [x for f in fields for x in f[k]]
        for k in fields[0]
    }


def same(a: Any, b: Any) -> bool:
    """Return whether two batches are equal bit for bit."""
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)
