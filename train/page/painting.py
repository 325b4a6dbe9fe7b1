"""Jobs that generate images for the page, with the functions of the commands and their options."""

import hashlib
import io
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image, ImageChops
from torch import Tensor

from ldm.editing import steps_for_strength
from ldm.errors import UserError
from ldm.formats.png import parameters, read_png
from ldm.pipeline import LatentDiffusionPipeline
from train.commands.generate import Session, image_grid
from train.commands.img2img import img2img
from train.commands.inpaint import inpaint
from train.commands.interpolate import interpolate
from train.commands.txt2img import txt2img
from train.config.generation import (
    GenerateOptions,
    Img2ImgOptions,
    InpaintOptions,
    InterpolateOptions,
    ModelOptions,
    Txt2ImgOptions,
)
from train.config.load import validate
from train.data.store.shards import duration
from train.page.jobs import Job
from train.page.places import Places
from train.page.shared import Page

Options = TypeVar("Options", bound=ModelOptions)
MOST = {"steps": 1000, "num_images": 64, "width": 4096, "height": 4096, "frames": 250}
"""Largest numbers that the page accepts."""
OWN_NUMBERS = ("steps", "width", "height")
"""Numbers that are the model's own if the form has 0."""
RANDOM_SEED = -1
"""Seed for which the page draws one."""
_PREVIEW_SECONDS = 0.2
_SMALLEST_PREVIEW = 256  # pixels
_SHOWN = 48  # images in the gallery
_GALLERY = ("images/*.png", "animations/*.gif")


class Progress:
    """Callback of sampling that shows a job's progress, and ends it when it is cancelled."""

    def __init__(self, job: Job, *options: ModelOptions) -> None:
        """options: those of all commands that the job runs."""
        self.job, self.options, self.done = job, options, 0
        self.began, self.shown = 0.0, 0.0

    def __call__(self, pipe: LatentDiffusionPipeline, step: int, _: float, tensors: dict[str, Tensor]) -> None:
        self.done += 1
        preview, now = None, time.monotonic()
        self.began = self.began or now
        if now - self.shown > _PREVIEW_SECONDS and pipe.autoencoder.colours is not None:
            self.shown, preview = now, _preview(pipe, tensors["denoised"])
        total = max(self.done, sum(_steps(o.for_sampler(pipe.process.sampler)) for o in self.options))
        left = (now - self.began) * (total - self.done) / (self.done - 1) if self.done > 1 else 0.0
        remaining = f", about {duration(left)} left" if left >= 1 else ""
        self.job.report(self.done / total, f"step {self.done} of {total}{remaining}", preview)


def _preview(pipe: LatentDiffusionPipeline, denoised: Tensor) -> Image.Image:
    """Return what the images look like at the moment, side by side."""
    factor = pipe.autoencoder.factor
    previews = pipe.preview(denoised)
    while previews[0].width * factor < _SMALLEST_PREVIEW:
        factor *= 2
    return image_grid([image.resize((image.width * factor, image.height * factor)) for image in previews])


def options(kind: type[Options], page: Page, values: Mapping[str, Any]) -> Options:
    """Return the options of a command from the values in the page's form. Raises UserError for values that don't fit.

    A seed of -1 is drawn. Empty fields, and the `OWN_NUMBERS` of 0, keep their defaults.
    """
    given = {name: _number(value) for name, value in values.items() if value is not None and value != ""}
    given = {name: value for name, value in given.items() if value != 0 or name not in OWN_NUMBERS}
    for name, most in MOST.items():
        if name in given and not 1 <= given[name] <= most:
            raise UserError(f"{name.replace('_', ' ')} {given[name]:g}: must be 1 to {most}")
    if given.get("seed", RANDOM_SEED) == RANDOM_SEED:
        given["seed"] = secrets.randbelow(2**32)
    if not given.get("model"):
        raise UserError(f"no model is chosen: there must be one in --models {str(page.places.models)!r}")
    model = page.places.model(given.pop("model"))
    out = page.places.inside("out", "animations" if kind is InterpolateOptions else "images")
    for name in ("image", "mask"):
        if given.get(name):
            _require_upload(page.places, given[name])
    o = validate(kind, {**given, "model": str(model), "out": str(out), "device": page.device})
    if isinstance(o, Img2ImgOptions | InpaintOptions):
        steps_for_strength(o.strength, o.number_of_steps)
    return o


