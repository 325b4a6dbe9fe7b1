"""Files in a run's folder that were edited, damaged or replaced: a run that can't use one says so in one line."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ldm.errors import UserError
from support import ROOT
from train.data.batches.unreadable import UnreadableCounter
from train.engine.metrics import Metrics
from train.engine.model_card import state_license
from train.engine.provenance import is_result

MODEL = ROOT / "tests/stored/clip/model"
GOOD = b'{"step": 1, "loss": 2.5}\n{"step": 2, "val_loss": 3, "time": 1.5}\n'


def metrics(path: Path) -> Metrics:
    return Metrics(path, SimpleNamespace(is_main_process=True, trackers=[], log=lambda *_, **__: None))


@pytest.mark.parametrize(
    "line",
    [
        *(b"null", b"3", b"[]", b'"step"', b"{}", b'{"step": "2", "val_a": 1}', b'{"step": null}', b'{"step": [2]}'),
        *(b'{"step": true}', b'{"step": 2.5}', b'{"step": 2, "val_loss": "x"}', b'{"step": 2, "val_loss": null}'),
        *(
            b'{"step": 2, "val_loss": 1' + b"0" * 400 + b"}",
            b'{"step": ' + b"9" * 5000 + b"}",
            b"\xff\xfe",
            b"{",
            b"[" * 9999,
        ),
        *(b'{"step": 2, "val_loss": {"a": 1}}', b"", b"\0", b'{"step": 2, "val_loss": true}'),
    ],
    ids=lambda line: line[:20],
)
def test_lines_of_metrics_that_are_not_ours_are_removed(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + line + b"\n")
    assert metrics(path).last_validation(2) == (2, {"loss": 3})
    metrics(path).remove_after(2)
    assert path.read_bytes() == GOOD


def test_a_line_cut_short_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(GOOD + b'{"step": 3, "lo')
    metrics(path).remove_after(5)
    assert path.read_bytes() == GOOD


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_logs_that_are_not_files_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    readers: tuple[Callable[[], object], ...] = (
        lambda: metrics(path).remove_after(2),
        lambda: metrics(path).last_validation(2),
        lambda: UnreadableCounter(path),
    )
    for read in readers:
        with pytest.raises(UserError, match=r"log.jsonl can't be read: .*; move it away, or repair it"):
            read()


@pytest.mark.parametrize("line", [b"\xff", b"null", b"[]", b'{"file": []}', b'{"file": {}}', b"[" * 9999, b"{", b"3"])
def test_a_damaged_list_of_damaged_images_is_continued(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(b'{"file": "a.png", "reason": "x"}\n' + line)
    counter = UnreadableCounter(path, print=lambda line: None)
    counter.add_to_report([("a.png", "x"), ("b.png", "y")])
    assert path.read_bytes().split(b"\n")[2:] == [b'{"file": "b.png", "reason": "y"}', b""]


@pytest.mark.parametrize("content", [b"null", b"[]", b"3", b"", b"{", b"\xff", b"[" * 9999, b'{"config": []}', b"{}"])
def test_a_damaged_training_json_is_no_result_and_takes_no_licence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "training.json").write_bytes(content)
    (tmp_path / "README.md").write_bytes((MODEL / "README.md").read_bytes())
    assert not is_result(tmp_path, 2)
    with pytest.raises(UserError, match=r"--license mit: can't be added") as caught:
        state_license(tmp_path, "mit")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "training.json").read_bytes() == content


@pytest.mark.parametrize(
    "content", [b"\xff", b"---\n[\n---\n", b"---\n- a\n---\n", b"no licence", b"---\na: 2001-99-99\n---\n"]
)
def test_an_edited_card_takes_no_licence(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "training.json").write_text(json.dumps({"config": {}}))
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(UserError, match=r"write the licence into both files yourself"):
        state_license(tmp_path, "mit")
    assert (tmp_path / "README.md").read_bytes() == content
