"""The page's tab of runs: what it reads, the form made of the configurations, and the processes that it starts."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest
import yaml

from ldm.errors import UserError
from support.runs import ldm_config, train_stage, vae_config
from train.config.load import parse, plain
from train.config.shipped import shipped
from train.engine.folder import RunFolder
from train.engine.owner import Owner
from train.evaluation.curves import run_plots
from train.page import trainings
from train.page.forms import STAGES, config_of, form, group_help, values_of
from train.page.markup import card, figures, lines, status, table
from train.page.offers import offers, open_run, starting_config, starting_points
from train.page.places import Places
from train.page.runs import RunView, find_runs
from train.page.training import _update, curves, run_status, sheets
from train.page.training_form import checked

MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture
def places(parts: Path, shapes: Path, tmp_path: Path) -> Places:
    """The folders of the page: runs of stage 0 and 1 as links would be refused, so their parent is the folder."""
    return Places(parts, parts, shapes.parent, tmp_path / "out")


def made(folder: Path, *, steps: int = 100, lines: int = 10, seconds: float = 2.0, **files: str) -> Path:
    """Write a run's folder whose metrics come every 5 steps and `seconds`."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"steps": steps, "unet": {}}))
    logged = [
        {"step": 5 * k, "time": 100.0 + seconds * k, "loss": 1 / k, "lr": 1e-3, "skipped": 0}
        for k in range(1, lines + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


# -- runs -----------------------------------------------------------------------------------------------------------


def test_runs_are_found_at_any_depth_but_not_inside_runs(tmp_path: Path) -> None:
    for name in ("a", "b/c/d", "b/e"):
        made(tmp_path / name)
    made(tmp_path / "a/checkpoints/x")
    made(tmp_path / ".hidden/y")
    (tmp_path / "z").mkdir()
    (tmp_path / "z/config.yaml").write_text("{}")  # a configuration only
    (tmp_path / "link").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / ".new.page.json").write_text("{}")  # started by the page, and nothing written yet
    os.utime(tmp_path / "b/e/metrics.jsonl", (2e9, 2e9))
    found = find_runs(tmp_path)
    assert found[0] == "b/e"
    assert sorted(found) == ["a", "b/c/d", "b/e", "new"]


def test_time_left_is_the_remaining_steps_at_the_last_speed(tmp_path: Path) -> None:
    """Lines every 5 steps and 2 s: the 50 steps after step 50 of 100 take 20 s."""
    folder = made(tmp_path / "run")
    with RunFolder(folder).locked():
        run = RunView(folder, tmp_path)
        assert run.seconds_left() == pytest.approx(20.0)
        assert run.status() == "training: step 50 of 100, about 20 s left"
    assert RunView(folder, tmp_path).status() == "stopped: step 50 of 100"
    one = RunView(made(tmp_path / "one", lines=1), tmp_path)
    assert one.seconds_left() is None


def test_what_others_wrote_into_a_run_is_left_out(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", **{"damaged.jsonl": f'{{"file": "{MARKUP}", "reason": "x"}}\n[1]\nno\n'})
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": NaN, "loss": 1}\n{"step": 1e999}\n[]\nhalf')
    run = RunView(folder, tmp_path)
    assert run.step == 50
    assert run.damaged() == [(MARKUP, "x")]
    assert "<script" not in table(("file", "why"), run.damaged())
    assert "<script" not in lines([MARKUP]) + status(MARKUP, MARKUP, 0.5)
    assert "<script" not in curves([run, replace(run, path=made(tmp_path / MARKUP.replace("/", "")))])
    shown = card(f"{MARKUP} ![x](https://example.com/a.png) ![y][z] `a < b`")
    assert "<img" not in shown
    assert "![" not in shown
    assert "a < b" in shown


def test_links_out_of_the_runs_are_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_text("secret")
    runs = tmp_path / "runs"
    folder = made(runs / "run")
    (folder / "samples").mkdir()
    (folder / "samples/step-00000005.png").symlink_to(secret)
    assert RunView(folder, runs).sheets() == []
    (folder / "damaged.jsonl").symlink_to(secret)
    with pytest.raises(UserError, match="link that leads out"):
        RunView(folder, runs)
    (folder / "damaged.jsonl").unlink()
    (folder / "model").mkdir()
    (folder / "model/README.md").symlink_to(secret)
    with pytest.raises(UserError, match="link that leads out"):
        RunView(folder, runs)


def test_a_real_run_is_shown(parts: Path) -> None:
    run = RunView(parts / "vae", parts)
    assert (run.stage, run.state, run.steps, run.step) == ("vae", "finished", 8, 8)
    assert run.status() == "finished: 8 steps"
    assert [caption for _, caption in sheets(run)] == [f"step {step:,}" for _, step in run.sheets()]
    names = [plot.name for plot in run_plots(run.metrics, run.stage)]
    assert names[0] == "vae_loss"
    assert {"lr", "speed", "skipped"} <= set(names)
    shown = curves([run, RunView(parts / "clip", parts)])
    assert shown.count("<svg") == shown.count("<figure>") >= 5
    assert "vae" in shown
    assert "Learning rate" in shown
    assert "autoencoder" in run.card().lower()
    assert not run.card().startswith("---")
    assert "finished" in run_status(run)


def test_only_what_changed_is_sent_again(tmp_path: Path) -> None:
    """A film strip stays as it is when only metrics were logged."""
    places = Places(tmp_path, tmp_path, tmp_path, tmp_path)
    folder = made(tmp_path / "run")
    (folder / "samples").mkdir()
    unseen = {"run": None}
    status, stop, versions, shown, strip, _, card, *_ = _update(places, ("run", None), (unseen, unseen))
    assert not stop.interactive  # nothing runs
    assert "stopped: step 50 of 100" in status
    assert "<svg" in shown
    assert strip.visible
    assert "no model yet" in card.value
    assert _update(places, ("run", None), versions)[2:] == [gr.skip()] * 10
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 55, "time": 122.0, "loss": 0.5}\n')
    status, _, _, shown, strip, *_ = _update(places, ("run", None), versions)
    assert "step 55 of 100" in status
    assert strip == gr.skip()
    assert "<svg" in shown


def test_plots_of_a_run_are_its_metrics() -> None:
    logged = [
        {"step": 10.0 * k, "loss": 1.0 / k, "lr": k / 10, "images_per_second": 5.0 * k, "skipped": 0} for k in (1, 2)
    ]
    plots = {plot.name: plot for plot in run_plots([*logged, {"step": 20, "val_loss": 0.3}], "ldm")}
    assert [list(series.y) for series in plots["ldm_loss"].series] == [[1.0, 0.5], [0.3]]
    assert list(plots["lr"].series[0].x) == [10.0, 20.0]
    assert list(plots["speed"].series[0].y) == [5.0, 10.0]
    assert figures([]) != ""


# -- the form -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_the_form_has_each_setting_with_its_help_and_gives_it_back(stage: str) -> None:
    for name in shipped(stage):
        config = parse(STAGES[stage], [name])
        assert config_of(stage, values_of(config)) == config
    fields = form(stage)
    assert all(field.help for field in fields)
    names = {field.name for field in fields}
    assert {"steps", "optimizer.lr", "input.resolution"} <= names
    assert "input.follow_links" not in names
    assert all(group_help(stage, field.group) for field in fields if field.group)
    kinds = {field.name: field.kind for field in fields}
    assert (kinds["steps"], kinds["compile"], kinds["precision"]) == ("integer", "switch", "choice")
    assert kinds["data"] == kinds["out"] == kinds["cache"] == "location"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"steps": 0}, "steps = 0: must be at least 1|steps = 0"),
        ({"optimizer.lr": "fast"}, "optimizer.lr = 'fast': must be a number"),
        ({"unet.channels": "64 x"}, "must be an integer"),
        ({"unet.channels": "64"}, "each must have one entry per level"),
        ({"steps": None}, "must be an integer"),
        ({"precision": "int8"}, "must be"),
        ({"license": "a b"}, "SPDX"),
        ({"nonsense": 1}, "unknown key 'nonsense'"),
    ],
)
def test_wrong_values_give_the_line_of_the_command(change: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line) as refused:
        config_of("ldm", values_of(STAGES["ldm"]()) | change)
    assert "\n" not in str(refused.value)


