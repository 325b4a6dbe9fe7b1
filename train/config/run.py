"""What the configurations of the three stages share. All are typed and frozen, unknown keys are refused.

Read from YAML with the command line over it (train/config/load.py). The mathematics never sees these classes: each
stage builds its objects from them in one place. A variant is a `Literal`, matched where it is built.
"""

import re
from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from train.config.data import DataConfig
from train.config.optimizer import OptimizerConfig, strict
from train.config.resumable import Place, Resumable

Precision = Literal["fp32", "bf16", "fp16"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml"]


@dataclass(frozen=True, kw_only=True, config=strict)
class RunConfig:
    """What every stage has."""

    data: Place = ""
    """Captioned pictures: a folder (metadata.jsonl or .csv, or a .txt beside each), parquet or WebDataset tar files, what
    datasets' save_to_disk wrote, a hub id; docs/data.md shows each."""
    out: Place = ""
    """Folder of the run. Running the same command again continues it."""
    steps: Annotated[int, Resumable()] = Field(default=1000, gt=0)
    """Optimizer steps in all."""
    batch_size: int = Field(default=32, gt=0)
    """Examples a step, over all processes and accumulated parts together."""
    accumulation: int = Field(default=1, gt=0)
    """Parts that each process splits its share of a batch into, one after the other, to save memory."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of everything random: weights, order, noise, captions."""
    checkpoint_every: Annotated[int, Resumable()] = Field(default=1000, gt=0)
    """Steps between two resumable checkpoints."""
    keep_checkpoints: Annotated[int, Resumable()] = Field(default=2, ge=2)
    """Newest checkpoints kept."""
    validate_every: Annotated[int, Resumable()] = Field(default=1000, gt=0)
    """Steps between two validations, each with a sheet in samples/."""
    log_every: Annotated[int, Resumable()] = Field(default=50, gt=0)
    """Steps between two lines of metrics.jsonl."""
    precision: Precision = "fp32"
    """Of the network's arithmetic (autocast); the weights, their average and the optimizer stay fp32."""
    # Latents that are made anew aren't bit by bit those that are kept, so a run changes neither to `off` nor from it.
    cache: Annotated[str, Resumable(place=True, unless="off")] = ""
    """Folder for what is computed once of the data; empty: `cache` beside the run's folder. `off`: stage 2 encodes every
    picture and caption anew each time."""
    workers: Annotated[int, Resumable()] = Field(default=0, ge=0)
    """Processes that read ahead; 0 reads in the training process. The batches are the same."""
    roll_back_after: Annotated[int, Resumable()] = Field(default=25, gt=0)
    """Return to the last checkpoint's weights after so many non-finite steps in a row."""
    trackers: Annotated[tuple[Tracker, ...], Resumable()] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl, through accelerate."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    """Of the running average of the weights, which validation, samples and model/ use; warmed up from 0.1."""
    license: Annotated[str, Resumable()] = ""
    """Of the model, for its card: an SPDX name such as apache-2.0 or cc-by-4.0, or `other`; empty: not stated, so nobody may
    assume any. May be given, or changed, when the run is finished."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """The optimizer."""
    input: DataConfig = Field(default_factory=DataConfig)
    """The pictures."""

    def check(self) -> None:
        """Raise UserError where settings don't agree in what only the objects built of them know."""

    @model_validator(mode="after")
    def _license_is_a_name(self) -> Self:
        if not re.fullmatch(r"[A-Za-z0-9.+-]*", self.license):
            raise ValueError(f"license {self.license!r} is no name: give an SPDX one, e.g. apache-2.0, or `other`")
        return self


Stage = TypeVar("Stage", bound=RunConfig)


def on_squares(config: Stage) -> Stage:
    """Of the stages that read pictures anew each time, and as squares."""
    for name in ("buckets", "crops"):
        if value := getattr(config.input, name):
            raise ValueError(f"input.{name} {value} is for stage 2 alone: leave it out")
    return config
