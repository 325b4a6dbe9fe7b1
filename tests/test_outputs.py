"""Generated files never replace files with other settings, and the same settings get the same name."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.formats.png import read_png
from support.commands import run_script
from support.models import tiny_pipeline
from train.commands.outputs import image_key, write_png


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def arguments(script: str, model: Path, image: Path, out: Path) -> list[object]:
    common = ["--model", model, "--prompt", "x", "--steps", 2, "--out", out]
    match script:
        case "img2img":
            return [script, *common, "--image", image]
        case "inpaint":
            return [script, *common, "--image", image, "--mask", image.with_name("mask.png")]
        case "interpolate":
            return [script, *common, "--to", "y", "--frames", 2]
        case _:
            return [script, *common]


@pytest.mark.parametrize(
    ("script", "other"),
    [
        ("txt2img", ["--guidance-scale", 7]),
        ("txt2img", ["--negative-prompt", "y"]),
        ("img2img", ["--strength", 0.9]),
        ("inpaint", ["--feather", 3]),
        ("interpolate", ["--guidance-scale", 7]),
        ("interpolate", ["--frames", 3]),
        ("interpolate", ["--fps", 5]),
    ],
)
def test_other_settings_get_another_name_and_the_same_settings_the_same(
    model: Path, image: Path, tmp_path: Path, script: str, other: list[object]
) -> None:
    how = arguments(script, model, image, tmp_path / "out")
    one = run_script(*how).paths
    before = content(tmp_path / "out")
    two = run_script(*how, *other).paths
    assert not set(one) & set(two)
    both = content(tmp_path / "out")
    assert before.items() <= both.items()
    assert len(both) == len(one) + len(two)
    assert [run_script(*how).paths, run_script(*how, *other).paths] == [one, two]
    assert content(tmp_path / "out") == both
    if script == "interpolate":  # the frames and the animation have one name
        assert len({path.name[: len(two[-1].stem)] for path in two}) == 1


def test_grids_of_other_images_get_another_name(model: Path, tmp_path: Path) -> None:
    how = ("txt2img", "--model", model, "--prompt", "x", "--steps", 2, "--grid", "--out", tmp_path, "--num-images")
    *_, two = run_script(*how, 2).paths
    *_, three = run_script(*how, 3).paths
    *_, again = run_script(*how, 2).paths
    assert two == again != three
    assert Image.open(two).size == (64, 32)
    assert Image.open(three).size == (64, 64)
    assert run_script("txt2img", "--like", three, "--out", tmp_path / "b").paths


def test_another_model_or_input_image_gets_another_name(model: Path, image: Path, tmp_path: Path) -> None:
    """The name depends on the content and not on the path."""
    how = ("img2img", "--prompt", "x", "--steps", 2, "--out", tmp_path / "out", "--model", model, "--image")
    (one,) = run_script(*how, image).paths
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy/a.png"
    copy.write_bytes(image.read_bytes())
    assert run_script(*how, copy).paths == [one]
    Image.new("RGB", (32, 32), "red").save(copy)
    assert run_script(*how, copy).paths != [one]


def test_prompts_that_differ_in_case_get_two_files(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("A cat\na cat\n")
    how = ("--prompts", tmp_path / "prompts.txt", "--steps", 2, "--out", tmp_path / "out")
    made = run_script("txt2img", "--model", model, *how).paths
    assert [read_png(path)["prompt"] for path in made] == ["A cat", "a cat"]


@pytest.mark.parametrize("other", [b"", b"my notes", None])
def test_files_of_others_are_never_replaced(model: Path, tmp_path: Path, other: bytes | None) -> None:
    if other is None:
        (tmp_path / "x-0.png").mkdir()
    else:
        (tmp_path / "x-0.png").write_bytes(other)
    how = ("txt2img", "--model", model, "--prompt", "x", "--steps", 2, "--out", tmp_path)
    (made,) = run_script(*how).paths
    assert made.name == f"x-0-{image_key(read_png(made))[:8]}.png"
    assert other is None or (tmp_path / "x-0.png").read_bytes() == other


def test_an_image_is_not_replaced_by_its_repetition(model: Path, tmp_path: Path) -> None:
    (made,) = run_script("txt2img", "--model", model, "--prompt", "x", "--steps", 2, "--out", tmp_path).paths
    before = made.read_bytes()
    ended = run_script("txt2img", "--like", made, "--out", tmp_path)
    assert (ended.status, "give another --out" in ended.err) == (2, True)
    made = made.rename(tmp_path / "best.png")
    assert run_script("txt2img", "--like", made, "--out", tmp_path).paths
    assert made.read_bytes() == before


def _write(folder: str, k: int) -> None:
    settings = {"prompt": "x", "steps": k, "sampler": "ddim", "guidance_scale": 1.0, "seed": 0}
    write_png(Image.new("RGB", (64, 64), (k, k, k)), Path(folder), "x-0.png", settings)


def test_processes_that_write_at_once_keep_all_images(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.starmap(_write, [(str(tmp_path), k) for k in range(40)])
    assert sorted(read_png(path)["steps"] for path in tmp_path.iterdir()) == list(range(40))
