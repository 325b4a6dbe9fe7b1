"""The right half of the tab that generates: progress, preview, queue, gallery, and settings of an image.

A timer asks the server for changes. So a page that is opened in the middle of a job shows it too.
"""

import base64
import html
import io
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from ldm.errors import UserError
from train.page import painting
from train.page.errors import plain
from train.page.jobs import Job
from train.page.shared import Page

_SECONDS = 0.5  # between two looks at the queue


@dataclass(frozen=True)
class View:
    """The fields that other parts of the tab use."""

    chosen: gr.State
    """Name in `out` of the chosen image."""
    note: gr.Textbox
    """Line on the settings in the form."""


def view(page: Page, model: gr.Dropdown) -> View:
    """Add the view to the page. model: the choice of models, which is brought up to date when the page opens."""
    status = gr.HTML(elem_id="status")
    with gr.Row():
        cancel = gr.Button("Cancel", variant="stop", size="sm", elem_id="cancel")
        clear = gr.Button("Cancel all that wait", size="sm", elem_id="cancel-waiting")
    gallery = gr.Gallery(
        label="Images, the newest first",
        columns=4,
        height=420,
        object_fit="contain",
        elem_id="gallery",
        format="png",
        buttons=["download", "fullscreen"],
        interactive=False,
    )
    settings = gr.Textbox(
        label="Settings of the chosen image",
        lines=4,
        max_lines=8,
        interactive=False,
        buttons=["copy"],
        elem_id="settings",
    )
    note = gr.Textbox(show_label=False, interactive=False, max_lines=2, elem_id="note", visible=False)
    names, chosen, seen = gr.State([]), gr.State(""), gr.State(None)

    @plain
    def look(before: Any) -> tuple[Any, ...]:
        now = (page.jobs.version, *painting.folder_times(page.places))
        if before is not None and before[0] == now:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        images = painting.gallery(page.places)
        changed = before is None or before[1] != images
        files = [str(page.places.out / name) for name in images] if changed else gr.skip()
        return describe(page), files, images if changed else gr.skip(), (now, images)

    @plain
    def choose(shown: Any, event: gr.SelectData) -> tuple[str, str]:
        if not isinstance(event.index, int) or not 0 <= event.index < len(shown):
            raise UserError("this image isn't in the gallery any more")
        name = shown[event.index]
        return name, painting.shown_settings(page.places.existing("out", name))

    @plain
    def stop() -> None:
        if (job := page.jobs.running) is not None and job.kind == "paint":
            page.jobs.cancel(job.id)

    @plain
    def stop_waiting() -> None:
        for job in page.jobs.all("paint"):
            if job.state == "waiting":
                page.jobs.cancel(job.id)

    @plain
    def opened() -> Any:
        names = page.places.model_names()
        return gr.Dropdown(choices=names) if names else gr.skip()

    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
    seeing = ([seen], [status, gallery, names, seen])
    gr.Timer(_SECONDS).tick(look, *seeing, api_visibility="private", **quiet)
    gallery.select(choose, [names], [chosen, settings], api_visibility="private", **quiet)
    cancel.click(stop, None, None, api_name="cancel", **quiet)
    clear.click(stop_waiting, None, None, api_name="cancel_waiting", **quiet)
    context = gr.context.Context.root_block
    if context is not None:
        context.load(look, *seeing, api_visibility="private", **quiet)
        context.load(opened, None, [model], api_visibility="private", **quiet)
    return View(chosen, note)


def describe(page: Page) -> str:
    """Return the state of the queue as HTML: the newest job, its progress and preview, and how many wait."""
    jobs = page.jobs.all()
    running = page.jobs.running
    waiting = sum(job.state == "waiting" for job in jobs)
    job = running or next((job for job in jobs if job.kind == "paint" and job.finished), None)
    if job is None:
        return '<div class="job">Nothing is running.</div>'
    queue = f"; {waiting} waiting" if waiting else ""
    parts = [f"job {job.id}, {job.state}{queue}: {html.escape(job.title)}", html.escape(job.text)]
    bar = f'<progress max="1" value="{job.progress:.4f}" style="width: 100%"></progress>'
    return f'<div class="job"><div>{"<br>".join(filter(None, parts))}</div>{bar}{_picture(job)}</div>'


def _picture(job: Job) -> str:
    """Return the preview of a running job as HTML."""
    if job.state != "running" or not isinstance(job.preview, Image.Image):
        return ""
    file = io.BytesIO()
    job.preview.save(file, "JPEG", quality=85)
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="preview" style="max-height: 256px" src="data:image/jpeg;base64,{content}">'
