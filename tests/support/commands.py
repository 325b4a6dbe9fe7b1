"""Commands, run as a user would."""

import contextlib
import importlib.util
import io
import os
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from support import ROOT

OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""Environment variables of commands in their own processes."""


class Ended(NamedTuple):
    """Result of a command that has ended."""

    status: int
    out: str
    err: str

    @property
    def paths(self) -> list[Path]:
        """Paths that a successful command printed, one a line."""
        assert self.status == 0, self.err
        return [Path(line) for line in self.out.splitlines()]


def load_module(path: Path) -> ModuleType:
    """Import a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(script: str, *arguments: object) -> Ended:
    """Run scripts/`script`.py in this process, which has loaded the libraries already."""
    out, err, interrupt = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        patch.setattr(warnings, "formatwarning", warnings.formatwarning)  # commands set their own
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
    signal.signal(signal.SIGINT, interrupt)
    return Ended(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def run_command(*words: str) -> Ended:
    """Run Python with `words` in a new process, in the root of the repository."""
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=os.environ | OFFLINE, capture_output=True, text=True, timeout=120
    )
    return Ended(done.returncode, done.stdout, done.stderr)
