"""The settings shared by the three stages. All configurations are typed and frozen, and reject unknown keys.

They are read from YAML and the command line (train/config/load.py). The mathematics never uses these classes: each
stage builds its objects from them in one place. A variant is a `Literal`, matched by the function that builds it.
"""

import re
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from train.config.data import DataConfig
from train.config.optimizer import OptimizerConfig, strict
from train.config.resumable import Place, Resumable

Precision = Literal["fp32", "bf16", "fp16"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml"]


@dataclass(frozen=True, kw_only=True, config=strict)
class RunConfig:
    """Settings shared by all stages."""

    stage: ClassVar[str]
    """Name of the stage; the names of its configuration files begin with it."""
    data: Place = ""
    """Captioned images: a folder (metadata.jsonl or .csv, or a .txt beside each image), parquet or WebDataset tar
    files, the output of datasets' save_to_disk, or a hub id; docs/data.md shows each."""
    out: Place = ""
    """Folder of the run. Running the same command again continues it."""
    steps: Annotated[int, Resumable()] = Field(default=1000, gt=0)
    """Total number of optimizer steps."""
    batch_size: int = Field(default=32, gt=0)
    """Examples per step, over all processes and accumulated parts together."""
    accumulation: int = Field(default=1, gt=0)
    """Number of parts in which each process computes its share of a batch, one after the other, to save memory."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of everything random: weights, order, noise, captions."""
    checkpoint_every: Annotated[int, Resumable()] = Field(default=1000, gt=0)
    """Steps between two resumable checkpoints."""
    keep_checkpoints: Annotated[int, Resumable()] = Field(default=2, ge=2)
    """Number of newest checkpoints to keep."""
    validate_every: Annotated[int, Resumable()] = Field(default=1000, gt=0)
    """Steps between two validations, each with a sheet in samples/."""
    log_every: Annotated[int, Resumable()] = Field(default=50, gt=0)
    """Steps between two lines of metrics.jsonl."""
    precision: Precision = "fp32"
    """Precision of the network's arithmetic (autocast); the weights, their average and the optimizer stay fp32."""
    # New latents differ from cached ones in their last bits, so a run may change neither to `off` nor from it.
    cache: Annotated[str, Resumable(place=True, unless="off")] = ""
    """Folder for results that are computed once from the data; empty: `cache` beside the run's folder. `off`: stage 2
    encodes every image and caption again each time."""
    workers: Annotated[int, Resumable()] = Field(default=0, ge=0)
    """Number of prefetching processes; 0 reads in the training process. The batches don't depend on it."""
    roll_back_after: Annotated[int, Resumable()] = Field(default=25, gt=0)
    """Number of consecutive non-finite steps after which the weights of the last checkpoint are restored."""
    trackers: Annotated[tuple[Tracker, ...], Resumable()] = ("tensorboard",)
    """Experiment trackers that receive the metrics, besides metrics.jsonl; run by accelerate."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Decay of the weights' running average, which validation, samples and model/ use; it is warmed up from 0.1."""
    license: Annotated[str, Resumable()] = ""
    """Licence of the model, for its model card: an SPDX name such as apache-2.0 or cc-by-4.0, or `other`; empty: not
    stated, so nobody may assume any. It can be set or changed after the run is finished."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """The optimizer."""
    input: DataConfig = Field(default_factory=DataConfig)
    """The images."""

    def check(self) -> None:
        """Raise UserError for incompatible settings that are only found when objects are built from them."""

    @model_validator(mode="after")
    def _license_is_a_name(self) -> Self:
        if not re.fullmatch(r"[A-Za-z0-9.+-]*", self.license):
            raise ValueError(f"license {self.license!r} is no name: give an SPDX one, e.g. apache-2.0, or `other`")
        return self


Stage = TypeVar("Stage", bound=RunConfig)


def on_squares(config: Stage) -> Stage:
    """Check that a stage without cached latents uses neither buckets nor kept crops; return its configuration."""
    for name in ("buckets", "crops"):
        if value := getattr(config.input, name):
            raise ValueError(f"input.{name} {value} is for stage 2 alone: leave it out")
    return config
