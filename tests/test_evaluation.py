"""The evaluation of generated images: the same numbers from the files that it leaves, and planted copies."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import train.commands.evaluate
import train.evaluation.generated
from autoencoder.model import Posterior
from ldm.errors import UserError
from ldm.pipeline import LatentDiffusionPipeline
from support.draws import draw
from support.models import save_models
from train.commands.evaluate import evaluate
from train.config.reports import EvaluateOptions, SweepOptions
from train.data.batches.images import ImageDataset
from train.data.images.crop import Framing
from train.data.order.permutation import choose
from train.data.sources.splits import open_source
from train.data.synthetic.shapes import parse_caption, write_shapes
from train.data.synthetic.shapes_checker import score_images
from train.engine.open_data import open_inputs
from train.engine.provenance import text_encoder_of
from train.evaluation.captions import CaptionFeatures, clip_scores
from train.evaluation.diffusion import generate_batch
from train.evaluation.diversity import pairwise_distance
from train.evaluation.features import PixelFeatures, has_image_tower, load_features
from train.evaluation.generated import GeneratedImages
from train.evaluation.measures import distribution_values
from train.evaluation.memorisation import copy_test
from train.evaluation.quality import Evaluation, measure_generated
from train.evaluation.results import Measure, Part, lists, measure_lines
from train.evaluation.sheets import to_uint8

SAMPLES, SEED = 30, 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, model/, and a CLIP, clip/."""
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


def options(models: Path, data: Path, out: Path, **change: Any) -> EvaluateOptions:
    settings: dict[str, Any] = {
        "features": (str(models / "clip"),),
        "samples": SAMPLES,
        "seeds": 2,
        "sweep": SweepOptions(guidance=(1.0, 3.0), steps=(1, 2), samples=22),
        "prompts": 1,
        "images": 24,
        "likelihoods": 1,
        "steps": 1,
        "seed": SEED,
        "batch_size": 16,
    }
    return EvaluateOptions(model=str(models / "model"), data=str(data), out=str(out), **settings | change)


