"""The trainable subset of a network: the part that training changes. Only this part is averaged and checkpointed."""

import hashlib
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from ldm.errors import UserError


def frozen_names(module: nn.Module) -> frozenset[str]:
    """Return the names of the frozen parameters, which take no gradient."""
    return frozenset(n for n, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad)


class Subset:
    """State of a module without its frozen parameters, which are identified by one digest."""

    def __init__(self, module: nn.Module, frozen: frozenset[str]) -> None:
        self.module, self.frozen = module, frozen

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trainable parameters and the buffers, by their names in the module."""
        return {name: value for name, value in self.module.state_dict().items() if name not in self.frozen}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of `state_dict`. It may also contain frozen parameters if they equal the module's.

        Raises RuntimeError, as modules do, if names or shapes differ, and UserError if frozen parameters differ.
        """
        kept = {name: value for name, value in self.module.state_dict().items() if name in self.frozen}
        for name in kept.keys() & state.keys():
            if not torch.equal(kept[name].cpu(), state[name].cpu()):
                raise UserError(
                    f"the frozen weight {name} differs from the one that this run was trained with: give the same "
                    "--init"
                )
        self.module.load_state_dict(kept | dict(state))

    @cached_property
    def digest(self) -> str:
        """Hash of the frozen parameters, "" if there are none. Computed once, as they don't change."""
        total, state = hashlib.sha256(), self.module.state_dict()
        for name in sorted(self.frozen):
            total.update(f"{name}{state[name].dtype}{tuple(state[name].shape)}".encode())
            total.update(state[name].cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return total.hexdigest() if self.frozen else ""

    def require(self, digest: str) -> None:
        """Raise UserError if the digest of the frozen parameters differs from that in a checkpoint."""
        if digest and digest != self.digest:
            raise UserError(
                f"the {len(self.frozen)} frozen weights differ from those that this run was trained with (SHA-256 "
                f"{digest[:12]}, now {self.digest[:12] or 'none'}): give the same --init, or choose another --out"
            )
