"""The checkpoint is everybody's: the folder is complete, and stock diffusers paints the same pictures from it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors import safe_open

from ldm.errors import RunError, UserError
from ldm.pipeline import LatentDiffusionPipeline
from ldm.png import file_name, read_png, save_png

STOCK = {
    "ddim": DDIMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "ddpm": DDPMScheduler,
}
PROMPTS = [
    "a small blue star above a large yellow square on a black background",
    "a large red circle on a white background",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(path)
    return path


def seeds() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in (5, 6)]


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
@pytest.mark.parametrize("sampler", STOCK)
def test_stock_diffusers_paints_the_same(tmp_path: Path, sampler: str, target: str, spacing: str) -> None:
    tiny_pipeline(target, spacing).save_pretrained(tmp_path)
    ours = LatentDiffusionPipeline.from_pretrained(tmp_path)
    stock = DiffusionPipeline.from_pretrained(str(tmp_path))
    assert type(stock) is StableDiffusionPipeline
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = STOCK[sampler].from_config(stock.scheduler.config)
    for steps, scale, negative in ((10, 3.0, ""), (7, 1.0, ""), (10, 5.0, "a large green cross on a pink background")):
        mine = ours(
            PROMPTS, negative, num_inference_steps=steps, guidance_scale=scale, sampler=sampler, generator=seeds(),
            output_type="np",
        ).images  # fmt: skip
        theirs = stock(
            PROMPTS, negative_prompt=[negative] * 2, num_inference_steps=steps, guidance_scale=scale,
            generator=seeds(), output_type="np",
        ).images  # fmt: skip
        assert np.asarray(mine).std() > 0.01  # a picture, not a flat field
        assert np.abs(mine - theirs).max() <= 1 / 255


def test_the_scheduler_says_everything(folder: Path) -> None:
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert config["_class_name"] == "DDIMScheduler"
    assert len(config["trained_betas"]) == config["num_train_timesteps"] == 1000
    assert (config["clip_sample"], config["set_alpha_to_one"], config["steps_offset"]) == (False, False, 1)
    assert (config["timestep_spacing"], config["prediction_type"]) == ("trailing", "v_prediction")


def test_index_names_a_stable_diffusion_pipeline(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is False


def test_text_parts_are_readable_by_older_transformers(folder: Path) -> None:
    with safe_open(folder / "text_encoder/model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {p.name for p in (folder / "tokenizer").iterdir()}


def test_only_safetensors_json_and_text_are_written(folder: Path) -> None:
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} <= {".safetensors", ".json", ".txt"}


def test_round_trip_paints_the_same(folder: Path, tmp_path: Path) -> None:
    first = LatentDiffusionPipeline.from_pretrained(folder)
    first.save_pretrained(tmp_path)
    second = LatentDiffusionPipeline.from_pretrained(tmp_path)
    a, b = (p(PROMPTS, num_inference_steps=3, generator=seeds(), output_type="pt").images for p in (first, second))
    assert torch.equal(a, b)


def test_a_picture_does_not_depend_on_its_batch(folder: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    both = pipe(PROMPTS, num_inference_steps=5, generator=seeds(), output_type="pt").images
    alone = pipe(PROMPTS[1], num_inference_steps=5, generator=seeds()[1], output_type="pt").images
    assert (both[1:] - alone).abs().max() <= 1 / 255
    assert (both[0] - both[1]).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_close(folder: Path, dtype: torch.dtype) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    full = pipe(PROMPTS, num_inference_steps=5, generator=seeds(), output_type="pt").images
    half = pipe.to(dtype=dtype)(PROMPTS, num_inference_steps=5, generator=seeds(), output_type="pt").images
    assert pipe.unet.dtype == dtype
    assert pipe.autoencoder.vae.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().mean() < 0.02


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    for wrong in (
        {"num_inference_steps": 0},
        {"num_inference_steps": 1001},
        {"height": 33},
        {"negative_prompt": ["a", "b", "c"]},
        {"generator": seeds()[:1]},
        {"latents": torch.zeros(1, 4, 8, 8)},
        {"sampler": "dpm"},
        {"eta": 2.0, "sampler": "ddim"},
    ):
        with pytest.raises(UserError):
            pipe(PROMPTS, **wrong)
    with pytest.raises(UserError, match="scheduler/"):
        LatentDiffusionPipeline.from_pretrained(tmp_path)


def test_a_picture_that_is_not_finite_is_not_handed_over(folder: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(RunError, match="non-finite"):
        pipe.decode(torch.full((1, 4, 16, 16), torch.nan))


@pytest.mark.parametrize(
    "prompt", ["a red star", "„Grüße“ 你好 \U0001f600\nNegative prompt: x\nSteps: 1", "<b>&amp;</b>\t", "x" * 5000]
)
def test_a_png_carries_its_settings(tmp_path: Path, prompt: str) -> None:
    settings = {
        "prompt": prompt,
        "negative_prompt": "",
        "steps": 5,
        "sampler": "ddim",
        "guidance_scale": 2.0,
        "seed": 7,
    }
    path = tmp_path / file_name(prompt, 7)
    assert path.parent == tmp_path
    save_png(Image.new("RGB", (4, 4)), path, settings)
    assert read_png(path) == settings
