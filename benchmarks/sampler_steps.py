"""Measure how many steps each sampler needs for the accuracy of 200 steps of DDIM.

Generates the same Shapes prompts from the same noise with every sampler, at increasing numbers of steps, until the
share of fully correct images is within 2 percentage points of DDIM's at 200; prints a table and writes it as JSON. On a
demo model:

    python benchmarks/sampler_steps.py --model runs/demo/model --out benchmarks/sampler_steps.json
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ldm.errors import UserError
from ldm.pipeline import LatentDiffusionPipeline
from ldm.samplers import SamplerKind
from train.commands.generate import model_sha256
from train.commands.main import command
from train.config.load import overlay
from train.data.synthetic.shapes import Scene, prompts
from train.evaluation.diffusion import alignment

STEPS = (4, 6, 8, 10, 12, 15, 20, 25, 32, 40, 50, 75, 100)
OTHER_MODELS = ("lcm",)
"""Samplers for other models than the demo's."""
TWICE = ("heun", "predictor_corrector")
"""Samplers that evaluate the network twice per step, except in the last."""
REFERENCE = "ddim at 200"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the steps that each sampler needs for equal quality. Continues the table in `out`."""

    model: str = "runs/demo/model"
    """Folder of a model trained on the Shapes dataset."""
    prompts: int = 1024
    """Number of prompts, half of them seen, half unseen."""
    guidance_scale: float = 2.0
    """Guidance scale."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of the network."""
    out: str = "benchmarks/sampler_steps.json"
    """Output file of the table."""
    samplers: tuple[SamplerKind, ...] = tuple(kind for kind in get_args(SamplerKind) if kind not in OTHER_MODELS)
    """Samplers to measure in this run."""


def measure(pipe: LatentDiffusionPipeline, scenes: list[Scene], **how: object) -> dict[str, float]:
    started = time.perf_counter()
    shares, _ = alignment(pipe, scenes, batch_size=128, **how)
    return {"all": shares["all"], "seconds": round(time.perf_counter() - started, 1)}  # type: ignore[dict-item]


@command
def main() -> None:
    o = overlay(Options, Options())
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[o.precision]
    pipe = LatentDiffusionPipeline.from_pretrained(o.model).to(dtype=dtype)
    scenes = [*prompts("seen", o.prompts // 2, 1), *prompts("unseen", o.prompts // 2, 1)]
    out = Path(o.out)
    measured = {
        "unet": model_sha256(Path(o.model))[:16],
        "prompts": o.prompts,
        "guidance_scale": o.guidance_scale,
        "precision": o.precision,
    }
    report: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"measured": measured, "table": {}}
    if report["measured"] != measured:
        raise UserError(
            f"--out {o.out!r}: contains measurements of {report['measured']}, not of {measured}; give another file"
        )
    table: dict[str, dict[str, float]] = report["table"]

    def measured_once(name: str, **how: object) -> float:
        if name not in table:
            table[name] = measure(pipe, scenes, guidance_scale=o.guidance_scale, **how)
            print(f"{name:28} all correct {table[name]['all']:.4f}  {table[name]['seconds']:.0f} s", flush=True)
            out.write_text(json.dumps(report, indent=1) + "\n")
        return table[name]["all"]

    bar = measured_once(REFERENCE, sampler="ddim", num_inference_steps=200) - 0.02
    for sampler in o.samplers:
        for steps in STEPS:
            if measured_once(f"{sampler} at {steps}", sampler=sampler, num_inference_steps=steps) >= bar:
                evaluations = 2 * steps - 1 if sampler in TWICE else steps
                print(f"{sampler}: {steps} steps, {evaluations} evaluations", flush=True)
                break
        else:
            print(f"{sampler}: not reached within {STEPS[-1]} steps", flush=True)


if __name__ == "__main__":
    main()