def test_a_form_offers_what_is_there(places: Places, parts: Path, shapes: Path) -> None:
    found = offers(places, "ldm")
    assert found["data"] == [str(shapes)]
    assert found["vae"] == [str(parts / "vae/model")]
    assert found["text_encoder"] == [str(parts / "clip/model")]
    points = dict(starting_points(places, "vae"))
    assert points["pictures/vae"] == "shipped:pictures/vae"
    assert points["the run vae"] == "run:vae"
    config = starting_config(places, "vae", "run:vae")
    assert plain(config) == plain(vae_config(shapes, parts / "vae"))
    with pytest.raises(UserError):
        starting_config(places, "vae", "run:../vae")


@pytest.mark.parametrize(
    "change",
    [
        {"data": "pipe:touch x"},
        {"data": "someone/dataset"},
        {"data": "/etc"},
        {"data": "https://example.com/a.tar"},
        {"data": ""},
        {"vae": "stabilityai/sd-vae-ft-mse"},
        {"vae": "/"},
        {"text_encoder": "openclip:ViT-B-32/laion2b_s34b_b79k"},
        {"init": "../../etc"},
        {"cache": "/tmp/elsewhere"},
        {"cache": "."},
        {"input.duplicates": "/etc/passwd"},
        {"evaluation_features": "inception"},
        {"trackers": ["wandb"]},
        {"input.follow_links": True},
    ],
    ids=str,
)
def test_nothing_outside_the_folders_can_be_trained_on(
    places: Places, parts: Path, shapes: Path, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainings, "_launch", lambda *_: pytest.fail("started"))
    values = values_of(ldm_config(shapes, parts / "new", parts)) | change
    with pytest.raises(UserError) as refused:
        trainings.start(checked(places, "ldm", "new", values), places)
    assert "\n" not in str(refused.value)
    assert not (parts / ".new.page.yaml").exists()


