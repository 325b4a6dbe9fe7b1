"""Model cards: they describe the run, a hub can read them, and text of users is not taken for markup."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import train.stages.clip
import train.stages.ldm
import train.stages.vae
from ldm.errors import UserError
from support.runs import Crash, Start, clip_config, ldm_config, logged, vae_config
from train.config.clip import ClipConfig
from train.config.ldm import DiffusionConfig
from train.config.load import validate
from train.config.vae import AutoencoderConfig
from train.engine.model_card import code_span, source_span

HOSTILE = (
    "a \"red\" 'star'\n---\nlicense: mit\n```\n# owned\n<script>alert(1)</script> | {prompt} \\ \u202e\u2028\x00 ``"
)


def parts_of(card: str) -> tuple[dict, str]:
    """Return a card's front matter and its page."""
    _, front, page = card.split("---\n", 2)
    return yaml.safe_load(front), page


def code_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def prose_of(page: str) -> str:
    """Return a page without its fenced code and code spans."""
    return re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.M))


def test_every_stage_writes_a_model_card(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    start(tmp_path / "my run", validate_every=3, checkpoint_every=3)
    assert capsys.readouterr().out.count("--license") == 1
    model = tmp_path / "my run/model"
    front, page = parts_of((model / "README.md").read_text())
    assert ModelCard.load(model / "README.md").data.to_dict() == front
    stage = {"CLIP": 0, "autoencoder": 1, "text-to-image model": 2}[re.match(r"\n# `my run`: (.+)\n", page)[1]]
    assert front["library_name"] == ("transformers", "diffusers", "diffusers")[stage]
    assert front.get("pipeline_tag") == (None, None, "text-to-image")[stage]
    assert "license" not in front
    assert "No licence is stated" in page
    assert "Step 8 of 8: the run is finished." in page
    assert "64 training images, 24 held-out images" in page
    for file in (file for file in model.rglob("*") if file.suffix in (".md", ".json", ".txt")):
        assert str(tmp_path) not in file.read_text(), file
    # The card has all metrics of the last of three validations.
    assert (model / "sample.png").read_bytes() == (tmp_path / "my run/samples/step-00000008.png").read_bytes()
    lines = logged(tmp_path / "my run")
    last = [line for line in lines if any(name.startswith("val_") for name in line)][-1]
    figures = {k.removeprefix("val_").replace("_", " "): f"{v:.4g}" for k, v in last.items() if k.startswith("val_")}
    assert dict(re.findall(r"^\| (.+) \| (.+) \|$", page, re.MULTILINE)[1:]) == figures
    assert "at step 8:" in page
    # The code can be executed.
    monkeypatch.chdir(model)
    examples = code_of(page)
    assert len(examples) == 2
    for code in examples:
        exec(code, {})
    assert Path("generated.png").is_file() == (stage == 2)


def test_a_continued_run_updates_its_card(start: Start, tmp_path: Path) -> None:
    """The card of an unfinished run states this. Without a new validation it shows the old one and its sample sheet."""
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", Crash(3), steps=4, validate_every=9, checkpoint_every=2)
    page = (tmp_path / "run/model/README.md").read_text()
    assert "Step 2 of 4: the run is **not finished**" in page
    assert "Not measured yet: the first validation is at step 4." in page
    assert "![" not in page
    assert not (tmp_path / "run/model/sample.png").exists()
    start(tmp_path / "run", steps=4, validate_every=9, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", Crash(7), steps=8, validate_every=9, checkpoint_every=2)
    page = (tmp_path / "run/model/README.md").read_text()
    assert "Step 6 of 8" in page
    assert "at step 4:" in page
    sheet = (tmp_path / "run/samples/step-00000004.png").read_bytes()
    assert (tmp_path / "run/model/sample.png").read_bytes() == sheet


def test_a_licence_is_stated_when_it_is_given(start: Start, tmp_path: Path, capsys) -> None:
    """A finished run also gets the licence, and its weights are unchanged."""
    start(tmp_path / "run", steps=2)
    weights = {p: p.read_bytes() for p in (tmp_path / "run/model").rglob("*.safetensors")}
    capsys.readouterr()
    start(tmp_path / "run", steps=2, license="CC-BY-4.0")
    assert "--license" not in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "run/model/README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.text.rstrip().endswith("## Licence\n\n`CC-BY-4.0`")
    assert {p: p.read_bytes() for p in (tmp_path / "run/model").rglob("*.safetensors")} == weights
    # A stated licence is kept until another is given.
    before = {p: p.read_bytes() for p in (tmp_path / "run/model").rglob("*.*")}
    start(tmp_path / "run", steps=2)
    start(tmp_path / "run", steps=2, license="CC-BY-4.0")
    assert "is finished" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in (tmp_path / "run/model").rglob("*.*")} == before
    start(tmp_path / "run", steps=3, validate_every=3)
    assert ModelCard.load(tmp_path / "run/model/README.md").data.license == "cc-by-4.0"
    assert json.loads((tmp_path / "run/model/training.json").read_text())["config"]["license"] == "CC-BY-4.0"
    start(tmp_path / "run", steps=3, license="mit")
    assert ModelCard.load(tmp_path / "run/model/README.md").data.license == "mit"
    assert json.loads((tmp_path / "run/model/training.json").read_text())["config"]["license"] == "mit"


@pytest.mark.parametrize("license", ["my own", "mit\n---", "a: b", "mit # or not"])
def test_a_licence_must_be_an_identifier(license: str) -> None:
    with pytest.raises(UserError, match=r"license.*apache-2\.0"):
        validate(ClipConfig, {"license": license})


@pytest.fixture
def hostile(shapes: Path, tmp_path: Path) -> Path:
    """A dataset whose name and captions are markup."""
    data = tmp_path / "da`ta | <b>\n---\nset"
    data.mkdir()
    for split in ("train", "test"):
        shutil.copytree(shapes / split, data / split)
        rows = [json.loads(line) for line in (data / split / "metadata.jsonl").read_text().splitlines()]
        text = "".join(json.dumps(row | {"text": HOSTILE}) + "\n" for row in rows)
        (data / split / "metadata.jsonl").write_text(text)
    return data


@pytest.mark.parametrize("kind", ["clip", "vae", "ldm"])
def test_text_of_users_is_not_markup_in_a_card(
    kind: str, hostile: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "# a `run`\n---\nlicense: mit <i>"
    monkeypatch.chdir(tmp_path)
    match kind:
        case "clip":
            train.stages.clip.train(clip_config(hostile, out, steps=1))
        case "vae":
            train.stages.vae.train(vae_config(Path(hostile.name), out, steps=1))
        case _:
            prompts = (HOSTILE + "x" * 5000,)
            train.stages.ldm.train(ldm_config(hostile, out, parts, steps=1, cache="off", prompts=prompts))
    model = out / "model"
    card = ModelCard.load(model / "README.md")
    assert set(card.data.to_dict()) <= {"library_name", "tags", "pipeline_tag"}
    headings = re.findall(r"^(#.*)$", re.sub(r"^```.*?^```$", "", card.text, flags=re.DOTALL | re.M), re.MULTILINE)
    assert [h for h in headings if not h.startswith("# `` # a `run` --- license: mit <i> ``: ")] == [
        "## Use",
        "## Data",
        "## Training",
        "## Metrics",
        "## Licence",
    ]
    assert "`` da`ta | <b> --- set ``" in card.text
    assert str(tmp_path) not in card.text
    assert str(parts) not in card.text
    for mark in ("<", "\\", "license: mit", "owned", "\n---", "\x00", "\u202e", "\u2028"):
        assert mark not in prose_of(card.text)
    assert len(card.text) < 5000
    monkeypatch.chdir(model)
    for code in code_of(card.text):
        exec(code, {})


def test_the_card_of_an_inpainting_model_shows_how_to_inpaint(
    shapes: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.stages.ldm.train(ldm_config(shapes, tmp_path / "run", parts, steps=1, task="inpaint"))
    monkeypatch.chdir(tmp_path / "run/model")
    front, page = parts_of(Path("README.md").read_text())
    assert (front["pipeline_tag"], "inpainting" in front["tags"]) == ("image-to-image", True)
    Image.new("RGB", (32, 32), "red").save("image.png")
    Image.new("L", (32, 32), 255).save("mask.png")
    assert len(code_of(page)) == 2
    for code in code_of(page):
        exec(code, {})
        Path("generated.png").unlink()


def test_the_card_states_that_stock_diffusers_cannot_load_other_latent_channels(
    shapes: Path, parts: Path, tmp_path: Path
) -> None:
    small = AutoencoderConfig(channels=(8, 16), layers=1, groups=2, attention=False, latent_channels=3)
    train.stages.vae.train(vae_config(shapes, tmp_path / "vae", steps=1, validate_every=1, model=small))
    config = ldm_config(shapes, tmp_path / "run", parts, steps=1, task="inpaint", cache=str(tmp_path / "cache"))
    train.stages.ldm.train(replace(config, vae=str(tmp_path / "vae/model")))
    page = (tmp_path / "run/model/README.md").read_text()
    assert len(code_of(page)) == 1
    assert "inpainting UNet with 7 input channels" in page


def test_the_card_states_that_stock_diffusers_cannot_sample_a_process(
    shapes: Path, parts: Path, tmp_path: Path
) -> None:
    flow = DiffusionConfig(schedule="flow", target="flow")
    train.stages.ldm.train(ldm_config(shapes, tmp_path / "run", parts, steps=1, diffusion=flow))
    page = (tmp_path / "run/model/README.md").read_text()
    assert len(code_of(page)) == 1
    assert "diffusers' StableDiffusionPipeline can't sample this model" in page


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("data/shapes", "`data/shapes`"),
        ("/home/me/secret/shapes/", "`shapes`"),
        ("owner/name", "`owner/name`"),
        ("/disk/{000..099}.tar", "`{000..099}.tar`"),
        ("https://me:word@host/a/{0..9}.tar?token=x#y", "`https://host/a/{0..9}.tar`"),
        ("https://me:p@ss@host/a.tar", "`https://host/a.tar`"),
        ("file:///home/me/secret/a.tar", "`file://a.tar`"),
        ("openclip:/home/me/x", "`openclip:x`"),
        ("openclip:ViT-B-32/laion2b", "`openclip:ViT-B-32/laion2b`"),
        ("~/private/x", "`x`"),
        ("pipe:curl -H 'Authorization: x' https://host/a.tar", "the output of a command"),
    ],
)
def test_sources_reveal_no_private_paths(given: str, shown: str) -> None:
    assert source_span(given) == shown


@pytest.mark.parametrize("text", ["plain", "`", "a``b`", "``` \n```", "\udc80 \x1b[31m", "|"])
def test_code_spans_end_where_they_should(text: str) -> None:
    span = code_span(text)
    fence = re.match("`+", span)[0]
    inside = span[len(fence) : -len(fence)]
    assert span.endswith(fence)
    assert fence not in re.findall("`+", inside)  # only a run of the same length ends the span
    assert "\n" not in span
    assert inside.encode()


def test_the_sample_sheet_is_not_newer_than_the_weights(start: Start, tmp_path: Path) -> None:
    """Files that a run wrote after the checkpoint from which it continues don't belong to the model."""
    start(tmp_path / "run", steps=2)
    model, later = tmp_path / "run/model", tmp_path / "run/samples/step-00000009.png"
    Image.new("RGB", (8, 8)).save(later)
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 9, "val_loss": 12345.0}) + '\n{"step": 9, "val_')
    shutil.rmtree(model)
    start(tmp_path / "run", steps=2)
    assert (model / "sample.png").read_bytes() != later.read_bytes()
    assert "at step 2:" in (model / "README.md").read_text()
