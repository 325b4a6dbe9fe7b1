"""Records of training: their rules, their prompts and what they store; training doesn't know the dataset's renderer."""

import ast
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import speedrun
import torch
from tracks import stage2, trainings
from tracks.options import Options
from tracks.records import is_accurate, is_complete, read_record, store, table
from tracks.trainings import contestant, run_folder, step_seconds, train_seeds

from ldm.errors import RunError, UserError
from ldm.pipeline import LatentDiffusionPipeline
from support import ROOT
from support.records import SAMPLING, quick, tiny_options, train_here
from train.config.ldm import LdmConfig
from train.config.load import overlay, parse
from train.data.synthetic.shapes import prompts
from train.evaluation.diffusion import alignment


def words(o: Options) -> list[str]:
    return trainings.ldm_arguments(o, str(ROOT / "configs/shapes/ldm.yaml"), o.settings, o.vae)


@pytest.fixture
def o(shapes: Path, parts: Path, tmp_path: Path) -> Options:
    return tiny_options(shapes, parts, tmp_path)


@pytest.mark.parametrize(
    ("means", "change", "valid"),
    [
        ([0.95] * 5, {}, True),
        ([0.92, 0.96, 0.96, 0.96, 0.96], {}, True),
        ([0.949] * 5, {}, False),
        ([0.91, 0.99, 0.99, 0.99, 0.99], {}, False),
        ([0.99] * 4, {"seeds": (1, 2, 3, 4)}, False),
        ([0.99] * 5, {"seeds": (1, 2, 3, 4, 4)}, False),
        ([0.99] * 5, {"prompts": 511}, False),
        ([0.99] * 5, {"choosing": True}, False),
    ],
)
def test_the_rule_of_a_record(means: list[float], change: dict[str, Any], valid: bool) -> None:
    assert (is_complete(replace(Options(), **change)) and is_accurate(means)) == valid


