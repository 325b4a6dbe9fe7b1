"""The shared part of all commands that generate images: load the models, generate, save the images with settings."""

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from ldm.errors import UserError
from ldm.files import open_regular, read_regular
from ldm.formats.hub import find_pipeline, model_folder
from ldm.formats.png import file_name, read_png
from ldm.networks.unet import weight_files
from ldm.pipeline import LatentDiffusionPipeline, StepCallback
from train.commands.main import require_at_least, require_folder, tiles, use_device
from train.commands.outputs import INPUTS, MODELS, image_key, would_replace, write_png
from train.config.generation import GenerateOptions, ModelOptions
from train.config.load import overlay, validate
from train.config.reports import EvaluateOptions
from train.data.images.decode import DamagedImage, load_image
from train.engine.precision import DTYPES
from train.engine.provenance import trained_scales
from train.evaluation.sheets import save_sheet
from train.output import warn

_UNSAVED = {  # options that aren't saved with an image
    *("out", "prompts", "num_images", "batch_size", "device", "offload", "slice", "grid", "preview", "like"),
    "optimize",
}
_PREVIEW = "preview.png"
_MAX_PROMPT = 4_000_000  # characters: Pillow reads up to 64 MB of PNG text, and JSON needs up to 6 bytes for each


@dataclass(frozen=True)
class _Files:
    """Files from which a saved image was generated."""

    sha256: dict[str, str]
    """SHA-256 of each file, by option."""


Options = TypeVar("Options", bound=GenerateOptions)


def options_like(o: Options) -> Options:
    """Return the options of the --like image, overridden by the options `o` of the command line.

    Without --like, returns `o`. Raises UserError for invalid options, and if an input file of the image is missing or
    has changed. Warns if the model has changed.
    """
    if o.prompt and o.prompts:
        raise UserError("--prompt and --prompts: give only one of them")
    if not o.like:
        return o
    kind = type(o)
    defaults = kind()
    try:
        saved, sha256 = read_options(kind, o.like)
    except OSError as error:
        raise UserError(f"--like {o.like!r}: can't be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--like {o.like!r}: {error!s:.300}") from None
    for name in (*MODELS, *INPUTS):
        if getattr(o, name, None) == getattr(defaults, name, None):  # not overridden on the command line
            paths = getattr(saved, name, ())
            for path in filter(None, [paths] if isinstance(paths, str) else paths):
                _check_input(name, path, sha256.get(name), o.like)
    return overlay(kind, saved)


def read_options(kind: type[Options], path: str) -> tuple[Options, dict[str, str]]:
    """Read the options saved in an image, and the SHA-256 of its input files, by option.

    The image is untrusted: each key must be an option of this command with a valid value, and none may set the output
    folder or the device. Raises ValueError.
    """
    metadata = read_png(Path(path))
    metadata.pop("grid", None)
    sha256 = validate(_Files, {"sha256": metadata.pop("sha256", {})}).sha256
    known = {f.name for f in fields(kind)} - _UNSAVED
    if "resize" in known:
        metadata.setdefault("resize", "never")  # images of earlier versions
    if unknown := next((key for key in metadata if key not in known), None):
        raise ValueError(f"this command has no setting {unknown[:50]!r}; use the command that generated the image")
    return validate(kind, metadata), sha256


def _check_input(name: str, path: str, sha256: str | None, like: str) -> None:
    """Raise UserError if an input of the --like image is missing or has changed; only warn if a model has changed."""
    option = f"--{name.replace('_', '-')}"
    if name in MODELS:
        if not Path(path).is_dir():  # may be a hub id, but an image must not cause a download
            raise UserError(f"--like {like!r}: its model {path!r} is not an existing folder; give {option}")
        now = model_sha256(Path(path))
        if sha256 not in (None, now):
            hashes = f"SHA-256 of the UNet's weights: {sha256[:10]!r} then, {now[:10]!r} now"
            warn(
                f"the model {path!r} has changed since {like!r} was generated, so the new image will differ ({hashes})"
            )
    else:
        if not Path(path).is_file():
            raise UserError(f"--like {like!r}: its input {path!r} is missing; give {option}")
        if sha256 not in (None, file_sha256(path)):
            raise UserError(
                f"--like {like!r}: its input {path!r} has changed; give {option} to use this or another file"
            )


