"""A UNet trained to inpaint: its inputs, its start as the given model, and equality with diffusers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, StableDiffusionInpaintPipeline
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

import train.stages.clip
import train.stages.ldm
import train.stages.vae
from autoencoder.model import Autoencoder
from ldm.denoiser import Denoiser, with_context
from ldm.editing import latent_mask, masked_image
from ldm.errors import UserError
from ldm.guidance import ClassifierFree
from ldm.networks.unet import widen
from ldm.pipeline import LatentDiffusionPipeline
from support.draws import generators
from support.images import box_mask, smooth_images
from support.models import PROMPTS, tiny_pipeline
from support.runs import COMMON, Crash, clip_config, final_state, ldm_config, losses, vae_config
from train.config.data import DataConfig
from train.config.ldm import DiffusionConfig, UnetConfig
from train.data.batches.cached import CachedDataset, Originals
from train.data.batches.draws import DEFAULT_NOISING, LatentNoise
from train.data.batches.images import ImageDataset
from train.data.batches.latent_cache import LatentCache
from train.data.batches.loading import loader
from train.data.batches.text_cache import TextCache
from train.data.images.crop import Framing
from train.data.sources.splits import Source, open_source
from train.engine.stage import Hooks
from train.stages.ldm_step import Completion, DiffusionBatch


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(inpaints=True)


@pytest.fixture(scope="module")
def text_runs(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with finished runs of stages 0, 1 and 2, for text to image."""
    runs = tmp_path_factory.mktemp("runs")
    train.stages.clip.train(clip_config(shapes, runs / "clip", steps=2, validate_every=2))
    train.stages.vae.train(vae_config(shapes, runs / "vae", steps=2, validate_every=2))
    train.stages.ldm.train(ldm_config(shapes, runs / "ldm", runs, steps=2, validate_every=2))
    return runs


def inpaint_config(shapes: Path, out: Path, runs: Path, **change: Any) -> Any:
    init = str(runs / "ldm/model")
    return ldm_config(shapes, out, runs, **{"task": "inpaint", "init": init, "keep_checkpoints": 9} | change)


# -- the network ----------------------------------------------------------------------------------------------------


def test_a_widened_network_predicts_the_same_until_it_is_trained():
    unet = tiny_pipeline().unet.requires_grad_(True)
    x, index, text = torch.randn(2, 4, 16, 16), torch.tensor([3, 700]), torch.randn(2, 16, 32)
    before = unet(x, index, text).sample
    widen(unet, 9)
    assert unet.config.in_channels == 9
    context = torch.randn(2, 5, 16, 16)
    network = with_context(lambda x, index, text: unet(x, index, text).sample, context)
    after = network(x, index, text)
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)
    after.square().sum().backward()
    assert unet.conv_in.weight.grad[:, 4:].abs().amax((0, 2, 3)).min() > 0  # each new input has a gradient


def test_each_guided_prediction_receives_the_context_of_its_image():
    """Three predictions of two images are evaluated together; each receives the context of its image."""

    def network(x, index, condition):
        return x[:, :1] * 0 + x[:, 1:2] + condition[:, :, None, None]

    context = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    denoise = ClassifierFree(
        Denoiser(with_context(network, context), "x0"),
        torch.zeros(2, 1),
        [(torch.zeros(2, 1), 2.0), (torch.zeros(2, 1), 3.0)],
    )
    level = tiny_pipeline().process.schedule.level(500)
    assert denoise(torch.randn(2, 1, 1, 1), level).x0.flatten().tolist() == pytest.approx([1.0, 2.0])


