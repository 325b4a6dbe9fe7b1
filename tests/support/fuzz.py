"""Fuzzing: read changed copies of valid files for a while, and keep each that gives another error than ours.

A parser passes an input if it reads it, or raises UserError or RunError, within limits on time and memory. Inputs that
failed are stored in tests/fuzz/corpus/PARSER/, from where `replay` reads them in every test run:

    TARGET = Target("manifest", {"manifest.json": [content]}, read)   # read(name, content) reads the changed file

    @pytest.mark.parametrize("kept", TARGET.kept(), ids=lambda path: path.name)
    def test_found_inputs(kept): TARGET.replay(kept)

    @pytest.mark.slow
    def test_fuzz(): TARGET.fuzz()   # FUZZ_SECONDS per parser (default 60), FUZZ_SEED (default 0)
"""

import copy
import hashlib
import json
import os
import re
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import yaml

from ldm.errors import RunError, UserError
from support import ROOT

CORPUS = ROOT / "tests/fuzz/corpus"
WEIRD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e308, 1e-320),
    *(float("inf"), float("nan"), "", " ", "0", "-1", "1e999", "nan", "null", "\x00", "\x1b[31m", "\u202e", "\ud800"),
    *("../../etc/passwd", "/dev/zero", "a" * 5000, "9" * 5000, "{0..9999999999}", "é\u0301", "2001-99-99"),
    *([], {}, [[]], [None], [1, "x"], {"": 0}, {"a": {"b": []}}, [0] * 1000),
)
"""Values with which the parts of a tree are replaced."""
FRAGMENTS: tuple[bytes, ...] = (
    *(b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"\x1b[2J", b"\xc3", b'"', b"{", b"}", b"[" * 3000, b"]"),
    *(b"{" * 3000, b",", b":", b"- ", b"? ", b"!!int x", b"!!set [1]", b"!!python/name:os.system", b"*a", b"&a "),
    *(b"2001-99-99", b"9" * 5000, b"-", b".", b"e", b"1e999", b"NaN", b"Infinity", b"\\ud800", b"%YAML 9.9\n---\n"),
    *(b"&a [x,x,x]\n", b"&b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\n", b"<<: *a\n", b"0x", b"1:2:3", b"!!binary x", b"| \n"),
    *(b"!!timestamp x", b"...\n", b"\t"),
)
"""Pieces of text that are inserted into a file."""
_CPU_SECONDS, _SECONDS, _MEMORY = 10.0, 120.0, 4 * 2**30

Mutation = Callable[[Random, bytes], bytes]


class TooSlow(BaseException):
    """An input took longer than the limit. Not an Exception, so that no parser catches it."""


@dataclass(frozen=True)
class Target:
    """A parser to fuzz."""

    name: str
    """Name of its folder in the corpus."""
    seeds: Mapping[str, Sequence[bytes]]
    """Valid contents by file name; one file is changed at a time. The name's ending selects the mutations."""
    read: Callable[[str, bytes], object]
    """Function that reads this content as the file of this name, beside valid other files."""
    mutations: Mapping[str, Sequence[Mutation]] | None = None
    """Further mutations by file name, each as likely as the ones below."""

    def kept(self) -> list[Path]:
        """Return the stored inputs, each named DIGEST-NAME."""
        return sorted((CORPUS / self.name).glob("*-*"))

    def replay(self, kept: Path) -> None:
        """Read a stored input; another error than ours is raised."""
        self.check(kept.name.partition("-")[2], kept.read_bytes())

    def check(self, name: str, content: bytes) -> bool:
        """Return whether the content was accepted rather than refused. Raises any other error, and TooSlow."""
        with _limits():
            try:
                self.read(name, content)
            except (UserError, RunError):
                return False
        return True

    def fuzz(self) -> None:
        """Read changed inputs for FUZZ_SECONDS. Raises AssertionError with one line per kind of failure."""
        seconds, seed = float(os.environ.get("FUZZ_SECONDS", "60")), int(os.environ.get("FUZZ_SEED", "0"))
        random, found, counts = Random(f"{self.name}:{seed}"), {}, [0, 0]
        end = time.monotonic() + seconds
        for name, contents in self.seeds.items():
            for content in contents:
                assert self.check(name, content), f"{self.name}: the valid {name} is refused"
        while time.monotonic() < end:
            name = random.choice(list(self.seeds))
            content = random.choice(self.seeds[name])
            for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
                content = random.choice(self._mutations(name))(random, content)
            try:
                counts[self.check(name, content)] += 1
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # also TooSlow and SystemExit
                if (where := _where(error)) not in found:
                    found[where] = self._keep(name, content)
                    print(f"{self.name}: {where}: {found[where]}", flush=True)
        print(f"{self.name}: refused {counts[0]}, accepted {counts[1]}, kinds of failures {len(found)}", flush=True)
        assert not found, "\n".join(f"{where}: {path}" for where, path in found.items())

    def _mutations(self, name: str) -> Sequence[Mutation]:
        tree = {".json": change_json, ".jsonl": change_json_line, ".yaml": change_yaml}.get(Path(name).suffix)
        return [change_bytes, *(2 * [tree] if tree else ()), *(self.mutations or {}).get(name, ())]

    def _keep(self, name: str, content: bytes) -> Path:
        path = CORPUS / self.name / f"{hashlib.sha256(content).hexdigest()[:12]}-{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path


