"""The commands as a user runs them: all stages on a synthetic dataset and on own images, and their errors.

Some commands on Shapes start a Python of their own. The others are forked from a server that has imported the libraries
already; each has its own arguments, outputs and exit status.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ldm.formats.png import read_png
from support import ROOT
from support.commands import OFFLINE, Ended, run_command
from support.models import tiny_pipeline
from support.processes import run_forked

TRAIN = "--steps 4 --batch-size 8 --optimizer.warmup 0 --log-every 1 --checkpoint-every 2"
CLIP = f"{TRAIN} --text.width 32 --text.layers 1 --text.heads 2 --image.width 32 --image.layers 1 --image.heads 2"
VAE = f"{TRAIN} --model.channels 16 16 16"
LDM = f"{TRAIN} --sample-steps 2"


def command(line: str) -> Ended:
    return run_command(*line.split())


def forked(line: str) -> Ended:
    return run_forked(*line.split())


def train_all_stages(kind: str, data: Path, runs: Path, unet: str) -> None:
    """Train the three stages with the configurations of `kind`, reduced in size."""
    for line in (
        f"scripts/train_clip.py configs/{kind}/clip.yaml --data {data} --out {runs}/clip {CLIP}",
        f"scripts/train_vae.py configs/{kind}/vae.yaml --data {data} --out {runs}/vae {VAE}",
        f"scripts/train_ldm.py configs/{kind}/ldm.yaml --data {data} --vae {runs}/vae/model "
        f"--text-encoder {runs}/clip/model --out {runs}/ldm {LDM} {unet}",
    ):
        ended = forked(line)
        assert ended.status == 0, ended.err
        assert "Warning" not in ended.err


@pytest.fixture(scope="module")
def shapes_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, a Shapes dataset, and runs/, all stages trained on it."""
    root = tmp_path_factory.mktemp("shapes")
    made = command(f"scripts/make_dataset.py shapes --out {root}/data --size 32 --train 32 --test 8 --seed 3")
    assert made.status == 0, made.err
    train_all_stages("shapes", root / "data", root / "runs", "--unet.channels 32 32")
    return root