# -- the data -------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "cached": {},
    "kept crops": {"input": DataConfig(resolution=32, crop="random", crops=2, flip=True)},
    "buckets": {"input": DataConfig(resolution=32, buckets=8)},
    "as they come": {"cache": "off", "input": DataConfig(resolution=32, crop="random", flip=True)},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 noisy images of several shapes, in which no crop resembles another."""
    folder = tmp_path_factory.mktemp("wide")
    for k in range(32):
        size = (64, 40) if k % 2 else (36, 36)
        smooth_images(1, size, k)[0].save(folder / f"{k:02d}.png")
        (folder / f"{k:02d}.txt").write_text(f"image {k}")
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_the_masked_image_is_the_crop_of_its_cached_latent(
    text_runs: Path, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    seen: list[tuple[Autoencoder, Any, DiffusionBatch]] = []
    complete = Completion.__call__

    def spy(self: Completion, part: Any) -> DiffusionBatch:
        batch = complete(self, part)
        seen.append((self.autoencoder, part, batch))
        return batch

    monkeypatch.setattr(Completion, "__call__", spy)

    config = inpaint_config(wide, tmp_path / "run", text_runs, steps=2, validate_every=2, batch_size=8, **WAYS[way])
    train.stages.ldm.train(config)
    assert len(seen) > 2
    for autoencoder, part, batch in seen:
        mean, std = autoencoder.encode(part.pixels)
        torch.testing.assert_close(batch.x0, mean + std * part.drawn.posterior_noise, atol=1e-5, rtol=0)
        assert part.drawn.masks is not None
        assert batch.context is not None
        mask, context = part.drawn.masks.mask, batch.context
        torch.testing.assert_close(context[:, :1], latent_mask(mask, autoencoder.factor))
        elsewhere = torch.where(mask > 0, torch.rand_like(part.pixels), part.pixels)
        mean, std = autoencoder.encode(masked_image(elsewhere, mask))
        torch.testing.assert_close(context[:, 1:], mean + std * part.drawn.masks.noise, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ["cached", "kept crops", "as they come"])
def test_a_run_is_continued_exactly(shapes: Path, text_runs: Path, tmp_path: Path, way: str) -> None:
    def start(name: str, hooks: Hooks | None = None, **change: Any) -> None:
        train.stages.ldm.train(inpaint_config(shapes, tmp_path / name, text_runs, **WAYS[way] | change), hooks=hooks)

    start("uninterrupted", workers=2)
    with pytest.raises(KeyboardInterrupt):
        start("interrupted", Crash(5))
    start("interrupted")
    assert final_state(tmp_path / "interrupted") == final_state(tmp_path / "uninterrupted")
    assert len(losses(tmp_path / "uninterrupted")) == 4
    assert (tmp_path / "uninterrupted/samples/step-00000008.png").is_file()


def test_masks_follow_positions_on_any_number_of_processes(text_runs: Path, wide: Path, tmp_path: Path) -> None:
    """Two processes, with a batch in two parts, together see the same as one process."""
    source = open_source(wide, "train")
    framing = Framing(resolution=32)
    for dataset in (
        ImageDataset(source, framing, 3, draws=LatentNoise(DEFAULT_NOISING, 4, 2, masks=True)),
        cached_images(source, framing, tmp_path),
    ):
        (batch,) = next(iter(loader(dataset, start_step=5, steps=6, batch_size=8)))
        parts = [
            part
            for rank in range(2)
            for part in next(
                iter(loader(dataset, start_step=5, steps=6, batch_size=8, rank=rank, world=2, accumulation=2))
            )
        ]
        for part in parts:
            for k, position in enumerate(part.position.tolist()):
                (at,) = (batch.position == position).nonzero()
                for a, b in (
                    (part.pixels, batch.pixels),
                    (part.drawn.masks.mask, batch.drawn.masks.mask),
                    (part.drawn.masks.noise, batch.drawn.masks.noise),
                ):
                    assert torch.equal(a[k], b[at[0]])
        assert sorted(p for part in parts for p in part.position.tolist()) == batch.position.tolist()


def cached_images(source: Source, framing: Framing, folder: Path) -> CachedDataset:
    """Return the cached images of a source, encoded by stand-ins for the networks."""

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        return F.avg_pool2d(pixels, 2), torch.ones(len(pixels), 3, 16, 16)

    how: dict[str, Any] = {"framing": framing, "channels": 3, "factor": 2, "digest": "x"}
    latents = LatentCache.open(folder, source, encode, **how)
    text = TextCache.open(folder, source, lambda texts: torch.zeros(len(texts), 2, 3), digest="x", shape=(2, 3))
    return CachedDataset(latents, text, 3, originals=Originals(source, framing))


def test_an_image_damaged_during_training_is_substituted(wide: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(wide, data)
    source = open_source(data, "train")
    dataset = cached_images(source, Framing(resolution=32), tmp_path / "cache")
    before = dataset.__getitems__(range(8))
    damaged = int(before.index[3])
    (data / source[damaged].name).write_bytes(b"no image any more")
    after = dataset.__getitems__(range(8))
    assert [name for name, _ in after.damaged] == [source[damaged].name]
    assert damaged not in after.index
    torch.testing.assert_close(after.mean, F.avg_pool2d(after.pixels, 2))
    for k in range(8):
        if int(before.index[k]) != damaged:
            assert torch.equal(before.pixels[k], after.pixels[k])
    assert not dataset.__getitems__(range(8)).damaged  # already reported


def test_training_starts_as_the_given_model(shapes: Path, text_runs: Path, tmp_path: Path) -> None:
    """The first loss, at a learning rate of nearly 0, equals that of text to image; so do autoencoder and encoder."""
    still = {"optimizer": replace(COMMON["optimizer"], lr=1e-12), "steps": 2, "validate_every": 2}
    for task in ("txt2img", "inpaint"):
        train.stages.ldm.train(
            replace(inpaint_config(shapes, tmp_path / task, text_runs, **still), task=task, vae="", text_encoder="")
        )
    one, other = (losses(tmp_path / task)[0][1] for task in ("txt2img", "inpaint"))
    assert other == pytest.approx(one, rel=1e-5)
    was = LatentDiffusionPipeline.from_pretrained(text_runs / "ldm/model").unet.state_dict()
    for name, value in LatentDiffusionPipeline.from_pretrained(tmp_path / "txt2img/model").unet.state_dict().items():
        torch.testing.assert_close(value, was[name], atol=1e-6, rtol=0)


def test_settings_that_contradict_the_given_model_are_refused(
    shapes: Path, text_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(name: str = "run", **change: Any) -> None:
        train.stages.ldm.train(inpaint_config(shapes, tmp_path / name, text_runs, steps=1, validate_every=1, **change))

    with pytest.raises(UserError, match="no pipeline at 'nowhere'"):
        start(init="nowhere")
    with pytest.raises(UserError, match="missing unet/"):
        start(init=str(text_runs / "vae/model"))
    with pytest.raises(UserError, match="has out_channels 4, but this run needs 8"):
        start(diffusion=DiffusionConfig(variance="learned", objective="hybrid"))
    wide = UnetConfig(channels=(32, 32), attention=(True, True), heads=(2, 2), groups=8)
    with pytest.raises(UserError, match="another shape than the configuration's unet"):
        train.stages.ldm.train(replace(inpaint_config(shapes, tmp_path / "run", text_runs), unet=wide))
    assert not (tmp_path / "run").exists()
    start()
    assert "another noise schedule" not in capsys.readouterr().out
    with pytest.raises(UserError, match="has in_channels 9, but this run needs 4"):
        start("other", task="txt2img", init=str(tmp_path / "run/model"))
    start("again", init=str(tmp_path / "run/model"), diffusion=DiffusionConfig(target="v", beta_end=0.02))
    printed = capsys.readouterr().out
    assert "predicts eps, this run v" in printed
    assert "another noise schedule" in printed
    assert "another autoencoder's latents" not in printed
    assert "another text encoder" not in printed
    train.stages.vae.train(vae_config(shapes, tmp_path / "vae", steps=1, validate_every=1, seed=5))
    train.stages.ldm.train(
        replace(
            inpaint_config(shapes, tmp_path / "foreign", text_runs, steps=1, validate_every=1),
            vae=str(tmp_path / "vae/model"),
            cache=str(tmp_path / "cache"),
        )
    )
    assert "another autoencoder's latents" in capsys.readouterr().out
    with pytest.raises(ValidationError, match="prompts with task inpaint"):
        start("prompts", prompts=("a star",))
    deep = UnetConfig(channels=(8, 8, 8), attention=(False, False, True), heads=(2, 2, 2), groups=8)
    train.stages.ldm.train(
        replace(ldm_config(shapes, tmp_path / "deep", text_runs, steps=1, validate_every=1), unet=deep)
    )
    # Two levels would only need a multiple of 4.
    with pytest.raises(UserError, match=r"--input.buckets 4: must be a multiple of 8"):
        train.stages.ldm.train(
            replace(
                inpaint_config(
                    shapes, tmp_path / "bucketed", text_runs, steps=1, input=DataConfig(resolution=32, buckets=4)
                ),
                init=str(tmp_path / "deep/model"),
                unet=UnetConfig(),
            )
        )
    with pytest.raises(UserError, match=r"--task txt2img: the run in .* was started with inpaint"):
        train.stages.ldm.train(replace(inpaint_config(shapes, tmp_path / "run", text_runs), task="txt2img", steps=1))
    with pytest.raises(UserError, match=r"--vae is missing: .* or give --init with a pipeline"):
        train.stages.ldm.train(replace(inpaint_config(shapes, tmp_path / "none", text_runs), init="", vae=""))
    with pytest.raises(UserError, match="--init: not the same content as in the run"):
        start(init=str(tmp_path / "again/model"), diffusion=DiffusionConfig())


# -- the pipeline ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_inpainting_equals_stock_diffusers(pipe, saved, strength, sampler):
    """Results are compared before pasting. The mask's borders are multiples of the autoencoder's factor."""
    from diffusers import DPMSolverMultistepScheduler

    stock = DiffusionPipeline.from_pretrained(saved)
    assert type(stock) is StableDiffusionInpaintPipeline
    stock.set_progress_bar_config(disable=True)
    if sampler == "dpmpp_2m":
        stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    how = {"strength": strength, "num_inference_steps": 8, "guidance_scale": 3.0, "output_type": "latent"}
    given = {"image": smooth_images(2), "mask_image": box_mask()}
    theirs = stock(PROMPTS, **given, generator=generators(2), height=32, width=32, **how).images
    ours = pipe(PROMPTS, **given, generator=generators(2), sampler=sampler, **how).images
    assert (pipe.decode(ours) - pipe.decode(theirs)).abs().max() <= 2 / 255
    other = pipe(
        PROMPTS, image=smooth_images(2, seed=9), mask_image=box_mask(), generator=generators(2), sampler=sampler, **how
    ).images
    assert (pipe.decode(ours) - pipe.decode(other)).abs().max() > 2 / 255  # the network does see the image


def test_an_inpainting_model_is_saved_and_loaded_unchanged(pipe, saved):
    again = LatentDiffusionPipeline.from_pretrained(saved)
    assert again.inpaints
    assert json.loads((saved / "model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"
    how = {"image": smooth_images(1), "mask_image": box_mask(), "num_inference_steps": 2, "output_type": "np"}
    one, other = (p("a star", generator=generators(1), **how).images for p in (pipe, again))
    np.testing.assert_array_equal(one, other)


def test_the_unmasked_area_is_kept_and_the_masked_content_is_ignored(pipe):
    (given,), mask = smooth_images(1, (45, 35)), box_mask((45, 35), (7, 6, 22, 20))
    how = {"mask_image": mask, "num_inference_steps": 2, "generator": None}
    hidden = np.asarray(mask) > 0
    other = np.asarray(given).copy()
    other[hidden] = 255 - other[hidden]
    made = [
        np.asarray(pipe("a star", image=image, **how | {"generator": generators(1)}).images[0])
        for image in (given, smooth_images(1, (45, 35))[0])
    ]
    np.testing.assert_array_equal(made[0][~hidden], np.asarray(given)[~hidden])
    again = np.asarray(pipe("a star", image=Image.fromarray(other), **how | {"generator": generators(1)}).images[0])
    np.testing.assert_array_equal(again[hidden], made[0][hidden])


def test_an_inpainting_model_also_generates_from_text_and_from_images(pipe):
    """The image equals that of an all-white mask, except for the noise of the sampled posterior of a grey image."""
    how = {"num_inference_steps": 3, "output_type": "np"}
    text = pipe(PROMPTS, generator=generators(2), **how).images
    assert text.shape == (2, 32, 32, 3)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    white = {"image": smooth_images(2), "mask_image": Image.new("L", (32, 32), 255), "latents": noise}
    under = pipe(PROMPTS, generator=generators(2), **white, **how).images
    assert np.abs(under - pipe(PROMPTS, latents=noise, **how).images).max() <= 0.05
    other = pipe(PROMPTS, generator=generators(2), **white | {"image": smooth_images(2, seed=7)}, **how).images
    np.testing.assert_allclose(under, other, atol=1e-5)
    single = pipe(PROMPTS[1], generator=generators(2)[1:], **how).images
    assert np.abs(single[0] - text[1]).max() <= 1 / 255
    near = pipe(PROMPTS, image=smooth_images(2), strength=0.3, generator=generators(2), **how).images
    far = pipe(PROMPTS, image=smooth_images(2), strength=0.9, generator=generators(2), **how).images
    assert np.abs(near - far).max() > 1 / 255
    noise = torch.randn(2, 4, 16, 16)
    z = pipe.invert(noise, "", num_inference_steps=3)
    assert torch.isfinite(z).all()


@pytest.mark.parametrize("task", ["text", "image", "mask"])
@pytest.mark.parametrize("inpaints", [False, True])
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_a_batch_is_reproducible_and_equals_its_images_generated_separately(inpaints, task, sampler):
    pipe, given = tiny_pipeline(inpaints=inpaints), smooth_images(7, (29, 35))
    prompts = [
        f"a small red star above a {word} circle"
        for word in ["red", "green", "blue", "yellow", "purple", "orange", "grey"]
    ]
    masks = [box_mask((29, 35), (k, 2 * k, k + 9, 2 * k + 11)) for k in range(7)]
    how: dict[str, Any] = {"num_inference_steps": 3, "sampler": sampler, "output_type": "np"}
    of_each = {"text": {}, "image": {"image": given, "strength": 0.7}, "mask": {"image": given, "mask_image": masks}}[
        task
    ]
    one, other = (pipe(prompts, generator=generators(7), **of_each, **how).images for _ in range(2))
    np.testing.assert_array_equal(one, other)
    for k in (0, 4, 6):
        mine = {name: value[k : k + 1] if isinstance(value, list) else value for name, value in of_each.items()}
        single = pipe(prompts[k], generator=generators(7)[k : k + 1], **mine, **how).images
        assert np.abs(single[0] - one[k]).max() <= 1 / 255


def test_a_weaker_model_receives_the_context_too(pipe):
    """A model guided away from itself generates the same as without, and something else if guided by another model."""
    given = {"image": smooth_images(2), "mask_image": box_mask()}
    other = tiny_pipeline(inpaints=True)
    torch.nn.init.normal_(other.unet.conv_in.weight[:, 4:].detach(), std=1, generator=generators(1)[0])
    for how in (given, {}):
        how = how | {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "np"}
        plain = pipe(PROMPTS, generator=generators(2), **how).images
        itself = pipe(PROMPTS, generator=generators(2), weak=pipe, weak_scale=2.0, **how).images
        np.testing.assert_allclose(itself, plain, atol=2e-4)
        away = pipe(PROMPTS, generator=generators(2), weak=other, weak_scale=2.0, **how).images
        assert np.abs(away - plain).max() > 1 / 255


def test_other_channel_counts_are_refused(pipe):
    unet = tiny_pipeline().unet
    widen(unet, 8)
    with pytest.raises(UserError, match="has 8 input channels"):
        LatentDiffusionPipeline(unet, pipe.autoencoder, pipe.text_encoder, pipe.process)