def test_a_record_stores_what_it_measured(o: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    monkeypatch.setattr(stage2, "train_seeds", train_here)
    measured = stage2.measure(o, None)
    first = measured.record
    assert (first["valid"], first["before"], first["steps"]) == (False, None, 2)
    assert first["cpu_seconds"] == {"step": 1.5, "training": 3.0}
    pipe = LatentDiffusionPipeline.from_pretrained(str(run_folder(o, 5) / "model"))
    for kind in ("seen", "unseen"):
        shares, _ = alignment(pipe, prompts(kind, 3, 70_001), seed=70_001, **SAMPLING)
        assert first["accuracy"]["seeds"]["5"][kind] == shares["all"]
    assert set(first["accuracy"]["seeds"]) == {"4", "5"}
    path = store(o, measured)
    assert json.loads(path.read_text()) == first
    assert (path.parent / "seed-5.jsonl").read_text() == (run_folder(o, 5) / "metrics.jsonl").read_text()

    def known(o: Options, model: Path) -> dict[str, float]:
        return first["accuracy"]["seeds"][model.parent.name.removeprefix("seed-")]

    monkeypatch.setattr(stage2, "accuracy", known)
    monkeypatch.setattr(stage2, "train_seeds", lambda o, program: None)
    path.write_text(json.dumps(first | {"steps": 8}))
    again = stage2.measure(o, read_record(path)).record
    assert again["before"]["ratio"] == 2 * 1.5 / (8 * 3.0)
    assert again["accuracy"] == first["accuracy"]
    assert stage2.measure(replace(o, choosing=True), None).record["prompts"] == {"count": 3, "seed": 60_001}
    path.write_text(json.dumps(first | {"digests": {"vae": "another"}}))
    with pytest.raises(UserError, match="another vae or text encoder"):
        stage2.measure(o, read_record(path))


STORED: dict[str, Any] = {
    "name": "first",
    "track": "stage-2",
    "config": "a.yaml",
    "settings": "",
    "steps": 1800,
    "accuracy": {"mean": 0.9612, "least": 0.931},
    "prompts": {"count": 512, "seed": 70_001},
    "valid": True,
    "cpu_seconds": {"step": 0.2, "training": 360.0},
    "before": None,
    "digests": {},
    "machine": {"date": "2026-11-27T00:00:00", "commit": "0123456789"},
}


def test_the_table_has_the_records_of_all_tracks(tmp_path: Path) -> None:
    assert table(tmp_path) == "No record yet."
    before = {"name": "first", "ratio": 1.5}
    failed = {"valid": False, "accuracy": {"mean": 0.5, "least": 0.4}}
    stored = [
        STORED,
        STORED | {"name": "failed"} | failed,
        STORED | {"name": "shipped", "track": "peer", "before": before} | failed,
        STORED | {"name": "vae", "track": "stage-1", "steps": 300, "psnr": {"least": 34.26}},
        STORED | {"name": "whole", "track": "demo", "steps": 0},
    ]
    for record in stored:
        (tmp_path / record["name"]).mkdir()
        (tmp_path / record["name"] / "record.json").write_text(json.dumps(record))
    assert table(tmp_path).splitlines()[2:] == [
        "| demo | whole |  | 360 |  | 0.961, 0.931 | 2026-11-27 | 01234567 |",
        "| peer | shipped | 1,800 | 360 | 1.50 × first | 0.500, 0.400 (fails the rule) | 2026-11-27 | 01234567 |",
        "| stage-1 | vae | 300 | 360 |  | 0.961, 0.931; 34.3 dB | 2026-11-27 | 01234567 |",
        "| stage-2 | first | 1,800 | 360 |  | 0.961, 0.931 | 2026-11-27 | 01234567 |",
    ]
    path = tmp_path / "first/record.json"
    with pytest.raises(UserError, match="is a record of the track stage-2; must be one of demo"):
        read_record(path, "demo")
    for content in ("{}", "[", '{"name": 1}', json.dumps(STORED | {"steps": "a"})):
        path.write_text(content)
        with pytest.raises(UserError, match=r"must be a record\.json"):
            read_record(path)


def test_the_commands_in_the_documentation_are_accepted() -> None:
    text = (ROOT / "docs/RECORDS.md").read_text().replace("\\\n", " ") + speedrun.__doc__.replace("\\\n", " ")
    commands = re.findall(r"^    python benchmarks/speedrun\.py (.*)$", text, re.MULTILINE)
    assert len(commands) > 10
    for line in commands:
        o = overlay(Options, Options(), shlex.split(line, comments=True))
        if not o.table:
            speedrun.check(o)


def test_trainings_run_side_by_side_and_a_failure_ends_all(o: Options, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import sys, time\n"
        f"open({str(log)!r}, 'a').write('+')\n"
        "time.sleep(0.3)\n"
        f"open({str(log)!r}, 'a').write('-')\n"
        "sys.exit(3 if sys.argv[1] == '7' else 0)\n"
    )

    def program(seed: int) -> list[str]:
        return [sys.executable, "-c", code, str(seed)]

    train_seeds(replace(o, seeds=(1, 2, 3, 4)), program)
    assert log.read_text().count("+") == log.read_text().count("-") == 4
    assert log.read_text().startswith("++-")
    with pytest.raises(RunError, match="seed 7 ended with status 3"):
        train_seeds(replace(o, seeds=(7, 8)), program)


def test_a_checkout_is_timed_with_its_own_code(o: Options, tmp_path: Path) -> None:
    (tmp_path / "shapes.yaml").touch()
    this = contestant(o, "before", "ldm", ["shapes.yaml", *words(o)[1:]], str(tmp_path))
    assert this.command()[1] == str(tmp_path / "benchmarks/against/training.py")
    assert this.environment()["PYTHONPATH"] == f"{tmp_path}/benchmarks:{tmp_path}"
    spec = json.loads(this.command()[2])
    assert spec["stage"] == "ldm"
    assert "1000000" in spec["arguments"]
    config = parse(LdmConfig, spec["arguments"])
    assert (config.steps, config.optimizer.warmup) == (10**6, 0)


def test_a_checkout_is_timed_with_its_own_configuration(o: Options, tmp_path: Path) -> None:
    """A record names its configuration by a path, whose content may have changed since."""
    here, there = "configs/shapes/ldm.yaml", tmp_path / "configs/shapes/ldm.yaml"
    there.parent.mkdir(parents=True)
    there.write_text("batch_size: 7\n")
    before = {"config": here, "settings": ""}
    then = stage2.contestant_before(replace(o, checkout=str(tmp_path)), before)
    now = stage2.contestant_before(o, before)
    assert then is not None
    assert now is not None
    sizes = [parse(LdmConfig, json.loads(each.command()[2])["arguments"]).batch_size for each in (then, now)]
    assert sizes == [7, parse(LdmConfig, [str(ROOT / here)]).batch_size]
    there.unlink()
    with pytest.raises(UserError, match=rf"--checkout {tmp_path}: has no {here}"):
        stage2.contestant_before(replace(o, checkout=str(tmp_path)), before)


@pytest.mark.slow
def test_the_step_is_timed_in_turn_with_the_record_before(o: Options) -> None:
    torch.set_num_threads(1)
    found = [contestant(o, "before", "ldm", [*words(o), "--batch-size", "64"]), contestant(o, "this", "ldm", words(o))]
    seconds = step_seconds(replace(o, calls=3, turns=3), found)
    assert set(seconds) == {"this", "before"}
    assert 0 < seconds["this"] < seconds["before"]


@pytest.mark.parametrize(
    "folder", ["ldm", "autoencoder", "conditioning", "train/stages", "train/engine", "train/config", "train/data"]
)
def test_training_does_not_know_the_renderer(folder: str) -> None:
    """Neither the renderer, nor the checker, nor the grammar of the captions; else a record would prove nothing."""
    for path in (ROOT / folder).rglob("*.py"):
        if "synthetic" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any("synthetic" in name for name in names), path
