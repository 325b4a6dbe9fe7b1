"""The shared part of all commands that generate images: load the pipeline, generate, and save images with settings."""

import hashlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from autoencoder.tiling import Tiles
from ldm.errors import UserError
from ldm.formats.hub import find_pipeline
from ldm.formats.png import file_name, read_png, save_png
from ldm.networks.unet import weight_files
from ldm.pipeline import LatentDiffusionPipeline
from train.commands.main import use_device
from train.config.load import overlay, validate
from train.config.painting import ModelOptions, PaintOptions
from train.data.images.decode import DamagedPicture, load_picture
from train.engine.precision import DTYPES

_OF_A_CALL = {  # options that aren't saved with an image
    *("out", "prompts", "num_images", "batch_size", "device", "offload", "slice", "grid", "preview", "like"),
}
_PREVIEW = "preview.png"
_MODELS = ("model", "weak_model")
_INPUTS = ("image", "mask")
_LONGEST = 4_000_000  # characters per prompt: Pillow reads 64 MB of PNG text, and JSON needs up to six bytes for one


@dataclass(frozen=True)
class _Files:
    """Files from which an image was made."""

    sha256: dict[str, str]
    """SHA-256 of each file, by option."""


Options = TypeVar("Options", bound=PaintOptions)


def like(given: Options) -> Options:
    """Return the options of the --like image, overridden by those of the command line.

    Raises UserError for invalid options, and if an input file of the image is missing or has changed. Warns if the
    model has changed.
    """
    if given.prompt and given.prompts:
        raise UserError("--prompt and --prompts: give one of them")
    if not given.like:
        return given
    kind = type(given)
    plain = kind()
    try:
        story, sha256 = _story(kind, given.like)
    except OSError as error:
        raise UserError(f"--like {given.like!r} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--like {given.like!r}: {error!s:.300}") from None
    for name in (*_MODELS, *_INPUTS):
        if getattr(given, name, None) == getattr(plain, name, None):  # not overridden on the command line
            where = getattr(story, name, ())
            for path in filter(None, [where] if isinstance(where, str) else where):
                _still(name, path, sha256.get(name), given.like)
    return overlay(kind, story)


def _story(kind: type[Options], path: str) -> tuple[Options, dict[str, str]]:
    """Read the options saved in an image, and the SHA-256 of its input files, by option.

    The image is untrusted: each key must be an option of this command with a valid value, and none may set the output
    folder or the device. Raises ValueError.
    """
    told = read_png(Path(path))
    sha256 = validate(_Files, {"sha256": told.pop("sha256", {})}).sha256
    known = {f.name for f in fields(kind)} - _OF_A_CALL
    if unknown := next((key for key in told if key not in known), None):
        raise ValueError(f"its setting {unknown[:50]!r} is none of this command: was it painted by another?")
    return validate(kind, told), sha256


def _still(name: str, path: str, sha256: str | None, like: str) -> None:
    """Check that an input still exists and is unchanged. Raises UserError, but only warns if a model has changed."""
    option = f"--{name.replace('_', '-')}"
    if name in _MODELS:
        if not Path(path).is_dir():  # it may look like a hub id, but nothing is downloaded because an image names it
            raise UserError(f"--like {like!r}: its model {path!r} is no folder here; give {option}")
        now = model_sha256(Path(path))
        if sha256 not in (None, now):
            line = (
                f"the model at {path!r} is another by now: {like!r} was painted with {sha256[:10]!r}, this is {now:.10}"
            )
            print(f"warning: {line} (SHA-256 of the UNet's weights)", file=sys.stderr)
    else:
        if not Path(path).is_file():
            raise UserError(f"--like {like!r}: the picture {path!r} that it was made of is gone; give {option}")
        if sha256 not in (None, file_sha256(path)):
            raise UserError(f"--like {like!r}: the picture {path!r} that it was made of has changed; give {option}")


