"""The tests that execute a mutant's lines, found by one run of the tests under `coverage`."""

import ast
import contextlib
import hashlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import coverage
import pytest

from tests.mutation.mutants import Mutant, functions_by_line

Lines = dict[str, list[int]]
"""Executed lines of each function, "FILE:FUNCTION", counted from the function's first line."""


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has started."""
    return sum(os.times()[:4])


@dataclass
class Case:
    """A test, as it ran without a mutant."""

    name: str
    seconds: float
    """CPU time without its shared fixtures."""
    fixtures: list[str]
    """Shared fixtures that it uses."""
    lines: Lines


@dataclass
class Fixture:
    """A fixture that several tests share."""

    seconds: float
    lines: Lines


class Recorder:
    """Plugin of pytest that measures each test and shared fixture: its CPU time, and the lines that it executes."""

    def __init__(self, files: list[str]) -> None:
        self.files = files
        self.coverage = coverage.Coverage(data_file=None, include=files, messages=False, config_file=False)
        self.tests: dict[str, dict[str, Any]] = {}
        self.fixtures: dict[str, float] = {}
        self.context, self.shared = "", 0.0

    @contextlib.contextmanager
    def _within(self, context: str) -> Iterator[None]:
        previous, self.context = self.context, context
        self.coverage.switch_context(context)
        yield
        self.context = previous
        self.coverage.switch_context(previous)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        definitions = item._fixtureinfo.name2fixturedefs
        shared = [d[-1] for d in definitions.values() if d[-1].scope != "function"]
        self.tests[item.nodeid] = {"passed": False, "fixtures": [_name(d) for d in shared]}
        begin, self.shared = cpu_seconds(), 0.0
        with self._within(f"test {item.nodeid}"):
            result = yield
        self.tests[item.nodeid]["seconds"] = round(cpu_seconds() - begin - self.shared, 3)
        return result

    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        definitions = item._request._fixture_defs.values()  # with those that the test asked for itself
        used = {_name(d) for d in definitions if d.scope != "function"}
        self.tests[item.nodeid]["fixtures"] = sorted(used | set(self.tests[item.nodeid]["fixtures"]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.tests[report.nodeid]["passed"] = report.passed
        elif report.failed:
            self.tests[report.nodeid]["passed"] = False

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[Any]:
        if fixturedef.scope == "function":
            return (yield)
        begin, before = cpu_seconds(), self.shared
        with self._within(f"fixture {_name(fixturedef)}"):
            result = yield
        own = cpu_seconds() - begin - (self.shared - before)
        self.fixtures[_name(fixturedef)] = round(own, 3)
        self.shared += own
        return result

    def result(self) -> dict[str, Any]:
        """Return the measurements as they are stored."""
        data, lines = self.coverage.get_data(), defaultdict[str, dict[str, list[int]]](lambda: defaultdict(list))
        for path in data.measured_files():
            file = os.path.relpath(path)
            functions = functions_by_line(Path(path).read_text())
            for line, contexts in data.contexts_by_lineno(path).items():
                if line in functions:
                    function, first = functions[line]
                    for context in contexts:
                        lines[context][f"{file}:{function}"].append(line - first)
        return {
            "tests": {
                name: {"seconds": t["seconds"], "fixtures": t["fixtures"], "lines": lines[f"test {name}"]}
                for name, t in self.tests.items()
                if t["passed"]
            },
            "fixtures": {
                name: {"seconds": seconds, "lines": lines[f"fixture {name}"]} for name, seconds in self.fixtures.items()
            },
        }


def _name(fixturedef: Any) -> str:
    return f"{fixturedef.baseid}::{fixturedef.argname}"


def digest(path: Path) -> str:
    """Return the hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@dataclass
