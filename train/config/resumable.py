"""What may differ when a run is continued, said at the field itself: `steps: Annotated[int, Resumable()] = 1000`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, NamedTuple

from train.config.load import plain


@dataclass(frozen=True)
class Resumable:
    """Mark of a field that may differ when a run is continued. All fields without it must stay as they were."""

    place: bool = False
    """The field says where something lies: its content is compared instead, and only its last name is published."""
    unless: str | None = None
    """The one value that may not become another, nor another it."""


Place = Annotated[str, Resumable(place=True)]


class Difference(NamedTuple):
    """A setting that must stay as it was and doesn't."""

    name: str
    """Dotted, as on the command line but with underscores."""
    before: Any
    now: Any


def differences(before: object, now: object, prefix: str = "") -> Iterator[Difference]:
    """What differs between two configurations of one class and may not, in the order of the fields."""
    for name, mark, was, value in _fields(before, now):
        if is_dataclass(value):
            yield from differences(was, value, f"{prefix}{name}.")
        elif was != value and (mark is None or mark.unless in (was, value)):
            yield Difference(prefix + name, was, value)


def published(config: object, shorten: Callable[[str], str]) -> dict[str, Any]:
    """The configuration as `plain`, each place shortened to what may be published of it."""
    known = plain(config)
    for name, mark, _, value in _fields(config, config):
        if is_dataclass(value):
            known[name] = published(value, shorten)
        elif mark is not None and mark.place:
            known[name] = shorten(value)
    return known


def _fields(before: Any, now: Any) -> Iterator[tuple[str, Resumable | None, Any, Any]]:
    """Name, mark and both values of each field."""
    for name, field in now.__pydantic_fields__.items():
        mark = next((m for m in field.metadata if isinstance(m, Resumable)), None)
        yield name, mark, getattr(before, name), getattr(now, name)
