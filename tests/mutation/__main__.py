"""Measure the share of small faults in the code that the fast tests notice.

    python -m tests.mutation                     # all test files' coverage, then all mutants of the sample
    python -m tests.mutation --survivors         # repeat the trials of those that no test noticed
    python -m tests.mutation --seed 2 --sample 100

Results are appended to FOLDER/results-SEED.jsonl as they come; an interrupted run continues.
"""

import argparse
import gc
import json
import os
import re
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from tests.mutation.covered import Coverage, record, uses_of_names
from tests.mutation.mutants import Mutant, mutants_of
from tests.mutation.trials import Job, import_libraries, try_mutant

SCOPE = (
    "ldm",
    "autoencoder",
    "train/stages",
    "train/engine/ema.py",
    "train/engine/optim.py",
    "conditioning/contrastive.py",
    "conditioning/token_tasks.py",
)
"""The mathematics, and the stages with the losses, averages and optimizers that they use."""
SEED, SAMPLE = 20261127, 420
WALL = 900.0
"""Longest trial in seconds of real time, in case a test waits for something that never comes."""


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/mutation"), help="folder of the results")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the sample (%(default)s)")
    parser.add_argument("--sample", type=int, default=SAMPLE, help="number of mutants (%(default)s)")
    parser.add_argument("--only", default="", help="regular expression: only mutants whose names match")
    parser.add_argument("--survivors", action="store_true", help="repeat the trials of the mutants that survived")
    parser.add_argument("--workers", type=int, default=2, help="number of processes (%(default)s)")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no trial after this time")
    parser.add_argument("--tests", type=int, default=400, help="largest number of tests for a mutant (%(default)s)")
    parser.add_argument("--budget", type=float, default=60.0, help="CPU seconds of a mutant's tests (%(default)s)")
    parser.add_argument("--coverage", help="regular expression: only measure the test files that match; no trials")
    parser.add_argument("--measured", action="store_true", help="use only the test files measured before")
    parser.add_argument("--summary", action="store_true", help="only print the results so far")
    return parser.parse_args()


def main() -> None:
    how = options()
    end = time.monotonic() + 60 * how.minutes
    files = sorted(str(p) for s in SCOPE for p in ([Path(s)] if s.endswith(".py") else Path(s).rglob("*.py")))
    mutants = [m for file in files for m in mutants_of(file, Path(file).read_text())]
    sample = sorted(mutants, key=lambda m: m.rank(how.seed))[: how.sample]
    results = Results(how.folder / f"results-{how.seed}.jsonl")
    if how.summary:
        results.print(sample, len(mutants))
        return
    os.environ.update(OMP_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", HF_HUB_OFFLINE="1")
    import_libraries(how.folder)
    gc.collect()
    gc.freeze()  # forks share the memory
    measured = Coverage(how.folder / "coverage")
    missing = [p for p in measured.missing() if re.search(how.coverage or "", p.name) and not how.measured]
    work = {str(p): (lambda p=p: _measure(p, files, measured.folder)) for p in missing}
    _work(work, how.workers, end, lambda name, found: print(f"measured {name}: {found}", flush=True))
    if how.coverage is not None:
        return
    measured.load()
    uses = uses_of_names(files)
    todo = [m for m in sample if re.search(how.only, m.name) and results.is_due(m, how.survivors)]
    chosen = {m.name: measured.choose(m, uses, how.budget, how.tests) for m in todo}
    trials = {m.name: (lambda m=m: try_mutant(m, chosen[m.name], measured)) for m in todo}
    by_name = {m.name: m for m in todo}

    def finish(name: str, found: Any) -> None:
        outcome = {"outcome": found} if isinstance(found, str) else found
        results.add(by_name[name], outcome, len(chosen[name]))

    _work(trials, how.workers, end, finish)
    results.print(sample, len(mutants))


def _measure(path: Path, files: list[str], folder: Path) -> str:
    stored = record(path, files, folder)
    return f"{len(stored['tests'])} tests, {stored['wall']} s"


def _work(work: dict[str, Any], workers: int, end: float, finish: Any) -> None:
    """Run functions in forks, at most `workers` at a time, until the time `end`."""
    waiting, running = list(work.items()), dict[str, tuple[Job, float]]()
    try:
        while running or (waiting and time.monotonic() < end):
            while waiting and len(running) < workers and time.monotonic() < end:
                name, function = waiting.pop(0)
                running[name] = (Job.start(function), time.monotonic() + WALL)
            for name, (job, limit) in list(running.items()):
                if job.receiver.poll(0.05) or not job.process.is_alive() or time.monotonic() > limit:
                    del running[name]
                    finish(name, job.end(1))
    finally:
        for job, _ in running.values():
            job.end(0)


class Results:
    """The outcomes of trials, one line of JSON each; later lines replace earlier ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.found: dict[str, dict[str, Any]] = {r["mutant"]: r for r in map(json.loads, lines)}

    def is_due(self, mutant: Mutant, survivors: bool) -> bool:
        """Whether a mutant has no result for this source of its function, or survived and is to be repeated."""
        found = self.found.get(mutant.name)
        if found is None or found["digest"] != mutant.digest:
            return True
        return survivors and found["outcome"] == "survived"

    def add(self, mutant: Mutant, outcome: dict[str, Any], tests: int) -> None:
        found = {"mutant": mutant.name, "digest": mutant.digest, "tests": tests, **outcome}
        self.found[mutant.name] = found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(found, ensure_ascii=False) + "\n")
        print(
            f"{found['outcome']:9}{found.get('seconds', 0):6.1f} s  {mutant.name}  {found.get('test', '')}", flush=True
        )

    def print(self, sample: list[Mutant], total: int) -> None:
        """Print the score by file and the survivors."""
        by_file = defaultdict[str, Counter[str]](Counter)
        survivors = []
        for mutant in sample:
            outcome = self.found.get(mutant.name, {"outcome": "untested"})["outcome"]
            by_file[mutant.file][outcome] += 1
            if outcome == "survived":
                survivors.append(mutant)
        for mutant in sorted(survivors, key=lambda m: m.name):
            print(f"survived: {mutant.name} (line {mutant.lines[0][0]}, {self.found[mutant.name]['tests']} tests)")
        for file, counts in [*sorted(by_file.items()), ("all", sum(by_file.values(), Counter()))]:
            tried = counts.total() - counts["untested"]
            killed = tried - counts["survived"]
            score = killed / tried if tried else float("nan")
            print(f"{file:45}{counts['untested']:5} untested {tried:5} tried {killed:5} noticed {score:8.3f}")
        print(f"{len(sample)} of {total} mutants")


if __name__ == "__main__":
    main()
