"""The device of a run and its processes."""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator

from ldm.errors import UserError
from train.config.run import RunConfig
from train.engine.checkpoint import Checkpoints
from train.engine.console import Console

_SHARDING = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")  # accelerate's ACCELERATE_USE_…


def open_accelerator(config: RunConfig) -> Accelerator:
    """Set up the device and the process group. The trainer handles precision and gradient accumulation itself.

    Raises SystemExit with status 0 if the run in --out is already beyond --steps.
    """
    if not config.out:
        raise UserError("--out is missing: give a folder for the run, e.g. --out runs/mine")
    if config.precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError("--precision bf16: this GPU does not support bfloat16; use fp16 or fp32")
    for name in config.trackers:
        if find_spec(name) is None:
            raise UserError(f"--trackers {name}: not installed; run: pip install {name.replace('_', '-')}")
    for sharding in _SHARDING:
        if os.environ.get(f"ACCELERATE_USE_{sharding}", "false").lower() in ("1", "true"):
            raise UserError(f"accelerate's {sharding} isn't supported: run `accelerate config` again without it")
    try:
        # "no", because accelerate's own autocast would wrap only the forward pass of a distributed module
        accelerator = Accelerator(mixed_precision="no", log_with=list(config.trackers) or None, project_dir=config.out)
    except (ImportError, ValueError) as error:
        raise UserError(f"--trackers {' '.join(config.trackers)}: {error}") from None
    console = Console(accelerator.is_main_process)
    step = Checkpoints(Path(config.out) / "checkpoints").newest_step()
    if step > config.steps:
        console(
            f"{config.out} is at step {step}, beyond --steps {config.steps}: nothing to do; give a larger --steps to "
            "continue it"
        )
        raise SystemExit(0)
    gpus = torch.cuda.device_count() if accelerator.device.type == "cuda" else 0
    for warning in launcher_warnings(config, accelerator.num_processes, gpus, os.environ):
        console(f"warning: {warning}")
    return accelerator


def launcher_warnings(config: RunConfig, processes: int, gpus: int, environment: Mapping[str, str]) -> list[str]:
    """Return a line for each setting of `accelerate launch` without effect, and for GPUs that aren't used.

    The launcher passes its settings in the environment. gpus: number of GPUs that this process can see.
    """
    lines = []
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", config.precision):
        lines.append(
            f"accelerate's mixed precision {precision} has no effect: the run uses --precision {config.precision}"
        )
    parts = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if parts not in ("1", str(config.accumulation)):
        lines.append(
            f"accelerate's gradient accumulation {parts} has no effect: the run uses --accumulation "
            f"{config.accumulation}"
        )
    compiler = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler != "no":
        lines.append(f"accelerate compiles the networks with {compiler}, which is untested here")
    launched = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    if launched and "WORLD_SIZE" not in environment and processes == 1:  # see accelerate's simple launcher
        lines.append(
            "accelerate launch was given several processes but started one: on a CPU it needs MPI; use torchrun "
            "instead (docs/multi_gpu.md)"
        )
    if gpus > processes == 1:
        lines.append(f"1 of {gpus} GPUs is used; to use all: accelerate launch --num_processes {gpus} …")
    return lines


def describe(config: RunConfig, accelerator: Accelerator, attention: str) -> str:
    """Return the device, processes, precision, attention and batch size of a run in one line."""
    device, n, parts = accelerator.device, accelerator.num_processes, config.accumulation
    detail = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    each = f"{config.batch_size // n} per process" + (f" in {parts} parts" if parts > 1 else "")
    return (
        f"device {device.type}{'' if device.type == 'mps' else f' ({detail})'}, {n} process{'es' * (n > 1)}, "
        f"precision {config.precision}, attention {attention}, batch size {config.batch_size} ({each})"
    )