def model_sha256(folder: Path) -> str:
    """Return the SHA-256 of the UNet's weights: of its file, or of its files in order."""
    total = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: total)
    return total.hexdigest()


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_prompts(o: ModelOptions) -> list[str]:
    """Return the prompt, or the non-empty lines of the prompts file. Raises UserError."""
    prompts = [o.prompt]
    if o.prompts:
        try:
            lines = Path(o.prompts).read_bytes().decode("utf-8-sig").split("\n")
        except OSError as error:
            raise UserError(f"--prompts {o.prompts!r} can't be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts {o.prompts!r} isn't UTF-8: byte {error.start} is {error.reason}") from None
        prompts = [line.removesuffix("\r") for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"--prompts {o.prompts!r} is empty: a prompt a line is accepted")
    if (longest := max(map(len, [*prompts, o.negative_prompt]))) > _LONGEST:
        raise UserError(f"a prompt of {longest} characters: up to {_LONGEST} are accepted")
    return prompts


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Image to generate."""

    prompt: str
    seed: int
    image: Image.Image | None = None
    """Image to start from."""
    name: str = ""
    """Prefix of the file's name, before the prompt."""
    story: Mapping[str, Any] = field(default_factory=dict)
    """Settings specific to this image."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Input files, by option."""

    @property
    def file(self) -> str:
        """Name of the output file."""
        return self.name + file_name(self.prompt, self.seed)