def model_sha256(folder: Path) -> str:
    """Return the SHA-256 of the UNet's weights, over its files in order."""
    total = hashlib.sha256()
    for path in weight_files(model_folder(folder)):
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: total)
    return total.hexdigest()


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_prompts(o: ModelOptions) -> list[str]:
    """Return the prompt, or the non-empty lines of the prompts file. Raises UserError."""
    prompts = [o.prompt]
    if o.prompts:
        try:
            lines = read_regular(o.prompts, pipe=True).decode("utf-8-sig").split("\n")
        except OSError as error:
            raise UserError(f"--prompts {o.prompts!r}: can't be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"--prompts {o.prompts!r}: isn't UTF-8: byte {error.start}: {error.reason}") from None
        prompts = [line.removesuffix("\r") for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"--prompts {o.prompts!r}: is empty; write one prompt per line")
    if (longest := max(map(len, [*prompts, o.negative_prompt]))) > _MAX_PROMPT:
        raise UserError(f"a prompt has {longest} characters; the maximum is {_MAX_PROMPT}")
    return prompts


@dataclass(frozen=True, kw_only=True)
class ImageJob:
    """Image to generate."""

    prompt: str
    seed: int
    image: Image.Image | None = None
    """Image to start from."""
    finish: Callable[[Image.Image], Image.Image] = lambda image: image
    """Last change of the generated image, e.g. to the size of the given one."""
    name: str = ""
    """Prefix of the output file's name, before the prompt."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Settings specific to this image."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Input files, by option."""

    @property
    def file(self) -> str:
        """Name of the output file, unless a file with other settings has it."""
        return self.name + file_name(self.prompt, self.seed)


def load(o: ModelOptions, model: str) -> LatentDiffusionPipeline:
    """Load a model with the given options. Raises UserError if it can't be loaded or the options are invalid."""
    if not model:
        raise UserError("--model is missing: give the folder of a trained model, e.g. --model runs/ldm/model")
    device = use_device(o.device)
    if o.offload and device.type == "cpu":
        raise UserError("--offload: needs a GPU, and the device is cpu; leave --offload out")
    pipe = LatentDiffusionPipeline.from_pretrained(model, chunks=o.chunks)
    pipe.to(None if o.offload else device, DTYPES[o.precision])
    if o.offload:
        pipe.enable_model_cpu_offload(device)
    backend = pipe.set_attention(o.attention)
    if o.attention == "auto":
        print(f"attention backend of {model}: {backend}", file=sys.stderr)
    if o.optimize != "auto":
        pipe.optimize(o.optimize)
    if o.slice:
        pipe.enable_vae_slicing()
    if o.tile is not None:
        pipe.enable_vae_tiling(tiles(o.tile))
    return pipe


@dataclass(frozen=True)
class Session:
    """Inputs of these commands from a program that generates again and again. The command line uses the defaults."""

    load: Callable[[ModelOptions, str], LatentDiffusionPipeline] = load
    """Function that returns a model, which may be loaded already."""
    on_step: StepCallback | None = None
    """Function that is called after each step, instead of showing a progress bar."""


COMMAND_LINE = Session()


def settings(o: ModelOptions) -> dict[str, Any]:
    """Return the options that are saved with an image, and the SHA-256 of the models' weights."""
    metadata = {f.name: getattr(o, f.name) for f in fields(o) if f.name not in _UNSAVED}
    models = {name: metadata.get(name) for name in MODELS}
    return metadata | {"sha256": {name: model_sha256(find_pipeline(path)) for name, path in models.items() if path}}


def check_seed(option: str, seed: int, count: int = 1) -> None:
    """Raise UserError unless `count` consecutive seeds from this one are valid for torch.Generator."""
    if not 0 <= seed <= 2**63 - count:
        raise UserError(f"{option} {seed}: must be 0 to {2**63 - count}")


def warn_if_untrained(o: ModelOptions | EvaluateOptions, pipe: LatentDiffusionPipeline) -> None:
    """Warn if a network that reads the guidance scale was not trained with this one."""
    scales = trained_scales(o.model) if pipe.backbone.guidance_width else None
    if scales and not scales[0] <= o.guidance_scale <= scales[1]:
        warn(
            f"--guidance-scale {o.guidance_scale:g}: this model was trained with {scales[0]:g} to {scales[1]:g}, so "
            "the images will be poor; choose a scale in this range"
        )


class ImageGenerator:
    """Image generator of a command: its options, prompts and models."""

    def __init__(self, o: GenerateOptions, session: Session = COMMAND_LINE) -> None:
        """Load the models. Raises UserError for invalid options."""
        require_at_least(1, o, "num_images", "batch_size")
        require_at_least(0, o, "preview")
        check_seed("--seed", o.seed, o.num_images)
        if not o.weak_model and o.weak_scale != type(o).weak_scale:
            raise UserError(f"--weak-scale {o.weak_scale:g}: has no effect without --weak-model; give both")
        self.prompts, self.session = read_prompts(o), session
        self.pipe = session.load(o, o.model)
        self.o = o = o.for_sampler(self.pipe.process.sampler)
        warn_if_untrained(o, self.pipe)
        self.weak = session.load(o, o.weak_model) if o.weak_model else None
        if o.preview:
            # Raises UserError if the model has no preview.
            self.pipe.preview(torch.zeros(1, self.pipe.autoencoder.latent_channels, 1, 1))

    def jobs(self, prompt: str, **fields: Any) -> list[ImageJob]:
        """Return `num_images` images to generate for a prompt. fields: further fields of ImageJob."""
        return [ImageJob(prompt=prompt, seed=self.o.seed + k, **fields) for k in range(self.o.num_images)]

    def generate(self, jobs: Sequence[ImageJob], **inputs: Any) -> Iterator[Path]:
        """Generate and write images, and yield the path of each one. inputs: further arguments of the pipeline.

        Files with other settings aren't overwritten; see `write_file`. Raises UserError if an image would overwrite
        the --like image.
        """
        o, folder, metadata = self.o, Path(self.o.out), settings(self.o)
        require_folder(o.out)
        saved = [self._saved(job, metadata) for job in jobs]
        grid = saved[0] | {"grid": [image_key(one)[:8] for one in saved]}
        grid_name = f"grid-{file_name(jobs[0].prompt, jobs[0].seed)}"
        outputs = [*zip((job.file for job in jobs), saved, strict=True), *[(grid_name, grid)] * o.grid]
        if o.like and any(would_replace(Path(o.like), folder, *output) for output in outputs):
            raise UserError(f"{o.like!r} has the same settings and would be overwritten: give another --out")
        if o.preview:
            if (folder / _PREVIEW).exists():
                raise UserError(f"--preview: {str(folder / _PREVIEW)!r} exists already; move it, or give another --out")
            inputs["callback_on_step_end"] = self._write_preview
        elif self.session.on_step:
            inputs["callback_on_step_end"] = self.session.on_step
        generated: list[Image.Image] = []
        remaining, spacing = iter(saved), self.pipe.process.spacing
        engines = self._optimize(len(jobs)) if o.optimize == "auto" and o.reuse_features == 1 else []
        try:
            for batch in self._batches(jobs):
                start = [job.image for job in batch if job.image]
                if all(image is start[0] for image in start):
                    start = start[:1]  # a single shared image is encoded once
                images = self.pipe(
                    [job.prompt for job in batch],
                    o.negative_prompt,
                    image=start or None,
                    **o.sampling(),
                    compose=o.compose,
                    prompt_weights=o.prompt_weights,
                    weak=self.weak,
                    weak_scale=o.weak_scale,
                    progress=self.session.on_step is None,
                    generator=[torch.Generator().manual_seed(job.seed) for job in batch],
                    **inputs,
                ).images
                for engine in engines:  # not before all settings are known to be valid
                    print(f"the networks were optimized with {engine}", file=sys.stderr)
                engines.clear()
                folder.mkdir(parents=True, exist_ok=True)  # not before all settings are known to be valid
                for job, image in zip(batch, images, strict=True):
                    own = next(remaining)
                    image = job.finish(image)
                    yield write_png(image, folder, job.file, own, spacing=spacing)
                    if o.grid:
                        generated.append(image)
        finally:
            if o.preview:
                (folder / _PREVIEW).unlink(missing_ok=True)
        if o.grid:
            yield write_png(image_grid(generated), folder, grid_name, grid, spacing=spacing)

    def _optimize(self, images: int) -> list[str]:
        """Choose an engine if it saves more time for so many images than compiling takes; return the chosen ones."""
        pipes = filter(None, (self.pipe, self.weak))
        chosen = {pipe.optimize("auto", pipe.model.seconds(images, self.o.number_of_steps)) for pipe in pipes}
        return sorted(chosen - {"off"})

    def _saved(self, job: ImageJob, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings to save with an image. metadata: those of all images."""
        sha256 = {option: file_sha256(path) for option, path in job.files.items()}
        own = {"prompt": job.prompt, "seed": job.seed, **job.metadata, "sha256": metadata["sha256"] | sha256}
        return {**metadata, **own}

    def _batches(self, jobs: Sequence[ImageJob]) -> Iterator[list[ImageJob]]:
        """Yield batches of consecutive images whose start images have the same size."""
        for _, group in groupby(jobs, lambda job: job.image and job.image.size):
            same_size = list(group)
            for k in range(0, len(same_size), self.o.batch_size):
                yield same_size[k : k + self.o.batch_size]

    def _write_preview(self, pipe: LatentDiffusionPipeline, step: int, _: float, tensors: dict[str, Tensor]) -> None:
        if (step + 1) % self.o.preview:
            return
        factor = pipe.autoencoder.factor
        previews = pipe.preview(tensors["denoised"])
        folder = Path(self.o.out)
        folder.mkdir(parents=True, exist_ok=True)
        grid = image_grid([i.resize((i.width * factor, i.height * factor)) for i in previews])
        save_sheet(grid, folder / _PREVIEW)


def image_grid(images: Sequence[Image.Image]) -> Image.Image:
    """Draw images in a grid that is about square; all cells are as wide as the widest image, as high as the highest."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for k, image in enumerate(images):
        sheet.paste(image, (k % columns * width, k // columns * height))
    return sheet


def open_image(path: str, option: str, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Load the image file of an option: upright, mode RGB, on a background. Raises UserError if it can't be read."""
    if not path:
        raise UserError(f"{option} is missing: give an image file")
    try:
        return load_image(Path(path), background=background)
    except DamagedImage as error:
        raise UserError(f"{option} {path!r}: can't be read: {error.reason}") from None
    except OSError as error:
        raise UserError(f"{option} {path!r}: can't be read: {error.strerror}") from None
