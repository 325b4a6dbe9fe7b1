"""The tab that generates images: from text, from an image, inside a mask, as a grid, and as an animation."""

from collections.abc import Callable
from typing import Any

import gradio as gr

from train.page.errors import plain
from train.page.grid import AXES
from train.page.paint_form import Form
from train.page.painter import ANIMATION, EDITOR_SIDE, GRID, IMAGE, INPAINT, TEXT, Painter
from train.page.shared import Page
from train.page.uploads import Canvas, Picture
from train.page.view import view

_KEYS = """() => document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  const buttons = [...document.querySelectorAll("[id^=generate-]")];
  buttons.find((button) => button.offsetParent !== null)?.click();
})"""
"""Control-Enter generates."""
_RESTORE = "(kept, ...form) => Array.isArray(kept) && kept.length === form.length ? kept : form"


def tab(page: Page) -> None:
    """Add the tab to the page."""
    with gr.Row():
        with gr.Column(scale=5, min_width=420):
            form = Form(page)
            with gr.Tabs() as modes:
                shared = list(form.fields().values())
                with gr.Tab("Text to image", id=TEXT):
                    text = gr.Button("Generate", variant="primary", elem_id="generate-text")
                with gr.Tab("Image to image", id=IMAGE):
                    image, strength, edit = _image_tab()
                with gr.Tab("Inpaint", id=INPAINT, render_children=True):
                    canvas = _InpaintTab()
                with gr.Tab("Grid", id=GRID):
                    axes, grid = _grid_tab()
                with gr.Tab("Animation", id=ANIMATION):
                    animation, animate = _animation_tab()
        with gr.Column(scale=6, min_width=420):
            shown = view(page, form)
            buttons = _gallery_buttons()
            dropped = gr.File(
                label="Drop a PNG of this project here to use its settings", height=150, elem_id="dropped"
            )

    def on(button: gr.Button, name: str, handler: Callable[..., Any], own: list[Any]) -> None:
        # Nothing is written to the status here: an answer that comes late would hide the job's newer state.
        button.click(plain(handler), [*own, *shared], None, api_name=name, show_progress="hidden")

    painter, traits = Painter(page, form), gr.State(form.traits(form.model.value))
    form.model.change(
        plain(form.switched),
        [form.model, traits],
        [form.model, traits, form.steps, form.sampler, form.guidance_scale],
        api_visibility="private",
        show_progress="hidden",
        queue=False,
    )
    on(text, "text_to_image", painter.text, [])
    on(edit, "image_to_image", painter.image, [image, strength])
    on(canvas.button, "inpaint", painter.inpaint, canvas.fields())
    on(grid, "grid", painter.grid, [*axes, image, strength, *canvas.fields()])
    on(animate, "animation", painter.animation, animation)
    again, use, to_image, to_inpaint = buttons
    everything = [*shared, modes, strength, image, shown.note, traits]
    again.click(
        plain(painter.again),
        [shown.chosen, *shared],
        [form.seed],
        api_name="again",
        show_progress="hidden",
    )
    use.click(plain(painter.use), [shown.chosen], everything, api_name="use", show_progress="hidden")
    dropped.upload(plain(painter.drop), [dropped], everything, api_name="drop", show_progress="hidden")
    to_image.click(
        plain(painter.to_image), [shown.chosen], [image, modes], api_name="send_to_image", show_progress="hidden"
    )
    _in_the_browser(shared)
    # The editor must be visible before it can show an image.
    to_inpaint.click(
        lambda: gr.Tabs(selected=INPAINT), None, [modes], api_visibility="private", show_progress="hidden"
    ).then(
        plain(painter.to_inpaint),
        [shown.chosen],
        [canvas.canvas, canvas.sent],
        api_name="send_to_inpaint",
        show_progress="hidden",
    )


def _in_the_browser(form: list[Any]) -> None:
    """Let the browser generate by keys, and keep the form, so that a reloaded page has it again."""
    kept = gr.BrowserState(None, storage_key="ldm-form", secret="ldm")
    private: Any = {"api_visibility": "private"}
    gr.on([field.change for field in form], None, form, kept, js="(...form) => [form]", **private)
    if (context := gr.context.Context.root_block) is not None:
        context.load(None, None, None, js=_KEYS)
        context.load(None, [kept, *form], form, js=_RESTORE, **private)