@pytest.fixture(scope="module")
def pictures_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, 24 images and a damaged one, and runs/, all stages trained on them."""
    root = tmp_path_factory.mktemp("pictures")
    draw_images(root / "data")
    train_all_stages("pictures", root / "data", root / "runs", "--unet.channels 32 32 32")
    return root


def draw_images(folder: Path) -> None:
    folder.mkdir()
    modes = ("RGB", "L", "RGBA", "P", "LA", "1", "I;16", "CMYK")
    for k in range(24):
        mode, size = modes[k % len(modes)], (40 + 9 * k, 150 - 4 * k)
        image = Image.new("RGB", size, (9 * k, 200 - 7 * k, 90))
        ImageDraw.Draw(image).ellipse((5, 5, size[0] - 5, size[1] - 20), (250 - 9 * k, 30, 8 * k))
        suffix = "jpg" if mode == "CMYK" else ("png", "gif", "tiff")[k % 3] if mode == "P" else "png"
        image.convert("L" if mode == "I;16" else mode).convert(mode).save(folder / f"image {k}.{suffix}")
        (folder / f"image {k}.txt").write_text(f"an ellipse, number {k}\nnumber {k}, drawn round\n")
    content = (folder / "image 0.png").read_bytes()
    (folder / "torn.png").write_bytes(content[: len(content) // 2])
    (folder / "torn.txt").write_text("half of an image\n")


def one_line(ended: Ended, status: int) -> str:
    """Return the error, which must be the only line on stderr."""
    assert ended.status == status, ended
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1, ended.err
    return ended.err


def tree(folder: Path) -> dict[str, str]:
    """Return names and content hashes of everything in a folder."""
    paths = {str(p.relative_to(folder)): p for p in folder.rglob("*")}
    return {name: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for name, p in paths.items()}


# -- all stages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shapes", "pictures"])
def test_every_stage_writes_a_run(kind: str, request: pytest.FixtureRequest) -> None:
    runs: Path = request.getfixturevalue(f"{kind}_runs") / "runs"
    for stage in ("clip", "vae", "ldm"):
        lines = [json.loads(line) for line in (runs / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
        assert {p.name for p in (runs / stage / "checkpoints").iterdir()} == {"step-00000002", "step-00000004"}
        Image.open(runs / stage / "samples/step-00000004.png").load()
        assert json.loads((runs / stage / "model/training.json").read_text())["final"] is True


@pytest.mark.parametrize("kind", ["shapes", "pictures"])
def test_text_becomes_images_that_carry_their_settings(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    runs: Path = request.getfixturevalue(f"{kind}_runs") / "runs"
    line = f"scripts/txt2img.py --model {runs}/ldm/model --prompt ellipse --num-images 2 --seed 7 --steps 2 --out "
    run = command if kind == "shapes" else forked
    ended = run(f"{line} {tmp_path}/a")
    assert ended.status == 0, ended.err
    paths = [Path(name) for name in ended.out.split()]
    assert [p.name for p in paths] == ["ellipse-7.png", "ellipse-8.png"]
    for path, seed in zip(paths, (7, 8), strict=True):
        side = 32 if kind == "shapes" else 64
        assert Image.open(path).size == (side, side)
        settings = read_png(path)
        assert (settings["prompt"], settings["seed"], settings["steps"]) == ("ellipse", seed, 2)
    assert forked(f"{line} {tmp_path}/b").status == 0
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_images_become_images(shapes_runs: Path, tmp_path: Path) -> None:
    """Image to image, inpainting and outpainting; the unmasked area is unchanged bit for bit."""
    first, second = sorted((shapes_runs / "data/test").rglob("*.png"))[:2]
    how = f"--model {shapes_runs}/runs/ldm/model --prompt star --steps 2 --num-images 2 --out {tmp_path}"
    ended = forked(f"scripts/img2img.py --image {first} {second} --strength 0.5 {how}")
    assert ended.status == 0, ended.err
    paths = [Path(name) for name in ended.out.split()]
    assert [p.name for p in paths] == [f"{p.stem}-star-{seed}.png" for p in (first, second) for seed in (0, 1)]
    assert read_png(paths[0])["strength"] == 0.5

    given = np.asarray(Image.open(first).convert("RGB"))
    mask = np.zeros((32, 32), np.uint8)
    mask[5:20, 9:13] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    ended = forked(f"scripts/inpaint.py --image {first} --mask {tmp_path}/mask.png {how}/inside")
    assert ended.status == 0, ended.err
    for name in ended.out.split():
        np.testing.assert_array_equal(np.asarray(Image.open(name))[mask == 0], given[mask == 0])
    ended = forked(f"scripts/inpaint.py --image {first} --extend 3 0 4 5 {how}/beyond")
    assert ended.status == 0, ended.err
    for name in ended.out.split():
        made = np.asarray(Image.open(name))
        assert made.shape == (37, 39, 3)
        np.testing.assert_array_equal(made[:32, 3:35], given)


def test_the_report_on_shapes(shapes_runs: Path, tmp_path: Path) -> None:
    ended = command(
        f"scripts/evaluate.py --model {shapes_runs}/runs/ldm/model --data {shapes_runs}/data --split test "
        f"--prompts 6 --images 8 --likelihoods 8 --samples 6 --seeds 2 --steps 2 --out {tmp_path}/report"
    )
    assert ended.status == 0, ended.err
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert set(report["vae"]) >= {"psnr", "ssim", "noise_psnr_0.2", "latent_autocorrelation"}
    assert 0 < report["vae"]["psnr"] < 60
    assert report["latents"]["standard_error"] > 0
    assert set(report["alignment"]) == {"prompts", "seen", "unseen"}
    for kind in ("seen", "unseen"):
        assert set(report["alignment"][kind]) == {"background", "colour", "shape", "size", "relation", "all"}
        assert all(0 <= share <= 1 for share in report["alignment"][kind].values())
    Image.open(tmp_path / "report/samples.png").load()
    features = {measure["features"] for measure in report["measures"] if measure["name"] == "kid"}
    assert features == {f"{shapes_runs}/runs/clip/model (32 px, bicubic, antialiased, from 8-bit images)"}
    page = (tmp_path / "report/report.html").read_text()
    assert page.count("<img") == len(report["samples"]) + len(report["sheets"]) >= 12
    assert page.count("<svg") == len(report["plots"]) >= 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "examples/classifier_guidance.py --images 64 --steps 3 --per-class 1 --weights 0 2 --out {out}",
            "weight 2: ",
        ),
        (
            "benchmarks/sampler_steps.py --prompts 2 --samplers heun --out {out}/steps.json",
            "heun: 4 steps, 7 evaluations",
        ),
    ],
)
def test_examples_and_benchmarks_run(shapes_runs: Path, tmp_path: Path, line: str, message: str) -> None:
    data = f" --data {shapes_runs}/data" if "classifier" in line else ""
    ended = forked(f"{line.format(out=tmp_path)} --model {shapes_runs}/runs/ldm/model{data}")
    assert ended.status == 0, ended.err
    assert message in ended.out
    assert any(tmp_path.iterdir())


def test_the_report_on_images_has_no_alignment(pictures_runs: Path, tmp_path: Path) -> None:
    ended = forked(
        f"scripts/evaluate.py --model {pictures_runs}/runs/ldm/model --data {pictures_runs}/data --split train "
        f"--images 25 --likelihoods 5 --samples 0 --steps 2 --out {tmp_path}"
    )
    assert ended.status == 0, ended.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["vae"]) >= {"psnr", "ssim", "noise_psnr_0.2", "latent_autocorrelation"}
    assert "alignment" not in report
    assert (tmp_path / "report.html").read_text().count("<img") == len(report["samples"]) == 16


def test_a_damaged_image_is_listed_and_not_deleted(pictures_runs: Path) -> None:
    for stage in ("clip", "vae", "ldm"):
        lines = (pictures_runs / f"runs/{stage}/damaged.jsonl").read_text().splitlines()
        assert [json.loads(line)["file"] for line in lines] == ["torn.png"]
        assert json.loads(lines[0])["reason"]
    assert (pictures_runs / "data/torn.png").is_file()


def test_repeating_the_command_continues_the_run(shapes_runs: Path) -> None:
    root = shapes_runs
    line = f"scripts/train_clip.py configs/shapes/clip.yaml --data {root}/data --out {root}/runs/again {CLIP}"
    shutil.copytree(root / "runs/clip", root / "runs/again")
    before = tree(root / "runs/again/checkpoints")
    ended = forked(line)
    assert ended.status == 0
    assert "finished" in ended.out
    assert tree(root / "runs/again/checkpoints") == before
    ended = forked(f"{line} --steps 6")
    assert ended.status == 0, ended.err
    assert "continuing from step 4" in ended.out
    assert (root / "runs/again/checkpoints/step-00000006/manifest.json").is_file()


def test_an_autoencoder_is_evaluated(shapes_runs: Path) -> None:
    runs, out = shapes_runs / "runs", shapes_runs / "measured"
    ended = forked(
        f"scripts/evaluate_vae.py --vae {runs}/vae/model --data {shapes_runs}/data --resolution 32 --out {out} "
        f"--perceptual clip --perceptual-model {runs}/clip/model --features {runs}/clip/model --tile 4 --batch-size 3"
    )
    assert ended.status == 0, ended.err
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["images"] == 8
    assert {"psnr", "ssim", "perceptual", "frechet", "noise_psnr_0.5", "dead_channels"} <= set(report["vae"])
    assert len(report["channels"]) == 4
    with Image.open(out / "reconstructions.png") as sheet:
        assert sheet.height > 7 * 32  # images, reconstructions, differences and four channels


# -- bad input --------------------------------------------------------------------------------------------------------

BAD = {
    "images without captions": ("train_clip.py configs/pictures/clip.yaml --data {bare} --out {new}", "no captions"),
    "no such column": ("train_clip.py --data {data} --out {new} --input.caption-column legend", "legend"),
    "no data": ("train_vae.py --out {new}", "--data"),
    "no out": ("train_vae.py --data {data}", "--out"),
    "unknown key": ("train_clip.py {yaml} --data {data} --out {new}", "stepz"),
    "no such file": ("train_vae.py {root}/none.yaml --data {data} --out {new}", "none.yaml"),
    "unknown option": ("train_vae.py --data {data} --out {new} --stepz 3", "stepz"),
    "not a number": ("train_vae.py --data {data} --out {new} --steps many", "many"),
    "out of range": ("train_vae.py --data {data} --out {new} --steps 0", "steps"),
    "another run's folder": ("train_vae.py configs/shapes/vae.yaml --data {data} --out {vae} {VAE} --seed 5", "--seed"),
    "another stage's folder": ("train_clip.py configs/shapes/clip.yaml --data {data} --out {vae} {CLIP}", "{vae}"),
    "a foreign folder": ("train_vae.py --data {data} --out {bare}", "config.yaml"),
    "a file as folder": ("train_vae.py --data {data} --out {yaml}/run", "{yaml}"),
    "indivisible batch": ("train_vae.py --data {data} --out {new} --batch-size 6 --accumulation 4", "6"),
    "indivisible resolution": ("train_vae.py --data {data} --out {new} --input.resolution 30", "30"),
    "indivisible groups": ("train_vae.py --data {data} --out {new} --model.groups 7", "groups 7"),
    "no perceptual model": (
        "train_vae.py --data {data} --out {new} --perceptual.kind clip --perceptual.model {root}/none",
        "perceptual.model",
    ),
    "a perceptual loss without a model": (
        "train_vae.py --data {data} --out {new} --perceptual.kind clip",
        "perceptual.model",
    ),
    "no weights of LPIPS": (
        "train_vae.py --data {data} --out {new} --perceptual.kind lpips_alex --perceptual.model {yaml}",
        "wrong.yaml",
    ),
    "a discriminator too deep": (
        "train_vae.py --data {data} --out {new} --adversarial.kind hinge --adversarial.layers 4",
        "48 pixels",
    ),
    "a decoder without an encoder": ("train_vae.py --data {data} --out {new} --decoder-only True", "init"),
    "no features": ("train_vae.py --data {data} --out {new} --validation-features nothing", "nothing"),
    "a distance of one image": (
        "train_vae.py --data {data} --out {new} --validation-features {clip}/model --validation-examples 1",
        "at least 2",
    ),
    "no autoencoder to measure": ("evaluate_vae.py --data {data} --out {new}", "--vae"),
    "nothing to measure it with": (
        "evaluate_vae.py --vae {vae}/model --data {data} --out {new} --resolution 32 --perceptual clip",
        "--perceptual-model",
    ),
    "a resolution between latents": (
        "evaluate_vae.py --vae {vae}/model --data {data} --out {new} --resolution 30",
        "30",
    ),
    "no such device": (
        "evaluate_vae.py --vae {vae}/model --data {data} --out {new} --resolution 32 --device abacus",
        "abacus",
    ),
    "no autoencoder": ("train_ldm.py --data {data} --out {new} --vae {root}/none --text-encoder {clip}/model", "none"),
    "no autoencoder on the hub": (
        "train_ldm.py --data {data} --out {new} --vae runs/none --text-encoder {clip}/model",
        "runs/none",
    ),
    "no text encoder": ("train_ldm.py --data {data} --out {new} --vae {vae}/model --text-encoder {root}/none", "none"),
    "no text encoder on the hub": (
        "train_ldm.py --data {data} --out {new} --vae {vae}/model --text-encoder runs/none",
        "runs/none",
    ),
    "eps and zero terminal SNR": (
        "train_ldm.py --data {data} --out {new} --diffusion.target eps --diffusion.zero-terminal-snr True",
        "choose v, x0 or flow",
    ),
    "a variance that never learns": (
        "train_ldm.py --data {data} --out {new} --diffusion.variance learned",
        "choose objective hybrid or vlb",
    ),
    "karras spacing for a flow": (
        "train_ldm.py --data {data} --out {new} --diffusion.schedule flow --diffusion.target flow "
        "--diffusion.spacing karras",
        "karras spacing: needs a finite",
    ),
    "an interval upside down": (
        "txt2img.py --model {ldm}/model --prompt x --out {new} --guidance-interval 5 0.2",
        "0 <= low < high",
    ),
    "too many steps of a sheet": (
        "train_ldm.py --data {data} --out {new} --vae {vae}/model --text-encoder {clip}/model --sample-steps 1001",
        "1001",
    ),
    "random crops of stored latents": (
        "train_ldm.py --data {data} --out {new} --vae {vae}/model --text-encoder {clip}/model --input.crop random",
        "crop random",
    ),
    "xformers without a GPU": (
        "train_ldm.py --data {data} --out {new} --vae {vae}/model --text-encoder {clip}/model --attention xformers",
        "xformers",
    ),
    "no model": ("txt2img.py --prompt x --out {new}", "--model"),
    "no model there": ("txt2img.py --prompt x --model {root}/none --out {new}", "none"),
    "too many steps": ("txt2img.py --prompt x --model {ldm}/model --steps 1001 --out {new}", "1001"),
    "unknown sampler": ("txt2img.py --prompt x --model {ldm}/model --sampler plms --out {new}", "plms"),
    "odd size": ("txt2img.py --prompt x --model {ldm}/model --width 33 --out {new}", "33"),
    "no image": ("img2img.py --prompt x --model {ldm}/model --out {new}", "--image"),
    "no such image": ("img2img.py --image {root}/no.png --prompt x --model {ldm}/model --out {new}", "no.png"),
    "an image that isn't one": ("img2img.py --image {yaml} --prompt x --model {ldm}/model --out {new}", "wrong.yaml"),
    "too strong": ("img2img.py --image {bare}/a.png --strength 1.5 --prompt x --model {ldm}/model --out {new}", "1.5"),
    "no mask": ("inpaint.py --image {bare}/a.png --prompt x --model {ldm}/model --out {new}", "--mask"),
    "a black mask": (
        "inpaint.py --image {bare}/a.png --mask {bare}/a.png --prompt x --model {ldm}/model --out {new}",
        "black",
    ),
    "less than nothing beyond": (
        "inpaint.py --image {bare}/a.png --extend 0 0 0 -1 --prompt x --model {ldm}/model --out {new}",
        "--extend",
    ),
    "nothing to measure": ("evaluate.py --model {ldm}/model --data {data} --images 0 --out {new}", "--images"),
    "nothing to measure on": ("evaluate.py --model {ldm}/model --out {new}", "--data"),
    "no model to inspect with": ("inspect_losses.py --data {data} --out {new}", "--model"),
    "nothing to compare": ("compare.py --reports {bare} --out {new}", "evaluate.py"),
    "small images": ("make_dataset.py shapes --out {new} --size 8", "8"),
    "another set's folder": ("make_dataset.py shapes --out {data} --size 32 --train 9 --test 8", "{data}"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gives_one_line_and_changes_nothing(what: str, shapes_runs: Path, tmp_path: Path) -> None:
    bare, yaml = tmp_path / "bare", tmp_path / "wrong.yaml"
    bare.mkdir()
    Image.new("RGB", (40, 40)).save(bare / "a.png")
    yaml.write_text("stepz: 3\n")
    runs = shapes_runs / "runs"
    names = {stage: runs / stage for stage in ("clip", "vae", "ldm")} | {"VAE": VAE, "CLIP": CLIP}
    names |= {"bare": bare, "yaml": yaml, "root": tmp_path, "new": tmp_path / "new", "data": shapes_runs / "data"}
    line, word = (text.format(**names) for text in BAD[what])
    before = tree(shapes_runs), tree(tmp_path)
    assert word in one_line(forked(f"scripts/{line}"), 2)
    assert (tree(shapes_runs), tree(tmp_path)) == before


# -- a full disk ------------------------------------------------------------------------------------------------------


THREE_RUNS = """
import json, os, shutil, sys
from pathlib import Path
from support.commands import run_script

