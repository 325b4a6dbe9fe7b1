"""Additional terms of a stage's loss, with their weights and the network features that they read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class Term(Generic[Inputs]):
    """One term of a stage's loss, a function of the network's outputs for a batch."""

    name: str
    """Name in metrics.jsonl, where the value is logged without its weight."""
    weight: float
    """Weight in the stage's loss."""
    loss: Callable[[Inputs], Tensor]
    """Function that returns a scalar. If it is a module, its parameters are trained and saved like the network's."""
    features: tuple[str, ...] = ()
    """Dotted names of the network's submodules whose outputs the term reads."""


class Terms(nn.Module, Generic[Inputs]):
    """Terms of a loss as one module, which owns the terms' parameters."""

    def __init__(self, terms: Sequence[Term[Inputs]]) -> None:
        super().__init__()
        self.terms = tuple(terms)
        self.losses = nn.ModuleDict({term.name: term.loss for term in terms if isinstance(term.loss, nn.Module)})

    def forward(self, loss: Tensor, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `loss` plus the weighted terms in their order, and each term's value by name, detached."""
        metrics = {}
        for term in self.terms:
            value = term.loss(inputs)
            metrics[term.name] = value.detach()
            loss = loss + term.weight * value
        return loss, metrics

    @contextmanager
    def captured(self, network: nn.Module) -> Iterator[dict[str, Any]]:
        """Record the outputs of the submodules that the terms read, by name and with gradients, within the context.

        Outputs that gradient checkpointing recomputes in the backward pass aren't recorded again.
        """
        features: dict[str, Any] = {}
        names = {name for term in self.terms for name in term.features}
        hooks = [network.get_submodule(name).register_forward_hook(partial(_keep, features, name)) for name in names]
        try:
            yield features
        finally:
            for hook in hooks:
                hook.remove()


def _keep(features: dict[str, Any], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    features[name] = output
