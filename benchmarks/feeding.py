"""Measure the benefit of caches: stage 2 with cached latents and text features, against encoding every batch again.

    python benchmarks/feeding.py --data data/shapes --vae runs/demo/vae/model --text-encoder runs/demo/clip/model

Trains configs/shapes/ldm.yaml for a few steps, alternating in one process: A (cached), B (--cache off), A, B. Prints
the time from the call to the first step (after imports), the speed, and the share of time spent waiting for batches.
"""

import contextlib
import io
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import train.stages.ldm
from train.commands.main import command
from train.config.ldm import LdmConfig
from train.config.load import overlay, parse
from train.engine.stage import Batch, Hooks


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the benefit of caches."""

    config: str = "configs/shapes/ldm.yaml"
    """Configuration of stage 2."""
    data: str = "data/shapes"
    """Captioned images."""
    vae: str = "runs/demo/vae/model"
    """Folder of the autoencoder."""
    text_encoder: str = "runs/demo/clip/model"
    """Folder of the text encoder."""
    steps: int = 60
    """Steps of each run; the first 20 aren't counted."""
    rounds: int = 2
    """Number of runs of A and of B."""
    workers: int = 0
    """Number of prefetching processes."""


class FirstStep(Hooks):
    """Hook that measures the time until the first step."""

    def __init__(self) -> None:
        self.started, self.seconds = time.perf_counter(), 0.0

    def begin_step(self, step: int, parts: list[Batch]) -> list[Batch]:
        self.seconds = self.seconds or time.perf_counter() - self.started
        return parts


def run(config: LdmConfig) -> tuple[float, float, float]:
    """Train, and return the seconds to the first step, the images per second, and the share of time spent waiting."""
    first = FirstStep()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.stages.ldm.train(config, hooks=first)
    lines = [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    counted = [line for line in lines if "images_per_second" in line and line["step"] > 20]
    return first.seconds, *(
        statistics.median(line[name] for line in counted) for name in ("images_per_second", "loading")
    )


@command
def main() -> None:
    o = overlay(Options, Options())
    base = replace(
        parse(LdmConfig, [o.config]),
        data=o.data,
        vae=o.vae,
        text_encoder=o.text_encoder,
        steps=o.steps,
        log_every=10,
        validate_every=10**6,
        checkpoint_every=10**6,
        validation_examples=8,
        sample_steps=1,
        prompts=("a",),
        trackers=(),
        workers=o.workers,
    )
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, list[tuple[float, float, float]]] = {"cached": [], "anew": []}
        for k in range(o.rounds):
            for name, cache in (("cached", f"{folder}/cache"), ("anew", "off")):
                found[name].append(run(replace(base, out=f"{folder}/{name}-{k}", cache=cache)))
                seconds, speed, waiting = found[name][-1]
                print(
                    f"{name}: first step after {seconds:.1f} s, {speed:.0f} images/s, {waiting:.1%} waiting",
                    flush=True,
                )
    cached, anew = (statistics.median(speed for _, speed, _ in found[name]) for name in found)
    print(
        f"cached is {cached / anew:.2f} times as fast; its first start took {found['cached'][0][0]:.1f} s, "
        f"the second {found['cached'][1][0]:.1f} s"
    )


if __name__ == "__main__":
    main()
