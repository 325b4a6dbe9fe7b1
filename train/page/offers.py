"""Choices of the training form from the given folders: datasets, autoencoders, text encoders, configurations."""

from contextlib import suppress
from pathlib import Path

from ldm.errors import UserError
from train.config.load import parse
from train.config.run import RunConfig
from train.config.shipped import shipped
from train.page.datasets import dataset_names
from train.page.forms import STAGES
from train.page.places import Places
from train.page.runs import RunView, find_runs
from train.page.trainings import settings_of

TITLES = {"clip": "0: text encoder", "vae": "1: autoencoder", "ldm": "2: diffusion model", "distill": "3: distillation"}
"""The stages, for readers."""
_CLIP_FIELDS = ("text_encoder", "perceptual.model", "validation_features", "evaluation_features")


def open_run(places: Places, name: object) -> RunView:
    """Return a run by its name in --runs. Raises UserError for another name, and for --runs itself."""
    if (path := places.inside("runs", name)) == places.runs:
        raise UserError(f"{name!r}: is the folder of all runs; choose one in it")
    return RunView(path, places.runs)


def _runs(places: Places) -> list[RunView]:
    """Return all runs, without those that `open_run` refuses."""
    found = []
    for name in find_runs(places.runs):
        with suppress(UserError):
            found.append(open_run(places, name))
    return found


def offers(places: Places, stage: str) -> dict[str, list[str]]:
    """Return the paths that fit a stage's fields, by name of the field."""
    runs = _runs(places)
    of_stage = {s: [str(r.folder.model) for r in runs if r.stage == s and r.folder.model.is_dir()] for s in STAGES}
    pipelines = list(dict.fromkeys(str(places.models / name) for name in places.model_names()))
    encoders = [*of_stage["clip"], *pipelines]
    autoencoders = [*of_stage["vae"], *(str(Path(pipeline, "vae")) for pipeline in pipelines)]
    found = dict.fromkeys(_CLIP_FIELDS[1:], of_stage["clip"]) | {
        "data": [str(places.data / name) for name in dataset_names(places)],
        "vae": autoencoders,
        "text_encoder": encoders,
        "teacher": pipelines,
        "init": pipelines if stage == "ldm" else autoencoders,
        "input.duplicates": sorted(map(str, places.out.glob("datasets/*/duplicates.jsonl"))),
    }
    return {name: list(dict.fromkeys(paths)) for name, paths in found.items()}


def starting_points(places: Places, stage: str) -> list[tuple[str, str]]:
    """Return the configurations that a form can start from, as (title, value): shipped ones, then runs to continue."""
    if stage not in tuple(STAGES):
        raise UserError(f"stage {stage!r:.100}: choose {', '.join(STAGES)}")
    runs = [run.name for run in _runs(places) if run.stage == stage]
    return [
        *((name, f"shipped:{name}") for name in shipped(stage)),
        ("the defaults", "default:"),
        *((f"the run {name}", f"run:{name}") for name in runs),
    ]


def starting_config(places: Places, stage: str, point: str) -> RunConfig:
    """Return the configuration of a starting point. Raises UserError."""
    if stage not in tuple(STAGES) or not isinstance(point, str):
        raise UserError(f"stage {stage!r:.100}, settings {point!r:.100}: choose both from the lists")
    kind, _, name = point.partition(":")
    match kind:
        case "run":
            run = open_run(places, name)
            if run.stage != stage:
                raise UserError(f"{name}: is a run of stage {TITLES[run.stage]}; choose that stage")
            return settings_of(run)
        case "shipped" if name in shipped(stage):
            return parse(STAGES[stage], [name])
        case _:
            return STAGES[stage]()
