"""A run is a function of its configuration: interrupted and resumed, on one process or two, it is the same run."""

import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train.stages.clip
import train.stages.ldm
import train.stages.vae
from ldm.errors import RunError, UserError
from ldm.pipeline import LatentDiffusionPipeline
from support.runs import (
    COMMON,
    Crash,
    Start,
    clip_config,
    final_state,
    ldm_config,
    logged,
    losses,
    stage_config,
    train_in_processes,
)
from train.config.ldm import DiffusionConfig
from train.config.optimizer import OptimizerConfig
from train.data.sources.splits import open_source
from train.engine.checkpoint import pack_tree
from train.engine.stage import Batch, Hooks
from train.engine.trainer import Trainer


@pytest.mark.parametrize(("accumulation", "workers", "kind"), [(1, 0, "muon"), (4, 2, "adamw"), (1, 0, "adamw_8bit")])
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_run(
    start: Start, tmp_path: Path, accumulation: int, workers: int, kind: str
) -> None:
    optimizer = OptimizerConfig(kind=kind, lr=1e-3, schedule="cosine", warmup=3)
    settings = {"accumulation": accumulation, "workers": workers, "optimizer": optimizer}
    start(tmp_path / "uninterrupted", **settings)
    for at in (2, 5, 7):  # before the first checkpoint, and after two of them
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "interrupted", Crash(at), **settings)
    start(tmp_path / "interrupted", **settings | {"workers": 0})
    assert final_state(tmp_path / "interrupted") == final_state(tmp_path / "uninterrupted")
    assert losses(tmp_path / "interrupted")[-1] == losses(tmp_path / "uninterrupted")[-1]
    steps = [step for step, _ in losses(tmp_path / "interrupted")]
    assert steps == sorted(set(steps))  # nothing is logged twice


def test_every_weight_is_trained_in_float32(start: Start, tmp_path: Path) -> None:
    start(tmp_path / "run")
    first, last = (load_file(tmp_path / f"run/checkpoints/step-{s:08d}/state.safetensors") for s in (3, 8))
    moved = [name for name, value in last.items() if "/module/" in name and not torch.equal(value, first[name])]
    weights = [
        name for name in last if "/module/" in name and "position_ids" not in name and last[name].is_floating_point()
    ]
    # The discriminator's last bias doesn't move: while both hinges are open, real and generated images cancel.
    resting = ("logit_scale", "critic.body.5.bias", "echo.codes")
    assert set(moved) >= {name for name in weights if not name.endswith(resting)}
    assert {value.dtype for name, value in last.items() if "/module/" in name and value.is_floating_point()} == {
        torch.float32
    }
    for name in [n for n in last if n.startswith("state/ema/")][:20]:
        assert last[name].dtype in (torch.float32, torch.int64)


def test_a_finished_run_is_unchanged_until_it_has_more_steps(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path / "run")
    model = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/model").rglob("*")}
    start(tmp_path / "run")
    assert "finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run/model").rglob("*")} == model
    start(tmp_path / "run", steps=10, checkpoint_every=100)
    assert losses(tmp_path / "run")[-1][0] == 10


def test_other_settings_are_refused_by_name(start: Start, tmp_path: Path, shapes: Path) -> None:
    start(tmp_path / "run", steps=3)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"--batch-size 4: the run in .* was started with 8"):
        start(tmp_path / "run", steps=3, batch_size=4)
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        start(tmp_path / "run", steps=3, optimizer=OptimizerConfig(lr=1e-2, schedule="cosine", warmup=3))
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/diary.txt").write_text("mine")
    with pytest.raises(UserError, match=r"config\.yaml"):
        start(tmp_path / "other")
    assert (tmp_path / "other/diary.txt").read_text() == "mine"


MUON = OptimizerConfig(kind="muon", lr=1e-3, schedule="cosine", warmup=3)


