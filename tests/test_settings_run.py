"""Settings shared by the stages: steps equal those of plain torch, and the loop acts at the configured steps."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import train.data.store.prefetch
import train.engine.loop
from autoencoder.discriminator import PatchDiscriminator
from ldm.errors import RunError
from ldm.networks.unet import UNet
from support.models import small_unet
from support.reference_diffusion import ldm_losses
from support.reference_losses import clip_losses, vae_losses
from support.runs import Config, clip_config, ldm_config, logged, stage_config, train_stage
from support.stepping import Recorded, Reference, State, change, lr_share, networks, record
from train.config.ldm import DiffusionConfig
from train.config.optimizer import OptimizerConfig
from train.config.vae import AdversarialConfig, EquivarianceConfig
from train.data.order.permutation import shuffled
from train.engine.stage import Batch, Hooks

LOSSES: dict[str, Callable[..., list[Tensor]]] = {"clip": clip_losses, "vae": vae_losses, "ldm": ldm_losses}
ADVERSARIAL = AdversarialConfig(kind="hinge", weight=0.3, start=1, channels=8, layers=2, lr=3e-3, r1=0.7)
EQUIVARIANCE = EquivarianceConfig(share=0.5, smallest=0.5)
STAGE: dict[str, dict[str, Any]] = {
    "clip": {},
    "vae": {"adversarial": ADVERSARIAL, "equivariance": EQUIVARIANCE, "learn_logvar": True, "kl_weight": 0.1},
    "ldm": {"diffusion": DiffusionConfig(target="v", weighting="min_snr", offset_noise=0.2, stratified=True)},
}


def tiny_unet(**shape: Any) -> UNet:
    """Return a UNet of one level for the latents and the text features of `parts`."""
    torch.manual_seed(0)
    small = {"channels": (16,), "attention": (True,), "heads": (2,), "groups": 4}
    return UNet.wrap(small_unet(0.1, **small | shape), 4)


def stage_record(
    stage: str, data: Path, out: Path, parts: Path, count: int, **settings: Any
) -> tuple[Config, Recorded]:
    """Record the first `count` steps of a stage, for which `settings` are set."""
    config = stage_config(stage, data, out, parts, **STAGE[stage] | settings)
    return config, record(config, count, **({"backbone": tiny_unet()} if stage == "ldm" else {}))


# -- the optimizer, the average and the seed --------------------------------------------------------------------


def adamw(**settings: Any) -> OptimizerConfig:
    """Return settings whose update is smooth in the gradient, as rounding would otherwise be magnified."""
    return OptimizerConfig(**{"lr": 2e-3, "betas": (0.7, 0.95), "eps": 1e-3, "weight_decay": 3.0} | settings)


def muon(**settings: Any) -> OptimizerConfig:
    return adamw(kind="muon", momentum=0.6, **settings)


OPTIMIZERS = [
    ("clip", adamw(schedule="linear", warmup=2, final=0.3, clip=0.4)),
    ("clip", muon(schedule="cosine", warmup=1, final=0.2, clip=0.4)),
    ("vae", adamw(schedule="cosine", warmup=2, final=0.2, clip=0.4)),
    ("vae", muon(schedule="constant", warmup=3, clip=0.0)),
    ("clip", adamw(schedule="wsd", warmup=1, final=0.3)),
    ("ldm", adamw(schedule="constant", warmup=3, clip=0.0)),
    ("ldm", muon(schedule="linear", warmup=1, final=0.5, clip=0.3)),
    ("clip", muon(schedule="cosine", warmup=1, newton_schulz="polar_express")),
    ("clip", adamw(kind="adamw_8bit", schedule="linear", warmup=2, final=0.3)),
]


@pytest.mark.parametrize(("stage", "optimizer"), OPTIMIZERS, ids=lambda v: getattr(v, "kind", v))
def test_steps_equal_plain_torch(
    stage: str, optimizer: OptimizerConfig, shapes: Path, parts: Path, tmp_path: Path
) -> None:
    """Loss, gradient norm, weights and averages of four steps, with accumulation."""
    settings = {"optimizer": optimizer, "steps": 6, "ema_decay": 0.2, "accumulation": 2, "seed": 3}
    config, got = stage_record(stage, shapes, tmp_path / "run", parts, 4, **settings)
    peaks = [optimizer.lr, ADVERSARIAL.lr]
    nets = [Reference(net, optimizer, peak, 0.2) for net, peak in zip(got.initial, peaks, strict=False)]
    tolerance = {"adamw": 1e-3, "muon": 0.12, "adamw_8bit": 0.01}[optimizer.kind]  # Muon rounds to bf16
    for step in range(4):
        losses = LOSSES[stage](config, [net.net for net in nets], got.parts[step], step)
        for k, (net, loss) in enumerate(zip(nets, losses, strict=False)):
            prefix = "discriminator_" * k
            assert got.metrics[step][f"{prefix}loss"] == pytest.approx(loss.item(), rel=0.1 * tolerance)
            norm = net.step(loss, step, 6, retain=k == 0)
            assert got.metrics[step][f"{prefix}grad_norm"] == pytest.approx(norm, rel=tolerance)
        for net, initial, after in zip(nets, got.initial, got.weights[step], strict=True):
            _require_equal_changes(after, net.net.state_dict(), initial.state_dict(), net.by_matrix, tolerance)
        average, prefix = got.averages[step], {"clip": "clip.", "vae": "vae.", "ldm": ""}[stage]
        expected, first = (
            {name: state[prefix + name] for name in average} for state in (nets[0].average, got.initial[0].state_dict())
        )
        matrices = {name.removeprefix(prefix) for name in nets[0].by_matrix}
        _require_equal_changes(average, expected, first, matrices, tolerance)


def _require_equal_changes(state: State, expected: State, first: State, matrices: set[str], tolerance: float) -> None:
    """Compare the changes of the weights, those that Muon trains apart from AdamW's."""
    for names, error in ((first.keys() & matrices, tolerance), (first.keys() - matrices, min(tolerance, 0.01))):
        made, should, before = ({name: s[name] for name in names} for s in (state, expected, first))
        moved = change(should, before)
        assert (change(made, before) - moved).norm() <= error * moved.norm()


