"""Consistency models against diffusers: the sampler lcm, and a UNet that reads its guidance scale."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image

from ldm.consistency import boundary, guidance_embedding, solver_indices
from ldm.denoiser import Denoiser
from ldm.errors import UserError
from ldm.formats.png import read_png
from ldm.formats.scheduler_config import Process
from ldm.guidance import Conditioned
from ldm.model import warn_once
from ldm.pipeline import LatentDiffusionPipeline
from ldm.samplers import make_sampler
from ldm.schedule import Schedule
from ldm.spacing import make_plan
from ldm.steps import sample
from support.draws import draw, generators
from support.models import PROMPTS, distilled_pipeline, tiny_pipeline
from train.commands.img2img import img2img
from train.commands.inpaint import inpaint
from train.commands.interpolate import interpolate
from train.commands.txt2img import txt2img
from train.config.generation import Img2ImgOptions, InpaintOptions, InterpolateOptions, Txt2ImgOptions


@pytest.mark.parametrize(("T", "solver_steps"), [(1000, 50), (1000, 24), (90, 7)])
def test_levels_and_solver_are_those_of_diffusers(T, solver_steps):
    schedule = Schedule.build("scaled_linear", T)
    scheduler = LCMScheduler(T, original_inference_steps=solver_steps)
    for n in range(1, solver_steps + 1):
        scheduler.set_timesteps(n)
        plan = make_plan(schedule, make_sampler("lcm").grid, n, "trailing", solver_steps=solver_steps)
        assert [pair.now.model_time for pair in plan.pairs] == scheduler.timesteps.tolist()
        assert plan.pairs[-1].next.is_last
    with pytest.raises(UserError, match=f"{solver_steps + 1} steps"):
        make_plan(schedule, make_sampler("lcm").grid, solver_steps + 1, "trailing", solver_steps=solver_steps)


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
@pytest.mark.parametrize("n", [1, 2, 4, 50])
def test_trajectory_is_that_of_diffusers(target, n):
    process = Process(schedule=Schedule.build("scaled_linear"), target=target, solver_steps=50)
    scheduler = process.to_diffusers()
    assert isinstance(scheduler, LCMScheduler)
    scheduler.alphas_cumprod = process.schedule.alpha.double() ** 2

    def network(x, time, condition):
        return torch.tanh(x + time.double().div(300).sin().view(-1, 1, 1, 1))

    x = draw(2, 3, 4, 4, seed=1)
    ours, generator = [], torch.Generator().manual_seed(0)
    sample(
        Conditioned(Denoiser(network, target), None),
        x,
        make_plan(process.schedule, make_sampler("lcm").grid, n, "trailing").pairs,
        make_sampler("lcm").step(process.schedule),
        lambda: torch.randn(x.shape, generator=generator, dtype=torch.float64),
        callback=lambda k, pair, x: (ours.append(x), x)[1],
    )
    scheduler.set_timesteps(n)
    generator = torch.Generator().manual_seed(0)
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, t.expand(2), None), t, x, generator=generator).prev_sample
        torch.testing.assert_close(ours[k], x, rtol=1e-6, atol=1e-6)


def test_boundary_is_the_identity_at_t_0():
    times = torch.tensor([0.0, 1, 19, 999], dtype=torch.float64)
    skip, out = boundary(times)
    assert skip[0] == 1
    assert out[0] == 0
    scalings = [LCMScheduler().get_scalings_for_boundary_condition_discrete(t) for t in times.tolist()]
    torch.testing.assert_close(torch.stack([skip, out], 1), torch.tensor(scalings, dtype=torch.float64))


def test_process_of_a_consistency_model_is_read_back():
    process = Process(schedule=Schedule.build("scaled_linear"), target="v", solver_steps=24)
    again = Process.from_diffusers({"_class_name": "LCMScheduler", **process.to_diffusers().config})
    assert (again.solver_steps, again.sampler, again.target) == (24, "lcm", "v")
    assert torch.equal(again.schedule.betas, process.schedule.betas)
    assert Process(schedule=process.schedule, target="v").sampler == "dpmpp_2m"
    for wrong, message in (
        ({"original_inference_steps": 2000}, "2000 steps"),
        ({"timestep_scaling": 1.0}, "must be 10"),
    ):
        with pytest.raises(UserError, match=message):
            Process.from_diffusers({"_class_name": "LCMScheduler", **process.to_diffusers().config, **wrong})


@pytest.mark.parametrize("width", [32, 33, 256])
def test_scale_is_embedded_as_in_diffusers(width):
    from diffusers import StableDiffusionPipeline

    scale = torch.tensor([1.0, 1.25, 7.5])
    theirs = StableDiffusionPipeline.get_guidance_scale_embedding(None, scale - 1, width)
    torch.testing.assert_close(guidance_embedding(scale, width), theirs)
    assert solver_indices(10, 5) == [1, 3, 5, 7, 9]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    distilled_pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("steps", "scale"), [(4, 5.0), (1, 1.0), (2, 0.5)])
def test_stock_diffusers_generates_the_same_images(distilled, steps, scale):
    how = {"num_inference_steps": steps, "guidance_scale": scale}
    mine = LatentDiffusionPipeline.from_pretrained(distilled)
    ours = mine(PROMPTS, generator=generators(2, 5), output_type="np", **how).images
    stock = DiffusionPipeline.from_pretrained(str(distilled))
    assert isinstance(stock.scheduler, LCMScheduler)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(PROMPTS, generator=generators(2, 5), output_type="np", **how).images
    assert np.abs(ours - theirs).max() <= 1 / 255
    other = mine(PROMPTS, generator=generators(2, 5), output_type="np", **{**how, "guidance_scale": 3.0}).images
    assert np.abs(other - ours).max() > 10 / 255, "the scale has an effect"


def test_image_to_image_is_that_of_stock_diffusers(distilled):
    image = Image.fromarray((draw(32, 32, 3, seed=2).clamp(-1, 1).numpy() * 127 + 128).astype(np.uint8))
    how = {"num_inference_steps": 4, "guidance_scale": 5.0, "strength": 0.5, "image": image}
    ours = LatentDiffusionPipeline.from_pretrained(distilled)(
        PROMPTS[0], generator=generators(1, 5), output_type="np", **how
    ).images
    stock = StableDiffusionImg2ImgPipeline.from_pretrained(str(distilled))
    stock.set_progress_bar_config(disable=True)
    theirs = stock(PROMPTS[0], generator=generators(1, 5), output_type="np", **how).images
    assert np.abs(ours - theirs).max() <= 1 / 255


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"negative_prompt": "a large green circle"}, "a negative prompt"),
        ({"guidance_rescale": 0.5}, "guidance rescale"),
        ({"guidance_interval": (0.1, 4.0)}, "a guidance interval"),
        ({"compose": [("a large green circle", 2.0)]}, "composed prompts"),
    ],
)
def test_other_guidance_of_a_distilled_model_is_refused(distilled, setting, message):
    with pytest.raises(UserError, match=f"{message}: this model's guidance is distilled"):
        LatentDiffusionPipeline.from_pretrained(distilled)(PROMPTS[0], **setting)


def test_commands_take_steps_and_sampler_from_the_model(distilled: Path, tmp_path: Path) -> None:
    tiny_pipeline("eps").save_pretrained(tmp_path / "plain")
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "image.png")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "mask.png")
    image = {"image": str(tmp_path / "image.png"), "mask": str(tmp_path / "mask.png")}
    for model, own, few in ((tmp_path / "plain", "dpmpp_2m", 25), (distilled, "lcm", 4)):
        how = {"model": str(model), "prompt": PROMPTS[0], "out": str(tmp_path / own), "optimize": "off"}
        sde = "dpmpp_2m_sde" if own == "dpmpp_2m" else own
        for paths, sampler, steps in (
            (txt2img(Txt2ImgOptions(**how)), own, few),
            (txt2img(Txt2ImgOptions(**how, sampler="ddim", steps=3)), "ddim", 3),
            (img2img(Img2ImgOptions(**how, image=(image["image"],))), own, few),
            (inpaint(InpaintOptions(**how, **image)), sde, few),
        ):
            (path,) = paths
            assert {name: read_png(path)[name] for name in ("sampler", "steps")} == {"sampler": sampler, "steps": steps}
    assert Txt2ImgOptions(sampler="lcm").for_sampler("dpmpp_2m").steps == 4
    assert Txt2ImgOptions(sampler="ddim").for_sampler("lcm").steps == 25
    with pytest.raises(UserError, match="a negative prompt: this model's guidance is distilled"):
        list(txt2img(Txt2ImgOptions(**how, negative_prompt="blue")))
    with pytest.raises(UserError, match="--sampler lcm: draws new noise at each step"):
        list(interpolate(InterpolateOptions(**how, to_seed=3)))


def test_the_sampler_of_consistency_models_warns_for_another_model(distilled, caplog):
    warn_once.cache_clear()
    how = {"sampler": "lcm", "num_inference_steps": 1, "output_type": "latent"}
    LatentDiffusionPipeline.from_pretrained(distilled)(PROMPTS[0], **how)
    assert not caplog.messages
    for _ in range(2):
        tiny_pipeline("eps")(PROMPTS[0], **how)
    assert [message.partition(":")[0] for message in caplog.messages] == ["sampler lcm"]
