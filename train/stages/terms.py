"""A stage's loss as a list of weighted terms, and the features of the network that they look at."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

Seen = TypeVar("Seen")


@dataclass(frozen=True)
class Term(Generic[Seen]):
    """One term of a stage's loss, a function of what the stage's network made of a batch."""

    name: str
    """Name of its value in metrics.jsonl, where it stands without its weight."""
    weight: float
    """Weight in the stage's loss."""
    loss: Callable[[Seen], Tensor]
    """Gives a scalar. If it is a module, its parameters are trained and saved with the network's."""
    features: tuple[str, ...] = ()
    """Dotted names of the network's submodules whose outputs it looks at."""


class Terms(nn.Module, Generic[Seen]):
    """Terms of a loss as one module, which owns the terms' parameters."""

    def __init__(self, terms: Sequence[Term[Seen]]) -> None:
        super().__init__()
        self.terms = tuple(terms)
        self.losses = nn.ModuleDict({term.name: term.loss for term in terms if isinstance(term.loss, nn.Module)})

    def forward(self, loss: Tensor, seen: Seen) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `loss` plus the weighted terms in their order, and each term's value by name, detached."""
        metrics = {}
        for term in self.terms:
            value = term.loss(seen)
            metrics[term.name] = value.detach()
            loss = loss + term.weight * value
        return loss, metrics

    @contextmanager
    def captured(self, network: nn.Module) -> Iterator[dict[str, Any]]:
        """Outputs of the submodules that the terms look at, by name, in the graph, of a call of the network inside.

        What gradient checkpointing computes once more in the backward pass isn't captured again.
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