@contextmanager
def _limits() -> Iterator[None]:
    """Limit CPU time, time and memory of the code inside. Raises TooSlow, or MemoryError."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"signal {number}")

    before = {s: signal.signal(s, stop) for s in (signal.SIGPROF, signal.SIGALRM)}
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MEMORY, memory[1]))
    signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, memory)
        for number, handler in before.items():
            signal.signal(number, handler)


def _where(error: BaseException) -> str:
    """Return the kind of a failure: the error's class and the last line of this project that it passed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT))]
    own = [f for f in frames if "/tests/" not in f.filename and "/.venv/" not in f.filename] or frames
    if not own:
        return type(error).__name__
    return f"{type(error).__name__} in {Path(own[-1].filename).relative_to(ROOT)}:{own[-1].name}"


# -- mutations --


def change_bytes(random: Random, content: bytes) -> bytes:
    """Flip, remove, repeat or insert bytes, or cut the end."""
    a, b = sorted(random.randint(0, len(content)) for _ in range(2))
    b = min(b, a + random.choice((1, 2, 8, 100, 10**9)))
    match random.randrange(6):
        case 0 if content:
            k = random.randrange(len(content))
            return content[:k] + bytes([content[k] ^ 1 << random.randrange(8)]) + content[k + 1 :]
        case 1:
            return content[:a] + content[b:]
        case 2:
            return (
                content[:b] + content[a:b] * random.choice((1, 2, 50)) + content[b:]
                if len(content) < 10**5
                else content
            )
        case 3:
            return content[:a]
        case 4:
            return content[:a] + random.randbytes(random.choice((1, 4, 16))) + content[b:]
        case _:
            return content[:a] + random.choice(FRAGMENTS) + content[random.choice((a, b)) :]


def change_tree(random: Random, tree: Any) -> Any:
    """Replace, remove, rename, add, swap or nest one part of a tree of dictionaries and lists."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places or random.random() < 0.02:
        return copy.deepcopy(random.choice(WEIRD))
    parent, key = random.choice(places)
    match random.randrange(8):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[random.choice(("", "x", 0, None, str(key) + "_", str(key).upper()))] = parent.pop(key)
        case 2 if isinstance(parent, list):
            parent.insert(key, copy.deepcopy(random.choice(WEIRD)))
        case 2:
            parent[random.choice(("", "x", "unknown"))] = copy.deepcopy(random.choice(WEIRD))
        case 3:
            other, place = random.choice(places)
            parent[key] = copy.deepcopy(other[place])
        case 4:
            parent[key] = [parent[key]] if random.random() < 0.5 else {"a": parent[key]}
        case 5 if type(parent[key]) in (int, float):
            value = parent[key]
            parent[key] = random.choice(
                (-value, value + 1, value - 1, value * 2, value * 10**9, str(value), float(value))
            )
        case _:
            parent[key] = copy.deepcopy(random.choice(WEIRD))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each container in a tree with each of its keys or positions."""
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])


def change_json(random: Random, content: bytes) -> bytes:
    """Change the tree of a JSON file; a file that isn't JSON changes in its bytes."""
    try:
        return json.dumps(change_tree(random, json.loads(content)), ensure_ascii=random.random() < 0.7).encode(
            errors="surrogatepass"
        )
    except Exception:  # an earlier change made it unreadable
        return change_bytes(random, content)


def change_json_line(random: Random, content: bytes) -> bytes:
    """Change one line of a file with a JSON tree on each line."""
    lines = content.split(b"\n")
    k = random.randrange(len(lines))
    return b"\n".join((*lines[:k], change_json(random, lines[k]), *lines[k + 1 :]))


def change_yaml(random: Random, content: bytes) -> bytes:
    """Change the tree of a YAML file, or replace one of its values by text; otherwise change its bytes."""
    if random.random() < 0.4:
        values = list(re.finditer(rb"(?<=[:\-] )[^\n]+", content))
        if values:
            a, b = random.choice(values).span()
            return content[:a] + random.choice(FRAGMENTS) + content[b:]
    try:
        tree = change_tree(random, yaml.safe_load(content))
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode(errors="surrogatepass")
    except Exception:  # PyYAML raises any error
        return change_bytes(random, content)
