"""The tab that shows the runs, and that starts, stops and continues them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import gradio as gr
from PIL import Image

from train.data.images.decode import DamagedImage, load_image
from train.evaluation.curves import run_plots
from train.evaluation.plots import merged
from train.page import markup, trainings
from train.page.errors import plain
from train.page.offers import open_run
from train.page.places import Places
from train.page.runs import RunView, find_runs
from train.page.shared import Page
from train.page.training_form import form

Version = dict[str, Any]
"""Result of `RunView.version`; empty without a run."""
_UNSEEN: Version = {"run": None}
_SECONDS = 3.0  # between two looks at the runs
_MOST_SHEETS = 24
_LARGEST_SHEET, _MOST_PIXELS = 2**25, 2**26  # of one sheet, and of all that are shown


def tab(page: Page) -> None:
    """Add the tab to the page."""
    places = page.places
    with gr.Row():
        run = gr.Dropdown([], label="Run", elem_id="run", scale=3)
        beside = gr.Dropdown([], label="Beside it", elem_id="run-beside", scale=3)
        refresh = gr.Button("Look again", elem_id="runs-refresh", scale=1, min_width=110)
        stop = gr.Button("Stop", variant="stop", elem_id="run-stop", scale=1, min_width=90)
    status = gr.HTML(elem_id="run-status")
    form(page, run)
    seen = gr.State((_UNSEEN, _UNSEEN))
    with gr.Tab("Curves", render_children=True):
        curves = gr.HTML(elem_id="run-curves")
    with gr.Tab("Samples", render_children=True), gr.Row():
        strips = [_strip("run-samples"), _strip("run-samples-beside", visible=False)]
    with gr.Tab("Card", render_children=True), gr.Row():
        cards = [gr.Markdown(elem_id=f"run-card{end}", container=True, visible=not end) for end in ("", "-beside")]
    with gr.Tab("Damaged images", render_children=True), gr.Row():
        damaged = [gr.HTML(elem_id=f"run-damaged{end}", visible=not end) for end in ("", "-beside")]
    with gr.Tab("Output", render_children=True), gr.Row():
        output = [gr.HTML(elem_id=f"run-output{end}", visible=not end) for end in ("", "-beside")]

    shown = [status, stop, seen, curves, *strips, *cards, *damaged, *output]
    quiet: Any = {"show_progress": "hidden", "api_visibility": "private", "queue": False}

    def update(first: str | None, second: str | None, before: Sequence[Version]) -> list[Any]:
        return _update(places, (first, second), before)

    def anew(first: str | None, second: str | None) -> list[Any]:
        return _update(places, (first, second), (_UNSEEN, _UNSEEN))

    def names(first: str | None, second: str | None) -> tuple[Any, Any]:
        found = find_runs(places.runs)
        first = first if first in found else next(iter(found), None)
        none = [("nothing", "")]
        return (
            gr.Dropdown(choices=found, value=first),
            gr.Dropdown(choices=[*none, *found], value=second if second in found else ""),  # type: ignore[arg-type]
        )

    gr.on(None, plain(lambda: names(None, None)), None, [run, beside], **quiet)  # when the page is opened
    refresh.click(plain(names), [run, beside], [run, beside], **quiet)
    gr.on([run.change, beside.change], plain(anew), [run, beside], shown, **quiet)
    gr.Timer(_SECONDS).tick(plain(update), [run, beside, seen], shown, **quiet)
    stop.click(plain(lambda name: _stop(places, name)), run, status, **(quiet | {"queue": True}))  # shows its errors


def _strip(name: str, **options: Any) -> gr.Gallery:
    return gr.Gallery(
        label="Samples",
        elem_id=name,
        preview=True,
        object_fit="contain",
        height=620,
        format="png",
        buttons=["fullscreen", "download"],
        interactive=False,
        **options,
    )


def _update(places: Places, names: Sequence[str | None], before: Sequence[Version]) -> list[Any]:
    """Return the new contents; what hasn't changed since the versions `before` is left alone."""
    runs = [open_run(places, name) if name else None for name in names]
    versions = tuple(run.version() if run else {} for run in runs)
    status = markup.styled(
        "".join(run_status(run) for run in runs if run)
        or markup.quiet(f"no runs in {places.runs} yet: start one below")
    )
    busy = [run is not None and bool(run.owner or trainings.started_by_page(run.path)) for run in runs]
    stop = gr.Button(interactive=busy[0])
    if versions == before:
        output = [_output(run) if run and b else gr.skip() for run, b in zip(runs, busy, strict=True)]
        return [status, stop, *[gr.skip()] * 8, *output]
    parts = [_parts(run, now, then) for run, now, then in zip(runs, versions, before, strict=True)]
    by_kind = [part for kind in zip(*parts, strict=True) for part in kind]
    return [status, stop, versions, markup.styled(curves([run for run in runs if run])), *by_kind]