@pytest.mark.parametrize("optimizer", [COMMON["optimizer"], MUON], ids=lambda o: o.kind)
def test_half_precision_trains_float32_weights(start: Start, tmp_path: Path, optimizer: OptimizerConfig) -> None:
    """fp16 starts with a loss scale that overflows. Those steps are skipped, and the run continues."""
    for precision in ("bf16", "fp16"):
        out = tmp_path / precision
        start(out, precision=precision, optimizer=optimizer)
        state = load_file(out / "checkpoints/step-00000008/state.safetensors")
        weights = [v for name, v in state.items() if "/module/" in name and v.is_floating_point()]
        moments = [v for name, v in state.items() if "exp_avg" in name or "momentum" in name]
        assert ("momentum" in " ".join(state)) == (optimizer.kind == "muon")
        assert {v.dtype for v in weights + moments} == {torch.float32}
        assert all(torch.isfinite(v).all() for v in weights + moments)
        assert all(loss == loss for _, loss in losses(out))


@pytest.mark.parametrize("optimizer", [COMMON["optimizer"], MUON], ids=lambda o: o.kind)
def test_an_overflow_in_fp16_is_skipped_and_training_continues(
    shapes: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: OptimizerConfig
) -> None:
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k | {"init_scale": 2.0**30}))
    train.stages.ldm.train(
        ldm_config(
            shapes, tmp_path / "run", parts, precision="fp16", steps=28, batch_size=2, log_every=1, optimizer=optimizer
        )
    )
    lines = logged(tmp_path / "run")
    skipped = [line["skipped"] for line in lines if "skipped" in line]
    assert 0 < skipped[-1] < 23
    assert skipped[-1] == skipped[-5]  # the scale has been lowered, and training continues


@dataclass
class Poison(Hooks):
    """NaN in the noise or the images of some steps."""

    bad: Callable[[int], bool]

    def begin_step(self, step: int, parts: list[Batch]) -> list[Batch]:
        if not self.bad(step):
            return parts
        return [
            replace(p, **{name: getattr(p, name) * torch.nan for name in ("noise", "pixels") if hasattr(p, name)})
            for p in parts
        ]


@pytest.mark.parametrize("optimizer", [COMMON["optimizer"], MUON], ids=lambda o: o.kind)
def test_a_step_that_is_not_finite_changes_no_weight(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: OptimizerConfig
) -> None:
    states: dict[int, dict[str, torch.Tensor]] = {}
    step_of = Trainer.step

    def step(self: Trainer, step: int, parts: list[Batch]) -> dict[str, torch.Tensor]:
        metrics = step_of(self, step, parts)
        states[step + 1] = {name: value.clone() for name, value in pack_tree(self.state()).tensors.items()}
        return metrics

    monkeypatch.setattr(Trainer, "step", step)
    every = {"checkpoint_every": 1, "ema_decay": 0.0, "optimizer": optimizer}
    start(tmp_path / "run", Poison(lambda step: step == 5), **every)
    assert all(torch.equal(states[5][name], value) for name, value in states[6].items())
    last = load_file(tmp_path / "run/checkpoints/step-00000008/state.safetensors")
    assert all(torch.isfinite(v).all() for v in last.values() if v.is_floating_point())
    assert any(not torch.equal(value, last[name]) for name, value in states[5].items())
    assert not (tmp_path / "run/checkpoints/step-00000006").exists()  # saved after the next finite step
    lines = logged(tmp_path / "run")
    assert max(line.get("skipped", 0) for line in lines) >= 1


