"""The configuration of stage 1, the autoencoder."""

from typing import TYPE_CHECKING, Annotated, Literal, Self, assert_never

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from autoencoder import AdversarialKind, ReconstructionKind
from ldm.errors import UserError
from train.config.optimizer import strict
from train.config.resumable import Place, Resumable
from train.config.run import RunConfig, on_squares

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import nn

    from autoencoder.discriminator import PatchDiscriminator


@dataclass(frozen=True, kw_only=True, config=strict)
class AutoencoderConfig:
    """AutoencoderKL's shape. Its latents are 2^(levels - 1) times smaller than the picture a side."""

    channels: tuple[int, ...] = (64, 128, 128)
    """Feature maps of each level, finest first."""
    layers: int = Field(default=1, gt=0)
    """Residual blocks a level (the decoder has one more)."""
    latent_channels: int = Field(default=4, gt=0)
    """Channels of a latent."""
    groups: int = Field(default=32, gt=0)
    """Groups of the group normalisation; divides every level's channels."""
    attention: bool = True
    """Self-attention in the middle block."""

    def build(self, resolution: int) -> "AutoencoderKL":
        """The network from random weights, for pictures of this side."""
        from autoencoder.model import build_autoencoder

        return build_autoencoder(
            channels=self.channels, layers=self.layers, latent_channels=self.latent_channels, groups=self.groups,
            attention=self.attention, resolution=resolution,
        )  # fmt: skip

    @classmethod
    def of(cls, vae: "AutoencoderKL") -> Self:
        """The shape of a network."""
        c = vae.config
        return cls(
            channels=tuple(c.block_out_channels), layers=c.layers_per_block, latent_channels=c.latent_channels,
            groups=c.norm_num_groups, attention=c.mid_block_add_attention,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, config=strict)
class PerceptualConfig:
    """A distance in the features of a frozen network, added to the reconstruction error."""

    kind: Literal["none", "lpips_vgg", "lpips_alex", "clip"] = "none"
    """LPIPS (Zhang et al. 2018) over VGG16 or AlexNet; `clip`: the image tower of a CLIP, e.g. one that stage 0 trained."""
    model: Place = ""
    """Folder (or hub id) of the CLIP; or file of torchvision's VGG16 or AlexNet, empty: downloaded."""
    weight: float = Field(default=1.0, gt=0)
    """Weight beside the reconstruction error."""

    @model_validator(mode="after")
    def _has_a_model(self) -> Self:
        if self.kind == "clip" and not self.model:
            raise ValueError("perceptual.kind clip needs perceptual.model, e.g. a stage 0 run's model/")
        if self.kind == "none" and self.model:
            raise ValueError(f"perceptual.model {self.model!r} without perceptual.kind: lpips_vgg, lpips_alex or clip")
        return self

    def build(self) -> "nn.Module | None":
        """The frozen network that measures the distance."""
        from autoencoder.perceptual import ClipPerceptual, Lpips

        match self.kind:
            case "none":
                return None
            case "lpips_vgg":
                return Lpips("vgg", self.model)
            case "lpips_alex":
                return Lpips("alex", self.model)
            case "clip":
                return ClipPerceptual(self.model)
            case _:
                assert_never(self.kind)


@dataclass(frozen=True, kw_only=True, config=strict)
class AdversarialConfig:
    """A patch discriminator (Isola et al. 2017) trained beside the autoencoder."""

    kind: Literal["none", AdversarialKind] = "none"
    """The losses: `hinge` (Lim & Ye 2017), or the cross-entropy of Goodfellow et al. 2014 with either generator."""
    weight: float = Field(default=0.5, gt=0)
    """Weight of the autoencoder's adversarial loss."""
    adaptive: bool = True
    """Times ‖∇ reconstruction‖ / ‖∇ adversarial‖ at the decoder's last layer (Esser et al. 2021)."""
    start: int = Field(default=1000, ge=0)
    """Step at which the discriminator and the loss begin."""
    channels: int = Field(default=32, gt=0)
    """Feature maps of the discriminator's first layer."""
    layers: int = Field(default=2, gt=0)
    """Its strided layers."""
    lr: float = Field(default=1e-4, gt=0)
    """Its learning rate, under the same schedule."""
    spectral_norm: bool = False
    """Hold its layers' largest singular values at 1 (Miyato et al. 2018)."""
    r1: float = Field(default=0.0, ge=0)
    """Weight of half the squared gradient of its mean logit at pictures (Mescheder et al. 2018); 0 leaves it out."""


