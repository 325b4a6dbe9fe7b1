"""Processes forked from a server that has imported the libraries: a new Python would need seconds for that."""

import io
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from support import ROOT
from support.commands import OFFLINE, Ended

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["train.stages.clip", "train.stages.vae", "train.stages.ldm", "diffusers.models.autoencoders"]
)


def run_forked(*words: str, encoding: str = "utf-8") -> Ended:
    """Run a script with its arguments, like `run_command`. encoding: that of its output (PYTHONIOENCODING)."""
    with tempfile.TemporaryDirectory() as folder:
        process = _start(_run_script, folder, words, encoding)
        status = _end(process, " ".join(words))
        return Ended(status, *(_output(folder, name) for name in ("out", "err")))


def run_in_processes(function: Callable[..., None], count: int, *arguments: Any) -> None:
    """Call function(rank, count, *arguments) in `count` processes, which can form a process group.

    Raises RuntimeError with a process's output if it fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as stack:
        folders = [stack.enter_context(tempfile.TemporaryDirectory()) for _ in range(count)]
        processes = []
        for rank, folder in enumerate(folders):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
            environment = {k: str(v) for k, v in (address | (group if count > 1 else {})).items()}
            processes.append(_start(_call, folder, environment, function, rank, count, arguments))
        statuses = [_end(process, f"process {rank}") for rank, process in enumerate(processes)]
        if any(statuses):
            output = "\n".join(_output(folder, "err")[-3000:] for folder in folders)
            raise RuntimeError(f"exit statuses {statuses}:\n{output}")


def _start(target: Callable[..., None], folder: str, *arguments: Any) -> ForkServerProcess:
    process = _CONTEXT.Process(target=_redirected, args=(target, folder, *arguments))
    with pytest.MonkeyPatch.context() as patch:  # the server has the environment of the first start
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
        process.start()
    return process


def _end(process: ForkServerProcess, name: str) -> int:
    process.join(300)
    if process.exitcode is None:
        process.kill()
        raise RuntimeError(f"{name} does not end")
    return process.exitcode


def _output(folder: str, name: str) -> str:
    return (Path(folder) / name).read_text(errors="replace")


def _redirected(target: Callable[..., None], folder: str, *arguments: Any) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    target(*arguments)


def _run_script(words: tuple[str, ...], encoding: str) -> None:
    for stream, errors in ((sys.stdout, "strict"), (sys.stderr, "backslashreplace")):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding=encoding, errors=errors)
    sys.argv = list(words)
    sys.path.insert(0, str(Path(words[0]).parent))  # as Python does
    runpy.run_path(words[0], run_name="__main__")


def _call(environment: Mapping[str, str], function: Callable[..., None], rank: int, count: int, rest: Any) -> None:
    os.environ.update(environment)
    function(rank, count, *rest)
