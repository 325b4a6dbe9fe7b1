"""The configuration of stage 2, the latent diffusion model."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, assert_never

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from conditioning import MOST_CHUNKS
from ldm.kinds import LossKind, ObjectiveKind, ScheduleKind, Spacing, Target, VarianceKind
from ldm.task import Task
from train.config.latent import LatentConfig
from train.config.limits import (
    MOST_LAYERS,
    MOST_LEVELS,
    Count,
    require_possible,
)
from train.config.optimizer import strict
from train.config.resumable import ON_REQUEST, Fixed, Location, Resumable

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from ldm.formats.scheduler_config import Process
    from ldm.objective import Objective, Weighting
    from ldm.schedule import Schedule
    from ldm.timesteps import Timesteps


_MEANING = Fixed("it changes the meaning of the network's outputs")
_FEATURES = Fixed("the network was trained with these features of the captions")


@dataclass(frozen=True, kw_only=True, config=strict)
class UnetConfig:
    """Shape of the UNet, a diffusers UNet2DConditionModel."""

    channels: tuple[Count, ...] = Field(default=(128, 256), min_length=1, max_length=MOST_LEVELS)
    """Number of channels of each level, finest level first."""
    layers: int = Field(default=1, gt=0, le=MOST_LAYERS)
    """Number of residual blocks per level (the upward half has one more)."""
    attention: tuple[bool, ...] = (True, True)
    """Transformer blocks (self- and cross-attention) at each level: True or False per level, finest first."""
    heads: tuple[Count, ...] = (4, 8)
    """Number of attention heads of each level, finest first; a head has channels / heads features."""
    depth: int = Field(default=1, gt=0, le=MOST_LAYERS)
    """Number of transformer blocks after each residual block, at levels that have them."""
    modulation: bool = False
    """Scale and shift every residual block by the pooled text features; Stable Diffusion's UNet doesn't do this."""
    linear_projections: bool = False
    """Linear layers before and after the transformer blocks, as in Stable Diffusion 2, instead of 1×1 convolutions."""
    groups: Count = 32
    """Number of groups of the group normalisation; must divide the channels of every level."""

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        if not len(self.channels) == len(self.attention) == len(self.heads):
            raise ValueError(
                f"channels {self.channels}, attention {self.attention} and heads {self.heads}: "
                "each must have one entry per level"
            )
        return self

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        weights = (
            self.layers * (36 + 40 * attends * self.depth) * c**2
            for c, attends in zip(self.channels, self.attention, strict=True)
        )
        require_possible(weights, f"channels {self.channels}, layers {self.layers}, depth {self.depth}")
        return self

    def build(
        self, *, latent_channels: int, latent_size: int, text_width: int, learned_variance: bool = False
    ) -> "UNet2DConditionModel":
        """Return the network with random weights, for latents of this side and text features of this width."""
        from ldm.networks.unet import build_unet

        return build_unet(
            channels=self.channels,
            layers=self.layers,
            attention=self.attention,
            heads=self.heads,
            depth=self.depth,
            modulation=self.modulation,
            linear_projections=self.linear_projections,
            groups=self.groups,
            latent_channels=latent_channels,
            latent_size=latent_size,
            learned_variance=learned_variance,
            text_width=text_width,
        )


@dataclass(frozen=True, kw_only=True, config=strict)
class DiffusionConfig:
    """Settings of the forward process, the prediction target and the loss."""

    schedule: Annotated[ScheduleKind, _MEANING] = "scaled_linear"
    """Noise schedule, a variance-preserving one or `flow`; docs/mathematics.md gives the formulas.
    `flow` is rectified flow: it needs target flow, v or x0, and diffusers can't sample the model."""
    timesteps: Annotated[int, _MEANING] = Field(default=1000, gt=1, le=100_000)
    """Number of discrete timesteps T, at least 2."""
    beta_start: Annotated[float, _MEANING] = Field(default=0.00085, gt=0, lt=1)
    """Beta of the first timestep, between 0 and 1, in schedules linear, sigmoid, and scaled_linear or quadratic."""
    beta_end: Annotated[float, _MEANING] = Field(default=0.012, gt=0, lt=1)
    """Beta of the last timestep, between 0 and 1, in the same schedules."""
    zero_terminal_snr: Annotated[bool, _MEANING] = False
    """Rescale the betas so that the last timestep is pure noise (Lin et al. 2024); needs target v, x0 or flow."""
    shift: Annotated[float, _MEANING] = Field(default=1.0, ge=1e-3, le=1e3)
    """Shift of schedule `flow` towards more noise, for higher resolutions (Esser et al. 2024); 1: no shift.
    If 1 is best for some resolution, use √n for latents with n times as many elements."""
    target: Annotated[Target, _MEANING] = "eps"
    """Prediction target of the network: `eps` (the noise), `x0` (the clean latent), or one of two velocities.
    `v` is the velocity of Salimans & Ho (2022), `flow` that of rectified flow."""
    variance: Annotated[VarianceKind, Resumable(on_request=True, never="learned")] = "fixed_small"
    """Variance of the steps of sampler ddpm: `fixed_small` and `fixed_large` are the two choices of Ho et al. 2020.
    `learned` (Nichol & Dhariwal 2021) interpolates between them, and doubles the network's output channels."""
    objective: Annotated[ObjectiveKind, ON_REQUEST] = "simple"
    """Training objective: `simple` (weighted error of the prediction), `vlb` (variational bound) or `hybrid`.
    `hybrid` is `simple`, plus the bound to train a learned variance."""
    weighting: Annotated[Literal["uniform", "min_snr", "p2", "edm"], ON_REQUEST] = "uniform"
    """Weights of the timesteps in objective `simple`; `uniform`: every timestep has weight 1.
    Others: `min_snr` (Hang et al. 2023), `p2` (Choi et al. 2022), `edm` (Karras et al. 2022)."""
    gamma: Annotated[float, ON_REQUEST] = Field(default=5.0, gt=0)
    """Signal-to-noise ratio above which weighting min_snr clips the weights."""
    p2_gamma: Annotated[float, ON_REQUEST] = Field(default=1.0, ge=0, le=100)
    """Exponent of weighting p2: for target eps, the weight is 1 / (1 + SNR)^p2_gamma, which is small at low noise."""
    sigma_data: Annotated[float, ON_REQUEST] = Field(default=1.0, gt=0)
    """Standard deviation of the latents in weighting edm; stage 1 normalises them to 1."""
    loss: Annotated[LossKind, ON_REQUEST] = "l2"
    """Error of the prediction's elements: `l2` (squared), `l1` (absolute) or `huber` (squared below 1, else linear)."""
    timestep_sampling: Annotated[
        Literal["uniform", "logit_normal", "importance"], Resumable(on_request=True, never="importance")
    ] = "uniform"
    """Distribution of the training timesteps: `uniform`, `logit_normal` (Esser et al. 2024) or `importance`.
    `importance` draws timesteps with a large loss more often (Nichol & Dhariwal 2021)."""
    logit_mean: Annotated[float, ON_REQUEST] = Field(default=0.0, ge=-100, le=100)
    """Mean of the logit-normal distribution of timesteps; values above 0 favour high noise."""
    logit_std: Annotated[float, ON_REQUEST] = Field(default=1.0, gt=0, le=100)
    """Standard deviation of the logit-normal distribution of timesteps."""
    stratified: Annotated[bool, ON_REQUEST] = False
    """Spread the timesteps of a batch evenly: divide their range into batch_size intervals, and draw one from each."""
    offset_noise: Annotated[float, ON_REQUEST] = Field(default=0.0, ge=0)
    """Strength of additional noise that is constant over each channel of a latent; 0: none.
    About 0.1 lets the model generate very dark and very bright images."""
    spacing: Annotated[Spacing, ON_REQUEST] = "trailing"
    """Spacing of the samplers' steps over the timesteps; saved with the model as its default.
    `leading`, `trailing`, `linspace`: Lin et al. 2024, table 2. `karras`: Karras et al. 2022."""

    def build_schedule(self) -> "Schedule":
        """Return the noise schedule. Raises UserError if its values are incompatible."""
        from ldm.schedule import Schedule

        return Schedule.build(
            self.schedule, self.timesteps, self.beta_start, self.beta_end, self.zero_terminal_snr, self.shift
        )

    def build_process(self) -> "Process":
        """Return the process that is saved with the model. Raises UserError if schedule values are incompatible."""
        from ldm.formats.scheduler_config import Process

        return Process(schedule=self.build_schedule(), target=self.target, spacing=self.spacing, variance=self.variance)

    def build_objective(self) -> "Objective":
        """Return the training objective. Raises UserError if its parts are incompatible."""
        from ldm.objective import Objective, edm, min_snr, p2
        from ldm.timesteps import Importance, LogitNormal, uniform

        weighting: Weighting | None
        match self.weighting:
            case "uniform":
                weighting = None
            case "min_snr":
                weighting = min_snr(self.gamma)
            case "p2":
                weighting = p2(self.p2_gamma)
            case "edm":
                weighting = edm(self.sigma_data)
            case _:
                assert_never(self.weighting)
        timesteps: Timesteps
        match self.timestep_sampling:
            case "uniform":
                timesteps = uniform
            case "logit_normal":
                timesteps = LogitNormal(self.logit_mean, self.logit_std)
            case "importance":
                timesteps = Importance(min(100, self.timesteps))
            case _:
                assert_never(self.timestep_sampling)
        return Objective(
            self.build_schedule(), self.target, weighting, self.loss, self.objective, self.variance, timesteps
        )

    @model_validator(mode="after")
    def _objective_fits(self) -> Self:
        if self.objective != "simple" and self.offset_noise:
            raise ValueError(
                f"offset_noise {self.offset_noise} with objective {self.objective}: the bound needs independent noise; "
                "set offset_noise to 0 or objective to simple"
            )
        if self.objective != "simple" and self.timestep_sampling == "logit_normal":
            raise ValueError(
                f"timestep_sampling logit_normal with objective {self.objective}: "
                "set timestep_sampling to uniform or importance"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=strict)
