"""Classes of diffusers and transformers, imported without the parts of these libraries that nothing here uses.

`from diffusers import UNet2DConditionModel` also imports all of diffusers' transformers, transformers' model classes,
SciPy's statistics and TorchDynamo, which takes most of the time until a first image. So import these classes from this
module (docs/adr/0017-light-imports.md). Nothing changes for other users of the libraries in the process: what is left
out here is imported when something uses it.
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from types import ModuleType
from typing import Any

import torch

from ldm.imports import defer, packages_distributions, without_garbage_collection

_COLLECTIONS = (  # packages whose __init__ only imports names from their modules
    *("diffusers.hooks", "diffusers.models.autoencoders", "diffusers.models.transformers", "diffusers.models.unets"),
    *("scipy.integrate", "scipy.stats", "transformers.models"),
)
_LATER = ("AutoImageProcessor", "PreTrainedModel")  # names of transformers that diffusers uses only inside functions


class _Class:
    """A stand-in for a class of transformers that imports the class when it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _load(self) -> Any:
        return getattr(importlib.import_module("transformers"), self._name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._load()(*arguments, **keywords)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._load())

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self._load())

    def __or__(self, other: Any) -> Any:
        return self._load() | other

    def __ror__(self, other: Any) -> Any:
        return other | self._load()

    def __mro_entries__(self, bases: tuple[object, ...]) -> tuple[type, ...]:
        return (self._load(),)


class _Dynamo(ModuleType):
    """A stand-in for torch._dynamo that has its two decorators and imports the module for anything else."""

    allow_in_graph = staticmethod(lambda value: value)  # as diffusers does without TorchDynamo

    @staticmethod
    def disable(function: Any = None, recursive: bool = True, **_: Any) -> Any:
        return torch._disable_dynamo(function, recursive)  # it imports torch._dynamo in the first call

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module 'torch._dynamo' has no attribute {name!r}")
        sys.modules.pop("torch._dynamo", None)
        return getattr(importlib.import_module("torch._dynamo"), name)


@contextmanager
def _light_imports() -> Iterator[None]:
    """Leave out, while diffusers' modules are imported, what they import and don't use at that time."""
    distributions = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = cache(packages_distributions)  # each library asks for it
    sys.modules.setdefault("torch._dynamo", _Dynamo("torch._dynamo"))
    transformers = importlib.import_module("transformers")
    later = () if "transformers.modeling_utils" in sys.modules else _LATER
    for name in later:
        setattr(transformers, name, _Class(name))
    try:
        for name in _COLLECTIONS:
            defer(name)
        yield
    finally:
        importlib.metadata.packages_distributions = distributions
        if isinstance(sys.modules.get("torch._dynamo"), _Dynamo):
            del sys.modules["torch._dynamo"]
        for name in later:
            delattr(transformers, name)


with without_garbage_collection():
    # Another version of diffusers may need what is left out here. The imports below then import everything.
    with suppress(Exception), _light_imports():
        for name in ("AutoencoderKL", "UNet2DConditionModel"):
            getattr(importlib.import_module("diffusers"), name)
    import diffusers
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DDPMScheduler,
        FlowMatchEulerDiscreteScheduler,
        LCMScheduler,
        SchedulerMixin,
        UNet2DConditionModel,
    )
    from diffusers.models.attention_processor import Attention
    from diffusers.utils.torch_utils import randn_tensor
    from transformers import CLIPConfig, CLIPTextConfig, CLIPTokenizer

__all__ = [
    "Attention",
    "AutoencoderKL",
    "CLIPConfig",
    "CLIPTextConfig",
    "CLIPTokenizer",
    "DDIMScheduler",
    "DDPMScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "LCMScheduler",
    "SchedulerMixin",
    "UNet2DConditionModel",
    "diffusers",
    "randn_tensor",
]
