"""Read a typed configuration from a YAML file and the command line, and write it as YAML."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from ldm.errors import UserError, one_line
from train.config.options import Option, read_options
from train.config.shipped import find_config, shipped


class Checked(Protocol):
    """Configuration of a stage, with a check of settings that depend on each other, run when all of them are read."""

    stage: ClassVar[str]

    def check(self) -> None: ...


Config = TypeVar("Config")
Stage = TypeVar("Stage", bound=Checked)


def parse(kind: type[Stage], arguments: list[str] | None = None) -> Stage:
    """Read a configuration: a YAML file overrides the defaults, and the command line overrides both.

    The first argument may be the YAML file, or the name of a shipped one; all others are `--dotted.name value`.
    `--print-config` prints the result and exits. Raises UserError for an invalid file, key or value.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    show = "--print-config" in arguments
    arguments = [a for a in arguments if a != "--print-config"]
    named = bool(arguments) and not arguments[0].startswith("-")
    given = read_yaml(find_config(arguments.pop(0), kind.stage)) if named else {}
    if str(given.get("data", "")).startswith("pipe:"):
        raise UserError(f"data: {given['data']!r} is a command, which no file may give: write it as --data")
    about = f"CONFIG: YAML file, or one of the names {', '.join(shipped(kind.stage))}."
    config = overlay(kind, validate(kind, given), arguments, flags=False, usage="[CONFIG]", about=about)
    config.check()
    if show:
        print(dump(config), end="")
        raise SystemExit(0)
    return config


class _Loader(yaml.SafeLoader):
    """YAML loader that rejects a mapping with a duplicate key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := next((key for k, key in enumerate(keys) if key in keys[:k]), None):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} stands there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file with the safe loader, so that a file can't run code."""
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
    """Return a configuration of this kind. Raises UserError with the first wrong key, its value and what fits."""
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        raise UserError(first_error(error)) from None


def overlay(
    kind: type[Config],
    default: Config,
    arguments: list[str] | None = None,
    *,
    flags: bool = True,
    usage: str = "",
    about: str = "",
) -> Config:
    """Override a configuration with `--dotted.name value` arguments (default: the process's); `--help` lists them all.

    flags: a boolean is given as --name or --no-name; without flags, as --name True or False, as in a file.
    usage, about: `--help`'s words after the program's name, and a paragraph after its description.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments or "-h" in arguments:
        tyro.cli(
            kind,
            prog=f"{Path(sys.argv[0]).name} {usage}".rstrip(),
            description=f"{kind.__doc__}\n\n{about}".rstrip(),
            default=default,
            args=["--help"],
            config=() if flags else (tyro.conf.FlagConversionOff,),
        )
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
    """Convert a configuration to the plain values that JSON and YAML can hold."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def dump(config: object) -> str:
    """Convert a configuration to YAML that `parse` can read."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def first_error(error: ValidationError, given: Mapping[str, Option] | None = None) -> str:
    """Describe the first wrong setting as it was given on the command line or in a file, and what is accepted."""
    first = error.errors()[0]
    name, said = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
    if first["type"] == "unexpected_keyword_argument":
        return f"unknown key {name!r} in the configuration: --help lists those there are"
    if option := next((o for n, o in (given or {}).items() if f"{name}.".startswith(f"{n}.")), None):
        return f"{option.text}: {said}"
    if not name or first["type"] == "value_error":  # an error of a whole record: its fields contradict each other
        return f"{name}: {said}".removeprefix(": ")
    return f"{name} = {first['input']!r}: {said}"
