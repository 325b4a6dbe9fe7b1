"""What several tracks do: train the seeds, measure a model's accuracy, and time steps in turn."""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from against import contest
from against.contest import Contestant, Row

from ldm.errors import RunError, UserError
from ldm.pipeline import LatentDiffusionPipeline
from tracks.options import Options
from tracks.records import held_back
from train.data.synthetic.shapes import prompts
from train.evaluation.diffusion import alignment

ROOT = Path(__file__).resolve().parents[2]
SAMPLING: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 3.0, "sampler": "dpmpp_2m"}
_NEVER = "1000000"
_ENDLESS = (
    f"--steps {_NEVER} --validate-every {_NEVER} --checkpoint-every {_NEVER} --log-every 1000 --first-samples 0 "
    "--trackers --optimizer.warmup 0"
)
Program = Callable[[int], Sequence[str]]
"""A function of a seed that returns the command line of its training."""


def ldm_arguments(o: Options, config: str, settings: str, vae: str) -> list[str]:
    """Return the arguments of train_ldm.py, except for steps, seed and output."""
    given = ["--data", o.data, "--vae", vae, "--text-encoder", o.text_encoder, "--cache", f"{o.work}/cache"]
    return [config, *given, *shlex.split(settings)]


def run_folder(o: Options, seed: int, what: str = "") -> Path:
    return Path(o.work) / f"{o.name}-{o.steps}{what}" / f"seed-{seed}"


def script(o: Options, name: str, words: Sequence[str], what: str = "") -> Program:
    """Return the program that runs a training script with these arguments, each seed in its own folder."""

    def program(seed: int) -> list[str]:
        own = ["--seed", str(seed), "--out", str(run_folder(o, seed, what))]
        return [sys.executable, str(ROOT / "scripts" / name), *words, *own]

    return program


def threads(o: Options) -> int:
    """Return each training's share of the threads."""
    return max(1, torch.get_num_threads() // o.jobs)


def train_seeds(o: Options, program: Program) -> None:
    """Train one run per seed, `jobs` at a time. Raises RunError if one fails; the same command continues it."""
    waiting, running = list(o.seeds), dict[int, subprocess.Popen[bytes]]()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads(o)), "PYTHONPATH": _paths(ROOT)}
    try:
        while waiting or running:
            while waiting and len(running) < o.jobs:
                seed = waiting.pop(0)
                running[seed] = subprocess.Popen(program(seed), env=environment)
            seed, process = next(iter(running.items()))
            if status := process.wait():
                raise RunError(f"seed {seed} ended with status {status}; the same command continues")
            del running[seed]
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def _paths(checkout: Path) -> str:
    return os.pathsep.join([str(checkout / "benchmarks"), str(checkout)])


def accuracy(o: Options, model: Path) -> dict[str, float]:
    """Return the share of images with all attributes right, for seen and unseen prompts, and their mean."""
    pipe = LatentDiffusionPipeline.from_pretrained(str(model))
    seed = held_back(o)
    found: dict[str, float] = {}
    for kind in ("seen", "unseen"):
        shares, _ = alignment(pipe, prompts(kind, o.prompts, seed), seed=seed, batch_size=64, **SAMPLING)
        found[kind] = shares["all"] or 0.0
    return found | {"mean": statistics.mean(found.values())}


@dataclass(frozen=True)
class Training(Contestant):
    """Training of ldm in a checkout."""

    checkout: str = str(ROOT)

    def command(self) -> list[str]:
        return [self.python, str(Path(self.checkout, "benchmarks/against", self.program)), json.dumps(self.spec)]

    def environment(self) -> dict[str, str]:
        return super().environment() | {"PYTHONPATH": _paths(Path(self.checkout))}


def contestant(o: Options, name: str, stage: str, words: Sequence[str], checkout: str = "") -> Training:
    """Return the training of a stage, `vae` or `ldm`, as a contestant that makes steps without an end.

    words: arguments of the training, the configuration first. With a checkout, it is the configuration there; raises
    UserError if there is none.
    """
    code = Path(checkout).resolve() if checkout else ROOT
    config = str(code / words[0]) if checkout else words[0]
    if checkout and not Path(config).is_file():
        raise UserError(f"--checkout {checkout}: has no {words[0]}; must be a checkout of the commit in --before")
    out = Path(o.work).resolve() / "timing" / name
    shutil.rmtree(out, ignore_errors=True)
    how = [config, *words[1:], *shlex.split(_ENDLESS), "--out", str(out)]
    spec = {"who": "ldm", "stage": stage, "arguments": how, "threads": torch.get_num_threads()}
    return Training(name, "training.py", spec, checkout=str(code))


def step_seconds(o: Options, found: Sequence[Contestant]) -> dict[str, float]:
    """Return the median CPU seconds of a step of each contestant, measured in turn: A B A B."""
    results = contest.run(Row("speedrun", "a step", found, o.calls), Path(o.work) / "logs", o.seconds, o.turns, {})
    for name, result in results.items():
        if "cpu" not in result:
            raise RunError(f"the step of {name} can't be timed: {result.get('failed', 'no time left')}")
    return {name: result["cpu"] for name, result in results.items()}


def of_training(steps: int, step: float) -> dict[str, float]:
    """Return the CPU seconds of a step and of all steps."""
    return {"step": step, "training": steps * step}


def times(
    o: Options, this: Contestant, earlier: Contestant | None, before: Mapping[str, Any] | None
) -> tuple[dict[str, float], dict[str, Any] | None]:
    """Return the CPU seconds of this training, and name and CPU seconds of the record before, timed in turn.

    this, earlier: contestants with the names `this` and `before`.
    """
    seconds = step_seconds(o, [this] if earlier is None else [earlier, this])
    own = of_training(o.steps, seconds["this"])
    if before is None:
        return own, None
    return own, {"name": before["name"], "cpu_seconds": of_training(before["steps"], seconds["before"])}
