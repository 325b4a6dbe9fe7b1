"""Control-C, once and twice, while images are encoded for a cache with worker processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import ROOT

COMMAND = """
import sys, time
from pathlib import Path
from train.commands.main import command
from train.data.batches.latent_cache import LatentCache
from train.data.images.crop import Framing
from train.data.sources.splits import open_source

def encode(pixels):
    print("encoding", flush=True)
    time.sleep(0.05)
    return pixels[:, :2, ::4, ::4], pixels[:, :2, ::4, ::4]

@command
def main():
    source = open_source(sys.argv[1], "train")
    how = {"digest": "x", "framing": Framing(resolution=32), "channels": 2, "factor": 4, "batch_size": 1, "workers": 2}
    LatentCache.open(Path(sys.argv[2]), source, encode, **how)

main()
"""


SLOW = [pytest.param(pause, marks=pytest.mark.slow) for pause in (None, 0.02, 0.3, 1)]


@pytest.mark.parametrize("pause", [0.0, *SLOW])
def test_interrupts_while_caching_end_with_one_line(shapes: Path, tmp_path: Path, pause: float | None) -> None:
    """pause: seconds between two interrupts; None: only one."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    process = subprocess.Popen(
        [sys.executable, script, shapes, tmp_path / "cache"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(3):
        assert process.stdout
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    if pause is not None:
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "row/s" not in line]
    assert (process.returncode, lines) == (130, ["error: interrupted"])
    assert time.monotonic() - started < 30
