"""The options of `speedrun.py`."""

from dataclasses import dataclass
from typing import Literal

Track = Literal["stage-2", "stage-1", "demo", "peer"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure a record of training on Shapes."""

    track: Track = "stage-2"
    """What is trained and measured; docs/RECORDS.md has the rules of each track."""
    name: str = ""
    """Name of the record, which is also its folder in `records`. Required."""
    steps: int = 0
    """Number of steps at which each seed's schedule ends. Required, except for the demo; choose it with --choosing."""
    config: str = ""
    """Configuration of the stage. Empty: configs/shapes/ldm.yaml, and configs/shapes/vae.yaml for stage 1."""
    settings: str = ""
    """Further options of train_ldm.py (stage 1: train_vae.py) in one text: --settings="--optimizer.lr 3e-3"."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds of the trainings; a record needs five."""
    prompts: int = 512
    """Number of prompts of each kind, seen and unseen; a record needs 512."""
    images: int = 1000
    """Number of held-out images of stage 1; a record needs 1,000."""
    choosing: bool = False
    """Use the prompts and images that are for choosing, e.g. the number of steps, and write no record."""
    before: str = ""
    """File record.json of the record before, whose step is timed in turn with this one. Empty: only this step."""
    checkout: str = ""
    """Folder with the code of the record before. Empty: this code with its settings. Demo: the code to compare with."""
    judge: str = "--steps 560"
    """Options of train_ldm.py for the stage 2 that is trained on each autoencoder of stage 1, in one text."""
    peer: Literal["best", "compiled", "shipped"] = "best"
    """Form of diffusers' loop: improved by hand, the same compiled, or its script as shipped."""
    peer_lr: float = 1e-3
    """Learning rate of diffusers' loop."""
    diffusers: str = ""
    """Checkout of diffusers, for its script as shipped."""
    calls: int = 20
    """Steps per turn of the timing."""
    turns: int = 8
    """Number of turns of each."""
    seconds: float = 170.0
    """Longest time of the timing."""
    jobs: int = 2
    """Number of trainings at the same time, each with its share of the threads."""
    data: str = "data/shapes"
    """The dataset Shapes."""
    vae: str = "runs/demo/vae/model"
    """Autoencoder."""
    text_encoder: str = "runs/demo/clip/model"
    """Text encoder."""
    work: str = "runs/speedrun"
    """Folder of the runs and logs."""
    records: str = "benchmarks/records"
    """Folder of the records."""
    table: bool = False
    """Print the records of all tracks as a table."""
