"""The configurations of the three stages: typed, frozen, unknown keys refused.

Read from YAML with the command line over it (train/cli.py). The mathematics never sees these classes: each stage
builds its objects from them in one place. A variant is a `Literal`, matched where it is built.
"""

import re
from dataclasses import replace
from typing import Annotated, Literal, Self, TypeVar, assert_never

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from autoencoder.losses import ReconstructionKind
from conditioning.clip import MOST_CHUNKS
from ldm.interchange import Process
from ldm.objective import LossKind, Objective, ObjectiveKind, Weighting, edm, min_snr, p2
from ldm.parameterization import Target
from ldm.process import VarianceKind
from ldm.schedule import Schedule, ScheduleKind
from ldm.spacing import Spacing, plan
from ldm.timesteps import Importance, LogitNormal, Timesteps, uniform
from ldm.unet import AttentionBackend
from train.data.catalogue import Columns
from train.data.decode import MAX_PIXELS, Crop
from train.data.framing import Framing

Byte = Annotated[int, Field(ge=0, le=255)]
Precision = Literal["fp32", "bf16", "fp16"]
_strict = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, config=_strict)
class OptimizerConfig:
    """The optimizer and its learning rate over time."""

    kind: Literal["adamw", "muon"] = "adamw"
    """`adamw` (Loshchilov & Hutter 2019); `muon` (Jordan et al. 2024) for the matrices, AdamW for the rest: more progress
    a step at the price of longer steps, which small networks repay well."""
    lr: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the rate falls from its peak to `final` of it over the steps after the warm-up."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak rate that is left at the last step (cosine, linear)."""
    warmup: int = Field(default=500, ge=0)
    """Steps over which the rate rises linearly from 0 to its peak."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square (AdamW)."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the running mean square."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay rate of Muon's running mean of the gradient."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled decay, on matrices and convolution kernels only (not on biases and normalisation weights)."""
    clip: float = Field(default=1.0, ge=0)
    """Largest norm of the gradient over all parameters; 0 leaves it as it is."""


@dataclass(frozen=True, kw_only=True, config=_strict)
class SourceConfig:
    """Where the pictures and captions of `--data` are found, and what is read as a picture."""

    image_column: str = ""
    """Column of the picture (in tars: its extension); empty: file_name in metadata, the column of pictures in tables."""
    caption_column: str = ""
    """Column of the caption (in tars: extension, or key of the .json); empty: `text`, else `caption`."""
    caption_template: str = ""
    """Makes captions of class labels, e.g. "a photo of a {}": of folders' names, or of the caption column."""
    train_split: str = "train"
    """The split to train on."""
    validation_split: str = ""
    """The split for validation; empty: validation, val, dev or test, else a share of the training pictures."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the pictures held out for validation where the source has no split of its own, 1000 at most."""
    stream_buffer: int = Field(default=1000, gt=0)
    """Pictures of a stream that wait in memory, of which one is drawn at a time: more are shuffled better."""
    max_pixels: int = Field(default=MAX_PIXELS, gt=0)
    """Larger pictures count as damaged and aren't decoded."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Red, green and blue of what transparent pictures are laid on."""

    @model_validator(mode="after")
    def _has_room_for_a_label(self) -> Self:
        if self.caption_template and "{}" not in self.caption_template:
            raise ValueError(f"caption_template {self.caption_template!r} has no {{}} for the label")
        return self

    def columns(self, captioned: bool) -> Columns:
        """Where captions and pictures are."""
        return Columns(
            image=self.image_column, caption=self.caption_column, template=self.caption_template, captioned=captioned
        )

    def plain(self, resolution: int) -> Framing:
        """How a file becomes a square picture, nothing left to chance."""
        return Framing(resolution=resolution, background=self.background, max_pixels=self.max_pixels)


