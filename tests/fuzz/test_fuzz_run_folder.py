"""Fuzzing the files in the folder of a run: metrics, damaged images, training.json and the model card."""

import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from support import ROOT
from support.fuzz import Target
from train.data.batches.unreadable import UnreadableCounter
from train.engine.metrics import Metrics
from train.engine.model_card import state_license
from train.engine.provenance import is_result

RUN = ROOT / "tests/stored/clip"
DAMAGED = b'{"file": "a/1.png", "reason": "broken data stream"}\n{"file": "\\u00e9.png", "reason": "truncated"}\n'
METRICS = RUN.joinpath("metrics.jsonl").read_bytes()


def read_logs(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, name)).write_bytes(content)
        if name == "damaged.jsonl":
            UnreadableCounter(path, print=lambda line: None).add_to_report([("b.png", "empty"), ("a/1.png", "empty")])
            return
        metrics = Metrics(path, SimpleNamespace(is_main_process=True, trackers=[], log=lambda *_, **__: None))
        metrics.remove_after(2)
        step, found = metrics.last_validation(2)
        assert f"{step:,} {[f'{value:.4g}' for value in found.values()]}"  # as the model card formats them
        metrics.log(3, {"loss": 1.0})
        assert metrics.last_validation(10)[0] <= 10


def read_model(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for file in ("README.md", "training.json"):
            shutil.copy(RUN / "model" / file, folder)
        Path(folder, name).write_bytes(content)
        is_result(Path(folder), 2)
        state_license(Path(folder), "apache-2.0")


TARGETS = [
    Target("metrics", {"metrics.jsonl": [METRICS, METRICS.replace(b'"loss"', b'"val_loss"')]}, read_logs),
    Target("damaged_images", {"damaged.jsonl": [DAMAGED]}, read_logs),
    Target(
        "model_card",
        {name: [RUN.joinpath("model", name).read_bytes()] for name in ("README.md", "training.json")},
        read_model,
    ),
]
KEPT = [(target, path) for target in TARGETS for path in target.kept()]


@pytest.mark.parametrize(("target", "path"), KEPT, ids=[f"{t.name}-{p.name}" for t, p in KEPT])
def test_an_input_that_once_failed_is_read_or_refused(target: Target, path: Path) -> None:
    target.replay(path)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_changed_file_is_read_or_refused(target: Target) -> None:
    target.fuzz()
