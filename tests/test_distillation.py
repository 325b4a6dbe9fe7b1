"""Distillation: its objectives against the papers' formulas, its runs, and the models that it makes."""

import copy
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, LCMScheduler
from torch import Tensor

from ldm.errors import UserError
from ldm.networks.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from support.draws import generators
from support.models import PROMPTS, tiny_pipeline
from support.runs import Crash, distill_config, final_state, train_in_processes, train_stage
from support.stepping import record, uniforms
from train.commands.evaluate import evaluate
from train.config.data import DataConfig
from train.config.distill import DistillConfig
from train.config.reports import EvaluateOptions
from train.data.synthetic.shapes import prompts
from train.data.synthetic.shapes_checker import score_images
from train.evaluation.diffusion import generate_batch
from train.stages.distillation_init import load_components, warnings_of

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


@pytest.mark.parametrize(("scales", "weighted"), [((1.0, 8.0), False), ((2.0, 3.0), True)])
def test_guidance_is_learned_from_two_predictions(
    scales: tuple[float, float], weighted: bool, shapes: Path, teachers: Path, tmp_path: Path
) -> None:
    """The scales of a batch, and the error of the student, which is at first the teacher at scale 1."""
    name = "eps" if weighted else "plain"
    recorded = record(config(shapes, teachers, tmp_path / "run", name, seed=7, scales=scales, weight_noise=weighted), 1)
    (part,), teacher = recorded.parts[0], LatentDiffusionPipeline.from_pretrained(teachers / name)
    u = uniforms(7, 18, range(8))[:, 0]
    np.testing.assert_allclose(part.scale, scales[0] + (scales[1] - scales[0]) * u, rtol=1e-6)
    assert (np.sort((part.timestep * 8).long()) == np.arange(8)).all()  # one in each eighth of the levels
    index = (part.timestep * 1000).long()
    schedule = teacher.process.schedule
    alpha, sigma = (row[index].view(-1, 1, 1, 1) for row in (schedule.alpha, schedule.sigma))
    x_t = (alpha * part.x0 + sigma * part.noise).float()
    expected = with_guidance(teacher, x_t, index, part.condition, part.scale)
    errors = ((predict(teacher, x_t, index, part.condition) - expected) ** 2).mean((1, 2, 3))
    noise = (1 / schedule.snr.double().sqrt()).clamp(min=1)
    weights = noise[index] / noise.mean() if weighted else torch.ones(8)
    assert recorded.metrics[0]["loss"] == pytest.approx((weights * errors).mean().item(), rel=1e-3)
    assert recorded.metrics[0]["error"] == pytest.approx(errors.mean().item(), rel=1e-3)
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


