"""The losses of images by noise level and caption, and the HTML report."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from support.models import tiny_pipeline
from support.stepping import normals
from train.commands.compare import compare
from train.commands.inspect_losses import inspect_losses
from train.config.reports import CompareOptions, InspectLossesOptions
from train.data.batches.draws import PosteriorNoise
from train.data.batches.images import ImageDataset
from train.data.images.crop import Framing
from train.data.sources.splits import open_source
from train.evaluation.curves import training_plots
from train.evaluation.losses import ImageLosses, error_by_level, image_losses
from train.evaluation.report import Model, save_samples, write_report
from train.evaluation.results import Measure, Plot, Series, Sheet, Table, lists

# -- losses of images -----------------------------------------------------------------------------------------------


@pytest.fixture
def images(shapes: Path) -> ImageDataset[Any]:
    return ImageDataset(
        open_source(shapes, "train"), Framing(resolution=32), 3, shuffle=False, draws=PosteriorNoise(4, 2)
    )


def measured(images: ImageDataset[Any], size: int, captions: dict[int, str] | None = None) -> ImageLosses:
    """Measure four images in batches of this size. captions: captions that replace their own."""
    batches = [images.__getitems__(range(k, min(k + size, 4))) for k in range(0, 4, size)]
    for batch in batches:
        batch.captions[:] = [
            (captions or {}).get(k, c) for k, c in zip(batch.index.tolist(), batch.captions, strict=True)
        ]
    return image_losses(tiny_pipeline(), batches, levels=3, seed=5)


@torch.no_grad()
def test_losses_are_the_errors_at_fixed_noise(images: ImageDataset[Any]) -> None:
    """Target v at the middle of each third of the timesteps, with noise from Philox by image and level."""
    found, pipe, batch = measured(images, 4), tiny_pipeline(), images.__getitems__(range(4))
    assert found.timesteps.tolist() == [166, 500, 833]
    posterior = pipe.autoencoder.encode(batch.pixels)
    x0 = posterior.mean + posterior.std * normals(3, 8, range(4), 4, 16, 16)
    network = pipe.text_network(16, 16)
    for texts, errors in ((batch.captions, found.errors), ([""] * 4, found.empty)):
        for k, index in enumerate(found.timesteps.tolist()):
            noise = normals(5, 17, [3 * image + k for image in range(4)], 4, 16, 16)
            alpha, sigma = pipe.process.schedule.alpha[index].float(), pipe.process.schedule.sigma[index].float()
            output = network(alpha * x0 + sigma * noise, torch.full((4,), index), pipe.encode(texts))
            expected = (output - (alpha * noise - sigma * x0)).square().flatten(1).mean(1)
            torch.testing.assert_close(torch.from_numpy(errors[:, k]), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.loss, found.errors.mean(1))
    np.testing.assert_allclose(found.harm, (found.errors / found.empty - 1).mean(1), rtol=1e-4, atol=1e-7)


def test_losses_do_not_depend_on_batches_and_compare_captions_at_the_same_noise(images: ImageDataset[Any]) -> None:
    whole, parts = measured(images, 4), measured(images, 3)
    np.testing.assert_allclose(whole.errors, parts.errors, rtol=1e-4)
    without = measured(images, 4, {1: ""})
    np.testing.assert_array_equal(without.errors[1], without.empty[1])
    assert without.harm[1] == 0
    assert (without.harm[[0, 2, 3]] != 0).all()


def test_odd_images_and_wrong_captions_are_shown_in_order(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_pipeline()
    monkeypatch.setattr("train.commands.inspect_losses.LatentDiffusionPipeline.from_pretrained", lambda _: pipe)
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "train").mkdir(parents=True)
    rows = [json.loads(line) for line in (shapes / "train/metadata.jsonl").read_text().splitlines()[:9]]
    for row in rows:
        (data / "train" / Path(row["file_name"]).name).write_bytes((shapes / "train" / row["file_name"]).read_bytes())
    lines = [{"file_name": Path(row["file_name"]).name, "text": row["text"]} for row in rows]
    lines[3]["text"] = "<script>alert(1)</script>"
    (data / "train" / lines[5]["file_name"]).write_bytes(b"damaged")
    (data / "train/metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    o = InspectLossesOptions(model="m", data=str(data), out=str(out), levels=2, shown=4, batch_size=4)
    report = inspect_losses(o)
    measured = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    assert len(measured) == report["images"] == 7  # one is held out, one is damaged
    assert lines[5]["file_name"] in report["damaged"][0][0]
    by_harm = sorted(measured, key=lambda row: -row["harm"])
    assert [row["file"] for row in report["wrong"]] == [row["file"] for row in by_harm[:4]]
    for name in ("odd_images.png", "wrong_captions.png"):
        assert Image.open(out / name).size[0] == 4 + 4 * (128 + 4)
    page = Page((out / "report.html").read_text())
    assert len(page.images) == 2
    with pytest.raises(UserError, match="--model is missing"):
        inspect_losses(InspectLossesOptions(data=str(data), out=str(out)))


# -- the page -------------------------------------------------------------------------------------------------------

MARKUP = '<script>alert("a")</script> & <img src=x onerror=y>'


class Page(HTMLParser):
    """Tags, images and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.images: list[Image.Image] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "img":
            kind, _, content = (dict(attributes)["src"] or "").partition(";base64,")
            assert kind.startswith("data:image/")
            self.images.append(Image.open(io.BytesIO(base64.b64decode(content))))

    def handle_data(self, data: str) -> None:
        self.text += data