@dataclass(frozen=True, kw_only=True, config=_strict)
class DataConfig(SourceConfig):
    """How the pictures and captions of `--data` are read."""

    resolution: int = Field(default=32, ge=8)
    """Side of the square training pictures, in pixels: the shorter side is resized to it, then cropped."""
    crop: Crop = "center"
    """Which part of a picture that has another shape."""
    crops: int = Field(default=0, ge=0)
    """Random crops of each picture that stage 2's cache keeps; with crop `random` and without --cache off, at least 1."""
    flip: bool = False
    """Mirror half of the pictures. Wrong for captions that speak of left and right, and for writing."""
    buckets: int = Field(default=0, ge=0)
    """Train on rectangles of about resolution² pixels whose sides are multiples of this, e.g. 64, each batch of one shape;
    0: squares. Stage 2 alone."""
    bucket_ratio: float = Field(default=2.0, ge=1)
    """Longest rectangle, as its longer side over its shorter one."""
    min_size: int = Field(default=0, ge=0)
    """Leave out pictures whose shorter side has fewer pixels."""
    max_damaged: float = Field(default=0.1, ge=0, le=1)
    """Stop when more than this share of the pictures can't be read."""

    @model_validator(mode="after")
    def _crops_differ(self) -> Self:
        if self.crops and self.crop != "random":
            raise ValueError(f"crops {self.crops} with crop {self.crop}: only random crops differ from one another")
        return self

    def framing(self) -> Framing:
        """How a file becomes a training picture."""
        return replace(self.plain(self.resolution), crop=self.crop, flip=self.flip)


@dataclass(frozen=True, kw_only=True, config=_strict)
class RunConfig:
    """What every stage has."""

    data: str = ""
    """Captioned pictures: a folder (metadata.jsonl or .csv, or a .txt beside each), parquet or WebDataset tar files, what
    datasets' save_to_disk wrote, a hub id; docs/data.md shows each."""
    out: str = ""
    """Folder of the run. Running the same command again continues it."""
    steps: int = Field(default=1000, gt=0)
    """Optimizer steps in all."""
    batch_size: int = Field(default=32, gt=0)
    """Examples a step, over all processes and accumulated parts together."""
    accumulation: int = Field(default=1, gt=0)
    """Parts that each process splits its share of a batch into, one after the other, to save memory."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of everything random: weights, order, noise, captions."""
    checkpoint_every: int = Field(default=1000, gt=0)
    """Steps between two resumable checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=2)
    """Newest checkpoints kept."""
    validate_every: int = Field(default=1000, gt=0)
    """Steps between two validations, each with a sheet in samples/."""
    log_every: int = Field(default=50, gt=0)
    """Steps between two lines of metrics.jsonl."""
    precision: Precision = "fp32"
    """Of the network's arithmetic (autocast); the weights, their average and the optimizer stay fp32."""
    cache: str = ""
    """Folder for what is computed once of the data; empty: `cache` beside the run's folder. `off`: stage 2 encodes every
    picture and caption anew each time."""
    workers: int = Field(default=0, ge=0)
    """Processes that read ahead; 0 reads in the training process. The batches are the same."""
    roll_back_after: int = Field(default=25, gt=0)
    """Return to the last checkpoint's weights after so many non-finite steps in a row."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml"], ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl, through accelerate."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Of the running average of the weights, which validation, samples and model/ use; warmed up from 0.1."""
    license: str = ""
    """Of the model, for its card: an SPDX name such as apache-2.0 or cc-by-4.0, or `other`; empty: not stated, so nobody may
    assume any. May be given, or changed, when the run is finished."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """The optimizer."""
    input: DataConfig = Field(default_factory=DataConfig)
    """The pictures."""

    @model_validator(mode="after")
    def _license_is_a_name(self) -> Self:
        if not re.fullmatch(r"[A-Za-z0-9.+-]*", self.license):
            raise ValueError(f"license {self.license!r} is no name: give an SPDX one, e.g. apache-2.0, or `other`")
        return self


Stage = TypeVar("Stage", bound=RunConfig)


def _on_squares(config: Stage) -> Stage:
    """Of the stages that read pictures anew each time, and as squares."""
    for name in ("buckets", "crops"):
        if value := getattr(config.input, name):
            raise ValueError(f"input.{name} {value} is for stage 2 alone: leave it out")
    return config


@dataclass(frozen=True, kw_only=True, config=_strict)
class TextTowerConfig:
    """The text half of a small CLIP."""

    vocab_size: int = Field(default=2000, ge=600)
    """Tokens of the byte-pair encoding learned from the captions (at least the bytes and their word-end forms)."""
    max_length: int = Field(default=77, ge=4)
    """Tokens a caption is padded or cut to, begin and end included."""
    width: int = Field(default=256, gt=0)
    """Features of a token: what the UNet's cross-attention sees."""
    layers: int = Field(default=4, gt=0)
    """Transformer layers."""
    heads: int = Field(default=4, gt=0)
    """Attention heads."""


