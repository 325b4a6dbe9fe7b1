"""Distillation: its objectives against the papers' formulas, its runs, and the models that it makes."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler
from torch import Tensor

from ldm.errors import UserError
from ldm.networks.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from support.draws import generators
from support.models import PROMPTS, tiny_pipeline
from support.runs import Crash, distill_config, final_state, train_stage
from support.stepping import record, uniforms
from train.config.distill import DistillConfig

RANGES = [(1.0, 8.0), (2.0, 3.0)]
Student = Any


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, its inpainting variant, and a student that reads its guidance scale."""
    root = tmp_path_factory.mktemp("teachers")
    tiny_pipeline("v").save_pretrained(root / "plain")
    tiny_pipeline("eps").save_pretrained(root / "eps")
    tiny_pipeline("v", inpaints=True).save_pretrained(root / "inpaint")
    return root


@pytest.fixture(scope="module")
def guided(teachers: Path, shapes: Path) -> Path:
    """A run whose student reads its guidance scale."""
    out = teachers / "guided"
    train_stage(distill_config(shapes, out, teachers / "plain", cache=str(teachers / "cache")))
    return out


def config(shapes: Path, teachers: Path, out: Path, teacher: str = "plain", **change: Any) -> DistillConfig:
    return distill_config(shapes, out, teachers / teacher, cache=str(teachers / "cache"), **change)


