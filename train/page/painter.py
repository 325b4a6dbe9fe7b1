"""The handlers of the tab that generates."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ldm.errors import UserError
from train.commands.generate import model_sha256, read_options
from train.config.generation import Img2ImgOptions, InpaintOptions, InterpolateOptions, ModelOptions, Txt2ImgOptions
from train.page import painting
from train.page.grid import Axis, paint_grid, require_few
from train.page.paint_form import CHOSEN, OWN, Form
from train.page.shared import Page
from train.page.uploads import as_path, read_image

TEXT, IMAGE, INPAINT, GRID, ANIMATION = "text", "image", "inpaint", "grid", "animation"
"""The inner tabs."""
EDITOR_SIDE = 512
"""Pixels; smaller images are enlarged to draw on them."""


class Painter:
    """The handlers of the tab's buttons. Each checks what was given, and adds a job to the queue."""

    def __init__(self, page: Page, form: Form) -> None:
        self.page, self.form = page, form

    def text(self, *values: Any) -> None:
        """Generate from text."""
        self._submit("text to image", Txt2ImgOptions, self.form.read(values))

    def image(self, image: Any, strength: Any, *values: Any) -> None:
        """Generate from an image."""
        if image is None:
            raise UserError("give an image to start from: upload one, or send one from the gallery")
        given = self._edited(values) | {"image": (painting.keep_upload(self.page, image),), "strength": strength}
        self._submit("image to image", Img2ImgOptions, given)

    def inpaint(self, drawing: Any, scale: Any, strength: Any, feather: Any, *rest: Any) -> None:
        """Inpaint what was drawn over, or extend the image."""
        extend, values = rest[:4], rest[4:]
        if not drawing:
            raise UserError("give an image to inpaint: upload one, or send one from the gallery")
        image, sides = drawing["background"], [side or 0 for side in extend]
        scale = int(scale) if isinstance(scale, int) and 1 <= scale <= EDITOR_SIDE else 1
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
        self._submit("inpaint", InpaintOptions, given)

    def grid(self, x: Any, xs: Any, y: Any, ys: Any, *values: Any) -> None:
        """Generate an image for each pair of values of two settings."""
        given = self.form.read(values) | {"num_images": 1}
        o = painting.options(Txt2ImgOptions, self.page, given)
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
        self._submit("animation", InterpolateOptions, given)

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
        return str(self._png(chosen)), gr.Tabs(selected=IMAGE)

    def to_inpaint(self, chosen: Any) -> tuple[Any, int]:
        """Return the chosen image enlarged, so that one can draw on it, and by how much."""
        image = read_image(str(self._png(chosen)))
        scale = max(1, math.floor(EDITOR_SIDE / max(image.size)))
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        return {"background": image, "layers": [], "composite": None}, scale

    def _submit(self, what: str, kind: type[ModelOptions], values: dict[str, Any]) -> None:
        o = painting.options(kind, self.page, values)
        title = f"{what}: {o.prompt[:60]}" if o.prompt else what
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