@dataclass(frozen=True, kw_only=True, config=_strict)
class ImageTowerConfig:
    """The picture half of a small CLIP (a vision transformer)."""

    patch_size: int = Field(default=8, gt=0)
    """Side of a patch in pixels."""
    width: int = Field(default=256, gt=0)
    """Features of a patch."""
    layers: int = Field(default=4, gt=0)
    """Transformer layers."""
    heads: int = Field(default=4, gt=0)
    """Attention heads."""


@dataclass(frozen=True, kw_only=True, config=_strict)
class TokenTasksConfig:
    """What the text tower learns besides telling captions apart, for the diffusion that will read its tokens."""

    sketch: float = Field(default=100.0, ge=0)
    """Weight of sketching the picture from the tokens, so that they say what stands where; 0 leaves it out."""
    echo: float = Field(default=10.0, ge=0)
    """Weight of repeating at each token the words just said, so that none is lost; 0 leaves it out."""


@dataclass(frozen=True, kw_only=True, config=_strict)
class ClipConfig(RunConfig):
    """Stage 0: a small CLIP (Radford et al. 2021) by contrastive learning on the captioned pictures."""

    text: TextTowerConfig = Field(default_factory=TextTowerConfig)
    """Text tower."""
    image: ImageTowerConfig = Field(default_factory=ImageTowerConfig)
    """Image tower."""
    projection: int = Field(default=256, gt=0)
    """Dimensions of the space in which pictures and captions meet."""
    tokens: TokenTasksConfig = Field(default_factory=TokenTasksConfig)
    """Further tasks of the text tower."""

    @model_validator(mode="after")
    def _sees_squares(self) -> Self:
        return _on_squares(self)


@dataclass(frozen=True, kw_only=True, config=_strict)
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


@dataclass(frozen=True, kw_only=True, config=_strict)
class PerceptualConfig:
    """A distance in the features of a frozen network, added to the reconstruction error."""

    kind: Literal["none", "lpips_vgg", "lpips_alex", "clip"] = "none"
    """LPIPS (Zhang et al. 2018) over VGG16 or AlexNet; `clip`: the image tower of a CLIP, e.g. one that stage 0 trained."""
    model: str = ""
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


@dataclass(frozen=True, kw_only=True, config=_strict)
class AdversarialConfig:
    """A patch discriminator (Isola et al. 2017) trained beside the autoencoder."""

    kind: Literal["none", "hinge", "non_saturating", "saturating"] = "none"
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