@dataclass(frozen=True, kw_only=True, config=strict)
class EquivarianceConfig:
    """Latents that turn and shrink with their pictures (EQ-VAE, Kouzelis et al. 2025): smoother, and easier to learn."""

    share: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps whose latents are transformed before they are decoded; 0 leaves it out, the paper has 0.5."""
    smallest: float = Field(default=0.25, gt=0, le=1)
    """Each side is reduced to between this share and the whole of it."""


@dataclass(frozen=True, kw_only=True, config=strict)
class VaeConfig(RunConfig):
    """Stage 1: an autoencoder from random weights or a given one; its latents come out with mean 0 and variance 1."""

    init: Place = ""
    """Folder (or hub id) of an AutoencoderKL to begin with, instead of random weights; its shape then holds, not `model`."""
    decoder_only: bool = False
    """Train the decoder alone: the latents, and what a UNet has learned of them, stay as they are. Needs `init`."""
    model: AutoencoderConfig = Field(default_factory=AutoencoderConfig)
    """The network."""
    reconstruction: ReconstructionKind = "l1"
    """Error of the picture elements: absolute, squared, or squared below and absolute above 0.1 (of a range of 2)."""
    kl_weight: float = Field(default=1e-6, ge=0)
    """Weight of the KL divergence to N(0, 1), in nats a picture element (summed over a latent, divided by 3·h·w)."""
    learn_logvar: bool = False
    """Learn the scale of the reconstruction error and perceptual distance: both over exp(s), plus s."""
    perceptual: PerceptualConfig = Field(default_factory=PerceptualConfig)
    """Perceptual term."""
    adversarial: AdversarialConfig = Field(default_factory=AdversarialConfig)
    """Adversarial term."""
    equivariance: EquivarianceConfig = Field(default_factory=EquivarianceConfig)
    """Equivariance term."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: about a third slower, far less memory."""
    validation_examples: Annotated[int, Resumable()] = Field(default=512, gt=0)
    """Held-out pictures that a validation reconstructs, at most."""
    validation_features: Place = ""
    """Of the Fréchet distance of reconstructions: `inception`, `dinov2`, `clip`, or a folder or hub id; empty: not measured."""

    @model_validator(mode="after")
    def _sees_squares(self) -> Self:
        return on_squares(self)

    @model_validator(mode="after")
    def _has_an_encoder(self) -> Self:
        if self.decoder_only and not self.init:
            raise ValueError("decoder_only needs an autoencoder whose encoder is kept: give init")
        if self.decoder_only and self.equivariance.share:
            raise ValueError("decoder_only with equivariance.share: the latents, which it is about, aren't trained")
        return self

    def build(self) -> "AutoencoderKL":
        """The autoencoder to begin with. Its latents are normalised by this run, unless the decoder alone is trained."""
        import torch

        from autoencoder.model import SCALING_FACTOR, Autoencoder

        torch.manual_seed(self.seed)  # the only use of torch's global generator: initial weights
        if not self.init:
            return self.model.build(self.input.resolution)
        vae = Autoencoder.load(self.init).vae.float().train().requires_grad_(True)
        if self.model not in (given := AutoencoderConfig.of(vae), AutoencoderConfig()):
            raise UserError(f"init {self.init!r} has another shape, {given}: leave `model` out of the configuration")
        if not self.decoder_only:
            vae.register_to_config(scaling_factor=SCALING_FACTOR)
        return vae

    def build_discriminator(self, factor: int) -> "PatchDiscriminator | None":
        """The discriminator, if any. Raises UserError where it is too deep for the smallest pictures it will be shown."""
        from autoencoder.discriminator import PatchDiscriminator
        from autoencoder.equivariance import draw

        shape = self.adversarial
        if shape.kind == "none":
            return None
        discriminator = PatchDiscriminator(shape.channels, shape.layers, spectral=shape.spectral_norm)
        smallest = self.equivariance.smallest if self.equivariance.share else 1.0
        side = factor * draw((0, 0, 0), self.input.resolution // factor, smallest).height
        if side < discriminator.smallest:
            raise UserError(
                f"adversarial.layers {shape.layers} needs pictures of {discriminator.smallest} pixels a side, not {side}: "
                "take fewer layers, or a larger resolution or equivariance.smallest"
            )
        return discriminator
