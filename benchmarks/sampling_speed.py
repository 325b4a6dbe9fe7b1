"""Compare the sampling speed with diffusers in one run: same weights, sampler, steps and guidance.

Measures a whole call (text, sampling, decoding), the loop alone, eager and compiled, and the autoencoder's decoder.

    python benchmarks/sampling_speed.py --shape sd15 --precision bf16 --batch 1 16
    python benchmarks/sampling_speed.py --shape demo --precision fp32

Calls alternate between the two pipelines; medians are reported. Each result is written to --out at once, as JSON.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from training_step import PROMPT, SHAPES, matrix_rate, milliseconds, network, text_encoder

from autoencoder.model import Autoencoder, build_autoencoder
from ldm.formats.scheduler_config import Process
from ldm.pipeline import LatentDiffusionPipeline, OutputType
from ldm.schedule import Schedule
from train.engine.provenance import versions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pipelines(
    shape: str, device: torch.device, dtype: torch.dtype
) -> tuple[LatentDiffusionPipeline, StableDiffusionPipeline]:
    """Return ldm's pipeline and diffusers', each with its own copy of the same networks."""
    sd = shape != "demo"
    torch.manual_seed(0)
    encoder = text_encoder(shape, 12 if sd else 3, SHAPES[shape][3] // 64 if sd else 4)
    vae: AutoencoderKL = build_autoencoder(
        channels=(128, 256, 512, 512) if sd else (32, 64, 64),
        layers=2 if sd else 1,
        latent_channels=4,
        groups=32 if sd else 16,
        attention=sd,
    )
    unet = network(shape, device).eval().requires_grad_(False)
    for parameter in unet.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.02)
    process = Process(
        schedule=Schedule.build("scaled_linear"), target="eps", spacing="trailing", variance="fixed_small"
    )
    scheduler = DPMSolverMultistepScheduler.from_config(process.to_diffusers().config)
    other = copy.deepcopy(unet)
    other.set_attn_processor(AttnProcessor2_0())
    stock = StableDiffusionPipeline(
        copy.deepcopy(vae),
        copy.deepcopy(encoder.model),
        encoder.tokenizer,
        other,
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    ).to(device, dtype)
    stock.set_progress_bar_config(disable=True)
    ours = LatentDiffusionPipeline(unet, Autoencoder(vae), encoder, process)
    return ours.to(device, dtype=dtype), stock


def measure(calls: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of each call. Calls alternate; the first two of each warm up (and compile)."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(repeats + 2):
        for name, call in calls.items():
            took = milliseconds(call, device)
            if k >= 2:
                times[name].append(took)
    return {name: round(statistics.median(t), 2) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="demo")
    parser.add_argument("--precision", choices=list(DTYPES), default="bf16")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", nargs="*", choices=["ldm", "diffusers"], default=["ldm", "diffusers"])
    parser.add_argument("--seconds", type=float, default=600, help="compile nothing after so many")
    parser.add_argument("--out", type=Path, default=Path("runs/sampling_speed.json"))
    o = parser.parse_args()
    device, started = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.perf_counter()
    ours, stock = pipelines(o.shape, device, DTYPES[o.precision])
    rows: list[dict[str, object]] = [
        {
            "versions": versions(),
            "options": {k: str(v) for k, v in vars(o).items()},
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "TFLOP/s": matrix_rate(device, DTYPES[o.precision]),
        }
    ]
    o.out.parent.mkdir(parents=True, exist_ok=True)

    def note(row: dict[str, object]) -> None:
        rows.append(row)
        o.out.write_text(json.dumps(rows, indent=1))
        print(row, flush=True)

    print(rows[0], flush=True)
    how = {"num_inference_steps": o.steps, "guidance_scale": 5.0}

    def calls(b: int, output_type: OutputType) -> dict[str, Callable[[], object]]:
        return {
            "ldm": lambda: ours(
                [PROMPT] * b, output_type=output_type, generator=torch.Generator().manual_seed(0), **how
            ),
            "diffusers": lambda: stock(
                [PROMPT] * b, output_type=output_type, generator=torch.Generator().manual_seed(0), **how
            ),
        }

    def row(name: str, b: int, output_type: OutputType, chosen: list[str]) -> None:
        try:
            ms = measure({k: v for k, v in calls(b, output_type).items() if k in chosen}, device, o.repeats)
            ratio = {"diffusers / ldm": round(ms["diffusers"] / ms["ldm"], 3)} if len(ms) == 2 else {}
            rates = {f"{k} it/s": round(1e3 * o.steps / v, 1) for k, v in ms.items()}
            note({"what": name, "batch": b, "ms": ms, **rates, **ratio})
        except Exception as error:
            note({"what": name, "batch": b, "error": f"{type(error).__name__}: {error}"[:300]})

    for b in o.batch:
        row("sampling, eager", b, "latent", ["ldm", "diffusers"])
        row("whole call, eager", b, "np" if device.type == "cpu" else "pt", ["ldm", "diffusers"])
    side = SHAPES[o.shape][1]
    latents = torch.randn(1, 4, side, side, device=device)
    decode: dict[str, Callable[[], object]] = {
        "ldm": lambda: ours.decode(latents),
        "diffusers": lambda: stock.vae.decode(latents.to(stock.vae.dtype) / 0.18215),
    }
    with torch.no_grad():
        note({"what": "decode, eager", "ms": measure(decode, device, o.repeats)})
        for pipe_vae in (ours.autoencoder.vae, stock.vae):
            torch.nn.Module.to(pipe_vae, memory_format=torch.channels_last)
        note({"what": "decode, channels_last", "ms": measure(decode, device, o.repeats)})
    for name, unet in (("ldm", ours.unet), ("diffusers", stock.unet)):
        if name not in o.compile or time.perf_counter() - started > o.seconds:
            continue
        torch.nn.Module.to(unet, memory_format=torch.channels_last)
        row(f"sampling, {name} channels_last", o.batch[0], "latent", [name])
        started = time.perf_counter()
        unet.compile(mode="reduce-overhead" if device.type == "cuda" else None, fullgraph=True)
        row(f"sampling, {name} channels_last, compiled", o.batch[0], "latent", [name])
        note({"what": f"compiling {name} and measuring", "seconds": round(time.perf_counter() - started, 1)})


if __name__ == "__main__":
    main()
