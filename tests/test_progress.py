"""The progress of a run on the console, in samples/ and in the trackers."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

import train.engine.estimate
from ldm.errors import UserError
from support import ROOT
from support.commands import run_command, run_script
from support.runs import Crash, Start, clip_config, final_state, losses, train_stage, vae_config
from train.commands.next_command import next_command
from train.config.clip import ClipConfig
from train.config.ldm import LdmConfig
from train.config.run import RunConfig
from train.config.vae import AdversarialConfig, VaeConfig
from train.data.store.shards import duration
from train.engine.device import launcher_warnings, open_accelerator
from train.engine.metrics import Metrics

ALWAYS = 1e-9
"""A number of minutes that every first step exceeds."""


def sheets(out: Path) -> list[str]:
    return sorted(path.stem for path in (out / "samples").glob("*.png"))


def test_the_first_sheet_is_drawn_by_time_and_changes_nothing(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path / "none", first_samples=0)
    assert "first samples" not in capsys.readouterr().out
    assert sheets(tmp_path / "none") == ["step-00000008"]
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", Crash(5), first_samples=ALWAYS)
    assert f"step 1: first samples: {tmp_path / 'run/samples/step-00000001.png'}" in capsys.readouterr().out
    assert sheets(tmp_path / "run") == ["step-00000001"]
    start(tmp_path / "run", first_samples=ALWAYS)
    assert sheets(tmp_path / "run") == ["step-00000001", "step-00000008"]  # not repeated when the run is continued
    assert final_state(tmp_path / "run") == final_state(tmp_path / "none")


def test_a_validation_comes_before_the_first_sheet(start: Start, tmp_path: Path) -> None:
    start(tmp_path / "run", validate_every=1, first_samples=ALWAYS, steps=3)
    assert sheets(tmp_path / "run") == [f"step-{step:08d}" for step in (1, 2, 3)]
    start(tmp_path / "other", first_samples=60, steps=3)
    assert sheets(tmp_path / "other") == ["step-00000003"]


def test_the_duration_is_printed_once_after_the_first_steps(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.engine.estimate, "_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train_stage(clip_config(shapes, tmp_path / "clip", steps=2000), Crash(9))
    line = r"^about ([\w ]+) for 2,000 steps, ([\d.e-]+) s per step, without validation$"
    ((total, each),) = re.findall(line, capsys.readouterr().out, re.MULTILINE)
    around = (
        duration(2000 * float(each) * share) for share in np.linspace(0.9, 1.1, 1000)
    )  # because the duration is rounded
    assert total in set(around)
    with pytest.raises(KeyboardInterrupt):
        train_stage(clip_config(shapes, tmp_path / "clip", steps=2000), Crash(16))
    assert re.search("^about .* for the remaining 1,991 steps, ", capsys.readouterr().out, re.MULTILINE)


def test_the_duration_includes_a_phase_that_starts_later(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.engine.estimate, "_SECONDS", 0.0)
    adversarial = AdversarialConfig(kind="hinge", start=1000, channels=64, layers=3)
    with pytest.raises(KeyboardInterrupt):
        train_stage(vae_config(shapes, tmp_path / "vae", steps=2000, adversarial=adversarial), Crash(9))
    line = r"for 2,000 steps, ([\d.e-]+) s per step, ([\d.e-]+) s from step 1,000 on, without validation$"
    ((early, late),) = re.findall(line, capsys.readouterr().out, re.MULTILINE)
    assert float(late) > 1.2 * float(early)


def test_tensorboard_has_each_step_once_and_the_sheets(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A process numbers its event files, and TensorBoard reads those of the same second in the order of the numbers as
    # text: 10 before 9. With two digits, that is their true order, whatever tests have run in this process before.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(10))
    settings: dict[str, Any] = {"trackers": ("tensorboard",), "log_every": 1, "validate_every": 2}
    for at in (2, 5, 7):  # before the first checkpoint, and after the first and the second
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "run", Crash(at), **settings)
    start(tmp_path / "run", **settings)
    events = EventAccumulator(str(tmp_path / "run/run")).Reload()
    logged = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in logged] == list(range(1, 9))
    assert dict(logged) == pytest.approx(dict(losses(tmp_path / "run")), rel=1e-6)
    assert [image.step for image in events.Images("samples")] == [2, 4, 6, 8]
    sheet = Image.open(tmp_path / "run/samples/step-00000008.png")
    assert (events.Images("samples")[-1].width, events.Images("samples")[-1].height) == sheet.size


@pytest.mark.parametrize(("name", "as_list"), [("wandb", True), ("clearml", False), ("aim", False)])
def test_other_trackers_receive_the_sheets(name: str, as_list: bool, tmp_path: Path) -> None:
    sheet = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(sheet).save(tmp_path / "sheet.png")
    received: list[tuple[dict[str, Any], int]] = []
    tracker = SimpleNamespace(name=name, log_images=lambda values, step: received.append((values, step)))
    accelerator: Any = SimpleNamespace(trackers=[tracker, SimpleNamespace(name="mlflow")])
    Metrics(tmp_path / "metrics.jsonl", accelerator).log_image("samples", tmp_path / "sheet.png", 7)
    ((values, step),) = received
    image = values["samples"][0] if as_list else values["samples"]
    assert step == 7
    assert np.array_equal(image, sheet)


# -- the start and the end of a run ---------------------------------------------------------------------------


def test_a_run_starts_with_its_device_and_settings(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path / "run", steps=1, accumulation=2)
    device = r"device cpu \(1 threads\), 1 process, precision fp32"
    line = rf"^{device}, attention sdpa, batch size 8 \(8 per process in 2 parts\)$"
    assert len(re.findall(line, capsys.readouterr().out, re.MULTILINE)) == 1


LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
"""Environment variables that accelerate launch sets for one process."""


@pytest.mark.parametrize(
    ("environment", "processes", "gpus", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, 1, 0, "mixed precision bf16 has no effect: .* --precision fp32"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8", "WORLD_SIZE": "2"}, 2, 2, "mixed precision fp8"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, 1, 0, "accumulation 4 has no effect: .* --accumulation 1"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, 1, 0, "compiles the networks with inductor"),
        ({"MASTER_ADDR": "127.0.0.1"}, 1, 0, "several processes but started one"),
        ({}, 1, 2, "1 of 2 GPUs is used"),
    ],
)
def test_settings_of_the_launcher_without_effect_are_reported(
    environment: dict[str, str], processes: int, gpus: int, message: str
) -> None:
    (line,) = launcher_warnings(ClipConfig(), processes, gpus, LAUNCHED | environment)
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("environment", "processes", "gpus"),
    [
        ({}, 1, 0),
        (LAUNCHED, 1, 1),
        (LAUNCHED | {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "RANK": "0"}, 2, 2),
        ({"MASTER_ADDR": "127.0.0.1"}, 1, 0),  # of another launcher
    ],
)
def test_settings_of_the_launcher_with_effect_are_not_reported(
    environment: dict[str, str], processes: int, gpus: int
) -> None:
    assert launcher_warnings(ClipConfig(), processes, gpus, environment) == []


@pytest.mark.slow
def test_accelerate_launch_itself_is_answered(shapes: Path, tmp_path: Path) -> None:
    launch = "-m accelerate.commands.launch --num_processes 2 --cpu --mixed_precision bf16 scripts/train_clip.py"
    small = "--text.width 32 --text.layers 1 --text.heads 2 --image.width 32 --image.layers 1 --image.heads 2"
    how = f"configs/shapes/clip.yaml --data {shapes} --out {tmp_path / 'run'} --steps 1 --batch-size 8 {small}"
    ended = run_command(*f"{launch} {how}".split())
    assert ended.status == 0, ended.err
    assert "mixed precision bf16 has no effect: the run uses --precision fp32" in ended.out
    assert "was given several processes but started one: on a CPU it needs MPI; use torchrun" in ended.out
    assert "device cpu (1 threads), 1 process, precision fp32" in ended.out


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_sharding_by_the_launcher_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=f"accelerate's {name} isn't supported"):
        open_accelerator(ClipConfig(out="run"))


def test_fewer_steps_than_are_done_change_nothing(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path / "run", steps=6)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        start(tmp_path / "run", steps=4)
    assert not ended.value.code
    assert capsys.readouterr().out == (
        f"{tmp_path / 'run'} is at step 6, beyond --steps 4: nothing to do; give a larger --steps to continue it\n"
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize(
    ("config", "argv", "expected"),
    [
        (
            ClipConfig(data="my/pictures", out="runs/clip"),
            ["scripts/train_clip.py", "configs/pictures/clip.yaml"],
            "python scripts/train_vae.py configs/pictures/vae.yaml --data my/pictures --out runs/vae",
        ),
        (
            VaeConfig(data="my pictures", out="runs/vae"),
            ["/usr/bin/ldm-train-vae", "pictures/vae"],
            "ldm-train-ldm pictures/ldm --data 'my pictures' --out runs/ldm --vae runs/vae/model --text-encoder FOLDER",
        ),
        (
            VaeConfig(data="d", out="runs/vae"),
            ["scripts/train_vae.py", "--data", "d"],
            "python scripts/train_ldm.py --data d --out runs/ldm --vae runs/vae/model --text-encoder FOLDER",
        ),
        (
            LdmConfig(data="d", out="runs/ldm"),
            ["scripts/train_ldm.py", "pictures/ldm"],
            "python scripts/txt2img.py --model runs/ldm/model --prompt 'a caption' --out out",
        ),
    ],
)
def test_the_next_command_is_in_the_form_of_this_one(
    config: RunConfig, argv: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert next_command(config, argv) == expected


def test_a_finished_run_ends_with_the_next_command(parts: Path, shapes: Path) -> None:
    line = f"--data {shapes} --out {parts / 'more'} --steps 1 --batch-size 4 --input.resolution 32 --trackers"
    small = "--text.width 8 --text.layers 1 --text.heads 2 --image.width 8 --image.layers 1 --image.heads 2"
    for times in ("first", "again"):
        ended = run_script("train_clip", *line.split(), *small.split(), "--image.patch-size", 8)
        assert ended.status == 0, ended.err
        *_, before, last = ended.out.splitlines()
        following = f"python {ROOT / 'scripts/train_vae.py'} --data {shapes} --out {parts / 'vae'}"
        assert last == f"done, in {parts / 'more/model'}; next: {following}"
        assert ("states no licence" if times == "first" else "is finished") in before