def _image_tab() -> tuple[Picture, gr.Slider, gr.Button]:
    image = Picture(
        label="Image to start from", height=300, sources=["upload", "clipboard"], format="png", elem_id="start-image"
    )
    strength = gr.Slider(0, 1, 0.8, step=0.05, label="Strength: 0 keeps the image, 1 keeps only its size")
    return image, strength, gr.Button("Generate", variant="primary", elem_id="generate-image")


class _InpaintTab:
    """The fields to inpaint and to extend an image."""

    def __init__(self) -> None:
        brush = gr.Brush(colors=["#ff00ff"], default_color="#ff00ff", color_mode="fixed", default_size=24)
        self.canvas = Canvas(
            label="Draw over the part to inpaint",
            brush=brush,
            transforms=(),
            layers=False,
            sources=["upload", "clipboard"],
            image_mode="RGBA",
            format="png",
            canvas_size=(EDITOR_SIDE, EDITOR_SIDE),
            height=560,
            elem_id="canvas",
        )
        self.sent = gr.State(None)
        with gr.Row():
            self.strength = gr.Slider(0, 1, 1.0, step=0.05, label="Strength inside the mask", min_width=160)
            self.feather = gr.Number(0, label="Feather (pixels)", minimum=0, min_width=100)
        with gr.Row():
            sides = ("Extend left", "top", "right", "bottom")
            self.extend = [gr.Number(0, label=side, precision=0, minimum=0, min_width=60) for side in sides]
        self.button = gr.Button("Generate", variant="primary", elem_id="generate-inpaint")

    def fields(self) -> list[Any]:
        return [self.canvas, self.sent, self.strength, self.feather, *self.extend]


def _grid_tab() -> tuple[list[Any], gr.Button]:
    names = list(AXES)
    of = gr.Radio(
        [("Text to image", TEXT), ("Image to image", IMAGE), ("Inpaint", INPAINT)],
        value=TEXT,
        label="Grid of",
        info="The image, the mask and their settings are those of the tabs.",
        elem_id="grid-of",
    )
    gr.Markdown("One image for each pair of values. Lists: `1, 2, 5`; ranges: `1-9 (+2)` or `1-9 [5]`.")
    with gr.Row():
        x = gr.Dropdown(names, value="Steps", label="Columns", min_width=140)
        xs = gr.Textbox("5, 10, 25", label="Values", scale=2)
    with gr.Row():
        y = gr.Dropdown(["none", *names], value="Guidance", label="Rows", min_width=140)
        ys = gr.Textbox("1, 3, 6", label="Values", scale=2)
    return [of, x, xs, y, ys], gr.Button("Generate the grid", variant="primary", elem_id="generate-grid")


def _animation_tab() -> tuple[list[Any], gr.Button]:
    to = gr.Textbox(label="Prompts to change to, one per line", lines=2)
    with gr.Row():
        to_seed = gr.Number(-1, label="Last seed (−1: same)", precision=0, minimum=-1, min_width=120)
        frames = gr.Number(13, label="Frames per prompt", precision=0, minimum=2, maximum=250, min_width=120)
        fps = gr.Number(12.5, label="Frames per second", minimum=1, maximum=50, min_width=120)
    return [to, to_seed, frames, fps], gr.Button("Generate the animation", variant="primary", elem_id="generate-gif")


def _gallery_buttons() -> tuple[gr.Button, gr.Button, gr.Button, gr.Button]:
    with gr.Row():
        again = gr.Button("Again with this seed", size="sm", min_width=110, elem_id="again")
        use = gr.Button("Use its settings", size="sm", min_width=110, elem_id="use")
        to_image = gr.Button("→ Image to image", size="sm", min_width=110, elem_id="to-image")
        to_inpaint = gr.Button("→ Inpaint", size="sm", min_width=110, elem_id="to-inpaint")
    return again, use, to_image, to_inpaint
