"""The configuration of stage 2, the latent diffusion model."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, assert_never

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from conditioning import MOST_CHUNKS
from ldm.kinds import AttentionBackend, LossKind, ObjectiveKind, ScheduleKind, Spacing, Target, VarianceKind
from ldm.task import Task
from train.config.optimizer import strict
from train.config.resumable import Place, Resumable
from train.config.run import RunConfig

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from ldm.formats.scheduler_config import Process
    from ldm.objective import Objective, Weighting
    from ldm.schedule import Schedule
    from ldm.timesteps import Timesteps


@dataclass(frozen=True, kw_only=True, config=strict)
class UnetConfig:
    """Shape of the UNet2DConditionModel."""

    channels: tuple[int, ...] = (128, 256)
    """Feature maps of each level, finest first."""
    layers: int = Field(default=1, gt=0)
    """Residual blocks per level (the upward half has one more)."""
    attention: tuple[bool, ...] = (True, True)
    """Presence of transformer blocks (self- and cross-attention) at each level."""
    heads: tuple[int, ...] = (4, 8)
    """Attention heads of each level; the width of a head is the level's channels / heads."""
    depth: int = Field(default=1, gt=0)
    """Transformer blocks after each residual block."""
    modulation: bool = False
    """Scale and shift every residual block by the pooled text features; Stable Diffusion's UNet doesn't do this."""
    groups: int = Field(default=32, gt=0)
    """Groups of the group normalisation; the channels of every level must be divisible by it."""

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        if not len(self.channels) == len(self.attention) == len(self.heads):
            raise ValueError(
                f"channels {self.channels}, attention {self.attention} and heads {self.heads} need one entry a level"
            )
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
            groups=self.groups,
            latent_channels=latent_channels,
            latent_size=latent_size,
            learned_variance=learned_variance,
            text_width=text_width,
        )


@dataclass(frozen=True, kw_only=True, config=strict)
class DiffusionConfig:
    """Settings of the forward process, the prediction target and the loss."""

    schedule: ScheduleKind = "scaled_linear"
    """Noise schedule. `flow` (with target flow, v or x0) is rectified flow, which stock pipelines can't sample."""
    timesteps: int = Field(default=1000, gt=1)
    """Number of discrete timesteps, T."""
    beta_start: float = Field(default=0.00085, gt=0, lt=1)
    """First beta of `linear`, `scaled_linear` (also called `quadratic`) and `sigmoid`."""
    beta_end: float = Field(default=0.012, gt=0, lt=1)
    """Last beta of the same schedules."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that the last timestep is pure noise (Lin et al. 2024); needs target v, x0 or flow."""
    shift: float = Field(default=1.0, gt=0)
    """Shift of `flow` towards noise at higher resolution: √(ratio of latent sizes in elements) (Esser et al. 2024)."""
    target: Target = "eps"
    """Prediction target: the noise, the clean latent, the velocity of Salimans & Ho (2022), or the flow's velocity."""
    variance: VarianceKind = "fixed_small"
    """Variance of ddpm's sampling steps; `learned` (Nichol & Dhariwal 2021) doubles the network's output channels."""
    objective: ObjectiveKind = "simple"
    """`simple`: weighted error; `vlb`: variational bound; `hybrid`: simple, plus the bound for a learned variance."""
    weighting: Literal["uniform", "min_snr", "p2", "edm"] = "uniform"
    """Weights of the timesteps in the simple loss: Hang et al. 2023, Choi et al. 2022, Karras et al. 2022."""
    gamma: float = Field(default=5.0, gt=0)
    """Signal-to-noise ratio at which min_snr clips."""
    p2_gamma: float = Field(default=1.0, ge=0)
    """Strength with which p2 reduces the weights at low noise; its k is 1."""
    sigma_data: float = Field(default=1.0, gt=0)
    """Standard deviation of the data in edm's weights; latents are normalised to 1."""
    loss: LossKind = "l2"
    """Error function of the prediction."""
    timestep_sampling: Literal["uniform", "logit_normal", "importance"] = "uniform"
    """Distribution of timesteps: uniform, logit-normal (Esser et al. 2024), or by loss (Nichol & Dhariwal 2021)."""
    logit_mean: float = 0.0
    """Mean of the logit-normal distribution of timesteps; values above 0 favour high noise."""
    logit_std: float = Field(default=1.0, gt=0)
    """Standard deviation of the logit-normal distribution of timesteps."""
    stratified: bool = False
    """Spread each batch's timesteps evenly: draw one from each of batch_size equal intervals."""
    offset_noise: float = Field(default=0.0, ge=0)
    """Strength of the noise shared by a whole channel; about 0.1 makes very dark or very bright images possible."""
    spacing: Spacing = "trailing"
    """Spacing of the samplers' steps over the timesteps; saved with the model."""

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
    def _bound_is_plain(self) -> Self:
        if self.objective != "simple" and self.offset_noise:
            raise ValueError(
                f"offset_noise {self.offset_noise} with objective {self.objective}: the bound is one of plain noise"
            )
        if self.objective != "simple" and self.timestep_sampling == "logit_normal":
            raise ValueError(
                f"timestep_sampling logit_normal with objective {self.objective}: take uniform or importance"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=strict)