def pixels(count: int, side: int = 8) -> list[np.ndarray]:
    return list(np.random.default_rng(side).integers(256, size=(count, side, side, 3), dtype=np.uint8))


def write_model(folder: Path, name: str, scale: float = 1.0, **change: Any) -> Model:
    """Write a report with one of each part, in which each text is markup."""
    folder.mkdir()
    Image.fromarray(pixels(1, 300)[0]).save(folder / "sheet.png")
    parts = [
        Measure(name="a", title=MARKUP, value=2 * scale, error=0.25, baseline=0.5, note=MARKUP, features=MARKUP),
        Measure(name="b", title="b", value=None, better="higher"),
        Sheet(name="s", title=MARKUP, file="sheet.png", note=MARKUP),
        Plot(
            name="p",
            title=MARKUP,
            x=MARKUP,
            y="$y$",
            log_y=True,
            series=[Series(name=MARKUP, x=[1, 2], y=[scale, None])],
        ),
        Table(name="t", title=MARKUP, columns=[MARKUP, "n"], rows=[[MARKUP, 0.5]]),
    ]
    report: dict[str, Any] = lists(parts) | {"settings": {"data": MARKUP, "list": [1, MARKUP]}, "versions": {"x": "1"}}
    report["samples"] = save_samples(folder, pixels(3), [MARKUP, "$c", "c"])
    report |= change
    (folder / "report.json").write_text(json.dumps(report))
    return Model(name, report, folder)


def test_a_page_contains_everything_and_runs_nothing(tmp_path: Path) -> None:
    write_report([write_model(tmp_path / "a", MARKUP)], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "link", "base", "form"}
    assert not any(
        name.startswith("on") or (name == "href" and not (value or "").startswith("#"))
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name != "xlink:href"
    )
    assert "default-src 'none'" in text
    assert text.count("alert") == page.text.count("alert") + sum("alert" in (a.get("alt") or "") for _, a in page.tags)
    for image, original in zip(page.images, pixels(3), strict=False):
        np.testing.assert_array_equal(np.asarray(image), original)
    assert page.images[3].size == (300, 300)
    for shown in ("2", "± 0.25", "0.5", "–", "$c", "$y$"):
        assert shown in page.text


def test_models_are_compared_in_columns(tmp_path: Path) -> None:
    for name, scale in (("a", 1.0), ("b", 0.5)):
        write_model(tmp_path / name, name, scale)
    out = tmp_path / "new/page.html"
    compare(CompareOptions(reports=(str(tmp_path / "a"), str(tmp_path / "b")), names=("one", "two"), out=str(out)))
    text = out.read_text()
    page = Page(text)
    best = text[text.index('class="number best">') :]
    assert best.removeprefix('class="number best">').startswith("1<")
    assert text.count('class="number best"') == 1
    assert "two" in page.text
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 1
    assert len(page.images) == 2 * 3 + 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": [{"file": "../a.png", "caption": ""}]}, "must be in the same folder"),
        ({"samples": [{"file": "none.png", "caption": ""}]}, "none.png can't be read"),
        ({"measures": [{"name": "a"}]}, "can't be shown"),
        ({"plots": [{"name": "a", "series": 3}]}, "can't be shown"),
        ({"tables": 5}, "can't be shown"),
    ],
)
def test_other_content_costs_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "a", "a", **change)
    with pytest.raises(UserError, match=message):
        write_report([model], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    for options in ({}, {"reports": (str(tmp_path),)}, {"reports": ("a", "b"), "names": ("c",)}):
        with pytest.raises(UserError):
            compare(CompareOptions(**options, out=str(tmp_path / "page.html")))


def test_curves_are_those_of_the_runs(tmp_path: Path) -> None:
    """400 values become 200 means; the runs of the autoencoder and the text encoder are found by the configuration."""
    for name in ("ldm", "vae"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(f"vae: {tmp_path}/vae/model\ntext_encoder: hub/id\n")
    lines = [{"step": k + 1, "loss": 2.0 + k % 2} for k in range(400)]
    lines += [{"step": k, "val_loss": 1.5, "val_error_noise_0-25": 0.5, "val_error_noise_25-50": 0.25} for k in (5, 9)]
    (tmp_path / "ldm/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{cut")
    (tmp_path / "vae/metrics.jsonl").write_text('{"step": 1, "val_psnr": 20.0}\n{"step": 2, "val_psnr": 30.0}\n')
    loss, bands, psnr = training_plots(str(tmp_path / "ldm/model"))
    assert [(len(s.x), s.x[0], set(s.y)) for s in loss.series] == [(200, 1.5, {2.5}), (2, 5, {1.5})]
    assert [(s.name, set(s.y)) for s in bands.series] == [("timesteps 0–25 %", {0.5}), ("timesteps 25–50 %", {0.25})]
    assert psnr.series[0].y == [20.0, 30.0]
    assert training_plots(str(tmp_path / "none/model")) == []


def test_the_curve_by_noise_level_has_the_mean_and_its_standard_error() -> None:
    errors = np.array([[1.0, 2.0], [3.0, 6.0], [2.0, 1.0]], np.float32)
    plot = error_by_level(ImageLosses(np.arange(3), ["a"] * 3, np.array([10, 30]), errors, errors + 1), "images")
    assert plot.series[0].y == pytest.approx([2.0, 3.0])
    assert plot.series[0].error == pytest.approx([1 / 3**0.5, 7**0.5 / 3**0.5])
    assert plot.series[1].y == pytest.approx([3.0, 4.0])
