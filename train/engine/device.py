"""The device of a run and its processes."""

from importlib.util import find_spec

import torch
from accelerate import Accelerator

from ldm.errors import UserError
from train.config.run import RunConfig


def open_accelerator(config: RunConfig) -> Accelerator:
    """Set up the device and the process group. The trainer handles precision and gradient accumulation itself."""
    if not config.out:
        raise UserError("--out is missing: give a folder for the run, e.g. --out runs/mine")
    if config.precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError("--precision bf16: this GPU does not support bfloat16; use fp16 or fp32")
    for name in config.trackers:
        if find_spec(name) is None:
            raise UserError(f"--trackers {name}: not installed; run: pip install {name.replace('_', '-')}")
    try:
        # "no", because accelerate's own autocast would wrap only the forward pass of a distributed module
        return Accelerator(mixed_precision="no", log_with=list(config.trackers) or None, project_dir=config.out)
    except (ImportError, ValueError) as error:
        raise UserError(f"--trackers {' '.join(config.trackers)}: {error}") from None
