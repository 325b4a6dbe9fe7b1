"""The configuration of stage 1, the autoencoder."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from autoencoder import AdversarialKind, ReconstructionKind
from train.config.optimizer import strict
from train.config.resumable import Place, Resumable
from train.config.run import RunConfig, on_squares


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


@dataclass(frozen=True, kw_only=True, config=strict)
class AdversarialConfig:
    """A patch discriminator (Isola et al. 2017) trained beside the autoencoder."""

    kind: Literal["none", AdversarialKind] = "none"
    """The game's loss: `hinge` (Lim & Ye 2017), or the cross-entropy of Goodfellow et al. 2014 with either generator."""
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
    """Weight of half the squared gradient of its verdict on pictures (Mescheder et al. 2018); 0 leaves it out."""


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
