"""Reading processes that run out of memory or are killed: one line, in seconds, and the steps so far are saved."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ldm.errors import RunError
from support.runs import losses, vae_config
from train.data.sources.splits import Source
from train.data.store.prefetch import read_ahead
from train.stages.vae import train


class Killed:
    """A dataset whose reading process ends at position 5."""

    def __init__(self, how: int | type[BaseException]) -> None:
        self.how, self.main = how, os.getpid()

    def __getitems__(self, positions: Sequence[int]) -> Sequence[int]:
        if 5 in positions and isinstance(self.how, int):
            assert os.getpid() != self.main
            signal.signal(signal.SIGBUS, signal.SIG_DFL)
            os.kill(os.getpid(), self.how)
        elif 5 in positions:
            raise self.how("no more")
        return positions


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (signal.SIGKILL, r"killed \(SIGKILL\), probably because memory ran short: .* with fewer --workers than 2$"),
        (signal.SIGBUS, r"killed \(SIGBUS\), probably because shared memory \(/dev/shm\) ran short: .* --workers"),
        (MemoryError, "^out of memory while reading images: .* fewer --workers$"),
        (SystemExit, r"killed \(status 1\)|workers"),
    ],
)
def test_a_killed_worker_is_an_error_in_one_line(
    monkeypatch: pytest.MonkeyPatch, how: int | type[BaseException], message: str
) -> None:
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.3,))  # 5 s between two looks
    handler, started, read = signal.getsignal(signal.SIGCHLD), time.monotonic(), []
    with pytest.raises(RunError, match=message) as error:
        read.extend(read_ahead(Killed(how), ([k] for k in range(20)), 2))
    assert "\n" not in str(error.value)
    assert time.monotonic() - started < 30
    assert read == [[k] for k in range(len(read))]
    assert len(read) <= 5  # what it had not handed over is lost
    assert signal.getsignal(signal.SIGCHLD) == handler  # torch's would raise an error anywhere in a step


@dataclass(frozen=True)
class Record:
    """A batch of tensors at several depths."""

    values: tuple[list[torch.Tensor], torch.Tensor]
    empty: torch.Tensor


class Records:
    def __getitems__(self, positions: Sequence[int]) -> Record:
        return Record(([torch.tensor(positions)], torch.tensor(positions) * 2), torch.empty(0))


def test_full_shared_memory_is_an_error_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the loader waits for ever: Docker's /dev/shm has 64 MB."""
    share, main = torch.Tensor.share_memory_, os.getpid()

    def full(tensor: torch.Tensor) -> torch.Tensor:
        if os.getpid() != main and tensor.sum() == 10:
            raise RuntimeError("unable to allocate shared memory(shm) for file: No space left on device (28)")
        return share(tensor)

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    read: list[Record] = []
    with pytest.raises(RunError, match=r"^shared memory \(/dev/shm\) is full: .*--workers.*--shm-size"):
        read.extend(read_ahead(Records(), ([k] for k in range(20)), 1))
    assert [(r.values[0][0].item(), r.values[1].item()) for r in read] == [(k, 2 * k) for k in range(5)]


@pytest.mark.parametrize("error", [RunError("killed"), OSError(5, "Input/output error", "x.png")])
def test_the_steps_before_a_failed_read_are_saved(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A run that is continued afterwards gives the losses of one that was never interrupted."""
    read, count = Source.read, [0]

    def fails(source: Source, index: int) -> bytes:
        count[0] += source.split == "train"
        if count[0] > 8 * 5:
            raise error
        return read(source, index)

    settings = {"steps": 8, "checkpoint_every": 100, "validate_every": 100, "log_every": 1, "first_samples": 0}
    config = vae_config(shapes, tmp_path / "run", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(Source, "read", fails)
        with pytest.raises(type(error)):
            train(config)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000005"]
    train(config)
    train(vae_config(shapes, tmp_path / "whole", **settings))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