@pytest.mark.parametrize("name", ["", "../new", "/new", "a/../../new", "pipe:x", "~/x", "x\0y"])
def test_a_run_has_its_folder_in_runs(places: Places, parts: Path, shapes: Path, name: str) -> None:
    with pytest.raises(UserError):
        checked(places, "vae", name, values_of(vae_config(shapes, parts / "x")))


def test_downloads_are_refused(places: Places, parts: Path, shapes: Path) -> None:
    values = values_of(vae_config(shapes, parts / "x")) | {"perceptual.kind": "lpips_vgg"}
    with pytest.raises(UserError, match="downloads nothing"):
        checked(places, "vae", "x", values)


# -- processes ------------------------------------------------------------------------------------------------------


def test_a_process_is_known_by_its_number_and_its_start(tmp_path: Path) -> None:
    own = Owner.of(os.getpid())
    (tmp_path / "x").write_text(own.text())
    assert Owner.read(tmp_path / "x") == own
    assert own.runs
    assert not replace(own, started="1").runs  # the number belongs to another process now
    assert not replace(own, host="elsewhere").runs
    ended = subprocess.Popen([sys.executable, "-c", ""])
    identity = Owner.of(ended.pid)
    time.sleep(0.5)
    assert not identity.runs  # a zombie, until someone waits for it
    ended.wait()
    assert not identity.runs
    for text in ("", "{}", "[]", '{"pid": "x"}', "[" * 10_000):
        (tmp_path / "x").write_text(text)
        assert Owner.read(tmp_path / "x") is None
    assert Owner.read(tmp_path / "none") is None


