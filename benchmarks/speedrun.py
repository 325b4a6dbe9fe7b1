"""Measure a record of stage 2 on Shapes: how many steps and CPU seconds a recipe needs until images follow prompts.

    python benchmarks/speedrun.py --name muon --steps 1800                       # train, measure, and time the step
    python benchmarks/speedrun.py --name next --steps 1200 --settings "--optimizer.lr 3e-3" \\
        --before benchmarks/records/muon/record.json --checkout ../at-its-commit
    python benchmarks/speedrun.py --table                                        # the table of docs/RECORDS.md

docs/RECORDS.md has the rules. The autoencoder, the text encoder and their caches are fixed. Each seed is a run of its
own, so that an interrupted measurement continues. With --choosing, other prompts are used and no record is written.
"""

import hashlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from against import contest, machine
from against.contest import Contestant, Row

from ldm.errors import RunError, UserError
from ldm.files import read_json
from ldm.pipeline import LatentDiffusionPipeline
from train.commands.main import command
from train.config.ldm import LdmConfig
from train.config.load import overlay, parse
from train.data.store.atomic import write_text
from train.data.synthetic.shapes import prompts
from train.evaluation.diffusion import alignment

ROOT = Path(__file__).resolve().parents[1]
MEAN, LEAST, SEEDS = 0.95, 0.92, 5
"""A record's smallest mean of the seeds' accuracies, the smallest accuracy of each seed, and the number of seeds."""
_PROMPTS, _CHOOSING = 70_001, 60_001  # seeds of the prompts; those of records are used for nothing else
_SAMPLING: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": 3.0, "sampler": "dpmpp_2m"}
_NEVER = "1000000"
_ENDLESS = (
    f"--steps {_NEVER} --validate-every {_NEVER} --checkpoint-every {_NEVER} --log-every 1000 --first-samples 0 "
    "--trackers --optimizer.warmup 0"
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a record of stage 2 on Shapes."""

    name: str = ""
    """Name of the record, which is also its folder in `records`. Required."""
    steps: int = 0
    """Number of steps at which each seed's schedule ends. Required; choose it with --choosing."""
    config: str = "configs/shapes/ldm.yaml"
    """Configuration of stage 2."""
    settings: str = ""
    """Further options of train_ldm.py in one text, e.g. "--optimizer.lr 3e-3"."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds of the trainings; a record needs five."""
    prompts: int = 512
    """Number of prompts of each kind, seen and unseen; a record needs 512."""
    choosing: bool = False
    """Use the prompts that are for choosing, e.g. the number of steps, and write no record."""
    before: str = ""
    """File record.json of the record before, whose step is timed in turn with this one. Empty: only this step."""
    checkout: str = ""
    """Folder with the code of the record before. Empty: this code with its settings."""
    calls: int = 20
    """Steps per turn of the timing."""
    turns: int = 8
    """Number of turns of each."""
    seconds: float = 170.0
    """Longest time of the timing."""
    jobs: int = 2
    """Number of trainings at the same time, each with its share of the threads."""
    data: str = "data/shapes"
    """The dataset Shapes."""
    vae: str = "runs/demo/vae/model"
    """Autoencoder."""
    text_encoder: str = "runs/demo/clip/model"
    """Text encoder."""
    work: str = "runs/speedrun"
    """Folder of the runs and logs."""
    records: str = "benchmarks/records"
    """Folder of the records."""
    table: bool = False
    """Print the records as a table."""


@command
def main() -> None:
    o = overlay(Options, Options())
    if o.table:
        print(table(Path(o.records)))
        return
    if not o.name.replace("-", "").isalnum():
        raise UserError(f"--name {o.name!r}: must be letters, digits and -")
    if o.steps < 1 or min(o.prompts, o.calls, o.turns, o.jobs, len(o.seeds)) < 1:
        raise UserError("--steps, --prompts, --calls, --turns, --jobs: must be at least 1, and --seeds must name one")
    before = read_record(Path(o.before)) if o.before else None
    words = arguments(o.config, o.settings, o)
    parse(LdmConfig, [*words, "--steps", str(o.steps)])  # an error costs no training
    record = measure(o, words, before)
    print(json.dumps({key: value for key, value in record.items() if key != "machine"}, indent=2))
    if o.choosing:
        return
    folder = Path(o.records) / o.name
    folder.mkdir(parents=True, exist_ok=True)
    for seed in o.seeds:
        shutil.copy(run_folder(o, seed) / "metrics.jsonl", folder / f"seed-{seed}.jsonl")
    write_text(folder / "record.json", json.dumps(record, indent=2) + "\n")
    print(f"{'a record' if record['valid'] else 'not a record'}: {folder}/record.json")


def arguments(config: str, settings: str, o: Options) -> list[str]:
    """Return the arguments of train_ldm.py, except for steps, seed and output."""
    given = ["--data", o.data, "--vae", o.vae, "--text-encoder", o.text_encoder, "--cache", f"{o.work}/cache"]
    return [config, *given, *shlex.split(settings)]


def run_folder(o: Options, seed: int) -> Path:
    return Path(o.work) / f"{o.name}-{o.steps}" / f"seed-{seed}"


def measure(o: Options, words: Sequence[str], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Train all seeds, and return the record: accuracies, times, and what they depend on."""
    train_seeds(o, words)
    found = {str(seed): accuracy(o, run_folder(o, seed) / "model") for seed in o.seeds}
    digests = {name: digest(Path(getattr(o, name))) for name in ("vae", "text_encoder")}
    if before is not None and before["digests"] != digests:
        raise UserError(f"--before {o.before}: was measured with another autoencoder or text encoder")
    means = [seed["mean"] for seed in found.values()]
    seconds = step_seconds(o, words, before)
    return {
        "name": o.name,
        "track": "stage 2",
        "steps": o.steps,
        "config": o.config,
        "settings": o.settings,
        "accuracy": {"mean": statistics.mean(means), "least": min(means), "seeds": found},
        "prompts": {"count": o.prompts, "seed": _CHOOSING if o.choosing else _PROMPTS},
        "valid": is_valid(means, o),
        "cpu_seconds": {"step": seconds["this"], "training": o.steps * seconds["this"]},
        "before": before
        and {
            "name": before["name"],
            "cpu_seconds": {"step": seconds["before"], "training": before["steps"] * seconds["before"]},
            "ratio": o.steps * seconds["this"] / (before["steps"] * seconds["before"]),
        },
        "digests": digests,
        "machine": machine.about() | {"GFLOP/s": machine.matrix_rates()},
    }


def train_seeds(o: Options, words: Sequence[str]) -> None:
    """Train one run per seed, `jobs` at a time. Raises RunError if one fails; the same command continues it."""
    waiting, running = list(o.seeds), dict[int, subprocess.Popen[bytes]]()
    threads = max(1, torch.get_num_threads() // o.jobs)
    try:
        while waiting or running:
            while waiting and len(running) < o.jobs:
                seed = waiting.pop(0)
                own = ["--steps", str(o.steps), "--seed", str(seed), "--out", str(run_folder(o, seed))]
                program = [sys.executable, str(ROOT / "scripts/train_ldm.py"), *words, *own]
                running[seed] = subprocess.Popen(program, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
            seed, process = next(iter(running.items()))
            if status := process.wait():
                raise RunError(f"seed {seed} ended with status {status}; the same command continues")
            del running[seed]
    finally:
        for process in running.values():
            process.terminate()
            process.wait()


def accuracy(o: Options, model: Path) -> dict[str, float]:
    """Return the share of images with all attributes right, for seen and unseen prompts, and their mean."""
    pipe = LatentDiffusionPipeline.from_pretrained(str(model))
    seed = _CHOOSING if o.choosing else _PROMPTS
    found: dict[str, float] = {}
    for kind in ("seen", "unseen"):
        shares, _ = alignment(pipe, prompts(kind, o.prompts, seed), seed=seed, batch_size=64, **_SAMPLING)
        found[kind] = shares["all"] or 0.0
    return found | {"mean": statistics.mean(found.values())}


def is_valid(means: Sequence[float], o: Options) -> bool:
    """Return whether the accuracies of the seeds are a record's."""
    complete = len(set(o.seeds)) >= SEEDS and o.prompts >= 512 and not o.choosing
    return complete and statistics.mean(means) >= MEAN and min(means) >= LEAST


@dataclass(frozen=True)
class Training(Contestant):
    """Training of ldm in a checkout."""

    checkout: str = str(ROOT)

    def command(self) -> list[str]:
        return [self.python, str(Path(self.checkout, "benchmarks/against", self.program)), json.dumps(self.spec)]

    def environment(self) -> dict[str, str]:
        paths = [str(Path(self.checkout, "benchmarks")), self.checkout]
        return super().environment() | {"PYTHONPATH": os.pathsep.join(paths)}


def contestant(o: Options, name: str, words: Sequence[str], checkout: Path) -> Training:
    out = Path(o.work).resolve() / "timing" / name
    shutil.rmtree(out, ignore_errors=True)
    how = [*words, *shlex.split(_ENDLESS), "--out", str(out)]
    spec = {"who": "ldm", "stage": "ldm", "arguments": how, "threads": torch.get_num_threads()}
    return Training(name, "training.py", spec, checkout=str(checkout))


def step_seconds(o: Options, words: Sequence[str], before: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the median CPU seconds of a step, of this recipe and of the record before, measured in turn: A B A B."""
    found = [contestant(o, "this", words, ROOT)]
    if before is not None:
        checkout = Path(o.checkout).resolve() if o.checkout else ROOT
        found.insert(0, contestant(o, "before", arguments(before["config"], before["settings"], o), checkout))
    row = Row("speedrun", "stage 2's step", found, o.calls)
    results = contest.run(row, Path(o.work) / "logs", o.seconds, o.turns, {})
    for name, result in results.items():
        if "cpu" not in result:
            raise RunError(f"the step of {name} can't be timed: {result.get('failed', 'no time left')}")
    return {name: result["cpu"] for name, result in results.items()}


def digest(folder: Path) -> str:
    """Return the SHA-256 of a model's weights."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: must be a folder with safetensors weights")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def read_record(path: Path) -> dict[str, Any]:
    """Read a record.json. Raises UserError for another file."""
    try:
        record = read_json(path)
        str(record["name"]), int(record["steps"]), str(record["config"]), str(record["settings"])
        float(record["cpu_seconds"]["training"]), float(record["accuracy"]["mean"]), dict(record["digests"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: must be a record.json of this program ({type(error).__name__})") from None
    return record


def table(records: Path) -> str:
    """Return the records that are valid as a Markdown table, in order of their dates."""
    found = [read_record(path) for path in sorted(records.glob("*/record.json"))]
    found = sorted((r for r in found if r["valid"]), key=lambda r: r["machine"]["date"])
    if not found:
        return "No record yet."
    lines = ["| record | steps | CPU seconds | against the record before | accuracy, least seed | date | commit |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in found:
        ratio = f"{r['before']['ratio']:.2f} × {r['before']['name']}" if r["before"] else ""
        score = f"{r['accuracy']['mean']:.3f}, {r['accuracy']['least']:.3f}"
        date, commit = r["machine"]["date"][:10], str(r["machine"]["commit"])[:8]
        lines.append(
            f"| {r['name']} | {r['steps']:,} | {r['cpu_seconds']['training']:.0f} | {ratio} | {score} | {date} | "
            f"{commit} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
