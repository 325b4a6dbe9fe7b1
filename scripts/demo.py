"""Run the whole pipeline on a CPU, offline: the Shapes dataset, stages 0, 1 and 2, then a report and a sample sheet.

It runs the commands that a user would type, and prints each. After an interruption it continues where it stopped.
"""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import RunError
from train.commands.main import command
from train.config.load import overlay
from train.data.store.atomic import atomic_folder

RUNS = Path("runs/demo")
DATA = "data/shapes"
STAGES = {
    "data": f"scripts/make_dataset.py shapes --out {DATA} --size 32 --train 20000 --test 1000 --seed 0",
    "clip": f"scripts/train_clip.py configs/shapes/clip.yaml --data {DATA} --out {RUNS}/clip",
    "vae": f"scripts/train_vae.py configs/shapes/vae.yaml --data {DATA} --out {RUNS}/vae",
    "ldm": f"scripts/train_ldm.py configs/shapes/ldm.yaml --data {DATA} --vae {RUNS}/vae/model "
    f"--text-encoder {RUNS}/clip/model --out {RUNS}/ldm",
    "evaluate": f"scripts/evaluate.py --model {RUNS}/ldm/model --data {DATA} --split test --out {RUNS}/report "
    "--samples 256 --seeds 4 --precision bf16",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run the whole pipeline on a CPU, offline: make the dataset Shapes, train the three stages, and evaluate.

    There are no options. Everything is written to runs/demo and data/shapes, in the current folder. After an
    interruption, the same command continues.
    """


@command
def main() -> None:
    overlay(Options, Options())
    RUNS.mkdir(parents=True, exist_ok=True)
    clock = RUNS / "seconds.json"  # an interrupted stage adds up the time of all calls
    seconds = json.loads(clock.read_text(encoding="utf-8")) if clock.is_file() else {}
    for stage, line in STAGES.items():
        print(f"\n$ python {line}", flush=True)
        started = time.perf_counter()
        status = subprocess.run([sys.executable, *line.split()]).returncode
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started
        clock.write_text(json.dumps(seconds), encoding="utf-8")
        if status:
            raise RunError(f"{stage} ended with status {status}; run `make demo` again to continue from there")
    with atomic_folder(RUNS / "model") as folder:
        shutil.copytree(RUNS / "ldm" / "model", folder, dirs_exist_ok=True)
    shutil.copy(RUNS / "report" / "samples.png", RUNS / "samples.png")
    measured = json.loads((RUNS / "report" / "report.json").read_text(encoding="utf-8"))
    rounded = {stage: round(s, 1) for stage, s in seconds.items()}
    report = {"seconds": rounded | {"total": round(sum(seconds.values()), 1)}} | measured
    (RUNS / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    from train.evaluation.report import Model, write_report  # imports torch, which --help and errors don't need

    page = Model(f"{RUNS}/model", report, RUNS / "report")
    write_report([page], RUNS / "report.html", "The demo's model")
    print(
        f"\nFinished in {report['seconds']['total'] / 60:.1f} minutes. "
        f"Results: {RUNS}/report.html, {RUNS}/samples.png, {RUNS}/report.json."
    )
    print(f'Next: python scripts/txt2img.py --model {RUNS}/model --prompt "a large red star on a black background"')


if __name__ == "__main__":
    main()
