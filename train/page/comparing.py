"""The work behind the tab that compares: both models generate the images of a study."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from ldm.errors import UserError
from ldm.pipeline import LatentDiffusionPipeline
from train.commands.generate import check_seed
from train.config.generation import ModelOptions
from train.config.load import validate
from train.config.sampling import SamplingOptions
from train.data.store.atomic import atomic_folder
from train.page.datasets import captions
from train.page.jobs import Job
from train.page.places import Places
from train.page.shared import Page
from train.page.studies import Study, pairs_of, save_image

MOST_PAIRS = 500
KIND = "compare"
OWN = "own"
"""Choice of the sampler and the number of steps that each model is used with by itself."""
_BATCH = 8
_MOST_STEPS = 1000
_LONGEST_PROMPT = 2000


def submit(page: Page, name: object, models: Sequence[object], settings: Mapping[str, Any]) -> Job:
    """Add a comparison to the queue. Raises UserError for settings that don't fit.

    settings: prompts (one a line), dataset (whose held-out captions are used if there are no prompts), pairs, seed, and
    sampling options.
    """
    places = page.places
    if not name or "/" in str(name) or str(name).startswith("."):
        raise UserError(f"name {str(name)!r:.100}: give the new comparison a name without /")
    folder = places.inside("runs", f"compare/{name}")
    if folder.exists():
        raise UserError(f"name {str(name)!r}: there is a comparison with this name; choose another")
    names = [str(model) for model in models]
    options = [validate(ModelOptions, {"model": str(places.model(model)), "device": page.device}) for model in names]
    study = _study(places, names, settings)
    sampling = validate(SamplingOptions, study.sampling)

    def work(job: Job) -> str:
        with atomic_folder(folder) as temporary:
            progress = _Progress(job, 2 * -(-len(study.prompts) // _BATCH) * sampling.number_of_steps)
            sizes = set()
            for side, o in zip(("first", "second"), options, strict=True):
                pipe = page.models.load(o, o.model)
                chosen = sampling if sampling.sampler else sampling.for_sampler(pipe.process.sampler)
                for number, image in enumerate(_images(pipe, study, chosen.sampling(), progress)):
                    sizes.add(image.size)
                    if len(sizes) > 1:
                        shown = " and ".join(f"{width} × {height}" for width, height in sorted(sizes))
                        raise UserError(f"the models generate images of different sizes ({shown}), so all could see")
                    save_image(temporary, number, side, image)
            study.write(temporary)
            if folder.exists():  # made since then, with votes that would be lost
                raise UserError(f"name {str(name)!r}: there is a comparison with this name; choose another")
        return str(name)

    return page.jobs.submit(KIND, f"comparison {name}", work)


class _Progress:
    """Callback of sampling that shows the job's progress, and ends it when it is cancelled."""

    def __init__(self, job: Job, total: int) -> None:
        self.job, self.total, self.done = job, total, 0

    def __call__(self, *_: object) -> None:
        self.done += 1
        self.job.report(min(1.0, self.done / self.total), f"step {self.done:,} of {self.total:,}")


def _study(places: Places, models: Sequence[str], settings: Mapping[str, Any]) -> Study:
    count, seed = (_whole(settings, name) for name in ("pairs", "seed"))
    steps = _whole(settings, "steps")
    if not 1 <= count <= MOST_PAIRS:
        raise UserError(f"pairs {count}: must be 1 to {MOST_PAIRS}")
    if not 1 <= steps <= _MOST_STEPS:
        raise UserError(f"steps {steps}: must be 1 to {_MOST_STEPS}")
    check_seed("seed", seed, count)
    prompts: Sequence[str] = [line for line in str(settings.get("prompts") or "").splitlines() if line.strip()]
    if not prompts and settings.get("dataset"):
        prompts = captions(places.existing("data", settings["dataset"]), count, seed)
    if not prompts:
        raise UserError("prompts are missing: write one a line, or choose a dataset with captions")
    if (longest := max(map(len, prompts))) > _LONGEST_PROMPT:
        raise UserError(f"a prompt has {longest:,} characters; the maximum is {_LONGEST_PROMPT:,}")
    texts, seeds = pairs_of(prompts, count, seed)
    sampling = {"steps": steps} | {name: settings[name] for name in ("guidance_scale", "sampler")}
    if sampling["sampler"] == OWN:  # and its own number of steps
        sampling = {"guidance_scale": sampling["guidance_scale"]}
    return Study(first=models[0], second=models[1], prompts=tuple(texts), seeds=tuple(seeds), sampling=sampling)


def _whole(settings: Mapping[str, Any], name: str) -> int:
    try:
        return int(settings[name])
    except (TypeError, ValueError, OverflowError, KeyError):
        raise UserError(f"{name}: must be an integer") from None


def _images(pipe: LatentDiffusionPipeline, study: Study, sampling: Any, progress: _Progress) -> Iterator[Image.Image]:
    """Yield the images of a model in the order of the pairs."""
    pairs = list(zip(study.prompts, study.seeds, strict=True))
    for batch in (pairs[k : k + _BATCH] for k in range(0, len(pairs), _BATCH)):
        yield from pipe(
            [prompt for prompt, _ in batch],
            generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
            callback_on_step_end=progress,
            **sampling,
        ).images
