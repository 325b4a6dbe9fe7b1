"""Recorded steps of a stage, and the same steps computed with plain torch."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import train.stages.clip
import train.stages.distillation
import train.stages.ldm
import train.stages.vae
from support.runs import Config, train_stage
from train.config.clip import ClipConfig
from train.config.distill import DistillConfig
from train.config.ldm import LdmConfig
from train.config.optimizer import OptimizerConfig
from train.config.vae import VaeConfig
from train.engine.stage import Batch, Hooks, Stage
from train.engine.trainer import Trainer

MODULE: dict[type[Config], Any] = {
    ClipConfig: train.stages.clip,
    VaeConfig: train.stages.vae,
    LdmConfig: train.stages.ldm,
    DistillConfig: train.stages.distillation,
}

State = dict[str, Tensor]


@dataclass
class Recorded(Hooks):
    """A stage, and what its steps received and resulted in."""

    stage: Any = None
    initial: list[nn.Module] = field(default_factory=list)
    """Copies of the trained networks before the first step, one per phase."""
    read: list[list[Any]] = field(default_factory=list)
    """Batches as the dataset returns them: the parts of each step."""
    parts: list[list[Any]] = field(default_factory=list)
    """Batches as the networks receive them."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    weights: list[list[State]] = field(default_factory=list)
    """Weights after each step, one state per phase."""
    averages: list[State] = field(default_factory=list)

    def begin_step(self, step: int, parts: list[Batch]) -> list[Batch]:
        self.parts.append(parts)
        return parts

    def end_step(self, step: int, metrics: dict[str, Tensor]) -> None:
        self.metrics.append({name: float(value) for name, value in metrics.items()})
        self.weights.append([cloned(net) for net in networks(self.stage)])
        self.averages.append(cloned(self.stage.ema.module))


class Scaled(nn.Module):
    """The autoencoder, and the learned scale of its distance (None: not learned)."""

    def __init__(self, vae: nn.Module, logvar: nn.Parameter | None) -> None:
        super().__init__()
        self.vae, self.logvar = vae, logvar


