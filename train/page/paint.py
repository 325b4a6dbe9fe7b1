"""The tab that generates images: from text, from an image, inside a mask, as a grid, and as an animation."""

import html
import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import gradio as gr
from PIL import Image

from conditioning import PromptWeights
from ldm.errors import UserError
from ldm.kinds import Spacing
from ldm.samplers import SamplerKind
from train.commands.generate import model_sha256, read_options
from train.config.generation import (
    Img2ImgOptions,
    InpaintOptions,
    InterpolateOptions,
    ModelOptions,
    Txt2ImgOptions,
)
from train.config.run import Precision
from train.page import painting
from train.page.errors import plain
from train.page.grid import AXES, Axis, paint_grid, require_few
from train.page.shared import Page
from train.page.uploads import Canvas, Picture, as_path, read_image
from train.page.view import view

_TEXT, _IMAGE, _INPAINT, _GRID, _ANIMATION = "text", "image", "inpaint", "grid", "animation"
_OWN = "own"
_CHOSEN = ("sampler", "spacing")  # by the model, if the form doesn't
_EDITOR_SIDE = 512  # pixels; smaller images are enlarged to draw on them


class Form:
    """The settings that all kinds of generation share."""

    def __init__(self, page: Page) -> None:
        names = page.places.model_names()
        with gr.Group():
            self.model = gr.Dropdown(
                names, value=names[0] if names else None, label="Model", allow_custom_value=True, filterable=True
            )
            self.prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6, placeholder="what the image shows")
            self.negative_prompt = gr.Textbox(label="Negative prompt", lines=1, max_lines=4)
        with gr.Group():
            with gr.Row():
                self.steps = gr.Number(0, label="Steps (0: own)", precision=0, minimum=0, maximum=1000, min_width=90)
                self.guidance_scale = gr.Number(3.0, label="Guidance", minimum=0, step=0.5, min_width=90)
                self.sampler = gr.Dropdown([_OWN, *get_args(SamplerKind)], value=_OWN, label="Sampler", min_width=140)
            with gr.Row():
                self.seed = gr.Number(-1, label="Seed (−1: any)", precision=0, minimum=-1, min_width=100)
                self.num_images = gr.Number(4, label="Number", precision=0, minimum=1, maximum=64, min_width=80)
                self.width = gr.Number(0, label="Width (0: own)", precision=0, minimum=0, min_width=80)
                self.height = gr.Number(0, label="Height (0: own)", precision=0, minimum=0, min_width=80)
        with gr.Accordion("More settings", open=False):
            with gr.Row():
                self.spacing = gr.Dropdown([_OWN, *get_args(Spacing)], value=_OWN, label="Spacing", min_width=120)
                self.eta = gr.Number(0.0, label="Eta (ddim)", minimum=0, maximum=1, step=0.1, min_width=90)
                self.guidance_rescale = gr.Number(
                    0.0, label="Guidance rescale", minimum=0, maximum=1, step=0.1, min_width=120
                )
            with gr.Row():
                self.prompt_weights = gr.Dropdown(
                    list(get_args(PromptWeights)), value="none", label="Prompt weights", min_width=120
                )
                self.precision = gr.Dropdown(list(get_args(Precision)), value="fp32", label="Precision", min_width=120)

    def fields(self) -> dict[str, gr.components.Component]:
        """Return the fields by the names of their options."""
        return {name: field for name, field in vars(self).items() if isinstance(field, gr.components.Component)}

    def read(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """Return the values of the fields by the names of their options."""
        given = dict(zip(self.fields(), values, strict=True))
        return {name: None if value == _OWN and name in _CHOSEN else value for name, value in given.items()}


def tab(page: Page) -> None:
    """Add the tab to the page."""
    with gr.Row():
        with gr.Column(scale=5, min_width=420):
            form = Form(page)
            with gr.Tabs() as modes:
                shared = list(form.fields().values())
                with gr.Tab("Text to image", id=_TEXT):
                    text = gr.Button("Generate", variant="primary", elem_id="generate-text")
                with gr.Tab("Image to image", id=_IMAGE):
                    image, strength, edit = _image_tab()
                with gr.Tab("Inpaint", id=_INPAINT, render_children=True):
                    canvas = _InpaintTab()
                with gr.Tab("Grid", id=_GRID):
                    axes, grid = _grid_tab()
                with gr.Tab("Animation", id=_ANIMATION):
                    animation, animate = _animation_tab()
        with gr.Column(scale=6, min_width=420):
            shown = view(page, form.model)
            buttons = _gallery_buttons()
            dropped = gr.File(
                label="Drop a PNG of this project here to use its settings", height=150, elem_id="dropped"
            )

    def on(button: gr.Button, name: str, handler: Callable[..., Any], own: list[Any]) -> None:
        button.click(plain(handler), [*own, *shared], [shown.status], api_name=name, show_progress="hidden")

    painter = Painter(page, form)
    on(text, "text_to_image", painter.text, [])
    on(edit, "image_to_image", painter.image, [image, strength])
    on(canvas.button, "inpaint", painter.inpaint, canvas.fields())
    on(grid, "grid", painter.grid, axes)
    on(animate, "animation", painter.animation, animation)
    again, use, to_image, to_inpaint = buttons
    everything = [*shared, modes, strength, image, shown.note]
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
    # The editor must be visible before it can show an image.
    to_inpaint.click(
        lambda: gr.Tabs(selected=_INPAINT), None, [modes], api_visibility="private", show_progress="hidden"
    ).then(
        plain(painter.to_inpaint),
        [shown.chosen],
        [canvas.canvas, canvas.scale],
        api_name="send_to_inpaint",
        show_progress="hidden",
    )


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
            canvas_size=(_EDITOR_SIDE, _EDITOR_SIDE),
            height=560,
            elem_id="canvas",
        )
        self.scale = gr.State(1)
        self.canvas.upload(lambda: 1, None, self.scale, api_visibility="private")
        self.canvas.clear(lambda: 1, None, self.scale, api_visibility="private")
        with gr.Row():
            self.strength = gr.Slider(0, 1, 1.0, step=0.05, label="Strength inside the mask", min_width=160)
            self.feather = gr.Number(0, label="Feather (pixels)", minimum=0, min_width=100)
        with gr.Row():
            sides = ("Extend left", "top", "right", "bottom")
            self.extend = [gr.Number(0, label=side, precision=0, minimum=0, min_width=60) for side in sides]
        self.button = gr.Button("Generate", variant="primary", elem_id="generate-inpaint")

    def fields(self) -> list[Any]:
        return [self.canvas, self.scale, self.strength, self.feather, *self.extend]


