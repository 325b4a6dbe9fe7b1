"""Trials of mutants: the tests run in a process that imports the mutated source.

Each trial is a fork of a process that has imported the libraries, but none of the project's packages. The checkout
isn't changed.
"""

import contextlib
import importlib.machinery
import importlib.util
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

from tests.mutation.covered import PYTEST, Case, Coverage, cpu_seconds
from tests.mutation.mutants import Mutant, mutated

OURS = {"ldm", "autoencoder", "conditioning", "train", "tests", "support", "conftest", "mutation", "scripts"}
FIRST = 4
"""Number of tests that run before the others are collected."""
SLOWER, GRACE = 10.0, 20.0
"""A test that needs more than SLOWER times its CPU time and GRACE seconds counts as an infinite loop."""
MEMORY = 24 << 30
"""Limit of a trial's address space in bytes."""
_FORK = multiprocessing.get_context("fork")


class MutatedLoader(importlib.machinery.SourceFileLoader):
    """Loader that compiles a mutant in place of its file."""

    index = 0

    def get_code(self, fullname: str) -> CodeType:
        path = Path(self.get_filename(fullname))
        return compile(mutated(path.read_text(), self.index), str(path), "exec", dont_inherit=True)


class Finder:
    """Finder of a mutant's module."""

    def __init__(self, mutant: Mutant) -> None:
        self.path, self.index = str(Path(mutant.file).resolve()), mutant.index

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name.partition(".")[0] not in OURS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin == self.path:
            spec.loader = MutatedLoader(name, self.path)
            spec.loader.index = self.index
        return spec


class Chosen:
    """Plugin of pytest that runs chosen tests, in their order by file, each with a limit of CPU time."""

    def __init__(self, tests: Sequence[Case], coverage: Coverage) -> None:
        files = list(dict.fromkeys(t.name.partition("::")[0] for t in tests))
        self.order = {t.name: (files.index(t.name.partition("::")[0]), k) for k, t in enumerate(tests)}
        self.limit = {t.name: SLOWER * coverage.cost(t) + GRACE for t in tests}
        self.files = files
        self.failed = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        signal.setitimer(signal.ITIMER_PROF, self.limit[item.nodeid])  # ends the process
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid


def try_mutant(mutant: Mutant | None, tests: Sequence[Case], coverage: Coverage) -> dict[str, Any]:
    """Run tests in this process until one fails. Returns the outcome, the test that failed, and the CPU seconds."""
    begin = cpu_seconds()
    if mutant is not None:
        sys.meta_path.insert(0, Finder(mutant))
    for part in (tests[:FIRST], tests[FIRST:]):
        chosen = Chosen(part, coverage)
        if part:
            signal.setitimer(signal.ITIMER_PROF, 2 * GRACE)  # for the imports
            status = pytest.main([*PYTEST, "-x", *chosen.files], plugins=[chosen])
            signal.setitimer(signal.ITIMER_PROF, 0)
            if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                return {"outcome": "killed", "test": chosen.failed, "seconds": round(cpu_seconds() - begin, 1)}
    return {"outcome": "survived", "test": "", "seconds": round(cpu_seconds() - begin, 1)}


@dataclass
class Job:
    """A function that runs in a fork of this process."""

    process: Any
    receiver: Connection
    folder: str

    @classmethod
    def start(cls, function: Callable[[], Any]) -> "Job":
        receiver, sender = _FORK.Pipe(duplex=False)
        folder = tempfile.mkdtemp(prefix="mutation-")
        process = _FORK.Process(target=_run, args=(function, sender, folder))
        process.start()
        sender.close()
        return cls(process, receiver, folder)

    def end(self, timeout: float) -> Any:
        """Return the function's result, or "timeout" or "crashed"; end the processes that it left behind."""
        result = "timeout"
        with contextlib.suppress(EOFError):
            if self.receiver.poll(timeout):
                result = json.loads(self.receiver.recv_bytes())
                self.process.join(timeout)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        if self.process.exitcode == 1:
            raise RuntimeError(result)
        if self.process.exitcode not in (0, -signal.SIGKILL, -signal.SIGPROF):
            result = "crashed"
        self.receiver.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return result


def _run(function: Callable[[], Any], sender: Connection, folder: str) -> None:
    os.setpgid(0, 0)
    os.environ.update(TMPDIR=folder, HYPOTHESIS_STORAGE_DIRECTORY=f"{folder}/hypothesis")
    tempfile.tempdir = None
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(f"{folder}/output", "w") as output:
        for number in (1, 2):
            os.dup2(output.fileno(), number)
    _hypothesis()
    try:
        result, status = function(), 0
    except BaseException:
        result, status = traceback.format_exc(), 1
    sender.send_bytes(json.dumps(result).encode())
    os._exit(status)


def _hypothesis() -> None:
    import hypothesis

    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]  # the smallest counterexample isn't needed
    hypothesis.settings.register_profile("mutation", phases=phases, derandomize=True, database=None, deadline=None)
    hypothesis.settings.load_profile("mutation")


def import_libraries(cache: Path) -> None:
    """Import the libraries that the tests import, so that forks have them."""
    stored = cache / "libraries.json"
    if not stored.exists():
        stored.parent.mkdir(parents=True, exist_ok=True)
        names = Job.start(_libraries).end(300)
        stored.write_text(json.dumps(names or []))
    for name in json.loads(stored.read_text()):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _libraries() -> list[str]:
    pytest.main([*PYTEST, "--collect-only", "tests"])
    return [n for n in sys.modules if n.partition(".")[0] not in {*OURS, "triton"} and not n.startswith("test_")]