def test_repeated_non_finite_steps_roll_back_and_then_end_the_run(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison = Poison(lambda step: step >= 4)
    config = clip_config(shapes, tmp_path / "run", steps=40, roll_back_after=3, log_every=1, checkpoint_every=4)
    with pytest.raises(RunError, match="finite"):
        train.stages.clip.train(replace(config, checkpoint_every=100), hooks=poison)  # no checkpoint to go back to
    config = replace(config, out=str(tmp_path / "second"))
    with pytest.raises(RunError, match="did not help"):
        train.stages.clip.train(replace(config, checkpoint_every=4, steps=200, roll_back_after=2), hooks=poison)
    assert "continues with the weights of step 4" in capsys.readouterr().out


def test_a_signal_ends_the_run_with_a_checkpoint(start: Start, tmp_path: Path) -> None:
    start(tmp_path / "uninterrupted")

    class Interrupt(Hooks):
        def begin_step(self, step: int, parts: list[Batch]) -> list[Batch]:
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return parts

    with pytest.raises(SystemExit) as stopped:
        start(tmp_path / "run", Interrupt())
    assert stopped.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "run/checkpoints/step-00000005/manifest.json").is_file()
    start(tmp_path / "run")
    assert final_state(tmp_path / "run") == final_state(tmp_path / "uninterrupted")


def test_validation_does_not_disturb_training(start: Start, tmp_path: Path) -> None:
    start(tmp_path / "a", validate_every=8)
    start(tmp_path / "b", validate_every=1, log_every=1)
    assert final_state(tmp_path / "a") == final_state(tmp_path / "b")


def test_gradient_checkpointing_gives_the_same_run(shapes: Path, parts: Path, tmp_path: Path) -> None:
    train.stages.ldm.train(ldm_config(shapes, tmp_path / "a", parts))
    train.stages.ldm.train(ldm_config(shapes, tmp_path / "b", parts, gradient_checkpointing=True))
    assert final_state(tmp_path / "a") == final_state(tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


PROCESSES = {
    "flow": {"schedule": "flow", "target": "flow", "shift": 2.0, "timestep_sampling": "logit_normal"},
    "zero terminal SNR": {"zero_terminal_snr": True, "target": "v", "weighting": "min_snr", "offset_noise": 0.1},
    "learned": {"variance": "learned", "objective": "hybrid", "target": "eps", "weighting": "p2", "stratified": True},
    "bound": {
        "objective": "vlb",
        "target": "v",
        "variance": "fixed_large",
        "timestep_sampling": "importance",
        "spacing": "karras",
    },
    "edm": {"schedule": "sigmoid", "weighting": "edm", "sigma_data": 0.5, "target": "x0", "loss": "huber"},
}


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_a_chosen_process_trains_and_is_saved_with_the_model(
    shapes: Path, parts: Path, tmp_path: Path, process: dict[str, Any]
) -> None:
    config = ldm_config(shapes, tmp_path / "run", parts, steps=4, diffusion=DiffusionConfig(**process))
    train.stages.ldm.train(config)
    assert all(math.isfinite(loss) for _, loss in losses(tmp_path / "run"))
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "run/model")
    d = config.diffusion
    assert (pipe.process.target, pipe.process.variance, pipe.process.spacing) == (d.target, d.variance, d.spacing)
    torch.testing.assert_close(pipe.process.schedule.alpha, d.build_schedule().alpha, rtol=0, atol=0)
    assert pipe("a red star", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)


def test_importance_sampling_of_timesteps_is_resumed_exactly(shapes: Path, parts: Path, tmp_path: Path) -> None:
    # So few timesteps have all been seen after a few steps; then the probabilities are no longer uniform.
    diffusion = DiffusionConfig(timesteps=6, timestep_sampling="importance", stratified=True)
    settings = {"diffusion": diffusion, "accumulation": 2}
    train.stages.ldm.train(ldm_config(shapes, tmp_path / "uninterrupted", parts, **settings))
    state = load_file(tmp_path / "uninterrupted/checkpoints/step-00000008/state.safetensors")
    (seen,) = (value for name, value in state.items() if name.endswith("importance.seen"))
    assert seen.min() > 0
    assert seen.sum() == 64
    config = ldm_config(shapes, tmp_path / "interrupted", parts, **settings)
    for at in (4, 7):
        with pytest.raises(KeyboardInterrupt):
            train.stages.ldm.train(config, hooks=Crash(at))
    train.stages.ldm.train(config)
    assert final_state(tmp_path / "interrupted") == final_state(tmp_path / "uninterrupted")


