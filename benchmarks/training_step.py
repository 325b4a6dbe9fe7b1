"""Compare a training step of stage 2 with diffusers' train_text_to_image.py, in one run, on the same cached inputs.

`ldm` is the step of train_ldm.py: loss, clipping, skipping of non-finite steps, optimizer, running average. The others
are diffusers' loop, rewritten here. `diffusers script` has the script's defaults: separate AdamW kernels, a loss read
from the device in each step, and its EMA. `diffusers by hand` is optimized as a careful user would do it: fused AdamW,
foreach EMA, and nothing is read from the device. No variant encodes images or captions: all use cached latents and text
features. `+ cl` is channels_last, `+ compile` torch.compile.

    python benchmarks/training_step.py --shape sd15 --batch-size 32 --precision bf16
    python benchmarks/training_step.py --shape demo --batch-size 64 --precision fp32 bf16

Variants run one after the other; medians are reported, in ms of process time (CPU) or device time. Each result is
written to --out at once, as JSON.
"""

import argparse
import contextlib
import copy
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.training_utils import EMAModel
from torch import Tensor

from autoencoder.model import Autoencoder, build_autoencoder
from conditioning.clip import ClipTextEncoder
from conditioning.contrastive import build_clip
from conditioning.tokenizer import train_tokenizer
from ldm.networks.unet import UNet
from train.config.ldm import LdmConfig, UnetConfig
from train.config.optimizer import OptimizerConfig
from train.config.run import Precision
from train.data.batches.records import CachedBatch, DrawnNoise
from train.engine.device import open_accelerator
from train.engine.precision import autocast
from train.engine.provenance import versions
from train.engine.run import open_run
from train.engine.trainer import Trainer
from train.stages.ldm import LdmStage
from train.stages.ldm_init import Components

SHAPES = {  # UNet, side of the latents, tokens, width of the text features
    "demo": (UnetConfig(channels=(64, 128), attention=(False, True), heads=(4, 4)), 8, 16, 96),
    "sd15": (
        UnetConfig(channels=(320, 640, 1280, 1280), layers=2, attention=(True, True, True, False), heads=(8, 8, 8, 8)),
        64,
        77,
        768,
    ),
    "sd2": (
        UnetConfig(
            channels=(320, 640, 1280, 1280), layers=2, attention=(True, True, True, False), heads=(5, 10, 20, 20)
        ),
        64,
        77,
        1024,
    ),
}
PROMPT = "a large red circle on a white background"
Step = Callable[[], object]


def network(shape: str, device: torch.device) -> UNet2DConditionModel:
    unet, side, _, width = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        return unet.build(latent_channels=4, latent_size=side, text_width=width).train()


def text_encoder(shape: str, layers: int, heads: int) -> ClipTextEncoder:
    """Return a text encoder with random weights, whose features have the shape's width and tokens."""
    _, _, tokens, width = SHAPES[shape]
    tokenizer = train_tokenizer([PROMPT], 600, tokens)
    clip = build_clip(
        tokenizer,
        text_width=width,
        text_layers=layers,
        text_heads=heads,
        vision_width=16,
        vision_layers=1,
        vision_heads=2,
        patch_size=8,
        image_size=16,
        projection_dim=16,
    )
    return ClipTextEncoder(clip.text_model, tokenizer)


def batch_of(shape: str, b: int, device: torch.device) -> CachedBatch:
    _, side, tokens, width = SHAPES[shape]
    g = torch.Generator().manual_seed(0)
    mean, posterior_noise, noise = (torch.randn(b, 4, side, side, generator=g) for _ in range(3))
    drawn = DrawnNoise(torch.rand(b, generator=g), noise, posterior_noise, torch.zeros(b, dtype=torch.bool))
    condition, place = torch.randn(b, tokens, width, generator=g), torch.arange(b)
    batch = CachedBatch(
        position=place, index=place, mean=mean, std=torch.full_like(mean, 0.1), condition=condition, drawn=drawn
    )
    return batch.to(device)


def ldm_step(shape: str, b: int, precision: Precision, device: torch.device, how: set[str]) -> Step:
    """Return ldm's training step."""
    out = tempfile.mkdtemp()
    config = LdmConfig(
        out=out,
        batch_size=b,
        precision=precision,
        trackers=(),
        unet=SHAPES[shape][0],
        optimizer=OptimizerConfig(warmup=0),
        ema_decay=0.9999,
    )
    autoencoder = Autoencoder(build_autoencoder(channels=(32,), layers=1, latent_channels=4))
    unet = network(shape, device)
    if "cl" in how:
        unet.to(memory_format=torch.channels_last)
    components = Components(
        UNet.wrap(unet, 4), autoencoder, text_encoder(shape, 1, 2).to(device), config.build_objective(), {}, "sdpa", ()
    )
    run = contextlib.ExitStack().enter_context(open_run(config, open_accelerator(config), {}))
    stage = LdmStage(run, components, None, None, None)  # type: ignore[arg-type]  # its batches are made here
    if "compile" in how:
        unet.compile()
    trainer, batch, count = Trainer(run, stage), batch_of(shape, b, device), 0

    def step() -> None:
        nonlocal count
        trainer.step(count, [batch])
        count += 1

    return step


