"""metrics.jsonl: the metrics of a run, one line each time that they are logged.

Lines that aren't ours, e.g. cut short by a crash, are ignored, and removed when the run continues.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from train.data.store.atomic import atomic_file, plain_errors
from train.data.store.lines import read_lines


class Metrics:
    """Writer of metrics to a run's metrics.jsonl and to its trackers. Only the main process writes."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator = path, accelerator

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a line to the file, and send the metrics to the trackers."""
        if self.accelerator.is_main_process:
            with plain_errors(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
            self.accelerator.log(dict(metrics), step=step)

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Send an image file to the trackers that show images. Only the main process calls this."""
        for tracker in self.accelerator.trackers:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            match tracker.name:
                case "tensorboard":
                    tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
                case "wandb":
                    tracker.log_images({name: [pixels]}, step=step)
                case "aim" | "clearml":
                    tracker.log_images({name: pixels}, step=step)

    def remove_after(self, step: int) -> None:
        """Remove the lines of steps that will be repeated, also from TensorBoard's view."""
        kept, lines = self._until(step), self._lines()
        if not self.accelerator.is_main_process or not lines:
            return
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.close()  # it opens a new file, whose first entry hides the steps from this one on
                tracker.writer.purge_step = step + 1
        if kept != lines:
            with atomic_file(self.path) as file:
                file.write(b"".join(line + b"\n" for line in kept))

    def last_validation(self, step: int) -> tuple[int, dict[str, float]]:
        """Return the step and the metrics of the last validation up to this step, or (0, {}) if there was none."""
        for line in reversed(self._until(step)):
            logged = json.loads(line)
            if metrics := {k.removeprefix("val_"): v for k, v in logged.items() if k.startswith("val_")}:
                return logged["step"], metrics
        return 0, {}

    def _lines(self) -> list[bytes]:
        return read_lines(self.path)

    def _until(self, step: int) -> list[bytes]:
        return [line for line in self._lines() if _step_of(line) <= step]


def _step_of(line: bytes) -> float:
    """Return the step of a line; infinity if it isn't a line of metrics."""
    try:
        logged = json.loads(line)
    except (ValueError, RecursionError):
        return math.inf
    if not isinstance(logged, dict) or type(step := logged.get("step")) is not int:
        return math.inf
    return step if all(map(_is_number, logged.values())) else math.inf


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)
