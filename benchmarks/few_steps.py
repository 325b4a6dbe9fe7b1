"""Measure the quality and the time of distilled students against their teacher, on the Shapes dataset.

Each row is a model with a number of steps: the share of fully correct images of seen and of unseen prompts, from the
same noise. Rows of approximate accelerations also have the mean difference from the images of full sampling, in levels
of 255. With --seconds, it is the time per image in batches of 1 and 16 instead, as the median of alternating
rounds. Rows are added to the JSON file, so that an interrupted measurement continues. The models are those of
docs/few_steps.md:

    python benchmarks/few_steps.py --teacher runs/demo/model --guided runs/guided/model --few runs/few/model
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL.Image import Image

from ldm.pipeline import LatentDiffusionPipeline
from train.commands.main import command
from train.config.load import overlay
from train.data.synthetic.shapes import prompts
from train.engine.precision import DTYPES
from train.evaluation.diffusion import alignment, generate_batch
from train.evaluation.sheets import in_rows, save_sheet, sheet

STEPS = {"teacher": (25, 8, 4), "guided": (25, 8, 4), "few": (8, 4, 2, 1)}
APPROXIMATE: dict[str, dict[str, Any]] = {
    "guided in an interval": {"guidance_interval": (0.5, 4.0)},
    "features used in 2 steps": {"reuse_features": 2},
    "features used in 3 steps": {"reuse_features": 3},
}
"""Approximate accelerations of the teacher with 25 steps, without training."""
FAST: tuple[tuple[str, int, str], ...] = (
    ("teacher", 25, ""),
    ("guided", 25, ""),
    ("few", 4, ""),
    *(("teacher", 25, what) for what in APPROXIMATE),
)
"""Rows whose time is measured: model, steps, and acceleration."""
_COMPARED = 64  # images whose difference from full sampling is measured
_SHOWN = 8  # images of each row on the sheet, the first prompts


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure students against their teacher. Continues the table in `out`."""

    teacher: str = "runs/demo/model"
    """Folder of the teacher."""
    guided: str = "runs/guided/model"
    """Folder of the student that reads the guidance scale; empty: none."""
    few: str = "runs/few/model"
    """Folder of the student that needs few steps; empty: none."""
    prompts: int = 1024
    """Number of prompts of each kind, seen and unseen."""
    guidance_scale: float = 3.0
    """Guidance scale."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of the networks."""
    seconds: bool = False
    """Measure the time per image instead of the quality."""
    out: str = "benchmarks/few_steps.json"
    """Output file of the table; the images are written beside it, as PNG."""


@command
def main() -> None:
    o = overlay(Options, Options())
    folders = {name: getattr(o, name) for name in STEPS if getattr(o, name)}
    pipes = {
        name: LatentDiffusionPipeline.from_pretrained(folder).to(dtype=DTYPES[o.precision])
        for name, folder in folders.items()
    }
    out = Path(o.out)
    report: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}

    def add(row: str, values: dict[str, Any]) -> None:
        report[row] = report.get(row, {}) | values
        print(row, json.dumps(values), flush=True)
        out.write_text(json.dumps(report, indent=1) + "\n")

    if o.seconds:
        for size in (1, 16):
            for row, seconds in _seconds(pipes, size, o.guidance_scale).items():
                add(row, {f"seconds_{size}": round(seconds / size, 4)})
        return
    rows = [(name, steps, "") for name in pipes for steps in STEPS[name]]
    for name, steps, what in [*rows, *(("teacher", 25, what) for what in APPROXIMATE)]:
        row = _row(name, steps, what)
        if name in pipes and "unseen" not in report.get(row, {}):
            how = {"num_inference_steps": steps, "guidance_scale": o.guidance_scale}
            if what:
                add(row, {"difference": _difference(pipes[name], how, APPROXIMATE[what])})
            shown = _quality(pipes[name], o.prompts, partial(add, row), **how, **APPROXIMATE.get(what, {}))
            save_sheet(shown, out.with_name(f"{out.stem}-{row.replace(', ', '-').replace(' ', '-')}.png"))


def _row(name: str, steps: int, what: str) -> str:
    return f"{name} {steps}{', ' * bool(what)}{what}"


def _difference(pipe: LatentDiffusionPipeline, how: dict[str, Any], change: dict[str, Any]) -> float:
    """Return the mean difference of images generated with a change from those without it, in levels of 255."""
    texts = [scene.caption for scene in prompts("seen", _COMPARED, 1)]
    plain, changed = (generate_batch(pipe, texts, range(_COMPARED), **how, **extra) for extra in ({}, change))
    return round(float(np.abs(plain.astype(float) - changed).mean()), 2)


def _quality(pipe: LatentDiffusionPipeline, count: int, add: Callable[[dict[str, Any]], None], **how: Any) -> Image:
    """Add the share of fully correct images of each kind of prompts. Returns a sheet of the first images."""
    shown, captions = [], []
    for kind in ("seen", "unseen"):
        scenes = prompts(kind, count, 1)  # type: ignore[arg-type]
        shares, images = alignment(pipe, scenes, batch_size=64, seed=1, **how)
        add({kind: shares["all"]})
        shown += list(images[:_SHOWN])
        captions += [scene.caption for scene in scenes[:_SHOWN]]
    return sheet(in_rows(shown, _SHOWN), captions)


def _seconds(pipes: dict[str, LatentDiffusionPipeline], size: int, scale: float) -> dict[str, float]:
    """Return the median time of a batch of each fast row; all rows take turns."""
    texts = [scene.caption for scene in prompts("seen", size, 1)]
    rows = [fast for fast in FAST if fast[0] in pipes]
    taken: dict[str, list[float]] = {_row(*row): [] for row in rows}
    for round_ in range(6):
        for name, steps, what in rows:
            how = {"num_inference_steps": steps, "guidance_scale": scale, **APPROXIMATE.get(what, {})}
            started = time.perf_counter()
            generate_batch(pipes[name], texts, range(size), **how)
            if round_:
                taken[_row(name, steps, what)].append(time.perf_counter() - started)
    return {row: statistics.median(values) for row, values in taken.items()}


if __name__ == "__main__":
    main()
