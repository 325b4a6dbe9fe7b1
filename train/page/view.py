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
from train.page.paint_form import Form
from train.page.shared import Page

_SECONDS = 0.5  # between two looks at the queue
_MODELS_SECONDS = 5.0  # between two looks at the models


@dataclass(frozen=True)
class View:
    """The fields that other parts of the tab use."""

    chosen: gr.State
    """Name in `out` of the chosen image."""
    note: gr.Textbox
    """Line on the settings in the form."""


def view(page: Page, form: Form) -> View:
    """Add the view to the page. form: its choice of models is kept up to date."""
    status = gr.HTML(elem_id="status")
    with gr.Row():
        cancel = gr.Button("Cancel", variant="stop", size="sm", elem_id="cancel", interactive=False)
        clear = gr.Button("Cancel all that wait", size="sm", elem_id="cancel-waiting", interactive=False)
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
    names, chosen, opened = gr.State([]), gr.State(""), gr.State(False)
    seen, models = gr.State(None), gr.State(None)
    viewer = _Viewer(page)
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
    seeing = ([seen, chosen, opened], [status, gallery, names, seen, cancel, clear])
    finding = ([form.model, models], [form.model, models])
    gr.Timer(_SECONDS).tick(plain(viewer.look), *seeing, api_visibility="private", **quiet)
    gr.Timer(_MODELS_SECONDS).tick(plain(viewer.find_models), *finding, api_visibility="private", **quiet)
    gallery.select(plain(viewer.choose), [names], [chosen, opened, settings, note], api_visibility="private", **quiet)
    gallery.preview_close(lambda: False, None, opened, api_visibility="private", **quiet)
    cancel.click(plain(viewer.stop), None, None, api_name="cancel", **quiet)
    clear.click(plain(viewer.stop_waiting), None, None, api_name="cancel_waiting", **quiet)
    if (context := gr.context.Context.root_block) is not None:
        context.load(plain(viewer.look), *seeing, api_visibility="private", **quiet)
        context.load(plain(viewer.find_models), *finding, api_visibility="private", **quiet)
    return View(chosen, note)


class _Viewer:
    """The handlers of the view."""

    def __init__(self, page: Page) -> None:
        self.page = page

    def look(self, before: Any, name: Any, opened: Any) -> tuple[Any, ...]:
        """Return the status, the images, their names, what was seen, and both buttons, as far as they have changed.

        before: what was seen at the last look. name, opened: the chosen image, and whether it is shown large.
        """
        page = self.page
        now = (page.jobs.version, *painting.folder_times(page.places))
        if before is not None and before[0] == now:
            return (gr.skip(),) * 6
        images = painting.gallery(page.places)
        changed = before is None or before[1] != images
        files: Any = gr.skip()
        if changed:  # the image that is seen stays, although newer ones come before it
            index = images.index(name) if opened and name in images else None
            files = gr.Gallery([str(page.places.out / image) for image in images], selected_index=index)
        jobs = page.jobs.all("paint")
        buttons = [gr.Button(interactive=any(job.state == state for job in jobs)) for state in ("running", "waiting")]
        return describe(page), files, images if changed else gr.skip(), (now, images), *buttons

    def choose(self, shown: Any, event: gr.SelectData) -> tuple[str, bool, str, Any]:
        """Return the name of the chosen image, that it is open, its settings, and the warnings of its job."""
        if not isinstance(event.index, int) or not 0 <= event.index < len(shown):
            raise UserError("this image isn't in the gallery any more")
        name = shown[event.index]
        jobs = self.page.jobs.all("paint")
        warned = next((job.warnings for job in jobs if name in (job.result or ())), [])
        note = gr.Textbox("\n".join(f"warning: {line}" for line in warned), visible=bool(warned))
        return name, True, painting.shown_settings(self.page.places.existing("out", name)), note

    def stop(self) -> None:
        """Cancel the running job, if it generates images."""
        if (job := self.page.jobs.running) is not None and job.kind == "paint":
            self.page.jobs.cancel(job.id)

    def stop_waiting(self) -> None:
        """Cancel all waiting jobs that generate images."""
        for job in self.page.jobs.all("paint"):
            if job.state == "waiting":
                self.page.jobs.cancel(job.id)

    def find_models(self, chosen: Any, before: Any) -> tuple[Any, Any]:
        """Return the choice of models and their names, if these have changed. before: the names of the last look."""
        names = self.page.places.model_names()
        if names == before:
            return gr.skip(), gr.skip()
        new: Any = {} if chosen in names else {"value": next(iter(names), None)}  # the browser may just restore it
        return gr.Dropdown(choices=names, **new), names


def describe(page: Page) -> str:
    """Return the state of the queue as HTML: the newest job, its progress and preview, and how many wait."""
    jobs = page.jobs.all()
    running = page.jobs.running
    waiting = sum(job.state == "waiting" for job in jobs)
    job = running or next((job for job in jobs if job.kind == "paint" and job.finished), None)
    if job is None:
        return '<div class="job">Nothing is running.</div>'
    queue = f"; {waiting} waiting" if waiting else ""
    took = f" in {job.seconds:.1f} s" if job.state == "done" else ""
    line = f"job {job.id}, {job.state}{took}{queue}: {html.escape(job.title)}"
    text = f'<div class="{"failed" if job.state == "failed" else ""}">{html.escape(job.text)}</div>' if job.text else ""
    warned = "".join(f'<div class="warned">warning: {html.escape(warning)}</div>' for warning in job.warnings)
    bar = f'<progress max="1" value="{job.progress:.4f}"></progress>' if not job.finished else ""
    return f'<div class="job"><div>{line}</div>{text}{warned}{bar}{_picture(job)}</div>'


def _picture(job: Job) -> str:
    """Return the preview of a running job as HTML."""
    if job.state != "running" or not isinstance(job.preview, Image.Image):
        return ""
    file = io.BytesIO()
    job.preview.save(file, "JPEG", quality=85)
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="preview" style="max-height: 256px" src="data:image/jpeg;base64,{content}">'
