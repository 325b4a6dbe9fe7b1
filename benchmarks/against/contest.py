"""The parent's side of a comparison: start one process per contestant, and let them take turns."""

import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldm.errors import one_line

FOLDER = Path(__file__).parent
_MEASURING = 0.3  # share of a row's time that is left for the calls after all warm-ups


@dataclass(frozen=True)
class Contestant:
    """One program that takes part in a row."""

    name: str
    program: str
    """File in this folder."""
    spec: dict[str, Any]
    """What the program is asked to do."""
    python: str = sys.executable
    exact: bool = True
    """Whether it does the same computation as the others, except for rounding."""

    def command(self) -> list[str]:
        return [self.python, str(FOLDER / self.program), json.dumps(self.spec)]

    def environment(self) -> dict[str, str]:
        """Return this process's environment, with the paths of the modules that the program imports."""
        own = self.python == sys.executable  # another Python has its own packages
        paths = [str(FOLDER.parent), *([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")] if own else [])]
        fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


@dataclass(frozen=True)
class Row:
    """One comparison."""

    name: str
    what: str
    """Description in the table."""
    contestants: Sequence[Contestant]
    calls: int = 1
    """Number of calls per turn."""
    reference: Contestant | None = None
    """fp32 contestant; the error of the others' output to its output is reported."""
    together: bool = True
    """Whether all processes exist at the same time and take turns; otherwise one is measured after the other."""
    base: str = "diffusers"
    """Name of the contestant that the others are compared with."""
    proof: Callable[[], dict[str, list[float]]] | None = None
    """Returns losses that show that a contestant does what another does."""


class Failed(Exception):
    """A contestant's process ended, or didn't answer in time."""


class Child:
    """A contestant's process; deadlines are times of `time.monotonic`."""

    def __init__(self, contestant: Contestant, folder: Path, variables: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.log = contestant.name, folder / f"{_file_name(contestant.name)}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                contestant.command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**contestant.environment(), **variables},
            )

    def first_answer(self, deadline: float) -> dict[str, Any]:
        """Wait until the program is loaded, and return what it says of itself. Raises Failed."""
        return self._answer(deadline)

    def ask(self, deadline: float, **request: object) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise Failed(self._last_line()) from None
        return self._answer(deadline)

    def _answer(self, deadline: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        left = max(0.0, deadline - time.monotonic())
        if not select.select([self.process.stdout], [], [], left)[0]:
            raise Failed("no time left")
        line = self.process.stdout.readline()
        if not line:
            raise Failed(self._last_line())
        return json.loads(line)

    def _last_line(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return one_line(lines[-1] if lines else f"ended with status {self.process.returncode}", 200)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def run(
    row: Row, folder: Path, seconds: float, repeats: int, variables: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Measure a row's contestants and return their results by name. A failure is a result too.

    variables: environment variables of the processes. seconds: time limit. repeats: most turns.
    """
    started = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    reference, count = _reference(row, folder, variables, started + seconds * (1 - _MEASURING))
    groups = [list(row.contestants)] if row.together else [[c] for c in row.contestants]
    for k, group in enumerate(groups, 1):
        end = started + seconds * (k / len(groups) if len(groups) > 1 else 1)
        now = time.monotonic()
        children = _start(group, folder, variables, now + (end - now) * (1 - _MEASURING), results)
        _take_turns(children, row.calls, repeats, end, results)
        for child in children:
            result = results[child.name]
            if reference is not None and "wall" in result:
                result["difference"] = _difference(child, folder, reference, end + 30)
            child.end()
    for result in results.values():
        if "wall" in result and count:
            result["gigaflops"] = count
    return results


def _start(
    group: Sequence[Contestant], folder: Path, variables: Mapping[str, str], deadline: float, results: dict[str, Any]
) -> list[Child]:
    """Start the processes of a group, and let each make its first two turns alone.

    On a GPU, which has enough processor cores beside it, all programs are loaded at the same time.
    """
    children = []
    loading = {c.name: Child(c, folder, variables) for c in group} if torch.cuda.is_available() else {}
    for contestant in group:
        child = loading.get(contestant.name) or Child(contestant, folder, variables)
        try:
            prepared = child.first_answer(deadline).get("prepared") or 0.0
            first, second = (child.ask(deadline, do="calls", n=1)["wall"] for _ in range(2))
            child.ask(deadline, do="forget memory")
            results[child.name] = {"first": prepared + first, "second": second, "walls": [], "cpus": []}
            children.append(child)
        except Failed as error:
            results[contestant.name] = {"failed": str(error)}
            child.end()
        results[contestant.name]["exact"] = contestant.exact
    return children


def _take_turns(children: list[Child], calls: int, repeats: int, end: float, results: dict[str, Any]) -> None:
    """Let the processes make calls in turn, A B A B, until all have made `repeats` turns or the time is over."""
    for k in range(repeats):
        last = sum(calls * sum(results[child.name]["walls"][-1:]) for child in children)
        if k and time.monotonic() + last > end:
            break
        for child in children:
            try:
                took = child.ask(end + 60, do="calls", n=calls)
            except Failed as error:
                results[child.name]["failed"] = str(error)
                continue
            results[child.name]["walls"].append(took["wall"])
            results[child.name]["cpus"].append(took["cpu"])
    for child in children:
        result = results[child.name]
        walls, cpus = result.pop("walls"), result.pop("cpus")
        if walls and "failed" not in result:
            for name, values in (("wall", walls), ("cpu", cpus)):
                result[name] = statistics.median(values)
                result[f"{name} from"], result[f"{name} to"] = min(values), max(values)
            result["turns"] = len(walls)
            result["compile"] = max(0.0, result["first"] + result["second"] - 2 * result["wall"])
            result["MiB"] = child.ask(end + 60, do="memory")["memory"]


def _reference(
    row: Row, folder: Path, variables: Mapping[str, str], deadline: float
) -> tuple[np.ndarray | None, float | None]:
    """Return the output of the fp32 reference, and the floating-point operations of its call in 10⁹."""
    if row.reference is None:
        return None, None
    child = Child(row.reference, folder, variables)
    try:
        count = child.first_answer(deadline).get("gigaflops")
        return _output(child, folder, deadline), count
    except Failed as error:
        print(f"{row.name}: no reference: {error}", file=sys.stderr)
        return None, None
    finally:
        child.end()


def _output(child: Child, folder: Path, deadline: float) -> np.ndarray | None:
    path = folder / f"{_file_name(child.name)}.npy"
    try:
        child.ask(deadline, do="save", path=str(path))
        return np.load(path).astype(np.float64)
    except Failed:
        return None
    finally:
        path.unlink(missing_ok=True)


def _difference(child: Child, folder: Path, reference: np.ndarray, deadline: float) -> float | None:
    """Return the root mean square difference to the reference, relative to the reference."""
    output = _output(child, folder, deadline)
    return None if output is None else float(np.linalg.norm(output - reference) / np.linalg.norm(reference))


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
