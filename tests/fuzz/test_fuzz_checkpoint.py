"""Fuzzing a run's config.yaml and a checkpoint's files, whose content may be valid and yet another network's."""

import functools
import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from support import ROOT
from support.fuzz import Target
from train.config.clip import ClipConfig
from train.engine.changes import Saved
from train.engine.checkpoint import Checkpoints, _checksum, of_this_run
from train.engine.ema import Ema
from train.engine.feed import Feed
from train.engine.skipped import SkippedSteps
from train.engine.subset import Subset
from train.engine.trainer import Trainer

CONFIG = ROOT / "tests/stored/clip/config.yaml"
STEP = "step-00000003"


def trainer() -> Trainer:
    """Return a trainer of a small network, with moments, without a run."""
    torch.manual_seed(0)
    network = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    made = Trainer.__new__(Trainer)
    made.stage = SimpleNamespace(
        phases=[SimpleNamespace(name="main", module=network, optimizer=optimizer)], ema=Ema(network, 0.9)
    )
    made.subsets = {"main": Subset(network, frozenset())}
    made.scaler = torch.amp.GradScaler("cpu", enabled=False)
    made.skipped = SkippedSteps(torch.device("cpu"))
    return made


@functools.cache
def saved() -> Path:
    """Return a folder of checkpoints."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-checkpoint-"))
    examples = {"position": 12, "order": "abc", "shift": 0, "epochs": 1}
    Checkpoints(folder).save(3, trainer().state() | {"examples": examples})
    return folder


def read_checkpoint(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(saved(), folder, dirs_exist_ok=True)
        checkpoint = Path(folder, STEP)
        (checkpoint / name).write_bytes(content)
        if name != "manifest.json":  # content that somebody wrote on purpose
            sums = {file: _checksum(checkpoint / file) for file in ("state.json", "state.safetensors")}
            (checkpoint / "manifest.json").write_text(json.dumps({"step": 3, "files": sums}))
        checkpoints, restored = Checkpoints(Path(folder)), trainer()
        found = checkpoints.latest()
        assert found is not None
        state = checkpoints.load(found)
        with of_this_run(found):
            restored.restore(state)
            feed = Feed.__new__(Feed)
            feed.restore(3, state["examples"])
        network = restored.stage.phases[0].module
        network(torch.ones(1, 2)).sum().backward()
        restored.stage.phases[0].optimizer.step()
        restored.stage.ema.update(3)


def read_config(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, name)).write_bytes(content)
        found = Saved.read(path)
        config = ClipConfig(data="data", out=folder)
        found.differences(config, {"data": "0" * 64})
        found.before(2).differences(config, {"data": "0" * 64})
        assert isinstance(found.earlier_data, list)
        assert isinstance(found.published(), list)


def changed_config() -> bytes:
    change = "{step: 2, position: 8, date: '2026-01-01', setting: optimizer.lr, before: 0.001, now: 0.0001}"
    text = CONFIG.read_text()
    return text.replace("about:\n", f"about:\n  changes: [{change}]\n  earlier_data: [abc]\n", 1).encode()


def targets() -> dict[str, Target]:
    names = ("manifest.json", "state.json", "state.safetensors")
    files = {name: [(saved() / STEP / name).read_bytes()] for name in names}
    return {
        "checkpoint": Target("checkpoint", files, read_checkpoint),
        "run_config": Target("run_config", {"config.yaml": [CONFIG.read_bytes(), changed_config()]}, read_config),
    }


READERS = {"checkpoint": read_checkpoint, "run_config": read_config}
KEPT = [(name, path) for name, read in READERS.items() for path in Target(name, {}, read).kept()]


@pytest.mark.parametrize(("name", "path"), KEPT, ids=[f"{name}-{path.name}" for name, path in KEPT])
def test_an_input_that_once_failed_is_read_or_refused(name: str, path: Path) -> None:
    Target(name, {}, READERS[name]).replay(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_is_read_or_refused(name: str) -> None:
    targets()[name].fuzz()
