"""From a file and a command line to a typed configuration, and back to YAML."""

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from ldm.errors import UserError

Config = TypeVar("Config")


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
        raise UserError(f"{path} is not plain YAML: {one_line(str(error))}") from None
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


def plain(config: object) -> dict[str, Any]:
    """The configuration as JSON and YAML hold it."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def dump(config: object) -> str:
    """The configuration as YAML that `parse` reads back."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def first_error(error: ValidationError) -> str:
    """The first wrong key, its value and what fits."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "unexpected_keyword_argument":
        return f"unknown key {name!r} in the configuration: --help lists those there are"
    what = f"{name} = {first['input']!r}: " if name else ""
    return f"{what}{first['msg'].removeprefix('Value error, ')}"


def one_line(text: str) -> str:
    """The text with every run of white space a single space."""
    return " ".join(text.split())


def _first_sentence(box: str) -> str:
    """What a boxed message of tyro's says, without its frame, its help and pydantic's postscripts."""
    lines = [line.strip(" │╭╰╮╯").strip() for line in box.splitlines()[1:]]
    text = one_line(" ".join(lines[: next((i for i, line in enumerate(lines) if line.startswith("──")), None)]))
    text = re.sub(r"\[type=.*?input_value=(.*?), *input_type=[^\]]*\]", r"(given: \1)", text)
    text = re.sub(r"For further information visit \S+|Error parsing \w+: \d+ validation errors? for \w+", "", text)
    text = re.sub(r"\(given: ArgsKwargs.*", "", text)  # of a whole record, which says nothing more
    return one_line(text.replace("Value error, ", "")) or "the command line can't be read; see --help"
