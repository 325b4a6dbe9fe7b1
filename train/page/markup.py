"""HTML of the page, in which everything that isn't ours is escaped: curves, tables, bars, lines of status."""

import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from train.evaluation.plots import svg

CSS = """
.figures { --muted: var(--neutral-500); --line: var(--border-color-primary);
  --line-1: #2b6a99; --line-2: #c2612c; --line-3: #4c8a50; --line-4: #8b5fa8; --line-5: #b08a1c; --line-6: #6b7078;
  display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(28rem, 100%), 1fr)); }
.dark .figures { --line-1: #79b4de; --line-2: #eb9765; --line-3: #86c58a; --line-4: #c29be0; --line-5: #dcb94d;
  --line-6: #a5abb5; }
.figures figure { margin: 0; padding: .8rem 1rem; border: 1px solid var(--line); border-radius: 8px;
  background: var(--block-background-fill); }
.figures figcaption { font-weight: 600; margin-bottom: .4rem; color: var(--body-text-color); }
.figures svg { width: 100%; height: auto; display: block; }
.figures svg text { font-family: inherit; }
.dark .figures { --muted: var(--neutral-400); }
.facts { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.facts th, .facts td { text-align: left; vertical-align: baseline; padding: .3rem 1.4rem .3rem 0;
  border-bottom: 1px solid var(--border-color-primary); overflow-wrap: anywhere; color: var(--body-text-color); }
.facts th { color: var(--body-text-color-subdued); font-weight: 500; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .15rem .7rem; align-items: center;
  font-size: .86rem; color: var(--body-text-color); font-variant-numeric: tabular-nums; }
.bars i { display: block; height: .8rem; background: var(--line-1); border-radius: 2px; min-width: 1px; }
.status { display: flex; gap: .4rem 1rem; align-items: center; flex-wrap: wrap; margin: .3rem 0; }
.status b { overflow-wrap: anywhere; }
.status .track { flex: 1 0 8rem; height: .5rem; border-radius: 4px; background: var(--border-color-primary); }
.status .track i { display: block; height: 100%; border-radius: 4px; background: var(--color-accent); }
.failed { color: var(--error-text-color, #b00020); }
.lines { max-height: 30rem; overflow: auto; font: .8rem/1.4 var(--font-mono, monospace); white-space: pre-wrap;
  overflow-wrap: anywhere; margin: 0; color: var(--body-text-color); }
.quiet { color: var(--body-text-color-subdued); }
"""
_DRAWING = threading.Lock()  # matplotlib's settings belong to the whole process


def figures(plots: Iterable[Mapping[str, Any]]) -> str:
    """Return plots (`results.Plot` as JSON), each with its title."""
    with _DRAWING:
        shown = [Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(p["title"], _svg(p)) for p in plots]
    return grid(shown) if shown else quiet("nothing to plot yet")


def grid(figures: Iterable[str]) -> str:
    """Return figures side by side, as many as fit."""
    return Markup('<div class="figures">{}</div>').format(Markup().join(map(Markup, figures)))


def _svg(plot: Mapping[str, Any]) -> Markup:
    text = svg(plot)
    # Several SVGs in one page need different names for their parts.
    name = re.sub(r"\W", "-", plot["name"])
    return Markup(re.sub(r'((?:id="|url\(#|xlink:href="#|href="#))', rf"\1{name}-", text))


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """Return a table of names and values."""
    return table((), rows)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table whose first column names the rows."""
    head = Markup().join(Markup("<th>{}</th>").format(name) for name in columns)
    body = Markup().join(
        Markup("<tr><th>{}</th>{}</tr>").format(
            first, Markup().join(Markup("<td>{}</td>").format(cell) for cell in others)
        )
        for first, *others in rows
    )
    return Markup('<table class="facts"><tr>{}</tr>{}</table>').format(head, body)


def bars(title: str, values: Sequence[tuple[str, int]]) -> str:
    """Return a bar chart with a label before each bar and its number behind it."""
    largest = max((number for _, number in values), default=0) or 1
    row = Markup('<span>{}</span><i style="width: {:.1f}%"></i><span>{:,}</span>')
    rows = Markup().join(row.format(label, 100 * number / largest, number) for label, number in values)
    return Markup('<figure><figcaption>{}</figcaption><div class="bars">{}</div></figure>').format(title, rows)


def status(name: str, text: str, share: float, *, failed: bool = False) -> str:
    """Return a line on a run, with a bar of the share that is done."""
    return Markup(
        '<div class="status"><b>{}</b><span class="{}">{}</span><span class="track"><i style="width: {:.1f}%"></i>'
        "</span></div>"
    ).format(name, "failed" if failed else "", text, 100 * min(1.0, max(0.0, share)))


def lines(texts: Sequence[str]) -> str:
    """Return lines of output."""
    return Markup('<pre class="lines">{}</pre>').format("\n".join(texts)) if texts else quiet("no output")


def quiet(text: str) -> str:
    """Return a line that says that there is nothing to show."""
    return Markup('<p class="quiet">{}</p>').format(text)


def card(text: str) -> str:
    """Return Markdown without HTML and without images, which might be on other machines."""
    text = re.sub(r"!\[[^\[\]\n]{0,300}\]\([^()\n]{0,1000}\)", "", text)  # limits, so that the time is linear
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    return text.replace("![", "&#33;[")


def styled(content: str) -> str:
    """Return HTML with the page's own rules of style."""
    content = content.encode(errors="replace").decode()  # halves of characters can't be sent
    return Markup("<style>{}</style>{}").format(Markup(CSS), Markup(content))
