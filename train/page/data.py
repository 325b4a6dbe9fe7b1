"""The tab that shows a dataset: what inspect_data finds in it, and its images by caption."""

import json
import textwrap
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import gradio as gr
from PIL import Image

from ldm.errors import UserError
from ldm.files import read_json
from train.commands.inspect import inspect
from train.commands.inspect_report import describe
from train.config.data import SourceConfig
from train.config.load import validate
from train.config.reports import InspectOptions
from train.data.images.decode import DamagedImage, load_image
from train.page import markup
from train.page.datasets import dataset_names, duplicate_groups, search
from train.page.errors import plain
from train.page.jobs import Job
from train.page.places import Places
from train.page.runs import read_pairs
from train.page.shared import Page

_LONGEST_WORDS = 500  # characters
_SHOWN = 48  # images of a search at once
_LARGEST_SHEET = 2**25  # pixels
_BARS = 24  # most bars of the lengths of captions
_KIND = "data"
_SECONDS = 1.0


def tab(page: Page) -> None:
    """Add the tab to the page."""
    places = page.places
    with gr.Row():
        name = gr.Dropdown([], label="Dataset", elem_id="dataset", allow_custom_value=True, scale=3)
        split = gr.Dropdown(["all", "train", "test"], value="all", label="Split", min_width=100)
        resolution = gr.Number(256, label="Resolution", precision=0, minimum=8, min_width=100)
        limit = gr.Number(0, label="Most (0: all)", precision=0, minimum=0, min_width=120)
        start = gr.Button("Inspect", variant="primary", elem_id="inspect", min_width=100)
        cancel = gr.Button("Cancel", elem_id="inspect-cancel", min_width=80)
    status = gr.HTML(elem_id="inspect-status")
    seen = gr.State("")
    quiet: Any = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
    acted = quiet | {"queue": True}  # only queued events show their errors
    with gr.Tab("Search"):
        _search_tab(places, name, acted)
    # A hidden tab is rendered too, so that an update that comes while it is opened isn't lost.
    with gr.Tab("Report", render_children=True):
        figures = gr.HTML(elem_id="data-figures")
        text = gr.HTML(elem_id="data-report")
    with gr.Tab("Contact sheet", render_children=True) as contact:
        sheet = gr.Image(
            label="Contact sheet",
            elem_id="contact-sheet",
            interactive=False,
            format="png",
            buttons=["fullscreen", "download"],
        )
    with gr.Tab("Duplicates", render_children=True):
        copies = gr.HTML(elem_id="duplicates-text")
        groups = _gallery("duplicates", 4)
    with gr.Tab("Damaged", render_children=True):
        damaged = gr.HTML(elem_id="data-damaged")

    shown = [seen, figures, text, sheet, copies, groups, damaged]

    def names() -> Any:
        choices = dataset_names(places)
        return gr.Dropdown(choices=choices, value=next(iter(choices), None))

    def inspected(name: str, split: str, resolution: int, limit: int) -> str:
        submit(page, name, split, resolution, limit)
        return _status(page)

    def look(name: str | None, before: str) -> list[Any]:
        return [_status(page), *_report(places, name, before)]

    def cancelled() -> str:
        for job in page.jobs.all(_KIND):
            if not job.finished:
                page.jobs.cancel(job.id)
        return _status(page)

    gr.on(None, plain(names), None, name, **quiet)  # when the page is opened
    start.click(plain(inspected), [name, split, resolution, limit], status, **acted)
    cancel.click(plain(cancelled), None, status, **acted)
    name.change(plain(lambda name: _report(places, name, "")), name, shown, **quiet)
    gr.Timer(_SECONDS).tick(plain(look), [name, seen], [status, *shown], **quiet)
    # Its update may come while its tab is opened, and is then lost in the browser.
    contact.select(plain(lambda name: _contact_sheet(places, name)), name, sheet, **quiet)


def _search_tab(places: Places, name: gr.Dropdown, acted: dict[str, Any]) -> None:
    """Add the search to its tab. name: the dataset."""
    with gr.Row():
        words = gr.Textbox(label="Caption contains", elem_id="search-words", scale=4, max_length=_LONGEST_WORDS)
        number = gr.Number(1, label="Page", precision=0, minimum=1, min_width=80, elem_id="search-page")
        find = gr.Button("Search", elem_id="search", min_width=100)
    found = gr.Markdown(elem_id="search-found")
    images = _gallery("search-images", 6)

    def search_page(name: str, words: str, number: int | None) -> tuple[Any, ...]:
        return _search(places, name, words, number)

    def first_page(name: str, words: str) -> tuple[Any, ...]:
        return 1, *_search(places, name, words, 1)

    for event in (find.click, words.submit, name.change):
        event(plain(first_page), [name, words], [number, found, images], **acted)
    number.input(plain(search_page), [name, words, number], [found, images], **acted)


def _gallery(name: str, columns: int) -> gr.Gallery:
    return gr.Gallery(
        label="Images",
        elem_id=name,
        columns=columns,
        object_fit="contain",
        height=560,
        format="png",
        buttons=["fullscreen"],
        interactive=False,
    )


