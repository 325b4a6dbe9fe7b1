"""A stand-in for Apple's mps: tensors that say they are on mps, are kept on the CPU, and can't be float64."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

MPS, CPU = torch.device("mps", 0), torch.device("cpu")


class MpsTensor(Tensor):
    """A tensor whose device is mps and whose data is `inner`, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> "MpsTensor":
        if inner.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        wrapper = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="meta",  # for torch's C++, which has no backend of mps here
            requires_grad=requires_grad,
        )
        wrapper.inner = inner
        return wrapper

    def __repr__(self) -> str:  # type: ignore[override]
        return f"MpsTensor({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the tensors' data, and put the results on the device on which they would be."""
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    on_mps = [x for x in tensors if isinstance(x, MpsTensor)]
    name = func.overloadpacket.__name__
    device = next((x.type for x in leaves if isinstance(x, torch.device)), None)
    if device == "meta" and torch.float64 not in {
        x.dtype for x in tensors
    }:  # the device that C++ has for a tensor of the stand-in
        device = "mps"
    if name in ("copy_", "_to_copy") and on_mps and (torch.float64 in leaves or tensors[0].dtype == torch.float64):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    if on_mps and name not in ("copy_", "_foreach_copy_") and device is None:
        for x in tensors:
            on_cpu = not isinstance(x, MpsTensor) and x.device.type == "cpu"
            if on_cpu and x.dim() > 0 and not name.startswith(("index", "_index")):
                raise RuntimeError(f"{name}: tensors on mps and on the CPU, of shapes {[t.shape for t in tensors]}")
    result_on_mps = device == "mps" or (device is None and bool(on_mps))
    if name == "copy_":
        result_on_mps = isinstance(args[0], MpsTensor)
    plain = [
        x.inner if isinstance(x, MpsTensor) else CPU if isinstance(x, torch.device) and device == "mps" else x
        for x in leaves
    ]
    plain_args, plain_kwargs = tree_unflatten(plain, structure)
    if name == "_fused_adamw_":
        plain_kwargs |= {"found_inf": None}  # as the kernel of mps
    out = func(*plain_args, **plain_kwargs)
    same = {id(x.inner): x for x in on_mps}
    if not result_on_mps:
        return out
    return tree_map_only(Tensor, lambda t: same[id(t)] if id(t) in same else MpsTensor(t), out)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class _Names(TorchFunctionMode):
    """Add the index to "mps", because torch asks its missing backend for it otherwise."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.to and isinstance(other := [*args, None][1], MpsTensor):
            args = (args[0], MPS, other.dtype)
        if args and isinstance(args[0], MpsTensor):
            if func == Tensor.tolist:
                return args[0].inner.tolist()
            if func == Tensor.device.__get__:  # type: ignore[attr-defined]
                return MPS
            if func == Tensor.is_meta.__get__:  # type: ignore[attr-defined]
                return False
        args, kwargs = tree_map(lambda x: MPS if _is_mps(x) else x, (args, kwargs or {}))
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1], dtype=torch.int64), *args[2:])  # C++ would put it on its device
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == MPS:
            return func(*args, **kwargs | {"device": CPU}).to(MPS)
        return func(*args, **kwargs)


def _is_mps(x: Any) -> bool:
    return isinstance(x, str | torch.device) and str(x) == "mps"


@contextmanager
def mps() -> Iterator[None]:
    """Create a context in which tensors can be created on the stand-in, and moved to it."""
    with _Names(), _Operations():
        yield
