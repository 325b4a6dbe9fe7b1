"""The parts of a report: measures, image sheets, plots and tables.

report.json contains them in the lists `measures`, `sheets`, `plots` and `tables`, as objects with the fields below. The
HTML report shows these lists, of one model or of several side by side, so a new measurement needs no change there.
Parts of several reports belong together if they have the same `name` and, for measures, the same `features`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measured number."""

    name: str
    """Identifier, e.g. frechet."""
    title: str
    """Name for readers, e.g. Fréchet distance."""
    value: float | None
    """None if it couldn't be measured or isn't finite."""
    error: float | None = None
    """Standard error, unless the note states another kind of error."""
    baseline: float | None = None
    """The same measure of real images in place of generated ones."""
    better: Literal["lower", "higher", "baseline"] = "lower"
    """Which values are good; `baseline`: those near the baseline."""
    features: str = ""
    """Network that computed the features, with its resizing; empty if none."""
    samples: int = 0
    """Number of generated images."""
    reference: int = 0
    """Number of real images."""
    note: str = ""
    """How it was measured, in a sentence."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """An image file of samples beside report.json."""

    name: str
    """Identifier, e.g. nearest."""
    title: str
    file: str
    """Name of the file, relative to the folder of report.json."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a plot."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    error: Sequence[float | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Lines over one pair of axes, as numbers."""

    name: str
    title: str
    x: str
    """Label of the horizontal axis."""
    y: str
    """Label of the vertical axis."""
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of numbers and texts."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[float | str | None]] = field(default_factory=list)
    note: str = ""


Part = Measure | Sheet | Plot | Table
_LISTS = {Measure: "measures", Sheet: "sheets", Plot: "plots", Table: "tables"}


def lists(parts: Iterable[Part]) -> dict[str, list[dict[str, Any]]]:
    """Return the lists of report.json, all four, with None in place of numbers that aren't finite."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in _LISTS.values()}
    for part in parts:
        found[_LISTS[type(part)]].append(_finite(asdict(part)))
    return found


def measure_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each measure of a report.json: value, error, and the value of real images."""
    shown = None
    for measure in report["measures"]:
        if measure["features"] and measure["features"] != shown:
            shown = measure["features"]
            yield f"in the features {shown}:"
        value, error, real = (measure[name] for name in ("value", "error", "baseline"))
        line = f"  {measure['title']}: " + ("not measured" if value is None else f"{value:.4g}")
        line += "" if error is None else f" ± {error:.2g}"
        yield line + ("" if real is None else f" (real images: {real:.4g})")


def _finite(value: Any) -> Any:
    """Return a copy of nested JSON values in which numbers that aren't finite are None; JSON has no others."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {name: _finite(part) for name, part in value.items()}
        case list() | tuple():
            return [_finite(part) for part in value]
        case _:
            return value
