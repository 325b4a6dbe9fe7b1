"""The configuration of stage 2, the latent diffusion model."""

from typing import TYPE_CHECKING, Annotated, Literal, Self, assert_never

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
    """UNet2DConditionModel's shape."""

    channels: tuple[int, ...] = (128, 256)
    """Feature maps of each level, finest first."""
    layers: int = Field(default=1, gt=0)
    """Residual blocks a level (the upward half has one more)."""
    attention: tuple[bool, ...] = (True, True)
    """Which levels have transformer blocks (self- and cross-attention)."""
    heads: tuple[int, ...] = (4, 8)
    """Attention heads of each level; a level's channels divided by them are a head's width."""
    depth: int = Field(default=1, gt=0)
    """Transformer blocks after each residual block."""
    modulation: bool = False
    """Pooled text features also scale and shift every residual block; Stable Diffusion's UNet has none of it."""
    groups: int = Field(default=32, gt=0)
    """Groups of the group normalisation; divides every level's channels."""

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
        """The network from random weights, for latents of this side and text features of this width."""
        from ldm.networks.unet import build_unet

        return build_unet(
            channels=self.channels, layers=self.layers, attention=self.attention, heads=self.heads, depth=self.depth,
            modulation=self.modulation, groups=self.groups, latent_channels=latent_channels, latent_size=latent_size,
            learned_variance=learned_variance, text_width=text_width,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, config=strict)
