"""A run that is continued with other settings or data, on request: recorded, exact, and refused otherwise."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conditioning.tokenizer import fingerprint, load_tokenizer
from ldm.errors import RunError, UserError
from support.runs import (
    COMMON,
    Crash,
    clip_config,
    final_state,
    ldm_config,
    losses,
    stage_config,
    train_in_processes,
    train_stage,
    vae_config,
)
from train.config.data import DataConfig
from train.config.ldm import DiffusionConfig
from train.config.optimizer import OptimizerConfig
from train.config.run import RunConfig
from train.config.vae import AdversarialConfig
from train.data.store import atomic
from train.data.synthetic.shapes import write_shapes
from train.engine import settings
from train.engine.changes import Change, Saved, examples_of_earlier_code, record_changes
from train.engine.checkpoint import load_tree
from train.engine.folder import RunFolder
from train.engine.settings import write_settings

STAGES = ("clip", "vae", "ldm")
LOWER = replace(COMMON["optimizer"], lr=1e-4)
OTHER = OptimizerConfig(lr=1e-3, schedule="linear", warmup=0, betas=(0.5, 0.9), weight_decay=0.1, clip=0.5)
CHANGES: dict[str, dict[str, Any]] = {
    "a lower rate": {"optimizer": LOWER},
    "another batch size": {"batch_size": 4},
    "another precision": {"precision": "fp16"},
    "other images": {"data": "more"},
    "other settings": {"optimizer": OTHER, "seed": 1, "ema_decay": 0.5, "input": DataConfig(resolution=32, flip=True)},
    "all at once": {"optimizer": LOWER, "batch_size": 4, "accumulation": 2, "data": "more"},
}
FAST_FOR_CLIP = ["clip", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("vae", "ldm"))]
SLOW = ("other settings", "all at once")


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Shapes dataset with other and more images than `shapes`, and with captions of other words."""
    folder = tmp_path_factory.mktemp("more") / "shapes"
    write_shapes(folder, 32, 90, 24, 1)
    table = folder / "train/metadata.jsonl"
    table.write_text(table.read_text().replace("star", "asterisk").replace("circle", "roundabout"))
    return folder


@pytest.fixture(scope="module")
def half_done(shapes: Path, parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], Path]:
    """half_done(stage, out) copies a run that was killed after step 4 of 6 to `out`."""
    made: dict[str, Path] = {}

    def copy(stage: str, out: Path) -> Path:
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp("half") / "run"
            with pytest.raises(KeyboardInterrupt):
                train_stage(stage_config(stage, shapes, made[stage], parts, steps=6, checkpoint_every=4), Crash(4))
        shutil.copytree(made[stage], out)
        return out

    return copy


