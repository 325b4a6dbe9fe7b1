"""diffusers' train_text_to_image.py as a contestant, and the proof that the loop of `training.py` makes its steps."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from against.contest import Contestant
from against.finetuning import AUTOCAST, Finetuning
from against.models import SHAPES, pipeline_folder
from against.options import Options
from ldm.errors import RunError, one_line

STEPS = 5
_ENDLESS = 1_000_000


def as_shipped(
    o: Options, name: str, shape: str, batch: int, data: str, record: str = "", steps: int = _ENDLESS
) -> Contestant:
    """Return diffusers' script as a contestant that trains a model of this shape."""
    out = Path(o.work) / "runs" / f"{name}-script"
    shutil.rmtree(out, ignore_errors=True)
    sizes = {"resolution": SHAPES[shape].side * SHAPES[shape].factor, "train_batch_size": batch}
    settings = {"learning_rate": 1e-3, "max_train_steps": steps, "mixed_precision": o.precision, "seed": 0} | sizes
    spec = script_spec(o.diffusers, pipeline_folder(shape, Path(o.work)), data, out, settings)
    return Contestant("train_text_to_image.py as shipped", "script.py", spec | {"record": record})


def script_spec(diffusers: str, model: Path, data: str, out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the specification for `script.py`. settings: the script's options by name.

    The script encodes images and captions in each step, and its learning rate is constant.
    """
    named: dict[str, Any] = {
        "pretrained_model_name_or_path": model,
        "train_data_dir": f"{data}/train",
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "checkpointing_steps": _ENDLESS,
        "output_dir": out,
        "cache_dir": f"{out}-cache",
        "report_to": "tensorboard",
        **settings,
    }
    named["mixed_precision"] = {"fp32": "no"}.get(named["mixed_precision"], named["mixed_precision"])
    arguments = ["--use_ema", *(word for key, value in named.items() for word in (f"--{key}", str(value)))]
    path = str(Path(diffusers) / "examples/text_to_image/train_text_to_image.py")
    return {"script": path, "arguments": arguments, "record": "", "log": "", "threads": torch.get_num_threads()}


def compare(o: Options, shape: str, data: str, batch: int = 8) -> dict[str, list[float]]:
    """Return the losses of five steps of the script, and of the loop on the same inputs and random numbers.

    `script`: of the script; `shipped` and `by hand`: of the loop, without and with its optimisations. Raises RunError
    if the script fails.
    """
    path = (Path(o.work) / "script-record.pt").resolve()
    script = as_shipped(o, "equality", shape, batch, data, str(path), STEPS)
    done = subprocess.run(script.command(), env=script.environment(), capture_output=True, text=True)
    if done.returncode != 0:
        raise RunError(f"{script.name}: {one_line(done.stderr.strip().splitlines()[-1], 200)}")
    record = torch.load(path, weights_only=True)
    found = {"script": [float(loss) for loss in record["loss"]]}
    for name, how in (("shipped", "shipped"), ("by hand", "fused attention")):
        found[name] = _losses(o, pipeline_folder(shape, Path(o.work)), record, how)
    return found


def _losses(o: Options, folder: Path, record: dict[str, list[torch.Tensor]], how: str) -> list[float]:
    from ldm.networks.attention import use_attention

    dtype = AUTOCAST[o.precision]
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype)
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=dtype)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32)
    if "attention" in how.split():
        use_attention(unet)
    loop = Finetuning(unet, torch.device("cpu"), o.precision, how)
    loop.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    losses = []
    for k in range(STEPS):
        with torch.no_grad():
            posterior = vae.encode(record["pixels"][k]).latent_dist
            x0 = (posterior.mean + posterior.std * record["posterior"][k]) * vae.config.scaling_factor
            condition = text(record["ids"][k], return_dict=False)[0]
        losses.append(float(loop.step(x0, record["noise"][k], record["timesteps"][k], condition)))
    return losses
