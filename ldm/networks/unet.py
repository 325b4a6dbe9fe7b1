"""The cross-attention UNet (Rombach et al. 2022, sec. 3.3) as a backbone. Its blocks are diffusers'.

Only this module and the single-file format, which stores a UNet, read the fields of diffusers' UNet2DConditionModel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ldm.consistency import guidance_embedding
from ldm.denoiser import ScaledNetwork
from ldm.errors import UserError
from ldm.formats.hub import WEIGHTS, load_network
from ldm.libraries import UNet2DConditionModel
from ldm.networks.attention import AttentionBackend, KeysValues, use_attention
from ldm.networks.backbone import Backbone
from ldm.networks.unet_sampling import DeepFeatures, PromptOnce, UNetCore, keys_values, pooled_text, time_features

_INPAINTING_CHANNELS = 9  # input channels of diffusers' inpainting UNets
_BLOCKS = (
    "CrossAttnDownBlock2D",
    "DownBlock2D",
    "ResnetDownsampleBlock2D",
    "UNetMidBlock2DCrossAttn",
    "UNetMidBlock2D",
    "CrossAttnUpBlock2D",
    "UpBlock2D",
    "ResnetUpsampleBlock2D",
)
_SUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "addition_embed_type": ((None, "text"), "a UNet with additional inputs"),
    "class_embed_type": ((None,), "a class-conditional UNet"),
    "num_class_embeds": ((None,), "a class-conditional UNet"),
    "encoder_hid_dim": ((None,), "a UNet with a projection of its condition"),
    "encoder_hid_dim_type": ((None,), "a UNet with a projection of its condition"),
    "dual_cross_attention": ((False, None), "a UNet with two conditions"),
    "attention_type": (("default",), "a UNet with positioned objects (GLIGEN)"),
    "cross_attention_norm": ((None,), "a UNet whose attention normalises its condition"),
    "only_cross_attention": ((False, None), "a UNet without self-attention"),
    "mid_block_only_cross_attention": ((None, False), "a UNet without self-attention"),
}
"""Supported values of a UNet's config.json, the default first, and what another value means. `AttentionProcessor` and
the calls of the UNet would ignore such a setting or fail."""


@dataclass(frozen=True)
class UNet(Backbone):
    """diffusers' UNet2DConditionModel as a backbone."""

    module: UNet2DConditionModel
    part: ClassVar[str] = "unet"

    @classmethod
    def wrap(cls, module: UNet2DConditionModel, latent_channels: int) -> Self:
        """Return the UNet as a backbone. Input channels after the first `latent_channels` are context."""
        config = module.config
        size = config.sample_size
        return cls(
            module,
            latent_channels=latent_channels,
            out_channels=config.out_channels,
            condition_width=config.cross_attention_dim,
            sample_size=(size, size) if isinstance(size, int) else tuple(size),
            context_channels=config.in_channels - latent_channels,
            guidance_width=config.time_cond_proj_dim or 0,
            size_multiple=2 ** (len(config.block_out_channels) - 1),
        )

    def adapt(self, context: int, side: int) -> Self:
        """Set the latent size to `side` × `side`, and add `context` input channels if there is no context, in place."""
        if context and not self.context_channels:
            widen(self.module, self.latent_channels + context)
        if self.sample_size != (side, side):
            self.module.register_to_config(sample_size=side)
        return self.wrap(self.module, self.latent_channels)

    def __call__(
        self,
        x: Tensor,
        time: Tensor,
        condition: Tensor,
        scale: Tensor | None = None,
        keys_values: KeysValues | None = None,
    ) -> Tensor:
        """Predict, as in `Backbone`. keys_values: those of the condition, computed before."""
        return self.module(
            x.to(self.dtype),
            time,
            condition,
            timestep_cond=self._guidance(time, scale),
            cross_attention_kwargs=None if keys_values is None else {"keys_values": keys_values},
            return_dict=False,
        )[0]

    def _guidance(self, time: Tensor, scale: Tensor | None) -> Tensor | None:
        """Return the embedding of guidance scales (b,); None for a UNet that doesn't read them."""
        if not self.guidance_width:
            return None
        scale = torch.ones(len(time), device=time.device) if scale is None else scale
        return guidance_embedding(scale, self.guidance_width).to(self.dtype)

    def for_sampling(self, reuse_features: int = 1) -> ScaledNetwork:
        return PromptOnce(self) if reuse_features == 1 else DeepFeatures(self, reuse_features)

    def core(self) -> nn.Module:
        return UNetCore(self.module)

    def per_step(self, time: Tensor, scale: Tensor | None = None) -> Tensor:
        return time_features(self.module, time, self._guidance(time, scale))

    def per_prompt(self, condition: Tensor) -> tuple[Tensor, ...]:
        pooled = pooled_text(self.module, condition)
        pairs = keys_values(self.module, condition).values()
        return (*([] if pooled is None else [pooled]), *(x for pair in pairs for x in pair))

    def save(self, folder: Path) -> None:
        self.module.save_pretrained(str(folder), safe_serialization=True)

    def diffusers_limits(self) -> str | None:
        if not self.context_channels or self.in_channels == _INPAINTING_CHANNELS:
            return None
        return (
            f"inpainting UNet with {self.in_channels} input channels: diffusers' StableDiffusionInpaintPipeline "
            f"supports only {_INPAINTING_CHANNELS}; use ldm-inpaint or LatentDiffusionPipeline"
        )

    def describe(self) -> str:
        return f"channels {', '.join(map(str, self.module.config.block_out_channels))}"

    def set_attention(
        self, backend: AttentionBackend, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Literal["sdpa", "xformers"]:
        return use_attention(self.module, backend, dtype, device)

    def enable_gradient_checkpointing(self) -> None:
        self.module.enable_gradient_checkpointing()


def build_unet(
    *,
    channels: Sequence[int],
    layers: int,
    attention: Sequence[bool],
    heads: Sequence[int],
    depth: int = 1,
    groups: int = 32,
    modulation: bool = False,
    linear_projections: bool = False,
    learned_variance: bool = False,
    latent_channels: int,
    latent_size: int,
    text_width: int,
) -> UNet2DConditionModel:
    """Build a UNet2DConditionModel with random weights and an output of zero.

    `heads[k]` is the number of attention heads of level k. With `linear_projections`, the layers before and after its
    transformer blocks are linear, as in Stable Diffusion 2, and not 1×1 convolutions. With `modulation`,
    attention-pooled text features are added to the time embedding, which then scales and shifts every residual block
    (FiLM, Perez et al. 2018). A learned variance doubles the output channels. The last layer of every residual branch
    also starts at zero, so that each block is the identity at first, as in the reference implementation of Dhariwal &
    Nichol 2021. Raises UserError if the numbers don't fit together.
    """
    for level, (c, h) in enumerate(zip(channels, heads, strict=True)):
        if c % groups or c % h:
            raise UserError(
                f"unet.channels {c} of level {level}: must be a multiple of {groups} (groups) and {h} (heads)"
            )
    if modulation and text_width % heads[0]:
        raise UserError(
            f"unet.modulation: the width {text_width} of the text features must be a multiple of {heads[0]}, the "
            "number of heads of level 0"
        )
    if latent_size % 2 ** (len(channels) - 1):
        raise UserError(
            f"latents of {latent_size}×{latent_size} can't be halved {len(channels) - 1} times: use fewer "
            "unet.channels or another resolution"
        )
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention))
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels * (1 + learned_variance),
        down_block_types=down,
        up_block_types=up,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        cross_attention_dim=text_width,
        # The number of heads, not their width: diffusers' name is a historical mistake.
        attention_head_dim=tuple(heads),
        transformer_layers_per_block=depth,
        use_linear_projection=linear_projections,
        norm_num_groups=groups,
        addition_embed_type="text" if modulation else None,
        addition_embed_type_num_heads=heads[0],
        resnet_time_scale_shift="scale_shift" if modulation else "default",
    )
    for name, module in unet.named_modules():
        if name == "conv_out" or name.endswith((".conv2", ".proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    use_attention(unet)
    return unet


def load_unet(folder: str | Path) -> UNet2DConditionModel:
    """Load the UNet of a pipeline's folder, on the CPU. Raises UserError if it can't be read."""
    unet: UNet2DConditionModel = load_network(
        UNet2DConditionModel, Path(folder) / UNet.part, f"the UNet of {str(folder)!r}", _try, check_supported
    )
    use_attention(unet)
    return unet


def _try(unet: UNet2DConditionModel) -> None:
    """Predict from a small latent. Raises ValueError if the output has another size."""
    side = 2 ** len(unet.config.block_out_channels)
    text = torch.empty(1, 2, unet.config.cross_attention_dim)
    predicted = unet(torch.empty(1, unet.config.in_channels, side, side), torch.empty(1), text, return_dict=False)[0]
    if predicted.shape[2:] != (side, side):
        raise ValueError(
            f"its config.json gives an output of {tuple(predicted.shape[2:])} for an input of {(side, side)}"
        )


def check_supported(config: Mapping[str, Any]) -> None:
    """Raise UserError for the config.json of a UNet that needs other inputs or attention than Stable Diffusion's."""
    for name, (supported, kind) in _SUPPORTED.items():
        if (value := config.get(name, supported[0])) not in supported:
            if name == "addition_embed_type" and value == "text_time":
                kind = "a UNet of Stable Diffusion XL"
            raise UserError(f"{name} {value!r}: {kind}, which isn't supported; use a UNet like Stable Diffusion 1 or 2")
    blocks = (*config.get("down_block_types", ()), config.get("mid_block_type"), *config.get("up_block_types", ()))
    if unsupported := [block for block in blocks if block and block not in _BLOCKS]:
        raise UserError(f"block {unsupported[0]!r}: must be one of {', '.join(_BLOCKS)}")
    if (reads := config.get("time_cond_proj_dim")) is not None and not (isinstance(reads, int) and reads > 0):
        raise UserError(f"time_cond_proj_dim {reads!r}: must be the width of the guidance scale's embedding, or null")
    side, width = config.get("sample_size"), config.get("cross_attention_dim", 1280)
    if not isinstance(side, int) and not (isinstance(side, list) and len(side) == 2):
        raise UserError(f"sample_size {side!r}: must be the side of the latents, e.g. 64, or their height and width")
    if not isinstance(width, int):
        raise UserError(f"cross_attention_dim {width!r}: must be one number for the whole UNet")


def weight_files(folder: str | Path) -> list[Path]:
    """Return the UNet's weight files in a pipeline's folder, sorted by name."""
    return sorted((Path(folder) / UNet.part).glob(f"{WEIGHTS}*.safetensors"))


@torch.no_grad()
def widen(unet: UNet2DConditionModel, channels: int) -> None:
    """Widen a UNet's input to `channels` channels, in place. The new weights are zero, so its output doesn't change."""
    old = unet.conv_in
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, padding=old.padding).to(old.weight)
    nn.init.zeros_(new.weight)
    new.weight[:, : old.in_channels] = old.weight
    assert new.bias is not None
    new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=channels)


def add_guidance(unet: UNet2DConditionModel, width: int = 256) -> None:
    """Let a UNet read its guidance scale, in place, from an embedding of this width, as diffusers' UNets do.

    The new weights are zero, so its output doesn't change at first.
    """
    first = unet.time_embedding.linear_1
    projection = nn.Linear(width, first.in_features, bias=False).to(first.weight)
    nn.init.zeros_(projection.weight)
    unet.time_embedding.cond_proj = projection
    unet.register_to_config(time_cond_proj_dim=width)


def require_same_shape(unet: nn.Module, configured: nn.Module, source: str) -> None:
    """Raise UserError if a UNet's weights have other names or shapes than the configured UNet's.

    The first layer may have any number of input channels. source: where the UNet comes from, for the message.
    """
    expected, actual = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (configured, unet))
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name) and name != "conv_in.weight":
            raise UserError(
                f"{source}: {name} has shape {actual.get(name, 'missing')}, but the configuration needs "
                f"{expected.get(name, 'missing')}; change the unet options, or leave them out"
            )
