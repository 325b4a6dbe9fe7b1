"""The track of the whole demo: CPU seconds of each part, in turn with those of another checkout, and the accuracy.

Every part is a process of its own, in a folder for each checkout and seed. A part of this code follows the same part of
the other code: A B A B. The seed is that of the three trainings; the dataset is always the same.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import RunError, UserError, one_line
from ldm.files import read_json
from tracks.options import Options
from tracks.records import Measured, record
from tracks.trainings import ROOT, accuracy
from train.data.store.atomic import write_text

_READ = "import json, demo; print(json.dumps(demo.STAGES))"
_TRAINED = ("clip", "vae", "ldm")


def measure(o: Options, before: Mapping[str, Any] | None) -> Measured:
    """Run the demo for each seed, in turn with that of --checkout, and measure its accuracy.

    before: the record that was made with that checkout, if there is one; only its name is used.
    """
    if o.config or o.settings or o.steps:
        raise UserError("--config, --settings, --steps: the demo has its own")
    if before is not None and not o.checkout:
        raise UserError("--before without --checkout: the demo's CPU seconds are only compared in turn")
    codes = {"before": Path(o.checkout).resolve()} if o.checkout else {}
    codes["this"] = ROOT
    parts = {who: commands(code) for who, code in codes.items()}
    if any(parts[who].keys() != parts["this"].keys() for who in codes):
        raise UserError(f"--checkout {o.checkout}: its demo has other parts: {', '.join(parts['before'])}")
    for seed in o.seeds:
        run_in_turn(o, seed, codes, parts)
    found = {str(seed): accuracy(o, folder(o, "this", seed) / "model") for seed in o.seeds}
    seconds = {who: medians(o, who) for who in codes}
    earlier = None
    if o.checkout:
        name = before["name"] if before else version(codes["before"])
        earlier = {"name": name, "cpu_seconds": seconds["before"]}
    logs = {f"seed-{seed}.jsonl": folder(o, "this", seed) / "metrics.jsonl" for seed in o.seeds}
    return Measured(record(o, found, seconds["this"], earlier, {}), logs)


def commands(code: Path) -> dict[str, list[str]]:
    """Return the command of each part of a checkout's demo, by name. Raises UserError if it has none."""
    here = code / "scripts"  # not this code's folder, because the current folder comes first in Python's path
    command, environment = [sys.executable, "-c", _READ], os.environ | {"PYTHONPATH": str(code)}
    if not (here / "demo.py").is_file():
        raise UserError(f"--checkout {code}: has no scripts/demo.py; must be a checkout of this project")
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--checkout {code}: scripts/demo.py can't be read ({one_line(done.stderr.splitlines()[-1])})")
    return {part: line.split() for part, line in json.loads(done.stdout).items()}


def version(code: Path) -> str:
    """Return the commit of a checkout, or its folder's name if it isn't one of git."""
    done = subprocess.run(["git", "-C", str(code), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return done.stdout.strip() or code.name


def folder(o: Options, who: str, seed: int) -> Path:
    return Path(o.work).resolve() / o.name / who / f"seed-{seed}"


def run_in_turn(o: Options, seed: int, codes: Mapping[str, Path], parts: Mapping[str, Mapping[str, list[str]]]) -> None:
    """Run all parts, each of them with one code after the other. What is finished isn't run again.

    Models, logs and CPU seconds are kept. Raises RunError if a part fails.
    """
    folders = {who: folder(o, who, seed) for who in codes}
    if all((kept / "seconds.json").is_file() for kept in folders.values()):
        return
    for who, code in codes.items():
        shutil.rmtree(folders[who], ignore_errors=True)
        (folders[who] / "runs").mkdir(parents=True)
        for name in ("configs", "scripts"):
            (folders[who] / name).symlink_to(code / name)
    seconds: dict[str, dict[str, float]] = {who: {} for who in codes}
    for part in parts["this"]:
        for who, code in codes.items():
            own = ["--seed", str(seed)] if part in _TRAINED else []
            command = [sys.executable, *parts[who][part], *own]
            seconds[who][part] = cpu_seconds(command, folders[who], code, part)
    for who, kept in folders.items():
        keep(kept, seconds[who])


def cpu_seconds(command: list[str], here: Path, code: Path, part: str) -> float:
    """Run a part, and return the CPU seconds of all its processes. Raises RunError if it fails."""
    environment = os.environ | {"PYTHONPATH": str(code)}
    started = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    with open(here / f"{part}.log", "w", encoding="utf-8") as log:
        status = subprocess.run(command, cwd=here, env=environment, stdout=log, stderr=log).returncode
    if status:
        raise RunError(f"{part} ended with status {status}; its output is in {log.name}")
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - started


def keep(here: Path, seconds: Mapping[str, float]) -> None:
    """Keep a finished demo's model, its log and its CPU seconds; remove its data, runs and caches."""
    shutil.move(here / "runs/demo/ldm/model", here / "model")
    shutil.move(here / "runs/demo/ldm/metrics.jsonl", here / "metrics.jsonl")
    for name in ("runs", "data"):
        shutil.rmtree(here / name)
    write_text(here / "seconds.json", json.dumps(seconds) + "\n")


def medians(o: Options, who: str) -> dict[str, Any]:
    """Return the median CPU seconds over the seeds: of each part, and of all parts together."""
    found = [read_json(folder(o, who, seed) / "seconds.json") for seed in o.seeds]
    parts = {part: statistics.median(f[part] for f in found) for part in found[0]}
    return {"parts": parts, "training": statistics.median(sum(f.values()) for f in found)}
