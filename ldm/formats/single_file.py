"""Conversion between a model of any width and one safetensors file with the original Stable Diffusion code's names.

`original_names` has the tables of names, which follow from the configuration. A single file doesn't contain that: it is
read from NAME.yaml beside the file (`original_config`), or from a folder in diffusers' form. `file_limits` says what
other tools can't know.
"""

import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.errors import RunError, UserError, one_line
from ldm.files import read_json, require_plausible
from ldm.formats.clip_layout import empty_text_model
from ldm.formats.file_limits import Model, architecture, is_openclip, limits, unet_of
from ldm.formats.hub import fill, require_types
from ldm.formats.original_config import describe, text_version
from ldm.formats.original_config_reader import Configs, guess, read_description
from ldm.formats.original_names import OPENCLIP, POINTWISE, Parts, layouts
from ldm.formats.scheduler_config import Process
from ldm.libraries import AutoencoderKL, UNet2DConditionModel
from ldm.networks.unet import check_supported
from ldm.schedule import BetaSchedule

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_SAMPLING = "ldm.sampling"  # name in the metadata
_SAMPLING_KEYS = ("timestep_spacing", "use_karras_sigmas", "steps_offset", "set_alpha_to_one", "variance_type")
_IGNORED = re.compile(
    r"model_ema\..+|betas|\w*alphas_cumprod(_prev)?|posterior_\w+|logvar|lvlb_weights|v_pred|ztsnr"
    r"|first_stage_model\.loss\..+|cond_stage_model\..*\b(position_ids|logit_scale|text_projection|attn_mask)"
)

# -- writing --------------------------------------------------------------------------------------------------------


def to_original(model: Model, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return all weights by their original names, on the CPU, and the tables of a beta schedule.

    dtype: that of the weights; None keeps it.

    Raises UserError with the name of anything that has no counterpart in the original layout.
    """
    parts = Parts(unet_of(model), model.autoencoder.vae, model.text_encoder.model, model.process)
    schedule = model.process.schedule
    weights = _tables(schedule) if isinstance(schedule, BetaSchedule) else {}
    if model.process.target == "v":
        weights["v_pred"] = torch.empty(0)
    if schedule.zero_terminal_snr and isinstance(schedule, BetaSchedule):
        weights["ztsnr"] = torch.empty(0)
    for module, layout in layouts(parts, openclip=is_openclip(model.text_encoder)):
        state = module.state_dict()
        for name, ours in layout.items():
            weight = state[ours[0]] if len(ours) == 1 else torch.cat([state[key] for key in ours])
            weight = (weight[:, :, None, None] if POINTWISE.fullmatch(name) else weight).to("cpu", dtype)
            if dtype is not None and not weight.isfinite().all():
                raise UserError(f"weight {name}: has values that {dtype} can't represent; choose bf16 or fp32")
            weights[name] = weight.contiguous()
    return weights


def save_single_file(model: Model, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a new .safetensors file and, if it can describe the model, NAME.yaml; NAME-text/ has its text encoder.

    dtype: that of the weights; None keeps it. Settings that don't follow from the weights are also in its metadata. A
    warning is logged for everything that other tools can't do with the file. Raises UserError if one of these paths
    exists or the file isn't .safetensors, or if the model doesn't fit the layout. Raises RunError if the file can't be
    written; no partial file remains.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{str(path)!r}: the name of a single file must end in .safetensors")
    description, text = path.with_suffix(".yaml"), path.with_name(f"{path.stem}-text")
    for new in (path, description, text):
        if new.exists():
            raise UserError(f"{str(new)!r}: exists already; give another name")
    weights = to_original(model, dtype)
    lines = limits(model, path.stem)
    try:
        content: dict[str, Any] | None = describe(model, str(text.resolve()))
    except UserError as error:
        content = None
        lines.append(f"no {description.name} is written: it can't describe this model ({error})")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".tmp-{path.name}")
    try:
        save_file(weights, part, metadata=_metadata(model, path.stem))
        if content is not None:
            if text_version(model) is None:
                model.text_encoder.save_flat(text)
                lines.append(
                    f"{description.name} contains the path of {text.name}/, the text encoder: change `version` in it "
                    "if you move that folder"
                )
            description.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        part.rename(path)
    except SafetensorError as error:
        raise RunError(f"can't write {str(path)!r}: {error}") from None
    finally:
        part.unlink(missing_ok=True)
        if not path.exists():
            description.unlink(missing_ok=True)
            shutil.rmtree(text, ignore_errors=True)
    for line in lines:
        logging.getLogger(__name__).warning(line)


def _metadata(model: Model, title: str) -> dict[str, str]:
    """Return the metadata. Its names follow Stability's model specification 1.0."""
    vae, size = model.autoencoder.vae, unet_of(model).config.sample_size
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = (size, size) if isinstance(size, int) else size
    scheduler = model.process.to_diffusers().config
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture(model),
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": title,
        "modelspec.resolution": f"{width * factor}x{height * factor}",
        "modelspec.prediction_type": _prediction(model.process),
        "scaling_factor": str(vae.config.scaling_factor),
        _SAMPLING: json.dumps({name: scheduler[name] for name in _SAMPLING_KEYS if name in scheduler}),
    }


