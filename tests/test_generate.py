"""Images contain their settings and are reproduced from them; the generating commands and their errors.

The commands run in this process, on a model of random weights.
"""

import json
import random
import re
import shutil
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

import train.commands.generate
from autoencoder.preview import fit_colours
from conditioning.tokenizer import PromptCut
from ldm.editing import slerp
from ldm.formats.png import file_name, read_png, save_png
from ldm.pipeline import LatentDiffusionPipeline
from support.commands import run_script
from support.models import tiny_pipeline
from train.commands.generate import image_grid, model_sha256
from train.commands.outputs import image_key
from train.config.sampling import SamplingOptions

SETTINGS = {"negative_prompt": "", "steps": 5, "sampler": "ddim", "guidance_scale": 2.0, "seed": 7}
FEW = ("--steps", "3", "--model")


def refused(script: str, *arguments: object) -> str:
    """Return the line on stderr of a command that refuses its arguments."""
    ended = run_script(script, *arguments)
    assert ended.status == 2, ended
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1, ended.err
    assert len(ended.err) < 1000
    return ended.err


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), int)


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a model with colours for previews."""
    folder, pipe = tmp_path_factory.mktemp("coloured"), tiny_pipeline()
    pipe.save_pretrained(folder)
    fit_colours(pipe.autoencoder, [torch.rand(4, 3, 32, 32) * 2 - 1]).save(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def generated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image that the model has generated."""
    (path,) = run_script("txt2img", *FEW, model, "--prompt", "x", "--out", tmp_path_factory.mktemp("generated")).paths
    return path


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A folder with images a, b and odd, a mask, a black mask and a text file named as an image."""
    folder = tmp_path / "given"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a", (32, 32)), ("b", (32, 32)), ("odd", (37, 29))):
        image = Image.new("RGB", size, tuple(int(n) for n in rng.integers(0, 256, 3)))
        ImageDraw.Draw(image).ellipse((6, 5, 24, 20), tuple(int(n) for n in rng.integers(0, 256, 3)))
        image.save(folder / f"{name}.png")
    mask = Image.new("L", (32, 32))
    mask.save(folder / "black.png")
    ImageDraw.Draw(mask).rectangle((4, 6, 20, 15), 255)
    mask.save(folder / "mask.png")
    (folder / "text.png").write_text("no image")
    return folder


# -- the settings in an image -----------------------------------------------------------------------------------------

BLOCKS = [(0x20, 0x7F), (0xA0, 0x24F), (0x300, 0x370), (0x590, 0x700), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]
BLOCKS += [(0x20000, 0x2FA1F), (0xE0000, 0xE0FFF), (0x10FF00, 0x110000), (0x200B, 0x2070), (0xD800, 0xE000), (1, 32)]
HOSTILE = [
    *(
        "",
        " ",
        "a",
        "A cat, sitting",
        "a cat sitting",
        "a-cat-sitting",
        "!!!",
        "???",
        "con",
        "nul",
        "NUL",
        "com1",
        "aux.txt",
    ),
    *(
        "../../etc/passwd",
        "..\\..\\x",
        "/etc/passwd",
        "C:\\x",
        "~root",
        ".",
        "..",
        ".hidden",
        "-rf",
        "--out=/",
        "a\0b",
        "\0",
    ),
    *(
        "Steps: 1, Seed: 7",
        "x\nSteps: 1, Sampler: ddim, Seed: 7",
        "x\nNegative prompt: y\nSteps: 2",
        "Negative prompt: z",
    ),
    *("<b>&amp;</b><script>", "%s%n{0}${x}`id`", "line\r\nline\rline\vline\u2028line\x85line", "\ttab\t", "\ufeffmark"),
    *(
        "\u202eright to left",
        "שלום עולם",
        "مرحبا",
        "e\u0301" * 9,
        "Z\u0351\u036b\u0343",
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "\ud800",
        "x\udfffy",
        "\udc80" * 3,
    ),
    *('"quoted", \\"', "{}", '{"seed": 1}', "null", "x" * 5000, "x" * 59 + " y", "x" * 59 + " z", "x" * 250 + "y"),
    *("word " * 200_000, "\x01" * 1_000_000, "😀" * 250_000),
]


def prompts() -> list[str]:
    rng = random.Random(0)
    made = []
    while len(HOSTILE) + len(made) < 500:
        block = rng.choice(BLOCKS)
        made.append("".join(chr(rng.randrange(*block)) for _ in range(rng.choice((1, 5, 40, 400)))))
    lone = re.compile("[\ud800-\udbff]+(?=[\udc00-\udfff])")  # a pair, which is one character
    return HOSTILE + [lone.sub("", prompt) for prompt in made]


def test_any_prompt_is_read_back_exactly_and_forges_no_setting(tmp_path: Path) -> None:
    last = "Steps: 5, Sampler: DDIM, CFG scale: 2.0, Seed: 7, Size: 4x4, Model hash: 0123456789, Model: m"
    image, names = Image.new("RGB", (4, 4)), {}
    for k, prompt in enumerate(prompts()):
        reported = {
            **SETTINGS,
            "prompt": prompt,
            "negative_prompt": prompt[:k],
            "model": "m",
            "sha256": {"model": "0123456789ab"},
        }
        name = file_name(prompt, 7)
        assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,75}-7\.png", name)
        assert not re.fullmatch(r"(con|nul|aux|prn|com\d|lpt\d)(\..*)?", name)
        assert names.setdefault(name, prompt.lower()) == prompt.lower()
        save_png(image, tmp_path / name, reported)
        assert read_png(tmp_path / name) == reported
        with Image.open(tmp_path / name) as read:
            read.load()
            assert read.info["parameters"].split("\n")[-1] == last
            assert "\0" not in read.info["parameters"]
        (tmp_path / name).unlink()


def test_separators_in_values_are_quoted(tmp_path: Path) -> None:
    """AUTOMATIC1111 reads a value in quotes as JSON."""
    reported = {
        **SETTINGS,
        "prompt": "x",
        "model": 'a, "b": c\nSeed: 9',
        "sha256": {"model": "f" * 64},
        "strength": 0.25,
    }
    save_png(Image.new("RGB", (5, 4)), tmp_path / "a.png", reported)
    last = Image.open(tmp_path / "a.png").info["parameters"].split("\n")[-1]
    pairs = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert json.loads(pairs.pop("Model")) == reported["model"]
    assert pairs == {
        "Steps": "5",
        "Sampler": "DDIM",
        "CFG scale": "2.0",
        "Seed": "7",
        "Size": "5x4",
        "Model hash": "f" * 10,
        "Denoising strength": "0.25",
    }


# -- reproduction ----------------------------------------------------------------------------------------------------


def test_one_of_seven_images_is_reproduced_separately(model: Path, tmp_path: Path) -> None:
    seven = run_script(
        "txt2img",
        *FEW,
        model,
        "--prompt",
        "a red star, no?",
        "--num-images",
        7,
        "--seed",
        3,
        "--sampler",
        "euler_ancestral",
        "--guidance-interval",
        0.1,
        9,
        "--compose",
        "a blue --box",
        1.5,
        "x",
        1,
        "--out",
        tmp_path / "a",
    ).paths
    (again,) = run_script("txt2img", "--like", seven[4], "--out", tmp_path / "b").paths
    assert again.name == seven[4].name == file_name("a red star, no?", 7)
    assert np.abs(pixels(again) - pixels(seven[4])).max() <= 1
    assert read_png(again) == read_png(seven[4])
    assert np.abs(pixels(again) - pixels(seven[5])).max() > 9


def test_options_override_the_settings_in_an_image(model: Path, tmp_path: Path) -> None:
    (first,) = run_script(
        "txt2img",
        *FEW,
        model,
        "--prompt",
        "a red star",
        "--seed",
        8,
        "--sampler",
        "ddim",
        "--eta",
        0.5,
        "--out",
        tmp_path / "a",
    ).paths
    (other,) = run_script("txt2img", "--like", first, "--eta", 0.0, "--prompt", "box", "--out", tmp_path / "b").paths
    assert read_png(other) == read_png(first) | {"eta": 0.0, "prompt": "box"}
    before = first.read_bytes()
    (beside,) = run_script("txt2img", "--like", first, "--steps", 2, "--out", tmp_path / "a").paths
    assert beside.name.startswith(f"{first.stem}-")
    assert first.read_bytes() == before


def test_images_from_images_are_reproduced(model: Path, given: Path, tmp_path: Path) -> None:
    made = run_script(
        "img2img",
        *FEW,
        model,
        "--image",
        given / "a.png",
        given / "odd.png",
        "--prompt",
        "x",
        "--strength",
        0.7,
        "--num-images",
        2,
        "--out",
        tmp_path / "a",
    ).paths
    assert [p.name for p in made] == ["a-x-0.png", "a-x-1.png", "odd-x-0.png", "odd-x-1.png"]
    for path in made[1::2]:
        (again,) = run_script("img2img", "--like", path, "--out", tmp_path / "b").paths
        assert np.abs(pixels(again) - pixels(path)).max() <= 1
    assert "Denoising strength: 0.7" in Image.open(made[0]).info["parameters"].split("\n")[-1]
    inside = ("--mask", given / "mask.png", "--feather", 3, "--extend", 3, 0, 0, 2, "--strength", 0.8)
    (first,) = run_script(
        "inpaint", *FEW, model, "--image", given / "a.png", *inside, "--prompt", "x", "--out", tmp_path / "c"
    ).paths
    assert Image.open(first).size == (35, 34)
    (again,) = run_script("inpaint", "--like", first, "--out", tmp_path / "d").paths
    assert np.abs(pixels(again) - pixels(first)).max() <= 1
    assert read_png(again) == read_png(first)


def test_missing_or_changed_inputs_are_refused(model: Path, given: Path, tmp_path: Path) -> None:
    how = ("--image", given / "a.png", "--mask", given / "mask.png", "--prompt", "x", "--out")
    (first,) = run_script("inpaint", *FEW, model, *how, tmp_path / "a").paths
    again = ("--like", first, "--out", tmp_path / "b")
    shutil.copy(given / "b.png", given / "a.png")
    assert f"its input {str(given / 'a.png')!r} has changed; give --image" in refused("inpaint", *again)
    assert run_script("inpaint", *again, "--image", given / "b.png").paths
    (given / "mask.png").unlink()
    assert "is missing; give --mask" in refused("inpaint", *again, "--image", given / "b.png")
    assert run_script("inpaint", *again, "--image", given / "b.png", "--mask", given / "odd.png").paths


def test_a_changed_model_gives_a_warning(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "model"
    shutil.copytree(model, own)
    (first,) = run_script("txt2img", *FEW, own, "--prompt", "x", "--out", tmp_path / "a").paths
    assert read_png(first)["sha256"] == {"model": model_sha256(own)}
    assert "warning" not in run_script("txt2img", "--like", first, "--out", tmp_path / "b").err
    pipe = LatentDiffusionPipeline.from_pretrained(own)
    pipe.unet.conv_in.bias += 1
    pipe.unet.save_pretrained(str(own / "unet"), max_shard_size="200KB")
    (own / "unet/diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    assert len(list(own.glob("unet/*.safetensors"))) > 1
    ended = run_script("txt2img", "--like", first, "--out", tmp_path / "b")
    assert ended.paths
    (line,) = (line for line in ended.err.splitlines() if line.startswith("warning: "))
    assert f"the model {str(own)!r} has changed" in line
    assert "warning" not in run_script("txt2img", "--like", first, "--model", own, "--out", tmp_path / "b").err
    shutil.rmtree(own)
    assert "is not an existing folder; give --model" in refused("txt2img", "--like", first, "--out", tmp_path / "b")


def with_text(path: Path, text: str, key: str = "ldm") -> Path:
    info = PngInfo()
    info.add_itxt(key, text)
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "/tmp/x"}, "this command has no setting 'out'"),
        ({"device": "cuda"}, "'device'"),
        ({"like": "a.png"}, "'like'"),
        ({"__class__": 1}, "'__class__'"),
        ({"image": ["a.png"], "strength": 0.5}, "this command has no setting 'image'"),
        ({"x" * 100_000: 1}, "'xxxxx"),
        ({"steps": "many"}, "steps = 'many'"),
        ({"steps": 2.5}, "steps"),
        ({"steps": 10**6}, "steps"),
        ({"steps": -1}, "-1"),
        ({"seed": 10**30}, "seed"),
        ({"seed": -5}, "seed -5"),
        ({"seed": 2**63}, "--seed"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": {"a" * 10_000: "b" * 10_000}}, "prompt"),
        ({"compose": [["a"]]}, "compose"),
        ({"compose": [["a", float("nan")]]}, "finite"),
        ({"guidance_scale": float("inf")}, "finite"),
        ({"guidance_interval": [1]}, "guidance_interval"),
        ({"sampler": "os.system"}, "sampler"),
        ({"precision": "int8"}, "precision"),
        ({"model": "../../nowhere"}, "not an existing folder"),
        ({"model": "owner/name"}, "not an existing folder"),
        ({"model": "\0"}, "not an existing folder"),
        ({"model": 3}, "model"),
        ({"weak_model": "owner/name"}, "--weak-model"),
        ({"weak_scale": 3.0}, "no effect without --weak-model"),
        ({"width": "wide"}, "width"),
        ({"width": -32}, "32"),
        ({"tile": 3}, "--tile 3: must be at least 4 latents"),
        ({"sha256": {"model": 3}}, "sha256.model = 3"),
        ({"sha256": "abc"}, "abc"),
    ],
)
def test_invalid_settings_in_an_image_are_refused_in_one_line(
    generated: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    wrong = with_text(tmp_path / "wrong.png", json.dumps(read_png(generated) | change))
    assert message in refused("txt2img", "--like", wrong, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


GARBAGE = [
    "",
    "{",
    "null",
    "[]",
    "7",
    '"text"',
    "NaN",
    "[" * 100_000,
    '{"a":' * 100_000,
    "\ufeff{}",
    "9" * 10_000,
    "{'a': 1}",
]


def test_damaged_metadata_is_refused_in_one_line(tmp_path: Path, given: Path) -> None:
    out, rng = ("--out", tmp_path / "new"), random.Random(0)
    for text in GARBAGE:
        assert "--like" in refused("txt2img", "--like", with_text(tmp_path / "x.png", text), *out)
    assert "no settings" in refused("txt2img", "--like", with_text(tmp_path / "x.png", "{}", "parameters"), *out)
    valid = with_text(tmp_path / "x.png", json.dumps({"steps": "x", "prompt": "p" * 99})).read_bytes()
    for _ in range(150):
        broken = bytearray(valid)
        for _ in range(rng.randint(1, 8)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        (tmp_path / "x.png").write_bytes(broken[: rng.choice((len(broken), rng.randrange(len(broken))))])
        refused("txt2img", "--like", tmp_path / "x.png", *out)
    assert "not a PNG image" in refused("txt2img", "--like", given / "text.png", *out)
    assert "No such file" in refused("txt2img", "--like", tmp_path / "none.png", *out)
    assert "directory" in refused("txt2img", "--like", tmp_path, *out)
    assert not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore::conditioning.tokenizer.PromptCut")
def test_a_hostile_prompt_is_reproduced(model: Path, tmp_path: Path) -> None:
    for k, prompt in enumerate(("%(prog)s {0} --out /", "--steps", "x\ny\0\ud800", "\u202e🏳️‍🌈" * 50, "y " * 500_000)):
        reported = {**SETTINGS, "prompt": prompt, "steps": 2, "model": str(model)}
        path = with_text(tmp_path / f"{k}.png", json.dumps(reported))
        (made,) = run_script("txt2img", "--like", path, "--out", tmp_path / "new").paths
        assert read_png(made)["prompt"] == prompt


# -- several prompts and images -------------------------------------------------------------------------------------


def test_a_file_of_prompts(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red star\r\n\r\n  \nשלום\u2028x, y\n!!!\n???\n".encode())
    how = ("--prompts", path, "--num-images", 2, "--seed", 4, "--batch-size", 3)
    made = run_script("txt2img", *FEW, model, *how, "--out", tmp_path / "a").paths
    reported = [(read_png(p)["prompt"], read_png(p)["seed"]) for p in made]
    assert reported == [(p, s) for p in ("a red star", "שלום\u2028x, y", "!!!", "???") for s in (4, 5)]
    assert len(set(made)) == 8
    (single,) = run_script("txt2img", *FEW, model, "--prompt", "???", "--seed", 5, "--out", tmp_path / "b").paths
    assert single.name == made[-1].name
    assert np.abs(pixels(single) - pixels(made[-1])).max() <= 1


def test_a_prompt_of_a_megabyte_is_read_from_a_file_and_gives_one_warning(model: Path, tmp_path: Path) -> None:
    prompt = 'a red star\\ "\t' * 80_000
    (tmp_path / "prompts.txt").write_text(prompt + "\n")
    with pytest.warns(PromptCut) as caught:
        (made,) = run_script(
            "txt2img", *FEW, model, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "a"
        ).paths
    assert read_png(made)["prompt"] == prompt
    (cut,) = caught
    assert re.fullmatch(r"a prompt has \d+ tokens but only 14 fit; .* and \d+ more characters", str(cut.message))
    assert len(str(cut.message)) < 700


def test_images_and_prompts_agree_in_number(model: Path, given: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n")
    how = ("img2img", *FEW, model, "--prompts", path, "--out", tmp_path / "a", "--image")
    (tmp_path / "c").mkdir()
    shutil.copy(given / "b.png", tmp_path / "c/a.png")
    names = [p.name for p in run_script(*how, given / "a.png", given / "odd.png").paths]
    assert names == ["a-one-0.png", "odd-two-0.png"]
    assert [p.name for p in run_script(*how, given / "a.png").paths] == ["a-one-0.png", "a-two-0.png"]
    assert [p.name for p in run_script(*how, given / "a.png", tmp_path / "c/a.png").paths] == [
        "0-a-one-0.png",
        "1-a-two-0.png",
    ]
    assert "3 images for 2 prompts" in refused(*how, *(given / f"{n}.png" for n in ("a", "b", "odd")))
    both = run_script("inpaint", *how[1:-1], "--image", given / "a.png", "--mask", given / "mask.png").paths
    assert [read_png(p)["prompt"] for p in both] == ["one", "two"]


def test_a_grid_contains_all_images(model: Path, given: Path, tmp_path: Path) -> None:
    *made, grid = run_script(
        "txt2img", *FEW, model, "--prompt", "x", "--num-images", 5, "--grid", "--out", tmp_path / "a"
    ).paths
    assert grid.name == "grid-x-0.png"
    reported = read_png(grid)
    assert reported.pop("grid") == [image_key(read_png(path))[:8] for path in made]
    assert reported == read_png(made[0])
    sheet = pixels(grid)
    assert sheet.shape == (2 * 32, 3 * 32, 3)
    for k, path in enumerate(made):
        row, column = divmod(k, 3)
        np.testing.assert_array_equal(sheet[row * 32 :, column * 32 :][:32, :32], pixels(path))
    how = ("--image", given / "a.png", given / "odd.png", "--prompt", "x", "--grid", "--out", tmp_path / "b")
    assert Image.open(run_script("img2img", *FEW, model, *how).paths[-1]).size == (2 * 37, 32)


# -- on the way, and in little memory ---------------------------------------------------------------------------------


@pytest.fixture
def previews(monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    """The previews that are written, in order."""
    seen: list[Image.Image] = []
    save = train.commands.generate.save_sheet

    def saved(image: Image.Image, path: Path) -> None:
        save(image, path)
        if path.name == "preview.png":
            seen.append(Image.open(path).copy())

    monkeypatch.setattr(train.commands.generate, "save_sheet", saved)
    return seen


def test_previews_are_written_and_removed(
    coloured: Path, given: Path, tmp_path: Path, previews: list[Image.Image]
) -> None:
    how = (
        "--prompt",
        "x",
        "--num-images",
        3,
        "--preview",
        2,
        "--steps",
        5,
        "--model",
        coloured,
        "--out",
        tmp_path / "a",
    )
    made = run_script("txt2img", *how).paths
    assert files(tmp_path / "a") == sorted(p.name for p in made)
    assert [image.size for image in previews] == [(64, 64)] * 2  # after steps 2 and 4
    pipe = LatentDiffusionPipeline.from_pretrained(coloured)
    seen: list[torch.Tensor] = []
    pipe(
        ["x"] * 3,
        num_inference_steps=5,
        generator=[torch.Generator().manual_seed(k) for k in range(3)],
        callback_on_step_end=lambda _pipe, _k, _t, tensors: seen.append(tensors["denoised"]),
    )
    expected = image_grid([image.resize((32, 32)) for image in pipe.preview(seen[3])])
    assert np.abs(np.asarray(previews[1], int) - np.asarray(expected, int)).max() <= 1
    ended = run_script("img2img", *how, "--image", given / "odd.png", "--strength", 0.9)
    assert ended.status == 0, ended.err
    assert "preview.png" not in files(tmp_path / "a")
    (tmp_path / "a/preview.png").write_text("mine")
    assert "already; move it" in refused("txt2img", *how)
    assert (tmp_path / "a/preview.png").read_text() == "mine"


def test_a_grid_does_not_replace_an_input(model: Path, given: Path, tmp_path: Path) -> None:
    image = tmp_path / "grid-x-0.png"
    image.write_bytes((given / "a.png").read_bytes())
    how = ("--image", image, "--prompt", "x", "--grid", "--out", tmp_path)
    *_, grid = run_script("img2img", *FEW, model, *how).paths
    assert grid.name == f"grid-x-0-{image_key(read_png(grid))[:8]}.png"
    assert image.read_bytes() == (given / "a.png").read_bytes()


def test_an_interrupted_command_leaves_no_preview(
    coloured: Path, tmp_path: Path, previews: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(LatentDiffusionPipeline, "decode", interrupted)
    how = ("--prompt", "x", "--preview", 1, *FEW, coloured, "--out", tmp_path / "a")
    assert run_script("txt2img", *how).status == 130
    assert len(previews) == 3
    assert files(tmp_path / "a") == []


def test_sliced_decoding_gives_the_same_images(model: Path, tmp_path: Path) -> None:
    how = ("txt2img", *FEW, model, "--prompt", "x", "--num-images", 3, "--out")
    one, sliced = run_script(*how, tmp_path / "a").paths, run_script(*how, tmp_path / "b", "--slice").paths
    for a, b in zip(one, sliced, strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1


# -- between prompts and seeds ----------------------------------------------------------------------------------------


def test_interpolation_starts_and_ends_with_txt2img_images(model: Path, tmp_path: Path) -> None:
    between = (
        "--prompt",
        "a red star",
        "--to",
        "box, so!",
        "--seed",
        3,
        "--to-seed",
        11,
        "--frames",
        6,
        "--batch-size",
        3,
    )
    *frames, gif = run_script("interpolate", *FEW, model, *between, "--out", tmp_path / "a").paths
    assert [p.name[-9:] for p in frames] == [f"-{k:04}.png" for k in range(6)]
    for path, prompt, seed in ((frames[0], "a red star", 3), (frames[-1], "box, so!", 11)):
        (single,) = run_script(
            "txt2img", *FEW, model, "--prompt", prompt, "--seed", seed, "--out", tmp_path / "b"
        ).paths
        np.testing.assert_array_equal(pixels(path), pixels(single))
        reported = read_png(path)
        assert (reported["prompt"], reported["seed"], reported["sha256"]) == (prompt, seed, read_png(single)["sha256"])
    assert read_png(frames[4])["way"] == {
        "prompts": ["a red star", "box, so!"],
        "seeds": [3, 11],
        "frames": 6,
        "fps": 12.5,
        "loop": True,
        "frame": 4,
    }
    with Image.open(gif) as animation:
        assert (animation.n_frames, animation.info["duration"], animation.info["loop"]) == (6, 80, 0)
        for k, path in enumerate(frames):
            animation.seek(k)
            made = np.asarray(animation.convert("RGB"), int)
            assert np.sqrt(np.square(made - pixels(path)).mean()) < 10


def test_interpolation_passes_through_each_prompt(model: Path, tmp_path: Path) -> None:
    """The initial noise has one seed, from which the sampler draws further noise."""
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    how = ("--sampler", "euler_ancestral", "--seed", 5, *FEW, model)
    way = ("--prompts", tmp_path / "prompts.txt", "--frames", 3, "--fps", 50, "--no-loop")
    *frames, gif = run_script("interpolate", *how, *way, "--out", tmp_path / "a").paths
    assert len(frames) == 5
    for path, prompt in zip(frames[::2], ("one", "two", "three"), strict=True):
        (single,) = run_script("txt2img", *how, "--prompt", prompt, "--out", tmp_path / "b").paths
        assert np.abs(pixels(path) - pixels(single)).max() <= 1
        assert read_png(path)["prompt"] == prompt
    assert (pixels(frames[1]) != pixels(frames[0])).any()
    assert "loop" not in Image.open(gif).info


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ((), "nothing to interpolate"),
        (("--to", "y", "--frames", 1), "--frames 1"),
        (("--to", "y", "--fps", 0), "--fps 0"),
        (("--to", "y", "--fps", "nan"), "--fps nan"),
        (("--to-seed", -1), "--to-seed -1"),
        (("--to-seed", 1, "--sampler", "ddpm"), "can't be interpolated"),
        (("--to-seed", 1, "--sampler", "ddim", "--eta", 0.1), "can't be interpolated"),
        (("--to", "y", "--prompts", "none.txt"), "give only one of them"),
        (("--to", "y", "--width", 33), "33"),
    ],
)
def test_invalid_interpolations_are_refused(model: Path, tmp_path: Path, how: tuple[object, ...], message: str) -> None:
    prompt = () if "--prompts" in how else ("--prompt", "x")
    assert message in refused("interpolate", *FEW, model, *prompt, *how, "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_an_arc_keeps_the_variance_and_a_line_does_not() -> None:
    a, b = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    b[1] *= 2
    assert slerp(a, b, 0) is a
    assert slerp(a, b, 1) is b
    for t in (0.25, 0.5, 0.9):
        made = slerp(a, b, t)
        std = made.flatten(1).std(1)
        torch.testing.assert_close(std, torch.tensor([1.0, 1 + t, 1.0]), rtol=0.03, atol=0)
        assert torch.equal(made[1:2], slerp(a[1:2], b[1:2], t))  # each image separately
        angles = [torch.cosine_similarity(made.flatten(1), x.flatten(1)).acos() for x in (a, b)]
        torch.testing.assert_close(angles[0] * (1 - t), angles[1] * t, rtol=1e-4, atol=1e-4)
    assert torch.lerp(a, b, 0.5)[0].std() < 0.75


@pytest.mark.parametrize("n", [8, 9])
@pytest.mark.parametrize("change", [0, 1e-12, 1e-7, 1e-4])
def test_arcs_between_parallel_and_opposite_vectors(n: int, change: float) -> None:
    a = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for sign in (1, -1):
        b = sign * a + change * a.roll(1, 1)
        for t in (0.1, 0.5, 0.99):
            made = slerp(a, b, t)
            torch.testing.assert_close(made.norm(dim=1), torch.lerp(a.norm(dim=1), b.norm(dim=1), t))
            cos = torch.cosine_similarity(a, made)
            expected = np.cos(t * np.pi) if sign < 0 else 1.0
            torch.testing.assert_close(cos, torch.full_like(cos, expected), rtol=0, atol=2 * change + 1e-9)
    assert slerp(torch.zeros(1, n), torch.zeros(1, n), 0.5).eq(0).all()


# -- bad input --------------------------------------------------------------------------------------------------------

BAD = [
    ("txt2img --num-images 0", "--num-images 0"),
    ("txt2img --batch-size 0", "--batch-size 0"),
    ("txt2img --preview -1", "--preview -1"),
    ("txt2img --preview 2", "no preview colours"),
    ("txt2img --offload --device cpu", "--offload"),
    ("txt2img --seed -1", "--seed -1"),
    ("txt2img --seed 9223372036854775807 --num-images 2", "--seed 9223372036854775807"),
    ("txt2img --width -32", "-32"),
    ("txt2img --height 31", "31"),
    ("txt2img --prompts {given}/none.txt", "give only one of them"),
    ("img2img", "--image"),
    ("img2img --image {given}/text.png", "text.png"),
    ("img2img --image {given}/none.png", "none.png"),
    ("img2img --image {given}", "{given}"),
    ("img2img --image {given}/a.png --strength 1.01", "strength 1.01"),
    ("img2img --image {given}/a.png --strength -0.1", "strength -0.1"),
    ("img2img --image {given}/a.png --strength nan", "strength nan"),
    ("img2img --image {given}/a.png --strength much", "much"),
    ("img2img --image {given}/a.png --mask {given}/mask.png", "--mask"),
    ("inpaint --mask {given}/mask.png", "--image"),
    ("inpaint --image {given}/a.png", "--mask"),
    ("inpaint --image {given}/a.png --mask {given}/black.png", "black"),
    ("inpaint --image {given}/a.png --mask {given}/text.png", "text.png"),
    ("inpaint --image {given}/text.png --mask {given}/mask.png", "text.png"),
    ("inpaint --image {given}/a.png --mask {given}/mask.png --strength 2", "strength 2"),
    ("inpaint --image {given}/a.png --mask {given}/mask.png --feather -1", "--feather -1"),
    ("inpaint --image {given}/a.png --mask {given}/mask.png --feather nan", "--feather nan"),
    ("inpaint --image {given}/a.png --mask {given}/mask.png --feather inf", "--feather inf"),
    ("inpaint --image {given}/a.png --extend 0 0 0 -1", "--extend"),
    ("inpaint --image {given}/a.png --extend 0 0 0 1000000000", "the maximum is"),
    ("inpaint --image {given}/a.png --mask {given}/odd.png --extend 0 0 0 1", "37 × 29"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_invalid_arguments_give_one_line_and_no_files(
    model: Path, given: Path, tmp_path: Path, line: str, message: str
) -> None:
    script, *how = line.format(given=given).split()
    error = refused(script, *FEW, model, "--prompt", "x", *how, "--out", tmp_path / "new")
    assert message.format(given=given) in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"\n \r\n", "is empty"), (b"a\xff\n", "isn't UTF-8: byte 1")]
)
def test_files_without_prompts_are_refused(model: Path, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert message in refused("txt2img", *FEW, model, "--prompts", path, "--out", tmp_path / "new")
    assert "directory" in refused(
        "img2img", *FEW, model, "--prompts", tmp_path, "--image", "a.png", "--out", tmp_path / "new"
    )
    path.write_text("x" * 4_000_001)
    assert "the maximum is 4000000" in refused("txt2img", *FEW, model, "--prompts", path, "--out", tmp_path / "new")


def test_the_defaults_of_the_command_line_are_the_pipelines() -> None:
    """The sampler may differ: without one, the pipeline uses the model's own."""
    options, call = SamplingOptions().sampling(), signature(LatentDiffusionPipeline.__call__).parameters
    assert {k: v for k, v in options.items() if k != "sampler"} == {
        k: call[k].default for k in options if k != "sampler"
    }