def submit(page: Page, name: object, split: object, resolution: object, limit: object) -> Job:
    """Add an inspection to the queue. Raises UserError for settings that don't fit."""
    data = page.places.existing("data", name)
    out = report_folder(page.places, name)
    values = {"split": split, "resolution": resolution, "limit": limit or 0}
    o = validate(InspectOptions, values | {"data": str(data), "out": str(out), "workers": 0, "input": SourceConfig()})

    def work(job: Job) -> str:
        inspect(o, progress=lambda share: job.report(share, f"{share:.0%} of the images"))
        return str(name)

    return page.jobs.submit(_KIND, f"inspect {name}", work)


def report_folder(places: Places, name: object) -> Path:
    """Return the folder in --out of a dataset's report."""
    data = places.existing("data", name)
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in (places.name("data", data) or "data"))
    return places.inside("out", f"datasets/{safe.lstrip('.') or 'data'}")


def _status(page: Page) -> str:
    job = next(iter(page.jobs.all(_KIND)), None)
    if job is None:
        return ""
    text = f"{job.state}: {job.text}" if job.text and job.state != "done" else job.state
    return markup.styled(markup.status(job.title, text, job.progress, failed=job.state == "failed"))


def _report(places: Places, name: str | None, before: str) -> list[Any]:
    """Return the parts of a dataset's report; nothing new if it is still the report of the version `before`."""
    if not name:
        return [gr.skip()] * 7
    folder = report_folder(places, name)
    version = _version(folder, name)
    if version == before:
        return [gr.skip()] * 7
    try:
        report = read_json(folder / "report.json")
        figures, text, facts = _figures(report), describe(report), _copies(report["duplicates"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):  # another program's file
        none = markup.styled(markup.quiet("not inspected yet: click Inspect"))
        return [version, none, "", None, none, [], none]
    found = duplicate_groups(places.existing("data", name), folder)
    shown = [(image.image, f"group {k}: {image.name}") for k, group in enumerate(found, 1) for image in group]
    pairs = read_pairs(folder / "damaged.jsonl")
    return [
        version,
        markup.styled(markup.grid(figures)),
        markup.styled(markup.lines(text.splitlines())),
        _sheet(folder / "contact_sheet.png"),
        markup.styled(markup.facts(facts)),
        shown,
        markup.styled(markup.table(("file", "why"), pairs) if pairs else markup.quiet("no damaged images were found")),
    ]


def _figures(report: dict[str, Any]) -> list[str]:
    captions, images = report["captions"], report["images"]
    figures = []
    if lengths := {int(tokens): int(count) for tokens, count in captions.get("lengths", {}).items()}:
        figures.append(markup.bars("Length of the captions, in tokens", _binned(lengths)))
    figures.append(markup.bars("Shapes, width : height", [(shape, n) for shape, n in images["shapes"].items() if n]))
    figures.append(markup.bars("Formats", list((images["formats"] | images["traits"]).items())))
    if frequent := captions.get("most_frequent"):
        figures.append(
            markup.bars(
                "Most frequent captions",
                [(textwrap.shorten(text, 60, placeholder=" …"), n) for text, n in frequent.items()],
            )
        )
    return figures


def _binned(lengths: dict[int, int]) -> list[tuple[str, int]]:
    """Return the numbers of captions by length, in at most 24 ranges of the same width."""
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // _BARS)
    ranges = [(start, min(high, start + width - 1)) for start in range(low, high + 1, width)]
    label = "{}" if width == 1 else "{} – {}"
    return [(label.format(a, b), sum(n for length, n in lengths.items() if a <= length <= b)) for a, b in ranges]


def _copies(duplicates: dict[str, Any]) -> list[tuple[str, object]]:
    kinds: tuple[tuple[Literal["bytes", "looks"], str], ...] = (("bytes", "the same file"), ("looks", "look alike"))
    return [
        (
            title,
            f"{duplicates[kind]['groups']:,} groups, {duplicates[kind]['copies']:,} redundant images, "
            f"{duplicates[kind]['leaks']:,} held-out images with a copy in training",
        )
        for kind, title in kinds
    ]


def _contact_sheet(places: Places, name: str | None) -> Image.Image | None:
    return _sheet(report_folder(places, name) / "contact_sheet.png") if name else None


def _sheet(path: Path) -> Image.Image | None:
    with suppress(OSError, DamagedImage):
        return load_image(path, max_pixels=_LARGEST_SHEET)
    return None


def _search(places: Places, name: str, words: str, number: int | None) -> tuple[str, Any]:
    """Return a line on what was found, and the images of a page of it."""
    if not name:
        return f"no dataset is chosen: there must be one in --data {str(places.data)!r}", []
    if not isinstance(number, int | NoneType) or not isinstance(words, str | NoneType):
        raise UserError("a search needs words and the number of a page")
    if len(words or "") > _LONGEST_WORDS:
        raise UserError(f"the words have {len(words):,} characters; the maximum is {_LONGEST_WORDS}")
    first = (max(1, number or 1) - 1) * _SHOWN
    count, found = search(places.existing("data", name), words or "", first, _SHOWN)
    pages = max(1, -(-count // _SHOWN))
    images = "1 image" if count == 1 else f"{count:,} images"
    return f"{images}; page {first // _SHOWN + 1:,} of {pages:,}", [(image.image, image.caption) for image in found]


def _version(folder: Path, name: str) -> str:
    try:
        status = (folder / "report.json").stat()
    except OSError:
        return json.dumps([name])
    return json.dumps([name, status.st_mtime_ns, status.st_size])
