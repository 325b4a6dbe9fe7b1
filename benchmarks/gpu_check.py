"""Check the three stages on a GPU: train each a few steps in every precision, and compare with the CPU's fp32 losses.

The batches of a run depend only on its seed, so a GPU run uses the examples, timesteps and noise of the CPU run, and
its losses must agree: in fp32 to rounding, in bf16 and fp16 to the accuracy of those formats.

    CUDA_VISIBLE_DEVICES= python benchmarks/gpu_check.py reference --out runs/gpu   # on the CPU; saves models, losses
    python benchmarks/gpu_check.py check --out runs/gpu                             # on the GPU; prints a table

`check` writes `check.json` after every case, so an interrupted run keeps its results. `--tiny` makes fewer and smaller
checks, which also run on a CPU.
"""

import argparse
import contextlib
import io
import json
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ldm.pipeline import LatentDiffusionPipeline
from train.config.clip import ClipConfig
from train.config.ldm import LdmConfig
from train.config.load import parse
from train.config.vae import VaeConfig
from train.data.synthetic.shapes import write_shapes
from train.engine.provenance import versions
from train.stages import clip, ldm, vae

STEPS = 12
_FEW = [
    "--steps",
    str(STEPS),
    "--log-every",
    "1",
    "--validate-every",
    "1000",
    "--checkpoint-every",
    "1000",
    "--trackers",
    "--batch-size",
    "32",
    "--optimizer.warmup",
    "2",
]
_FULL = [
    "--adversarial.kind",
    "hinge",
    "--adversarial.start",
    "4",
    "--adversarial.spectral-norm",
    "True",
    "--adversarial.r1",
    "0.1",
    "--equivariance.share",
    "0.5",
    "--equivariance.smallest",
    "0.5",
    "--learn-logvar",
    "True",
    "--perceptual.kind",
    "clip",
]
_ADAMW = ["--optimizer.kind", "adamw", "--optimizer.lr", "1e-3"]
_KINDS: dict[str, tuple[type, Callable[[Any], None]]] = {
    "clip": (ClipConfig, clip.train),
    "vae": (VaeConfig, vae.train),
    "ldm": (LdmConfig, ldm.train),
}
# name → stage, options, precisions. The CPU's fp32 losses are the reference for all of them.
CASES: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "clip": ("clip", [], ("fp32", "bf16", "fp16")),
    "vae": ("vae", [], ("fp32", "bf16", "fp16")),
    "vae, every loss": ("vae", [*_FULL, "--accumulation", "2"], ("fp32", "bf16", "fp16")),
    "ldm": ("ldm", [], ("fp32", "bf16", "fp16")),
    "ldm, AdamW, checkpointing": ("ldm", [*_ADAMW, "--gradient-checkpointing", "True"], ("fp32", "bf16", "fp16")),
    "ldm, no cache": ("ldm", ["--cache", "off", "--workers", "2"], ("fp32", "bf16", "fp16")),
    "ldm, inpaint": ("ldm", ["--task", "inpaint", "--workers", "2"], ("fp32", "bf16", "fp16")),
    "ldm, learned variance": (
        "ldm",
        [
            "--diffusion.variance",
            "learned",
            "--diffusion.objective",
            "hybrid",
            "--diffusion.timestep-sampling",
            "importance",
        ],
        ("fp32", "bf16", "fp16"),
    ),
    "ldm, xformers": ("ldm", ["--attention", "xformers"], ("bf16", "fp16")),
}
_SMALL_TOWERS = "--text.width 32 --text.layers 1 --text.heads 2 --image.width 32 --image.layers 1 --image.heads 2"
_TINY = {  # settings of smaller networks
    "clip": [*_SMALL_TOWERS.split(), "--batch-size", "8"],
    "vae": ["--model.channels", "16", "16", "16", "--batch-size", "8"],
    "ldm": ["--unet.channels", "32", "32", "--batch-size", "8"],
}
_TINY_CASES = ("clip", "vae", "ldm", "ldm, inpaint")
_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 5e-3}  # relative, of the first losses; Muon orthogonalises in bf16
_COMPARED = 3  # losses: later ones differ because the weights do


Fit = Callable[..., list[dict[str, float]]]
"""`train` for one folder: (case, precision, further settings) → lines of metrics.jsonl."""


