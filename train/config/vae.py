"""The configuration of stage 1, the autoencoder."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, assert_never

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from autoencoder import AdversarialKind, Normalisation, ReconstructionKind
from ldm.errors import UserError
from train.config.limits import MOST_EXAMPLES, MOST_LAYERS, MOST_LEVELS, MOST_STEPS, Count, require_possible
from train.config.optimizer import strict
from train.config.resumable import ON_REQUEST, Fixed, Location, Resumable
from train.config.run import RunConfig, require_cache, require_squares

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from torch import nn

    from autoencoder.discriminator import PatchDiscriminator


@dataclass(frozen=True, kw_only=True, config=strict)
class AutoencoderConfig:
    """Shape of the AutoencoderKL. A latent's sides are 2^(levels − 1) times shorter than the image's."""

    channels: tuple[Count, ...] = Field(default=(64, 128, 128), min_length=1, max_length=MOST_LEVELS)
    """Number of channels of each level, finest level first; each further level halves the sides of the latents."""
    layers: int = Field(default=1, gt=0, le=MOST_LAYERS)
    """Number of residual blocks per level (the decoder has one more)."""
    latent_channels: Count = 4
    """Number of channels of the latents."""
    groups: Count = 32
    """Number of groups of the group normalisation; must divide the channels of every level."""
    attention: bool = True
    """Self-attention in the middle block, at the lowest resolution."""

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        require_possible(
            (36 * self.layers * c**2 for c in self.channels), f"channels {self.channels}, layers {self.layers}"
        )
        return self

    def build(self, resolution: int) -> "AutoencoderKL":
        """Return the network with random weights, for images with sides of `resolution` pixels."""
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
    """Perceptual loss: a distance in the features of a frozen network, added to the reconstruction error."""

    kind: Annotated[Literal["none", "lpips_vgg", "lpips_alex", "clip"], ON_REQUEST] = "none"
    """Perceptual distance; `none`: no perceptual loss.
    `lpips_vgg`, `lpips_alex`: LPIPS (Zhang et al. 2018) with VGG16 or AlexNet.
    `clip`: the distance between features of a CLIP's image tower."""
    model: Location = ""
    """Folder or hub id of the CLIP, e.g. a stage 0 run, or file of torchvision's VGG16 or AlexNet weights.
    Empty: VGG16 and AlexNet are downloaded; `clip` needs a folder or hub id."""
    weight: Annotated[float, ON_REQUEST] = Field(default=1.0, ge=0)
    """Weight of the perceptual loss; the reconstruction error has weight 1.
    0: the distance is measured on the held-out images, but not trained on."""

    @model_validator(mode="after")
    def _has_a_model(self) -> Self:
        if self.kind == "clip" and not self.model:
            raise ValueError(
                "perceptual.kind clip needs perceptual.model: the folder or hub id of a CLIP, e.g. runs/clip/model"
            )
        if self.kind == "none" and self.model:
            raise ValueError(
                f"perceptual.model {self.model!r} without perceptual.kind: set it to lpips_vgg, lpips_alex or clip"
            )
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
    """Adversarial loss from a patch discriminator (Isola et al. 2017), which is trained with the autoencoder."""

    kind: Annotated[Literal["none", AdversarialKind], Resumable(on_request=True, never="none")] = "none"
    """Kind of adversarial loss; `none`: no discriminator. `hinge`: Lim & Ye 2017.
    `saturating`, `non_saturating`: cross-entropy with the two generator losses of Goodfellow et al. 2014."""
    weight: Annotated[float, ON_REQUEST] = Field(default=0.5, gt=0)
    """Weight of the adversarial loss in the autoencoder's loss."""
    adaptive: Annotated[bool, ON_REQUEST] = True
    """Multiply the weight by ‖∇ reconstruction‖ / ‖∇ adversarial‖ at the decoder's last layer (Esser et al. 2021)."""
    start: Annotated[int, ON_REQUEST] = Field(default=1000, ge=0, le=MOST_STEPS)
    """First step with the adversarial loss, from which the discriminator is trained too."""
    channels: Annotated[int, Fixed()] = Field(default=32, gt=0, le=2**10)
    """Number of channels of the discriminator's first layer."""
    layers: Annotated[int, Fixed()] = Field(default=2, gt=0, le=MOST_LEVELS)
    """Number of strided layers of the discriminator; more layers compare larger patches."""
    lr: Annotated[float, ON_REQUEST] = Field(default=1e-4, gt=0)
    """Peak learning rate of the discriminator; it follows the schedule of the optimizer settings."""
    spectral_norm: Annotated[bool, Fixed()] = False
    """Keep the largest singular value of each discriminator layer at 1 (spectral normalisation, Miyato et al. 2018)."""
    r1: Annotated[float, ON_REQUEST] = Field(default=0.0, ge=0)
    """Weight of the R1 penalty of the discriminator (Mescheder et al. 2018); 0: no penalty.
    The penalty is half the squared gradient of the mean logit with respect to original images."""


