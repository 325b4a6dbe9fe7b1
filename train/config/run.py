"""The settings shared by the three stages. All configurations are typed and frozen, and reject unknown keys.

They are read from YAML and the command line (train/config/load.py). The mathematics never uses these classes: each
stage builds its objects from them in one place. A variant is a `Literal`, matched by the function that builds it.
"""

import re
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from train.config.data import DataConfig
from train.config.limits import MOST_EXAMPLES, MOST_STEPS, MOST_WORKERS, PathText
from train.config.optimizer import OptimizerConfig, strict
from train.config.resumable import ON_REQUEST, Location, Resumable

Precision = Literal["fp32", "bf16", "fp16"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml"]


@dataclass(frozen=True, kw_only=True, config=strict)
class RunConfig:
    """Settings shared by all stages."""

    stage: ClassVar[str]
    """Name of the stage; the names of its configuration files begin with it."""
    fixed: ClassVar[Mapping[str, str]] = {}
    """Settings that other stages can change in a run but this one can't, each with the reason."""
    data: Location = ""
    """Images with captions (stage 1 needs no captions). Required.
    A folder with metadata.jsonl, metadata.csv, a .txt file per image, or a folder per class (caption_template).
    Or parquet files, WebDataset tar files, a folder saved by datasets' save_to_disk, or a hub id; see docs/data.md."""
    out: Location = ""
    """Output folder of the run. Required. Running the same command again continues the run."""
    steps: Annotated[int, Resumable()] = Field(default=1000, gt=0, le=MOST_STEPS)
    """Total number of optimizer steps of the run."""
    batch_size: Annotated[int, ON_REQUEST] = Field(default=32, gt=0, le=MOST_EXAMPLES)
    """Number of examples per optimizer step, over all processes and accumulated parts together."""
    accumulation: Annotated[int, ON_REQUEST] = Field(default=1, gt=0, le=MOST_EXAMPLES)
    """Number of parts into which each process splits its share of a batch, to compute them in turn and save memory."""
    seed: Annotated[int, ON_REQUEST] = Field(default=0, ge=0, lt=2**63)
    """Seed of all random numbers: initial weights, order of the examples, noise, choice of captions."""
    checkpoint_every: Annotated[int, Resumable()] = Field(default=1000, gt=0, le=MOST_STEPS)
    """Number of steps between two checkpoints, from which a run can be continued."""
    keep_checkpoints: Annotated[int, Resumable()] = Field(default=2, ge=2, le=MOST_STEPS)
    """Number of newest checkpoints to keep; at least 2."""
    validate_every: Annotated[int, Resumable()] = Field(default=1000, gt=0, le=MOST_STEPS)
    """Number of steps between two validations; each also writes a sample sheet to samples/."""
    first_samples: Annotated[float, Resumable()] = Field(default=2.0, ge=0)
    """Minutes of training after which the first sample sheet is written, besides those of validations; 0: none."""
    log_every: Annotated[int, Resumable()] = Field(default=50, gt=0, le=MOST_STEPS)
    """Number of steps between two lines of metrics.jsonl."""
    precision: Annotated[Precision, ON_REQUEST] = "fp32"
    """Number format of the network's arithmetic (autocast); the weights, their average and the optimizer stay fp32."""
    compile: Annotated[bool, Resumable()] = False
    """Compile the networks with torch.compile. Compiling takes minutes and pays off only in long runs.
    Losses are equal up to rounding."""
    # New latents differ from cached ones in their last bits, so turning the cache off or on is a change.
    cache: Annotated[PathText, Resumable(location=True, on_request_only="off")] = ""
    """Folder for results that are computed from the data only once, such as latents and text features.
    Empty: folder `cache` beside the run's folder.
    `off`: no cache; stage 2 encodes images and captions again in each step."""
    workers: Annotated[int, Resumable()] = Field(default=0, ge=0, le=MOST_WORKERS)
    """Number of additional processes that load images in advance; 0: the training process loads them.
    The batches are the same for any number."""
    roll_back_after: Annotated[int, Resumable()] = Field(default=25, gt=0, le=MOST_STEPS)
    """Number of steps in a row with non-finite loss or gradient before the last checkpoint's weights are restored."""
    trackers: Annotated[tuple[Tracker, ...], Resumable()] = ("tensorboard",)
    """Experiment trackers that receive the metrics; no name: no tracker. metrics.jsonl is always written."""
    ema_decay: Annotated[float, ON_REQUEST] = Field(default=0.9999, ge=0, lt=1)
    """Decay per step of the weights' moving average, 0 (no average) to 1.
    In the first steps, the decay rises from at most 0.1 to this value.
    Validation, samples and model/ use the averaged weights."""
    license: Annotated[str, Resumable()] = ""
    """Licence of the model, for its model card: an SPDX name such as apache-2.0 or cc-by-4.0, or `other`.
    Empty: not stated, which gives others no permission. It can be changed after the run is finished."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """Optimizer and learning rate."""
    input: DataConfig = Field(default_factory=DataConfig)
    """Images and captions."""

    def check(self) -> None:
        """Raise UserError for incompatible settings that are found only when objects are built from them."""

    @model_validator(mode="after")
    def _license_is_a_name(self) -> Self:
        if not re.fullmatch(r"[A-Za-z0-9.+-]*", self.license):
            raise ValueError(f"license {self.license!r}: must be an SPDX name, e.g. apache-2.0, or `other`")
        return self


Stage = TypeVar("Stage", bound=RunConfig)


def require_cache(config: Stage) -> Stage:
    """Return the configuration of stage 1 or 2. Raises ValueError if images can't be encoded once without a cache."""
    if getattr(config, "encode_once", False) and config.cache == "off":
        raise ValueError("encode_once with cache off: encoded images are kept in a cache; leave out one of the two")
    return config


def require_squares(config: Stage) -> Stage:
    """Return the configuration of stage 0 or 1. Raises ValueError for buckets or cached crops, which need stage 2."""
    for name in ("buckets", "crops"):
        if value := getattr(config.input, name):
            raise ValueError(f"input.{name} {value}: only stage 2 has this setting; leave it out")
    return config