def _parts(run: RunView | None, now: Version, then: Version) -> list[Any]:
    """Return the contents of the samples, the card, the damaged images and the output of a run.

    now, then: its version, and the one that is shown. A film strip that hasn't changed stays at the chosen sheet.
    """
    if now == then:
        return [gr.skip()] * 4
    if run is None:
        return [gr.Gallery(value=[], visible=False), gr.Markdown("", visible=False), *[gr.HTML("", visible=False)] * 2]
    strip: Any = gr.skip()
    if any(now[name] != then.get(name) for name in ("run", "samples")):
        shown = sheets(run)
        strip = gr.Gallery(value=shown, visible=True, selected_index=len(shown) - 1 if shown else None)
    return [
        strip,
        gr.Markdown(markup.card(run.card()) or "*no model yet*", visible=True),
        gr.HTML(markup.styled(_damaged(run)), visible=True),
        gr.HTML(_output(run), visible=True),
    ]


def _output(run: RunView) -> str:
    return markup.styled(markup.lines(trainings.log_lines(run.path)))


def run_status(run: RunView) -> str:
    """Return the line on a run."""
    if run.state == "stopped" and trainings.started_by_page(run.path):
        last = next(iter(trainings.log_lines(run.path)[-1:]), "")
        return markup.status(run.name, f"starting: {last}", 0.0)
    if run.state != "training" and (line := trainings.problem(run.path)):
        return markup.status(run.name, line, 0.0, failed=True)
    share = 1.0 if run.state == "finished" else run.step / run.steps if run.steps else 0.0
    return markup.status(run.name, run.status(), share)


def curves(runs: Sequence[RunView]) -> str:
    """Return the curves of one run, or of several in the same axes."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for run in runs:
        for plot in run_plots(run.metrics, run.stage):
            found.setdefault(plot.name, []).append((run.name, asdict(plot)))
    return markup.figures(merged(plots) for plots in found.values())


def sheets(run: RunView | None) -> list[tuple[Image.Image, str]]:
    """Return sample sheets, spread evenly over the steps, the first and the last among them."""
    files = run.sheets() if run else []
    if len(files) > _MOST_SHEETS:
        files = [files[k * (len(files) - 1) // (_MOST_SHEETS - 1)] for k in range(_MOST_SHEETS)]
    shown, left = [], _MOST_PIXELS
    for path, step in reversed(files):  # the newest first, because the last ones may not fit
        try:
            image = load_image(path, max_pixels=min(_LARGEST_SHEET, left))
        except (OSError, DamagedImage):
            continue
        shown.append((image, f"step {step:,}"))
        left -= image.width * image.height
        if left <= 0:
            break
    return shown[::-1]


def _damaged(run: RunView) -> str:
    pairs = run.damaged()
    return markup.table(("file", "why"), pairs) if pairs else markup.quiet("no damaged images were found")


def _stop(places: Places, name: str | None) -> str:
    run = open_run(places, name)
    trainings.stop(run)
    return markup.styled(markup.status(run.name, "stopping: saves a checkpoint after this step", 0.0))
