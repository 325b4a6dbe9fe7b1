"""Hostile values in the fields of the page's tabs Train, Data and Compare, and hostile files in the given folders.

Most tests call the functions that the page's events call, because any program can send them any JSON.
"""

import html
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import httpx
import numpy as np
import orjson
import pytest
import yaml
from PIL import Image

from ldm.errors import UserError
from support.models import PROMPTS
from support.page import serving
from train.config.ldm import LdmConfig
from train.config.load import dump, validate
from train.config.vae import VaeConfig
from train.engine.folder import RunFolder
from train.engine.owner import Owner
from train.evaluation.curves import run_plots
from train.page import compare, comparing, data, datasets, trainings
from train.page.errors import plain
from train.page.forms import STAGES, config_of, form, values_of
from train.page.markup import card, styled
from train.page.offers import offers, open_run, starting_config, starting_points
from train.page.places import Places
from train.page.runs import RunView, find_runs, read_pairs
from train.page.shared import Page
from train.page.studies import Poll, Study, find_studies, save_image
from train.page.training import _stop, _update, curves, run_status, sheets
from train.page.training_form import checked

SECRET = "canary-77ab"
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"
UNSEEN = ({"run": None}, {"run": None})
NAMES: list[Any] = [
    *("", ".", "..", "../secret", "a/../../secret", "/etc/passwd", "//etc", "~", "~/x", "~root", "leak", "leak/x"),
    *("..\\secret", "\\etc", "x\0", "\0", "a\nb", "\ud800", "\u202egnp", "x" * 5000, "x" * 240, "é" * 200),
    *("pipe:touch canary", "PIPE:x", "http://127.0.0.1:1/x", "file:///etc/passwd", "hf://a/b", "s3://a/b"),
    *(None, 3, True, 1e999, ["a"], {"path": "/etc/passwd"}, b"a"),
]
LOCATIONS = [
    *("/etc", "/etc/passwd", "../secret", "~/x", "~", "/proc/self/environ", "/dev/zero", "\ud800", "x\0", "x" * 5000),
    *("pipe:touch canary", "PIPE:touch canary", "pipe:", "someone/dataset", "openclip:ViT-B-32/laion2b_s34b_b79k"),
    *("https://example.org/a.tar", "http://127.0.0.1:1/", "s3://bucket/a", "hf://a/b", "file:///etc/passwd"),
    *("inception", "dinov2", "clip", "inception:/etc/passwd", "-", "{a..b}.tar", "/etc/*", "a\nb", "\x1b[2J"),
]

CONTINUED = ("vae", "init", "text_encoder", "cache", "evaluation_features")


def shown(name: Any) -> str:
    return repr(name)[:30]


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    """The four folders with a dataset, a secret beside them, and a link to it in each. Nothing may appear elsewhere."""
    root = tmp_path / "root"
    places = Places(root / "models", root / "runs", root / "data", root / "out")
    secret = root / "secret"
    for folder in (places.models, places.runs, places.data / "mine", places.out, secret):
        folder.mkdir(parents=True)
    (secret / "secret.txt").write_text(SECRET)
    Image.new("RGB", (8, 8)).save(secret / "secret.png")
    for folder in (places.models, places.runs, places.data, places.out):
        (folder / "leak").symlink_to(secret)
    for k in range(4):
        Image.new("RGB", (16, 16), (60 * k, 0, 0)).save(places.data / "mine" / f"{k}.png")
        (places.data / "mine" / f"{k}.txt").write_text(f"caption {k}\n")
    datasets._OPENED.clear()
    before = Path.cwd()
    (work := tmp_path / "work").mkdir()
    os.chdir(work)  # relative paths begin here
    yield places
    os.chdir(before)
    assert list(work.iterdir()) == []
    assert sorted(path.name for path in root.iterdir()) == ["data", "models", "out", "runs", "secret"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "work"]
    assert sorted(path.name for path in secret.iterdir()) == ["secret.png", "secret.txt"]


@pytest.fixture
def page(places: Places) -> Iterator[Page]:
    page = Page(places, device="cpu")
    yield page
    page.jobs.close()


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainings, "_launch", lambda *_: pytest.fail("a process was started"))


def refused(call: Any, *arguments: Any) -> str:
    """Check that an event ends with one plain line, and return it. An unexpected error isn't one."""
    with pytest.raises(gr.Error) as error:
        plain(call)(*arguments)
    line = error.value.message
    assert "failed unexpectedly" not in line
    assert "\n" not in line
    assert len(html.unescape(line)) <= 500
    assert SECRET not in line
    assert "<" not in line
    return line


