"""The run of a stage: its configuration, folder, device and logs, opened together as small objects."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from accelerate import Accelerator

from train.config.run import RunConfig
from train.data.batches.unreadable import DamageReport
from train.data.store.shards import Processes
from train.engine.console import Console
from train.engine.feed import Feed
from train.engine.folder import RunFolder
from train.engine.metrics import Metrics
from train.engine.settings import write_settings

Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class Run(Generic[Config]):
    """Run of a stage."""

    config: Config
    inputs: Mapping[str, str]
    """Fingerprint of each input, by name."""
    accelerator: Accelerator
    folder: RunFolder
    print: Console
    metrics: Metrics
    feed: Feed
    damage: DamageReport
    processes: Processes

    @property
    def cache(self) -> Path:
        """Folder for what is computed once from the data: the configured one, or else one beside the run's folder."""
        given = self.config.cache
        return Path(given) if given not in ("", "off") else self.folder.path.parent / "cache"

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.accelerator.is_main_process


AnyRun = Run[Any]


@contextmanager
def open_run(config: Config, accelerator: Accelerator, inputs: Mapping[str, str]) -> Iterator[Run[Config]]:
    """Begin or continue the run in `config.out`, and keep other processes from training in it.

    Raises UserError if the folder was made with other settings or inputs.
    """
    main, folder = accelerator.is_main_process, RunFolder(Path(config.out))
    say, metrics = Console(main), Metrics(folder.metrics, accelerator)
    processes = Processes(
        rank=accelerator.process_index, world=accelerator.num_processes, barrier=accelerator.wait_for_everyone, say=say
    )
    with folder.locked() if main else nullcontext():
        if main:
            config = write_settings(folder.settings, config, inputs)
            # A tracker with a missing package would fail at the first log: fail at the start instead.
            accelerator.init_trackers(folder.name)
        accelerator.wait_for_everyone()
        damage = DamageReport(folder.damaged, config.input.max_damaged, say, main)
        try:
            yield Run(config, inputs, accelerator, folder, say, metrics, Feed(config, accelerator), damage, processes)
        finally:
            accelerator.end_training()
