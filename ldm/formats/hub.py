"""Models by name: a local folder or a hub repository, and the weights in it, all of which must fit."""

import inspect
import os.path
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm.errors import UserError, one_line
from ldm.files import read_json, require_plausible

WEIGHTS = "diffusion_pytorch_model"
"""Start of the names of diffusers' weight files."""
_STEMS = {"unet/": WEIGHTS, "vae/": WEIGHTS, "text_encoder/": "model"}
_VARIANTS = ("fp16", "bf16")  # variants of weights that are read if there are no others
_FILES = ("model_index.json", "*/*config.json", "tokenizer/*.json", "tokenizer/*.txt", "vae/preview.json")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
_ADAPTER = re.compile(r"\.base_layer\.|\.lora_|_lora\.")
_EARLIER_ATTENTION = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)")
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
"""Subfolders of a pipeline's folder."""


def is_hub_id(name: str) -> bool:
    """Return whether a name can be a hub id owner/name. It can't if that path or a local folder `owner` exists."""
    return (
        re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
        and not os.path.exists(name)
        and not os.path.isdir(os.path.dirname(name))
    )


def model_folder(folder_or_id: str | Path) -> str | Path:
    """Return the folder model/ in the folder of a training run, e.g. runs/ldm; any other folder or id unchanged.

    Raises UserError for a run that has no model/ yet.
    """
    folder = Path(folder_or_id)
    if not folder.is_dir() or _is_model(folder):
        return folder_or_id
    if _is_model(folder / "model"):
        return folder / "model"
    if (folder / "config.yaml").is_file() and any((folder / name).exists() for name in (".lock", "checkpoints")):
        raise UserError(f"the run {str(folder_or_id)!r} has no model/ yet: its first checkpoint will write it")
    return folder_or_id


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "model_index.json"))


def fetch(name: str, patterns: Sequence[str], stems: Mapping[str, str] | None = None) -> Path:
    """Download the files of a hub repository that match the patterns, and return their folder.

    stems: start of the names of weights to download too, by their folder's prefix; a variant only if there are no
    others. Raises UserError if that fails.
    """
    stems = dict(stems or {})
    folder = _fetch(name, [*patterns, *_patterns(stems, "")])
    tried = [""]
    for variant in _VARIANTS:
        for prefix in [*stems]:
            part = folder / prefix
            found = any(any(part.glob(kind)) for each in tried for kind in _patterns({"": stems[prefix]}, each))
            if found or not (part / "config.json").is_file():
                del stems[prefix]
        if stems:
            tried.append(f".{variant}")
            folder = _fetch(name, [*patterns, *_patterns(stems, tried[-1])])
    return folder


def _fetch(name: str, patterns: Sequence[str]) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=[*patterns]))
    except Exception as error:  # the hub's client raises many errors without a common base class
        reason = one_line(error, 300)
        raise UserError(f"{name!r} is not a local folder, and can't be downloaded from the hub: {reason}") from error


def _patterns(stems: Mapping[str, str], variant: str) -> list[str]:
    """Return patterns of the weights' files. variant: "" or its name after a point."""
    kinds = (f"{variant}.safetensors", f"{variant}-*-of-*.safetensors", f".safetensors.index{variant}.json")
    return [prefix + stem + kind for prefix, stem in stems.items() for kind in kinds]


def weight_files(folder: str | Path, stem: str = WEIGHTS) -> list[Path]:
    """Return the safetensors files of a network: one, or the shards that an index names; else those of a variant.

    stem: start of the files' names. Raises UserError if there are none, or if a shard is missing.
    """
    folder = Path(folder)
    for variant in ("", *(f".{name}" for name in _VARIANTS)):
        single = folder / f"{stem}{variant}.safetensors"
        if single.is_file():
            return [single]
        index = folder / f"{stem}.safetensors.index{variant}.json"
        shards = [_SHARD.fullmatch(path.name) for path in sorted(folder.glob(f"{stem}{variant}-*-of-*.safetensors"))]
        names: set[str] = set()
        if index.is_file():
            names = _shards_of(index)
        elif shards and (shard := shards[0]):
            names = {f"{shard[1]}-{k + 1:05}-of-{shard[2]}.safetensors" for k in range(int(shard[2]))}
        if missing := sorted(name for name in names if not (folder / name).is_file()):
            raise UserError(f"the shard {missing[0]} is missing: copy or download it again")
        if names:
            return [folder / name for name in sorted(names)]
    raise UserError(
        f"it has no {stem}.safetensors, nor a variant of it ({', '.join(_VARIANTS)}); pickles are never read"
    )


def _shards_of(index: Path) -> set[str]:
    """Return the names of the files that an index lists. Raises UserError if it isn't an index of its folder."""
    names = read_json(index)["weight_map"].values()
    if outside := next((n for n in names if not isinstance(n, str) or Path(n).name != n), None):
        raise UserError(f"{index.name} names {outside!r}: must be a file in the same folder")
    return set(names)


def read_weights(files: Iterable[Path]) -> dict[str, Tensor]:
    """Read safetensors files, by the weights' names. Raises UserError if one can't be read."""
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                weights |= {name: file.get_tensor(name) for name in list(file.keys())}
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path.name} can't be read as safetensors: {one_line(error, 200)}") from None
    return weights


