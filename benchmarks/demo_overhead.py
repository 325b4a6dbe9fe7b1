"""Measure the parts of `make demo` besides the training steps and the generation of images.

    python benchmarks/demo_overhead.py

It runs the demo's commands in a temporary folder, with 12 steps of each stage but as many validations and checkpoints
as the demo has. The table has the CPU seconds of each part without the parts inside it, of one run.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from train.commands.main import imports

ROOT = Path(__file__).resolve().parents[1]
SHORT = {
    "clip": "--steps 12 --validate-every 12 --checkpoint-every 6",
    "vae": "--steps 12 --validate-every 12 --checkpoint-every 6",
    "ldm": "--steps 12 --validate-every 2 --checkpoint-every 4",
}
"""The demo's numbers of validations and checkpoints, in fewer steps."""
NOT_OVERHEAD = ("steps", "generation")


class Parts:
    """CPU seconds of functions, without those of timed functions that they call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.stack, self.since = ["rest"], 0.0  # the process's CPU time begins at 0

    def switch(self) -> None:
        now = time.process_time()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    def time(self, owner: Any, name: str, part: str) -> None:
        """Replace a function by one that is timed."""
        function = getattr(owner, name)

        def call(*args: Any, **more: Any) -> Any:
            self.switch()
            self.stack.append(part)
            try:
                return function(*args, **more)
            finally:
                self.switch()
                self.stack.pop()

        setattr(owner, name, call)


def timed_command(line: list[str]) -> Mapping[str, float]:
    """Run one of the demo's commands in this process and return the seconds of its parts."""
    script, *arguments = line
    sys.argv, parts = line, Parts()
    with imports():
        run = _command(Path(script).stem, arguments)
        if script.endswith("make_dataset.py"):
            run()
            parts.switch()
            return parts.seconds
        from ldm.pipeline import LatentDiffusionPipeline
        from train.commands import evaluate
        from train.engine.trainer import Trainer
        from train.stages import clip, ldm, vae

    parts.switch()
    parts.seconds["start"] = parts.seconds.pop("rest")
    parts.time(Trainer, "step", "steps")
    parts.time(LatentDiffusionPipeline, "__call__", "generation")
    for stage in (clip.ClipStage, vae.VaeStage, ldm.LdmStage):
        parts.time(stage, "validate", "validation")
        parts.time(stage, "sheet", "validation")
        parts.time(stage, "export", "export")
    parts.time(vae.VaeStage, "_normalised", "statistics of the latents")
    parts.time(ldm, "open_examples", "caches")
    parts.time(evaluate, "measure_reconstruction", "reconstruction")
    parts.time(evaluate, "bits_per_dimension", "likelihood")
    parts.time(evaluate, "image_losses", "errors by noise level")
    parts.time(evaluate, "measure_generated", "distances and copies")
    parts.time(evaluate, "alignment", "checker")
    parts.time(evaluate, "write_report", "report")
    run()
    parts.switch()
    return parts.seconds


def _command(name: str, arguments: list[str]) -> Callable[[], object]:
    """Return the function of a command, whose modules are imported here."""
    from train.config.load import overlay, parse

    if name == "make_dataset":
        from train.commands.make_dataset import make

        return lambda: make(arguments)
    if name == "evaluate":
        from train.commands.evaluate import evaluate
        from train.config.reports import EvaluateOptions

        return lambda: evaluate(overlay(EvaluateOptions, EvaluateOptions(), arguments))
    from train.config.clip import ClipConfig
    from train.config.ldm import LdmConfig
    from train.config.vae import VaeConfig
    from train.stages import clip, ldm, vae

    config, stage = {"train_clip": (ClipConfig, clip), "train_vae": (VaeConfig, vae), "train_ldm": (LdmConfig, ldm)}[
        name
    ]
    return lambda: stage.train(parse(config, arguments))  # type: ignore[attr-defined]


def main() -> None:
    total, stages = 0.0, runpy.run_path(str(ROOT / "scripts/demo.py"))["STAGES"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "configs").symlink_to(ROOT / "configs")
        for stage, line in stages.items():
            command = [sys.executable, "-W", "ignore", __file__, *line.split(), *SHORT.get(stage, "").split()]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            ended = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
            if ended.returncode:
                raise SystemExit(f"{stage} ended with status {ended.returncode}")
            seconds = json.loads(ended.stdout.splitlines()[-1])
            for part, value in seconds.items():
                total += value if part not in NOT_OVERHEAD else 0
                print(f"{stage:9} {part:26} {value:6.1f}{' (not counted)' if part in NOT_OVERHEAD else ''}", flush=True)
    print(f"{'total':36} {total:6.1f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(timed_command(sys.argv[1:])))
    else:
        main()