def _prediction(process: Process) -> str:
    return "epsilon" if process.target == "eps" else process.target


def _tables(schedule: BetaSchedule) -> dict[str, Tensor]:
    """Return the buffers (T,) that the original code stores with its weights (Ho et al. 2020, eq. 4 and 7), float32."""
    betas, alphas = schedule.betas.double(), schedule.alpha_bar.double()
    alphas_prev = torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    variance = betas * (1 - alphas_prev) / (1 - alphas)
    tables = {
        "betas": betas,
        "alphas_cumprod": alphas,
        "alphas_cumprod_prev": alphas_prev,
        "sqrt_alphas_cumprod": alphas.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas).log(),
        "sqrt_recip_alphas_cumprod": (1 / alphas).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp_min(1e-20).log(),
        "posterior_mean_coef1": betas * alphas_prev.sqrt() / (1 - alphas),
        "posterior_mean_coef2": (1 - alphas_prev) * (1 - betas).sqrt() / (1 - alphas),
    }
    return {name: table.float() for name, table in tables.items()}


# -- reading --------------------------------------------------------------------------------------------------------


def load_single_file(path: str | Path, config: str | Path | None = None, *, ema: bool = True) -> Parts:
    """Load the networks of a .safetensors file.

    config: a diffusers folder of the same shape; only its JSON and tokenizer are read. None: NAME.yaml beside the file,
    or the shape of Stable Diffusion. ema: use averaged weights (`model_ema`) if the file has them. Raises UserError if
    either can't be read or they don't fit together. The message names the first weight that is missing, unexpected or
    of another shape.
    """
    path = Path(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise UserError(
            f"{str(path)!r} is a pickle, which isn't loaded because it can run code: convert it to a folder with "
            "ldm-convert"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in list(file.keys())}
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't read {str(path)!r} as safetensors: {error}") from None
    parts, prediction = _read(state, path, config, metadata, ema), metadata.get("modelspec.prediction_type")
    if prediction and prediction != _prediction(parts.process):
        logging.getLogger(__name__).warning(
            f"{path} has prediction_type {prediction!r} in its metadata, but the configuration's "
            f"{_prediction(parts.process)!r} is used; if the images are bad, use a configuration with {prediction!r}"
        )
    return parts


def load_pickled(path: str | Path, config: str | Path | None = None, *, ema: bool = True) -> Parts:
    """Load the networks of a .ckpt, of which only plain weights are read; see `load_single_file`."""
    return _read(read_pickled(path), Path(path), config, {}, ema)


def _read(
    state: Mapping[str, Tensor], path: Path, config: str | Path | None, metadata: Mapping[str, str], ema: bool
) -> Parts:
    if config:
        return from_original(state, config, ema=ema)
    description, prediction = path.with_suffix(".yaml"), metadata.get("modelspec.prediction_type")
    try:
        if description.is_file():
            configs = read_description(description, state)
        else:
            target = "eps" if prediction == "epsilon" else prediction if prediction in ("v", "x0") else None
            configs = guess(state, target)
        return from_original(state, configs._replace(scheduler=configs.scheduler | _sampling(metadata)), ema=ema)
    except UserError as error:
        raise UserError(
            f"{str(path)!r}: {error}; give a diffusers folder of the same architecture with --config (Python: config)"
        ) from None


def read_pickled(path: str | Path) -> dict[str, Tensor]:
    """Read a .ckpt's tensors with torch's restricted unpickler, which runs no code. Raises UserError if it fails."""
    try:
        with warnings.catch_warnings(action="ignore"):  # warnings about pickle versions
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {str(name): value for name, value in state.items() if type(value) in (Tensor, nn.Parameter)}
    except OSError as error:
        raise UserError(f"can't read {str(path)!r}: {error.strerror}") from None
    except Exception as error:  # any type; its message isn't quoted, since it advises unsafe loading
        raise UserError(
            f"{str(path)!r} can't be read ({type(error).__name__}): it is damaged, or contains objects other than "
            "weights, which aren't loaded because they can run code"
        ) from None


def _sampling(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of sampling in a file's metadata; an empty table if there are none."""
    try:
        stored = json.loads(metadata.get(_SAMPLING, "{}"))
        return {name: stored[name] for name in _SAMPLING_KEYS if name in stored}
    except (ValueError, TypeError):
        raise UserError(f"its metadata {_SAMPLING} isn't a JSON object") from None


def from_original(state: Mapping[str, Tensor], config: str | Path | Configs, *, ema: bool = True) -> Parts:
    """Make the networks from weights with the original names; see `load_single_file`."""
    parts = _empty_networks(config if isinstance(config, Configs) else Path(config))
    source = "in its description" if isinstance(config, Configs) else f"the configuration {str(config)!r}"
    tables = list(layouts(parts, openclip=any(name.startswith(OPENCLIP) for name in state)))
    known = dict.fromkeys(name for _, table in tables for name in table)
    for name in known:
        if name not in state:
            raise UserError(f"the file has no weight {name}, which {source} needs")
    # Stable Diffusion 2 doesn't use its text tower's last layer, which is in the file but not in the configuration.
    unused = f"{OPENCLIP}transformer.resblocks.{parts.text_encoder.config.num_hidden_layers}."
    for name in state:
        if name not in known and not _IGNORED.fullmatch(name) and not name.startswith(unused):
            raise UserError(f"the file has a weight {name}, which doesn't belong to {source}")
    averaged = _averaged(state, tables[0][1]) if ema else {}
    for module, table in tables:
        weights: dict[str, Tensor] = {}
        for name, ours in table.items():
            shapes = {key: module.get_parameter(key).shape for key in ours}
            weights |= _split_weight(name, state[averaged.get(name, name)], shapes)
        fill(module, weights)
    return parts


def _averaged(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, str]:
    """Return the name of each weight's average in CompVis' checkpoints; an empty table if they aren't all there."""
    table = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in names}
    present = sum(name in state for name in table.values())
    if not present:
        return {}
    complete = present == len(table)
    logging.getLogger(__name__).warning(
        "the file also has averaged weights (model_ema), which are used"
        if complete
        else f"the file has {present} of {len(table)} averaged weights (model_ema), so the trained ones are used"
    )
    return table if complete else {}


def _split_weight(name: str, value: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Split an original weight into weights of these names and shapes.

    They are float32 and may share the file's memory.
    """
    if POINTWISE.fullmatch(name) and value.shape[2:].numel() == 1:
        value = value.reshape(value.shape[:2])
    rows, *others = next(iter(shapes.values()))
    expected = (len(shapes) * rows, *others)
    if tuple(value.shape) != expected:
        raise UserError(
            f"weight {name} has shape {tuple(value.shape)} in the file, but {expected} in the configuration"
        )
    if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
        raise UserError(
            f"weight {name} in the file is {value.dtype}, {value.layout}, {value.device}: it must be a dense tensor of "
            "floating-point numbers"
        )
    return dict(zip(shapes, (part.float().contiguous() for part in value.chunk(len(shapes))), strict=True))


def _empty_networks(config: Path | Configs) -> Parts:
    """Build the networks from configurations, or from those in a folder, without memory for weights."""
    name = "its description" if isinstance(config, Configs) else f"configuration {str(config)!r}"
    try:
        return _build(config if isinstance(config, Configs) else _read_folder(config))
    except UserError:
        raise
    except Exception as error:  # for a wrong value, the libraries may raise any error
        raise UserError(f"{name} can't be read: {one_line(error, 300)}") from None


def _read_folder(folder: Path) -> Configs:
    unet, vae, text = (read_json(folder / part / "config.json") for part in ("unet", "vae", "text_encoder"))
    return Configs(unet, vae, text, read_json(folder / "scheduler" / "scheduler_config.json"), folder / "tokenizer")


def _build(configs: Configs) -> Parts:
    for config in (configs.unet, configs.vae):
        require_plausible(config)
    check_supported(configs.unet)
    require_types(UNet2DConditionModel, configs.unet)
    require_types(AutoencoderKL, configs.vae)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(configs.unet)
        vae = AutoencoderKL.from_config(configs.vae)
    text_encoder = empty_text_model(configs.text_encoder)
    for module in (unet, vae, text_encoder):
        module.eval().requires_grad_(False)
    return Parts(unet, vae, text_encoder, Process.from_diffusers(configs.scheduler), configs.tokenizer)
