"""A typed configuration as the fields of a form, and the form's values as a configuration.

The fields, their types, their help and their limits are those of the dataclasses in train/config. Values that the form
gives are checked by the same rules as those of a configuration file, with the same messages.
"""

import ast
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, reduce
from itertools import pairwise
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ldm.errors import UserError
from train.config.clip import ClipConfig
from train.config.distill import DistillConfig
from train.config.ldm import LdmConfig
from train.config.load import plain, validate
from train.config.options import nested_words
from train.config.resumable import Resumable
from train.config.run import RunConfig
from train.config.vae import VaeConfig

Kind = Literal["switch", "choice", "choices", "integer", "text", "lines", "location"]
STAGES: dict[str, type[RunConfig]] = {"clip": ClipConfig, "vae": VaeConfig, "ldm": LdmConfig, "distill": DistillConfig}
TRACKERS = ("tensorboard",)
"""The trackers that send nothing to other machines."""
_NOT_SHOWN = {"input.follow_links"}  # would read files outside the given folders


@dataclass(frozen=True)
class Field:
    """A field of a form."""

    name: str
    """Dotted name, as in a configuration file."""
    kind: Kind
    """Widget: a location is a path; lines is a list of texts, one a line; text is anything else that is typed."""
    help: str
    hint: Any
    """Type of the value."""
    choices: tuple[str, ...] = ()

    @property
    def group(self) -> str:
        """Name of the record that has the field; "" for the configuration itself."""
        return self.name.rpartition(".")[0]

    def shown(self, value: Any) -> Any:
        """Convert a value of a configuration, as in JSON, to the widget's value."""
        match self.kind:
            case "switch" | "integer":
                return value
            case "choices":
                return list(value)
            case "lines":
                return "\n".join(value)
            case _:
                return " ".join(map(_word, value)) if isinstance(value, list | tuple) else _word(value)

    def read(self, value: Any) -> Any:
        """Convert the widget's value to one that the configuration's check accepts or refuses."""
        match self.kind:
            case "switch" | "choices" | "integer":
                return value
            case "lines":
                return [line for line in str(value or "").splitlines() if line.strip()]
            case _ if get_origin(self.hint) is tuple:
                return nested_words(self.hint, str(value or "").split())
            case _:
                text = "" if value is None else str(value)
                return None if text == "None" and NoneType in get_args(self.hint) else text


@cache
def form(stage: str) -> tuple[Field, ...]:
    """Return the fields of a stage's form, in the order of its configuration. Records come after plain fields."""
    if stage not in STAGES:
        raise UserError(f"stage {stage!r}: choose {', '.join(STAGES)}")
    found = sorted(_fields(STAGES[stage]), key=lambda field: field.name.count("."))
    groups = dict.fromkeys(field.group for field in found)
    return tuple(field for group in groups for field in found if field.group == group and field.name not in _NOT_SHOWN)


@cache
def group_help(stage: str, group: str) -> str:
    """Return the documentation of a record of settings."""
    kind: Any = reduce(lambda owner, name: get_type_hints(owner)[name], group.split("."), STAGES[stage])
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def values_of(config: RunConfig) -> dict[str, Any]:
    """Return the widgets' values for a configuration, by name of the field."""
    tree = plain(config)
    return {f.name: f.shown(reduce(lambda part, name: part[name], f.name.split("."), tree)) for f in form(config.stage)}


def config_of(stage: str, values: Mapping[str, Any]) -> RunConfig:
    """Return the configuration that a form's values give. Raises UserError for the first wrong one."""
    tree: dict[str, Any] = {}
    known = {field.name: field for field in form(stage)}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"unknown key {name!r}")
        *records, last = name.split(".")
        reduce(lambda part, record: part.setdefault(record, {}), records, tree)[last] = known[name].read(value)
    config = validate(STAGES[stage], tree)
    config.check()
    return config


def locations(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the name and value of each field that is a path and isn't empty."""
    tree = plain(config)
    for field in _fields(type(config)):
        if field.kind == "location":
            value = reduce(lambda part, name: part[name], field.name.split("."), tree)
            if value:
                yield field.name, str(value)


def _fields(kind: type, prefix: str = "") -> Iterator[Field]:
    hints, help_of = get_type_hints(kind), _documentation(kind)
    for name in (f.name for f in fields(kind)):
        hint = hints[name]
        if is_dataclass(hint):
            yield from _fields(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
            continue
        metadata = kind.__pydantic_fields__[name].metadata  # type: ignore[attr-defined]
        location = any(isinstance(mark, Resumable) and mark.location for mark in metadata)
        widget, choices = ("location", ()) if location else _widget(prefix + name, hint)
        yield Field(prefix + name, widget, help_of.get(name, ""), hint, choices)


def _widget(name: str, hint: Any) -> tuple[Kind, tuple[str, ...]]:
    """Return the widget of a type, and the choices that it offers."""
    parts = get_args(hint)
    if name == "trackers":
        return "choices", TRACKERS
    if hint is bool:
        return "switch", ()
    if hint is int:
        return "integer", ()
    if get_origin(hint) is Literal:
        return "choice", tuple(_choices(hint))
    return ("lines", ()) if get_origin(hint) is tuple and parts[0] is str else ("text", ())


def _choices(hint: Any) -> Iterator[str]:
    for part in get_args(hint):
        yield from _choices(part) if get_origin(part) is Literal else (str(part),)


def _word(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return "" if value is None else str(value)


@cache
def _documentation(kind: type) -> dict[str, str]:
    """Return the docstrings below the fields of a dataclass and of the classes that it inherits from."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if not is_dataclass(owner):
            continue
        (tree,) = ast.parse(inspect.getsource(owner)).body
        body: Sequence[ast.stmt] = getattr(tree, "body", ())
        for field, after in pairwise(body):
            match field, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = inspect.cleandoc(text)
    return found
