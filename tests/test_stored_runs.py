"""Unfinished runs of earlier code are continued by today's, and use the cache of the earlier code.

tests/stored/README.md describes the files. They are never generated again to suit a change, because users have folders
like these.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from support.commands import run_script
from support.runs import logged
from train.engine.checkpoint import load_tree

STORED = Path(__file__).parent / "stored"
PINNED = json.loads((STORED / "pinned.json").read_text())
EXPECTED = json.loads((STORED / "expected.json").read_text())

ALL = (
    "--steps 4 --batch-size 4 --log-every 1 --checkpoint-every 4 --validate-every 4 --ema-decay 0.9 --trackers "
    "--input.resolution 16 --optimizer.kind muon --optimizer.lr 1e-3 --optimizer.warmup 2"
)
LINES = {
    "clip": f"train_clip --data data --out clip {ALL} --text.vocab-size 600 --text.max-length 8 --text.width 4 "
    "--text.layers 1 --text.heads 2 --image.width 4 --image.layers 1 --image.heads 2 --image.patch-size 4 "
    "--projection 8 --tokens.echo 0",
    "vae": f"train_vae --data data --out vae {ALL} --model.channels 4 4 --model.layers 1 "
    "--model.latent-channels 2 --model.groups 2 --model.attention False --learn-logvar True --adversarial.kind hinge "
    "--adversarial.start 1 --adversarial.channels 4 --adversarial.layers 1 --adversarial.spectral-norm True",
    "ldm": f"train_ldm --data data --out ldm {ALL} --vae vae/model --text-encoder clip/model "
    "--unet.channels 4 --unet.attention False --unet.heads 2 --unet.groups 2 --diffusion.timesteps 8 "
    "--diffusion.timestep-sampling importance --sample-steps 2",
}
"""The commands that started the runs, and that continue them."""


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the stored folders, which is the working directory: at another path, and new to the cache."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(STORED, folder)
    for k, image in enumerate(sorted((folder / "data").rglob("*.png"))):
        os.utime(image, ns=(10**18 + k, 10**18 + k))
    monkeypatch.chdir(folder)
    return folder


def command(line: str, status: int = 0) -> str:
    """Run a command and return what it printed."""
    ended = run_script(*line.split())
    assert ended.status == status, ended
    return ended.out + ended.err


def tensors(checkpoint: Path) -> set[str]:
    """Return the names in the header of a safetensors file."""
    with open(checkpoint / "state.safetensors", "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header.keys() - {"__metadata__"}


def pinned(stage: str) -> set[str]:
    """Return the expected names, with optimizers' entries by number and networks' entries as in the average."""
    names: set[str] = set()
    groups = PINNED["tensors"][stage]
    for group, entries in groups.items():
        if entries == "as state/ema/":
            entries = groups["state/ema/"]
        if isinstance(entries, dict):
            entries = [f"{number}/{name}" for name, numbers in entries.items() for number in numbers]
        names |= {group + name for name in entries}
    return names


def tree(checkpoint: Path) -> dict[str, list[str]]:
    """Return the keys of the state, and of its parts that aren't networks or optimizers."""
    state = dict(json.loads((checkpoint / "state.json").read_bytes())["tree"]["dict"])
    phases = {name: [key for key, _ in value["dict"]] for name, value in state["phases"]["dict"]}
    return {"state": list(state), "scaler": [key for key, _ in state["scaler"]["dict"]]} | phases


