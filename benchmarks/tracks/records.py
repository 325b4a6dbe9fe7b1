"""Records: their rule, what is stored, and the table."""

import hashlib
import json
import shutil
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from against import machine

from ldm.errors import UserError
from ldm.files import read_json
from tracks.options import Options
from train.data.store.atomic import write_text

MEAN, LEAST, SEEDS, PROMPTS = 0.95, 0.92, 5, 512
"""Smallest mean of the seeds' accuracies, smallest accuracy of each seed, and the numbers of seeds and prompts."""
Accuracies = Mapping[str, Mapping[str, float]]
"""The accuracies `seen` and `unseen` of each seed's model, and their `mean`."""


class Measured(NamedTuple):
    """A record and its logs."""

    record: dict[str, Any]
    logs: dict[str, Path]
    """Files to keep with the record, by their names there."""


def held_back(o: Options) -> int:
    """Return the seed of prompts and held-out images; those of records are used for nothing else."""
    return 60_001 if o.choosing else 70_001


def record(
    o: Options,
    found: Accuracies,
    cpu_seconds: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    digests: Mapping[str, str],
    **own: Any,
) -> dict[str, Any]:
    """Return what every track stores. before: name and CPU seconds of the record before. own: the track's own values.

    The ratio of the CPU seconds of both trainings is added.
    """
    means = [seed["mean"] for seed in found.values()]
    if before is not None:
        before = {**before, "ratio": cpu_seconds["training"] / before["cpu_seconds"]["training"]}
    return {
        "name": o.name,
        "track": o.track,
        "steps": o.steps,
        "config": o.config,
        "settings": o.settings,
        "accuracy": {"mean": statistics.mean(means), "least": min(means), "seeds": found},
        "prompts": {"count": o.prompts, "seed": held_back(o)},
        "valid": is_complete(o) and is_accurate(means),
        "cpu_seconds": cpu_seconds,
        "before": before,
        "digests": digests,
        "machine": machine.about() | {"GFLOP/s": machine.matrix_rates()},
    } | own


def is_complete(o: Options) -> bool:
    """Return whether there are enough seeds and prompts for a record."""
    return len(set(o.seeds)) >= SEEDS and o.prompts >= PROMPTS and not o.choosing


def is_accurate(means: list[float]) -> bool:
    """Return whether the accuracies of the seeds are a record's."""
    return statistics.mean(means) >= MEAN and min(means) >= LEAST


def store(o: Options, measured: Measured) -> Path:
    """Write the record and its logs, and return the record's file."""
    folder = Path(o.records) / o.name
    folder.mkdir(parents=True, exist_ok=True)
    for name, log in measured.logs.items():
        shutil.copy(log, folder / name)
    write_text(folder / "record.json", json.dumps(measured.record, indent=2) + "\n")
    return folder / "record.json"


def digest(folder: Path) -> str:
    """Return the SHA-256 of a model's weights."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: must be a folder with safetensors weights")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def digests_of(o: Options, before: Mapping[str, Any] | None, *parts: str) -> dict[str, str]:
    """Return the digests of the networks that are fixed. Raises UserError if the record before had others."""
    found = {name: digest(Path(getattr(o, name))) for name in parts}
    if before is not None and before["digests"] != found:
        raise UserError(f"--before {o.before}: was measured with another {' or '.join(parts).replace('_', ' ')}")
    return found


def read_record(path: Path, track: str = "") -> dict[str, Any]:
    """Read a record.json, of this track if one is given. Raises UserError for another file."""
    try:
        found = read_json(path)
        for name in ("name", "track", "config", "settings"):
            if not isinstance(found[name], str):
                raise TypeError
        int(found["steps"]), int(found["prompts"]["count"]), bool(found["valid"]), str(found["machine"]["date"])
        float(found["cpu_seconds"]["training"]), float(found["accuracy"]["mean"]), dict(found["digests"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: must be a record.json of this program ({type(error).__name__})") from None
    if track and found["track"] != track:
        raise UserError(f"{path}: is a record of the track {found['track']}; must be one of {track}")
    return found


def table(records: Path) -> str:
    """Return the records as a Markdown table, ordered by track and date. Of peers, those that fail the rule too."""
    found = [read_record(path) for path in sorted(records.glob("*/record.json"))]
    found = [r for r in found if r["valid"] or r["track"] == "peer"]
    if not found:
        return "No record yet."
    lines = ["| track | record | steps | CPU seconds | against | accuracy, least seed | date | commit |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    lines += [_row(r) for r in sorted(found, key=lambda r: (r["track"], r["machine"]["date"]))]
    return "\n".join(lines)


def _row(r: Mapping[str, Any]) -> str:
    steps = f"{r['steps']:,}" if r["steps"] else ""
    ratio = f"{r['before']['ratio']:.2f} × {r['before']['name']}" if r["before"] else ""
    score = f"{r['accuracy']['mean']:.3f}, {r['accuracy']['least']:.3f}"
    score += "" if r["valid"] else " (fails the rule)"
    score += f"; {r['psnr']['least']:.1f} dB" if "psnr" in r else ""
    date, commit = r["machine"]["date"][:10], str(r["machine"]["commit"])[:8]
    seconds = f"{r['cpu_seconds']['training']:.0f}"
    return f"| {r['track']} | {r['name']} | {steps} | {seconds} | {ratio} | {score} | {date} | {commit} |"