class LdmConfig(LatentConfig):
    """Stage 2: train a UNet that denoises latents and reads the caption's tokens by cross-attention."""

    stage: ClassVar = "ldm"
    task: Annotated[Task, Fixed()] = "txt2img"
    """Task of the model: `txt2img` (text to image), or `inpaint` (fill the masked area of an image).
    For `inpaint`, the UNet also receives a mask and the masked image: it has 2 · latent channels + 1 input channels.
    It is best initialised from a text-to-image model (`init`)."""
    init: Location = ""
    """Folder, hub id or single file of a pipeline whose UNet is trained further; its shape replaces `unet`.
    A single file needs NAME.yaml beside it, unless it is a Stable Diffusion 1. Empty: random weights.
    Its autoencoder and text encoder are used too, unless `vae` and `text_encoder` are given."""
    vae: Location = ""
    """Folder or hub id of the autoencoder: a stage 1 run, or a diffusers AutoencoderKL. Required without `init`."""
    text_encoder: Location = ""
    """Folder or hub id of the text encoder: a stage 0 run, a CLIP, or a pipeline that has one. Required without `init`.
    For an OpenCLIP: openclip:ARCHITECTURE/TAG, e.g. openclip:ViT-B-32/laion2b_s34b_b79k."""
    clip_skip: Annotated[int, _FEATURES] = Field(default=0, ge=0, le=MOST_LAYERS)
    """Number of layers to skip at the end of the text encoder: 0 uses the last layer's features, 1 the one before."""
    text_chunks: Annotated[int, _FEATURES] = Field(default=0, ge=0, le=MOST_CHUNKS)
    """Number of chunks into which a long caption is split, each as long as the text encoder accepts.
    Longer captions are truncated. diffusers reads only 1 chunk.
    0: the number saved with the text encoder, else 1."""
    unet: Annotated[UnetConfig, Fixed()] = Field(default_factory=UnetConfig)
    """Shape of the UNet."""
    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig)
    """Diffusion process and loss."""
    caption_dropout: Annotated[float, ON_REQUEST] = Field(default=0.1, ge=0, lt=1)
    """Share of examples, 0 to 1, whose caption is replaced by an empty one.
    Classifier-free guidance (Ho & Salimans 2022) needs a model that is also trained without captions."""

    @model_validator(mode="after")
    def _sheets_have_prompts(self) -> Self:
        if self.task == "inpaint" and self.prompts:
            raise ValueError(
                "prompts with task inpaint: its sample sheets use held-out images and captions; leave prompts out"
            )
        return self

    @property
    def own_features(self) -> str:
        return self.text_encoder or self.init

    def check(self) -> None:
        self.build_objective()

    def build_objective(self) -> "Objective":
        """Return the training objective.

        Raises UserError if its parts are incompatible with each other or with the sheets' sampler steps.
        """
        from ldm.samplers import make_sampler
        from ldm.spacing import make_plan

        objective = self.diffusion.build_objective()
        make_plan(objective.schedule, make_sampler("dpmpp_2m").grid, self.sample_steps, self.diffusion.spacing)
        return objective