disk, results, words = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
runs = [run_script("train_vae", *words, "--steps", "2")]
shutil.copytree(disk / "run/checkpoints", results / "before")
space = os.statvfs(disk)
(disk / "filling").write_bytes(bytes(space.f_bavail * space.f_frsize - 512 * 1024))
runs.append(run_script("train_vae", *words))
(disk / "filling").unlink()
shutil.copytree(disk / "run/checkpoints", results / "after")
runs.append(run_script("train_vae", *words))
print(json.dumps(runs))
"""
"""Starts a run, continues it on a disk that is nearly full, and again with space. Prints how each ended."""


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(shapes_runs: Path, tmp_path: Path) -> None:
    """The run is on a small file system, in a mount namespace that ends with the process."""
    own = ["unshare", "--map-root-user", "--mount", "sh", "-ec"]
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        tried = subprocess.run([*own, f"mount -t tmpfs none {disk}"], capture_output=True, text=True, timeout=20)
    except OSError as error:
        pytest.skip(f"no mount namespaces here: {error}")
    if tried.returncode:
        pytest.skip(f"mounting is not permitted here: {tried.stderr.strip()}")
    words = f"{ROOT}/configs/shapes/vae.yaml --data {shapes_runs}/data --out {disk}/run {VAE}".split()
    line = shlex.join([sys.executable, "-c", THREE_RUNS, str(disk), str(tmp_path), *words])
    done = subprocess.run(
        [*own, f"mount -t tmpfs -o size=32m none {disk}; exec {line}"],
        env=os.environ | OFFLINE | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    first, full, again = (Ended(*run) for run in json.loads(done.stdout))
    err = full.err.splitlines()
    assert (first.status, full.status, again.status) == (0, 1, 0), err
    assert [line for line in err if line.startswith("error: disk full while writing")] == err[-1:]
    assert not any("Traceback" in line for line in err)
    assert tree(tmp_path / "after") == tree(tmp_path / "before") != {}
    assert "continuing from step 2" in again.out


def test_a_closed_output_gives_one_line() -> None:
    """The output is closed early, for example by `train_ldm.py --help | head`."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "scripts/train_ldm.py", "--help"],
            cwd=ROOT,
            env=os.environ | OFFLINE,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    finally:
        os.close(write)
    assert done.returncode == 1
    assert done.stderr == "error: the output was closed before all of it was written\n"