def diffusers_step(shape: str, b: int, precision: Precision, device: torch.device, how: set[str]) -> Step:
    """Return the step of diffusers' loop; with `hand` in how, optimized by hand."""
    unet, by_hand = network(shape, device), "hand" in how
    if "cl" in how:
        unet.to(memory_format=torch.channels_last)
    unet.set_attn_processor(AttnProcessor2_0())
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-4, weight_decay=1e-2, fused=True if by_hand else None)
    average = copy.deepcopy(unet).requires_grad_(False) if by_hand else EMAModel(unet.parameters())
    if not by_hand:
        average.to(device)
    if "compile" in how:
        unet.compile()
    batch, weights = batch_of(shape, b, device), list[Tensor](unet.parameters())
    averages = list[Tensor](average.parameters()) if by_hand else []
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step() -> None:
        x0 = batch.mean + batch.std * torch.randn_like(batch.mean)
        noise = torch.randn_like(x0)
        timesteps = torch.randint(0, 1000, (b,), device=device)
        noisy = scheduler.add_noise(x0, noise, timesteps)
        with autocast(device, precision):
            output = unet(noisy, timesteps, batch.condition, return_dict=False)[0]
            loss = F.mse_loss(output.float(), noise)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if by_hand:
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1e-4)
        else:
            average.step(unet.parameters())
            loss.item()

    return step


VARIANTS: dict[str, tuple[Callable[..., Step], set[str]]] = {
    "ldm": (ldm_step, set()),
    "diffusers script": (diffusers_step, set()),
    "diffusers by hand": (diffusers_step, {"hand"}),
    "ldm + cl": (ldm_step, {"cl"}),
    "diffusers by hand + cl": (diffusers_step, {"hand", "cl"}),
    "ldm + compile": (ldm_step, {"compile"}),
    "diffusers by hand + compile": (diffusers_step, {"hand", "compile"}),
    "ldm + cl + compile": (ldm_step, {"cl", "compile"}),
    "diffusers by hand + cl + compile": (diffusers_step, {"hand", "cl", "compile"}),
}


def milliseconds(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - started)
    started = time.process_time()
    step()
    return 1e3 * (time.process_time() - started) / torch.get_num_threads()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the TFLOP/s of a large matrix product on random data, as a reference for the other results."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = [milliseconds(lambda: a @ b, device) for _ in range(8)]
    return 2 * n**3 / statistics.median(times[2:]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="demo")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16", "fp16"], default=["bf16"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=600, help="start no further variant after so many")
    parser.add_argument("--out", type=Path, default=Path("runs/training_step.json"))
    o = parser.parse_args()
    device, started = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.perf_counter()
    rows: list[dict[str, object]] = [
        {
            "versions": versions(),
            "shape": o.shape,
            "batch size": o.batch_size,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "TFLOP/s fp32, bf16": [matrix_rate(device, t) for t in (torch.float32, torch.bfloat16)],
        }
    ]
    print(rows[0], flush=True)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    for precision in o.precision:
        for name in o.variants:
            if time.perf_counter() - started > o.seconds:
                print(f"{precision} {name}: no time left")
                continue
            row: dict[str, object] = {"precision": precision, "variant": name}
            try:
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                make, how = VARIANTS[name]
                started = time.perf_counter()
                step = make(o.shape, o.batch_size, precision, device, how)
                milliseconds(step, device)
                row["first step, s"] = round(time.perf_counter() - started, 1)
                times = [milliseconds(step, device) for _ in range(o.steps + 2)][2:]
                median = statistics.median(times)
                row |= {
                    "ms": round(median, 2),
                    "from": round(min(times), 2),
                    "to": round(max(times), 2),
                    "images/s": round(1e3 * o.batch_size / median, 2),
                }
                if device.type == "cuda":
                    row["GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                del step
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            gc.collect()
            torch._dynamo.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            rows.append(row)
            o.out.write_text(json.dumps(rows, indent=1))
            print(row, flush=True)


if __name__ == "__main__":
    main()