def made(folder: Path, settings: Any = None, **files: Any) -> Path:
    """Write a run's folder with these files."""
    folder.mkdir(parents=True)
    content = {"config.yaml": yaml.safe_dump(settings or {"steps": 100, "unet": {}}), "metrics.jsonl": ""} | files
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def sent(value: Any) -> None:
    """Check that a value can be sent to a browser."""
    orjson.dumps(value)


# -- names in all three tabs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES, ids=shown)
def test_a_hostile_name_is_refused_in_each_field(page: Page, name: Any) -> None:
    places = page.places
    values = values_of(VaeConfig()) | {"data": str(places.data / "mine")}
    refused(checked, places, "vae", name, values)
    refused(open_run, places, name)
    refused(_stop, places, name)
    if name:
        refused(_update, places, (name, None), UNSEEN)
        refused(compare._pair, places, name, "me")
        refused(data.submit, page, name if name != "." else "..", "all", 32, 0)
        refused(data._search, places, name if name != "." else "..", "x", 1)
    refused(compare._result, places, name)
    settings = {"prompts": "x", "pairs": 1, "steps": 1, "guidance_scale": 1.0, "sampler": "ddim", "seed": 0}
    refused(comparing.submit, page, "new", (name, name), settings)
    refused(comparing.submit, page, name, ("a", "b"), settings)
    refused(starting_config, places, "vae", f"run:{name}")
    assert page.jobs.all() == []


@pytest.mark.parametrize(
    "stage", ["", "x", "../x", None, 3, ["ldm"], {"a": 1}, "__class__", "\ud800", "run"], ids=shown
)
def test_a_stage_that_does_not_exist_is_refused(places: Places, stage: Any) -> None:
    refused(starting_config, places, stage, "default:")
    refused(starting_config, places, stage, "shipped:pictures/ldm")
    refused(starting_points, places, stage)


@pytest.mark.parametrize("point", [None, 3, ["run:x"], {"a": 1}], ids=shown)
def test_settings_to_begin_with_are_from_the_list(places: Places, point: Any) -> None:
    refused(starting_config, places, "ldm", point)


@pytest.mark.parametrize("point", ["shipped:/etc/passwd", "shipped:../x", "x", "", "shipped:pipe:x", "shipped:\0"])
def test_other_settings_to_begin_with_are_the_defaults(places: Places, point: str) -> None:
    """No file of this name is read."""
    assert starting_config(places, "ldm", point) == LdmConfig()


# -- the form of a run -------------------------------------------------------------------------------------------------


def locations_of(stage: str) -> list[str]:
    return [field.name for field in form(stage) if field.kind == "location" and field.name != "out"]


@pytest.mark.parametrize("location", LOCATIONS, ids=shown)
@pytest.mark.parametrize(
    "stage", ["ldm", *(pytest.param(s, marks=pytest.mark.slow) for s in ("clip", "vae", "distill"))]
)
def test_a_hostile_location_is_refused_in_each_field(places: Places, stage: str, location: str) -> None:
    """Also if a folder of this name is where the server runs, and the server runs in one of its folders."""
    usual = values_of(STAGES[stage]()) | {"data": str(places.data / "mine")}
    for field in locations_of(stage):
        values = usual | {field: location}
        if field == "perceptual.model":
            values["perceptual.kind"] = "clip"
        line = refused(checked, places, stage, "new", values)
        assert field.rpartition(".")[2] in line or "path" in line or "NUL" in line
    assert list(places.runs.glob(".new*")) == []


@pytest.mark.parametrize("value", ["inception", "dinov2", "clip", "pipe:touch canary", "openclip:a/b", "-"])
def test_a_folder_with_the_name_of_a_command_or_a_download_is_refused(places: Places, value: str) -> None:
    (places.runs / value).mkdir(parents=True)
    os.chdir(places.runs)
    try:
        config = replace(LdmConfig(), data=str(places.data / "mine"), evaluation_features=value, out="x")
        refused(trainings.require_inside, config, places)
        refused(trainings.require_inside, replace(config, data=value, evaluation_features=""), places)
    finally:
        os.chdir(places.runs.parents[1] / "work")


@pytest.mark.parametrize(
    "cache",
    ["new/../{runs}/c", "/tmp/canary/../..{runs}/c", "{runs}", "{runs}/..", "{runs}/../c", "{runs}/leak/c"],
)
def test_a_cache_makes_no_folder_elsewhere(places: Places, cache: str) -> None:
    """mkdir of a/../b also makes a."""
    config = replace(VaeConfig(), data=str(places.data / "mine"), out=str(places.runs / "x"))
    refused(trainings.require_inside, replace(config, cache=cache.format(runs=places.runs)), places)