def train(out: Path, tiny: bool, case: str, precision: str, *more: str) -> list[dict[str, float]]:
    """Train a case into out/CASE-PRECISION, or continue it there, and return the lines of its metrics.jsonl."""
    stage, options, _ = CASES[case]
    kind, fit = _KINDS[stage]
    run = out / f"{case}-{precision}".replace(", ", "-").replace(" ", "-")
    arguments = [f"configs/shapes/{stage}.yaml", "--data", str(out / "data"), "--out", str(run), *_FEW]
    arguments += ["--precision", precision, *options, *(_TINY[stage] if tiny else []), *more]
    models = out / "models"
    if stage == "ldm":
        arguments += (
            [
                "--vae",
                str(models / "vae"),
                "--text-encoder",
                str(models / "clip"),
                "--cache",
                str(out / f"cache-{precision}"),
            ]
            if "--cache" not in options
            else ["--vae", str(models / "vae"), "--text-encoder", str(models / "clip")]
        )
    if "--perceptual.kind" in options:
        arguments += ["--perceptual.model", str(models / "clip")]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        fit(parse(kind, arguments))
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(lines: Sequence[dict[str, float]]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def cases(tiny: bool) -> dict[str, tuple[str, ...]]:
    """Return the names of the cases that are checked, with their precisions."""
    if tiny:
        return {case: ("fp32", "bf16") if case == "ldm" else ("bf16",) for case in _TINY_CASES}
    return {case: precisions for case, (_, _, precisions) in CASES.items()}


def reference(out: Path, tiny: bool) -> None:
    """Write the CPU's fp32 losses, and the models that stage 2 needs."""
    write_shapes(out / "data", 32, 512, 64, 0)
    found: dict[str, list[float]] = {}
    for case in cases(tiny):
        if case == "ldm, xformers":
            found[case] = found["ldm"]
            continue
        found[case] = losses(train(out, tiny, case, "fp32"))
        for stage in ("clip", "vae"):
            if case == stage:
                shutil.copytree(out / f"{stage}-fp32" / "model", out / "models" / stage, dirs_exist_ok=True)
        print(f"{case}: {found[case][0]:.5f} … {found[case][-1]:.5f}", flush=True)
    (out / "reference.json").write_text(json.dumps(found, indent=1))
    for folder in {*out.glob("*-fp32"), *out.glob("cache-*")}:
        shutil.rmtree(folder)


class Report:
    """Report of all checks: rows of name, result and measurements, printed and saved one by one."""

    def __init__(self, path: Path, only: Sequence[str]) -> None:
        self.path, self.only, self.rows = path, only, [{"versions": versions(), "device": _device()}]

    def add(self, name: str, check: Callable[[], dict[str, Any]]) -> None:
        if self.only and not any(part in name for part in self.only):
            return
        started = time.perf_counter()
        try:
            row = {"name": name, **check()}
        except Exception as error:
            row = {"name": name, "ok": False, "error": f"{type(error).__name__}: {error}"[:400]}
            row["at"] = traceback.format_exc().splitlines()[-4:]
        row["seconds"] = round(time.perf_counter() - started, 1)
        self.rows.append(row)
        self.path.write_text(json.dumps(self.rows, indent=1))
        print("ok  " if row["ok"] else "FAIL", row, flush=True)


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _stage(fit: Fit, case: str, precision: str, expected: list[float]) -> dict[str, Any]:
    lines = fit(case, precision)
    found = losses(lines)
    skipped = max(line.get("skipped", 0) for line in lines)  # fp16 skips steps until its loss scale fits
    compared = found[: 1 if skipped else _COMPARED]
    off = [abs(a / b - 1) for a, b in zip(compared, expected, strict=False)]
    ok = len(found) == STEPS and bool(np.isfinite(found).all()) and max(off) < _TOLERANCE[precision]
    return {
        "ok": ok and (skipped == 0 or precision == "fp16"),
        "first": found[0],
        "last": found[-1],
        "cpu last": expected[-1],
        "relative difference": max(off),
        "skipped": skipped,
        "images/s": lines[-2].get("images_per_second"),
    }


def _resume(out: Path, fit: Fit) -> dict[str, Any]:
    """Resume from a checkpoint in the middle, and compare losses and weights with the uninterrupted run."""
    run, kept = out / "ldm-bf16", out / "ldm-bf16-whole"
    whole = losses(fit("ldm", "bf16", "--checkpoint-every", "10"))
    shutil.copytree(run / "model", kept, dirs_exist_ok=True)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    parts = losses(fit("ldm", "bf16", "--checkpoint-every", "10"))
    a, b = (load_file(f / "unet" / "diffusion_pytorch_model.safetensors") for f in (kept, run / "model"))
    worst = max(float((a[name] - b[name]).abs().max()) for name in a)
    return {"ok": parts == whole, "weights differ by": worst, "losses": [parts[-2:], whole[-2:]]}


def _diffusers(out: Path, dtype: torch.dtype, sampler: str, scheduler: str) -> dict[str, Any]:
    """Compare images of ldm and of diffusers, from one folder, seed and sampler; and both with ldm's images in fp32."""
    import diffusers

    folder, device = out / "ldm-fp32" / "model", "cuda" if torch.cuda.is_available() else "cpu"
    prompts = ["a large red circle on a white background", "a small blue star above a large green square"]
    pipe = LatentDiffusionPipeline.from_pretrained(folder).to(device)
    stock = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    stock.scheduler = getattr(diffusers, scheduler).from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)

    def images(call: Any, **how: Any) -> np.ndarray:
        generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
        result = call(
            prompts, generator=generators, num_inference_steps=20, guidance_scale=4.0, output_type="np", **how
        )
        return np.asarray(result.images, np.float64) * 255

    exact = images(pipe, sampler=sampler)
    ours, theirs = images(pipe.to(dtype=dtype), sampler=sampler), images(stock)
    far = {name: float(np.abs(x - exact).mean()) for name, x in (("ldm", ours), ("diffusers", theirs))}
    worst = float(np.abs(ours - theirs).max())
    ok = worst <= 2 if dtype == torch.float32 else far["ldm"] <= far["diffusers"]
    return {"ok": ok, "apart, of 255": worst, "mean error to fp32, of 255": far}


