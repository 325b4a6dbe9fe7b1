"""The last line of a finished training: where the result is, and the command that comes next."""

import os
import shlex
import sys
from pathlib import Path

from train.config.clip import ClipConfig
from train.config.run import RunConfig
from train.config.shipped import shipped
from train.config.vae import VaeConfig


def print_next(config: RunConfig) -> None:
    """Print the line if the run is finished. Only the main process prints."""
    from train.engine.provenance import is_result

    model = Path(config.out) / "model"
    if os.environ.get("RANK", "0") == "0" and is_result(model, config.steps):
        print(f"done, in {model}; next: {next_command(config, sys.argv)}", flush=True)


def next_command(config: RunConfig, argv: list[str]) -> str:
    """Return the command that uses the run's model: the next stage or, after the last one, txt2img.

    argv: the program and its arguments, from which the form of the commands and the configuration's name are taken.
    """
    out = Path(config.out)
    match config:
        case ClipConfig():
            words = _training("vae", config, argv)
        case VaeConfig():
            clip = out.parent / "clip" / "model"
            encoder = str(clip) if clip.is_dir() else "FOLDER"
            words = [*_training("ldm", config, argv), "--vae", str(out / "model"), "--text-encoder", encoder]
        case _:
            words = [*_program("txt2img", argv), "--model", str(out / "model"), "--prompt", "a caption", "--out", "out"]
    return shlex.join(words)


def _training(stage: str, config: RunConfig, argv: list[str]) -> list[str]:
    out = str(Path(config.out).parent / stage)
    return [*_program(f"train_{stage}", argv), *_config(stage, argv), "--data", config.data, "--out", out]


def _program(name: str, argv: list[str]) -> list[str]:
    program = Path(argv[0])
    if program.suffix == ".py":
        return ["python", str(program.with_name(f"{name}.py"))]
    return [f"ldm-{name.replace('_', '-')}"]


def _config(stage: str, argv: list[str]) -> list[str]:
    """Return the configuration of the next stage beside that of this one; nothing if there is none."""
    given = next(iter(argv[1:]), "-")
    beside = Path(given).with_name(f"{stage}.yaml")
    if given.startswith("-"):
        return []
    if beside.is_file():
        return [str(beside)]
    name = str(Path(given).with_name(stage))
    return [name] if name in shipped(stage) else []
