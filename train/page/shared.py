"""State that the tabs of the page share."""

from dataclasses import dataclass, field

from train.page.jobs import Jobs
from train.page.models import Models
from train.page.places import Places


@dataclass(frozen=True)
class Page:
    """State that all tabs share: the folders that they may touch, the queue of jobs, and the loaded models."""

    places: Places
    jobs: Jobs = field(default_factory=Jobs)
    device: str = ""
    """Device to run on; empty: the best one."""
    models: Models = field(default_factory=Models)
    """The loaded models. Only jobs may use them, because these run one after another."""
