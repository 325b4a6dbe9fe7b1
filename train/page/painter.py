"""The handlers of the tab that generates."""

import textwrap
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageChops

from ldm.errors import UserError
from train.commands.generate import model_sha256, read_options
from train.config.generation import (
    GenerateOptions,
    Img2ImgOptions,
    InpaintOptions,
    InterpolateOptions,
    ModelOptions,
    Txt2ImgOptions,
)
from train.page import painting
from train.page.grid import Axis, paint_grid, require_few
from train.page.paint_form import CHOSEN, OWN, Form
from train.page.shared import Page
from train.page.uploads import as_path, read_image

TEXT, IMAGE, INPAINT, GRID, ANIMATION = "text", "image", "inpaint", "grid", "animation"
"""The inner tabs."""
EDITOR_SIDE = 512
"""Pixels; smaller images are enlarged to draw on them."""
_ALIKE = 8  # difference of pixels that a browser's canvas may cause
_EXACT = Image.Resampling.NEAREST


def _drawn_at(image: Image.Image) -> tuple[int, int]:
    """Return the size of an image in the editor."""
    scale = max(1, EDITOR_SIDE // max(image.size))
    return image.width * scale, image.height * scale


class Painter:
    """The handlers of the tab's buttons. Each checks what was given, and adds a job to the queue."""

    def __init__(self, page: Page, form: Form) -> None:
        self.page, self.form = page, form

    def text(self, *values: Any) -> None:
        """Generate from text."""
        self._submit("text to image", self._text(values))

    def image(self, image: Any, strength: Any, *values: Any) -> None:
        """Generate from an image."""
        self._submit("image to image", self._image(image, strength, values))

    def inpaint(self, *values: Any) -> None:
        """Inpaint what was drawn over, or extend the image."""
        self._submit("inpaint", self._inpaint(values[:8], values[8:]))

    def _text(self, values: tuple[Any, ...]) -> Txt2ImgOptions:
        return painting.options(Txt2ImgOptions, self.page, self.form.read(values))

    def _image(self, image: Any, strength: Any, values: tuple[Any, ...]) -> Img2ImgOptions:
        if image is None:
            raise UserError("give an image to start from: upload one, or send one from the gallery")
        given = self._edited(values) | {"image": (painting.keep_upload(self.page, image),), "strength": strength}
        return painting.options(Img2ImgOptions, self.page, given)

    def _inpaint(self, own: tuple[Any, ...], values: tuple[Any, ...]) -> InpaintOptions:
        """Return the options of the tab's own fields, in their order, and of the form."""
        drawing, sent, strength, feather, *extend = own
        if not drawing:
            raise UserError("give an image to inpaint: upload one, or send one from the gallery")
        image, sides = self._as_sent(drawing["background"], sent), [side or 0 for side in extend]
        mask = painting.drawn_mask(drawing["layers"], image.size)
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
        return painting.options(InpaintOptions, self.page, given)

    def grid(self, of: Any, x: Any, xs: Any, y: Any, ys: Any, *values: Any) -> None:
        """Generate an image for each pair of values of two settings.

        of: the tab whose kind of image is generated. values: the fields of these tabs and of the form.
        """
        edited, form = values[:10], values[10:]
        match of:
            case "text":
                kind: GenerateOptions = self._text(form)
            case "image":
                kind = self._image(edited[0], edited[1], form)
            case "inpaint":
                kind = self._inpaint(edited[2:], form)
            case _:
                raise UserError(f"grid of {str(of)[:50]!r}: choose {TEXT}, {IMAGE} or {INPAINT}")
        o = replace(kind, num_images=1)
        columns = Axis.read(x, xs, self.page.places, o)
        rows = Axis.read(y, ys, self.page.places, o) if y != "none" else None
        title = f"grid of {require_few(columns, rows)} images"
        painting.submit(self.page, title, lambda job: paint_grid(self.page, job, o, columns, rows))

    def animation(self, to: Any, to_seed: Any, frames: Any, fps: Any, *values: Any) -> None:
        """Interpolate to other prompts or to another seed."""
        given = self.form.read(values)
        given.pop("num_images")
        prompts = tuple(line for line in str(to or "").split("\n") if line.strip())
        to_seed = None if to_seed in (None, painting.RANDOM_SEED) else to_seed
        if not prompts and to_seed is None:
            raise UserError("nothing to change to: give a prompt to change to, or a seed")
        given |= {"to": prompts, "to_seed": to_seed, "frames": frames, "fps": fps}
        self._submit("animation", painting.options(InterpolateOptions, self.page, given))

    def again(self, chosen: Any, *values: Any) -> int:
        """Generate with the form's settings and the seed of the chosen image; return that seed."""
        settings = painting.saved_settings(self._chosen(chosen))
        seed = settings.get("seed")
        if not isinstance(seed, int):
            raise UserError("this image has no seed")
        given = self.form.read(values) | {"seed": seed, "num_images": 1}
        self._submit("again", painting.options(Txt2ImgOptions, self.page, given))
        return seed

    def use(self, chosen: Any) -> list[Any]:
        """Return the form with the settings of the chosen image."""
        return self._filled(self._chosen(chosen))

    def drop(self, file: Any) -> list[Any]:
        """Return the form with the settings of a dropped PNG."""
        return self._filled(as_path(file))

    def to_image(self, chosen: Any) -> tuple[Any, Any]:
        """Return the chosen image, for the tab that starts from an image."""
        return str(self._png(chosen)), gr.Tabs(selected=IMAGE)

    def to_inpaint(self, chosen: Any) -> tuple[Any, str]:
        """Return the chosen image enlarged, so that one can draw on it, and its name."""
        image = read_image(str(self._png(chosen)))
        return {"background": image.resize(_drawn_at(image), _EXACT), "layers": [], "composite": None}, chosen

    def _as_sent(self, image: Image.Image, sent: Any) -> Image.Image:
        """Return the image that was sent to the editor at its own size, if it is still there; else the editor's."""
        if not sent:
            return image
        with suppress(UserError):  # it may have been deleted
            original = read_image(str(self._png(sent)))
            if image.size == _drawn_at(original):
                difference = ImageChops.difference(image.resize(original.size, _EXACT), original)
                if np.asarray(difference).max() <= _ALIKE:
                    return original
        return image

    def _submit(self, what: str, o: ModelOptions) -> None:
        title = f"{what}: {textwrap.shorten(o.prompt, 80, placeholder=' …')}" if o.prompt else what
        painting.submit(self.page, title, lambda job: painting.generate(o, job, self.page))

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
        values |= {name: getattr(o, name) or OWN for name in CHOSEN}
        values |= {"model": model, "num_images": 1}
        updates = [values.get(name, gr.skip()) for name in self.form.fields()]
        image, strength, mode = gr.skip(), gr.skip(), TEXT
        if isinstance(o, Img2ImgOptions):
            strength, mode = o.strength, IMAGE
            name = self.page.places.name("out", Path(o.image[0])) if o.image else None
            if name and Path(o.image[0]).is_file():
                image = str(self.page.places.existing("out", name))
            else:
                note += " Give the image that it started from."
        elif isinstance(o, InpaintOptions):
            mode = INPAINT
            note += " Send or upload the image that was inpainted, and draw the mask again."
        return [
            *updates,
            gr.Tabs(selected=mode),
            strength,
            image,
            gr.Textbox(f"The settings of {path.name} are in the form.{note}", visible=True),
            self.form.traits(model) if isinstance(model, str) else gr.skip(),  # so that the settings stay
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
