"""Mark the settings that may change when a run is continued: `steps: Annotated[int, Resumable()] = 1000`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, NamedTuple

from train.config.load import plain


@dataclass(frozen=True)
class Resumable:
    """Mark of a field that may change when a run is continued. Fields without this mark must not change."""

    place: bool = False
    """Mark of a location: its content is compared, not its path, and only the last part of the path is published."""
    unless: str | None = None
    """Value that may not be changed to another value, nor another value to it."""


Place = Annotated[str, Resumable(place=True)]


class Difference(NamedTuple):
    """Setting that has changed although it must not."""

    name: str
    """Dotted name, as on the command line but with underscores."""
    before: Any
    now: Any


def differences(before: object, now: object, prefix: str = "") -> Iterator[Difference]:
    """Yield the forbidden differences between two configurations of one class, in the order of the fields."""
    for name, mark, was, value in _fields(before, now):
        if is_dataclass(value):
            yield from differences(was, value, f"{prefix}{name}.")
        elif was != value and (mark is None or mark.unless in (was, value)):
            yield Difference(prefix + name, was, value)


def published(config: object, shorten: Callable[[str], str]) -> dict[str, Any]:
    """Convert a configuration like `plain`, with each location shortened to the part that may be published."""
    known = plain(config)
    for name, mark, _, value in _fields(config, config):
        if is_dataclass(value):
            known[name] = published(value, shorten)
        elif mark is not None and mark.place:
            known[name] = shorten(value)
    return known


def _fields(before: Any, now: Any) -> Iterator[tuple[str, Resumable | None, Any, Any]]:
    """Yield the name, mark and both values of each field."""
    for name, field in now.__pydantic_fields__.items():
        mark = next((m for m in field.metadata if isinstance(m, Resumable)), None)
        yield name, mark, getattr(before, name), getattr(now, name)
