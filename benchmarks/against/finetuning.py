"""The training of diffusers' train_text_to_image.py, with latents and text features in memory."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXAMPLES = 512  # of random numbers, in memory
LOG_EVERY = 50  # steps
_DROPPED = 0.1  # share of captions


class Batch(NamedTuple):
    """Input of a step: scaled latents (b, c, h, w), noise, timesteps (b,) and text features (b, L, d)."""

    x0: Tensor
    noise: Tensor
    timesteps: Tensor
    condition: Tensor


class Finetuning:
    """The step of train_text_to_image.py, with latents and text features in memory."""

    def __init__(
        self, unet: nn.Module, device: torch.device, precision: str, how: str, lr: float = 1e-3, steps: int = 0
    ) -> None:
        """how: words of optimisations: fused (AdamW), compiled, channels_last; shipped: the script's own calls.

        steps: steps over which the learning rate decays linearly to 0; 0: it is constant.
        """
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        words = how.split()
        self.shipped = "shipped" in words
        self.unet, self.device, self.dtype = unet.to(device).train(), device, AUTOCAST[precision]
        if "channels_last" in words:
            unet.to(memory_format=torch.channels_last)
        self.weights = list[Tensor](unet.parameters())
        self.optimizer = torch.optim.AdamW(self.weights, lr, weight_decay=1e-2, fused="fused" in words or None)
        linear = lambda k: max(0.0, 1 - k / steps) if steps else 1.0  # noqa: E731
        self.decay = torch.optim.lr_scheduler.LambdaLR(self.optimizer, linear)
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.ema = EMAModel(self.weights) if self.shipped else None
        self.average = [] if self.shipped else [w.detach().clone() for w in self.weights]
        self.updates = 0
        if self.ema is not None:
            self.ema.to(device)
        if "compiled" in words:
            unet.compile()
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step(self, x0: Tensor, noise: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Make a step on the fields of a Batch, and return the loss."""
        noisy = self.scheduler.add_noise(x0, noise, timesteps)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.unet(noisy, timesteps, condition, return_dict=False)[0]
        loss = F.mse_loss(output.float(), noise.float())
        if self.shipped:
            loss.item()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.decay.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self.weights)
            loss.item()
        else:
            self._average()
        return loss.detach()

    def _average(self) -> None:
        """Update the average as EMAModel does: its decay begins at 0 and grows to 0.9999."""
        k, self.updates = self.updates, self.updates + 1
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.weights, max(1e-4, 9 / (10 + k)) if k else 1.0)

    def copy_average(self) -> None:
        """Replace the network's weights by their average."""
        average = self.average if self.ema is None else self.ema.shadow_params
        with torch.no_grad():
            torch._foreach_copy_(self.weights, average)


def open_loop(spec: Mapping[str, Any], device: torch.device) -> tuple[Finetuning, Iterator[Batch]]:
    """Return the loop and its batches.

    With spec["start"], the folder of a pipeline, and spec["inputs"], a file of latents and text features (see
    `tracks.peer`), they are those of a training; else diffusers' initial weights, and random numbers.
    """
    from diffusers import UNet2DConditionModel

    from ldm.networks.attention import use_attention

    torch.manual_seed(spec.get("seed", 0))
    with torch.device(device):
        if "start" in spec:
            unet = UNet2DConditionModel.from_pretrained(spec["start"], subfolder="unet", torch_dtype=torch.float32)
        else:
            unet = UNet2DConditionModel(**spec["unet"])
    if "attention" in spec["how"].split():
        use_attention(unet)
    loop = Finetuning(unet, device, spec["precision"], spec["how"], spec.get("lr", 1e-3), spec.get("steps", 0))
    stored = load_file(spec["inputs"]) if "inputs" in spec else _random_inputs(spec)
    return loop, _batches({name: value.to(device) for name, value in stored.items()}, spec["batch"], device)


def _random_inputs(spec: Mapping[str, Any]) -> dict[str, Tensor]:
    b, (length, width), side = spec["batch"], spec["condition"], spec["unet"]["sample_size"]
    n = max(b, EXAMPLES)
    mean, std = torch.randn(n, 4, side, side), torch.full((n, 4, side, side), 0.1)
    return {"mean": mean, "std": std, "texts": torch.randn(1 + n, length, width), "rows": 1 + torch.arange(n)}


def _batches(inputs: Mapping[str, Tensor], b: int, device: torch.device) -> Iterator[Batch]:
    """Yield batches of all images in a new order in each epoch, with 10 % of the captions dropped.

    inputs: mean and std of the latents (n, c, h, w); text features, (m, L, d), of which the first are those of no text;
    rows: each image's text, (n,).
    """
    mean, std, texts, rows = (inputs[name] for name in ("mean", "std", "texts", "rows"))
    while True:
        for index in torch.randperm(len(mean), device=device).split(b)[: max(1, len(mean) // b)]:
            x0 = mean[index] + std[index] * torch.randn_like(mean[index])
            dropped = torch.rand(len(index), device=device) < _DROPPED
            timesteps = torch.randint(1000, (len(index),), device=device)
            yield Batch(x0, torch.randn_like(x0), timesteps, texts[torch.where(dropped, 0, rows[index])])


def finetuning(spec: Mapping[str, Any], device: torch.device) -> Callable[[], object]:
    """Return a step of the loop on its batches."""
    loop, batches = open_loop(spec, device)
    return lambda: loop.step(*next(batches))


def train_peer(spec: Mapping[str, Any], device: torch.device) -> None:
    """Train spec["steps"] steps, and write spec["out"]/unet, the averaged weights, and metrics.jsonl."""
    out, losses = Path(spec["out"]), list[float]()
    loop, batches = open_loop(spec, device)
    for step in range(1, spec["steps"] + 1):
        losses.append(float(loop.step(*next(batches))))
        if step % LOG_EVERY == 0 or step == spec["steps"]:
            write_loss(str(out / "metrics.jsonl"), step, losses)
    loop.copy_average()
    unet: Any = loop.unet
    unet.save_pretrained(out / "unet")


def write_loss(path: str, step: int, losses: list[float]) -> None:
    """Append a line with the mean loss since the last one, and the CPU seconds so far; forget the losses."""
    line = {"step": step, "loss": sum(losses) / len(losses), "cpu_seconds": round(time.process_time(), 2)}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    losses.clear()
