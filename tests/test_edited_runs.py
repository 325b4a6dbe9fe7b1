"""Files in a run's folder that were edited, damaged or replaced: a run that can't use one says so in one line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.errors import RunError, UserError
from support import ROOT
from support.runs import clip_config, train_stage
from train.data.batches.unreadable import UnreadableCounter
from train.engine.checkpoint import load_tree, pack_tree
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


@pytest.fixture(scope="module")
def finished(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of stage 0 with a checkpoint of step 4."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train_stage(clip_config(shapes, out, steps=4, checkpoint_every=4, validate_every=4))
    return out


def commit(checkpoint: Path, change: Callable[[Any], Any]) -> None:
    """Change a checkpoint's tree, and give the checkpoint a valid manifest."""
    tree = change(load_tree(checkpoint))
    for name in ("state.json", "state.safetensors"):
        (checkpoint / name).unlink()
    files = pack_tree(tree).write(checkpoint)
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 4, "files": files}))


def phase(tree: Any) -> Any:
    return next(iter(tree["phases"].values()))


def first_moments(tree: Any) -> Any:
    return next(iter(phase(tree)["optimizer"]["state"].values()))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "no mapping": lambda tree: [],
    "nothing": lambda tree: None,
    "another shape": lambda tree: phase(tree)["module"].update(logit_scale=torch.zeros(3)),
    "a surplus weight": lambda tree: phase(tree)["module"].update(extra=torch.zeros(3)),
    "a missing average": lambda tree: tree["ema"].popitem(),
    "no phases": lambda tree: tree.update(phases={}),
    "no optimizer": lambda tree: phase(tree).update(optimizer=None),
    "moments of another shape": lambda tree: first_moments(tree).update(exp_avg=torch.zeros(2)),
    "moments in another order": lambda tree: first_moments(tree).update(
        exp_avg=first_moments(tree)["exp_avg"].mT.contiguous().mT
    ),
    "a missing moment": lambda tree: first_moments(tree).pop("exp_avg_sq"),
    "a step with a shape": lambda tree: first_moments(tree).update(step=torch.zeros(3)),
    "state of no weight": lambda tree: phase(tree)["optimizer"]["state"].update({99: first_moments(tree)}),
    "text for a count": lambda tree: tree.update(in_a_row="many"),
    "no position": lambda tree: tree["examples"].pop("position"),
    "another position": lambda tree: tree["examples"].update(position="x"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_an_intact_checkpoint_of_something_else_is_refused(
    change: Callable[[Any], Any], finished: Path, shapes: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))

    def changed(tree: Any) -> Any:
        result = change(tree)
        return result if isinstance(result, list) or change is CHANGES["nothing"] else tree

    commit(out / "checkpoints/step-00000004", changed)
    with pytest.raises(RunError, match=r"intact, but its content doesn't fit this run .*: restore it") as caught:
        train_stage(clip_config(shapes, out, steps=5, checkpoint_every=4, validate_every=4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("about: []", "about: null", "about: 3", "about: {inputs: []}", "about: {inputs: {data: 3}}", "input: []"),
        *(
            "about: {earlier_data: 3}",
            "about: {changes: {}}",
            "about: {changes: [{step: x}]}",
            "input: null",
            "[]",
            "3",
        ),
        *("a: &a [*a]", "about: !!set [1]", "steps: 2001-99-99", "out: [", "\x00"),
    ],
)
def test_an_edited_config_yaml_is_refused(text: str, finished: Path, shapes: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    saved = [line for line in (out / "config.yaml").read_text().splitlines() if not line.startswith(" ")]
    name = text.partition(":")[0]
    kept = [line for line in saved if ": " in line and not line.startswith(name)] if ":" in text else []
    (out / "config.yaml").write_text("\n".join([*kept, text]) + "\n")
    with pytest.raises(UserError, match=r"config\.yaml|--out") as caught:
        train_stage(clip_config(shapes, out, steps=5, checkpoint_every=4, validate_every=4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "damaged.jsonl", ".lock", "checkpoints", "model"])
def test_a_pipe_in_a_run_is_refused(name: str, finished: Path, shapes: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    if (out / name).is_dir():
        shutil.rmtree(out / name)
    else:
        (out / name).unlink(missing_ok=True)
    os.mkfifo(out / name)
    with pytest.raises(UserError, match=f"{name} in it is not a"):
        train_stage(clip_config(shapes, out, steps=5, checkpoint_every=4, validate_every=4))