def _grid_tab() -> tuple[list[Any], gr.Button]:
    names = list(AXES)
    gr.Markdown("One image for each pair of values. Lists: `1, 2, 5`; ranges: `1-9 (+2)` or `1-9 [5]`.")
    with gr.Row():
        x = gr.Dropdown(names, value="Steps", label="Columns", min_width=140)
        xs = gr.Textbox("5, 10, 25", label="Values", scale=2)
    with gr.Row():
        y = gr.Dropdown(["none", *names], value="Guidance", label="Rows", min_width=140)
        ys = gr.Textbox("1, 3, 6", label="Values", scale=2)
    return [x, xs, y, ys], gr.Button("Generate the grid", variant="primary", elem_id="generate-grid")


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


class Painter:
    """The handlers of the tab's buttons. Each checks what was given, and adds a job to the queue."""

    def __init__(self, page: Page, form: Form) -> None:
        self.page, self.form = page, form

    def text(self, *values: Any) -> str:
        """Generate from text."""
        return self._submit("text to image", Txt2ImgOptions, self.form.read(values))

    def image(self, image: Any, strength: Any, *values: Any) -> str:
        """Generate from an image."""
        if image is None:
            raise UserError("give an image to start from: upload one, or send one from the gallery")
        given = self._edited(values) | {"image": (painting.keep_upload(self.page, image),), "strength": strength}
        return self._submit("image to image", Img2ImgOptions, given)

    def inpaint(self, drawing: Any, scale: Any, strength: Any, feather: Any, *rest: Any) -> str:
        """Inpaint what was drawn over, or extend the image."""
        extend, values = rest[:4], rest[4:]
        if not drawing:
            raise UserError("give an image to inpaint: upload one, or send one from the gallery")
        image, sides = drawing["background"], [side or 0 for side in extend]
        scale = int(scale) if isinstance(scale, int) and 1 <= scale <= _EDITOR_SIDE else 1
        size = (max(1, image.width // scale), max(1, image.height // scale))
        image = image if scale == 1 else image.resize(size, Image.Resampling.NEAREST)
        mask = painting.drawn_mask(drawing["layers"], size)
        if mask is None and not any(sides):
            raise UserError("draw over the part to inpaint, or give a number of pixels to extend the image by")
        if any(not 0 <= side <= 4096 for side in sides):
            raise UserError("the image can be extended by 0 to 4096 pixels on each side")
        given = self._edited(values) | {
            "image": painting.keep_upload(self.page, image),
            "mask": "" if mask is None else painting.keep_upload(self.page, mask),
            "strength": strength,
            "feather": feather or 0,
            "extend": tuple(int(side) for side in sides),
        }
        return self._submit("inpaint", InpaintOptions, given)

    def grid(self, x: Any, xs: Any, y: Any, ys: Any, *values: Any) -> str:
        """Generate an image for each pair of values of two settings."""
        given = self.form.read(values) | {"num_images": 1}
        o = painting.options(Txt2ImgOptions, self.page, given)
        columns = Axis.read(x, xs, self.page.places, o)
        rows = Axis.read(y, ys, self.page.places, o) if y != "none" else None
        title = f"grid of {require_few(columns, rows)} images"
        job = painting.submit(self.page, title, lambda job: paint_grid(self.page, job, o, columns, rows))
        return _submitted(title, job.id)

    def animation(self, to: Any, to_seed: Any, frames: Any, fps: Any, *values: Any) -> str:
        """Interpolate to other prompts or to another seed."""
        given = self.form.read(values)
        given.pop("num_images")
        prompts = tuple(line for line in str(to or "").split("\n") if line.strip())
        to_seed = None if to_seed in (None, painting.RANDOM_SEED) else to_seed
        if not prompts and to_seed is None:
            raise UserError("nothing to change to: give a prompt to change to, or a seed")
        given |= {"to": prompts, "to_seed": to_seed, "frames": frames, "fps": fps}
        return self._submit("animation", InterpolateOptions, given)

    def again(self, chosen: Any, *values: Any) -> int:
        """Generate with the form's settings and the seed of the chosen image; return that seed."""
        settings = painting.saved_settings(self._chosen(chosen))
        seed = settings.get("seed")
        if not isinstance(seed, int):
            raise UserError("this image has no seed")
        self._submit("again", Txt2ImgOptions, self.form.read(values) | {"seed": seed, "num_images": 1})
        return seed

    def use(self, chosen: Any) -> list[Any]:
        """Return the form with the settings of the chosen image."""
        return self._filled(self._chosen(chosen))

    def drop(self, file: Any) -> list[Any]:
        """Return the form with the settings of a dropped PNG."""
        return self._filled(as_path(file))

    def to_image(self, chosen: Any) -> tuple[Any, Any]:
        """Return the chosen image, for the tab that starts from an image."""
        return str(self._png(chosen)), gr.Tabs(selected=_IMAGE)

    def to_inpaint(self, chosen: Any) -> tuple[Any, int]:
        """Return the chosen image enlarged, so that one can draw on it, and by how much."""
        image = read_image(str(self._png(chosen)))
        scale = max(1, math.floor(_EDITOR_SIDE / max(image.size)))
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        return {"background": image, "layers": [], "composite": None}, scale

    def _submit(self, what: str, kind: type[ModelOptions], values: dict[str, Any]) -> str:
        o = painting.options(kind, self.page, values)
        title = f"{what}: {o.prompt[:60]}" if o.prompt else what
        job = painting.submit(self.page, title, lambda job: painting.generate(o, job, self.page))
        return _submitted(title, job.id)

    def _edited(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """Return the form without the size, which is that of the given image."""
        return {name: value for name, value in self.form.read(values).items() if name not in ("width", "height")}

    def _chosen(self, name: Any) -> Path:
        if not name:
            raise UserError("choose an image in the gallery first")
        return self.page.places.existing("out", name)

    def _png(self, name: Any) -> Path:
        if (path := self._chosen(name)).suffix != ".png":
            raise UserError("choose an image; an animation can't be sent")
        return path

    def _filled(self, path: Path) -> list[Any]:
        """Return new values of all the form's fields, and the tab, strength, image and note that belong to them."""
        settings = painting.saved_settings(path)
        if (kind := painting.kind_of(settings)) is None:  # its noise and text are between those of two images
            raise UserError("this is a frame of an animation, which can't be repeated from its settings")
        try:
            o, sha256 = read_options(kind, str(path))
        except ValueError as error:
            raise UserError(f"{error}") from None
        model, note = self._model(o.model, sha256.get("model"))
        known = {f.name for f in fields(o)}
        values = {name: getattr(o, name) for name in self.form.fields() if name in known}
        values |= {name: 0 for name in painting.OWN_NUMBERS if values.get(name, 0) is None}
        values |= {name: getattr(o, name) or _OWN for name in _CHOSEN}
        values |= {"model": model, "num_images": 1}
        updates = [values.get(name, gr.skip()) for name in self.form.fields()]
        image, strength, mode = gr.skip(), gr.skip(), _TEXT
        if isinstance(o, Img2ImgOptions):
            strength, mode = o.strength, _IMAGE
            name = self.page.places.name("out", Path(o.image[0])) if o.image else None
            if name and Path(o.image[0]).is_file():
                image = str(self.page.places.existing("out", name))
            else:
                note += " Give the image that it started from."
        elif isinstance(o, InpaintOptions):
            mode = _INPAINT
            note += " Send or upload the image that was inpainted, and draw the mask again."
        return [
            *updates,
            gr.Tabs(selected=mode),
            strength,
            image,
            f"The settings of {path.name} are in the form.{note}",
        ]

    def _model(self, given: str, sha256: str | None) -> tuple[Any, str]:
        """Return the name of the model that an image was generated with, and a note if it may be another one."""
        places = self.page.places
        name = places.name("models", Path(given)) if given else None
        names = places.model_names()
        for candidate in sorted(names, key=lambda n: n != name):
            if sha256 and model_sha256(places.model(candidate)) == sha256:
                return candidate, ""
        if name in names:
            return name, " Its model has changed since then, so the image will differ."
        return gr.skip(), " Its model isn't in --models, so the chosen one stays."


def _submitted(title: str, id: int) -> str:
    return f'<div class="status">job {id}: {html.escape(title)}</div>'