class LdmConfig(RunConfig):
    """Stage 2: a cross-attention UNet over the latents, conditioned on the text encoder's tokens."""

    stage: ClassVar = "ldm"
    task: Task = "txt2img"
    """Task of the model. `inpaint`: the UNet also receives a mask and the masked image, 2 · latent channels + 1
    channels in all, and learns to fill masks of any kind; best started from a text-to-image model as `init`."""
    init: Place = ""
    """Folder (or hub id) of a pipeline whose UNet is the start, instead of random weights; its shape replaces `unet`.
    Its autoencoder and text encoder are used too, unless `vae` and `text_encoder` are given."""
    vae: Place = ""
    """Folder (or hub id) of the autoencoder: a stage 1 run's model/, or a diffusers AutoencoderKL."""
    text_encoder: Place = ""
    """Folder (or hub id) of the text encoder: a stage 0 run's model/, a CLIP, or a pipeline's folder; or an OpenCLIP as
    openclip:ARCHITECTURE/TAG."""
    clip_skip: int = Field(default=0, ge=0)
    """Number of final text encoder layers to skip, e.g. 1 for the features of the penultimate layer."""
    text_chunks: int = Field(default=0, ge=0, le=MOST_CHUNKS)
    """Windows of the text encoder's length into which a caption is split; the rest is cut. Stock pipelines read one.
    0: the number saved with the text encoder, else 1."""
    unet: UnetConfig = Field(default_factory=UnetConfig)
    """The network."""
    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig)
    """The diffusion process and the loss."""
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of examples that get the empty caption, for classifier-free guidance (Ho & Salimans 2022)."""
    attention: Annotated[AttentionBackend, Resumable()] = "sdpa"
    """Attention: `sdpa` (torch), `xformers` on a GPU (pip install -e '.[xformers]') or `auto`: xformers if it works."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, much less memory."""
    validation_examples: Annotated[int, Resumable()] = Field(default=512, gt=0)
    """Largest number of held-out examples in the validation loss; their timesteps and noise are fixed."""
    prompts: Annotated[tuple[str, ...], Resumable()] = ()
    """Prompts of the sample sheets; empty: captions of held-out images."""
    sample_steps: Annotated[int, Resumable()] = Field(default=25, gt=0)
    """Sampler steps of the sample sheets."""
    guidance_scale: Annotated[float, Resumable()] = Field(default=3.0, ge=0)
    """Guidance scale of the sample sheets; 1 is the conditional prediction alone."""

    @model_validator(mode="after")
    def _crops_are_to_be_had(self) -> Self:
        crop, crops = self.input.crop, self.input.crops
        if self.cache == "off" and crops:
            raise ValueError(f"input.crops {crops} with cache off: every image is cropped anew, none is kept")
        if self.cache != "off" and crop == "random" and not crops:
            raise ValueError(
                "input.crop random with cached latents: say how many crops of each image to keep (--input.crops 4), "
                "or give --cache off"
            )
        return self

    @model_validator(mode="after")
    def _sheets_have_prompts(self) -> Self:
        if self.task == "inpaint" and self.prompts:
            raise ValueError("prompts with task inpaint: its sheets are of held-out images, by their captions")
        return self

    def check(self) -> None:
        self.build_objective()

    def build_objective(self) -> "Objective":
        """The loss. Raises UserError where its parts, or the steps of the sheets, don't go together."""
        from ldm.samplers import make_sampler
        from ldm.spacing import plan

        objective = self.diffusion.build_objective()
        plan(objective.schedule, make_sampler("dpmpp_2m").grid, self.sample_steps, self.diffusion.spacing)
        return objective