@pytest.mark.parametrize("script", ["train_clip", "evaluate"])
def test_a_command_that_has_imported_triton_ends_with_one_line(script: str, tmp_path: Path) -> None:
    """transformers' model classes import TorchDynamo and Triton, which reports at exit what is still alive."""
    tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    options = {"train_clip": ["configs/shapes/clip.yaml"], "evaluate": ["--model", str(tmp_path / "model")]}
    done = subprocess.run(
        [sys.executable, f"scripts/{script}.py", *options[script], "--data", str(tmp_path / "data"), "--out", "out"],
        cwd=ROOT,
        env=os.environ | OFFLINE,
        capture_output=True,
        text=True,
        timeout=200,
    )
    one_line(Ended(done.returncode, done.stdout, done.stderr), 2)


@pytest.mark.parametrize("script", ["demo", "train_ldm"])
def test_a_system_without_locks_of_files_costs_one_line(script: str) -> None:
    """Windows has neither fcntl nor resource."""
    windows = f"import runpy, sys; sys.modules |= dict(fcntl=None, resource=None); sys.argv[1:] = ['--help']; \
runpy.run_path('scripts/{script}.py', run_name='__main__')"
    ended = run_command("-c", windows)
    assert (ended.status, ended.out) == (2, "")
    assert (
        ended.err == "error: runs on Linux and macOS only; on Windows, install WSL, which runs Linux: wsl --install\n"
    )
