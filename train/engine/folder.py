"""The folder of a run: the paths in it, and the lock that keeps a second process out."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError
from train.data.store.atomic import remove
from train.engine.owner import Owner

_FIRST_FILES = {".lock", ".tmp-config.yaml"}  # all that a start may leave that is killed before it wrote config.yaml


@dataclass(frozen=True)
class RunFolder:
    """Paths in the folder of a run.

    out/config.yaml      the resolved configuration, with versions, commit and the fingerprints of its inputs
    out/metrics.jsonl    one line each time that metrics are logged
    out/damaged.jsonl    images that can't be read
    out/changes.jsonl    settings that were changed when the run was continued
    out/tokenizer/       stage 0: the tokenizer that was learned when the run was started
    out/samples/  out/checkpoints/  out/model/
    out/model-best/      the weights with the smallest held-out loss, if `keep_best` is set
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def lock(self) -> Path:
        """File that is locked during training, and that names the process."""
        return self.path / ".lock"

    @property
    def settings(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def damaged(self) -> Path:
        return self.path / "damaged.jsonl"

    @property
    def changes(self) -> Path:
        return self.path / "changes.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def best(self) -> Path:
        return self.path / "model-best"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def sheet(self, step: int) -> Path:
        return self.samples / f"step-{step:08d}.png"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create and lock the folder. If a UserError is raised inside, a new run is removed again.

        Raises UserError if the folder contains something other than a run, or if another process has locked it.
        """
        self._require_kinds()
        new, existed = not self.settings.is_file(), self.path.is_dir()
        if new and existed and not {path.name for path in self.path.iterdir()} <= _FIRST_FILES:
            raise UserError(
                f"--out {str(self)!r}: contains files that aren't a run (no config.yaml); choose another folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"--out {str(self)!r}: can't be a folder, because {error.filename!r} is a file; choose another"
            ) from None
        with open(self.lock, "ab", buffering=0) as lock:  # "w" would remove what the process that trains wrote
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"--out {str(self)!r}: another process is training there; wait until it ends, or use another"
                ) from None
            with suppress(OSError):  # a full disk; nothing depends on it
                lock.truncate(0)
                lock.write(Owner.of(os.getpid()).text().encode())
            try:
                yield
            except UserError:
                if new and not self.checkpoints.exists():
                    self._remove(keep_folder=existed)
                raise
            finally:
                with suppress(OSError):
                    lock.truncate(0)

    def _require_kinds(self) -> None:
        """Raise UserError if a file or folder of the run is something else, e.g. a pipe, which would never end."""
        for path in (self.lock, self.settings, self.metrics, self.damaged, self.changes):
            if path.exists() and not path.is_file():
                raise UserError(f"--out {str(self)!r}: {path.name} in it is not a regular file; choose another folder")
        for path in (self.checkpoints, self.samples, self.model, self.best, self.tokenizer):
            if path.exists() and not path.is_dir():
                raise UserError(f"--out {str(self)!r}: {path.name} in it is not a folder; choose another folder")

    def _remove(self, *, keep_folder: bool) -> None:
        """Remove what a refused start has written, with the folder unless it was there before."""
        with suppress(OSError):
            for path in self.path.iterdir():
                remove(path)
            if not keep_folder:
                self.path.rmdir()