def cloned(module: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def networks(stage: Any) -> list[nn.Module]:
    """Return the trained networks of a stage, one per phase."""
    if hasattr(stage, "reconstruct"):
        autoencoder = Scaled(stage.reconstruct.vae, stage.reconstruct.logvar)
        return [autoencoder, *([] if stage.discriminator is None else [stage.discriminator])]
    module = stage.phases[0].module
    return [module.unet if hasattr(module, "unet") else module.contrastive]


def record(
    config: Config, steps: int = 1, then: Callable[[Stage], object] = lambda stage: None, **how: Any
) -> Recorded:
    """Take the first steps of a stage as the loop does, without what the loop does between steps.

    then: called with the stage at the end, while the run is open. how: arguments of the stage's `train`.
    """
    recorded = Recorded()

    def fit(run: Any, stage: Any, publish: object, hooks: object = None) -> None:
        recorded.stage, recorded.initial = stage, copy.deepcopy(networks(stage))
        trainer = Trainer(run, stage, recorded)
        for step, parts in zip(range(steps), stage.batches(0), strict=False):
            recorded.read.append(parts)
            trainer.step(step, parts)
        then(stage)

    with mock.patch.object(MODULE[type(config)], "fit", fit):
        train_stage(config, **how)
    return recorded


# -- random numbers -------------------------------------------------------------------------------------------


def stream(seed: int, purpose: int, position: int) -> np.random.Generator:
    """Return the generator of a position's random numbers for a purpose, as the file formats define it."""
    key, counter = np.array([seed, purpose], np.uint64), np.array([0, 0, position, 0], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def uniforms(seed: int, purpose: int, positions: Sequence[int], count: int = 1) -> np.ndarray:
    """Return uniform numbers, (b, count) float64."""
    return np.stack([stream(seed, purpose, position).random(count) for position in positions])


def normals(seed: int, purpose: int, positions: Sequence[int], *shape: int) -> Tensor:
    """Return standard normal numbers, (b, *shape) float32."""
    drawn = [stream(seed, purpose, position).standard_normal(shape, np.float32) for position in positions]
    return torch.from_numpy(np.stack(drawn))


# -- a reference of training ----------------------------------------------------------------------------------


def lr_share(c: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step, 0 being the first, as a share of the peak."""
    if step < c.warmup:
        return (step + 1) / c.warmup
    done = (step - c.warmup) / (steps - c.warmup)
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    shape = (shapes | {"wsd": 1 - math.sqrt(max(0.0, 5 * done - 4))})[c.schedule]
    return shape if c.schedule == "constant" else c.final + (1 - c.final) * shape


def momentum_step(c: OptimizerConfig, weight: Tensor, grad: Tensor, mean: Tensor, lr: float) -> None:
    """Make a step of Muon (Jordan et al. 2024), with the scale of Liu et al. 2025, in float64."""
    mean.mul_(c.momentum).add_(grad, alpha=1 - c.momentum)
    x = (c.momentum * mean + (1 - c.momentum) * grad).double().flatten(1)
    x = x / x.norm().clamp(min=1e-7)
    if c.newton_schulz == "polar_express":
        bound = torch.linalg.svdvals(x).pow(8).sum() ** (1 / 8)
        x, steps = x / (1.02 * bound), polar_express_steps(0.01, 3)
    else:
        steps = [(3.4445, -4.7750, 2.0315)] * 5
    for first, third, fifth in steps:
        a = x @ x.T
        x = first * x + (third * a + fifth * a @ a) @ x
    size = 0.2 * max(x.shape) ** 0.5
    weight.mul_(1 - lr * c.weight_decay).sub_((lr * size * x).view_as(weight).float())


def polar_express_steps(lower: float, count: int) -> list[tuple[float, float, float]]:
    """Return the coefficients of Polar Express (Amsel et al. 2025, arXiv 2505.16932, sec. 3.2), in float64.

    Each step is the odd polynomial of degree 5 nearest to 1 on an interval, which is at first [lower, 1]. Remez's
    algorithm finds it: its error has equal size and alternating sign at the interval's ends and at its two extrema.
    """
    upper, steps = 1.0, []
    for k in range(count):
        inner = [(3 * lower + upper) / 4, (lower + 3 * upper) / 4]
        for _ in range(50):
            x = np.array([lower, *inner, upper])
            a, b, c, _ = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], 1), np.ones(4))
            inner = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]))).tolist()
        lower = a * lower + b * lower**3 + c * lower**5
        upper = 2 - lower
        wider = 1.01 if k < count - 1 else 1.0
        steps.append((a / wider, b / wider**3, c / wider**5))
    return steps


class Reference:
    """A network that is trained with plain torch, and its average."""

    def __init__(self, net: nn.Module, c: OptimizerConfig, peak: float, ema_decay: float = 0.0) -> None:
        self.net, self.c, self.peak, self.ema_decay = copy.deepcopy(net), c, peak, ema_decay
        self.average = cloned(net)
        self.trained = [p for p in self.net.parameters() if p.requires_grad]
        tables = {id(m.weight) for m in self.net.modules() if isinstance(m, nn.Embedding)}
        muon = c.kind == "muon"
        self.matrices = [p for p in self.trained if muon and p.ndim > 1 and id(p) not in tables]
        self.means = [torch.zeros_like(p) for p in self.matrices]
        mine = {id(p) for p in self.matrices}
        self.by_matrix = {name for name, p in self.net.named_parameters() if id(p) in mine}
        rest = [p for p in self.trained if id(p) not in mine]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": c.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, peak, c.betas, c.eps, foreach=False)

    def step(self, loss: Tensor, step: int, steps: int, retain: bool = False) -> float:
        """Update the weights and the average. Returns the norm of the gradient before it is clipped."""
        found = torch.autograd.grad(loss, self.trained, allow_unused=True, retain_graph=retain)
        norm = torch.stack([g.double().square().sum() for g in found if g is not None]).sum().sqrt().item()
        factor = min(1.0, self.c.clip / norm) if self.c.clip else 1.0
        lr = self.peak * lr_share(self.c, step, steps)
        for p, g in zip(self.trained, found, strict=True):
            p.grad = None if g is None else factor * g
        with torch.no_grad():
            for p, mean in zip(self.matrices, self.means, strict=True):
                if p.grad is not None:
                    momentum_step(self.c, p, p.grad, mean, lr)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        decay = min(self.ema_decay, (1 + step) / (10 + step))
        for name, p in self.net.named_parameters():
            self.average[name] = decay * self.average[name] + (1 - decay) * p.detach()
        return norm


def change(after: State, before: State) -> Tensor:
    """Return the change of all weights as one vector."""
    moved = [(after[k].double() - v.double()).flatten() for k, v in before.items() if v.is_floating_point()]
    return torch.cat([torch.zeros(1, dtype=torch.float64), *moved])
