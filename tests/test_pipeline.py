"""The pipeline: its saved folder is complete, and diffusers generates the same images from it."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from autoencoder.model import Autoencoder
from autoencoder.tiling import Tiles
from ldm.errors import RunError, UserError
from ldm.formats.png import file_name, read_png, save_png
from ldm.formats.scheduler_config import Process
from ldm.model import warn_once
from ldm.pipeline import LatentDiffusionPipeline
from support.draws import generators
from support.models import tiny_pipeline

STOCK = {
    "ddim": DDIMScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
    "ddpm": DDPMScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpmpp_2m_sde": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """saved(target, spacing) is the folder of a pipeline, which is written once."""

    @cache
    def save(target: str, spacing: str) -> Path:
        path = tmp_path_factory.mktemp("model")
        tiny_pipeline(target, spacing).save_pretrained(path)
        return path

    return save


def stock(folder: Path, sampler: str) -> StableDiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(str(folder))
    assert type(pipe) is StableDiffusionPipeline
    pipe.set_progress_bar_config(disable=True)
    sde = {"algorithm_type": "sde-dpmsolver++"} if sampler == "dpmpp_2m_sde" else {}
    pipe.scheduler = STOCK[sampler].from_config(pipe.scheduler.config, **sde)
    return pipe


def difference(folder: Path, sampler: str, settings: list[tuple[int, float, str]], rescale: float = 0.0) -> float:
    """Return the greatest difference of our images and diffusers', from one folder.

    settings: steps, guidance scale and negative prompt of each comparison.
    """
    mine, theirs = LatentDiffusionPipeline.from_pretrained(folder), stock(folder, sampler)
    return max(_difference(mine, theirs, sampler, *each, rescale) for each in settings)


def _difference(
    mine: LatentDiffusionPipeline,
    theirs: StableDiffusionPipeline,
    sampler: str,
    steps: int,
    scale: float,
    negative: str,
    rescale: float,
) -> float:
    ours = mine(
        PROMPTS,
        negative,
        num_inference_steps=steps,
        guidance_scale=scale,
        guidance_rescale=rescale,
        sampler=sampler,
        generator=generators(2, 5),
        output_type="np",
    ).images
    expected = theirs(
        PROMPTS,
        negative_prompt=[negative] * 2,
        num_inference_steps=steps,
        guidance_scale=scale,
        guidance_rescale=rescale,
        generator=generators(2, 5),
        output_type="np",
    ).images
    assert np.asarray(ours).std() > 0.01  # an image and not one colour
    return np.abs(ours - expected).max()


COMBINATIONS = [
    (sampler, target, spacing)
    for sampler, target, spacing in itertools.product(STOCK, ["eps", "x0", "v"], ["trailing", "leading", "karras"])
    # diffusers' schedulers don't have the others.
    if not (sampler in ("euler_ancestral", "heun") and target == "x0")
    and not (sampler in ("ddpm", "ddim", "euler_ancestral") and spacing == "karras")
]


@pytest.mark.parametrize(("sampler", "target", "spacing"), COMBINATIONS)
def test_images_equal_those_of_stock_diffusers(
    saved: Callable[[str, str], Path], sampler: str, target: str, spacing: str
) -> None:
    settings = [(10, 3.0, ""), (7, 1.0, ""), (5, 5.0, "a large green cross on a pink background")]
    assert difference(saved(target, spacing), sampler, settings) <= 1 / 255


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_stock_diffusers_rescales_the_same(tmp_path: Path, target: str) -> None:
    tiny_pipeline(target).save_pretrained(tmp_path)
    assert difference(tmp_path, "ddim", [(10, 6.0, "")], rescale=0.7) <= 1 / 255


@pytest.mark.parametrize("target", ["eps", "v"])
def test_stock_diffusers_samples_a_learned_variance_with_ddpm(tmp_path: Path, target: str) -> None:
    # linspace ends at index 0. From any other index stock adds noise of the learned variance to the finished image.
    pipe = tiny_pipeline(target, "linspace", variance="learned")
    with torch.no_grad():
        pipe.unet.conv_out.weight[4:] *= 0.1  # within the bounds, as a trained network's outputs are
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert difference(tmp_path, "ddpm", [(20, 1.0, ""), (20, 3.0, "")]) <= 1 / 255


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_stock_diffusers_starts_from_zero_terminal_snr(tmp_path: Path, sampler: str) -> None:
    tiny_pipeline("v", zero_terminal_snr=True).save_pretrained(tmp_path)
    assert difference(tmp_path, sampler, [(10, 3.0, "")]) <= 1 / 255


PROCESSES = [
    {"schedule": "flow", "target": "flow", "shift": 3.0},
    {"schedule": "flow", "target": "x0", "spacing": "linspace"},
    {"schedule": "sigmoid", "target": "v", "zero_terminal_snr": True},
    {"schedule": "cosine", "target": "eps", "spacing": "karras", "variance": "fixed_large"},
    {"schedule": "linear", "target": "v", "variance": "learned"},
    {"schedule": "quadratic", "target": "flow", "beta_end": 0.02},
]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: f"{p['schedule']}-{p['target']}")
def test_a_process_is_saved_with_the_model_and_honoured(tmp_path: Path, process: dict[str, Any]) -> None:
    first = tiny_pipeline(**process)
    first.save_pretrained(tmp_path)
    second = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert replace(second.process, schedule=first.process.schedule) == first.process
    assert torch.equal(second.process.schedule.alpha, first.process.schedule.alpha)
    sampler = "euler" if process.get("spacing") == "karras" else "ddpm"
    a, b = (
        p(PROMPTS, num_inference_steps=4, sampler=sampler, generator=generators(2, 5), output_type="pt").images
        for p in (first, second)
    )
    assert torch.equal(a, b)


def test_a_process_that_stock_diffusers_cannot_sample_gives_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for process, message in (
        ({}, None),
        ({"schedule": "flow", "target": "flow"}, "schedule or target flow: diffusers"),
        ({"target": "flow"}, "schedule or target flow: diffusers"),
        ({"spacing": "karras"}, "DDIM uses linspace instead"),
        ({"variance": "learned"}, "only with DDPMScheduler"),
    ):
        caplog.clear()
        warn_once.cache_clear()
        pipe = tiny_pipeline(**process)
        pipe.save_pretrained(tmp_path / "a")
        pipe.save_pretrained(tmp_path / "b")
        lines = [record.getMessage() for record in caplog.records if record.name == "ldm.model"]
        assert len(lines) == (message is not None)
        assert message is None or message in lines[0]


def test_a_flow_samples_the_same_through_diffusers_own_scheduler(tmp_path: Path) -> None:
    # No stock pipeline does this for a Stable-Diffusion-shaped model, so the loop is written out.
    tiny_pipeline("flow", schedule="flow", shift=2.0).save_pretrained(tmp_path)
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(str(tmp_path / "scheduler"))
    scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10).tolist())
    z = noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    condition = pipe.encode(PROMPTS[:1])
    with torch.no_grad():
        for t in scheduler.timesteps:
            z = scheduler.step(pipe.unet(z, t, condition).sample, t, z).prev_sample
    ours = pipe(
        PROMPTS[0], num_inference_steps=10, guidance_scale=1.0, sampler="euler", latents=noise, output_type="latent"
    )
    assert (ours.images - z).abs().max() < 1e-4 * z.abs().max()


def test_guidance_options_change_the_image(folder: Path) -> None:
    pipe, other = LatentDiffusionPipeline.from_pretrained(folder), tiny_pipeline()

    def generated(**how: Any) -> Tensor:
        how = {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": generators(2, 5)} | how
        return pipe(PROMPTS, output_type="latent", **how).images

    plain = generated()
    with torch.no_grad():
        for weight in other.unet.parameters():
            weight *= 0.9
    # No effect with neutral settings …
    assert torch.equal(plain, generated(guidance_interval=(0.0, 1e9)))
    assert torch.equal(plain, generated(dynamic_threshold=(1.0, 1e9)))
    assert torch.equal(plain, generated(weak=other, weak_scale=1.0))
    assert torch.equal(plain, generated(classifier=lambda x, level: x.sum((1, 2, 3)), classifier_scale=0.0))
    assert torch.equal(generated(guidance_scale=1.0), generated(guidance_interval=(1e8, 1e9)))
    torch.testing.assert_close(plain, generated(compose=[(PROMPTS[0], 0.0)]))
    twice = generated(guidance_scale=1.5, compose=[(PROMPTS[0], 1.5)])  # the first image's prompt in two halves
    torch.testing.assert_close(twice[0], plain[0], rtol=1e-3, atol=1e-4)
    # … and an effect with others.
    for how in (
        {"guidance_interval": (0.5, 3.0)},
        {"guidance_rescale": 0.7},
        {"dynamic_threshold": (0.9, 0.5)},
        {"weak": other, "weak_scale": 2.0},
        {"classifier": lambda x, level: x.sum((1, 2, 3))},
        {"compose": [("a red star", 2.0)]},
        {"spacing": "linspace"},
    ):
        assert (generated(**how) - plain).abs().mean() > 1e-3, how


@pytest.mark.parametrize(
    "process", [{}, {"spacing": "leading"}, {"schedule": "flow", "target": "flow", "spacing": "leading"}]
)
def test_inversion_recovers_the_latents(process: dict[str, Any]) -> None:
    pipe = tiny_pipeline(**process)
    z = pipe(
        PROMPTS, num_inference_steps=20, guidance_scale=1.0, generator=generators(2, 5), output_type="latent"
    ).images
    errors = []
    for refinements in (0, 4):
        noise = pipe.invert(z, PROMPTS, num_inference_steps=20, refinements=refinements)
        back = pipe(
            PROMPTS, num_inference_steps=20, guidance_scale=1.0, sampler="ddim", latents=noise, output_type="latent"
        )
        errors.append(((back.images - z).square().mean() / z.square().mean()).item())
    assert errors[1] < errors[0]
    assert errors[1] < 1e-4
    with pytest.raises(UserError, match="1 prompts for 2 latents"):
        pipe.invert(z, PROMPTS[:1])


def test_the_scheduler_configuration_is_complete(folder: Path) -> None:
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert config["_class_name"] == "DDIMScheduler"
    assert len(config["trained_betas"]) == config["num_train_timesteps"] == 1000
    assert (config["clip_sample"], config["set_alpha_to_one"], config["steps_offset"]) == (False, True, 1)
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


def test_a_saved_pipeline_generates_the_same(folder: Path, tmp_path: Path) -> None:
    first = LatentDiffusionPipeline.from_pretrained(folder)
    first.save_pretrained(tmp_path)
    second = LatentDiffusionPipeline.from_pretrained(tmp_path)
    a, b = (
        p(PROMPTS, num_inference_steps=3, generator=generators(2, 5), output_type="pt").images for p in (first, second)
    )
    assert torch.equal(a, b)


def test_an_image_does_not_depend_on_its_batch(folder: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    both = pipe(PROMPTS, num_inference_steps=5, generator=generators(2, 5), output_type="pt").images
    single = pipe(PROMPTS[1], num_inference_steps=5, generator=generators(2, 5)[1], output_type="pt").images
    assert (both[1:] - single).abs().max() <= 1 / 255
    assert (both[0] - both[1]).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(folder: Path, dtype: torch.dtype) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    full = pipe(PROMPTS, num_inference_steps=5, generator=generators(2, 5), output_type="pt").images
    half = pipe.to(dtype=dtype)(PROMPTS, num_inference_steps=5, generator=generators(2, 5), output_type="pt").images
    assert pipe.unet.dtype == dtype
    assert pipe.autoencoder.vae.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().mean() < 0.02


FOREIGN = {  # scheduler_config.json → target, spacing, variance, offset, whether ddim ends clean
    "PNDM of SD 1.5": (
        {
            "_class_name": "PNDMScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "steps_offset": 1,
            "skip_prk_steps": True,
        },
        ("eps", "leading", "fixed_small", 1, False),
    ),
    "Euler of old": (
        {
            "_class_name": "EulerDiscreteScheduler",
            "beta_schedule": "linear",
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "prediction_type": "v_prediction",
        },
        ("v", "linspace", "fixed_small", 0, True),
    ),
    "DDIM's defaults": (
        {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        ("eps", "leading", "fixed_small", 0, True),
    ),
    "DPM-Solver with Karras": (
        {
            "_class_name": "DPMSolverMultistepScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "use_karras_sigmas": True,
        },
        ("eps", "karras", "fixed_small", 0, True),
    ),
    "flow matching": (
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        ("flow", "trailing", "fixed_small", 0, True),
    ),
    "DDPM, large": (
        {
            "_class_name": "DDPMScheduler",
            "beta_schedule": "sigmoid",
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "variance_type": "fixed_large_log",
        },
        ("eps", "leading", "fixed_large", 0, True),
    ),
}


@pytest.mark.parametrize(("config", "means"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_schedulers_are_read_with_their_own_defaults(config: dict[str, Any], means: tuple[Any, ...]) -> None:
    p = Process.from_diffusers(config)
    assert (p.target, p.spacing, p.variance, p.steps_offset, p.set_alpha_to_one) == means


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variance_type": "learned"}, "variance_type 'learned'"),
        ({"variance_type": "nonsense"}, "choose fixed_small"),
        ({"steps_offset": "1"}, "steps_offset '1'"),
        ({"timestep_spacing": "even"}, "spacing 'even'"),
        ({"prediction_type": "noise"}, "prediction_type 'noise'"),
        ({"num_train_timesteps": True}, "num_train_timesteps True"),
        ({"beta_schedule": []}, "beta_schedule"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas"),
        ({"timestep_type": "continuous"}, "timestep_type"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type 'sigma_min'"),
        ({"interpolation_type": "log_linear"}, "interpolation_type"),
    ],
)
def test_unsupported_schedulers_are_refused(change: dict[str, Any], message: str) -> None:
    config = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    with pytest.raises(UserError, match=message):
        Process.from_diffusers(config | change)


def test_invalid_prompts_and_options_are_refused(folder: Path, tmp_path: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    for wrong in (
        {"num_inference_steps": 0},
        {"num_inference_steps": 1001},
        {"height": 33},
        {"negative_prompt": ["a", "b", "c"]},
        {"generator": generators(2, 5)[:1]},
        {"latents": torch.zeros(1, 4, 8, 8)},
        {"sampler": "dpm"},
        {"spacing": "even"},
        {"guidance_rescale": 1.5},
        {"guidance_interval": (5.0, 0.2)},
        {"dynamic_threshold": (1.5, 3.0)},
        {"dynamic_threshold": (0.9, 0.0)},
        {"guidance_scale": float("nan")},
        {"compose": [("a red star", float("inf"))]},
        {"weak": tiny_pipeline(schedule="cosine")},
        {"sampler": "ddim", "spacing": "karras"},
        {"eta": 2.0, "sampler": "ddim"},
        {"num_images_per_prompt": 0},
    ):
        with pytest.raises(UserError):
            pipe(PROMPTS, **wrong)
    for process, message in (
        ({"schedule": "flow", "target": "eps"}, "target eps: can't be used with a schedule that ends in pure noise"),
        ({"target": "eps", "zero_terminal_snr": True}, "choose v, x0 or flow"),
    ):
        with pytest.raises(UserError, match=message):
            tiny_pipeline(**process)
    process = replace(pipe.process, variance="learned")
    with pytest.raises(UserError, match="needs a network with 8 output channels, but this one has 4"):
        LatentDiffusionPipeline(pipe.unet, pipe.autoencoder, pipe.text_encoder, process)
    with pytest.raises(UserError, match="scheduler/"):
        LatentDiffusionPipeline.from_pretrained(tmp_path)


def test_an_image_that_is_not_finite_is_an_error(folder: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(RunError, match="contains NaN or infinity"):
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


def test_the_callback_receives_what_stock_diffusers_gives_its_own(folder: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    seen: dict[str, list[Any]] = {"theirs": [], "ours": []}

    def note(who: str) -> Any:
        def callback(pipe: Any, step: int, t: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
            seen[who].append((step, int(t), given["latents"].clone()))
            return {}

        return callback

    how: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    stock(PROMPTS, generator=generators(2, 5), callback_on_step_end=note("theirs"), **how)
    z = pipe(PROMPTS, generator=generators(2, 5), sampler="ddim", callback_on_step_end=note("ours"), **how).images
    for (k, t, theirs), (step, index, ours) in zip(seen["theirs"], seen["ours"], strict=True):
        assert (k, t) == (step, index)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert torch.equal(seen["ours"][-1][2], z)


def test_the_callback_may_change_the_latents_and_receives_the_denoised_ones(folder: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    made: list[Tensor] = []

    def callback(pipe: Any, step: int, t: float, given: dict[str, Tensor]) -> dict[str, Tensor] | None:
        made.append(given["denoised"])
        return {"latents": torch.zeros_like(given["latents"])} if step == 2 else None

    how: dict[str, Any] = {"num_inference_steps": 3, "sampler": "ddim", "output_type": "latent"}
    z = pipe(PROMPTS, generator=generators(2, 5), callback_on_step_end=callback, **how).images
    assert isinstance(z, Tensor)
    assert not z.any()
    assert [m.shape for m in made] == [z.shape] * 3
    plain = pipe(
        PROMPTS, generator=generators(2, 5), **how | {"num_inference_steps": 1}, callback_on_step_end=callback
    ).images
    scale = pipe.process.schedule.level(0).alpha  # a single step ends at the first level, close to the denoised latents
    assert (plain - made[3]).abs().max() < 0.1 + (1 - scale)


def test_prompt_embeddings_replace_prompts(folder: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    how: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    from_text = pipe(PROMPTS, "a circle", generator=generators(2, 5), **how).images
    given = pipe(
        prompt_embeds=pipe.encode(PROMPTS),
        negative_prompt_embeds=pipe.encode(["a circle"]),
        generator=generators(2, 5),
        **how,
    ).images
    np.testing.assert_array_equal(from_text, given)
    for wrong, message in (
        ({}, "prompt None: give at least one"),
        ({"prompt": [], "negative_prompt": "a"}, "give at least one"),
        ({"prompt": "a", "prompt_embeds": pipe.encode(["a"])}, "both given"),
        ({"prompt_embeds": torch.zeros(1, 3, 32)}, r"shape \(1, 3, 32\)"),
        ({"prompt": "a", "negative_prompt_embeds": torch.zeros(0, 16, 32)}, r"shape \(0, 16, 32\)"),
        ({"prompt_embeds": pipe.encode(["a"]), "weak": pipe}, "give prompt instead of prompt_embeds"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["a", "b"]}, "3 prompts but 2 negative prompts"),
        ({"prompt": "a", "output_type": "jpeg"}, "output_type 'jpeg'"),
    ):
        with pytest.raises(UserError, match=message):
            pipe(**wrong, num_inference_steps=1)


def test_unusable_devices_callbacks_and_sizes_are_refused(folder: Path) -> None:
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    with pytest.raises(UserError, match="device 'nowhere' can't be used"):
        pipe.enable_model_cpu_offload("nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device 'cuda' can't be used"):
            pipe.enable_model_cpu_offload()
    assert pipe.device == torch.device("cpu")
    with pytest.raises(UserError, match="returned latents of shape"):
        pipe("a", num_inference_steps=2, callback_on_step_end=lambda *_: {"latents": torch.zeros(1)})
    for size in ({"width": 0}, {"height": -8}, {"width": 9}):
        with pytest.raises(UserError, match="must be positive multiples of"):
            pipe("a", **size)
    with pytest.raises(UserError, match="width 100000000, height 100000000: an image can have up to 89,478,485"):
        pipe("a", width=10**8, height=10**8)


def test_options_that_save_memory_generate_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are decoded one by one, and the networks are on the device one after the other."""
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    given = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {"image": given, "num_inference_steps": 3, "output_type": "np"}
    plain = pipe(PROMPTS, generator=generators(2, 5), **how).images
    at_once: list[int] = []
    decode = pipe.autoencoder.vae.decode
    monkeypatch.setattr(pipe.autoencoder.vae, "decode", lambda z: at_once.append(len(z)) or decode(z))
    pipe.enable_vae_slicing()
    sliced = pipe(PROMPTS, generator=generators(2, 5), **how).images
    assert np.abs(sliced - plain).max() <= 1e-5
    assert at_once == [1, 1]
    pipe.disable_vae_slicing()

    moved: list[tuple[str, str]] = []
    to = torch.nn.Module.to

    def spy(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        moved.append((type(module).__name__, str(kwargs.get("device"))))
        return to(module, "cpu")

    pipe.enable_model_cpu_offload("cpu")
    pipe.model.offload = torch.device("cpu", 0)  # its name distinguishes it from the device where the networks stay
    monkeypatch.setattr(torch.nn.Module, "to", spy)
    np.testing.assert_array_equal(pipe(PROMPTS, generator=generators(2, 5), **how).images, plain)
    networks = ["TextTower", "AutoencoderKL", "UNet2DConditionModel", "AutoencoderKL"]
    assert moved == [(name, device) for name in networks for device in ("cpu:0", "cpu")]

    weak = LatentDiffusionPipeline.from_pretrained(folder)
    weak.model.offload, moved[:] = pipe.model.offload, []
    pipe(PROMPTS, generator=generators(2, 5), weak=weak, **how)
    assert moved.count(("UNet2DConditionModel", "cpu:0")) == 2
    first = moved.index(("UNet2DConditionModel", "cpu:0"))
    assert moved[first + 1] == ("UNet2DConditionModel", "cpu:0")  # both are on the device during sampling


def test_large_images_are_decoded_in_tiles() -> None:
    pipe = tiny_pipeline()
    latents = torch.randn(1, 4, 16, 32, generator=torch.Generator().manual_seed(0))
    untiled, sizes = pipe.decode(latents), []
    pipe.enable_vae_tiling(Tiles(12, 6))
    handle = pipe.autoencoder.vae.decoder.conv_in.register_forward_hook(lambda *a: sizes.append(a[1][0].shape[-2:]))
    tiled = pipe.decode(latents)
    handle.remove()
    assert set(sizes) == {(12, 12)}
    assert 10 * math.log10(1 / float((tiled - untiled).square().mean())) > 50
    pipe.disable_vae_tiling()
    assert torch.equal(pipe.decode(latents), untiled)


def test_a_saved_pipeline_contains_no_path_of_its_source(tmp_path: Path) -> None:
    """diffusers stores that path in the networks' configurations, which are published with the weights."""
    tiny_pipeline().save_pretrained(tmp_path / "first")
    loaded = LatentDiffusionPipeline.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    Autoencoder.load(tmp_path / "first").save(tmp_path / "autoencoder")
    reported = [path for path in tmp_path.rglob("*.json") if str(tmp_path) in path.read_text(encoding="utf-8")]
    assert reported == []


def test_a_network_of_another_class_is_refused(tmp_path: Path) -> None:
    """diffusers itself only warns and gives the weights that don't fit random values."""
    tiny_pipeline().save_pretrained(tmp_path)
    for part, other in (("unet", "DiTTransformer2DModel"), ("vae", "AutoencoderTiny")):
        path = tmp_path / part / "config.json"
        before = path.read_text()
        path.write_text(json.dumps(json.loads(before) | {"_class_name": other}))
        with pytest.raises(UserError, match=f"config.json has _class_name {other}, not"):
            LatentDiffusionPipeline.from_pretrained(tmp_path)
        path.write_text(before)