def test_a_locked_folder_names_its_process(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.settings.write_text("{}")
        assert Owner.read(folder.lock) == Owner.of(os.getpid())
        with pytest.raises(UserError, match="another process is training there"), RunFolder(tmp_path / "run").locked():
            pass
        assert Owner.read(folder.lock) == Owner.of(os.getpid())


def test_a_run_starts_stops_and_continues(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: Path
) -> None:
    """The process has a session of its own, and gets the signal with which a run saves and stops."""
    places = Places(tmp_path, tmp_path, shapes.parent, tmp_path / "out")
    program = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); print('go', flush=True); time.sleep(60)"
    )
    started: list[list[str]] = []
    popen = subprocess.Popen

    def launch(words: list[str], **options: object) -> object:
        started.append(words)
        assert options["start_new_session"]
        return popen([sys.executable, "-c", program], **options)

    monkeypatch.setattr(trainings.subprocess, "Popen", launch)
    config = vae_config(shapes, tmp_path / "a/new")
    run = trainings.start(config, places)
    stored = parse(STAGES["vae"], [started[0][-1]])
    assert stored == config
    assert "train_vae" in started[0][2]
    assert trainings.started_by_page(run)
    for _ in range(100):
        if trainings.log_lines(run) == ["go"]:
            break
        time.sleep(0.05)
    assert "starting: go" in run_status(open_run(places, "a/new"))
    assert find_runs(tmp_path) == ["a/new"]
    with pytest.raises(UserError, match="is starting already"):
        trainings.start(config, places)
    owner = trainings.started_by_page(run)
    assert owner is not None
    assert os.getsid(owner.pid) == owner.pid
    trainings.stop(open_run(places, "a/new"))
    for _ in range(100):
        if not trainings.started_by_page(run):
            break
        time.sleep(0.05)
    assert not owner.runs
    with pytest.raises(UserError, match="isn't training"):
        trainings.stop(open_run(places, "a/new"))
    trainings.start(config, places, with_changes=True)
    assert started[1][-1] == "--resume-with-changes"
    trainings.stop(open_run(places, "a/new"))


def test_a_failed_start_shows_the_commands_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (tmp_path / ".run.page.log").write_text("loading\r 50%\rdone\n\x1b[A\nerror: --data 'x': no such folder <b>\n")
    assert trainings.log_lines(run) == ["done", "error: --data 'x': no such folder <b>"]
    assert trainings.problem(run) == "--data 'x': no such folder <b>"
    view = RunView(run, tmp_path)
    assert "no such folder &lt;b&gt;" in run_status(view)
    (tmp_path / ".run.page.log").unlink()
    (tmp_path / ".run.page.log").symlink_to("/etc/passwd")
    assert trainings.log_lines(run) == []


@pytest.mark.slow
def test_a_run_of_the_page_is_the_commands(shapes: Path, tmp_path: Path) -> None:
    """A run that the page starts, stops and continues ends with the weights of one without a break."""
    places = Places(tmp_path, tmp_path, shapes.parent, tmp_path / "out")
    config = replace(vae_config(shapes, tmp_path / "new"), steps=400, checkpoint_every=400, validate_every=400)
    run = trainings.start(config, places)
    view = RunView(run, tmp_path)
    while not (run / "metrics.jsonl").is_file():
        assert trainings.started_by_page(run), trainings.log_lines(run)
        time.sleep(0.2)
    assert RunView(run, tmp_path).state == "training"
    with pytest.raises(UserError, match="is training already"):
        trainings.start(config, places)
    trainings.stop(view)
    while trainings.started_by_page(run):
        time.sleep(0.1)
    assert any(signal.Signals.SIGTERM.name in line for line in trainings.log_lines(run))
    assert list((run / "checkpoints").glob("step-*"))
    assert RunView(run, tmp_path).state == "stopped"
    trainings.start(config, places)
    while trainings.started_by_page(run):
        time.sleep(0.2)
    assert RunView(run, tmp_path).state == "finished", trainings.log_lines(run)
    train_stage(replace(config, out=str(tmp_path / "whole")))
    state = "checkpoints/step-00000400/state.safetensors"
    assert (run / state).read_bytes() == (tmp_path / "whole" / state).read_bytes()