@pytest.mark.parametrize("inside", ["", "/checkpoints", "/model/unet", "/cache/x"])
def test_no_run_and_no_cache_is_in_another_run_or_model(places: Places, inside: str) -> None:
    made(places.runs / "old")
    config = replace(VaeConfig(), data=str(places.data / "mine"), out=str(places.runs / "x"))
    trainings.require_inside(replace(config, cache=str(places.runs / "cache")), places)
    assert "is a run" in refused(trainings.require_inside, replace(config, cache=f"{places.runs}/old{inside}"), places)
    if inside:
        assert "is a run" in refused(
            trainings.require_inside, replace(config, out=f"{places.runs}/old{inside}"), places
        )


def test_links_in_models_are_not_followed(places: Places) -> None:
    model = places.models / "m"
    model.mkdir()
    config = replace(LdmConfig(), data=str(places.data / "mine"), out=str(places.runs / "x"), vae=str(model))
    trainings.require_inside(config, places)
    (model / "weights").symlink_to(places.runs.parent / "secret")
    for field in ("vae", "init", "text_encoder", "evaluation_features"):
        values = {"vae": "", field: str(model)}
        assert "link that leads out" in refused(trainings.require_inside, replace(config, **values), places)


def test_duplicates_that_an_inspection_wrote_are_accepted(places: Places) -> None:
    report = places.out / "datasets/mine/duplicates.jsonl"
    report.parent.mkdir(parents=True)
    report.write_text("")
    assert offers(places, "vae")["input.duplicates"] == [str(report)]
    values = values_of(VaeConfig()) | {"data": str(places.data / "mine"), "input.duplicates": str(report)}
    checked(places, "vae", "x", values)
    refused(checked, places, "vae", "x", values | {"data": str(places.out / "datasets")})


@pytest.mark.parametrize(
    "change",
    [
        *({"steps": n} for n in (-1, 0, 1e999, float("nan"), 10**30, "x", [1], {}, "9" * 5000)),
        *({"batch_size": n} for n in (-1, 10**12, "1e3", None)),
        *({"input.resolution": n} for n in (-8, 10**9, 2.5, "big")),
        *({"workers": 10**6}, {"accumulation": 10**9}, {"seed": -1}, {"seed": 2**80}, {"input.max_pixels": 10**30}),
        *({"optimizer.lr": v} for v in ("nan!", "-1", "1e999x", MARKUP, "x" * 100_000)),
        *({"unet.channels": v} for v in ("9" * 5000, "1 " * 50_000, "-1 2", "65536 65536", "a")),
        *({"unet.layers": 10**6}, {"unet.depth": 1000, "unet.channels": "65536 65536"}),
        *({"sample_steps": n} for n in (0, -5, 10**9)),
        *({"precision": v} for v in ("fp64", MARKUP, ["fp32"], None, "\ud800")),
        *({"trackers": v} for v in (["wandb"], ["tensorboard", "comet_ml"], "wandb", [MARKUP], {"a": 1}, 3)),
        *({"compile": "maybe"}, {"compile": [True]}, {"license": MARKUP}, {"license": "x\ny"}, {"license": "../x"}),
        *({"input.encoding": "x" * 1000}, {"input.encoding": "zlib"}, {"input.encoding": "../x"}),
        *({"input.caption_template": "{0.__class__}"}, {"input.background": "1 2"}, {"input.background": "1 2 999"}),
        *({"__class__": 1}, {"unet": {}}, {"unet.": 1}, {"": 1}, {"out.x": 1}, {"input.follow_links": True}),
        *({"data": None}, {"data": ""}, {"data": ["a"]}, {"data": {"path": "/etc"}}, {"data": 3}),
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_hostile_setting_is_refused(places: Places, change: dict[str, Any]) -> None:
    values = values_of(LdmConfig()) | {"data": str(places.data / "mine")} | change
    refused(lambda: trainings.start(checked(places, "ldm", "new", values), places))


@pytest.mark.parametrize(
    "prompts", [MARKUP, "pipe:x\n/etc/passwd\n~/x", "${7*7}", "{0.__class__}", "a: &a [*a]\n!!x y"]
)
def test_prompts_are_only_text(places: Places, prompts: str) -> None:
    """They survive the configuration's file as they are."""
    values = values_of(LdmConfig()) | {"prompts": prompts}
    config = config_of("ldm", values)
    assert config == replace(LdmConfig(), prompts=tuple(prompts.splitlines()))
    assert validate(LdmConfig, yaml.safe_load(dump(config))) == config


# -- hostile runs ------------------------------------------------------------------------------------------------------

BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        *(BOMB, "!!python/object/apply:os.system [touch canary]", "[" * 300, "a: &a [*a]", "\0", "\xff", "- 1", "3"),
        *(
            "steps: 2001-99-99",
            "steps: [1]",
            "steps: -5",
            "steps: true",
            f"steps: {10**18}",
            "? {a: b}\n: c",
            "input: 3",
        ),
        *("unet: {}\nteacher: 3", "about: 3", "about: {changes: 3}", "x: " + "y" * 200_000, f"{MARKUP!r}: 1"),
    ],
    ids=shown,
)
def test_a_hostile_config_is_shown_or_left_out(places: Places, text: str) -> None:
    made(places.runs / "bad", **{"config.yaml": text.encode("latin-1")})
    made(places.runs / "good")
    for part in _update(places, ("bad", "good"), UNSEEN):
        assert "<script" not in str(part)
    assert set(find_runs(places.runs)) == {"bad", "good"}
    for stage in STAGES:
        offers(places, stage)
        points = [value for _, value in starting_points(places, stage)]
        if "run:bad" in points and "steps" not in text:
            refused(starting_config, places, stage, "run:bad")
    refused(starting_config, places, "vae", "run:good")  # a run of another stage


