"""What other tools can't see in a single file, and what to do there: one line for each.

A single file contains weights. From them, ComfyUI and AUTOMATIC1111 guess which Stable Diffusion it is, and assume the
rest: number of heads, noise schedule, prediction target, vocabulary. So a model is compared with what they assume.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ldm.errors import UserError
from ldm.formats.scheduler_config import Process, name_betas
from ldm.libraries import AutoencoderKL, CLIPTokenizer, UNet2DConditionModel
from ldm.networks.backbone import Backbone
from ldm.networks.text_tower import TextTower
from ldm.networks.unet import UNet
from ldm.schedule import BetaSchedule, Schedule

_CLIP_TOKENS = 49408  # size of CLIP's vocabulary
_CLIP_VOCABULARY = "1b471dc4527418e5992de992b19032daebf4b3a052ffb1332375b3edb22e5ca9"  # SHA-256 of its tokens by id
_OPENCLIP_LAYERS = 24  # Stable Diffusion 2 uses all but the last


class _Autoencoder(Protocol):
    vae: AutoencoderKL


class _TextEncoder(Protocol):
    model: TextTower
    tokenizer: CLIPTokenizer

    def diffusers_limits(self) -> str | None: ...

    def save_flat(self, folder: Path) -> None: ...


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


_SHARED: dict[str, Any] = {
    "target": "eps",
    "timesteps": 1000,
    "noise schedule": "scaled_linear from 0.00085 to 0.012",
    "zero_terminal_snr": False,
    "unet block_out_channels": [320, 640, 1280, 1280],
    "unet layers_per_block": 2,
    "unet attention": [True, True, True, False],
    "unet depth of attention": 1,
    "unet norm_num_groups": 32,
    "unet resnet_time_scale_shift": "default",
    "vae latent_channels": 4,
    "vae block_out_channels": [128, 256, 512, 512],
    "vae layers_per_block": 2,
    "vae norm_num_groups": 32,
    "vae mid_block_add_attention": True,
    "scaling factor": 0.18215,
    "text vocabulary": "CLIP's",
    "text length": 77,
}
ORIGINALS: dict[str, dict[str, Any]] = {
    "1": _SHARED
    | {
        "unet heads": [8, 8, 8, 8],
        "unet linear projections": False,
        "unet condition width": 768,
        "text layers": 12,
        "text heads": 12,
        "text activation": "quick_gelu",
        "text padding": "end token",
    },
    "2": _SHARED
    | {
        "unet heads": [5, 10, 20, 20],
        "unet linear projections": True,
        "unet condition width": 1024,
        "text layers": 23,
        "text heads": 16,
        "text activation": "gelu",
        "text padding": "token 0",
    },
}
"""Facts about Stable Diffusion 1 and 2, which other tools assume."""
TEXT = ("unet condition width", *(name for name in ORIGINALS["1"] if name.startswith("text ")))
"""Facts about the text encoder."""

_SHAPE = "other tools need {name}.yaml (AUTOMATIC1111) or config=FOLDER (diffusers); ComfyUI can't load it"
_TEXT = "prompts have no meaning in ComfyUI; AUTOMATIC1111 uses the text encoder that {name}.yaml names"
_SCHEDULE = "ComfyUI can't sample it; AUTOMATIC1111 uses the schedule in the file"
_CONSEQUENCES = {
    "timesteps": _SCHEDULE,
    "noise schedule": _SCHEDULE,
    "zero_terminal_snr": "in ComfyUI, set zsnr in the node ModelSamplingDiscrete; AUTOMATIC1111 and Forge find `ztsnr` "
    "in the file",
    "unet heads": "ComfyUI generates bad images; other tools need {name}.yaml (AUTOMATIC1111) or config=FOLDER "
    "(diffusers)",
    "scaling factor": "tools that assume Stable Diffusion's will generate different images",
    "text padding": "tools pad prompts as Stable Diffusion does, so that images differ",
}
_TARGETS = {
    "v": "in ComfyUI, use the node ModelSamplingDiscrete with v_prediction; AUTOMATIC1111 and Forge need {name}.yaml "
    "beside the file",
    "x0": "in ComfyUI, use the node ModelSamplingDiscrete with x0; AUTOMATIC1111 and Forge can't sample it",
    "flow": "ComfyUI, AUTOMATIC1111 and Forge can't sample it",
}


def family(model: Model) -> str:
    """Return "1" or "2": the version of Stable Diffusion that readers take a file for."""
    unet = unet_of(model).config
    return "2" if unet.use_linear_projection or unet.cross_attention_dim == 1024 else "1"


def architecture(model: Model) -> str:
    """Return the architecture for a file's metadata: that of a Stable Diffusion only if the shapes are the same."""
    version = family(model)
    own, assumed = facts(model), ORIGINALS[version] | {"unet heads": facts(model)["unet heads"]}
    if any(own[fact] != assumed[fact] for fact in own if fact.startswith(("unet ", "vae ", "text "))):
        return "latent-diffusion"
    if version == "1":
        return "stable-diffusion-v1"
    return "stable-diffusion-v2-768-v" if model.process.target == "v" else "stable-diffusion-v2-512"


