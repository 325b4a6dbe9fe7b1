"""Measure what three choices of the implementation are worth on this machine, each against the obvious alternative.

    python benchmarks/choices.py

- Attention's backward pass in fp32 inside a bf16 step on a CPU (ldm/networks/attention.py).
- Muon, which orthogonalises matrices of one shape together (train/engine/optim.py), and its share of a step.
- Positioned reads of cached rows, not memory maps (docs/adr/0005-read-caches-without-memory-maps.md).

The variants of each alternate; medians of the times are printed. Writes 0.5 GB to the folder of temporary files. About
a minute on one core.
"""

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from train.commands.main import command
from train.config.ldm import LdmConfig
from train.config.load import parse
from train.config.optimizer import OptimizerConfig
from train.data.store.shards import Shards
from train.engine.orthogonal import orthogonalised


def show(what: str, variants: dict[str, Callable[[], object]], rounds: int = 9) -> None:
    """Print the median time of each variant. They alternate; the first round isn't counted."""
    times = defaultdict(list)
    for k in range(rounds + 1):
        for name, call in variants.items():
            started = time.perf_counter()
            call()
            if k:
                times[name].append(1000 * (time.perf_counter() - started))
    print(what, *(f"  {name}: {statistics.median(ms):.1f} ms" for name, ms in times.items()), sep="\n", flush=True)


def attend(dtype: torch.dtype) -> Callable[[], None]:
    """Return an attention with its backward pass: batch 64, 4 heads of 32, 64 tokens."""
    q, k, v = (torch.randn(64, 4, 64, 32, dtype=dtype, requires_grad=True) for _ in range(3))
    return lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()


def optimizers(unet: nn.Module) -> dict[str, Callable[[], object]]:
    """Return a training step without its optimizer, and the steps of both optimizers."""
    x, t, text = torch.randn(64, 4, 8, 8), torch.randint(1000, (64,)), torch.randn(64, 16, 96)

    def gradients() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            unet(x, t, text).sample.float().square().mean().backward()

    gradients()
    found = [(p, p.grad) for p in unet.parameters()]
    adamw, muon = OptimizerConfig(kind="adamw").build(unet), OptimizerConfig(kind="muon").build(unet)

    def update(optimizer: torch.optim.Optimizer) -> None:
        for p, gradient in found:
            p.grad = gradient
        optimizer.step()

    return {"forward and backward pass": gradients, "AdamW": lambda: update(adamw), "Muon": lambda: update(muon)}


def orthogonalisations(unet: nn.Module) -> dict[str, Callable[[], object]]:
    matrices = sorted((p.detach().flatten(1) for p in unet.parameters() if p.ndim > 1), key=lambda m: m.shape)
    stacks = [torch.stack(list(same)) for _, same in groupby(matrices, lambda m: m.shape)]
    return {
        "matrices of one shape together": lambda: orthogonalised(stacks, "jordan"),
        "one by one": lambda: orthogonalised([m[None] for m in matrices], "jordan"),
        "with Polar Express": lambda: orthogonalised(stacks, "polar_express"),
    }


def reads(folder: str, n: int = 4096) -> dict[str, Callable[[], object]]:
    """Return two ways to gather 64 random rows at Stable Diffusion's sizes (77 × 768, fp16)."""
    path, rng = Path(folder) / "rows.npy", np.random.default_rng(0)
    np.save(path, np.ones((n, 77, 768), np.float16))
    shards = Shards([path], np.zeros(n, np.int32), np.arange(n, dtype=np.int32), (77, 768), "float16")
    return {
        "positioned reads": lambda: shards.gather(rng.integers(n, size=64)),
        "a memory map": lambda: torch.from_numpy(np.load(path, mmap_mode="r")[rng.integers(n, size=64)]).float(),
    }


@command
def main() -> None:
    torch.manual_seed(0)
    config = parse(LdmConfig, ["shapes/ldm"])
    unet = config.unet.build(latent_channels=4, latent_size=8, text_width=96)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    show("Attention, forward and backward:", {name: attend(getattr(torch, name)) for name in ("bfloat16", "float32")})
    show("A step of the demo's UNet, batch 64, bf16:", optimizers(unet))
    show("Orthogonalising the demo's UNet:", orthogonalisations(unet))
    with tempfile.TemporaryDirectory() as folder:
        show("64 rows of a cache:", reads(folder))


if __name__ == "__main__":
    main()
