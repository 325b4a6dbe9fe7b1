"""Conversion between a model of any width and one safetensors file with the original Stable Diffusion code's names.

The networks are the same; the names and positions of their weights differ. Rombach et al.'s UNet numbers its blocks in
one sequence (`input_blocks`, `middle_block`, `output_blocks`). Their decoder counts its levels from the image's side.
The autoencoder's attention consists of 1×1 convolutions, and OpenCLIP's text tower (Stable Diffusion 2) has query, key
and value in one matrix. So a layout is a table from each original name to the names of the diffusers weights in it.
The table follows from the configuration. A single file doesn't contain it, so reading one needs a folder that does.

A model is refused if it differs from the values that are built into the original code (`_BUILT_IN`), or if it has
weights without an original name. An autoencoder without attention in the middle is accepted: it is the original's
`attn_type: none`, which has no weights.
"""

import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from ldm.errors import RunError, UserError, one_line
from ldm.formats.clip_layout import empty_text_model, openclip_names, tower_of
from ldm.formats.scheduler_config import Process
from ldm.networks.backbone import Backbone
from ldm.networks.unet import UNet
from ldm.schedule import BetaSchedule

SCALING_FACTOR = 0.18215  # other tools assume it for every file of this kind
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_CLIP, _OPENCLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
_OPENCLIP_LAYERS = 24  # Stable Diffusion 2 uses all but the last

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_POINTWISE = re.compile(r".*\.mid\.attn_1\.(q|k|v|proj_out)\.weight")  # a 1×1 convolution there, a matrix here
_IGNORED = re.compile(
    r"model_ema\..+|betas|\w*alphas_cumprod(_prev)?|posterior_\w+|logvar|lvlb_weights|v_pred|ztsnr"
    r"|first_stage_model\.loss\..+|cond_stage_model\..*\b(position_ids|logit_scale|text_projection|attn_mask)"
)
_BUILT_IN: dict[str, dict[str, Any]] = {
    "unet": {
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "act_fn": "silu",
        "norm_eps": 1e-5,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "only_cross_attention": False,
        "resnet_skip_time_act": False,
        "time_embedding_type": "positional",
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
    },
    "vae": {
        "act_fn": "silu",
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
    },
}
"""Values that are built into the original code, by diffusers' names. With other values, the weights don't fit it."""
_STABLE_DIFFUSION_SHAPE: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "norm_num_groups": 32},
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "mid_block_add_attention": True,
    },
}
"""Shapes of Stable Diffusion 1 and 2, which other tools assume unless they are given a configuration."""
_BLOCKS = {
    *("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    *("DownEncoderBlock2D", "UpDecoderBlock2D"),
}


class Parts(NamedTuple):
    """Networks and diffusion process that are read from a file and its configuration.

    The networks are frozen, in evaluation mode, float32 and on the CPU.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    process: Process


class _Autoencoder(Protocol):
    vae: AutoencoderKL


class _TextEncoder(Protocol):
    model: CLIPTextModel

    def diffusers_limits(self) -> str | None: ...


class Model(Protocol):
    """The parts of `ldm.model.Model` that are written."""

    @property
    def backbone(self) -> Backbone: ...

    @property
    def process(self) -> Process: ...

    @property
    def autoencoder(self) -> _Autoencoder: ...

    @property
    def text_encoder(self) -> _TextEncoder: ...


def _unet(model: Model) -> UNet2DConditionModel:
    if isinstance(model.backbone, UNet):
        return model.backbone.module
    raise UserError(
        f"network {model.backbone.describe()}: has no counterpart in the original layout; keep this model as a folder"
    )


# -- writing --------------------------------------------------------------------------------------------------------


def to_original(model: Model) -> dict[str, Tensor]:
    """Return all weights by their original names, on the CPU and in their dtype, and the tables of a beta schedule.

    Raises UserError with the name of anything that has no counterpart in the original layout.
    """
    parts = Parts(_unet(model), model.autoencoder.vae, model.text_encoder.model, model.process)
    schedule = model.process.schedule
    weights = _tables(schedule) if isinstance(schedule, BetaSchedule) else {}
    for module, layout in _layouts(parts, openclip=_is_openclip(parts.text_encoder)):
        state = module.state_dict()
        for name, ours in layout.items():
            weight = state[ours[0]] if len(ours) == 1 else torch.cat([state[key] for key in ours])
            weights[name] = (weight[:, :, None, None] if _POINTWISE.fullmatch(name) else weight).cpu().contiguous()
    return weights


def save_single_file(model: Model, path: str | Path) -> None:
    """Write a new .safetensors file.

    Settings that don't follow from the weights are in its metadata. A warning is logged for everything that other tools
    can't do with the file. Raises UserError if the path exists or isn't .safetensors, or if the model doesn't fit the
    layout. Raises RunError if the file can't be written; no partial file remains.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{str(path)!r}: the name of a single file must end in .safetensors")
    if path.exists():
        raise UserError(f"{str(path)!r}: exists already; give another name")
    weights = to_original(model)
    for line in _limits(model):
        logging.getLogger(__name__).warning(line)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".tmp-{path.name}")
    try:
        save_file(weights, part, metadata=_metadata(model, path.stem))
        part.rename(path)
    except SafetensorError as error:
        raise RunError(f"can't write {str(path)!r}: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def _limits(model: Model) -> list[str]:
    """Return one line for each thing that other tools can't do with the file."""
    lines = [line for part in (model.process, model.text_encoder) if (line := part.diffusers_limits())]
    if (scale := model.autoencoder.vae.config.scaling_factor) != SCALING_FACTOR:
        lines.append(f"scaling factor {scale}: tools that assume {SCALING_FACTOR} will generate different images")
    for network, config in (("unet", _unet(model).config), ("vae", model.autoencoder.vae.config)):
        for key, expected in _STABLE_DIFFUSION_SHAPE[network].items():
            if (value := list(config[key]) if isinstance(expected, list) else config[key]) != expected:
                lines.append(
                    f"{network} {key} {value} differs from Stable Diffusion's {expected}: other tools can read it "
                    "only if they are given a configuration"
                )
                return lines
    return lines


def _metadata(model: Model, title: str) -> dict[str, str]:
    """Return the metadata. Its names follow Stability's model specification 1.0."""
    vae, size = model.autoencoder.vae, _unet(model).config.sample_size
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = (size, size) if isinstance(size, int) else size
    kind = _prediction(model.process)
    second = "stable-diffusion-v2-768-v" if kind == "v" else "stable-diffusion-v2-512"
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": second if _is_openclip(model.text_encoder.model) else "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": title,
        "modelspec.resolution": f"{width * factor}x{height * factor}",
        "modelspec.prediction_type": kind,
        "scaling_factor": str(vae.config.scaling_factor),
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


def load_single_file(path: str | Path, config: str | Path) -> Parts:
    """Load the networks of a .safetensors file. config: a diffusers folder of the same shape; only its JSON is read.

    Raises UserError if either can't be read or they don't fit together. The message names the first weight that is
    missing, unexpected or of another shape. If the file also has averaged weights (`model_ema`), they are ignored.
    """
    path = Path(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise UserError(
            f"{str(path)!r} is a pickle, which isn't loaded because it can run code: convert it to a folder with "
            "ldm-convert"
        )
    try:
        with safe_open(path, framework="pt") as file:
            prediction = (file.metadata() or {}).get("modelspec.prediction_type")
            state = {name: file.get_tensor(name) for name in list(file.keys())}
    except (OSError, SafetensorError) as error:
        raise UserError(f"can't read {str(path)!r} as safetensors: {error}") from None
    parts = from_original(state, config)
    if prediction and prediction != _prediction(parts.process):
        logging.getLogger(__name__).warning(
            f"{path} has prediction_type {prediction!r} in its metadata, but the configuration's "
            f"{_prediction(parts.process)!r} is used; if the images are bad, use a configuration with {prediction!r}"
        )
    return parts


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


def from_original(state: Mapping[str, Tensor], config: str | Path) -> Parts:
    """Make the networks from weights with the original names; see `load_single_file`."""
    parts = _empty_networks(Path(config))
    layouts = list(_layouts(parts, openclip=any(name.startswith(_OPENCLIP) for name in state)))
    known = dict.fromkeys(name for _, layout in layouts for name in layout)
    for name in known:
        if name not in state:
            raise UserError(f"the file has no weight {name}, which the configuration {str(config)!r} needs")
    # Stable Diffusion 2 doesn't use its text tower's last layer, which is in the file but not in the configuration.
    unused = f"{_OPENCLIP}transformer.resblocks.{parts.text_encoder.config.num_hidden_layers}."
    for name in state:
        if name not in known and not _IGNORED.fullmatch(name) and not name.startswith(unused):
            raise UserError(f"the file has a weight {name}, which doesn't belong to the configuration {str(config)!r}")
    for module, layout in layouts:
        weights: dict[str, Tensor] = {}
        for name, ours in layout.items():
            weights |= _split_weight(name, state[name], {key: module.get_parameter(key).shape for key in ours})
        module.load_state_dict(weights, strict=True, assign=True)
    return parts


def _split_weight(name: str, value: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Split an original weight into weights of these names and shapes.

    They are float32 copies that don't share the file's memory.
    """
    if _POINTWISE.fullmatch(name) and value.shape[2:].numel() == 1:
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
    copies = (
        part.to(torch.float32, memory_format=torch.contiguous_format, copy=True) for part in value.chunk(len(shapes))
    )
    return dict(zip(shapes, copies, strict=True))


def _empty_networks(folder: Path) -> Parts:
    """Build the networks from the folder's JSON, without memory for weights."""

    def read(part: str, file: str = "config.json") -> dict[str, Any]:
        return json.loads((folder / part / file).read_text(encoding="utf-8"))

    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(read("unet"))
            vae = AutoencoderKL.from_config(read("vae"))
        text_encoder = empty_text_model(read("text_encoder"))
        process = Process.from_diffusers(read("scheduler", "scheduler_config.json"))
    except UserError:
        raise
    except Exception as error:  # for a damaged file, the libraries may raise any error
        raise UserError(f"configuration {str(folder)!r} can't be read: {one_line(error, 300)}") from None
    for module in (unet, vae, text_encoder):
        module.eval().requires_grad_(False)
    return Parts(unet, vae, text_encoder, process)


# -- the tables -----------------------------------------------------------------------------------------------------


def _layouts(parts: Parts, *, openclip: bool) -> Iterator[tuple[nn.Module, dict[str, tuple[str, ...]]]]:
    """Yield each network and its table: original name → names of the diffusers weights that are joined by rows."""
    tower = tower_of(parts.text_encoder)
    yield parts.unet, _layout(parts.unet, _unet_names(parts.unet), _UNET, "unet")
    yield parts.vae, _layout(parts.vae, _vae_names(parts.vae), _VAE, "vae")
    if openclip:
        yield tower, {_OPENCLIP + name: ours for name, ours in openclip_names(len(tower.encoder.layers)).items()}
    else:
        yield tower, {_CLIP + key: (key,) for key in tower.state_dict()}


def _layout(module: nn.Module, names: Mapping[str, str], prefix: str, network: str) -> dict[str, tuple[str, ...]]:
    """Return the table of a network. names: module's name in diffusers → original name; names inside it stay."""

    def original(key: str) -> str:
        parent = key
        while parent := parent.rpartition(".")[0]:
            if parent in names:
                return names[parent] + key.removeprefix(parent)
        raise UserError(
            f"weight {network}.{key}: has no counterpart in the original layout; keep this model as a folder"
        )

    return {prefix + original(key): (key,) for key in module.state_dict()}


def _unet_names(unet: UNet2DConditionModel) -> dict[str, str]:
    if kind := unet.config.addition_embed_type:
        raise UserError(
            f"unet.modulation (addition_embed_type {kind!r}): has no counterpart in the original layout; keep this "
            "model as a folder"
        )
    _check_built_in("unet", unet.config)
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }

    def add(ours: str, k: int, block: str, first: int = 0) -> None:
        """Add the names of a residual block and the attention after it: modules `first` and `first + 1` of `block`."""
        names.update({f"{ours}.resnets.{k}.{a}": f"{block}.{first}.{b}" for a, b in _RESNET.items()})
        names[f"{ours}.attentions.{k}"] = f"{block}.{first + 1}"

    n = 1
    for level, down in enumerate(unet.down_blocks):
        for k in range(len(down.resnets)):
            add(f"down_blocks.{level}", k, f"input_blocks.{n}")
            n += 1
        if down.downsamplers:
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    add("mid_block", 0, "middle_block")
    add("mid_block", 1, "middle_block", 2)
    n = 0
    for level, up in enumerate(unet.up_blocks):
        for k in range(len(up.resnets)):
            add(f"up_blocks.{level}", k, f"output_blocks.{n}")
            n += 1
        if up.upsamplers:  # at the end of the level's last block
            last = 2 if hasattr(up, "attentions") else 1
            names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{last}.conv"
    return names


def _vae_names(vae: AutoencoderKL) -> dict[str, str]:
    _check_built_in("vae", vae.config)
    names = {name: name for name in ("quant_conv", "post_quant_conv")}
    levels = len(vae.config.block_out_channels)
    for half, blocks, direction in (
        ("encoder", vae.encoder.down_blocks, "down"),
        ("decoder", vae.decoder.up_blocks, "up"),
    ):
        names |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        names[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        resnets = {f"{half}.mid_block.resnets.{k}": f"{half}.mid.block_{k + 1}" for k in range(2)}
        for level, block in enumerate(blocks):
            original = f"{half}.{direction}.{level if direction == 'down' else levels - 1 - level}"
            resnets |= {
                f"{half}.{direction}_blocks.{level}.resnets.{k}": f"{original}.block.{k}"
                for k in range(len(block.resnets))
            }
            names[f"{half}.{direction}_blocks.{level}.{direction}samplers.0.conv"] = (
                f"{original}.{direction}sample.conv"
            )
        names |= {f"{ours}.{a}": f"{theirs}.{b}" for ours, theirs in resnets.items() for a, b in _VAE_RESNET.items()}
        names |= {f"{half}.mid_block.attentions.0.{a}": f"{half}.mid.attn_1.{b}" for a, b in _VAE_ATTENTION.items()}
    return names


def _check_built_in(network: str, config: Mapping[str, Any]) -> None:
    for name, value in _BUILT_IN[network].items():
        if config.get(name, value) != value:
            raise UserError(
                f"{network} {name} {config[name]!r}: the original layout supports only {value!r}; keep this model as a "
                "folder"
            )
    if unsupported := sorted({*config["down_block_types"], *config["up_block_types"]} - _BLOCKS):
        raise UserError(
            f"{network} block {unsupported[0]}: the original layout supports only {', '.join(sorted(_BLOCKS))}; keep "
            "this model as a folder"
        )


def _is_openclip(text_encoder: CLIPTextModel) -> bool:
    """Return whether a tower is saved in OpenCLIP's layout. OpenAI's CLIPs have another activation function."""
    config = text_encoder.config
    return config.hidden_act != "quick_gelu" and config.num_hidden_layers < _OPENCLIP_LAYERS
