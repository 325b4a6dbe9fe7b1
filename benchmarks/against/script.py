"""A process that runs diffusers' train_text_to_image.py unchanged, for `peers.py` and `speedrun.py`.

    python benchmarks/against/script.py '{"script": …, "arguments": […], "record": "", "log": "", "threads": 1}'

The script runs as it is. Functions of the libraries that it calls are wrapped: the update of its moving average, the
last call of each step, waits for the next turn. With `record`, the script's inputs, random numbers and losses are
written into that file instead, so that another loop can be compared with it. With `log`, it trains to its end, and its
losses are written into that file.
"""

import json
import runpy
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from against.finetuning import LOG_EVERY, write_loss
from against.served import Server, open_server

Wrap = Callable[..., Any]


def wait_for_turns(server: Server) -> None:
    """Make the script wait for its turn after each step."""
    from diffusers.training_utils import EMAModel

    update, left = EMAModel.step, -1

    def step(self: Any, parameters: Any) -> None:
        nonlocal left
        update(self, parameters)
        if left < 0:
            server.forget_memory()
            server.answer(ready=True)
        elif left == 0:
            server.called()
        left = (left if left > 0 else server.next_calls()) - 1

    EMAModel.step = step


def record(path: str) -> None:
    """Write inputs, random numbers and losses of all steps into a file when the training ends."""
    import accelerate
    import diffusers.models.autoencoders.vae as vae_module
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    found: dict[str, list[Any]] = {name: [] for name in ("pixels", "posterior", "noise", "timesteps", "ids", "loss")}

    def input_of(function: Wrap, name: str) -> Wrap:
        def wrapped(self: Any, first: Any, *more: Any, **named: Any) -> Any:
            found[name].append(first.clone())
            return function(self, first, *more, **named)

        return wrapped

    def output_of(function: Wrap, name: str) -> Wrap:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            found[name].append(function(*arguments, **named))
            return found[name][-1]

        return wrapped

    def log(self: Any, values: Mapping[str, Any], *arguments: Any, **named: Any) -> None:
        if "train_loss" in values:
            found["loss"].append(values["train_loss"])

    def end(self: Any) -> None:
        torch.save(found, path)

    AutoencoderKL.encode = input_of(AutoencoderKL.encode, "pixels")
    CLIPTextModel.forward = input_of(CLIPTextModel.forward, "ids")  # type: ignore[method-assign]
    vae_module.randn_tensor = output_of(vae_module.randn_tensor, "posterior")
    torch.randn_like = output_of(torch.randn_like, "noise")
    torch.randint = output_of(torch.randint, "timesteps")
    accelerate.Accelerator.log = log  # type: ignore[method-assign]
    accelerate.Accelerator.end_training = end  # type: ignore[method-assign]


def log_losses(path: str) -> None:
    """Write a line with the mean loss of each 50 steps into a file."""
    import accelerate

    losses: list[float] = []

    def log(self: Any, values: Mapping[str, Any], step: int, *arguments: Any, **named: Any) -> None:
        losses.append(values["train_loss"])
        if step % LOG_EVERY == 0:
            write_loss(path, step, losses)

    accelerate.Accelerator.log = log  # type: ignore[method-assign]


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    if spec["record"]:
        record(spec["record"])
    elif spec["log"]:
        log_losses(spec["log"])
    else:
        wait_for_turns(open_server("cuda" if torch.cuda.is_available() else "cpu"))
    sys.argv = [spec["script"], *spec["arguments"]]
    runpy.run_path(spec["script"], run_name="__main__")


if __name__ == "__main__":
    main()