def _half_precision(out: Path) -> dict[str, Any]:
    """Compare the images in half precision, with xformers and with offload to those in fp32."""
    folder, prompts = out / "ldm-fp32" / "model", ["a large red circle on a white background"] * 2
    g = torch.Generator().manual_seed

    def images(pipe: LatentDiffusionPipeline) -> np.ndarray:
        return np.asarray(pipe(prompts, generator=[g(0), g(1)], output_type="np").images)

    exact = images(LatentDiffusionPipeline.from_pretrained(folder).to("cuda"))
    far: dict[str, float] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        pipe = LatentDiffusionPipeline.from_pretrained(folder).to("cuda", dtype=dtype)
        far[name] = float(np.abs(images(pipe) - exact).mean()) * 255
        if find_spec("xformers") is None:
            continue
        try:
            pipe.set_attention("xformers")
            far[f"{name}, xformers"] = float(np.abs(images(pipe) - exact).mean()) * 255
        except Exception as error:
            far[f"{name}, xformers: {error}"[:300]] = float("nan")
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    pipe.enable_model_cpu_offload()
    far["offload"] = float(np.abs(images(pipe) - exact).mean()) * 255
    return {"ok": all(value < 8 for value in far.values()), "mean difference of 255": far}


def _optimized(out: Path) -> dict[str, Any]:
    """Compare images of the optimized pipeline in bf16 with those in fp32, for two batch sizes, and time a second call.

    Its error must not be much larger than that of the pipeline that isn't optimized.
    """
    folder, prompt = out / "ldm-fp32" / "model", "a large red circle on a white background"
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def images(pipe: LatentDiffusionPipeline, n: int) -> np.ndarray:
        generators = [torch.Generator().manual_seed(k) for k in range(n)]
        return np.asarray(pipe([prompt] * n, generator=generators, output_type="np").images)

    exact = LatentDiffusionPipeline.from_pretrained(folder).to(device)
    eager, fast = (LatentDiffusionPipeline.from_pretrained(folder).to(device, dtype=torch.bfloat16) for _ in range(2))
    fast.optimize()
    far: dict[str, list[float]] = {"eager": [], "optimized": []}
    for n in (3, 2):  # the second one is padded to the first, which is compiled
        target = images(exact, n)
        for name, pipe in (("eager", eager), ("optimized", fast)):
            far[name].append(255 * float(np.abs(images(pipe, n) - target).mean()))
    started = time.perf_counter()
    images(fast, 3)
    ok = all(b <= 1.5 * a + 0.5 for a, b in zip(far["eager"], far["optimized"], strict=True))
    return {"ok": ok, "mean difference of 255": far, "seconds of a second call": time.perf_counter() - started}


def check(out: Path, only: Sequence[str], tiny: bool) -> None:
    expected = json.loads((out / "reference.json").read_text())
    report, fit = Report(out / "check.json", only), partial(train, out, tiny)
    for case, precisions in cases(tiny).items():
        if "xformers" in case and find_spec("xformers") is None:
            print(f"skipped: {case}, because xformers isn't installed", flush=True)
            continue
        for precision in precisions:
            name = f"{case}, {precision}"
            report.add(name, lambda c=case, p=precision: _stage(fit, c, p, expected[c]))  # type: ignore[misc]
    samplers = {"ddim": "DDIMScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}
    for sampler, scheduler in samplers.items():
        report.add(f"{sampler} as diffusers, fp32", lambda s=sampler, c=scheduler: _diffusers(out, torch.float32, s, c))  # type: ignore[misc]
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        report.add(f"ddim as diffusers, {name}", lambda d=dtype: _diffusers(out, d, "ddim", "DDIMScheduler"))  # type: ignore[misc]
    if torch.cuda.is_available():
        report.add("generating in half precision", lambda: _half_precision(out))
    report.add("optimized, bf16", lambda: _optimized(out))
    shutil.rmtree(out / "ldm-bf16", ignore_errors=True)
    report.add("resume, bf16", lambda: _resume(out, fit))
    failed = [row["name"] for row in report.rows[1:] if not row["ok"]]
    print(f"{len(report.rows) - 1 - len(failed)} of {len(report.rows) - 1} passed; failed: {failed}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["reference", "check"])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of the checks to make")
    parser.add_argument("--tiny", action="store_true", help="fewer and smaller checks, which also run on a CPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.what == "reference":
        reference(options.out, options.tiny)
    else:
        check(options.out, options.only, options.tiny)
