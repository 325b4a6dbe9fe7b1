"""From a file and a command line to a typed configuration, and back to YAML."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any, Protocol, TypeVar

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from ldm.errors import UserError, one_line
from train.config.options import Option, read_options


class Checked(Protocol):
    """A configuration whose settings can be held against one another once all of them are read."""

    def check(self) -> None: ...


Config = TypeVar("Config")
Stage = TypeVar("Stage", bound=Checked)


def parse(kind: type[Stage], arguments: list[str] | None = None) -> Stage:
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
    config.check()
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
        raise UserError(f"{path} is not plain YAML: {one_line(error)}") from None
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
        raise UserError(first_error(error)) from None


def overlay(kind: type[Config], default: Config, arguments: list[str] | None = None, *, flags: bool = True) -> Config:
    """The configuration with `--dotted.name value` arguments (else the process's own) laid over it; `--help` lists them all.

    flags: what is on or off is given as --name or --no-name; else as --name True or False, like all that a file may hold.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments or "-h" in arguments:
        tyro.cli(kind, default=default, args=["--help"], config=() if flags else (tyro.conf.FlagConversionOff,))
    given = read_options(kind, arguments, flags=flags)
    tree = asdict(default)  # type: ignore[call-overload]
    for name, option in given.items():
        *records, last = name.split(".")
        reduce(dict.__getitem__, records, tree)[last] = option.value
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        raise UserError(first_error(error, given)) from None


def plain(config: object) -> dict[str, Any]:
    """The configuration as JSON and YAML hold it."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def dump(config: object) -> str:
    """The configuration as YAML that `parse` reads back."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def first_error(error: ValidationError, given: Mapping[str, Option] | None = None) -> str:
    """The first wrong setting, as it was given on the command line or in a file, and what fits."""
    first = error.errors()[0]
    name, said = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
    if first["type"] == "unexpected_keyword_argument":
        return f"unknown key {name!r} in the configuration: --help lists those there are"
    if option := next((o for n, o in (given or {}).items() if f"{name}.".startswith(f"{n}.")), None):
        return f"{option.text}: {said}"
    if not name or first["type"] == "value_error":  # of a record, whose parts don't agree
        return f"{name}: {said}".removeprefix(": ")
    return f"{name} = {first['input']!r}: {said}"