class DiffusionConfig:
    """The forward process, what the network predicts, and how its errors are weighed."""

    schedule: ScheduleKind = "scaled_linear"
    """Noise over the timesteps; `flow` (with target flow, v or x0) is rectified flow, which stock pipelines can't sample."""
    timesteps: int = Field(default=1000, gt=1)
    """T, the number of discrete timesteps."""
    beta_start: float = Field(default=0.00085, gt=0, lt=1)
    """First beta of `linear`, `scaled_linear` (also called `quadratic`) and `sigmoid`."""
    beta_end: float = Field(default=0.012, gt=0, lt=1)
    """Last beta of the same."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that the last timestep is pure noise (Lin et al. 2024); needs target v, x0 or flow."""
    shift: float = Field(default=1.0, gt=0)
    """Resolution shift of `flow` towards noise: the root of how many times more elements a latent has (Esser et al. 2024)."""
    target: Target = "eps"
    """What the network predicts: the noise, the clean latent, the velocity of Salimans & Ho (2022), or the flow's."""
    variance: VarianceKind = "fixed_small"
    """Of the ddpm sampler's steps; `learned` (Nichol & Dhariwal 2021) doubles the network's output channels."""
    objective: ObjectiveKind = "simple"
    """`simple`: the weighted error; `vlb`: the variational bound; `hybrid`: simple, with the bound for a learned variance."""
    weighting: Literal["uniform", "min_snr", "p2", "edm"] = "uniform"
    """Weights of the timesteps in the simple loss: Hang et al. 2023, Choi et al. 2022, Karras et al. 2022."""
    gamma: float = Field(default=5.0, gt=0)
    """Where min_snr cuts the signal-to-noise ratio."""
    p2_gamma: float = Field(default=1.0, ge=0)
    """How strongly p2 turns from low noise; its k is 1."""
    sigma_data: float = Field(default=1.0, gt=0)
    """The data's standard deviation in edm's weights; latents are normalised to 1."""
    loss: LossKind = "l2"
    """Of the prediction's error."""
    timestep_sampling: Literal["uniform", "logit_normal", "importance"] = "uniform"
    """Which timesteps are trained on: all alike, mostly the middle (Esser et al. 2024), or by their loss (Nichol & Dhariwal 2021)."""
    logit_mean: float = 0.0
    """Of logit_normal; above 0 leans to noise."""
    logit_std: float = Field(default=1.0, gt=0)
    """Of logit_normal."""
    stratified: bool = False
    """Spread each batch's timesteps evenly, one in each of batch_size equal parts."""
    offset_noise: float = Field(default=0.0, ge=0)
    """Share of noise that a whole channel has in common; about 0.1 lets pictures be very dark or very bright."""
    spacing: Spacing = "trailing"
    """How samplers space their steps over the timesteps; saved with the model."""

    def build_schedule(self) -> "Schedule":
        """The noise schedule. Raises UserError where its numbers don't go together."""
        from ldm.schedule import Schedule

        return Schedule.build(
            self.schedule, self.timesteps, self.beta_start, self.beta_end, self.zero_terminal_snr, self.shift
        )  # fmt: skip

    def build_process(self) -> "Process":
        """What is saved with the model. Raises UserError as above."""
        from ldm.formats.scheduler_config import Process

        return Process(
            schedule=self.build_schedule(), target=self.target, spacing=self.spacing, variance=self.variance
        )  # fmt: skip

    def build_objective(self) -> "Objective":
        """The loss. Raises UserError where its parts don't go together."""
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
        )  # fmt: skip

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

    task: Task = "txt2img"
    """`inpaint`: the UNet is also shown a mask and the picture without what is under it, 2 · latent channels + 1 in all, and
    learns to paint under masks of any kind. Best begun with a text-to-image model as `init`."""
    init: Place = ""
    """Folder (or hub id) of a pipeline whose UNet to begin with, instead of random weights; its shape then holds, not `unet`.
    Where `vae` and `text_encoder` aren't given, they are the pipeline's too."""
    vae: Place = ""
    """Folder (or hub id) of the autoencoder: a stage 1 run's model/, or a diffusers AutoencoderKL."""
    text_encoder: Place = ""
    """Folder (or hub id) of the text encoder: a stage 0 run's model/, a CLIP, or a pipeline's folder; or an OpenCLIP as
    openclip:ARCHITECTURE/TAG."""
    clip_skip: int = Field(default=0, ge=0)
    """Last layers of the text encoder that are left out, e.g. 1 for the penultimate one's features."""
    text_chunks: int = Field(default=0, ge=0, le=MOST_CHUNKS)
    """Windows of the text encoder's length that a caption is read in, what is longer is cut; stock pipelines read one.
    0: as the text encoder was saved, else one."""
    unet: UnetConfig = Field(default_factory=UnetConfig)
    """The network."""
    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig)
    """The process and the loss."""
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of examples trained with the empty caption, for classifier-free guidance (Ho & Salimans 2022)."""
    attention: Annotated[AttentionBackend, Resumable()] = "sdpa"
    """`sdpa`: torch's own; `xformers` on a GPU (pip install -e '.[xformers]'); `auto`: xformers where it works."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: about a third slower, far less memory."""
    validation_examples: Annotated[int, Resumable()] = Field(default=512, gt=0)
    """Held-out examples of the validation loss, at most; their timesteps and noise are fixed."""
    prompts: Annotated[tuple[str, ...], Resumable()] = ()
    """Prompts of the sample sheets; empty: captions of held-out pictures."""
    sample_steps: Annotated[int, Resumable()] = Field(default=25, gt=0)
    """Sampler steps of the sheets."""
    guidance_scale: Annotated[float, Resumable()] = Field(default=3.0, ge=0)
    """Guidance of the sheets; 1 is the conditional prediction alone."""

    @model_validator(mode="after")
    def _crops_are_to_be_had(self) -> Self:
        crop, crops = self.input.crop, self.input.crops
        if self.cache == "off" and crops:
            raise ValueError(f"input.crops {crops} with cache off: every picture is cropped anew, none is kept")
        if self.cache != "off" and crop == "random" and not crops:
            raise ValueError(
                "input.crop random with cached latents: say how many crops of each picture to keep (--input.crops 4), "
                "or give --cache off"
            )
        return self

    @model_validator(mode="after")
    def _sheets_have_prompts(self) -> Self:
        if self.task == "inpaint" and self.prompts:
            raise ValueError("prompts with task inpaint: its sheets are of held-out pictures, by their captions")
        return self

    def check(self) -> None:
        from ldm.samplers import make_sampler
        from ldm.spacing import plan

        schedule = self.diffusion.build_objective().schedule
        plan(schedule, make_sampler("dpmpp_2m").grid, self.sample_steps, self.diffusion.spacing)