@torch.no_grad()
def predict(pipe: LatentDiffusionPipeline, x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
    """Return the prediction of a network, one example at a time."""
    rows = [pipe.unet(x[k : k + 1], time[k], condition[k : k + 1]).sample for k in range(len(x))]
    return torch.cat(rows).double()


def with_guidance(pipe: LatentDiffusionPipeline, x: Tensor, time: Tensor, condition: Tensor, scale: Tensor) -> Tensor:
    null = pipe.encode([""]).expand_as(condition)
    without, with_caption = predict(pipe, x, time, null), predict(pipe, x, time, condition)
    return without + scale.double().view(-1, 1, 1, 1) * (with_caption - without)


@pytest.mark.parametrize("scales", RANGES)
def test_guidance_is_learned_from_two_predictions(
    scales: tuple[float, float], shapes: Path, teachers: Path, tmp_path: Path
) -> None:
    """The scales of a batch, and the error of the student, which is at first the teacher at scale 1."""
    recorded = record(config(shapes, teachers, tmp_path / "run", seed=7, scales=scales), 1)
    (part,), teacher = recorded.parts[0], LatentDiffusionPipeline.from_pretrained(teachers / "plain")
    u = uniforms(7, 18, range(8))[:, 0]
    np.testing.assert_allclose(part.scale, scales[0] + (scales[1] - scales[0]) * u, rtol=1e-6)
    assert (np.sort((part.timestep * 8).long()) == np.arange(8)).all()  # one in each eighth of the levels
    index = (part.timestep * 1000).long()
    schedule = teacher.process.schedule
    alpha, sigma = (row[index].view(-1, 1, 1, 1) for row in (schedule.alpha, schedule.sigma))
    x_t = (alpha * part.x0 + sigma * part.noise).float()
    expected = with_guidance(teacher, x_t, index, part.condition, part.scale)
    error = ((predict(teacher, x_t, index, part.condition) - expected) ** 2).mean()
    assert recorded.metrics[0]["loss"] == pytest.approx(error.item(), rel=1e-3)
    student = recorded.initial[0]
    assert student.config.time_cond_proj_dim == 256
    assert not student.time_embedding.cond_proj.weight.any()
    assert recorded.weights[0][0]["time_embedding.cond_proj.weight"].any()


@pytest.mark.parametrize("scheme", [("plain", 50, 1e-3), ("eps", 7, 0.3), ("guided/model", 20, 0.01)])
def test_consistency_is_learned_from_a_step_of_ddim(
    scheme: tuple[str, int, float], shapes: Path, teachers: Path, guided: Path, tmp_path: Path
) -> None:
    """The loss of a second step, from diffusers' DDIM and the boundary conditions of its LCMScheduler."""
    name, steps, huber = scheme
    settings: dict[str, Any] = {"method": "consistency", "solver_steps": steps, "huber": huber, "scales": (1.5, 6.0)}
    recorded = record(config(shapes, teachers, tmp_path / "run", name, **settings), 2)
    (part,), teacher = recorded.parts[1], LatentDiffusionPipeline.from_pretrained(teachers / name)
    ddim = DDIMScheduler.from_config(teacher.process.to_diffusers().config)
    ddim.num_inference_steps = steps  # a step is to the level 1000 // steps lower
    lcm = LCMScheduler.from_config(ddim.config, original_inference_steps=steps)
    student, average = (UNet.wrap(copy.deepcopy(recorded.initial[0]), 4) for _ in range(2))
    student.module.load_state_dict(recorded.weights[0][0])
    average.module.load_state_dict(recorded.averages[0])

    @torch.no_grad()
    def f(net: UNet, x: Tensor, t: Tensor, condition: Tensor, scale: Tensor) -> Tensor:
        skip, out = lcm.get_scalings_for_boundary_condition_discrete(int(t))
        x0_hat = ddim.step(net(x, t, condition, scale), int(t), x).pred_original_sample
        return (skip * x + out * x0_hat).double()

    losses = []
    for k in range(8):
        x0, noise, condition, scale = (v[k : k + 1] for v in (part.x0, part.noise, part.condition, part.scale))
        place = int(part.timestep[k] * steps)
        start, end = (torch.tensor([1000 // steps * (place + more) - 1]) for more in (1, 0))
        x = ddim.add_noise(x0, noise, start).float()
        if teacher.backbone.guidance_width:
            output = teacher.backbone(x, start, condition, scale).detach()
        else:
            output = with_guidance(teacher, x, start, condition, scale).float()
        x_s = ddim.step(output, int(start), x).prev_sample
        here = f(student, x, start, condition, scale)
        there = f(average, x_s, end, condition, scale) if place else x_s.double()
        losses.append((((here - there) ** 2 + huber**2).sqrt() - huber).mean().item())
    assert recorded.metrics[1]["loss"] == pytest.approx(np.mean(losses), rel=2e-3)


@pytest.mark.parametrize("method", ["guidance", "consistency"])
def test_a_run_continues_exactly(method: Any, shapes: Path, teachers: Path, tmp_path: Path) -> None:
    runs = [
        config(shapes, teachers, tmp_path / name, method=method, steps=2, checkpoint_every=1)
        for name in ("whole", "cut")
    ]
    train_stage(runs[0])
    with pytest.raises(KeyboardInterrupt):
        train_stage(runs[1], Crash(1))
    train_stage(runs[1])
    assert final_state(tmp_path / "whole", 2) == final_state(tmp_path / "cut", 2)
    with pytest.raises(UserError, match=r"--teacher: not the same content as in the run"):
        train_stage(config(shapes, teachers, tmp_path / "cut", "eps", method=method, steps=3))


def test_stock_diffusers_generates_the_same_images(shapes: Path, teachers: Path, guided: Path, tmp_path: Path) -> None:
    """A student of each method, with weights that were trained and that differ from the teacher's."""
    few = config(shapes, teachers, tmp_path / "few", "guided/model", method="consistency", solver_steps=20, steps=2)
    train_stage(few)
    for folder, steps, kind in ((guided, 5, DDIMScheduler), (tmp_path / "few", 2, LCMScheduler)):
        stock = DiffusionPipeline.from_pretrained(str(folder / "model"))
        assert type(stock.scheduler) is kind
        stock.set_progress_bar_config(disable=True)
        mine = LatentDiffusionPipeline.from_pretrained(folder / "model")
        sampler: Any = {} if kind is LCMScheduler else {"sampler": "ddim"}
        for scale in (1.0, 4.5):
            how = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "np"}
            theirs = stock(PROMPTS, generator=generators(2, 5), **how).images
            ours = mine(PROMPTS, generator=generators(2, 5), **how, **sampler).images
            assert np.abs(ours - theirs).max() <= 2 / 255
    card = (tmp_path / "few/model/README.md").read_text()
    assert "- teacher: `model`" in card
    assert "num_inference_steps=2" in card
    about = json.loads((tmp_path / "few/model/training.json").read_text())
    assert about["config"]["method"] == "consistency"


def test_an_inpainting_model_is_distilled(shapes: Path, teachers: Path, tmp_path: Path) -> None:
    train_stage(config(shapes, teachers, tmp_path / "run", "inpaint", steps=1, validate_every=1))
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "run/model")
    assert pipe.inpaints
    assert pipe.backbone.guidance_width == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": ""}, "--teacher is missing"),
        ({"teacher": "guided/model"}, "its guidance is distilled already; choose --method consistency"),
        ({"teacher": "learned"}, "has a learned variance"),
        ({"teacher": "few", "method": "consistency"}, "is a consistency model"),
        ({"teacher": "flow", "method": "consistency"}, "needs a beta schedule"),
        ({"solver_steps": 2000, "method": "consistency"}, "2000 steps of the solver"),
        ({"sample_steps": 1001}, "1001 sampling steps"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, shapes: Path, teachers: Path, guided: Path, tmp_path: Path
) -> None:
    teacher = change.pop("teacher", "plain")
    process: dict[str, Any] = {"learned": {"variance": "learned"}, "flow": {"schedule": "flow"}}.get(teacher, {})
    if process:
        tiny_pipeline(**process).save_pretrained(teachers / teacher)
    if teacher == "few":
        pipe = tiny_pipeline()
        object.__setattr__(pipe.process, "solver_steps", 10)
        pipe.save_pretrained(teachers / teacher)
    refused = distill_config(shapes, tmp_path / "run", teachers / teacher if teacher else "", **change)
    with pytest.raises(UserError, match=message):
        train_stage(refused)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": (4.0, 2.0)}, "scales 4 2: must be two guidance scales"),
        ({"scales": (-1.0, 2.0)}, "scales -1 2"),
        ({"method": "consistency", "solver_steps": 3, "sample_steps": 4}, "sample_steps 4: must be at most 3"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**change)
