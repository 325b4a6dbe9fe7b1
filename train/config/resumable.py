"""Mark the settings that may change when a run is continued: `steps: Annotated[int, Resumable()] = 1000`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, NamedTuple

from train.config.load import plain


@dataclass(frozen=True)
class Resumable:
    """Mark of a setting that may change when a run is continued. Settings without this mark must not change."""

    location: bool = False
    """Whether it is a path: its content is compared, not the path, and only the path's last part is published."""
    unless: str | None = None
    """Value that may neither be set nor replaced when a run is continued."""


Location = Annotated[str, Resumable(location=True)]


class Difference(NamedTuple):
    """Setting that has changed although it must not."""

    name: str
    """Dotted name, as on the command line but with underscores."""
    before: Any
    now: Any


def differences(before: object, now: object, prefix: str = "") -> Iterator[Difference]:
    """Yield the forbidden differences between two configurations of one class, in the order of the fields."""
    for name, mark, old, new in _fields(before, now):
        if is_dataclass(new):
            yield from differences(old, new, f"{prefix}{name}.")
        elif old != new and (mark is None or mark.unless in (old, new)):
            yield Difference(prefix + name, old, new)


def published(config: object, shorten: Callable[[str], str]) -> dict[str, Any]:
    """Convert a configuration like `plain`, with each location shortened to the part that may be published."""
    values = plain(config)
    for name, mark, _, value in _fields(config, config):
        if is_dataclass(value):
            values[name] = published(value, shorten)
        elif mark is not None and mark.location:
            values[name] = shorten(value)
    return values


def _fields(before: Any, now: Any) -> Iterator[tuple[str, Resumable | None, Any, Any]]:
    """Yield the name, mark and both values of each field."""
    for name, field in now.__pydantic_fields__.items():
        mark = next((m for m in field.metadata if isinstance(m, Resumable)), None)
        yield name, mark, getattr(before, name), getattr(now, name)
