"""Proof that the loop which `peers.py` measures makes the steps of diffusers' train_text_to_image.py."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from against.contest import FOLDER
from against.models import pipeline_folder, training_inputs
from against.options import Options
from against.training import Finetuning
from against.training_rows import as_shipped
from ldm.errors import RunError, one_line

STEPS = 5


def compare(o: Options, shape: str, batch: int = 8) -> dict[str, list[float]]:
    """Return the losses of five steps of the script, and of the loop on the same inputs and random numbers.

    The loop is the script's own in the first list, and optimised by hand in the last. Raises RunError if the script
    fails.
    """
    path = (Path(o.work) / "script-record.pt").resolve()
    inputs = training_inputs(shape, Path(o.work), 1024)
    script = as_shipped(o, "equality", shape, batch, inputs["data"], str(path), str(STEPS))
    command = [sys.executable, str(FOLDER / script.program), json.dumps(script.spec)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RunError(f"{script.name}: {one_line(done.stderr.strip().splitlines()[-1], 200)}")
    record = torch.load(path, weights_only=True)
    found = {"script": [float(loss) for loss in record["loss"]]}
    for how in ("shipped", "fused attention"):
        found[how] = _losses(o, pipeline_folder(shape, Path(o.work)), record, how)
    return found


def _losses(o: Options, folder: Path, record: dict[str, list[torch.Tensor]], how: str) -> list[float]:
    from ldm.networks.attention import use_attention

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[o.precision]
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
