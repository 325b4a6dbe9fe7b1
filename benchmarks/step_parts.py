"""Time the parts of a training step: forward and backward pass, clipping, optimizer and average.

    python benchmarks/step_parts.py configs/shapes/ldm.yaml --data data/shapes --vae runs/demo/vae/model \
        --text-encoder runs/demo/clip/model

The arguments are those of train_clip.py, train_vae.py or train_ldm.py, as the configuration's name begins. The run is a
real one, in a temporary folder. The table has the median over 15 steps after 5 others, in ms of CPU time (GPU: of time,
with a synchronisation after each part). If a step has two networks, their times are added.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.config.clip import ClipConfig
from train.config.ldm import LdmConfig
from train.config.load import parse
from train.config.vae import VaeConfig
from train.engine import loop
from train.engine.ema import Ema
from train.engine.stage import Hooks
from train.engine.trainer import Trainer
from train.stages import clip, ldm, vae

_KINDS: dict[str, tuple[Any, Any]] = {
    "clip": (ClipConfig, clip.train),
    "vae": (VaeConfig, vae.train),
    "ldm": (LdmConfig, ldm.train),
}
_WARM_UP, _STEPS = 5, 15


class Finished(Exception):
    pass


class Parts(Hooks):
    """Times of each part, summed within a step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.current: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if not torch.cuda.is_available():
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            started = self.now()
            result = function(*args, **more)
            self.current[name] += 1e3 * (self.now() - started)
            return result

        return call

    def end_step(self, step: int, metrics: dict[str, Tensor]) -> None:
        self.steps.append(dict(self.current))
        self.current.clear()
        if len(self.steps) > _WARM_UP + _STEPS:
            raise Finished


def main() -> None:
    stem = Path(sys.argv[1]).stem
    kind, train = next(value for name, value in _KINDS.items() if stem.startswith(name))
    parts = Parts()

    class Timed(Trainer):
        def __init__(self, run: Any, stage: Any, hooks: Hooks | None = None) -> None:
            super().__init__(run, stage, hooks)
            for phase, module in zip(stage.phases, self.wrapped, strict=True):
                module.forward = parts.timed("forward", module.forward)
                phase.optimizer.step = parts.timed("optimizer", phase.optimizer.step)

    Timed.step = parts.timed("whole step", Trainer.step)  # type: ignore[method-assign]
    Timed._backward = parts.timed("forward and backward", Trainer._backward)  # type: ignore[method-assign]
    torch.nn.utils.clip_grad_norm_ = parts.timed("clipping", torch.nn.utils.clip_grad_norm_)
    Ema.update = parts.timed("average", Ema.update)  # type: ignore[method-assign]
    loop.Trainer = Timed  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as out, contextlib.suppress(Finished):
        train(parse(kind, [*sys.argv[1:], "--out", out, "--trackers"]), parts)
    for name in ("forward", "forward and backward", "clipping", "optimizer", "average", "whole step"):
        times = [step.get(name, 0) for step in parts.steps[_WARM_UP + 1 :]]
        print(f"{name:22} {statistics.median(times):7.1f}  {min(times):7.1f} to {max(times):.1f}")


if __name__ == "__main__":
    main()