def limits(model: Model, name: str) -> list[str]:
    """Return one line for each thing that other tools can't do with a model's single file, or can't know.

    name: name of the file, without its suffix.
    """
    parts = (model.process, model.text_encoder, model.backbone)
    lines = [line for part in parts if (line := part.diffusers_limits())]
    version = family(model)
    channels = unet_of(model).config.block_out_channels
    heads = {"1": [8] * len(channels), "2": [c // 64 for c in channels]}[version]
    assumed = ORIGINALS[version] | {"unet heads": heads}
    for fact, value in facts(model).items():
        if value != (expected := assumed[fact]):
            default = _TEXT if fact.startswith("text ") else _SHAPE
            consequence = _TARGETS[value] if fact == "target" else _CONSEQUENCES.get(fact, default)
            lines.append(f"{fact} {value} differs from Stable Diffusion's {expected}: {consequence.format(name=name)}")
    return lines


def facts(model: Model) -> dict[str, Any]:
    """Return the facts about a model that are in `ORIGINALS`."""
    unet, vae, text = unet_of(model).config, model.autoencoder.vae.config, model.text_encoder.model.config
    tokenizer, schedule = model.text_encoder.tokenizer, model.process.schedule
    own = has_own_vocabulary(model.text_encoder)
    end = tokenizer.pad_token_id == tokenizer.eos_token_id
    return {
        "target": model.process.target,
        "timesteps": schedule.T,
        "noise schedule": schedule_name(schedule),
        "zero_terminal_snr": schedule.zero_terminal_snr and isinstance(schedule, BetaSchedule),
        "unet block_out_channels": list(unet.block_out_channels),
        "unet layers_per_block": unet.layers_per_block,
        "unet attention": [block.startswith("CrossAttn") for block in unet.down_block_types],
        "unet depth of attention": depth_of(unet),
        "unet norm_num_groups": unet.norm_num_groups,
        "unet resnet_time_scale_shift": unet.resnet_time_scale_shift,
        "unet heads": heads_of(unet),
        "unet linear projections": unet.use_linear_projection,
        "unet condition width": unet.cross_attention_dim,
        "vae latent_channels": vae.latent_channels,
        "vae block_out_channels": list(vae.block_out_channels),
        "vae layers_per_block": vae.layers_per_block,
        "vae norm_num_groups": vae.norm_num_groups,
        "vae mid_block_add_attention": vae.mid_block_add_attention,
        "scaling factor": vae.scaling_factor,
        "text vocabulary": f"of its own, {len(tokenizer)} tokens" if own else "CLIP's",
        "text length": text.max_position_embeddings,
        "text layers": text.num_hidden_layers,
        "text heads": text.num_attention_heads,
        "text activation": text.hidden_act,
        "text padding": "end token" if end else f"token {tokenizer.pad_token_id}",
    }


def unet_of(model: Model) -> UNet2DConditionModel:
    """Return a model's UNet. Raises UserError if it has another network."""
    if isinstance(model.backbone, UNet):
        return model.backbone.module
    raise UserError(
        f"network {model.backbone.describe()}: has no counterpart in the original layout; keep this model as a folder"
    )


def heads_of(unet: Mapping[str, Any]) -> list[int]:
    """Return the number of attention heads of each level, from a UNet's configuration."""
    # diffusers' name is a historical mistake: it is the number of heads, not their width.
    heads, levels = unet["attention_head_dim"], len(unet["block_out_channels"])
    return [heads] * levels if isinstance(heads, int) else list(heads)


def depth_of(unet: Mapping[str, Any]) -> int | list[Any]:
    """Return the number of transformer layers in a block of attention; a list if the levels differ."""
    depth = unet["transformer_layers_per_block"]
    levels = [depth] if isinstance(depth, int) else list(depth)
    return levels[0] if all(level == levels[0] for level in levels) else levels


def schedule_name(schedule: Schedule) -> str:
    """Return the kind and betas of a schedule, as they are before the rescaling to zero terminal SNR."""
    if not isinstance(schedule, BetaSchedule):
        return "flow"
    name = name_betas(schedule)
    if name is None:
        return "of other betas"
    kind, start, end = name
    return kind if kind == "squaredcos_cap_v2" else f"{kind} from {start:g} to {end:g}"


def has_own_vocabulary(text_encoder: _TextEncoder) -> bool:
    """Return whether a text encoder's tokens aren't those of OpenAI's CLIP, which other tools use."""
    tokenizer = text_encoder.tokenizer
    if text_encoder.model.config.vocab_size != _CLIP_TOKENS:
        return True
    tokens = tokenizer.get_vocab()
    in_order = json.dumps(sorted(tokens, key=lambda token: tokens[token])).encode()
    return len(tokens) == _CLIP_TOKENS and hashlib.sha256(in_order).hexdigest() != _CLIP_VOCABULARY


def is_openclip(text_encoder: _TextEncoder) -> bool:
    """Return whether a tower came from OpenCLIP, and is written in its layout.

    OpenAI's CLIPs have another activation function, and stage 0's a vocabulary of their own. Readers drop the 24th
    layer of a tower in this layout, so one that uses it is written in OpenAI's.
    """
    config = text_encoder.model.config
    return (
        config.hidden_act != "quick_gelu"
        and config.num_hidden_layers < _OPENCLIP_LAYERS
        and not has_own_vocabulary(text_encoder)
    )
