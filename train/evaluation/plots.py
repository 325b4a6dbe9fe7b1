"""Plots of a report as SVG, drawn by matplotlib, with the colours of the page's style sheet."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

_COLOURS = 6  # lines with colours of their own; further ones repeat them
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # texts stay texts
    "text.parse_math": False,
    "font.size": 9,
    "axes.edgecolor": "#010101",
    "axes.labelcolor": "#010101",
    "xtick.color": "#010101",
    "ytick.color": "#010101",
    "text.color": "#010101",
    "grid.color": "#020202",
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
}
_VARIABLES = {"#010101": "var(--muted)", "#020202": "var(--line)"} | {
    f"#0{k + 3}0{k + 3}0{k + 3}": f"var(--line-{k + 1})" for k in range(_COLOURS)
}


def svg(plot: Mapping[str, Any]) -> str:
    """Return a plot of report.json (`results.Plot`) as an SVG element whose colours are CSS variables.

    Raises KeyError, TypeError or ValueError for other content.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    with rc_context({**_STYLE, "svg.hashsalt": plot["name"]}):
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        axes = figure.add_subplot()
        for k, series in enumerate(plot["series"]):
            x, y = _numbers(series["x"]), _numbers(series["y"])
            colour, style = f"#{f'0{k % _COLOURS + 3}' * 3}", "-" if k < _COLOURS else "--"
            marker = "o" if len(x) <= 30 else ""
            axes.plot(x, y, style, color=colour, marker=marker, markersize=3, label=str(series["name"]))
            if series.get("error"):
                error = _numbers(series["error"])
                low, high = ([a + sign * b for a, b in zip(y, error, strict=True)] for sign in (-1, 1))
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel(str(plot["x"]))
        axes.set_ylabel(str(plot["y"]))
        for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            if plot.get(f"log_{name}"):
                axes.set(**{f"{name}scale": "log"})
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.set_minor_formatter(NullFormatter())
        if not any(any(_numbers(series["y"])) for series in plot["series"]):
            axes.set_ylim(0, 1)  # numbers that are all 0 have no negative axis
        axes.grid(True, axis="y")
        if len(plot["series"]) > 1:
            axes.legend(frameon=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _themed(file.getvalue(), plot["title"])


def _themed(text: str, title: str) -> str:
    """Return the SVG element without matplotlib's fonts, with the page's colours, as wide as its column."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub("|".join(_VARIABLES), lambda found: _VARIABLES[found[0]], text)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else float(value) for value in values]


def merged(plots: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return one plot with the lines of all. plots: name of the model and its plot, each with the same axes."""
    if len(plots) == 1:
        return dict(plots[0][1])
    lines = [
        dict(series) | {"name": model if len(plot["series"]) == 1 else f"{model}: {series['name']}"}
        for model, plot in plots
        for series in plot["series"]
    ]
    return dict(plots[0][1]) | {"series": lines}