@pytest.mark.parametrize("location", [*LOCATIONS[:18], "inception"], ids=shown)
@pytest.mark.parametrize("field", ["data", *(pytest.param(f, marks=pytest.mark.slow) for f in CONTINUED)])
def test_a_run_whose_config_names_other_places_is_not_continued(places: Places, field: str, location: str) -> None:
    usual = {"steps": 10, "unet": {}, "data": str(places.data / "mine"), "out": str(places.runs / "bad")}
    made(places.runs / "bad", usual | {field: location})
    try:
        values = values_of(starting_config(places, "ldm", "run:bad"))
    except UserError:
        return
    refused(lambda: trainings.start(checked(places, "ldm", "bad", values), places))


METRICS = [
    *(
        '{"step": NaN, "loss": 1}',
        '{"step": 1e999}',
        '{"step": 1, "loss": 1e308}',
        '{"step": -1e308, "time": 1e308}',
    ),
    *(
        f'{{"step": 1, "loss": {"9" * 400}}}',
        f'{{"step": {"9" * 5000}}}',
        '{"step": true, "loss": false}',
        "[]",
        "{",
    ),
    *('{"step": 1, "val_error_noise_x": 1}', '{"step": 1, "val_error_noise_": 1}', '{"step": "1"}', "[" * 100_000),
    *(f'{{"step": 2, "{MARKUP}": 1}}', '{"step": 3, "\\ud800": 1}', '{"step": {}}', '{"step": null}', "\xff\xfe\0"),
    *('{"step": 7, "loss": 1e-320, "lr": -5, "time": -1e99}', '{"step": 9, "loss": 1e99, "val_loss": 1e-99}'),
]


def with_metrics(folder: Path, *lines: str) -> Path:
    usual = "".join(json.dumps({"step": k, "loss": 1 / k, "time": float(k)}) + "\n" for k in (1, 2, 3))
    return made(folder, **{"metrics.jsonl": (usual + "\n".join(lines) + "\n").encode("latin-1")})


@pytest.mark.parametrize("line", METRICS, ids=shown)
def test_hostile_metrics_are_shown_or_left_out(places: Places, line: str) -> None:
    folder = with_metrics(places.runs / "bad", line)
    with RunFolder(folder).locked():
        run = RunView(folder, places.runs)
        assert len(run.metrics) >= 3
        sent(run_status(run))
        run_plots(run.metrics, "ldm")


def test_curves_of_hostile_metrics_are_drawn(places: Places) -> None:
    shown = curves([RunView(with_metrics(places.runs / MARKUP.replace("/", ""), *METRICS), places.runs)] * 2)
    assert "<script" not in shown
    assert "<img" not in shown
    sent(shown)


