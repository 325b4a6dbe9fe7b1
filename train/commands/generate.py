"""What the scripts that paint share: the pipeline as the options want it, and pictures written with their story."""

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

_OF_A_CALL = {  # and no part of a picture's story
    *("out", "prompts", "num_images", "batch_size", "device", "offload", "slice", "grid", "preview", "like"),
}
_PREVIEW = "preview.png"
_MODELS = ("model", "weak_model")
_INPUTS = ("image", "mask")
_LONGEST = 4_000_000  # characters of a prompt: Pillow reads 64 MB of a PNG's text, and JSON makes six bytes of some


@dataclass(frozen=True)
class _Files:
    """That a picture was made of."""

    sha256: dict[str, str]
    """By option."""


Options = TypeVar("Options", bound=PaintOptions)


def like(given: Options) -> Options:
    """The command line's options, laid over those of the picture that --like names.

    Raises UserError for what doesn't fit, and where files that the picture was made of are gone or others by now. Of a
    model that is another a line tells.
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
        if getattr(given, name, None) == getattr(plain, name, None):  # else the command line names another
            where = getattr(story, name, ())
            for path in filter(None, [where] if isinstance(where, str) else where):
                _still(name, path, sha256.get(name), given.like)
    return overlay(kind, story)


def _story(kind: type[Options], path: str) -> tuple[Options, dict[str, str]]:
    """What a picture tells of its options, and the SHA-256 of the files that it was made of, by option.

    It is a stranger's: every key has to be an option of this command, with a value that fits, and none says where to
    write, or what to run on. Raises ValueError.
    """
    told = read_png(Path(path))
    sha256 = validate(_Files, {"sha256": told.pop("sha256", {})}).sha256
    known = {f.name for f in fields(kind)} - _OF_A_CALL
    if unknown := next((key for key in told if key not in known), None):
        raise ValueError(f"its setting {unknown[:50]!r} is none of this command: was it painted by another?")
    return validate(kind, told), sha256


def _still(name: str, path: str, sha256: str | None, like: str) -> None:
    """Raises UserError unless an input is what it was."""
    option = f"--{name.replace('_', '-')}"
    if name in _MODELS:
        if not Path(path).is_dir():  # what looks like a hub id may be a folder that was: nothing is fetched on its word
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
    """SHA-256 of the UNet's weights: of its file, or of several one after the other."""
    total = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: total)
    return total.hexdigest()


def file_sha256(path: str) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_prompts(o: ModelOptions) -> list[str]:
    """The prompt, or those of the file, a line each; lines without any text are left out. Raises UserError."""
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
    """A picture to paint."""

    prompt: str
    seed: int
    image: Image.Image | None = None
    """To begin with."""
    name: str = ""
    """Before the prompt in the file's name."""
    story: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its own."""
    files: Mapping[str, str] = field(default_factory=dict)
    """That it is made of, by option."""

    @property
    def file(self) -> str:
        """The name of its own."""
        return self.name + file_name(self.prompt, self.seed)


def load(o: ModelOptions, model: str) -> LatentDiffusionPipeline:
    """A model as the options want it. Raises UserError where it can't be had, or they don't fit."""
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
    """A picture's story, as far as the options tell it, and which weights the models have."""
    told = {f.name: getattr(o, f.name) for f in fields(o) if f.name not in _OF_A_CALL}
    models = {name: told.get(name) for name in _MODELS}
    return told | {"sha256": {name: model_sha256(find_pipeline(path)) for name, path in models.items() if path}}


def check_seed(option: str, seed: int, count: int = 1) -> None:
    """Raises UserError for a seed that the generator doesn't take."""
    if not 0 <= seed <= 2**63 - count:
        raise UserError(f"{option} {seed}: 0 to {2**63 - count} are accepted")


class Painter:
    """The models of a command."""

    def __init__(self, o: PaintOptions) -> None:
        """Raises UserError for options that don't fit."""
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
            self.pipe.preview(torch.zeros(1, self.pipe.autoencoder.latent_channels, 1, 1))  # raises if there is none

    def wanted(self, prompt: str, **how: Any) -> list[Wanted]:
        """`num_images` pictures of a prompt. how: what else they are made of."""
        return [Wanted(prompt=prompt, seed=self.o.seed + k, **how) for k in range(self.o.num_images)]

    def paint(self, wanted: Sequence[Wanted], **inputs: Any) -> Iterator[Path]:
        """Write pictures, and give their paths as they are there. inputs: the pipeline's further arguments.

        Raises UserError where one would be written over a picture that it is made of, or like.
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
                    given = given[:1]  # one for all: it is encoded once
                images = self.pipe(
                    [w.prompt for w in batch], o.negative_prompt, image=given or None, **o.sampling(),
                    compose=o.compose, weak=self.weak, weak_scale=o.weak_scale, progress=True,
                    generator=[torch.Generator().manual_seed(w.seed) for w in batch], **inputs,
                ).images  # fmt: skip
                folder.mkdir(parents=True, exist_ok=True)  # now that all the settings have proved good
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
        """Of pictures that begin with ones of the same size."""
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
    """Pictures in rows, about as many as columns, in cells as large as the largest."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for k, image in enumerate(images):
        sheet.paste(image, (k % columns * width, k // columns * height))
    return sheet


def open_picture(path: str, option: str, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """A picture that an option names, upright, mode RGB, laid on a background. Raises UserError where it isn't one."""
    if not path:
        raise UserError(f"{option} is missing: a picture's file")
    try:
        return load_picture(Path(path), background=background)
    except DamagedPicture as error:
        raise UserError(f"{option} {path!r} can't be read: {error.reason}") from None
    except OSError as error:
        raise UserError(f"{option} {path!r} can't be read: {error.strerror}") from None