@pytest.mark.parametrize(
    ("name", "steps", "levels", "on_policy"),
    [("plain", 6, 1, 0.0), ("eps", 4, 2, 0.0), ("guided/model", 3, 3, 0.0), ("eps", 8, 4, 0.6)],
)
def test_consistency_is_learned_from_whole_trajectories(
    name: str, steps: int, levels: int, on_policy: float, shapes: Path, teachers: Path, guided: Path, tmp_path: Path
) -> None:
    """The loss of a second step, from diffusers' DPM-Solver on the timesteps of its LCMScheduler."""
    settings: dict[str, Any] = {"method": "consistency", "trajectory": steps, "levels": levels, "on_policy": on_policy}
    recorded = record(config(shapes, teachers, tmp_path / "run", name, **settings, huber=0.1), 2)
    (part,), teacher = recorded.parts[1], LatentDiffusionPipeline.from_pretrained(teachers / name)
    ddim = DDIMScheduler.from_config(teacher.process.to_diffusers().config)
    ddim.num_inference_steps = 50  # not used, but it must be set
    lcm = LCMScheduler.from_config(ddim.config)
    lcm.set_timesteps(steps)
    timesteps = lcm.timesteps

    def solve(x: Tensor, timesteps: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the teacher's states from x on, and the end, by timestep."""
        solver = DPMSolverMultistepScheduler.from_config(ddim.config)
        solver.set_timesteps(timesteps=timesteps.tolist())
        states = []
        for t in timesteps:
            states.append(x)
            time = t.repeat(8)
            if teacher.backbone.guidance_width:
                output = teacher.backbone(x, time, part.condition, part.scale).detach()
            else:
                output = with_guidance(teacher, x, time, part.condition, part.scale).float()
            x = solver.step(output, t, x).prev_sample
        return {int(t): (state, x) for t, state in zip(timesteps, states, strict=True)}

    student, average = (UNet.wrap(copy.deepcopy(recorded.initial[0]), 4) for _ in range(2))
    student.module.load_state_dict(recorded.weights[0][0])
    average.module.load_state_dict(recorded.averages[0])

    @torch.no_grad()
    def f(net: UNet, x: Tensor, t: Tensor, condition: Tensor, scale: Tensor) -> Tensor:
        skip, out = lcm.get_scalings_for_boundary_condition_discrete(int(t))
        return skip * x + out * ddim.step(net(x, t.repeat(len(x)), condition, scale), int(t), x).pred_original_sample

    starts = {False: solve(part.noise.clone(), timesteps)}
    if on_policy:  # diffusers' sampler, of which one step is done with the averaged student
        lcm.set_timesteps(2)
        t, middle = lcm.timesteps
        reached = f(average, part.noise, t, part.condition, part.scale)
        starts[True] = solve(ddim.add_noise(reached, part.renoise, middle).float(), timesteps[timesteps <= middle])
    own = (part.timestep < on_policy).tolist()
    assert set(own) == set(starts)
    lcm.set_timesteps(levels)
    losses = []
    for k in range(8):
        states = starts[own[k]]
        for t in lcm.timesteps:
            if int(t) not in states:
                continue
            state, end = (x[k : k + 1] for x in states[int(t)])
            d = (f(student, state, t, part.condition[k : k + 1], part.scale[k : k + 1]) - end).double()
            weight = (ddim.alphas_cumprod[t] / (1 - ddim.alphas_cumprod[t])).item() ** (0.25 * (name == "eps"))
            losses.append(weight * ((d**2 + 0.1**2).sqrt() - 0.1).mean().item())
    expected = np.sum(losses) / (8 * levels * (1 - on_policy / 2))  # the mean over all levels of all examples, expected
    assert recorded.metrics[1]["loss"] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", ["eps", "inpaint"])
def test_an_example_does_not_depend_on_the_others(name: str, shapes: Path, teachers: Path, tmp_path: Path) -> None:
    """Its loss is the same alone, with its own context and the start of its own trajectory."""
    change: dict[str, Any] = {"method": "consistency", "trajectory": 4, "levels": 2, "on_policy": 0.5}
    found: dict[str, Tensor] = {}

    @torch.no_grad()
    def look(stage: Any) -> None:
        (part,) = stage.prepare(0, next(iter(stage.batches(0))))
        given = {f.name: x for f in fields(part) if isinstance(x := getattr(part, f.name), Tensor)}
        alone = [replace(part, **{field: x[k : k + 1] for field, x in given.items()}) for k in range(8)]
        found["together"] = stage.validation_loss.losses(part).weighted
        found["alone"] = torch.cat([stage.validation_loss.losses(example).weighted for example in alone])

    record(config(shapes, teachers, tmp_path / "run", name, **change), 1, look)
    torch.testing.assert_close(found["together"], found["alone"], rtol=1e-3, atol=1e-6)


def test_a_trajectory_needs_no_images(shapes: Path, teachers: Path, tmp_path: Path) -> None:
    """Its losses don't depend on the latents, and the validation has no errors by noise level."""
    run = config(shapes, teachers, tmp_path / "run", method="consistency", trajectory=4, levels=4)
    found: dict[str, Any] = {}

    def look(stage: Any) -> None:
        found.update(stage.validate(1).metrics)
        (part,) = stage.prepare(0, next(iter(stage.batches(0))))
        losses = [stage.validation_loss.losses(replace(part, x0=x0)).weighted for x0 in (part.x0, part.x0 + 1)]
        found["equal"] = torch.equal(*losses)

    record(run, 1, look)
    assert found.pop("equal")
    assert set(found) == {"val_loss", "val_error"}


@pytest.mark.parametrize(("change", "lr"), [({}, 2e-4), ({"trajectory": 4, "levels": 2}, 5e-5)], ids=str)
def test_an_adversarial_term_trains_both_networks(
    change: dict[str, Any], lr: float, shapes: Path, teachers: Path, tmp_path: Path
) -> None:
    """Losses and gradients: the student gets that of -0.5 D, and the discriminator that of the hinge loss."""
    run = config(shapes, teachers, tmp_path / "run", method="consistency", adversarial=0.5, adversarial_lr=lr, **change)

    def look(stage: Any) -> None:
        torch.manual_seed(run.seed)
        first = run.build_discriminator(4, 16).state_dict()
        moved = [(w - first[name]).abs().max().item() for name, w in stage.discriminator.state_dict().items()]
        assert max(moved) == pytest.approx(lr / 3, rel=1e-2)  # AdamW's first step, in the warm-up
        (part,) = stage.prepare(1, next(iter(stage.batches(0))))
        student, critic = (phase.module for phase in stage.phases)
        output = student(part)
        output.loss.backward()
        losses = student.losses(part)
        expected = losses.weighted.mean() - 0.5 * stage.discriminator(losses.ends).mean()
        assert torch.allclose(output.loss, expected)
        weights = list(student.unet.parameters())
        for weight, gradient in zip(weights, torch.autograd.grad(expected, weights), strict=True):
            torch.testing.assert_close(weight.grad, gradient)
        assert all(weight.grad is None for weight in stage.discriminator.parameters())
        student.zero_grad()
        judged = critic(output.batch)
        judged.loss.backward()
        real, fake = (stage.discriminator(latents) for latents in (part.x0, losses.ends.detach()))
        expected = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
        assert torch.allclose(judged.loss, expected)
        weights = list(stage.discriminator.parameters())
        for weight, gradient in zip(weights, torch.autograd.grad(expected, weights), strict=True):
            torch.testing.assert_close(weight.grad, gradient)
        assert all(weight.grad is None for weight in student.unet.parameters())

    record(run, 1, look)


@pytest.mark.parametrize("method", ["guidance", "consistency", "trajectory"])
def test_a_run_continues_exactly(method: Any, shapes: Path, teachers: Path, tmp_path: Path) -> None:
    change = {"method": method}
    if method == "trajectory":
        change = {"method": "consistency", "trajectory": 2, "levels": 2, "on_policy": 0.5, "adversarial": 0.1}
    runs = [
        config(shapes, teachers, tmp_path / name, **change, steps=2, checkpoint_every=1) for name in ("whole", "cut")
    ]
    train_stage(runs[0])
    with pytest.raises(KeyboardInterrupt):
        train_stage(runs[1], Crash(1))
    train_stage(runs[1])
    assert final_state(tmp_path / "whole", 2) == final_state(tmp_path / "cut", 2)
    with pytest.raises(UserError, match=r"--teacher: not the same content as in the run"):
        train_stage(config(shapes, teachers, tmp_path / "cut", "eps", **change, steps=3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{}, {"method": "consistency", "trajectory": 4, "levels": 2, "on_policy": 0.5}], ids=str
)
def test_two_processes_train_as_one(change: dict[str, Any], shapes: Path, teachers: Path, tmp_path: Path) -> None:
    losses = []
    for processes in (1, 2):
        run = config(shapes, teachers, tmp_path / str(processes), steps=4, log_every=1, **change)
        train_in_processes(run, processes)
        rows = map(json.loads, (Path(run.out) / "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert len(losses[0]) == 4
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_students_are_evaluated(
    shapes: Path, teachers: Path, guided: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report's accuracy is that of images with the student's own sampler and steps.

    A guidance scale that it wasn't trained with causes a warning.
    """
    few = config(shapes, teachers, tmp_path / "few", method="consistency", trajectory=4, levels=2, steps=1)
    train_stage(few)
    for folder, steps, scale in ((guided / "model", 25, 3.0), (tmp_path / "few/model", 4, 9.0)):
        out, scenes, how = tmp_path / str(steps), prompts("seen", 3, 5), {"guidance_scale": scale}
        counts: dict[str, Any] = {"prompts": 3, "images": 8, "likelihoods": 1, "samples": 0}
        evaluate(EvaluateOptions(model=str(folder), data=str(shapes), out=str(out), seed=5, **how, **counts))
        assert ("--guidance-scale 9: this model was trained with 1 to 8" in capsys.readouterr().err) == (scale == 9)
        pipe = LatentDiffusionPipeline.from_pretrained(folder)
        images = generate_batch(pipe, [scene.caption for scene in scenes], [5, 6, 7], num_inference_steps=steps, **how)
        expected = score_images(images, scenes)
        assert json.loads((out / "report.json").read_text())["alignment"]["seen"] == pytest.approx(expected)


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
    ("change", "lines"),
    [
        ({}, []),
        ({"scales": (4.0, 8.0)}, ["warning: guidance_scale 3: the student learns 4 to 8"]),
        (
            {"input": DataConfig(resolution=16), "scales": (3.0, 3.0)},
            ["warning: input.resolution 16: the student will generate 16 × 16 pixels, but its teacher was trained for"],
        ),
    ],
)
def test_settings_that_cost_quality_cause_warnings(
    change: dict[str, Any], lines: list[str], shapes: Path, teachers: Path, tmp_path: Path
) -> None:
    run = config(shapes, teachers, tmp_path, **change)
    found = list(warnings_of(run, load_components(run, torch.device("cpu"))))
    assert len(found) == len(lines)
    assert all(line.startswith(start) for line, start in zip(found, lines, strict=True))


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
        ({"weight_noise": True}, "weight_noise: is for a teacher that predicts eps, not v"),
        (
            {"method": "consistency", "adversarial": 0.1, "input": DataConfig(resolution=8)},
            "adversarial 0.1: latents of 4 × 4 are too small",
        ),
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
        ({"trajectory": 4}, "trajectory 4: only with method consistency"),
        ({"method": "consistency", "trajectory": 51}, r"trajectory 51: must be at most 50 \(solver_steps\)"),
        ({"method": "consistency", "trajectory": 4, "levels": 5}, "levels 5: must divide 4, the steps of a trajectory"),
        (
            {"method": "consistency", "on_policy": 0.5},
            "on_policy 0.5: needs a trajectory with an even number of levels, not 1",
        ),
        ({"levels": 2}, "levels 2: only with a trajectory; set it to 1"),
        ({"evaluate_every": 5}, "evaluate_every 5: needs evaluation_features"),
        ({"method": "consistency", "weight_noise": True}, "weight_noise: only with method guidance"),
        ({"adversarial": 0.1}, "adversarial 0.1: only with method consistency"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**change)
