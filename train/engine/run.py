"""The run of a stage: its configuration, folder, device and logs, each as a small object."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from accelerate import Accelerator

from train.config.run import RunConfig
from train.data.batches.unreadable import UnreadableReport
from train.data.store.atomic import clean_up
from train.data.store.shards import Processes
from train.engine.console import Console
from train.engine.device import describe
from train.engine.feed import Feed
from train.engine.folder import RunFolder
from train.engine.metrics import Metrics
from train.engine.settings import write_settings

Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class Run(Generic[Config]):
    """A stage's run in its folder."""

    config: Config
    inputs: Mapping[str, str]
    """Fingerprint of each input, by name."""
    accelerator: Accelerator
    folder: RunFolder
    print: Console
    metrics: Metrics
    feed: Feed
    damage: UnreadableReport
    processes: Processes

    @property
    def cache(self) -> Path:
        """Folder of what is computed once from the data: the configured one, or else one beside the run's folder."""
        configured = self.config.cache
        return Path(configured) if configured not in ("", "off") else self.folder.path.parent / "cache"

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.accelerator.is_main_process


AnyRun = Run[Any]


@contextmanager
def open_run(
    config: Config,
    accelerator: Accelerator,
    inputs: Mapping[str, str],
    attention: str = "sdpa",
    *,
    with_changes: bool = False,
) -> Iterator[Run[Config]]:
    """Start or continue the run in `config.out`, and keep other processes from training in it.

    attention: name of the networks' attention, to print. with_changes: whether settings and inputs of an existing run
    may change as far as possible. Raises UserError if the folder was made with others and they may not.
    """
    main, folder = accelerator.is_main_process, RunFolder(Path(config.out))
    console, metrics = Console(main), Metrics(folder.metrics, accelerator)
    processes = Processes(
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        barrier=accelerator.wait_for_everyone,
        print=console,
    )
    with folder.locked() if main else nullcontext():
        if main:
            for written in (folder.path, folder.checkpoints, folder.samples):
                clean_up(written)
            config = write_settings(folder, config, inputs, with_changes=with_changes, print=console)
            # A tracker whose package is missing should fail now, not at the first log.
            accelerator.init_trackers(folder.name)
        accelerator.wait_for_everyone()
        console(describe(config, accelerator, attention))
        damage = UnreadableReport(folder.damaged, config.input.max_damaged, console, main)
        try:
            yield Run(
                config,
                inputs,
                accelerator,
                folder,
                console,
                metrics,
                Feed(config, accelerator, inputs["data"], console),
                damage,
                processes,
            )
        finally:
            accelerator.end_training()