class Coverage:
    """The stored measurements of all test files."""

    folder: Path
    tests: list[Case] = field(default_factory=list)
    fixtures: dict[str, Fixture] = field(default_factory=dict)

    def load(self) -> None:
        """Read the measurements."""
        for path in sorted(self.folder.glob("test_*.json")):
            stored = json.loads(path.read_text())
            if Path("tests", f"{path.stem}.py").exists():
                self.tests += [Case(name=name, **t) for name, t in stored["tests"].items()]
                self.fixtures |= {name: Fixture(**f) for name, f in stored["fixtures"].items()}

    def missing(self) -> list[Path]:
        """Return the test files without measurements."""
        found = []
        for path in sorted(Path("tests").glob("test_*.py")):
            stored = self.folder / f"{path.stem}.json"
            if not stored.exists() or json.loads(stored.read_text())["digest"] != digest(path):
                found.append(path)
        return found

    @cached_property
    def by_function(self) -> dict[str, list[Case]]:
        """Tests by the functions that they execute."""
        found = defaultdict(list)
        for test in self.tests:
            for function in test.lines:
                found[function].append(test)
        return found

    @cached_property
    def by_fixture(self) -> dict[str, list[Case]]:
        """Tests by the functions that only their shared fixtures execute."""
        found = defaultdict(list)
        for test in self.tests:
            for function in {f for name in test.fixtures for f in self._fixture(name).lines} - set(test.lines):
                found[function].append(test)
        return found

    def choose(self, mutant: Mutant, uses: dict[str, set[str]], budget: float, count: int) -> list[Case]:
        """Return the tests of a mutant, best first: at most `count`, of `budget` CPU seconds together.

        The best ones are quick and execute few lines besides the mutant's. Tests of the same function that differ in
        their parameters alone come later than a single one. uses: the functions that use each name.
        """
        direct, indirect = self._candidates(mutant, uses)
        chosen, total, paid = [], 0.0, set[str]()
        for test in [*self._ordered(direct), *self._ordered(indirect)]:
            new = set(test.fixtures) - paid
            cost = test.seconds + sum(self._fixture(name).seconds for name in new)
            if len(chosen) < count and total + cost <= budget:
                chosen.append(test)
                total, paid = total + cost, paid | new
        return chosen

    def cost(self, test: Case) -> float:
        """Return the CPU seconds of a test with its fixtures."""
        return test.seconds + sum(self._fixture(name).seconds for name in test.fixtures)

    def _fixture(self, name: str) -> Fixture:
        return self.fixtures.get(name) or Fixture(0.0, {})

    def _candidates(self, mutant: Mutant, uses: dict[str, set[str]]) -> tuple[list[Case], list[Case]]:
        function = f"{mutant.file}:{mutant.function}"
        if mutant.names:
            functions = {function} | {f for name in mutant.names for f in uses.get(name, ())}
            found = {t.name: t for f in sorted(functions) for t in self.by_function.get(f, ())}
            later = {t.name: t for f in sorted(functions) for t in self.by_fixture.get(f, ())}
            return list(found.values()), [t for t in later.values() if t.name not in found]
        _, first = functions_by_line(Path(mutant.file).read_text()).get(mutant.lines[1][0], ("", 0))
        tests, later = self.by_function.get(function, []), self.by_fixture.get(function, [])
        for start, end in mutant.lines:
            exact = [t for t in tests if any(start <= first + n <= end for n in t.lines[function])]
            if exact:
                return exact, later
        return tests, later

    def _ordered(self, tests: list[Case]) -> list[Case]:
        """Order tests by CPU time and by the number of lines that they execute."""
        key = {t.name: (0.05 + self.cost(t)) * sum(map(len, t.lines.values())) for t in tests}
        seen, keys = Counter[str](), {}
        for test in sorted(tests, key=lambda t: key[t.name]):
            same = test.name.partition("[")[0]
            keys[test.name] = key[test.name] * (1 + seen[same])
            seen[same] += 1
        return sorted(tests, key=lambda t: keys[t.name])


def uses_of_names(files: list[str]) -> dict[str, set[str]]:
    """Return the functions, "FILE:FUNCTION", in which each name or attribute occurs."""
    found = defaultdict[str, set[str]](set)
    for file in files:
        source = Path(file).read_text()
        functions = functions_by_line(source)
        for node in ast.walk(ast.parse(source)):
            name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)
            if isinstance(name, str) and (line := functions.get(getattr(node, "lineno", 0))):
                found[name].add(f"{file}:{line[0]}")
        for function, _ in functions.values():
            found[function.rpartition(".")[2]].add(f"{file}:{function}")
            if "." in function:
                found[function.rpartition(".")[0].rpartition(".")[2]].add(f"{file}:{function}")
    return found


def record(test_file: Path, files: list[str], folder: Path) -> dict[str, Any]:
    """Run a test file's fast tests in this process, and store their measurements. Returns what is stored."""
    begin = time.monotonic()
    recorder = Recorder([str(Path(file).resolve()) for file in files])
    recorder.coverage.start()
    pytest.main([*PYTEST, "-m", "not slow", str(test_file)], plugins=[recorder])
    recorder.coverage.stop()
    stored = {"digest": digest(test_file), "wall": round(time.monotonic() - begin, 1), **recorder.result()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{test_file.stem}.json").write_text(json.dumps(stored))
    return stored


PYTEST = ["-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly"]