def record(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's changes.jsonl."""
    return [json.loads(line) for line in (out / "changes.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        pytest.param(stage, name, marks=[pytest.mark.slow] * (name in SLOW and stage != "clip"))
        for stage in STAGES
        for name in CHANGES
    ],
)
def test_a_half_done_run_continues_with_a_change_on_request(
    stage: str,
    name: str,
    half_done: Callable[[str, Path], Path],
    shapes: Path,
    more: Path,
    parts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change = dict(CHANGES[name])
    data = more if change.pop("data", "") else shapes
    how: dict[str, Any] = {"steps": 6, "checkpoint_every": 9, "log_every": 1, **change}
    out = half_done(stage, tmp_path / "run")
    config = stage_config(stage, data, out, parts, **how)
    before = contents(out)
    with pytest.raises(UserError, match=r"^--.*, or .* with.* --resume-with-changes|add --resume-with-changes to"):
        train_stage(config)
    assert contents(out) == before
    capsys.readouterr()
    train_stage(config, with_changes=True)

    lines = record(out)
    assert {(line["step"], line["position"]) for line in lines} == {(4, 32)}
    printed = capsys.readouterr().out
    assert len(re.findall(r"^--.*\bbefore[: ]", printed, re.MULTILINE)) == len(lines) >= 1
    assert "the changes apply from step 4 on, after 32 examples; they are recorded in" in printed
    assert yaml.safe_load((out / "config.yaml").read_text())["about"]["changes"] == lines
    assert json.loads((out / "model/training.json").read_text())["changes"] == lines
    page = (out / "model/README.md").read_text()
    assert all(f"| 4 | {line['setting']} | `" in page for line in lines)
    assert [step for step, _ in losses(out)][-2:] == [5, 6]
    tensors = load_file(out / "checkpoints/step-00000006/state.safetensors")
    assert all(torch.isfinite(value).all() for value in tensors.values() if value.is_floating_point())

    state = load_tree(out / "checkpoints/step-00000006")
    optimizer = config.optimizer
    (group, *_) = next(iter(state["phases"].values()))["optimizer"]["param_groups"]
    assert group["lr"] == optimizer.lr * optimizer.lr_share(5, 6)
    assert (group["betas"], group["weight_decay"]) == (optimizer.betas, optimizer.weight_decay)
    assert state["examples"]["position"] == 32 + 2 * config.batch_size
    assert (state["examples"]["shift"] != 0) == (data is more or config.seed != 0)
    assert bool(state["scaler"]) == (config.precision == "fp16")
    if stage == "clip":
        kept, own = (fingerprint(load_tokenizer(out / place)) for place in ("model", "tokenizer"))
        assert kept == own == fingerprint(load_tokenizer(parts / "clip/model"))


@pytest.mark.parametrize("stage", FAST_FOR_CLIP)
def test_a_changed_run_that_is_cut_equals_one_that_is_not(
    stage: str, half_done: Callable[[str, Path], Path], more: Path, parts: Path, tmp_path: Path
) -> None:
    change = CHANGES["all at once"] | {"steps": 6, "log_every": 1}
    del change["data"]
    one, two = (half_done(stage, tmp_path / name) for name in ("one", "two"))
    train_stage(stage_config(stage, more, one, parts, **change, checkpoint_every=9), with_changes=True)
    with pytest.raises(KeyboardInterrupt):  # before there is a new checkpoint
        train_stage(stage_config(stage, more, two, parts, **change, checkpoint_every=9), Crash(4), with_changes=True)
    dates = [line["date"] for line in record(two)]
    config = stage_config(stage, more, two, parts, **change, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):  # the change has been requested already
        train_stage(config, Crash(5))
    train_stage(config, with_changes=True)
    assert final_state(two, 6) == final_state(one, 6)
    assert losses(two)[-2:] == losses(one)[-2:]
    assert [line["date"] for line in record(two)] == dates
    assert [line | {"date": ""} for line in record(two)] == [line | {"date": ""} for line in record(one)]


@pytest.mark.parametrize("stage", FAST_FOR_CLIP)
def test_the_advice_after_a_divergence_can_be_followed(
    stage: str, half_done: Callable[[str, Path], Path], shapes: Path, parts: Path, tmp_path: Path
) -> None:
    out = half_done(stage, tmp_path / "run")
    how: dict[str, Any] = {"steps": 40, "checkpoint_every": 40, "log_every": 1, "roll_back_after": 2}
    config = stage_config(stage, shapes, out, parts, **how, optimizer=replace(LOWER, lr=1e38, warmup=0))
    with pytest.raises(RunError, match=r"--resume-with-changes and a lower --optimizer\.lr"):
        train_stage(config, with_changes=True)
    train_stage(replace(config, steps=6, optimizer=LOWER), with_changes=True)
    assert [step for step, _ in losses(out)][-2:] == [5, 6]
    tensors = load_file(out / "checkpoints/step-00000006/state.safetensors")
    assert all(torch.isfinite(value).all() for value in tensors.values() if value.is_floating_point())
    (line,) = (line for line in record(out) if line["setting"] == "optimizer.lr")
    assert (line["step"], line["before"], line["now"]) == (4, 1e-3, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_continue_with_changes_as_one(
    stage: str, half_done: Callable[[str, Path], Path], more: Path, parts: Path, tmp_path: Path
) -> None:
    change = {"steps": 9, "log_every": 1, "batch_size": 4, "optimizer": OptimizerConfig(lr=1e-4, warmup=0)}
    for count, name in ((1, "one"), (2, "two")):
        out = half_done(stage, tmp_path / name)
        train_in_processes(stage_config(stage, more, out, parts, **change), count, with_changes=True)
        assert [line["setting"] for line in record(out)][-1] == "data"
    one, two = (losses(tmp_path / name)[-5:] for name in ("one", "two"))
    assert [step for step, _ in two] == [5, 6, 7, 8, 9]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], abs=1e-4)
    # Other examples or noise would change a loss by more than 0.01.


# -- which changes are accepted, without training --------------------------------------------------------------------

DATA = {"data": "a" * 64}


class Folder:
    """A run's folder in which steps are only claimed to have been done."""

    def __init__(self, path: Path) -> None:
        self.folder, self.printed = RunFolder(path), list[str]()
        path.mkdir()

    def start(self, config: RunConfig, inputs: dict[str, str] = DATA, *, with_changes: bool = False) -> None:
        self.printed.clear()
        config = replace(config, out=str(self.folder))
        write_settings(self.folder, config, inputs, with_changes=with_changes, print=self.printed.append)

    def reach(self, step: int) -> None:
        (self.folder.checkpoints / f"step-{step:08d}").mkdir(parents=True)

    @property
    def changes(self) -> list[tuple[int, str, Any, Any]]:
        return [(c.step, c.setting, c.before, c.now) for c in Saved.read(self.folder.settings).changes]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(settings, "commit", str)  # asks git, which takes time
    return Folder(tmp_path / "run")


CLIP = clip_config("data", Path("out"), steps=20)
VAE = vae_config("data", Path("out"), steps=20)
LDM = ldm_config("data", Path("out"), Path("parts"), steps=20)
ADVERSARIAL = VAE.adversarial
FIXED: list[tuple[RunConfig, dict[str, Any], str]] = [
    (CLIP, {"projection": 8}, "--projection 8: .* with 16, which can't change in a run .it determines which weights"),
    (CLIP, {"text": replace(CLIP.text, vocab_size=900)}, "--text.vocab-size 900: .* can't change"),
    (CLIP, {"tokens": replace(CLIP.tokens, sketch=0.0)}, "--tokens.sketch 0.0: .* with 100.0, which can't change"),
    (CLIP, {"input": DataConfig(resolution=64)}, "--input.resolution 64: .* learned position for each patch"),
    (CLIP, {"optimizer": replace(LOWER, kind="muon")}, "--optimizer.kind muon: .*the optimizer's state"),
    (VAE, {"adversarial": AdversarialConfig()}, "--adversarial.kind none: .* can't change"),
    (VAE, {"learn_logvar": True}, "--learn-logvar True: .* can't change"),
    (LDM, {"unet": replace(LDM.unet, channels=(16, 64))}, "--unet.channels 16 64: .* with 16 32, which can't"),
    (LDM, {"diffusion": DiffusionConfig(target="v")}, "--diffusion.target v: .* meaning of the network's outputs"),
    (LDM, {"clip_skip": 1}, "--clip-skip 1: .* these features"),
]


@pytest.mark.parametrize(("config", "change", "message"), FIXED, ids=[message[2:20] for _, _, message in FIXED])
def test_what_can_never_change_is_refused_with_the_reason(
    run: Folder, config: RunConfig, change: dict[str, Any], message: str
) -> None:
    run.start(config)
    run.reach(4)
    before = contents(run.folder.path)
    for with_changes in (False, True):
        with pytest.raises(UserError, match=message):
            run.start(replace(config, **change), with_changes=with_changes)
    assert contents(run.folder.path) == before


ALLOWED: list[tuple[RunConfig, dict[str, Any], list[str]]] = [
    (CLIP, {"tokens": replace(CLIP.tokens, sketch=1.0)}, ["tokens.sketch"]),
    (CLIP, {"input": DataConfig(resolution=32, repeats="folders")}, ["input.repeats"]),
    (VAE, {"input": DataConfig(resolution=64), "kl_weight": 1e-3}, ["input.resolution", "kl_weight"]),
    (VAE, {"adversarial": replace(ADVERSARIAL, kind="saturating", lr=1.0)}, ["adversarial.kind", "adversarial.lr"]),
    (LDM, {"cache": "off", "caption_dropout": 0.0}, ["cache", "caption_dropout"]),
    (LDM, {"diffusion": DiffusionConfig(weighting="min_snr", stratified=True)}, ["weighting", "stratified"]),
]


@pytest.mark.parametrize(("config", "change", "names"), ALLOWED, ids=[names[0] for _, _, names in ALLOWED])
def test_what_changes_no_weights_can_change_on_request(
    run: Folder, config: RunConfig, change: dict[str, Any], names: list[str]
) -> None:
    run.start(config)
    run.reach(4)
    with pytest.raises(UserError, match="add --resume-with-changes to continue it with"):
        run.start(replace(config, **change))
    run.start(replace(config, **change), with_changes=True)
    assert [name.removeprefix("diffusion.") for _, name, _, _ in run.changes] == names
    run.start(replace(config, **change))  # it has been requested
    assert len(run.printed) == len(names)


@pytest.mark.parametrize("name", ["init", "vae", "text_encoder", "perceptual.model"])
def test_the_content_of_networks_can_change_only_if_the_run_does_not_depend_on_it(run: Folder, name: str) -> None:
    run.start(LDM, DATA | {name: "one"})
    run.reach(4)
    with pytest.raises(UserError, match="not the same content") as refused:
        run.start(LDM, DATA | {name: "two"})
    changeable = name == "perceptual.model"
    assert ("--resume-with-changes" in str(refused.value)) == changeable
    if changeable:
        run.start(LDM, DATA | {name: "two"}, with_changes=True)
        assert run.changes == [(4, name, "one", "two")]
    else:
        with pytest.raises(UserError, match="it can't change in a run, because"):
            run.start(LDM, DATA | {name: "two"}, with_changes=True)


def test_a_change_that_reached_no_checkpoint_can_be_taken_back_or_changed_again(run: Folder) -> None:
    run.start(CLIP)
    run.reach(4)
    run.start(replace(CLIP, batch_size=64), with_changes=True)
    assert run.printed == ["--batch-size 64: changed on request (before: 8)"]
    record_changes(run.folder, 4, 32)
    run.start(replace(CLIP, batch_size=16, seed=3), with_changes=True)
    assert run.changes == [(4, "batch_size", 8, 16), (4, "seed", 0, 3)]
    with pytest.raises(UserError, match=r"--batch-size 32: the run in .* was started with 8;"):
        run.start(replace(CLIP, batch_size=32, seed=3))
    run.start(CLIP)  # as at the checkpoint
    record_changes(run.folder, 4, 32)
    assert run.changes == []
    assert not run.folder.changes.exists()
    assert "changes" not in run.folder.settings.read_text()


def test_changes_follow_each_other(run: Folder) -> None:
    run.start(CLIP)
    for step, size in ((4, 16), (8, 8), (12, 4)):
        run.reach(step)
        run.start(replace(CLIP, batch_size=size), {"data": size * "b"}, with_changes=True)
        record_changes(run.folder, step, 10 * step)
    expected = [(4, 8, 16), (8, 16, 8), (12, 8, 4)]
    assert [(step, a, b) for step, name, a, b in run.changes if name == "batch_size"] == expected
    assert [line["position"] for line in record(run.folder.path)] == [40, 40, 80, 80, 120, 120]
    assert Saved.read(run.folder.settings).earlier_data == [DATA["data"], 16 * "b", 8 * "b"]
    run.reach(16)
    with pytest.raises(UserError, match="was changed to 4"):
        run.start(replace(CLIP, batch_size=8), {"data": 4 * "b"})


def test_a_checkpoint_before_a_change_moves_the_change(run: Folder) -> None:
    """If newer checkpoints turn out to be damaged, the changed settings apply from an earlier step on."""
    run.start(CLIP)
    run.reach(4)
    run.start(replace(CLIP, batch_size=16), with_changes=True)
    record_changes(run.folder, 4, 32)
    run.reach(8)
    run.start(replace(CLIP, batch_size=4, seed=1), with_changes=True)
    record_changes(run.folder, 8, 96)
    record_changes(run.folder, 4, 32)
    assert run.changes == [(4, "batch_size", 8, 4), (4, "seed", 0, 1)]
    assert [line["position"] for line in record(run.folder.path)] == [32, 32]
    record_changes(run.folder, 0, 0)
    assert [(line["step"], line["position"]) for line in record(run.folder.path)] == [(0, 0), (0, 0)]


def test_a_start_that_is_killed_at_any_write_neither_loses_nor_repeats_a_change(
    run: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.start(CLIP)
    run.reach(4)
    write, allowed, done = atomic._do, 0, 0

    def killed(call: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done > allowed:
            raise KeyboardInterrupt
        return write(call, *arguments)

    monkeypatch.setattr(atomic, "_do", killed)
    while allowed < done + 1:
        done = 0
        with contextlib.suppress(KeyboardInterrupt):
            run.start(replace(CLIP, batch_size=16), with_changes=True)
            record_changes(run.folder, 4, 32)
        allowed += 1
    assert allowed > 6
    assert run.changes == [(4, "batch_size", 8, 16)]
    assert [line["now"] for line in record(run.folder.path)] == [16]


def test_a_finished_run_cannot_be_changed_without_more_steps(run: Folder) -> None:
    run.start(CLIP)
    run.reach(20)
    with pytest.raises(UserError, match=r"--batch-size: can't change, .* finished \(20 steps\): give a larger --steps"):
        run.start(replace(CLIP, batch_size=4), with_changes=True)
    run.start(replace(CLIP, batch_size=4, steps=30), with_changes=True)
    assert run.changes == [(20, "batch_size", 8, 4)]


@pytest.mark.parametrize("other", [replace(CLIP, batch_size=4), replace(CLIP, projection=8), VAE], ids=["", " ", "vae"])
def test_a_run_that_saved_nothing_is_not_bound_to_its_settings(run: Folder, other: RunConfig) -> None:
    run.start(CLIP)
    leftovers = [run.folder.metrics, run.folder.sheet(3), run.folder.damaged]
    run.folder.samples.mkdir()
    for path in leftovers:
        path.write_text("")
    run.start(CLIP)
    assert all(path.exists() for path in leftovers)
    assert not run.printed
    run.start(other, {"data": "other"})
    assert not any(path.exists() for path in leftovers)
    assert run.printed == [f"{run.folder} has no checkpoint yet: the run begins anew, with other settings than before"]
    assert run.changes == []
    run.folder.model.mkdir()  # the checkpoints may have been removed to save space
    with pytest.raises(UserError):
        run.start(replace(CLIP, seed=9))
    with pytest.raises(UserError, match=r"--seed: can't change, because .* has no checkpoint"):
        run.start(replace(other, seed=9), {"data": "other"}, with_changes=True)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(shapes: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        if name == "two":
            with pytest.raises(KeyboardInterrupt):
                train_stage(clip_config(shapes, tmp_path / name, steps=3, seed=7, log_every=1), Crash(2))
        train_stage(clip_config(shapes, tmp_path / name, steps=3, log_every=1))
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


def test_the_files_of_earlier_code_are_read(run: Folder) -> None:
    run.start(CLIP)
    run.reach(4)
    content = yaml.safe_load(run.folder.settings.read_text())
    content["accept_changed_data"] = True
    content["optimizer"]["matrix_lr"] = 0.0
    content["about"]["earlier_data"] = ["0" * 64]
    run.folder.settings.write_text(yaml.safe_dump(content))
    run.start(CLIP)
    saved = Saved.read(run.folder.settings)
    assert (saved.earlier_data, saved.changes) == (["0" * 64], [])
    text = run.folder.settings.read_text()
    assert "accept_changed_data" not in text
    assert "matrix_lr" not in text
    content["optimizer"]["matrix_lr"] = 0.02  # a rule that no longer exists
    run.folder.settings.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="matrix_lr"):
        run.start(CLIP)


@pytest.mark.parametrize(
    ("change", "inputs", "position", "order"),
    [
        ({}, DATA, 32, ""),
        ({"batch_size": 2}, DATA, 32, ""),
        ({"seed": 2}, DATA, 32, "other"),
        ({}, {"data": "other"}, 32, "other"),
    ],
)
def test_checkpoints_of_earlier_code_have_step_times_their_batch_size(
    run: Folder, change: dict[str, Any], inputs: dict[str, str], position: int, order: str
) -> None:
    run.start(CLIP)
    run.reach(4)
    config = replace(CLIP, **change)
    for _ in range(2):
        run.start(config, inputs, with_changes=True)
        state = examples_of_earlier_code(run.folder.settings, 4, config)
        assert (state["position"], state["order"]) == (position, order)
        record_changes(run.folder, 4, state["position"])


@pytest.mark.parametrize(
    "damage",
    [
        {"about": []},
        {"about": {"changes": 3}},
        {"about": {"changes": [{"step": "x"}]}},
        {"about": {"inputs": [1]}},
        {"about": {"earlier_data": {}}},
        {"input": 5},
        {"optimizer": 3, "about": {"changes": [{**vars(Change(4, 32, "", "optimizer.lr", 1, 2))}]}},
        {"about": {"changes": [{**vars(Change(4, 32, "", "no.such", 1, 2))}]}},
    ],
    ids=str,
)
def test_a_damaged_record_of_changes_is_one_line(run: Folder, damage: dict[str, Any]) -> None:
    run.start(CLIP)
    run.reach(4)
    content = yaml.safe_load(run.folder.settings.read_text())
    run.folder.settings.write_text(yaml.safe_dump(content | damage))
    before = contents(run.folder.path)
    for with_changes in (False, True):
        with pytest.raises(UserError) as refused:
            run.start(replace(CLIP, batch_size=4, projection=9), with_changes=with_changes)
        assert "\n" not in str(refused.value)
    assert contents(run.folder.path) == before


def start_and_refuse(folder: RunFolder) -> None:
    with folder.locked():
        folder.settings.write_text("")
        folder.samples.mkdir()
        raise UserError("late")


@pytest.mark.parametrize("killed", [[], [".lock"], [".lock", ".tmp-config.yaml"], [".tmp-config.yaml"]], ids=str)
@pytest.mark.parametrize("existed", [False, True])
def test_a_start_in_a_folder_without_a_run(tmp_path: Path, killed: list[str], existed: bool) -> None:
    """What a start leaves that was killed in its first moments is no obstacle, and a refused start leaves nothing."""
    folder = RunFolder(tmp_path / "runs/run")
    if existed or killed:
        folder.path.mkdir(parents=True)
    for name in killed:
        (folder.path / name).write_text("half")
    with folder.locked():
        write_settings(folder, replace(CLIP, out=str(folder)), DATA)
    assert folder.settings.is_file()
    folder.settings.unlink()
    existed = folder.path.is_dir()
    with pytest.raises(UserError, match="late"):
        start_and_refuse(folder)
    assert folder.path.is_dir() == existed
    assert not existed or not list(folder.path.iterdir())


def test_a_refused_start_removes_the_folder_that_it_made(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="late"):
        start_and_refuse(folder)
    assert not folder.path.exists()
    folder.path.mkdir()
    (folder.path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="contains files that aren't a run"), folder.locked():
        pass
    assert (folder.path / "mine.txt").read_text() == "mine"