def fill(module: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Give a module weights of exactly its names and shapes, as copies. dtype: None keeps that of the weights.

    The module may have been built without memory. Raises UserError that names the first weight that is missing,
    unexpected, of another shape, or not a finite floating-point number.
    """
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    adapter = any(map(_ADAPTER.search, weights))
    hint = "; an adapter is attached: merge it into the weights, or remove it, and save again" if adapter else ""
    for name in sorted(shapes.keys() - weights.keys()):
        raise UserError(f"the weight {name} is missing{hint}")
    for name in sorted(weights.keys() - shapes.keys()):
        raise UserError(f"it has a weight {name}, which the network in config.json doesn't have{hint}")
    for name, shape in shapes.items():
        weight = weights[name]
        if tuple(weight.shape) != shape:
            raise UserError(f"the weight {name} has shape {tuple(weight.shape)}, but config.json needs {shape}")
        if not weight.is_floating_point():
            raise UserError(f"the weight {name} is {weight.dtype}: must be floating-point numbers")
    copies = {name: weight.to(dtype or weight.dtype, copy=True) for name, weight in weights.items()}
    for name, weight in copies.items():
        if not weight.isfinite().all():
            raise UserError(f"the weight {name} contains NaN or infinity: use an earlier copy of the model")
    module.load_state_dict(copies, strict=True, assign=True)


def require_types(network_class: Any, config: Mapping[str, Any]) -> None:
    """Raise ValueError for a value of a configuration whose type isn't one that the network's constructor declares.

    Python takes true for 1, so that a network with a wrong value may be built and fail later.
    """
    for name, parameter in inspect.signature(network_class.__init__).parameters.items():
        allowed = {kind.__name__ for kind in _leaves(parameter.annotation)} | {type(parameter.default).__name__}
        for value in _flat(config.get(name)):
            kind = type(value).__name__
            if kind not in allowed and not (kind == "int" and "float" in allowed):
                kinds = " or ".join(sorted(allowed & {"bool", "int", "float", "str"}))
                raise ValueError(f"{name} {one_line(repr(value), 60)}: must be {kinds}")


def _leaves(annotation: Any) -> Iterator[type]:
    """Yield the types that an annotation consists of: int and float for Optional[tuple[int | float]]."""
    inner = get_args(annotation)
    for part in inner:
        yield from _leaves(part)
    if not inner and isinstance(annotation, type):
        yield annotation


def _flat(value: Any) -> Iterator[Any]:
    """Yield the values in nested lists, without those that are null."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from _flat(part)
    elif value is not None:
        yield value


def load_network(
    network_class: Any,
    folder: str | Path,
    description: str,
    trial: Callable[[Any], None],
    check: Callable[[Mapping[str, Any]], None] | None = None,
) -> Any:
    """Load a network of a diffusers class from a folder, float32, on the CPU, from safetensors only; see `fill`.

    trial: calls the network with a small input, because some wrong values of a configuration are noticed only then.
    check: called with its configuration, before weights are read. description: the network in an error's message, e.g.
    "the UNet of 'runs/ldm/model'". Raises UserError if the network can't be read.
    """
    folder, expected = Path(folder), network_class.__name__
    try:
        config = read_json(folder / "config.json")
        require_plausible(config)
        if (class_name := config.get("_class_name", expected)) != expected:
            raise UserError(f"its config.json has _class_name {class_name}, not {expected}")
        if kind := config.get("quantization_config"):
            raise UserError(f"its weights are quantised ({one_line(kind, 60)}): use the original ones")
        if check is not None:
            check(config)
        require_types(network_class, config)
        with torch.device("meta"):
            network = network_class.from_config(config)
        weights = read_weights(weight_files(folder))
        renamed = {_EARLIER_ATTENTION.sub(lambda m: _ATTENTION[m[0]], name): value for name, value in weights.items()}
        fill(network, renamed, torch.float32)
        with torch.no_grad():
            trial(network.eval())
    except MemoryError:
        raise
    except Exception as error:  # for a damaged configuration, diffusers may raise any error
        raise UserError(f"can't load {description}: {one_line(error, 300)}") from None
    network.register_to_config(_name_or_path="")  # else saved files would contain this machine's paths
    return network.eval()


def find_pipeline(folder_or_id: str | Path, parts: Sequence[str] = PARTS) -> Path:
    """Return the folder of a pipeline; download it first for a hub id (safetensors, JSON and text, no pickles).

    Raises UserError if there is no such folder or repository, or if parts are missing.
    """
    folder = Path(model_folder(folder_or_id))
    if not folder.is_dir():
        if not is_hub_id(str(folder_or_id)):
            raise UserError(
                f"no pipeline at {str(folder_or_id)!r}: give a folder such as runs/ldm/model, or a hub id owner/name"
            )
        folder = fetch(str(folder_or_id), _FILES, _STEMS)
    if missing := [part for part in parts if not (folder / part).is_dir()]:
        subfolders = ", ".join(f"{part}/" for part in missing)
        raise UserError(f"{str(folder_or_id)!r} is not a complete pipeline folder: missing {subfolders}")
    return folder
