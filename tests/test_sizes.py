"""Given images are edited at the size of the model's training, and sizes that can't be good give a warning."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ldm.formats.png import read_png
from ldm.pipeline import LatentDiffusionPipeline
from support.commands import run_script
from support.models import tiny_pipeline
from train.commands.outputs import write_png
from train.commands.sizes import suitable


@pytest.fixture(scope="module")
def pipe() -> LatentDiffusionPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def model(pipe: LatentDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


def photo(path: Path, size: tuple[int, int]) -> Path:
    """Write an image of noise and a mask of a box in its middle, and return the image's path."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    mask = Image.new("L", size)
    box = (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2)
    ImageDraw.Draw(mask).rectangle(box, 255)
    mask.save(path.with_name("mask.png"))
    return path


def warnings(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("warning: ")]


HOW = ("--prompt", "x", "--steps", 2, "--model")


def test_a_large_image_is_edited_at_the_size_of_the_training(model: Path, tmp_path: Path) -> None:
    given = photo(tmp_path / "a.png", (1024, 768))
    ended = run_script("img2img", *HOW, model, "--image", given, "--out", tmp_path / "out")
    (made,) = ended.paths
    assert Image.open(made).size == (1024, 768)
    small = photo(tmp_path / "b.png", (32, 32))
    Image.open(given).resize((36, 28), Image.Resampling.BICUBIC).save(small)
    (alone,) = run_script("img2img", *HOW, model, "--image", small, "--out", tmp_path / "out").paths
    expected = Image.open(alone).resize((1024, 768), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(Image.open(made)), np.asarray(expected))
    (line,) = warnings(ended.err)
    assert f"--image {str(given)!r}: has 1024 × 768 pixels, far from the 32 × 32" in line
    assert "generated at 36 × 28 and resized back (--resize never: at its own size)" in line
    (again,) = run_script("img2img", "--like", made, "--out", tmp_path / "again").paths
    np.testing.assert_array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(made)))


def test_pixels_outside_the_mask_stay_the_same(model: Path, tmp_path: Path) -> None:
    given = photo(tmp_path / "a.png", (300, 200))
    how = (*HOW, model, "--image", given, "--mask", tmp_path / "mask.png", "--out", tmp_path / "out")
    (made,) = run_script("inpaint", *how).paths
    before, after = np.asarray(Image.open(given)), np.asarray(Image.open(made))
    kept = np.asarray(Image.open(tmp_path / "mask.png")) == 0
    assert before.shape == after.shape
    np.testing.assert_array_equal(before[kept], after[kept])
    assert (before[~kept] != after[~kept]).mean() > 0.9
    (wider,) = run_script("inpaint", *how[:-4], "--extend", 0, 0, 100, 0, "--out", tmp_path / "wider").paths
    after = np.asarray(Image.open(wider))
    assert after.shape == (200, 400, 3)
    np.testing.assert_array_equal(after[:, :300], before)


@pytest.mark.parametrize(
    ("size", "resize", "at", "warned"),
    [
        ((37, 29), "auto", (37, 29), False),
        ((37, 29), "always", (36, 28), False),
        ((48, 48), "auto", (48, 48), False),
        ((64, 64), "auto", (32, 32), True),
        ((64, 64), "never", (64, 64), True),
        ((8, 12), "auto", (28, 40), True),
        ((4, 600), "auto", (4, 392), True),
    ],
)
def test_when_an_image_is_resized(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int],
    resize: str,
    at: tuple[int, int],
    warned: bool,
) -> None:
    seen: list[tuple[int, int]] = []
    call = LatentDiffusionPipeline.__call__
    monkeypatch.setattr(
        LatentDiffusionPipeline,
        "__call__",
        lambda self, *a, **k: [seen.append(k["image"][0].size), call(self, *a, **k)][1],
    )
    given = photo(tmp_path / "a.png", size)
    ended = run_script("img2img", *HOW, model, "--image", given, "--resize", resize, "--out", tmp_path / "out")
    (made,) = ended.paths
    assert Image.open(made).size == size
    assert read_png(made)["resize"] == resize
    assert bool(warnings(ended.err)) == warned
    assert (resize == "never") == ("leave --resize never out" in ended.err)
    assert seen == [at]


@pytest.mark.parametrize("size", [(4096, 4096), (1, 1), (1, 5000), (31, 33), (640, 480), (3000, 100)])
def test_suitable_sizes_have_the_ratio_and_the_number_of_pixels(
    pipe: LatentDiffusionPipeline, size: tuple[int, int]
) -> None:
    width, height = suitable(pipe, size)
    assert width % pipe.model.size_multiple == height % pipe.model.size_multiple == 0
    if max(size) < 9 * min(size):
        assert width * height == pytest.approx(32 * 32, rel=0.15)
        assert width / height == pytest.approx(size[0] / size[1], rel=0.15)


@pytest.mark.parametrize("script", ["txt2img", "interpolate"])
def test_requested_sizes_far_from_the_training_are_warned_of(model: Path, tmp_path: Path, script: str) -> None:
    how = (script, *HOW, model, *["--to", "y", "--frames", 2] * (script == "interpolate"), "--out", tmp_path)
    (line,) = warnings(run_script(*how, "--width", 64, "--height", 64).err)
    assert "--width 64 --height 64: far from the 32 × 32 of the model's training" in line
    assert not warnings(run_script(*how, "--width", 48).err)
    assert not warnings(run_script(*how).err)


def test_images_of_earlier_versions_are_repeated_at_their_own_size(model: Path, tmp_path: Path) -> None:
    given = photo(tmp_path / "a.png", (64, 64))
    how = (*HOW, model, "--image", given, "--resize", "never", "--out", tmp_path / "out")
    (made,) = run_script("img2img", *how).paths
    settings = read_png(made)
    del settings["resize"]
    earlier = write_png(Image.open(made), tmp_path, "earlier.png", settings)
    (again,) = run_script("img2img", "--like", earlier, "--out", tmp_path / "again").paths
    assert np.abs(np.asarray(Image.open(again), int) - np.asarray(Image.open(made), int)).max() <= 1


@pytest.mark.parametrize("change", [["--strength", 2], ["--mask", "black"]])
def test_an_error_isnt_preceded_by_a_warning(model: Path, tmp_path: Path, change: list[object]) -> None:
    given = photo(tmp_path / "a.png", (200, 200))
    Image.new("L", (200, 200)).save(tmp_path / "black.png")
    how = (*HOW, model, "--image", given, "--mask", tmp_path / "mask.png", "--out", tmp_path / "out")
    change = [tmp_path / "black.png" if word == "black" else word for word in change]
    ended = run_script("inpaint", *how, *change)
    assert (ended.status, ended.err.count("\n"), (tmp_path / "out").exists()) == (2, 1, False)