def test_accumulation_gives_the_same_gradient(shapes: Path, parts: Path, tmp_path: Path) -> None:
    train.stages.ldm.train(ldm_config(shapes, tmp_path / "a", parts))
    train.stages.ldm.train(ldm_config(shapes, tmp_path / "b", parts, accumulation=4))
    for (_, a), (_, b) in zip(losses(tmp_path / "a"), losses(tmp_path / "b"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_the_saved_vae_has_standardised_latents(shapes: Path, parts: Path) -> None:
    """The final model/ is normalised over the training images; the checkpoint contains the unnormalised autoencoder."""
    from autoencoder.model import Autoencoder
    from train.data.batches.draws import PosteriorNoise
    from train.data.batches.images import ImageDataset
    from train.data.images.crop import Framing

    images = ImageDataset(
        open_source(shapes, "train"), Framing(resolution=32), 1, shuffle=False, draws=PosteriorNoise(4, 2)
    )
    batch = images.__getitems__(range(64))
    codec = Autoencoder.load(parts / "vae/model")
    z = codec.encode(batch.pixels).sample(batch.drawn)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=0.05, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=0.05, rtol=0)
    raw = load_file(parts / "vae/checkpoints/step-00000008/state.safetensors")
    folded = load_file(parts / "vae/model/diffusion_pytorch_model.safetensors")
    assert torch.equal(raw["state/ema/encoder.conv_in.weight"], folded["encoder.conv_in.weight"])
    assert not torch.equal(raw["state/ema/quant_conv.weight"], folded["quant_conv.weight"])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("stage", ["clip", "vae", "ldm"])
def test_two_processes_train_as_one(stage: str, kind: str, shapes: Path, parts: Path, tmp_path: Path) -> None:
    """Two Gloo processes and one process train on the same global batches and have the same losses."""
    change: dict[str, Any] = {"steps": 5, "log_every": 1, "optimizer": OptimizerConfig(kind=kind, lr=1e-4, warmup=0)}
    if stage == "ldm":
        change["diffusion"] = DiffusionConfig(timesteps=6, timestep_sampling="importance")
    if stage == "vae":
        change["normalisation"] = "pixels"
    for count, name in ((1, "one"), (2, "two")):
        train_in_processes(stage_config(stage, shapes, tmp_path / name, parts, **change), count)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [s for s, _ in one] == [s for s, _ in two] == [1, 2, 3, 4, 5]
    for (_, a), (_, b) in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-6 if kind == "adamw" else 2e-4)  # Muon magnifies rounding
    if stage == "vae" and kind == "adamw":
        files = (tmp_path / name / "model/diffusion_pytorch_model.safetensors" for name in ("one", "two"))
        exported = (load_file(file)["quant_conv.weight"] for file in files)
        torch.testing.assert_close(*exported, rtol=1e-3, atol=1e-3)


def test_learning_rate_schedules() -> None:
    config = OptimizerConfig(schedule="cosine", warmup=10, final=0.1)
    assert [config.lr_share(s, 110) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert config.lr_share(60, 110) == pytest.approx(0.1 + 0.9 / 2)
    assert config.lr_share(110, 110) == pytest.approx(0.1)
    assert replace(config, schedule="linear").lr_share(60, 110) == pytest.approx(0.55)
    assert replace(config, schedule="constant").lr_share(60, 110) == 1


def test_the_run_describes_itself(parts: Path) -> None:
    from train.config.load import read_yaml

    about = read_yaml(parts / "clip/config.yaml")
    assert about["steps"] == 8
    assert torch.__version__.startswith(about["about"]["versions"]["torch"])
    assert len(about["about"]["inputs"]["data"]) == 64
    assert list((parts / "clip/samples").glob("step-*.png"))
