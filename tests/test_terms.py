"""Auxiliary losses: a term on an intermediate feature trains the network of stages 1 and 2."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from support.batches import vae_batch
from support.gradients import gradient, relative_distance
from support.models import small_vae
from support.runs import final_state, logged, losses, stage_config, train_in_processes, train_stage
from support.terms import MIDDLE, Predict, predict
from train.config.optimizer import OptimizerConfig
from train.config.vae import VaeConfig
from train.stages.ldm_step import Denoising
from train.stages.terms import Term, Terms
from train.stages.vae_step import AutoencoderLoss, Reconstruction


def run(
    stage: str, shapes: Path, parts: Path, out: Path, terms: Sequence[Term[Any]] = (), processes: int = 0, **change: Any
) -> None:
    """Train a stage, in this process or in `processes` new ones."""
    steady = {"optimizer": OptimizerConfig(lr=1e-3, warmup=0), "log_every": 1}
    config = stage_config(stage, shapes, out, parts, **steady | change)
    if processes:
        train_in_processes(config, processes, terms=terms)
    else:
        train_stage(config, terms=terms)


def logged_values(out: Path, name: str) -> list[float]:
    return [line[name] for line in logged(out) if name in line]


def state(out: Path) -> dict[str, Tensor]:
    return load_file(out / "checkpoints/step-00000008/state.safetensors")


# -- one step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_of_a_term_reaches_the_network(checkpointing: bool) -> None:
    """It equals that of plain autograd. The term is computed once, also if checkpointing computes the feature twice."""
    vae, b = small_vae(), replace(vae_batch(), adversarial=False)
    plain, term = AutoencoderLoss(vae, VaeConfig(), None, None), predict("vae", 0.3)
    plain(b).loss.backward()
    without = gradient(vae)
    vae.zero_grad()
    found: list[Tensor] = []
    hook = vae.get_submodule(MIDDLE["vae"]).register_forward_hook(lambda module, args, output: found.append(output))
    q = vae.encode(b.pixels).latent_dist
    z = q.mean + q.std * b.posterior_noise
    vae.decode(z)
    hook.remove()
    module = term.loss
    assert isinstance(module, Predict)
    expected = (found[0].mean((2, 3)) @ module.weight.T - z.mean((2, 3))).square().mean()
    (0.3 * expected).backward()
    of_term = gradient(vae)
    vae.zero_grad()
    if checkpointing:
        vae.train()
        vae.enable_gradient_checkpointing()
    step = AutoencoderLoss(vae, VaeConfig(), None, None, terms=[term])
    module.calls = 0
    module.zero_grad()
    out = step(b)
    out.loss.backward()
    assert module.calls == 1
    torch.testing.assert_close(out.metrics["toy"], expected.detach())
    assert of_term.norm() > 1e-3
    assert relative_distance(gradient(vae), without + of_term) < 1e-5
    assert module.weight.grad is not None
    assert module.weight.grad.norm() > 0


def test_terms_are_added_in_their_order() -> None:
    terms = Terms[float]([Term("a", 2.0, torch.tensor), Term("b", 0.5, lambda seen: torch.tensor(seen) ** 2)])
    loss, metrics = terms(torch.tensor(1.0), 3.0)
    assert (float(loss), metrics) == (1 + 6 + 4.5, {"a": torch.tensor(3.0), "b": torch.tensor(9.0)})


def test_a_feature_that_the_network_does_not_have_is_an_error() -> None:
    step = AutoencoderLoss(
        small_vae(), VaeConfig(), None, None, terms=[Term("toy", 1.0, lambda _: torch.zeros(()), ("x",))]
    )
    with pytest.raises(AttributeError, match="x"):
        step(vae_batch())


# -- complete runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["vae", "ldm"])
def test_a_term_is_trained_logged_and_saved_and_without_weight_changes_nothing(
    stage: str, shapes: Path, parts: Path, tmp_path: Path
) -> None:
    def toy(seen: Reconstruction | Denoising) -> Tensor:
        return seen.features[MIDDLE[stage]].float().square().mean()

    run(stage, shapes, parts, tmp_path / "none")
    run(stage, shapes, parts, tmp_path / "weightless", [Term("toy", 0.0, toy, (MIDDLE[stage],))])
    assert final_state(tmp_path / "none") == final_state(tmp_path / "weightless")
    assert losses(tmp_path / "none") == losses(tmp_path / "weightless")
    assert not logged_values(tmp_path / "none", "toy")
    assert len(logged_values(tmp_path / "weightless", "toy")) == 8
    term = predict(stage, 10.0)
    run(stage, shapes, parts, tmp_path / "toy", [term])
    with_term, plain = state(tmp_path / "toy"), state(tmp_path / "none")
    (own,) = with_term.keys() - plain.keys() - {k for k in with_term if "/optimizer/" in k}
    assert own.endswith("module/terms.losses.toy.weight")
    assert not torch.equal(with_term[own], Predict(stage).weight.detach())
    values = logged_values(tmp_path / "toy", "toy")
    assert values[-1] < values[0]
    # A resumed run is the same.
    with pytest.raises(KeyboardInterrupt):
        run(stage, shapes, parts, tmp_path / "interrupted", [replace(predict(stage, 10.0), loss=Stops(stage, 6))])
    run(stage, shapes, parts, tmp_path / "interrupted", [predict(stage, 10.0)])
    assert final_state(tmp_path / "interrupted") == final_state(tmp_path / "toy")


class Stops(Predict):
    """A term that interrupts the run at its call number `last`."""

    def __init__(self, stage: str, last: int) -> None:
        super().__init__(stage)
        self.last = last

    def forward(self, seen: Reconstruction | Denoising) -> Tensor:
        if self.calls == self.last:
            raise KeyboardInterrupt
        return super().forward(seen)


@pytest.mark.parametrize("stage", ["vae", "ldm"])
def test_gradient_checkpointing_gives_the_same_run_with_a_term(
    stage: str, shapes: Path, parts: Path, tmp_path: Path
) -> None:
    for name, checkpointing in (("plain", False), ("again", True)):
        run(stage, shapes, parts, tmp_path / name, [predict(stage)], gradient_checkpointing=checkpointing)
    assert final_state(tmp_path / "plain") == final_state(tmp_path / "again")


@pytest.mark.parametrize("stage", ["vae", "ldm"])
def test_two_processes_train_as_one_with_a_term(stage: str, shapes: Path, parts: Path, tmp_path: Path) -> None:
    """2 Gloo processes and 1 have the same losses and the same parameter of the term."""
    for count, name in ((1, "one"), (2, "two")):
        run(stage, shapes, parts, tmp_path / name, [predict(stage)], processes=count)
    assert [loss for _, loss in losses(tmp_path / "one")] == pytest.approx(
        [loss for _, loss in losses(tmp_path / "two")], rel=1e-4
    )
    assert logged_values(tmp_path / "one", "toy") == pytest.approx(logged_values(tmp_path / "two", "toy"), rel=1e-3)
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    (own,) = (k for k in one if k.endswith("module/terms.losses.toy.weight"))
    torch.testing.assert_close(one[own], two[own], rtol=1e-3, atol=1e-4)
