"""The record of stage 2: its rule, its prompts and what it stores; training doesn't know the dataset's renderer."""

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import speedrun
import torch
from speedrun import Options, contestant, is_valid, measure, read_record, step_seconds, table, train_seeds

import train.stages.ldm
from ldm.errors import RunError, UserError
from ldm.pipeline import LatentDiffusionPipeline
from support import ROOT
from train.config.ldm import LdmConfig
from train.config.load import parse
from train.data.synthetic.shapes import prompts
from train.evaluation.diffusion import alignment

SETTINGS = (
    "--unet.channels 16 32 --unet.attention False True --unet.heads 2 2 --unet.groups 8 --batch-size 4 --trackers "
    "--validation-examples 4 --sample-steps 1 --precision fp32 --first-samples 0 --keep-best False"
)


@pytest.fixture
def o(shapes: Path, parts: Path, tmp_path: Path) -> Options:
    return Options(
        name="tiny",
        steps=2,
        settings=SETTINGS,
        seeds=(4, 5),
        prompts=3,
        data=str(shapes),
        vae=str(parts / "vae/model"),
        text_encoder=str(parts / "clip/model"),
        work=str(tmp_path / "work"),
        records=str(tmp_path / "records"),
        calls=1,
        turns=2,
    )


def words(o: Options) -> list[str]:
    return speedrun.arguments(str(ROOT / o.config), o.settings, o)


def train_here(o: Options, words: list[str]) -> None:
    for seed in o.seeds:
        own = ["--steps", str(o.steps), "--seed", str(seed), "--out", str(speedrun.run_folder(o, seed))]
        train.stages.ldm.train(parse(LdmConfig, [*words, *own]))


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
    assert is_valid(means, replace(Options(), **change)) == valid


def test_a_record_stores_what_it_measured(o: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampling: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "sampler": "dpmpp_2m"}
    monkeypatch.setattr(speedrun, "_SAMPLING", sampling)
    monkeypatch.setattr(speedrun, "train_seeds", train_here)
    monkeypatch.setattr(speedrun.machine, "matrix_rates", lambda: {"fp32": 1.0})
    seconds = {"before": {"cpu": 3.0}, "this": {"cpu": 1.5}}
    monkeypatch.setattr(speedrun.contest, "run", lambda row, *_: {c.name: seconds[c.name] for c in row.contestants})
    first = measure(o, words(o), None)
    assert (first["valid"], first["before"], first["steps"]) == (False, None, 2)
    assert first["cpu_seconds"] == {"step": 1.5, "training": 3.0}
    pipe = LatentDiffusionPipeline.from_pretrained(str(speedrun.run_folder(o, 5) / "model"))
    for kind in ("seen", "unseen"):
        shares, _ = alignment(pipe, prompts(kind, 3, 70_001), seed=70_001, **sampling)
        assert first["accuracy"]["seeds"]["5"][kind] == shares["all"]
    assert set(first["accuracy"]["seeds"]) == {"4", "5"}

    def known(o: Options, model: Path) -> dict[str, float]:
        return first["accuracy"]["seeds"][model.parent.name.removeprefix("seed-")]

    monkeypatch.setattr(speedrun, "accuracy", known)
    monkeypatch.setattr(speedrun, "train_seeds", lambda o, words: None)
    path = tmp_path / "first.json"
    path.write_text(json.dumps(first | {"steps": 8}))
    again = measure(o, words(o), read_record(path))
    assert again["before"]["ratio"] == 2 * 1.5 / (8 * 3.0)
    assert again["accuracy"] == first["accuracy"]
    assert measure(replace(o, choosing=True), words(o), None)["prompts"] == {"count": 3, "seed": 60_001}
    path.write_text(json.dumps(first | {"digests": {"vae": "another"}}))
    with pytest.raises(UserError, match="another autoencoder"):
        measure(o, words(o), read_record(path))

    records = tmp_path / "records"
    assert table(records) == "No record yet."
    for name, stored in (("a", first), ("b", again | {"valid": True})):
        (records / name).mkdir(parents=True)
        (records / name / "record.json").write_text(json.dumps(stored))
    lines = table(records).splitlines()
    assert len(lines) == 3
    assert lines[2].startswith("| tiny | 2 | 3 | 0.12 × tiny | 0.000, 0.000 |")
    for content in ("{}", "[", '{"name": 1}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"must be a record\.json"):
            read_record(path)


def test_trainings_run_side_by_side_and_a_failure_ends_all(
    o: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speedrun, "ROOT", tmp_path)
    (tmp_path / "scripts").mkdir()
    log = tmp_path / "log"
    (tmp_path / "scripts/train_ldm.py").write_text(
        "import os, sys, time\n"
        "seed = sys.argv[sys.argv.index('--seed') + 1]\n"
        f"open({str(log)!r}, 'a').write('+')\n"
        "time.sleep(0.3)\n"
        f"open({str(log)!r}, 'a').write('-')\n"
        "sys.exit(3 if seed == '7' else 0)\n"
    )
    o = replace(o, seeds=(1, 2, 3, 4))
    train_seeds(o, words(o))
    assert log.read_text().count("+") == log.read_text().count("-") == 4
    assert log.read_text().startswith("++-")
    with pytest.raises(RunError, match="seed 7 ended with status 3"):
        train_seeds(replace(o, seeds=(7, 8), jobs=2), words(o))


def test_a_checkout_is_timed_with_its_own_code(o: Options, tmp_path: Path) -> None:
    this = contestant(o, "before", words(o), tmp_path)
    assert this.command()[1] == str(tmp_path / "benchmarks/against/training.py")
    assert this.environment()["PYTHONPATH"] == f"{tmp_path}/benchmarks:{tmp_path}"
    spec = json.loads(this.command()[2])
    assert spec["stage"] == "ldm"
    assert "1000000" in spec["arguments"]
    config = parse(LdmConfig, spec["arguments"])
    assert (config.steps, config.optimizer.warmup) == (10**6, 0)


@pytest.mark.slow
def test_the_step_is_timed_in_turn_with_the_record_before(o: Options) -> None:
    before = {"config": str(ROOT / o.config), "settings": f"{SETTINGS} --batch-size 64"}
    torch.set_num_threads(1)
    seconds = step_seconds(replace(o, calls=3, turns=3), words(o), before)
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
