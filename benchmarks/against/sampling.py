"""A process that generates, decodes or encodes images with one pipeline, for `peers.py`.

python benchmarks/against/sampling.py '{"who": "ldm", "how": "", …}'
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from against.served import open_server

PROMPT = "a large red circle on a white background"
SCALE = 5.0  # of guidance


class Built(NamedTuple):
    """A pipeline's call, and the seconds that its optimisation took before the first call."""

    call: Callable[[], Any]
    prepared: float = 0.0


def latents(spec: dict[str, Any]) -> Tensor:
    """Return the same initial noise in every process and precision."""
    side, generator = spec["side"], torch.Generator().manual_seed(0)
    return torch.randn(spec["batch"], 4, side, side, generator=generator).bfloat16().float()


def pixels(spec: dict[str, Any]) -> Tensor:
    side, generator = spec["side"] * spec["factor"], torch.Generator().manual_seed(0)
    return torch.rand(spec["batch"], 3, side, side, generator=generator).bfloat16().float() * 2 - 1


def ours(spec: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Built:
    """Return the call of ldm's pipeline. `how`: the optimisation, empty for none."""
    from ldm.pipeline import LatentDiffusionPipeline

    pipe = LatentDiffusionPipeline.from_pretrained(spec["folder"]).to(device, dtype=dtype)
    started = time.perf_counter()
    if spec["how"] in ("compile", "openvino"):
        pipe.optimize(spec["how"])
    prepared = time.perf_counter() - started
    if spec["what"] == "decode":
        return Built(partial(pipe.decode, latents(spec).to(device)), prepared)
    if spec["what"] == "encode":
        x = pixels(spec).to(device)
        return Built(lambda: pipe.autoencoder.encode(x).mean, prepared)
    how: dict[str, Any] = {"guidance_interval": (0.5, 4.0)} if spec["how"] == "interval" else {}
    noise, prompts = latents(spec), [PROMPT] * spec["batch"]
    kind: Literal["np", "pt"] = "np" if device.type == "cpu" else "pt"
    size = spec["side"] * spec["factor"]
    whole = partial(pipe, prompts, latents=noise, num_inference_steps=spec["steps"], guidance_scale=SCALE)
    return Built(lambda: whole(height=size, width=size, output_type=kind, **how).images, prepared)


def diffusers(spec: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Built:
    """Return the call of diffusers' pipeline. `how`: the optimisations of its documentation, empty for none."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(spec["folder"], torch_dtype=dtype).to(device)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    unet, vae, words = pipe.unet, pipe.vae, spec["how"].split()
    if "cudnn" in words:  # set_attention_backend has no effect on this UNet's attention
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
    if "fused" in words:
        pipe.fuse_qkv_projections()
    if "channels_last" in words:
        unet.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)
    mode = ("max-autotune" if "autotuned" in words else "reduce-overhead") if device.type == "cuda" else None
    if "regional" in words:
        unet.compile_repeated_blocks(fullgraph=True)
    if "compiled" in words:
        unet.compile(mode=mode, fullgraph=True)
        vae.decoder.compile(mode=mode, fullgraph=True)
        vae.encoder.compile(mode=mode, fullgraph=True)
    if spec["what"] == "decode":
        z = latents(spec).to(device, dtype)
        return Built(
            lambda: vae.decode(z / vae.config.scaling_factor, return_dict=False)[0].div(2).add(0.5).clamp(0, 1)
        )
    if spec["what"] == "encode":
        x, scaling = pixels(spec).to(device, dtype), vae.config.scaling_factor
        return Built(lambda: vae.encode(x).latent_dist.mean * scaling)
    return Built(_stock_call(pipe, latents(spec).to(device, dtype), spec, "np" if device.type == "cpu" else "pt"))


def optimum(spec: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Built:
    """Return the call of OpenVINO's pipeline, as optimum makes it, with a static shape."""
    from diffusers import DPMSolverMultistepScheduler
    from optimum.intel import OVStableDiffusionPipeline

    started, exported = time.perf_counter(), Path(spec["exported"])
    config = {
        "INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16",
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
    }
    if not exported.exists():
        pipe = OVStableDiffusionPipeline.from_pretrained(spec["folder"], export=True, compile=False, load_in_8bit=False)
        pipe.save_pretrained(exported)
    pipe = OVStableDiffusionPipeline.from_pretrained(exported, compile=False, ov_config=config)
    size = spec["side"] * spec["factor"]
    pipe.reshape(batch_size=spec["batch"], height=size, width=size, num_images_per_prompt=1)
    pipe.compile()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return Built(_stock_call(pipe, latents(spec), spec, "np"), time.perf_counter() - started)


def _stock_call(pipe: Any, noise: Tensor, spec: dict[str, Any], kind: str) -> Callable[[], Any]:
    size, prompts = spec["side"] * spec["factor"], [PROMPT] * spec["batch"]
    return lambda: (
        pipe(
            prompts,
            negative_prompt=[""] * len(prompts),
            latents=noise,
            num_inference_steps=spec["steps"],
            guidance_scale=SCALE,
            height=size,
            width=size,
            output_type=kind,
        ).images
    )


def gigaflops(call: Callable[[], Any]) -> float:
    """Return the floating-point operations of the matrix products and convolutions of a call, in 10⁹."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e9


def main() -> None:
    spec = json.loads(sys.argv[1])
    device = torch.device("cuda" if torch.cuda.is_available() and spec["who"] != "optimum" else "cpu")
    torch.set_num_threads(spec["threads"])
    server = open_server(device.type)
    with torch.inference_mode() if spec["who"] == "optimum" else torch.no_grad():
        build = {"ldm": ours, "diffusers": diffusers, "optimum": optimum}[spec["who"]]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[spec["dtype"]]
        call, prepared = build(spec, device, dtype)

        def save(path: str) -> None:
            result = call()
            np.save(path, result.float().cpu().numpy() if isinstance(result, Tensor) else result)

        server.output = save
        server.forget_memory()
        server.answer(prepared=prepared, gigaflops=gigaflops(call) if spec.get("count") else None)
        server.serve(call)


if __name__ == "__main__":
    main()
