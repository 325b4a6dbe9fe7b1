"""From a command line to a typed configuration, and from an exception to one plain line and an exit status."""

import contextlib
import errno
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import diffusers
import torch
import transformers
import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from ldm.errors import RunError, UserError
from ldm.spacing import SamplerKind, Spacing

Config = TypeVar("Config")
_LESS = "lower --batch-size; in training --accumulation splits it, in painting --tile and a smaller picture help"
_EXPECTED = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How pictures are sampled: the part of a command line that all painting scripts share."""

    steps: int = 25
    """Sampler steps."""
    guidance_scale: float = 3.0
    """1 is the conditional prediction alone; larger follows the prompt more closely."""
    guidance_rescale: float = 0.0
    """0 to 1: how much of the contrast that a large scale brings is taken back (Lin et al. 2024)."""
    guidance_interval: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="LOW HIGH")] = None
    """Noise levels sigma / alpha between which to guide by prompts, e.g. 0.5 4; elsewhere half the work is saved."""
    sampler: SamplerKind = "dpmpp_2m"
    """How a step is taken; docs/mathematics.md compares them by the steps they need."""
    spacing: Spacing | None = None
    """Of the steps over the noise levels; the model's own unless given. On linspace ddim leaves noise in the picture; karras
    isn't for ddim, ddpm, a flow or zero terminal SNR."""
    eta: float = 0.0
    """ddim's share of noise, 0 to 1."""

    def sampling(self) -> dict[str, Any]:
        """As the pipeline's arguments."""
        named = {f.name: getattr(self, f.name) for f in fields(SamplingOptions)}
        return {"num_inference_steps": named.pop("steps"), **named}


def parse(kind: type[Config], arguments: list[str] | None = None) -> Config:
    """Read a configuration: its defaults, over them a YAML file, over that the command line.

    The first argument may be the YAML file; all others are `--dotted.name value`. `--print-config` prints the
    result and exits. Raises UserError for a file, a key or a value that doesn't fit.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    show = "--print-config" in arguments
    arguments = [a for a in arguments if a != "--print-config"]
    given = read_yaml(Path(arguments.pop(0))) if arguments and not arguments[0].startswith("-") else {}
    if str(given.get("data", "")).startswith("pipe:"):
        raise UserError(f"data: {given['data']!r} is a command, which no file may give: write it as --data")
    config = overlay(kind, validate(kind, given), arguments, flags=False)
    if show:
        print(dump(config), end="")
        raise SystemExit(0)
    return config


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for k, key in enumerate(keys) if key in keys[:k]), None):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file, by the safe loader: a file can't name code."""
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read the configuration {str(path)!r}: {getattr(error, 'strerror', error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not plain YAML: {_line(str(error))}") from None
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise UserError(f"{path} holds a {type(given).__name__}; a configuration is a mapping of names to values")
    return given


def validate(kind: type[Config], given: dict[str, Any]) -> Config:
    """A configuration of this kind, or a UserError that names the first wrong key, its value and what fits."""
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        raise UserError(_first_error(error)) from None


def use_device(name: str) -> torch.device:
    """A device that is there. Raises UserError otherwise."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name!r} can't be used: {_line(str(error))[:200]}") from None
    return device


def overlay(kind: type[Config], default: Config, arguments: list[str] | None = None, *, flags: bool = True) -> Config:
    """The configuration with `--dotted.name value` arguments (else the process's own) laid over it.

    flags: what is on or off is given as --name or --no-name; else as --name True or False, like all that a file may hold.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind, default=default, args=arguments, config=() if flags else (tyro.conf.FlagConversionOff,)
            )
    except SystemExit as exit:
        if exit.code in (0, None):
            raise
        raise UserError(_first_sentence(said.getvalue())) from None


def dump(config: object) -> str:
    """The configuration as YAML that `parse` reads back."""
    return yaml.safe_dump(
        TypeAdapter(type(config)).dump_python(config, mode="json"), sort_keys=False, allow_unicode=True
    )


def command(main: Callable[[], None]) -> NoReturn:
    """Run a script's main: exit 0 on success, 2 for bad input, 1 for a failure, 128 + n when stopped by signal n."""
    warnings.filterwarnings("ignore", module="huggingface_hub")  # of how other libraries call it
    warnings.formatwarning = lambda message, *_, **__: f"warning: {_line(str(message))}\n"
    diffusers.logging.set_verbosity(logging.CRITICAL)  # what it tells of a failure, our error tells
    transformers.logging.set_verbosity_error()  # it lists what a part of a model leaves unread; what lacks is our error
    transformers.logging.disable_progress_bar()
    try:
        main()
    except UserError as error:
        _leave(2, error)
    except ValidationError as error:
        _leave(2, _first_error(error))
    except RunError as error:
        _leave(1, error)
    except torch.OutOfMemoryError:
        _leave(1, f"out of memory on the device: {_LESS}")
    except MemoryError:
        _leave(1, f"out of memory: {_LESS}")
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        _leave(1, f"out of memory: {_LESS}")
    except OSError as error:
        if error.errno not in _EXPECTED:
            raise
        _leave(1, f"{error.strerror}: {error.filename}" if error.filename else f"{error.strerror} while writing")
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    raise SystemExit(0)


def _leave(status: int, what: object) -> NoReturn:
    if os.environ.get("RANK", "0") == "0" or status == 1:
        print(f"error: {_line(str(what))}", file=sys.stderr)
    raise SystemExit(status)


def _first_error(error: ValidationError) -> str:
    """The first wrong key, its value and what fits."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        return f"unknown key {name!r} in the configuration: --help lists those there are"
    what = f"{name} = {first['input']!r}: " if name else ""
    return f"{what}{first['msg'].removeprefix('Value error, ')}"


def _line(text: str) -> str:
    return " ".join(text.split())


def _first_sentence(box: str) -> str:
    """What a boxed message of tyro's says, without its frame, its help and pydantic's postscripts."""
    lines = [line.strip(" │╭╰╮╯").strip() for line in box.splitlines()[1:]]
    text = _line(" ".join(lines[: next((i for i, line in enumerate(lines) if line.startswith("──")), None)]))
    text = re.sub(r"\[type=.*?input_value=(.*?), *input_type=[^\]]*\]", r"(given: \1)", text)
    text = re.sub(r"For further information visit \S+|Error parsing \w+: \d+ validation errors? for \w+", "", text)
    text = re.sub(r"\(given: ArgsKwargs.*", "", text)  # of a whole record, which says nothing more
    return _line(text.replace("Value error, ", "")) or "the command line can't be read; see --help"