def load(o: ModelOptions, model: str) -> LatentDiffusionPipeline:
    """Load a model with the given options. Raises UserError if it can't be loaded or the options are invalid."""
    if not model:
        raise UserError("--model is missing: the folder of a trained model, e.g. --model runs/ldm/model")
    device = use_device(o.device)
    if o.offload and device.type == "cpu":
        raise UserError("--offload with --device cpu: there is nowhere to keep the networks but where they run")
    pipe = LatentDiffusionPipeline.from_pretrained(model, chunks=o.chunks)
    pipe.to(None if o.offload else device, DTYPES[o.precision])
    if o.offload:
        pipe.enable_model_cpu_offload(device)
    taken = pipe.set_attention(o.attention)
    if o.attention == "auto":
        print(f"attention of {model}: {taken}", file=sys.stderr)
    if o.slice:
        pipe.enable_vae_slicing()
    if o.tile is not None:
        pipe.enable_vae_tiling(Tiles(o.tile, o.tile // 4))
    return pipe


def settings(o: ModelOptions) -> dict[str, Any]:
    """Return the options that are saved with an image, and the SHA-256 of the models' weights."""
    told = {f.name: getattr(o, f.name) for f in fields(o) if f.name not in _OF_A_CALL}
    models = {name: told.get(name) for name in _MODELS}
    return told | {"sha256": {name: model_sha256(find_pipeline(path)) for name, path in models.items() if path}}


def check_seed(option: str, seed: int, count: int = 1) -> None:
    """Check that the generator accepts a seed. Raises UserError."""
    if not 0 <= seed <= 2**63 - count:
        raise UserError(f"{option} {seed}: 0 to {2**63 - count} are accepted")


class Painter:
    """Image generator of a command: its options, prompts and models."""

    def __init__(self, o: PaintOptions) -> None:
        """Load the models. Raises UserError for invalid options."""
        if o.num_images < 1 or o.batch_size < 1 or o.preview < 0:
            raise UserError(
                f"--num-images {o.num_images} --batch-size {o.batch_size} --preview {o.preview}: the first two must be at "
                "least 1, the last at least 0"
            )
        check_seed("--seed", o.seed, o.num_images)
        self.o, self.prompts = o, read_prompts(o)
        self.pipe = load(o, o.model)
        self.weak = load(o, o.weak_model) if o.weak_model else None
        if o.preview:
            self.pipe.preview(torch.zeros(1, self.pipe.autoencoder.latent_channels, 1, 1))  # raises without one

    def wanted(self, prompt: str, **how: Any) -> list[Wanted]:
        """Return `num_images` images to generate for a prompt. how: further fields of Wanted."""
        return [Wanted(prompt=prompt, seed=self.o.seed + k, **how) for k in range(self.o.num_images)]

    def paint(self, wanted: Sequence[Wanted], **inputs: Any) -> Iterator[Path]:
        """Generate and write images, and yield the path of each one. inputs: further arguments of the pipeline.

        Raises UserError if an image would overwrite one of its inputs or the --like image.
        """
        o, folder, told = self.o, Path(self.o.out), settings(self.o)
        read = {Path(path).resolve() for w in wanted for path in (o.like, *w.files.values()) if path}
        if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
            raise UserError(f"--out {o.out!r} can't be a folder: {str(file)!r} is a file")
        grid = f"grid-{file_name(wanted[0].prompt, wanted[0].seed)}"
        names = [w.file for w in wanted] + [grid] * o.grid
        if over := next((name for name in names if (folder / name).resolve() in read), None):
            raise UserError(f"{str(folder / over)!r} would be written over what it is painted from: give another --out")
        if o.preview:
            if (folder / _PREVIEW).exists():
                raise UserError(
                    f"--preview: there is a {str(folder / _PREVIEW)!r} already; move it, or give another --out"
                )
            inputs["callback_on_step_end"] = self._show
        made: list[tuple[Image.Image, dict[str, Any]]] = []
        try:
            for batch in self._batches(wanted):
                given = [w.image for w in batch if w.image]
                if all(image is given[0] for image in given):
                    given = given[:1]  # a single shared image is encoded once
                images = self.pipe(
                    [w.prompt for w in batch], o.negative_prompt, image=given or None, **o.sampling(),
                    compose=o.compose, weak=self.weak, weak_scale=o.weak_scale, progress=True,
                    generator=[torch.Generator().manual_seed(w.seed) for w in batch], **inputs,
                ).images  # fmt: skip
                folder.mkdir(parents=True, exist_ok=True)  # not before all settings are known to be valid
                for w, image in zip(batch, images, strict=True):
                    sha256 = {option: file_sha256(path) for option, path in w.files.items()}
                    story = told | {"prompt": w.prompt, "seed": w.seed, **w.story, "sha256": told["sha256"] | sha256}
                    path = folder / w.file
                    save_png(image, path, story)
                    yield path
                    if o.grid:
                        made.append((image, story))
        finally:
            if o.preview:
                (folder / _PREVIEW).unlink(missing_ok=True)
        if o.grid:
            save_png(in_rows([image for image, _ in made]), folder / grid, made[0][1])
            yield folder / grid

    def _batches(self, wanted: Sequence[Wanted]) -> Iterator[list[Wanted]]:
        """Yield batches of consecutive images whose start images have the same size."""
        for _, group in groupby(wanted, lambda w: w.image and w.image.size):
            alike = list(group)
            for k in range(0, len(alike), self.o.batch_size):
                yield alike[k : k + self.o.batch_size]

    def _show(self, pipe: LatentDiffusionPipeline, step: int, _: float, tensors: dict[str, Tensor]) -> None:
        if (step + 1) % self.o.preview:
            return
        factor = pipe.autoencoder.factor
        small = pipe.preview(tensors["denoised"])
        folder = Path(self.o.out)
        folder.mkdir(parents=True, exist_ok=True)
        in_rows([i.resize((i.width * factor, i.height * factor)) for i in small]).save(folder / _PREVIEW)


def in_rows(images: Sequence[Image.Image]) -> Image.Image:
    """Return a grid of images, about square, with cells as large as the largest image."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for k, image in enumerate(images):
        sheet.paste(image, (k % columns * width, k // columns * height))
    return sheet


def open_picture(path: str, option: str, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Load the image that an option names: upright, mode RGB, on a background. Raises UserError if it can't be read."""
    if not path:
        raise UserError(f"{option} is missing: a picture's file")
    try:
        return load_picture(Path(path), background=background)
    except DamagedPicture as error:
        raise UserError(f"{option} {path!r} can't be read: {error.reason}") from None
    except OSError as error:
        raise UserError(f"{option} {path!r} can't be read: {error.strerror}") from None