def sums(folder: Path) -> dict[str, tuple[str, int]]:
    """Return the content's sum and the time of writing of each file below a folder."""
    return {
        path.relative_to(folder).as_posix(): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("stage", ["clip", "vae", "ldm"])
def test_a_run_of_earlier_code_is_continued(stage: str, stored: Path) -> None:
    run, before = stored / stage, sums(stored / "cache")
    old, new = (run / f"checkpoints/step-{step:08d}" for step in (2, 4))
    earlier = logged(run)
    assert "continuing from step 2" in command(LINES[stage])

    assert tensors(old) == pinned(stage)
    held_out = ["held_out"] * (stage == "ldm")  # the minimum of the held-out loss, which newer checkpoints have
    assert tensors(new) - {"state/held_out/losses"} == pinned(stage)
    assert tree(new) == tree(old) | {"state": [*tree(old)["state"], "examples", *held_out]}
    about = json.loads((run / "model/training.json").read_text())
    assert (about["step"], about["final"]) == (4, True)

    lines = logged(run)
    assert lines[: len(earlier)] == earlier
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    continued, expected = lines[len(earlier) :], [line for line in EXPECTED[stage] if line["step"] > 2]
    for line, like in zip(continued, expected, strict=True):
        newer = {name for name in line if name.startswith("val_error_noise_")}
        assert line.keys() - newer - {"time", "images_per_second", "loading"} == like.keys()
        for name, value in like.items():
            loose = 1e-2 if name.startswith("val_") else 1e-3 if name.endswith("grad_norm") else 1e-4
            assert line[name] == pytest.approx(value, rel=loose, abs=1e-6), (line["step"], name)  # processors differ

    after = sums(stored / "cache")
    assert sorted(before) == PINNED["cache"]
    assert after.items() >= before.items()
    # The copied images have another path and time. Their latents are found by content, and this is recorded.
    recorded = {Path(name) for name in after.keys() - before.keys()}
    assert {path.suffix for path in recorded} <= {".idx", ".json"}
    assert {path.parent for path in recorded} <= {Path(name).parent for name in before}
    assert bool(recorded) == (stage == "ldm")


def test_other_settings_are_refused_for_a_run_of_earlier_code(stored: Path) -> None:
    before = sums(stored / "clip")
    assert "was started with 4" in command(LINES["clip"].replace("--batch-size 4", "--batch-size 8"), status=2)
    assert {name: of for name, of in sums(stored / "clip").items() if name != ".lock"} == before


def test_a_run_of_earlier_code_is_changed_on_request(stored: Path) -> None:
    """Its checkpoint has no position: that is two steps of the old batch size, which is 4."""
    line = (
        LINES["clip"].replace("--batch-size 4", "--batch-size 2").replace("--optimizer.lr 1e-3", "--optimizer.lr 1e-4")
    )
    assert "add --resume-with-changes to continue it with" in command(line, status=2)
    printed = command(f"{line} --resume-with-changes")
    assert "--batch-size 2: changed on request (before: 4)" in printed
    assert "the changes apply from step 2 on, after 8 examples" in printed
    changes = [json.loads(text) for text in (stored / "clip/changes.jsonl").read_text().splitlines()]
    assert [(c["setting"], c["step"], c["position"]) for c in changes] == [("batch_size", 2, 8), ("optimizer.lr", 2, 8)]
    state = load_tree(stored / "clip/checkpoints/step-00000004")
    assert state["examples"]["position"] == 12
    assert [line["lr"] for line in logged(stored / "clip") if "loss" in line][-2:] == [1e-4, 1e-4]


def test_names_of_cache_folders_are_unchanged() -> None:
    """The names and values below are a contract with all existing caches."""
    inputs = yaml.safe_load((STORED / "ldm/config.yaml").read_text())["about"]["inputs"]
    latents = {
        "kind": "latents",
        "encoder": inputs["vae"],
        "size": [16, 16],
        "crops": 1,
        "resampling": "lanczos",
        "resolution": 16,
        "crop": "center",
        "flip": False,
        "background": [255, 255, 255],
        "max_pixels": 89_478_485,
        "shape": [2, 2, 8, 8],
        "dtype": "float32",
        "format": 3,
    }
    text = {"kind": "text", "encoder": inputs["text_encoder"], "shape": [8, 4], "dtype": "float32", "format": 3}
    keys = [hashlib.sha256(json.dumps(on, sort_keys=True).encode()).hexdigest()[:16] for on in (latents, text)]
    assert {path.name for path in (STORED / "cache").iterdir()} == {f"latents-{keys[0]}", f"text-{keys[1]}"}