@pytest.mark.slow
def test_a_huge_file_of_metrics_takes_little_memory_and_time(places: Places) -> None:
    """200 MB: lines without end, one line, and many keys."""
    keys = json.dumps({"step": 1} | {f"val_error_noise_{k}-{k}": 1 for k in range(1000)}).encode() + b"\n"
    for content in (
        b'{"step":1}\n' * (2 * 10**7),
        b"[" * 2 * 10**8,
        b"\n" * 2 * 10**8,
        keys * (2 * 10**8 // len(keys)),
    ):
        folder = places.runs / f"r{len(list(places.runs.iterdir()))}"
        made(folder, **{"metrics.jsonl": content, "damaged.jsonl": content})
        began = time.monotonic()
        run = RunView(folder, places.runs)
        assert len(run.metrics) <= 200_000
        assert len(curves([run])) < 2**20
        assert run.damaged() == []
        assert time.monotonic() - began < 30


@pytest.mark.parametrize("text", ["![" * 50_000, "![a](" * 20_000, "[" * 50_000, "\n---\n" * 20_000, "<" * 90_000])
def test_a_hostile_card_takes_little_time(text: str) -> None:
    began = time.process_time()
    shown = card(text)
    assert time.process_time() - began < 2
    assert "![" not in shown


def test_hostile_texts_of_a_run_can_be_sent(places: Places) -> None:
    rows = [{"file": "\ud800" + MARKUP, "reason": "\x1b[2J"}, {"file": "x" * 10**6, "reason": {"a": [1]}}, {"file": 1}]
    folder = made(
        places.runs / "bad",
        **{
            "damaged.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
            "model/README.md": f"---\na: b\n---\n{MARKUP} [x](javascript:alert(1)) ![x](http://127.0.0.1:1/a.png)\0",
        },
    )
    (places.runs / ".bad.page.log").write_bytes(MARKUP.encode() + b"\xff\x1b[2J\x1b]0;x\x07\0\n" + b"y" * 10**6)
    assert all(len(text) <= 500 for pair in read_pairs(folder / "damaged.jsonl") for text in pair)
    for part in _update(places, ("bad", None), UNSEEN):
        text = getattr(part, "value", part)
        if isinstance(text, str):
            sent(text)
            assert "<script" not in text
            assert "<img" not in text
    sent(styled("\ud800"))


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "damaged.jsonl", ".lock", "model/README.md"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "loop"])
def test_a_file_of_another_kind_is_left_out_at_once(places: Places, name: str, kind: str) -> None:
    folder = made(places.runs / "bad", **{"model/README.md": "x"})
    (folder / name).unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(folder / name)
        case "folder":
            (folder / name).mkdir()
        case "link":
            (folder / name).symlink_to(places.runs.parent / "secret/secret.txt")
        case _:
            (folder / name).symlink_to(folder / name)
    made(places.runs / "good")
    began = time.monotonic()
    if kind in ("link", "loop"):
        refused(_update, places, ("bad", None), UNSEEN)
    else:
        assert SECRET not in str(_update(places, ("bad", None), UNSEEN))
    for stage in STAGES:
        offers(places, stage)  # the other runs are offered all the same
        starting_points(places, stage)
    if name == "config.yaml":
        refused(starting_config, places, "ldm", "run:bad")
    assert time.monotonic() - began < 5


def test_names_that_cannot_be_shown_are_left_out(places: Places) -> None:
    for folder in (places.runs, places.data, places.models, places.runs / "compare"):
        for name in (b"\xff\xfe", b"a\nb", b"a\x1b[2J", "\u202egnp".encode()):
            made(Path(os.fsdecode(os.fsencode(folder) + b"/" + name)), **{"model_index.json": "{}", "study.json": "{}"})
    (places.runs / "....page.json").write_text("{}")
    (places.runs / ".x.page.json").write_text("{}")
    assert find_runs(places.runs) == ["x"]
    assert datasets.dataset_names(places) == ["leak", "mine"]
    assert places.model_names() == []
    assert find_studies(places.runs / "compare") == []
    sent(offers(places, "ldm"))