@pytest.mark.parametrize("stage", ["clip", "vae", "ldm"])
def test_the_seed_determines_weights_and_order(stage: str, shapes: Path, parts: Path, tmp_path: Path) -> None:
    """The initial weights are the first numbers of torch's generator; the positions are step × batch_size onwards."""
    config = stage_config(stage, shapes, tmp_path / "run", parts, seed=7, batch_size=6, accumulation=3)
    recorded = record(config, 2)
    for step, read in enumerate(recorded.read):
        assert [part.position.tolist() for part in read] == [[6 * step + 2 * k, 6 * step + 2 * k + 1] for k in range(3)]
        positions = torch.cat([part.position for part in read]).numpy()
        assert torch.cat([part.index for part in read]).tolist() == shuffled(64, 7).at(positions).tolist()
        assert [len(part.pixels if hasattr(part, "pixels") else part.x0) for part in recorded.parts[step]] == [2] * 3
    torch.manual_seed(7)
    expected: list[nn.Module] = []
    match stage:
        case "vae":
            expected = [config.model.build(32), PatchDiscriminator(8, 2)]
        case "ldm":
            expected = [config.unet.build(latent_channels=4, latent_size=16, text_width=32)]
    for net, initial in zip(expected, recorded.initial, strict=False):
        weights = getattr(initial, "vae", initial).state_dict()
        assert all(torch.equal(weights[name], value) for name, value in net.state_dict().items())
    if stage == "clip":
        other = record(clip_config(shapes, tmp_path / "other", seed=8)).initial[0].state_dict()
        same = record(clip_config(shapes, tmp_path / "same", seed=7)).initial[0].state_dict()
        first = recorded.initial[0].state_dict()
        name = "clip.vision_model.embeddings.patch_embedding.weight"
        assert torch.equal(first[name], same[name])
        assert not torch.equal(first[name], other[name])


