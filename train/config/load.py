"""Read a typed configuration from a YAML file and the command line, and write it as YAML."""

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from ldm.errors import UserError, is_printable
from ldm.formats.plain_yaml import read_yaml
from train.config.options import Option, field_names, read_options, similar
from train.config.shipped import find_config, shipped, unknown_config
from train.output import help_output, unescaped

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails


class Checked(Protocol):
    """Configuration of a stage. Its check of settings that depend on each other is run when all of them are read."""

    stage: ClassVar[str]

    def check(self) -> None: ...


RESUME_WITH_CHANGES = "--resume-with-changes"
"""Option of the training commands that lets a run continue with other settings. It isn't a setting itself."""
_MOST_QUOTED = 100  # characters of a wrong value
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
    file = find_config(arguments.pop(0), kind.stage) if arguments and not arguments[0].startswith("-") else None
    values = {} if file is None else read_yaml(file)
    if str(values.get("data", "")).startswith("pipe:"):
        raise UserError(
            f"data {values['data']!r}: commands aren't allowed in a configuration file; give this one as --data instead"
        )
    try:
        default = validate(kind, values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    about = (
        f"CONFIG, the first argument: YAML file with the settings below, or one of the names "
        f"{', '.join(shipped(kind.stage))}. Options override its settings.\n\n"
        "--print-config: print all settings as YAML and exit.\n\n"
        f"{RESUME_WITH_CHANGES}: continue the run in --out with other settings or data, e.g. another learning rate or "
        "batch size. Without it, such a change is refused. Changes are recorded in changes.jsonl and the model card."
    )
    usage, also = "[CONFIG] [--print-config]", ["print_config", "resume_with_changes"]
    config = overlay(kind, default, arguments, flags=False, usage=usage, about=about, also=also)
    config.check()
    if show:
        text = dump(config)
        unescaped(text).write(text)
        raise SystemExit(0)
    return config


def parse_training(kind: type[Stage]) -> tuple[Stage, bool]:
    """Read the process's arguments like `parse`. Returns the configuration, and whether changes are requested."""
    arguments = [word for word in sys.argv[1:] if word != RESUME_WITH_CHANGES]
    return parse(kind, arguments), len(arguments) < len(sys.argv) - 1


def parse_any(kinds: Sequence[type[Stage]], given: str) -> Stage:
    """Read a configuration file of any of these kinds, given by its path or name. Raises UserError if none fits."""
    named = [kind for kind in kinds if given in shipped(kind.stage)]
    if not os.path.isfile(given) and not named:
        raise unknown_config(given, [name for kind in kinds for name in shipped(kind.stage)])
    likely = [kind for kind in kinds if Path(given).name.startswith(kind.stage)]
    errors = []
    for kind in (*likely, *(k for k in kinds if k not in likely)):
        try:
            return parse(kind, [given])
        except UserError as error:
            errors.append(error)
    raise errors[0]


def validate(kind: type[Config], values: dict[str, Any]) -> Config:
    """Return a configuration of this kind. Raises UserError that names the first wrong key, its value and what fits."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise UserError(first_error(error, names=field_names(kind))) from None


def overlay(
    kind: type[Config],
    default: Config,
    arguments: list[str] | None = None,
    *,
    flags: bool = True,
    usage: str = "",
    about: str = "",
    also: Sequence[str] = (),
) -> Config:
    """Override a configuration with `--dotted.name value` arguments (default: the process's); `--help` lists them.

    flags: a boolean is given as --name or --no-name; without flags, as --name True or False, as in a file.
    usage, about: `--help`'s words after the program's name, and a paragraph after its description.
    also: further options of the program, which a misspelt one may mean.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments or "-h" in arguments:
        with help_output(yaml.safe_dump(plain(default), allow_unicode=True)):  # the defaults are shown
            tyro.cli(
                kind,
                prog=f"{Path(sys.argv[0]).name} {usage}".rstrip(),
                description="\n\n".join(map(wrapped, f"{kind.__doc__}\n\n{about}".rstrip().split("\n\n"))),
                default=default,
                args=["--help"],
                config=() if flags else (tyro.conf.FlagConversionOff,),
            )
    options = read_options(kind, arguments, flags=flags, also=also)
    tree = asdict(default)  # type: ignore[call-overload]
    for name, option in options.items():
        *records, last = name.split(".")
        reduce(dict.__getitem__, records, tree)[last] = option.value
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        raise UserError(first_error(error, options)) from None


def wrapped(text: str) -> str:
    """Break a paragraph of `--help` into lines that fit the terminal.

    Further lines are indented, because tyro joins lines that begin with a letter.
    """
    width = shutil.get_terminal_size().columns
    return textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def plain(config: object) -> dict[str, Any]:
    """Convert a configuration to values that JSON and YAML can represent."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def dump(config: object) -> str:
    """Convert a configuration to YAML that `parse` can read. Unprintable characters are escaped as in YAML."""
    values = plain(config)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text if is_printable(text) else yaml.safe_dump(values, sort_keys=False)


def first_error(error: ValidationError, options: Mapping[str, Option] | None = None, names: Sequence[str] = ()) -> str:
    """Return a line on the first wrong setting, as written on the command line or in a file, and what is accepted.

    names: all settings, one of which an unknown one may mean.
    """
    first = error.errors()[0]
    name, reason = ".".join(str(part) for part in first["loc"]), _reason(first)
    if first["type"] == "unexpected_keyword_argument":
        found = [repr(n) for n in similar(name.replace("-", "_").lower(), names)]
        hint = f"did you mean {' or '.join(found)}?" if found else "--help lists all keys as options"
        return f"unknown key {name!r}: {hint}"
    if option := next((o for n, o in (options or {}).items() if f"{name}.".startswith(f"{n}.")), None):
        return f"{option.text}: {reason}"
    if first["type"] == "value_error":
        if not name or reason.startswith(name):
            return reason
        if isinstance(first["input"], dict):  # fields of a record contradict each other; the reason names one of them
            return f"{name}.{reason}"
    return f"{name} = {repr(first['input'])[:_MOST_QUOTED]}: {reason}"


def _reason(first: "ErrorDetails") -> str:
    """Return what is accepted instead of a wrong value."""
    limits = first.get("ctx", {})
    match first["type"]:
        case "value_error":
            return first["msg"].removeprefix("Value error, ")
        case "int_parsing" | "int_type" | "int_from_float" | "int_parsing_size":
            return "must be an integer"
        case "float_parsing" | "float_type":
            return "must be a number"
        case "bool_parsing" | "bool_type":
            return "must be True or False"
        case "greater_than_equal":
            return f"must be at least {limits['ge']}"
        case "less_than_equal":
            return f"must be at most {limits['le']:,}"
        case "too_short":
            return f"must have at least {limits['min_length']} value{'s' * (limits['min_length'] > 1)}"
        case _:
            return first["msg"].replace("Input should be", "must be", 1)