def test_sheets_fill_no_memory(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest ones are shown, up to a number of pixels."""
    monkeypatch.setattr("train.page.training._MOST_PIXELS", 4 * 64 * 64)
    folder = made(places.runs / "bad")
    (folder / "samples").mkdir()
    for step in range(8):
        Image.new("1", (64, 64)).save(folder / f"samples/step-{step:08d}.png")
    assert [text for _, text in sheets(RunView(folder, places.runs))] == [f"step {step}" for step in (4, 5, 6, 7)]


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def bystander(tmp_path_factory: pytest.TempPathFactory) -> Iterator["subprocess.Popen[bytes]"]:
    """A process of this user that trains nothing."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_stop_signals_only_the_process_that_trains_there(
    places: Places, bystander: "subprocess.Popen[bytes]", monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(trainings, "os", SimpleNamespace(kill=lambda *signal: sent.append(signal)))
    folder = made(places.runs / "bad")
    named = [Owner.of(bystander.pid), Owner.of(os.getpid()), Owner.of(1), replace(Owner.of(1), pid=-1)]
    texts = [*(owner.text() for owner in named), '{"pid": 0, "started": "1", "host": "x"}', '{"pid": "1"}', "[" * 9999]
    for text in texts:
        for file in (folder / ".lock", places.runs / ".bad.page.json"):
            (places.runs / ".bad.page.log").write_text("x")
            file.write_text(text)
            refused(_stop, places, "bad")
            file.unlink()
    assert sent == []
    with RunFolder(folder).locked():
        _stop(places, "bad")
    assert sent == [(os.getpid(), signal.SIGTERM)]
    with open(places.runs / ".bad.page.log", "ab"):
        (places.runs / ".bad.page.json").write_text(Owner.of(os.getpid()).text())
        _stop(places, "bad")
    assert len(sent) == 2


def test_a_process_beside_the_folder_of_runs_is_not_one_of_them(places: Places, tmp_path: Path) -> None:
    """`.` is the folder of all runs, and the files beside it are outside."""
    beside = places.runs.parent / ".runs.page.log"
    beside.write_text(SECRET)
    try:
        for name in (".", "./", "./."):
            refused(_update, places, (name, None), UNSEEN)
            refused(_stop, places, name)
    finally:
        beside.unlink()


# -- datasets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["2", 1e999, float("nan"), [1], {}, 2.5], ids=shown)
def test_a_page_of_a_search_has_a_number(places: Places, number: Any) -> None:
    refused(data._search, places, "mine", "", number)


@pytest.mark.parametrize("number", [-5, 0, None, 10**30, -(10**30)])
def test_any_number_of_a_page_is_answered(places: Places, number: Any) -> None:
    line, found = data._search(places, "mine", "", number)
    assert line.startswith("4 images")
    assert len(found) == (0 if number == 10**30 else 4)


@pytest.mark.parametrize("words", [["a"], {"a": 1}, 3, b"a", "x" * 501, "a " * 10**6], ids=shown)
def test_hostile_words_are_refused(places: Places, words: Any) -> None:
    refused(data._search, places, "mine", words, 1)


@pytest.mark.parametrize("words", [MARKUP, ".*", "(" * 400, "\0", "\ud800", "../x", "%s {0}"])
def test_words_are_only_text(places: Places, words: str) -> None:
    assert data._search(places, "mine", words, 1)[1] == []


@pytest.mark.parametrize(
    ("split", "resolution", "limit"),
    [
        *(("x", 32, 0), (None, 32, 0), (["all"], 32, 0), ("all", 10**9, 0), ("all", "x", 0), ("all", 2.5, 0)),
        *(("all", None, 0), ("all", [8], 0), ("all", 32, "x"), ("all", 32, 0.5), ("all", 1e999, 0), ("all", 32, 1e999)),
    ],
    ids=str,
)
def test_hostile_settings_of_an_inspection_are_refused(page: Page, split: Any, resolution: Any, limit: Any) -> None:
    refused(data.submit, page, "mine", split, resolution, limit)
    assert page.jobs.all() == []


@pytest.mark.parametrize(("resolution", "limit"), [(-8, 0), (0, 0), (32, -1), (32, -(10**30))])
def test_other_numbers_fail_with_a_line(page: Page, resolution: int, limit: int) -> None:
    job = data.submit(page, "mine", "all", resolution, limit)
    assert page.jobs.wait(job, 30)
    assert job.state == "failed"
    assert "unexpectedly" not in job.text


@pytest.mark.parametrize(
    "row",
    [
        *({"file_name": name, "text": "x"} for name in ("/etc/passwd", "../../secret/secret.png", "leak.png", "a\0b")),
        *({"file_name": name, "text": "x"} for name in ("../../data/mine/0.png", "~/x.png", "file:///etc/passwd")),
    ],
    ids=lambda row: str(row["file_name"]),
)
def test_a_dataset_shows_no_image_outside(places: Places, row: dict[str, str]) -> None:
    folder = places.data / "bad"
    folder.mkdir()
    Image.new("RGB", (8, 8), "white").save(folder / "a.png")
    Image.new("RGB", (8, 8), "white").save(folder / "b.png")
    (folder / "leak.png").symlink_to(places.runs.parent / "secret/secret.png")
    rows = [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": "b"}, row]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    try:
        _, found = data._search(places, "bad", "x", 1)
    except UserError:
        return
    assert all(np.asarray(image).max() == 128 for image, _ in found)  # grey, as it can't be read


def test_hostile_captions_can_be_sent(places: Places) -> None:
    folder = places.data / "bad"
    folder.mkdir()
    texts = [MARKUP, "\ud800", "\0\x1b[2J", "x" * 10**6, "\u202egnp"]
    for k in range(len(texts)):
        Image.new("RGB", (8, 8)).save(folder / f"{k}.png")
    rows = [{"file_name": f"{k}.png", "text": text} for k, text in enumerate(texts)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, found = data._search(places, "bad", "", 1)
    for _, caption in found:
        sent(caption)
        assert len(caption) <= 2000


@pytest.mark.parametrize(
    "report",
    [
        *(b"", b"[]", b"{}", b"[" * 10**5, b"\xff", b'{"captions": 3}', b'{"captions": {"lengths": {"x": 1}}}'),
        b'{"captions": {"lengths": {"1": 1e999}}, "images": {"shapes": {}, "formats": {}, "traits": {}}}',
        b'{"captions": {}, "images": {"shapes": {"x": ' + b"9" * 400 + b'}, "formats": {}, "traits": {}}}',
    ],
    ids=shown,
)
def test_a_hostile_report_is_none(places: Places, report: bytes) -> None:
    folder = data.report_folder(places, "mine")
    folder.mkdir(parents=True)
    (folder / "report.json").write_bytes(report)
    assert "not inspected yet" in data._report(places, "mine", "")[1]


# -- comparisons -------------------------------------------------------------------------------------------------------


def study(folder: Path, pairs: int = 3, **change: Any) -> Poll:
    for k in range(pairs):
        save_image(folder, k, "first", Image.new("RGB", (8, 8)))
        save_image(folder, k, "second", Image.new("RGB", (8, 8), "white"))
    fields: dict[str, Any] = {"first": "a", "second": "b", "prompts": ("p",) * pairs, "seeds": tuple(range(pairs))}
    Study(**fields | change).write(folder)
    return Poll.open(folder)


@pytest.mark.parametrize("number", [-1, 3, 10**30, 1.0, 1e999, "1", True, None, [0], {}], ids=shown)
@pytest.mark.parametrize("choice", ["left", "tie"])
def test_votes_on_other_pairs_are_not_counted(places: Places, number: Any, choice: str) -> None:
    poll = study(places.runs / "compare/mine")
    vote = compare._voting(places, choice)
    for _ in range(3):
        plain(vote)("mine", "me", number)
    assert poll.result().votes == 0
    assert not poll.file.exists()


def test_one_voter_has_one_vote_on_each_pair(places: Places) -> None:
    poll = study(places.runs / "compare/mine")
    vote = compare._voting(places, "left")
    for number in 5 * list(range(3)):
        vote("mine", "me", number)
    assert poll.result().votes <= 3
    assert len(poll.file.read_text().splitlines()) == poll.result().votes


@pytest.mark.parametrize("voter", [None, 3, ["me"], {"a": 1}, "x" * 61, "a\nb", "\0", "\ud800", "\u202egnp"], ids=shown)
def test_a_voter_has_a_name(places: Places, voter: Any) -> None:
    study(places.runs / "compare/mine")
    refused(compare._pair, places, "mine", voter)
    refused(compare._voting(places, "tie"), "mine", voter, 0)


@pytest.mark.parametrize("voter", ["", MARKUP[:60], "../x", "me; rm", '{"a": 1}', "é"])
def test_any_other_name_of_a_voter_is_only_text(places: Places, voter: str) -> None:
    poll = study(places.runs / "compare/mine")
    number = compare._pair(places, "mine", voter)[0]
    compare._voting(places, "tie")("mine", voter, number)
    (row,) = poll.votes()
    assert row["voter"] == voter
    assert "<img" not in compare._result(places, "mine")


@pytest.mark.parametrize(
    "line",
    [
        *('{"voter": "me", "pair": "1", "winner": "tie"}', '{"voter": "me", "pair": true, "winner": "tie"}'),
        *('{"voter": ["me"], "pair": 1, "winner": "tie"}', '{"voter": "me", "pair": [1], "winner": "tie"}'),
        *('{"voter": "me", "pair": 1.5, "winner": "tie"}', '{"voter": "me", "pair": 1, "winner": ["tie"]}', "[" * 9999),
        f'{{"voter": "me", "pair": {"9" * 5000}, "winner": "tie"}}',
    ],
    ids=shown,
)
def test_a_hostile_line_of_votes_stops_nobody(places: Places, line: str) -> None:
    """Each pair can still be voted on once."""
    poll = study(places.runs / "compare/mine")
    poll.file.write_text(f"{line}\n")
    for k in range(3):
        number = compare._pair(places, "mine", "me")[0]
        assert number is not None, k
        compare._voting(places, "tie")("mine", "me", number)
    assert compare._pair(places, "mine", "me")[0] is None
    assert poll.result().votes == 3


def test_votes_fill_no_disk(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    poll = study(places.runs / "compare/mine")
    for name in ("_MOST_VOTES", "_LARGEST_VOTES"):
        poll.vote(name, poll.study.order(name)[0], "tie")
        size = poll.file.stat().st_size
        with monkeypatch.context() as patch:
            patch.setattr(f"train.page.studies.{name}", poll.result().votes if name == "_MOST_VOTES" else size + 9)
            for _ in range(2):
                refused(poll.vote, "last", poll.study.order("last")[0], "tie")
        assert poll.file.stat().st_size == size


@pytest.mark.parametrize("name", ["study.json", "votes.jsonl", "images"])
def test_links_in_a_comparison_are_not_followed(places: Places, name: str) -> None:
    folder = places.runs / "compare/mine"
    study(folder)
    outside = places.runs.parent / "secret"
    if name == "images":
        for file in (folder / "images").iterdir():
            file.unlink()
            file.symlink_to(outside / "secret.png")
    else:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(outside / "secret.txt")
    refused(compare._pair, places, "mine", "me")
    if name != "images":
        refused(compare._result, places, "mine")


@pytest.mark.parametrize(
    "change",
    [
        *({"prompts": 3}, {"prompts": ["x"] * 20_000, "seeds": [0] * 20_000}, {"seeds": ["x"] * 3}, {"prompts": []}),
        *({"first": 3}, {"sampling": []}, {"secret": None}, {"prompts": None}, {"seeds": [1e999] * 3}),
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_hostile_study_is_refused(places: Places, change: dict[str, Any]) -> None:
    folder = places.runs / "compare/mine"
    study(folder)
    content = json.loads((folder / "study.json").read_text()) | change
    (folder / "study.json").write_text(json.dumps(content))
    refused(compare._pair, places, "mine", "me")
    refused(compare._result, places, "mine")


def test_hostile_texts_of_a_study_can_be_sent(places: Places) -> None:
    study(places.runs / "compare/mine", first=MARKUP + "\ud800", second="\0", prompts=("\ud800" + MARKUP,) * 3)
    _, prompt, *_ = compare._pair(places, "mine", "me")
    sent(prompt.value)
    result = compare._result(places, "mine")
    sent(result)
    assert "<script" not in result


@pytest.mark.parametrize(
    "change",
    [
        *({"pairs": n} for n in (0, -1, 501, 10**30, "x", None, [1], 1e999, float("nan"))),
        *({"steps": n} for n in (0, -1, 1001, "x", None, 1e999)),
        *({"seed": n} for n in (-1, 2**70, "x", None)),
        *({"prompts": p} for p in ("", "\n \n", None, "x" * 2001)),
        *({"sampler": s} for s in ("x", ["ddim"], 3, MARKUP)),
        *({"guidance_scale": s} for s in ("x", [1], {}, None)),
        *({"prompts": "", "dataset": d} for d in ("../secret", "leak", "/etc", "pipe:x", "none", 3, ["mine"])),
    ],
    ids=lambda change: str(change)[:40],
)
def test_hostile_settings_of_a_comparison_are_refused(
    page: Page, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Places, "model", lambda self, name: self.models / name)
    usual = {"prompts": "x", "dataset": "", "pairs": 2, "steps": 2, "guidance_scale": 2.0, "sampler": "ddim", "seed": 0}
    refused(comparing.submit, page, "new", ("a", "b"), usual | change)
    assert page.jobs.all() == []


def test_a_second_comparison_of_the_same_name_replaces_no_votes(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both were submitted before the first one was made."""
    folder = page.places.runs / "compare/mine"
    monkeypatch.setattr(Places, "model", lambda self, name: self.models / name)
    monkeypatch.setattr(page.models, "load", lambda *_: None)

    def images(*_: Any) -> Iterator[Image.Image]:
        if not folder.exists():
            study(folder)  # the other one is ready at this moment
            (folder / "votes.jsonl").write_text("vote\n")
        yield Image.new("RGB", (8, 8))

    monkeypatch.setattr(comparing, "_images", images)
    usual = {"prompts": PROMPTS[0], "pairs": 1, "steps": 2, "guidance_scale": 2.0, "sampler": "ddim", "seed": 0}
    job = comparing.submit(page, "mine", ("a", "b"), usual)
    assert page.jobs.wait(job, 30)
    assert (job.state, "choose another" in job.text) == ("failed", True)
    assert (folder / "votes.jsonl").read_text() == "vote\n"
    refused(comparing.submit, page, "mine", ("a", "b"), usual)


# -- over HTTP ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_event_of_the_page_answers_hostile_json(tmp_path: Path) -> None:
    """Also those that only the page's own script uses."""
    with serving(tmp_path) as served:
        (tmp_path / "secret.txt").write_text(SECRET)
        with httpx.Client(base_url=served.url, timeout=20) as client:
            events = [e for e in client.get("/config").json()["dependencies"] if e["backend_fn"]]
            for value in ("../secret.txt", 1e30, ["pipe:touch canary"]):
                for event in events:
                    hash = f"s{event['id']}"
                    body = {"fn_index": event["id"], "data": [value] * len(event["inputs"]), "session_hash": hash}
                    answer = client.post("/gradio_api/queue/join", json=body)
                    texts = answer.text
                    if answer.status_code == 200:
                        texts += client.get("/gradio_api/queue/data", params={"session_hash": hash}).text
                    assert SECRET not in texts
                    assert "Traceback" not in texts
            assert client.get("/config").status_code == 200
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "models", "out", "runs", "secret.txt"]
        assert list(served.page.places.runs.iterdir()) == []