@dataclass(frozen=True, kw_only=True, config=strict)
class EquivarianceConfig:
    """Equivariance of the latents to rotation and scaling, for easier diffusion (EQ-VAE, Kouzelis et al. 2025)."""

    share: Annotated[float, ON_REQUEST] = Field(default=0.0, ge=0, le=1)
    """Share of the steps, 0 to 1, in which latents are rotated and scaled before decoding; 0: none.
    EQ-VAE (Kouzelis et al. 2025) uses 0.5."""
    smallest: Annotated[float, ON_REQUEST] = Field(default=0.25, gt=0, le=1)
    """Smallest factor by which a side is scaled, greater than 0 and at most 1; factors are drawn between it and 1."""


@dataclass(frozen=True, kw_only=True, config=strict)
class VaeConfig(RunConfig):
    """Stage 1: train an autoencoder, new or pretrained, and normalise its latents to mean 0 and variance 1."""

    stage: ClassVar = "vae"
    init: Location = ""
    """Folder or hub id of an AutoencoderKL to train further; its shape replaces `model`. Empty: random weights."""
    decoder_only: Annotated[bool, Fixed()] = False
    """Train only the decoder, so that latents don't change and a UNet trained on them still works. Needs `init`."""
    model: Annotated[AutoencoderConfig, Fixed()] = Field(default_factory=AutoencoderConfig)
    """Shape of the autoencoder."""
    reconstruction: Annotated[ReconstructionKind, ON_REQUEST] = "l1"
    """Error of each pixel value: `l1` (absolute), `l2` (squared) or `huber` (squared below 0.1, absolute above).
    Pixel values are in [−1, 1]."""
    kl_weight: Annotated[float, ON_REQUEST] = Field(default=1e-6, ge=0)
    """Weight of the KL divergence of the latents from N(0, 1).
    The divergence is summed over an image's latents, in nats, and divided by the image's number of values (3·h·w)."""
    normalisation: Annotated[Normalisation, ON_REQUEST] = "channels"
    """Linear map that normalises the latents, which becomes part of the exported weights (not with decoder_only).
    `channels`: each channel gets a variance of 1.
    `pixels`: errors of the latents change the image equally in each direction, and the mean variance is 1;
    stage 2 of the demo then becomes better (docs/autoencoder.md)."""
    learn_logvar: Annotated[bool, Fixed()] = False
    """Learn a scale s for the sum of reconstruction and perceptual loss: divide it by exp(s), and add s to the loss."""
    perceptual: PerceptualConfig = Field(default_factory=PerceptualConfig)
    """Perceptual loss."""
    adversarial: AdversarialConfig = Field(default_factory=AdversarialConfig)
    """Adversarial loss."""
    equivariance: EquivarianceConfig = Field(default_factory=EquivarianceConfig)
    """Equivariance of the latents."""
    encode_once: Annotated[bool, ON_REQUEST] = False
    """Encode the training images once for the statistics of the latents and for stage 2, which needs the same setting.
    The encoder runs in `precision` (fp16: fp32), and its outputs are stored in `cache`.
    Else the statistics are computed in fp32, and nothing is stored."""
    gradient_checkpointing: Annotated[bool, ON_REQUEST] = False
    """Recompute activations in the backward pass instead of storing them: about a third slower, much less memory."""
    validation_examples: Annotated[int, Resumable()] = Field(default=512, gt=0, le=MOST_EXAMPLES)
    """Largest number of held-out images that a validation reconstructs. If there are more, the seed chooses them."""
    validation_features: Location = ""
    """Network that computes features for the Fréchet distance between images and reconstructions.
    One of `inception`, `inception:WEIGHTS.pth`, `dinov2` and `clip`, or folder or hub id of another CLIP or DINOv2.
    Empty: the distance isn't measured."""

    @model_validator(mode="after")
    def _requires_squares(self) -> Self:
        return require_cache(require_squares(self))

    @model_validator(mode="after")
    def _decoder_only_fits(self) -> Self:
        if self.decoder_only and not self.init:
            raise ValueError("decoder_only needs init: the folder or hub id of the autoencoder whose encoder is kept")
        if self.decoder_only and self.equivariance.share:
            raise ValueError(
                f"decoder_only with equivariance.share {self.equivariance.share}: the latents aren't trained; "
                "set equivariance.share to 0"
            )
        return self

    def build(self) -> "AutoencoderKL":
        """Return the autoencoder to start from.

        Its scaling factor is that of normalised latents, unless only the decoder is trained.
        """
        import torch

        from autoencoder.model import SCALING_FACTOR, Autoencoder

        torch.manual_seed(self.seed)  # torch's global generator is used for the initial weights only
        if not self.init:
            return self.model.build(self.input.resolution)
        vae = Autoencoder.load(self.init).vae.float().train().requires_grad_(True)
        if self.model not in (shape := AutoencoderConfig.of(vae), AutoencoderConfig()):
            raise UserError(
                f"init {self.init!r} has another shape than the configuration's model: {shape}; leave `model` out"
            )
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
                f"adversarial.layers {shape.layers} needs images of {discriminator.smallest} pixels per side, "
                f"but the smallest have {side}; use fewer layers, a larger resolution or a larger equivariance.smallest"
            )
        return discriminator
