"""The page's queue: one worker does the jobs one after another. They belong to the server, not to a browser's tab.

So a page that is closed or reloaded finds its jobs again, and two pages see the same ones.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ldm.errors import RunError, UserError, one_line
from train.page.notices import noticing

State = Literal["waiting", "running", "done", "failed", "cancelled"]
_MOST_WAITING = 100
_MOST_WARNINGS = 20  # of a job
_KEPT = 200  # finished jobs that are remembered


class Cancelled(Exception):
    """The job was cancelled."""


@dataclass(eq=False)
class Job:
    """A piece of work, and everything that the page shows about it."""

    id: int
    kind: str
    """Tab that it belongs to, e.g. "paint"."""
    title: str
    work: Callable[["Job"], Any] = field(repr=False)
    """The work itself. It calls `report` often, and returns the result."""
    changed: Callable[[], None] = field(repr=False)
    state: State = "waiting"
    progress: float = 0.0
    """Share of the work that is done, 0 to 1."""
    text: str = ""
    """Line on what it does at the moment, or on why it failed."""
    preview: Any = None
    """Preview of the result, e.g. an image."""
    result: Any = None
    warnings: list[str] = field(default_factory=list)
    """Lines that the work's commands have warned with."""
    seconds: float = 0.0
    """Time that the work has taken, once it has ended."""
    cancel_requested: threading.Event = field(default_factory=threading.Event, repr=False)

    def report(self, progress: float, text: str = "", preview: Any = None) -> None:
        """Show the progress. Raises Cancelled if the job was cancelled, so that the work ends here."""
        self.check()
        self.progress, self.text = progress, text or self.text
        if preview is not None:
            self.preview = preview
        self.changed()

    def warn(self, line: str) -> None:
        """Show a warning, once."""
        line = one_line(line, 500)
        if line not in self.warnings and len(self.warnings) < _MOST_WARNINGS:
            self.warnings.append(line)
            self.changed()

    def check(self) -> None:
        """Raise Cancelled if the job was cancelled."""
        if self.cancel_requested.is_set():
            raise Cancelled

    @property
    def finished(self) -> bool:
        """Whether the job has ended, in any way."""
        return self.state not in ("waiting", "running")


class Jobs:
    """The queue, and the jobs of the past."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._jobs: dict[int, Job] = {}
        self._waiting: deque[Job] = deque()
        self._condition = threading.Condition()
        self._worker: threading.Thread | None = None
        self._closed = False
        self.version = 0
        """Number that grows with every change; a page with this version is up to date."""

    def submit(self, kind: str, title: str, work: Callable[[Job], Any]) -> Job:
        """Add a job at the end of the queue. Raises UserError if too many wait."""
        with self._condition:
            if len(self._waiting) >= _MOST_WAITING:
                raise UserError(f"{_MOST_WAITING} jobs are waiting already; wait, or cancel some")
            job = Job(next(self._ids), kind, one_line(title, 200), work, self.change)
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._forget()
            if self._worker is None:
                self._worker = threading.Thread(target=self._run, name="jobs", daemon=True)
                self._worker.start()
            self.change()
            self._condition.notify_all()
        return job

    def get(self, id: int) -> Job:
        """Return a job. Raises UserError if there is none."""
        if (job := self._jobs.get(id)) is None:
            raise UserError(f"job {id}: there is none with this number")
        return job

    def all(self, kind: str = "") -> list[Job]:
        """Return the jobs of a kind, the newest first."""
        with self._condition:
            return [job for job in reversed(self._jobs.values()) if kind in ("", job.kind)]

    @property
    def running(self) -> Job | None:
        """The job that runs now."""
        with self._condition:
            return next((job for job in self._jobs.values() if job.state == "running"), None)

    def cancel(self, id: int) -> None:
        """Cancel a job. A waiting one never starts; a running one ends when it next reports."""
        job = self.get(id)
        with self._condition:
            job.cancel_requested.set()
            if job in self._waiting:
                self._waiting.remove(job)
                job.state = "cancelled"
            self.change()
            self._condition.notify_all()

    def wait(self, job: Job, seconds: float) -> bool:
        """Wait until a job has ended; return whether it has."""
        with self._condition:
            return self._condition.wait_for(lambda: job.finished, seconds)

    def close(self) -> None:
        """Cancel all jobs, and wait until the running one has ended."""
        with self._condition:
            self._closed = True
            for job in self._jobs.values():
                if not job.finished:
                    job.cancel_requested.set()
            for job in self._waiting:
                job.state = "cancelled"
            self._waiting.clear()
            self._condition.notify_all()
        if self._worker is not None:
            self._worker.join(timeout=30)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._waiting.popleft()
                job.state = "running"
                self.change()
            started = time.perf_counter()
            state, text = self._do(job)
            job.seconds = time.perf_counter() - started
            with self._condition:
                job.state, job.text = state, text
                job.progress = 1.0 if state == "done" else job.progress
                self.change()
                self._condition.notify_all()

    def _do(self, job: Job) -> tuple[State, str]:
        """Do a job; return the state in which it ended, and a line on it."""
        try:
            with noticing(job.warn):
                job.result = job.work(job)
        except Cancelled:
            return "cancelled", ""
        except (UserError, RunError, OSError) as error:
            return "failed", one_line(error, 500)
        except Exception as error:
            logging.getLogger(__name__).exception("job %d failed", job.id)
            return "failed", one_line(f"failed unexpectedly ({type(error).__name__}): {error}", 500)
        return "done", ""

    def change(self) -> None:
        """Make all pages show the present state."""
        self.version += 1

    def _forget(self) -> None:
        """Forget the oldest finished jobs."""
        finished = [job.id for job in self._jobs.values() if job.finished]
        for id in finished[: max(0, len(finished) - _KEPT)]:
            del self._jobs[id]
