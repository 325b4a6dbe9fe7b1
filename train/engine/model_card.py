"""The model card: README.md in model/, with the newest sheet beside it, as hubs and editors show it.

The card states only what was given, counted or measured. Text from users stands in code spans and in Python literals of
one line, where markup, line breaks and rows of dashes have no effect.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from train.config.run import RunConfig
from train.data.batches.images import Inputs
from train.data.store.atomic import atomic_file
from train.engine.provenance import redacted, versions

_LICENCE = "## Licence\n\n"  # the last section


@dataclass(frozen=True, kw_only=True)
class About:
    """A stage's description of its model."""

    name: str
    what: str
    """One sentence that describes the model."""
    library: str
    """Library that can load this format."""
    task: str | None = None
    """The hub's name for the model's task."""
    tags: tuple[str, ...]
    use: str
    """Example code that works in the model's folder."""
    sheet: str
    """Description of the validation sheet."""
    settings: dict[str, str]


def write_card(
    folder: Path,
    about: About,
    config: RunConfig,
    inputs: Inputs,
    *,
    name: str,
    fingerprint: str,
    samples: Path,
    step: int,
    final: bool,
    measured: int,
    figures: dict[str, float],
) -> None:
    """Write README.md into a model's folder, and the run's newest sheet as sample.png.

    name: the run's. fingerprint: the data's. samples: the folder of sheets. figures: metrics of the last validation, at
    step `measured`.
    """
    progress = "the run is finished." if final else "the run is **not finished**, and this not its result yet."
    blocks = [
        f"# {code_span(name or 'model')}: {about.name}",
        f"{about.what} Step {step:,} of {config.steps:,}: {progress}",
    ]
    sheets = [path for path in samples.glob("step-*.png") if path.stem <= f"step-{step:08d}"]
    if sheets:
        newest = max(sheets)
        shutil.copyfile(newest, folder / "sample.png")
        blocks += ["![Samples](sample.png)", f"*{about.sheet} At step {int(newest.stem[5:]):,}.*"]
    many = "" if inputs.stream is not None else f"{len(inputs.source):,} images to train on, "
    rows = [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in figures.items()]
    blocks += [
        "## Use",
        "In this folder, or with its path in place of `.`:",
        about.use,
        "## Data",
        f"{source_span(config.data)}: {many}{len(inputs.held_out):,} held out; fingerprint `{fingerprint}`.",
        "## Training",
        "\n".join(f"- {name}: {value}" for name, value in (about.settings | _settings(config)).items()),
        "All settings are in `training.json`.",
        "## Measured",
        f"On held-out images, with the averaged weights, at step {measured:,}:" if rows else "Nothing yet.",
        "\n".join(["| figure | value |", "|---|---|", *rows]) if rows else "",
        _LICENCE.strip(),
        f"`{config.license}`"
        if config.license
        else "Its maker hasn't stated a licence, so nobody may assume any: ask before you use or share this model.",
    ]
    page = "\n\n".join(filter(None, blocks))
    hub = ModelCardData(
        license=config.license.lower() or None, library_name=about.library, pipeline_tag=about.task, tags=[*about.tags]
    )
    ModelCard(f"---\n{hub}\n---\n\n{page}\n").save(folder / "README.md")


def state_license(folder: Path, license: str) -> None:
    """Write a licence into the card and the training.json of a finished model, and change nothing else."""
    page, about = folder / "README.md", folder / "training.json"
    if not page.is_file():
        return
    card = ModelCard.load(page)
    card.data.license = license.lower()
    card.text = card.text[: card.text.rindex(_LICENCE)] + f"{_LICENCE}`{license}`\n"
    stated = json.loads(about.read_text(encoding="utf-8"))
    stated["config"]["license"] = license
    for path, text in ((page, str(card)), (about, json.dumps(stated, indent=2) + "\n")):
        with atomic_file(path) as file:
            file.write(text.encode())


def _settings(config: RunConfig) -> dict[str, str]:
    """Return the settings that every stage has."""
    optimizer, side = config.optimizer, config.input.resolution
    return {
        "images": f"{'about ' * bool(config.input.buckets)}{side} × {side} pixels, {config.batch_size} a step",
        "optimizer": f"{optimizer.kind}, learning rate {optimizer.lr:g} ({optimizer.schedule}), {config.precision}",
        "average of the weights": f"decay {config.ema_decay:g}",
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }


def source_span(given: str) -> str:
    """Return a path or address as a code span, without private parts (see `redacted`)."""
    return "the output of a command" if given.startswith("pipe:") else code_span(redacted(given))


def code_span(text: str) -> str:
    """Return text as a code span of one line."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " * (len(fence) > 1)  # separates the line's own backticks from the fence
    return f"{fence}{pad}{line}{pad}{fence}"