@dataclass(frozen=True, kw_only=True, config=_strict)
class EquivarianceConfig:
    """Latents that turn and shrink with their pictures (EQ-VAE, Kouzelis et al. 2025): smoother, and easier to learn."""

    share: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps whose latents are transformed before they are decoded; 0 leaves it out, the paper has 0.5."""
    smallest: float = Field(default=0.25, gt=0, le=1)
    """Each side is reduced to between this share and the whole of it."""


@dataclass(frozen=True, kw_only=True, config=_strict)
class VaeConfig(RunConfig):
    """Stage 1: an autoencoder from random weights or a given one; its latents come out with mean 0 and variance 1."""

    init: str = ""
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
    validation_examples: int = Field(default=512, gt=0)
    """Held-out pictures that a validation reconstructs, at most."""
    validation_features: str = ""
    """Of the Fréchet distance of reconstructions: `inception`, `dinov2`, `clip`, or a folder or hub id; empty: not measured."""

    @model_validator(mode="after")
    def _sees_squares(self) -> Self:
        return _on_squares(self)

    @model_validator(mode="after")
    def _has_an_encoder(self) -> Self:
        if self.decoder_only and not self.init:
            raise ValueError("decoder_only needs an autoencoder whose encoder is kept: give init")
        if self.decoder_only and self.equivariance.share:
            raise ValueError("decoder_only with equivariance.share: the latents, which it is about, aren't trained")
        return self


@dataclass(frozen=True, kw_only=True, config=_strict)
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


@dataclass(frozen=True, kw_only=True, config=_strict)
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

    def build_schedule(self) -> Schedule:
        """Raises UserError where the schedule's numbers don't go together."""
        return Schedule.build(
            self.schedule, self.timesteps, self.beta_start, self.beta_end, self.zero_terminal_snr, self.shift
        )  # fmt: skip

    def build_process(self) -> Process:
        """What is saved with the model. Raises UserError as above."""
        return Process(
            schedule=self.build_schedule(), target=self.target, spacing=self.spacing, variance=self.variance
        )  # fmt: skip

    def build_objective(self) -> Objective:
        """Raises UserError where its parts don't go together."""
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
    def _parts_agree(self) -> Self:
        self.build_objective()
        if self.objective != "simple" and self.offset_noise:
            raise ValueError(
                f"offset_noise {self.offset_noise} with objective {self.objective}: the bound is one of plain noise"
            )
        if self.objective != "simple" and self.timestep_sampling == "logit_normal":
            raise ValueError(
                f"timestep_sampling logit_normal with objective {self.objective}: take uniform or importance"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=_strict)
class LdmConfig(RunConfig):
    """Stage 2: a cross-attention UNet over the latents, conditioned on the text encoder's tokens."""

    task: Literal["txt2img", "inpaint"] = "txt2img"
    """`inpaint`: the UNet is also shown a mask and the picture without what is under it, 2 · latent channels + 1 in all, and
    learns to paint under masks of any kind. Best begun with a text-to-image model as `init`."""
    init: str = ""
    """Folder (or hub id) of a pipeline whose UNet to begin with, instead of random weights; its shape then holds, not `unet`.
    Where `vae` and `text_encoder` aren't given, they are the pipeline's too."""
    vae: str = ""
    """Folder (or hub id) of the autoencoder: a stage 1 run's model/, or a diffusers AutoencoderKL."""
    text_encoder: str = ""
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
    attention: AttentionBackend = "sdpa"
    """`sdpa`: torch's own; `xformers` on a GPU (pip install -e '.[xformers]'); `auto`: xformers where it works."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: about a third slower, far less memory."""
    validation_examples: int = Field(default=512, gt=0)
    """Held-out examples of the validation loss, at most; their timesteps and noise are fixed."""
    prompts: tuple[str, ...] = ()
    """Prompts of the sample sheets; empty: captions of held-out pictures."""
    sample_steps: int = Field(default=25, gt=0)
    """Sampler steps of the sheets."""
    guidance_scale: float = Field(default=3.0, ge=0)
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
    def _sheets_fit(self) -> Self:
        if self.task == "inpaint" and self.prompts:
            raise ValueError("prompts with task inpaint: its sheets are of held-out pictures, by their captions")
        plan(self.diffusion.build_schedule(), "dpmpp_2m", self.sample_steps, self.diffusion.spacing)
        return self