def _number(value: Any) -> Any:
    """Return a number of the form, which JSON may have made a float, as an integer if it is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _require_upload(places: Places, given: str | tuple[str, ...]) -> None:
    for path in (given,) if isinstance(given, str) else given:
        if places.name("out", Path(path)) is None:
            raise UserError(f"image {path[:100]!r}: isn't one that was uploaded to the page")


def generate(o: ModelOptions, job: Job, page: Page) -> Iterator[Path]:
    """Generate images with the command that has these options, and yield the path of each file."""
    return run(o, Session(page.models.load, Progress(job, o)))


def run(o: ModelOptions, session: Session) -> Iterator[Path]:
    """Run the command that has these options, and yield the path of each file."""
    match o:
        case Txt2ImgOptions():
            yield from txt2img(o, session)
        case Img2ImgOptions():
            yield from img2img(o, session)
        case InpaintOptions():
            yield from inpaint(o, session)
        case InterpolateOptions():
            yield from interpolate(o, session)
        case _:
            raise AssertionError(type(o))


def _steps(o: ModelOptions) -> int:
    """Return the number of steps of all batches."""
    if isinstance(o, InterpolateOptions):
        between = max(0, (o.frames - 1) * max(1, len(o.to)) - 1)
        return o.number_of_steps * (2 + math.ceil(between / o.batch_size))
    steps = (
        steps_for_strength(o.strength, o.number_of_steps)
        if isinstance(o, Img2ImgOptions | InpaintOptions)
        else o.number_of_steps
    )
    return max(1, steps) * math.ceil(getattr(o, "num_images", 1) / o.batch_size)


def submit(page: Page, title: str, work: Callable[[Job], Iterator[Path]]) -> Job:
    """Add a job to the queue. Its result is the list of the names in `out`, which grows as files are written."""

    def do(job: Job) -> list[str]:
        job.result = []
        job.report(0.0, "loading the model")
        for path in work(job):
            job.result.append(page.places.name("out", path))
            job.check()
            page.jobs.change()
        return job.result

    return page.jobs.submit("paint", title, do)


# -- uploaded and generated images -------------------------------------------------------------------------------------


def keep_upload(page: Page, image: Image.Image) -> str:
    """Write an uploaded image to `out`, where the settings of images name it; return its path."""
    file = io.BytesIO()
    image.save(file, "PNG")
    path = page.places.inside("out", f"uploads/{hashlib.sha256(file.getvalue()).hexdigest()[:16]}.png")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
    return str(path)


def drawn_mask(layers: list[Image.Image], size: tuple[int, int]) -> Image.Image | None:
    """Return a mask that is white where something was drawn on any layer; None if nothing was."""
    mask = Image.new("L", size)
    for layer in layers:
        drawn = layer.getchannel("A").point(lambda alpha: 255 * (alpha > 127))
        mask = ImageChops.lighter(mask, drawn.resize(size, Image.Resampling.NEAREST))
    return mask if mask.getbbox() else None


def gallery(places: Places) -> list[str]:
    """Return the names in `out` of the newest images and animations, the newest first."""
    files = [path for pattern in _GALLERY for path in places.out.glob(pattern) if places.name("out", path)]
    newest = sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)[:_SHOWN]
    return [str(path.relative_to(places.out)) for path in newest]


def folder_times(places: Places) -> list[int]:
    """Return when files were last added to or removed from the gallery's folders."""
    folders = [places.out / Path(pattern).parent for pattern in _GALLERY]
    return [folder.stat().st_mtime_ns if folder.is_dir() else 0 for folder in folders]


def shown_settings(path: Path) -> str:
    """Return the settings of a generated image as the text that the web UI of AUTOMATIC1111 shows."""
    with Image.open(path, formats=["PNG", "GIF"]) as image:
        size = image.size
    settings = saved_settings(path)
    return parameters(settings, size)


def saved_settings(path: Path) -> dict[str, Any]:
    """Return the settings of a generated image; those of an animation are its first frame's. Raises UserError."""
    if path.suffix == ".gif":
        path = path.with_name(f"{path.stem}-0000.png")
    try:
        return read_png(path)
    except OSError as error:
        raise UserError(f"{path.name}: can't be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path.name}: {error}") from None


def kind_of(settings: Mapping[str, Any]) -> type[GenerateOptions] | None:
    """Return the options of the command that generated an image with these settings; None for an animation's frame."""
    if "way" in settings:
        return None
    if "extend" in settings:
        return InpaintOptions
    return Img2ImgOptions if "image" in settings else Txt2ImgOptions
