"""Mark the settings that may change when a run is continued: `steps: Annotated[int, Resumable()] = 1000`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, NamedTuple

from train.config.limits import PathText
from train.config.load import plain


@dataclass(frozen=True)
class Resumable:
    """Mark of a setting that may change when a run is continued."""

    location: bool = False
    """Whether it is a path, of which only the last part is published."""
    on_request: bool = False
    """Whether a change must be requested with --resume-with-changes; it is then recorded."""
    on_request_only: Any = None
    """Value that is set or replaced only on request. Other changes need no request."""
    never: Any = None
    """Value that can't be set or replaced, because the run has other weights with it than without it."""


@dataclass(frozen=True)
class Fixed:
    """Mark of a setting, or of a record of settings, that can't change within a run."""

    why: str = "it determines which weights the run has"


ON_REQUEST = Resumable(on_request=True)
Location = Annotated[PathText, Resumable(location=True)]


class Difference(NamedTuple):
    """Setting that has changed and that doesn't change freely."""

    name: str
    """Dotted name, as on the command line but with underscores."""
    before: Any
    now: Any
    why: str = ""
    """Reason why it can't change; empty if it can on request."""

    @property
    def option(self) -> str:
        return f"--{self.name.replace('_', '-')}"


def differences(before: object, now: object) -> Iterator[Difference]:
    """Yield the differences between two configurations of a stage that aren't free, in the order of the fields."""
    fixed = getattr(now, "fixed", {})
    return (d._replace(why=fixed.get(d.name, d.why)) for d in _differences(before, now))


def _differences(before: object, now: object, prefix: str = "", fixed: str = "") -> Iterator[Difference]:
    """Yield the differences between two records. fixed: reason why no setting in them can change."""
    for name, mark, old, new in _fields(before, now):
        why = mark.why if isinstance(mark, Fixed) else fixed
        if is_dataclass(new):
            yield from _differences(old, new, f"{prefix}{name}.", why)
            continue
        if isinstance(mark, Resumable):
            if old == new or not (mark.on_request or _either(mark.on_request_only, old, new)):
                continue
            why = Fixed().why if _either(mark.never, old, new) else ""
        if old != new:
            yield Difference(prefix + name, old, new, why)


def _either(value: Any, old: Any, new: Any) -> bool:
    return value is not None and value in (old, new)


def published(config: object, shorten: Callable[[str], str]) -> dict[str, Any]:
    """Convert a configuration like `plain`, with each location shortened to the part that may be published."""
    values = plain(config)
    for name, mark, _, value in _fields(config, config):
        if is_dataclass(value):
            values[name] = published(value, shorten)
        elif isinstance(mark, Resumable) and mark.location:
            values[name] = shorten(value)
    return values


def _fields(before: Any, now: Any) -> Iterator[tuple[str, Resumable | Fixed | None, Any, Any]]:
    """Yield the name, mark and both values of each field."""
    for name, field in now.__pydantic_fields__.items():
        mark = next((m for m in field.metadata if isinstance(m, Resumable | Fixed)), None)
        yield name, mark, getattr(before, name), getattr(now, name)
