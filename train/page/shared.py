"""What the tabs of the page share."""

from dataclasses import dataclass, field

from train.page.jobs import Jobs
from train.page.models import Models
from train.page.places import Places


@dataclass(frozen=True)
class Page:
    """What all tabs share: the folders that they may touch, and the queue of jobs."""

    places: Places
    jobs: Jobs = field(default_factory=Jobs)
    device: str = ""
    """Device to run on; empty: the best one."""
    models: Models = field(default_factory=Models)
    """The loaded models. Only jobs may use them, because these run one after another."""