@pytest.fixture(scope="module")
def report(models: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluation")
    evaluate(options(models, shapes, out))
    return out


def measured(o: EvaluateOptions) -> list[Part]:
    """Measure only the generated images."""
    pipe = LatentDiffusionPipeline.from_pretrained(o.model)
    o = o.for_sampler(pipe.process.sampler)
    return measure_generated(Evaluation.open(pipe, open_inputs(o.data, o.input), o))


def read(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).movedim(3, 1).float() / 127.5 - 1


def real(data: Path, split: str, count: int, shuffle: bool = True) -> Any:
    return ImageDataset(open_source(data, split), Framing(resolution=32), SEED, shuffle=shuffle).__getitems__(
        range(count)
    )


def values(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    measures = json.loads((out / "report.json").read_text())["measures"]
    return {(m["name"], m["features"].partition(" (")[0].rpartition("/")[2]): m for m in measures}


def test_the_reports_measures_are_those_of_its_image_files(report: Path, models: Path, shapes: Path) -> None:
    found, clip = values(report), load_features(str(models / "clip"))
    made, split = clip(pixels(read(report / "generated"))), real(shapes, "test", 24)
    expected = distribution_values(clip(split.pixels), made, is_clip=True)
    baseline = distribution_values(clip(split.pixels), clip(real(shapes, "train", SAMPLES).pixels), is_clip=True)
    assert len(expected) == 9
    for name, (value, error) in expected.items():
        measure = found[name, "clip"]
        assert measure["value"] == pytest.approx(value, rel=1e-3, abs=1e-6)
        assert measure["error"] == (error if error is None else pytest.approx(error, rel=1e-2))
        assert measure["baseline"] == pytest.approx(baseline[name][0], rel=1e-3, abs=1e-6)
        assert (measure["samples"], measure["reference"]) == (SAMPLES, 24)

    captions = [json.loads(line)["text"] for line in (report / "generated/metadata.jsonl").read_text().splitlines()]
    held_out = open_source(shapes, "test")
    order = choose(24, 24, SEED)
    assert captions == [held_out[order[k % 24]].captions[0] for k in range(SAMPLES)]
    text = CaptionFeatures(str(models / "clip"))
    assert found["clip_score", "clip"]["value"] == pytest.approx(float(clip_scores(made, text(captions)).mean()), 1e-4)
    assert found["clip_score", "clip"]["baseline"] == pytest.approx(
        float(clip_scores(clip(split.pixels), text(split.captions)).mean()), 1e-4
    )
    seeds = clip(pixels(read(report / "seeds"))).view(16, 2, -1)
    assert found["seeds_distance", "clip"]["value"] == pytest.approx(pairwise_distance(seeds)[0], rel=1e-3)


def test_the_reports_copies_are_those_of_its_image_files(report: Path, shapes: Path) -> None:
    """Distances in pixels to the nearest of all training images, computed over all pairs."""
    made = read(report / "generated").astype(np.float64) / 255
    training = (real(shapes, "train", 64, shuffle=False).pixels.double().numpy().transpose(0, 2, 3, 1) + 1) / 2
    distances = np.array([np.sqrt(((image - training) ** 2).mean((1, 2, 3))).min() for image in made])
    measure = values(report)["near_copies", "pixels"]
    threshold = float(measure["note"].split("nearer than ")[1].split(";")[0])
    assert measure["value"] == pytest.approx((distances < threshold).mean())
    assert measure["baseline"] == pytest.approx(1 / 25)
    assert measure["reference"] == 64
    sheets = json.loads((report / "report.json").read_text())["sheets"]
    assert [sheet["name"] for sheet in sheets] == ["nearest_features_1", "nearest_pixels"]
    for sheet in sheets:
        Image.open(report / sheet["file"]).load()


def test_the_sweep_measures_each_combination(report: Path, models: Path, shapes: Path) -> None:
    contents = json.loads((report / "report.json").read_text())
    table = next(table for table in contents["tables"] if table["name"] == "sweep")
    assert [row[:2] for row in table["rows"]] == [[1.0, 1], [3.0, 1], [1.0, 2], [3.0, 2]]
    column = {name: k for k, name in enumerate(table["columns"])}
    images = read(report / "sweep/guidance-3-steps-2")
    clip = load_features(str(models / "clip"))
    expected = distribution_values(clip(real(shapes, "test", 24).pixels), clip(pixels(images)), is_clip=False)
    assert table["rows"][3][column["KID"]] == pytest.approx(expected["kid"][0], rel=1e-3)
    texts = [json.loads(line)["text"] for line in (report / "generated/metadata.jsonl").read_text().splitlines()]
    scenes = [parse_caption(text) for text in texts[:22]]
    assert table["rows"][3][column["all attributes correct"]] == score_images(images, scenes)["all"]
    plot = next(plot for plot in contents["plots"] if plot["name"] == "sweep_kid")
    assert [series["name"] for series in plot["series"]] == ["1 steps", "2 steps"]
    assert plot["series"][1]["y"] == [table["rows"][k][column["KID"]] for k in (2, 3)]


def test_an_interrupted_evaluation_continues(
    report: Path, models: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only batches with missing or broken images are generated again; other settings replace all images."""
    before = read(report / "generated")
    (report / "generated/000020.png").unlink()
    broken = report / "generated/000021.png"
    broken.write_bytes(broken.read_bytes()[:60])
    generated: list[int] = []

    def counted(pipe: Any, prompts: Any, seeds: Any, **sampling: Any) -> Any:
        generated.extend(seeds)
        return generate_batch(pipe, prompts, seeds, **sampling)

    monkeypatch.setattr(train.evaluation.generated, "generate_batch", counted)
    measures = lists(measured(options(models, shapes, report)))["measures"]
    assert generated == [SEED + k for k in range(16, SAMPLES)]
    np.testing.assert_array_equal(read(report / "generated"), before)
    stored = json.loads((report / "report.json").read_text())["measures"]
    assert all(measure in stored for measure in measures)

    parts = measured(options(models, shapes, report, samples=4, seeds=0, copies=0, seed=5))
    assert generated[14:] == [5, 6, 7, 8]
    assert len(read(report / "generated")) == 4
    assert not {"near_copies", "seeds_distance"} & {part.name for part in parts}


@pytest.mark.parametrize("reuse", [1, 2])
def test_images_are_generated_in_the_precision(models: Path, shapes: Path, tmp_path: Path, reuse: int) -> None:
    """bf16 is that of the UNet's arithmetic; the text encoder and the decoder stay fp32."""
    o = options(models, shapes, tmp_path, precision="bf16", steps=2, guidance_scale=1.0, reuse_features=reuse)
    pipe = LatentDiffusionPipeline.from_pretrained(o.model)
    seen: dict[str, set[torch.dtype]] = {"unet": set(), "text": set(), "decoder": set()}
    text = next(m for m in pipe.text_encoder.modules() if isinstance(m, torch.nn.Linear))
    modules = {"unet": pipe.unet.conv_in, "text": text, "decoder": pipe.autoencoder.vae.decoder.conv_out}
    for name, module in modules.items():
        module.register_forward_hook(lambda _, __, output, name=name: seen[name].add(output.dtype))
    images = generate_batch(pipe, ["a red star", "a blue circle"], [5, 6], **o.generation())
    assert seen == {"unet": {torch.bfloat16}, "text": {torch.float32}, "decoder": {torch.float32}}
    exact = generate_batch(pipe, ["a red star", "a blue circle"], [5, 6], **o.generation() | {"precision": "fp32"})
    difference = np.abs(images.astype(int) - exact)
    assert 0 < difference.mean() < 3
    evaluate(o)
    assert json.loads((tmp_path / "generated/about.json").read_text())["precision"] == "bf16"


def test_a_folder_with_other_files_is_left_alone(models: Path, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "generated").mkdir()
    (tmp_path / "generated/mine.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="no evaluation made"):
        measured(options(models, shapes, tmp_path))
    assert (tmp_path / "generated/mine.png").read_bytes() == b"mine"


def test_any_caption_and_any_earlier_settings_file_are_accepted(models: Path, tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(models / "model")
    captions = ["a half \ud800", "a\nline and \0", ""]
    for content in (b"", b"\xff{"):
        (tmp_path / "about.json").write_bytes(content)
        made = GeneratedImages(tmp_path, pipe, captions, {}, batch_size=2, seed=0, num_inference_steps=1)
        assert sum(len(batch) for batch in made.batches()) == 3
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == captions


@pytest.mark.parametrize(
    ("change", "message"),
    [({"samples": 1}, "--samples 1"), ({"seeds": -1}, "--seeds"), ({"sweep": SweepOptions(steps=(0,))}, "--sweep")],
)
def test_numbers_that_measure_nothing_are_refused(
    models: Path, shapes: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(options(models, shapes, tmp_path / "out", **change))


def test_the_clip_of_the_run_is_found(models: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_index.json").write_text("{}")
    assert text_encoder_of(str(tmp_path / "model")) == ""
    (tmp_path / "model/training.json").write_text(json.dumps({"config": {"text_encoder": "runs/clip"}}))
    assert text_encoder_of(str(tmp_path / "model")) == "runs/clip"
    (tmp_path / "config.yaml").write_text(f"text_encoder: {models}/clip\n")  # the run's own has the whole path
    assert has_image_tower(text_encoder_of(str(tmp_path / "model")))
    (tmp_path / "config.yaml").write_text(f"teacher: {tmp_path}/model\n")  # an endless loop
    assert text_encoder_of(str(tmp_path / "model")) == ""
    assert not has_image_tower(str(models / "model/text_encoder"))
    assert not has_image_tower("")


# Memorisation


@pytest.mark.parametrize("recites", [True, False])
def test_a_model_that_recites_is_told_from_one_that_generalises(
    models: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recites: bool
) -> None:
    """One model returns training images with little noise, the other new images; the autoencoder is perfect."""
    write_shapes(tmp_path / "new", 32, 60, 1, seed=9)
    source = open_source(shapes if recites else tmp_path / "new", "train")
    images = ImageDataset(source, Framing(resolution=32), 0, shuffle=False).__getitems__(range(60)).pixels

    def model(pipe: Any, prompts: Any, seeds: Any, **sampling: Any) -> np.ndarray:
        shown = images[[seed - SEED for seed in seeds]]
        return to_uint8(shown + 0.02 * draw(*shown.shape, seed=seeds[0]).float())

    monkeypatch.setattr(train.evaluation.generated, "generate_batch", model)
    o = options(models, shapes, tmp_path / "out", samples=60, seeds=0)
    pipe = LatentDiffusionPipeline.from_pretrained(o.model)
    monkeypatch.setattr(pipe.autoencoder, "encode", lambda x: Posterior(x, torch.zeros_like(x)))
    monkeypatch.setattr(pipe.autoencoder, "decode", lambda z: z)
    parts = measure_generated(Evaluation.open(pipe, open_inputs(o.data, o.input), o))
    for name in ("pixels", "clip"):
        copies, nearer = (
            next(p for p in parts if isinstance(p, Measure) and p.name == kind and name in p.features)
            for kind in ("near_copies", "nearer_than_held_out")
        )
        assert copies.value is not None
        assert nearer.value is not None
        assert nearer.error is not None
        if recites:
            assert copies.value > 0.9
            assert nearer.value > 0.95
        else:
            assert copies.value < 0.15
            assert abs(nearer.value - 0.5) < 4 * nearer.error


class Stopped(Exception):
    pass


@pytest.mark.parametrize("split", ["test", "train"])
def test_the_search_of_copies_gets_the_reconstructions_that_were_measured(
    models: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    def compare(e: Evaluation, reconstructions: Sequence[Tensor]) -> None:
        assert len(reconstructions) == (len(e.with_pixels) if split == "test" else 0)
        for found, expected in zip(reconstructions, e.reconstructions(), strict=False):
            assert torch.equal(found, expected)
        raise Stopped

    monkeypatch.setattr(train.commands.evaluate, "measure_generated", compare)
    with pytest.raises(Stopped):
        evaluate(options(models, shapes, tmp_path, split=split))


def nearest(images: Tensor, training: Tensor) -> Tensor:
    return torch.cdist(images, training).amin(1)


def test_planted_copies_are_found_and_new_images_are_not() -> None:
    training, held_out = draw(500, 8, seed=1), draw(400, 8, seed=2)
    new = draw(600, 8, seed=3)
    honest = copy_test(nearest(new, training), nearest(held_out, training))
    assert honest.level == pytest.approx(4 / 401)
    assert honest.share < honest.level + 3 * (honest.level / 600 + honest.level**2 / 4) ** 0.5
    assert abs(honest.closer - 0.5) < 3 * honest.closer_error
    new[:200] = training[:200] + 0.02 * draw(200, 8, seed=4)
    recited = copy_test(nearest(new, training), nearest(held_out, training))
    assert recited.share == pytest.approx(1 / 3, abs=0.02)
    assert recited.closer > 0.5 + 5 * recited.closer_error


def test_new_images_are_near_copies_as_often_as_the_level_says() -> None:
    """Whatever the distribution of distances; also with so few held-out images that the level isn't 1%."""
    for m in (15, 250):
        tests = [copy_test(draw(200, seed=2 * s).exp(), draw(m, seed=2 * s + 1).exp()) for s in range(300)]
        shares = np.array([test.share for test in tests])
        assert tests[0].level == pytest.approx(max(1, (m + 1) // 100) / (m + 1))
        assert abs(shares.mean() - tests[0].level) < 4 * shares.std() / 300**0.5
        closer = np.array([test.closer for test in tests])
        assert closer.mean() == pytest.approx(0.5, abs=0.01)
        assert closer.std() == pytest.approx(tests[0].closer_error, rel=0.15)


def test_the_probability_of_being_nearer_counts_pairs() -> None:
    a, b = torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([2.0, 3.0, 0.5])
    expected = ((a[:, None] < b).double() + (a[:, None] == b).double() / 2).mean()
    assert copy_test(a, b).closer == pytest.approx(float(expected))


def test_pixel_distances_are_root_mean_squares_of_averaged_images() -> None:
    x = draw(2, 3, 64, 64).float().clamp(-1, 1)
    a, b = PixelFeatures(64)(x)
    small = ((x / 2 + 0.5) * 255).round().div(255).view(2, 3, 32, 2, 32, 2).mean((3, 5))
    assert float((a - b).norm()) == pytest.approx(float((small[0] - small[1]).square().mean().sqrt()), rel=1e-5)
    assert PixelFeatures(16).dim == 3 * 16 * 16


def test_numbers_that_json_lacks_are_none() -> None:
    parts = lists([Measure(name="kid", title="KID", value=float("nan"), error=float("inf"), baseline=0.5)])
    assert (parts["measures"][0]["value"], parts["measures"][0]["error"]) == (None, None)
    assert list(measure_lines(parts)) == ["  KID: not measured (real images: 0.5)"]