# -- precision and workers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", ["clip", "vae", "ldm"])
def test_networks_compute_in_the_precision(
    stage: str, precision: str, shapes: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs of matrix products have the dtype; weights stay float32; only fp16 scales the loss."""
    seen: list[tuple[nn.Module, torch.dtype, torch.dtype]] = []
    for kind in (nn.Linear, nn.Conv2d):
        monkeypatch.setattr(kind, "forward", _noting(kind.forward, seen))
    scalers = []
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scalers.append(scaler(*a, **k)) or scalers[-1])
    _, recorded = stage_record(stage, shapes, tmp_path / "run", parts, 1, precision=precision)
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    trained = {layer for net in networks(recorded.stage) for layer in net.modules()}
    assert {(made, weight) for layer, made, weight in seen if layer in trained} == {(expected, torch.float32)}
    assert [s.is_enabled() for s in scalers] == [precision == "fp16"]
    for state in (*recorded.weights[0], recorded.averages[0]):
        assert {v.dtype for v in state.values() if v.is_floating_point()} == {torch.float32}


COMPILED = {
    "clip": ["clip.text_model", "clip.vision_model"],
    "vae": ["vae.decoder", "vae.encoder"],
    "ldm": [""],
}
"""Names of the compiled networks in the trained one."""


@pytest.mark.parametrize("stage", list(COMPILED))
def test_networks_are_compiled_in_place(
    stage: str, shapes: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of weights stay the same, the averaged network isn't compiled, and a missing compiler is no error."""
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    _, recorded = stage_record(stage, shapes, tmp_path / "run", parts, 0, compile=True)
    net = networks(recorded.stage)[0]
    assert sorted(name for name, module in net.named_modules() if module in compiled) == COMPILED[stage]
    assert len(compiled) == len(COMPILED[stage])
    compiled.clear()
    monkeypatch.setattr("shutil.which", lambda name: None)
    stage_record(stage, shapes, tmp_path / "other", parts, 0, compile=True)
    stage_record(stage, shapes, tmp_path / "plain", parts, 0)
    assert compiled == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(COMPILED))
