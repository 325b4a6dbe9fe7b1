"""A run's folder: what it was made with, what it logs, and whether a command continues it.

out/config.yaml      the resolved configuration, with versions, commit and the content of its inputs
out/metrics.jsonl    a line per log
out/samples/  out/checkpoints/  out/model/
"""

import fcntl
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
import yaml
from accelerate import Accelerator
from tqdm import tqdm

from ldm.errors import UserError
from train.config.load import plain, read_yaml, validate
from train.config.resumable import differences, published
from train.config.run import RunConfig
from train.data.batches.dataset import Batch, StreamDataset, loader
from train.data.batches.unreadable import Damage
from train.data.sources.splits import Source
from train.data.store.atomic import atomic_file
from train.data.store.prefetch import Batched
from train.data.store.shards import Processes

_LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "tokenizers", "numpy")


class Run:
    """A stage's run: its folder, locked while it lasts, and its processes.

    Refuses a folder that was made with other settings, and one in which another process is training.

    inputs: content of what the run is made from, by name, e.g. {"data": fingerprint}.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator, inputs: Mapping[str, str]) -> None:
        self.config, self.accelerator, self.inputs = config, accelerator, dict(inputs)
        self.out = Path(config.out)
        self.name = self.out.name
        self.main = accelerator.is_main_process
        if self.main:
            self._open(self.inputs)
        accelerator.wait_for_everyone()
        self.processes = Processes(
            rank=accelerator.process_index, world=accelerator.num_processes, barrier=accelerator.wait_for_everyone,
            say=self.say,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.accelerator.end_training()
        if self.main:
            begun = (self.out / "checkpoints").exists()
            if self._new and not begun and kind is not None and issubclass(kind, UserError):
                shutil.rmtree(self.out, ignore_errors=True)  # bad input leaves nothing that the next try would trip on
            self._lock.close()

    def _open(self, inputs: dict[str, str]) -> None:
        described = self.out / "config.yaml"
        if described.is_file():
            before = read_yaml(described)
            _refuse_differences(self.out, before, self.config, inputs)
            if not self.config.license:  # once stated, it stands
                self.config = replace(self.config, license=before.get("license", ""))
        elif self.out.is_dir() and any(self.out.iterdir()):
            raise UserError(
                f"--out {str(self.out)!r} holds something that isn't a run (no config.yaml): choose another"
            )
        self._new = not described.is_file()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"--out {str(self.out)!r} can't be a folder: {error.strerror}: {error.filename}") from None
        self._lock = open(self.out / ".lock", "w")  # noqa: SIM115  held open: the lock lives as long as the process
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another process is training in {str(self.out)!r}: wait for it, or choose another --out"
            ) from None
        about = {"inputs": inputs, "versions": versions(), "commit": _commit()}
        text = yaml.safe_dump(plain(self.config) | {"about": about}, sort_keys=False, allow_unicode=True)
        with atomic_file(described) as file:
            file.write(text.encode())
        # One tracker that fails (a missing package) would fail the run at its first log: fail at the start instead.
        self.accelerator.init_trackers(self.name)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self.main:
            tqdm.write(text)
            sys.stdout.flush()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """A line of metrics.jsonl, and the trackers."""
        if not self.main:
            return
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": round(time.time(), 3), **figures}) + "\n")
        self.accelerator.log(dict(figures), step=step)

    def forget_after(self, step: int) -> None:
        """Drop logged lines of steps that will be done again."""
        path = self.out / "metrics.jsonl"
        if self.main and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                with atomic_file(path) as file:
                    file.write("".join(f"{line}\n" for line in kept).encode())

    def validated(self, step: int) -> tuple[int, dict[str, float]]:
        """The last validation up to this step: its step, and its figures by name; none where there was none."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in reversed([line for line in lines if _step_of(line) <= step]):
            logged = json.loads(line)
            if figures := {k.removeprefix("val_"): v for k, v in logged.items() if k.startswith("val_")}:
                return logged["step"], figures
        return 0, {}

    def write_provenance(self, folder: Path, *, step: int, final: bool) -> None:
        """Beside the weights, with which it may be published: what they were trained with."""
        about = {"step": step, "final": final, "date": datetime.now(UTC).isoformat(timespec="seconds"),
                 "versions": versions(), "config": published(self.config, told)}  # fmt: skip
        (folder / "training.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def finished(self, step: int) -> bool:
        """Whether model/ is the result of this step, written at the end of a run."""
        try:
            about = json.loads((self.out / "model" / "training.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return about.get("final") is True and about.get("step") == step

    @property
    def cache(self) -> Path:
        """The folder for what is computed once of the data."""
        given = self.config.cache
        return Path(given) if given not in ("", "off") else self.out.parent / "cache"

    def batches(
        self, dataset: Batched[Batch] | StreamDataset, start: int, damage: Damage | None = None
    ) -> Iterator[list[Batch]]:
        """This process's parts of each step's batch from step `start` on, its tensors on the device."""
        config, accelerator = self.config, self.accelerator
        read = loader(
            dataset, start_step=start, steps=config.steps, batch_size=config.batch_size,
            rank=accelerator.process_index, world=accelerator.num_processes, accumulation=config.accumulation,
            workers=config.workers, pin_memory=accelerator.device.type == "cuda", damage=damage,
        )  # fmt: skip
        for parts in read:
            yield [self.on_device(part) for part in parts]

    def on_device(self, batch: Batch) -> Batch:
        """A batch with its tensors on this process's device."""
        device = self.accelerator.device
        return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}

    def damage(self, source: Source) -> Damage:
        """Counts what can't be read, and lists it and what the source left out in damaged.jsonl."""
        damage = Damage(self.out / "damaged.jsonl", self.config.input.max_damaged, self.say)
        if self.main:
            damage.list(source.left_out)
        return damage

    def agree(self, signal: int, step: int) -> int:
        """The largest signal number that any process has received. Several processes ask each other every 10 steps."""
        if self.accelerator.num_processes == 1:
            return signal
        if step % 10:
            return 0
        mine = torch.tensor([signal], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())


def open_accelerator(config: RunConfig) -> Accelerator:
    """Device and distribution; precision and accumulation are the loop's own."""
    if not config.out:
        raise UserError("--out is missing: the folder for the run, e.g. --out runs/mine")
    if config.precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError("--precision bf16: this GPU has no bfloat16; use fp16 or fp32")
    for name in config.trackers:
        if find_spec(name) is None:
            raise UserError(f"--trackers {name} isn't installed: pip install {name.replace('_', '-')}")
    try:
        # no: its own autocast would wrap the forward of a process group alone
        return Accelerator(mixed_precision="no", log_with=list(config.trackers) or None, project_dir=config.out)
    except (ImportError, ValueError) as error:
        raise UserError(f"--trackers {' '.join(config.trackers)}: {error}") from None


def told(place: str) -> str:
    """Where something came from, as it was typed; but nothing more of this machine, and nothing that opens another."""
    if place.startswith("pipe:"):
        return "pipe:"
    if "://" in place and not place.startswith("file:"):
        return re.sub(r"(?<=://)[^/]*@|[?#].*", "", place)  # without password, and tokens of the query
    scheme, path = re.fullmatch(
        r"((?:file:(?://)?|openclip:|inception:|dinov2:|clip:)?)(.*)", place, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    return scheme + Path(path).name if path.startswith(("/", "~")) else place


def versions() -> dict[str, str]:
    """Of Python and of the libraries that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}


def _refuse_differences(out: Path, before: dict[str, Any], config: RunConfig, inputs: dict[str, str]) -> None:
    about = before.pop("about", {})
    for name, value in inputs.items():
        if (was := about.get("inputs", {}).get(name, "")) != value:
            raise UserError(
                f"--{name.replace('_', '-')} holds something else than what {str(out)!r} was trained on "
                f"({was[:12] or 'nothing'}…, now {value[:12] or 'nothing'}…): use the same, or another --out"
            )
    try:
        was = validate(type(config), before)  # what it didn't know of has its default
    except UserError as error:
        raise UserError(f"{str(out)!r} holds a run of another stage or version ({error}): take another --out") from None
    for name, old, new in differences(was, config):
        raise UserError(
            f"{str(out)!r} was made with --{name.replace('_', '-')} {_say(old)}, not {_say(new)}: "
            "give the same to continue it, or another --out"
        )


def _say(value: object) -> str:
    return (" ".join(map(str, value)) if isinstance(value, tuple) else str(value)) or "''"


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a crash


def _commit() -> str:
    """Of the checkout this code is in, or nothing."""
    try:
        here = Path(__file__).parent
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout.strip() if told.returncode == 0 else ""
