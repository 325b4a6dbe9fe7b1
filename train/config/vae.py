"""The configuration of stage 1, the autoencoder."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, assert_never

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
    """Shape of the AutoencoderKL. Each side of a latent is 2^(levels - 1) times smaller than the image's."""

    channels: tuple[int, ...] = (64, 128, 128)
    """Feature maps of each level, finest first."""
    layers: int = Field(default=1, gt=0)
    """Residual blocks per level (the decoder has one more)."""
    latent_channels: int = Field(default=4, gt=0)
    """Channels of the latents."""
    groups: int = Field(default=32, gt=0)
    """Groups of the group normalisation; the channels of every level must be divisible by it."""
    attention: bool = True
    """Self-attention in the middle block."""

    def build(self, resolution: int) -> "AutoencoderKL":
        """Return the network with random weights, for images of this side."""
        from autoencoder.model import build_autoencoder

        return build_autoencoder(
            channels=self.channels,
            layers=self.layers,
            latent_channels=self.latent_channels,
            groups=self.groups,
            attention=self.attention,
            resolution=resolution,
        )

    @classmethod
    def of(cls, vae: "AutoencoderKL") -> Self:
        """Return the shape of a network."""
        c = vae.config
        return cls(
            channels=tuple(c.block_out_channels),
            layers=c.layers_per_block,
            latent_channels=c.latent_channels,
            groups=c.norm_num_groups,
            attention=c.mid_block_add_attention,
        )


@dataclass(frozen=True, kw_only=True, config=strict)
class PerceptualConfig:
    """Distance in the features of a frozen network, added to the reconstruction error."""

    kind: Literal["none", "lpips_vgg", "lpips_alex", "clip"] = "none"
    """Distance: LPIPS (Zhang et al. 2018) with VGG16 or AlexNet; `clip`: the image tower of a CLIP, e.g. stage 0's."""
    model: Place = ""
    """Folder (or hub id) of the CLIP, or file of torchvision's VGG16 or AlexNet weights; empty: downloaded."""
    weight: float = Field(default=1.0, gt=0)
    """Weight relative to the reconstruction error."""

    @model_validator(mode="after")
    def _has_a_model(self) -> Self:
        if self.kind == "clip" and not self.model:
            raise ValueError("perceptual.kind clip needs perceptual.model, e.g. a stage 0 run's model/")
        if self.kind == "none" and self.model:
            raise ValueError(f"perceptual.model {self.model!r} without perceptual.kind: lpips_vgg, lpips_alex or clip")
        return self

    def build(self) -> "nn.Module | None":
        """Return the frozen network that measures the distance, or None."""
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
    """Patch discriminator (Isola et al. 2017) that is trained together with the autoencoder."""

    kind: Literal["none", AdversarialKind] = "none"
    """Losses: `hinge` (Lim & Ye 2017), or cross-entropy with either generator loss of Goodfellow et al. 2014."""
    weight: float = Field(default=0.5, gt=0)
    """Weight of the autoencoder's adversarial loss."""
    adaptive: bool = True
    """Multiply the weight by ‖∇ reconstruction‖ / ‖∇ adversarial‖ at the decoder's last layer (Esser et al. 2021)."""
    start: int = Field(default=1000, ge=0)
    """Step at which the discriminator and the adversarial loss start."""
    channels: int = Field(default=32, gt=0)
    """Feature maps of the discriminator's first layer."""
    layers: int = Field(default=2, gt=0)
    """Strided layers of the discriminator."""
    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate of the discriminator, with the same schedule."""
    spectral_norm: bool = False
    """Normalise the largest singular value of each discriminator layer to 1 (Miyato et al. 2018)."""
    r1: float = Field(default=0.0, ge=0)
    """R1 penalty: weight of half the squared gradient of the mean logit at images (Mescheder et al. 2018); 0: off."""


@dataclass(frozen=True, kw_only=True, config=strict)
class EquivarianceConfig:
    """Equivariance of latents to rotation and scaling (EQ-VAE, Kouzelis et al. 2025): smoother and easier to learn."""

    share: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps whose latents are transformed before decoding; 0 turns it off, the paper uses 0.5."""
    smallest: float = Field(default=0.25, gt=0, le=1)
    """Smallest scale factor; each side is scaled by a factor between this and 1."""


@dataclass(frozen=True, kw_only=True, config=strict)
class VaeConfig(RunConfig):
    """Stage 1: an autoencoder from random weights or a given one; its latents are normalised to mean 0, variance 1."""

    stage: ClassVar = "vae"
    init: Place = ""
    """Folder (or hub id) of an AutoencoderKL to start from, instead of random weights; its shape replaces `model`."""
    decoder_only: bool = False
    """Train only the decoder: the latents don't change, so a UNet trained on them still works. Needs `init`."""
    model: AutoencoderConfig = Field(default_factory=AutoencoderConfig)
    """The network."""
    reconstruction: ReconstructionKind = "l1"
    """Error of the pixel values: absolute, squared, or squared below and absolute above 0.1 (of a range of 2)."""
    kl_weight: float = Field(default=1e-6, ge=0)
    """Weight of the KL divergence to N(0, 1), in nats per pixel value (summed over a latent, divided by 3·h·w)."""
    learn_logvar: bool = False
    """Learn the scale s of the reconstruction error and perceptual distance: divide both by exp(s), and add s."""
    perceptual: PerceptualConfig = Field(default_factory=PerceptualConfig)
    """Perceptual term."""
    adversarial: AdversarialConfig = Field(default_factory=AdversarialConfig)
    """Adversarial term."""
    equivariance: EquivarianceConfig = Field(default_factory=EquivarianceConfig)
    """Equivariance term."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, much less memory."""
    validation_examples: Annotated[int, Resumable()] = Field(default=512, gt=0)
    """Largest number of held-out images reconstructed in a validation."""
    validation_features: Place = ""
    """Features of the Fréchet distance of reconstructions: `inception`, `dinov2`, `clip`, or a folder or hub id; empty:
    not measured."""

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
        """Return the autoencoder to start from. This run normalises its latents, unless only the decoder is trained."""
        import torch

        from autoencoder.model import SCALING_FACTOR, Autoencoder

        torch.manual_seed(self.seed)  # torch's global generator is used for the initial weights only
        if not self.init:
            return self.model.build(self.input.resolution)
        vae = Autoencoder.load(self.init).vae.float().train().requires_grad_(True)
        if self.model not in (given := AutoencoderConfig.of(vae), AutoencoderConfig()):
            raise UserError(f"init {self.init!r} has another shape, {given}: leave `model` out of the configuration")
        if not self.decoder_only:
            vae.register_to_config(scaling_factor=SCALING_FACTOR)
        return vae

    def build_discriminator(self, factor: int) -> "PatchDiscriminator | None":
        """Return the discriminator, or None. Raises UserError if it is too deep for the smallest training images."""
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
                f"adversarial.layers {shape.layers} needs images of {discriminator.smallest} pixels a side, not {side}: "
                "take fewer layers, or a larger resolution or equivariance.smallest"
            )
        return discriminator