def test_compiled_networks_give_the_same_steps(stage: str, shapes: Path, parts: Path, tmp_path: Path) -> None:
    """A compiled run also continues as a plain one: its checkpoint has the same names."""
    how = {"optimizer": adamw()}
    runs = [stage_record(stage, shapes, tmp_path / str(on), parts, 3, compile=on, **how)[1] for on in (False, True)]
    for plain, fast in zip(runs[0].metrics, runs[1].metrics, strict=True):
        assert fast == pytest.approx(plain, rel=1e-3)
    assert [set(state) for state in runs[0].weights[-1]] == [set(state) for state in runs[1].weights[-1]]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_caches_and_validation_have_the_precision(
    precision: str, shapes: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents and features are stored in 32 or 16 bits; the averaged network computes in the precision."""
    dtypes: set[torch.dtype] = set()
    forward = nn.Conv2d.forward

    def noting(layer: nn.Module, x: Tensor) -> Tensor:
        made = forward(layer, x)
        dtypes.add(made.dtype)
        return made

    def validate(stage: Any) -> None:
        monkeypatch.setattr(nn.Conv2d, "forward", noting)
        stage.validate(1)

    config = ldm_config(shapes, tmp_path / "run", parts, precision=precision, cache=str(tmp_path / "cache"))
    record(config, 0, validate, backbone=tiny_unet())
    assert dtypes == {{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    stored = {np.load(file, mmap_mode="r").dtype.name for file in (tmp_path / "cache").rglob("*.npy")}
    assert stored == {"float32" if precision == "fp32" else "float16"}


def _noting(forward: Callable[..., Tensor], seen: list[tuple[nn.Module, torch.dtype, torch.dtype]]) -> Any:
    def noting(layer: nn.Module, x: Tensor) -> Tensor:
        made = forward(layer, x)
        seen.append((layer, made.dtype, layer.weight.dtype))
        return made

    return noting


@pytest.mark.parametrize("stage", ["clip", "vae", "ldm"])
def test_batches_are_read_by_as_many_workers(
    stage: str, shapes: Path, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    loader = train.data.store.prefetch.DataLoader

    def counted(*args: Any, **how: Any) -> Any:
        seen.append(how["num_workers"])
        return loader(*args, **how | {"num_workers": 0, "prefetch_factor": None, "persistent_workers": False})

    monkeypatch.setattr(train.data.store.prefetch, "DataLoader", counted)
    for workers in (0, 3):
        record(stage_config(stage, shapes, tmp_path / f"run{workers}", parts, workers=workers))
    assert seen == [0, 3]


# -- the loop ---------------------------------------------------------------------------------------------------


@dataclass
class Losses(Hooks):
    """The loss of each step."""

    values: list[float] = field(default_factory=list)

    def end_step(self, step: int, metrics: dict[str, Tensor]) -> None:
        self.values.append(float(metrics["loss"]))


def steps_of(folder: Path, pattern: str) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in folder.glob(pattern))


def test_the_loop_acts_at_the_configured_steps(shapes: Path, tmp_path: Path) -> None:
    optimizer = OptimizerConfig(lr=1e-3, schedule="linear", warmup=2, final=0.1)
    settings = {"log_every": 3, "validate_every": 5, "checkpoint_every": 2, "keep_checkpoints": 3, "steps": 7}
    config = clip_config(shapes, tmp_path / "run", **settings, first_samples=0, optimizer=optimizer)
    train_stage(config, hooks := Losses())
    lines = logged(tmp_path / "run")
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == [3, 6, 7]
    for line, (first, last) in zip(trained, [(0, 3), (3, 6), (6, 7)], strict=True):
        assert line["loss"] == pytest.approx(sum(hooks.values[first:last]) / (last - first), rel=1e-6)
        assert line["lr"] == pytest.approx(1e-3 * lr_share(optimizer, last - 1, 7))
    assert [line["step"] for line in lines if any(name.startswith("val_") for name in line)] == [5, 7]
    assert steps_of(tmp_path / "run/samples", "*.png") == [5, 7]
    assert steps_of(tmp_path / "run/checkpoints", "step-*") == [4, 6, 7]
    assert not list((tmp_path / "run").rglob("events.*"))  # no tracker


def test_the_first_sheet_is_drawn_after_so_many_minutes(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step takes 100 seconds here."""
    clock = SimpleNamespace(seconds=0.0)

    class Clock(train.engine.loop.Stopwatch):
        seconds = property(lambda self: clock.seconds)

    class Tick(Hooks):
        def end_step(self, step: int, metrics: object) -> None:
            clock.seconds += 100

    monkeypatch.setattr(train.engine.loop, "Stopwatch", Clock)
    train_stage(clip_config(shapes, tmp_path / "run", first_samples=5, log_every=100), Tick())
    assert steps_of(tmp_path / "run/samples", "*.png") == [3, 8]


class Poison(Hooks):
    """NaN in the images from a step on."""

    def begin_step(self, step: int, parts: list[Batch]) -> list[Batch]:
        return [replace(part, pixels=part.pixels * torch.nan) for part in parts] if step >= 4 else parts


@pytest.mark.parametrize("after", [2, 3])
def test_weights_are_restored_after_so_many_steps(
    after: int, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"steps": 40, "log_every": 1, "checkpoint_every": 4, "first_samples": 0}
    with pytest.raises(RunError, match="did not help"):
        train_stage(clip_config(shapes, tmp_path / "run", roll_back_after=after, **settings), Poison())
    said = f"step {4 + after}: the loss or gradient was not finite in the last {after} steps; training continues with"
    assert f"{said} the weights of step 4" in capsys.readouterr().out


@pytest.mark.parametrize("cache", ["", "mine", "off"])
def test_the_cache_is_in_its_folder(cache: str, shapes: Path, parts: Path, tmp_path: Path) -> None:
    where = str(tmp_path / cache) if cache == "mine" else cache
    record(ldm_config(shapes, tmp_path / "run", parts, cache=where), 0)
    found = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("latents-*")}
    assert found == {"": {"cache"}, "mine": {"mine"}, "off": set()}[cache]
