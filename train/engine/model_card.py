"""The model card: README.md in model/, as hubs and editors show it, and the newest sample sheet.

The card contains only settings, counts and measurements. Text from users appears only in code spans and in one-line
Python literals, where markup, line breaks and rows of dashes have no effect.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from ldm.errors import UserError, one_line
from ldm.files import read_json, read_regular
from train.config.run import RunConfig
from train.data.batches.images import Inputs
from train.data.store.atomic import atomic_file
from train.engine.provenance import redacted, versions

_LICENCE = "## Licence\n\n"  # the last section


@dataclass(frozen=True, kw_only=True)
class About:
    """A stage's description of its model."""

    name: str
    summary: str
    """One sentence that describes the model."""
    library: str
    """Library that can load the model, by the hub's name for it."""
    task: str | None = None
    """Task of the model, by the hub's name for it."""
    tags: tuple[str, ...]
    use: str
    """Example code in Markdown that works in the model's folder."""
    sheet: str
    """Description of the sample sheet."""
    settings: dict[str, str]


def write_card(
    folder: Path,
    about: About,
    config: RunConfig,
    inputs: Inputs,
    *,
    name: str,
    fingerprint: str,
    earlier: Sequence[str],
    changes: Sequence[Mapping[str, Any]],
    samples: Path,
    step: int,
    final: bool,
    best: bool = False,
    measured_at: int,
    metrics: dict[str, float],
) -> None:
    """Write README.md into a model's folder, and the run's newest sample sheet as sample.png.

    name: name of the run. fingerprint: fingerprint of the data. earlier: those of datasets before it. changes: settings
    that were changed during the run. samples: folder of the sample sheets. best: whether the weights are those with
    the smallest held-out loss so far. metrics: metrics of the last validation, which was at step `measured_at`.
    """
    progress = "the run is finished." if final else "the run is **not finished**, so these are not its final weights."
    if best:
        progress = "the weights with the smallest held-out loss of the run up to then."
    blocks = [
        f"# {code_span(name or 'model')}: {about.name}",
        f"{about.summary} Step {step:,} of {config.steps:,}: {progress}",
    ]
    sheets = [path for path in samples.glob("step-*.png") if path.stem <= f"step-{step:08d}"]
    sheets = [path for path in sheets if re.fullmatch(r"step-[0-9]{8,18}", path.stem) and path.is_file()]
    if sheets:
        newest = max(sheets)
        shutil.copyfile(newest, folder / "sample.png")
        blocks += ["![Samples](sample.png)", f"*{about.sheet} At step {int(newest.stem[5:]):,}.*"]
    training = "" if inputs.stream is not None else f"{len(inputs.source):,} training images, "
    rows = [f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in metrics.items()]
    blocks += [
        "## Use",
        "Run this in the model's folder, or replace `.` by the path of the folder:",
        about.use,
        "## Data",
        f"{source_span(config.data)}: {training}{len(inputs.held_out):,} held-out images; fingerprint `{fingerprint}`."
        + (f" It was trained on other data before: {', '.join(f'`{value}`' for value in earlier)}." if earlier else ""),
        "## Training",
        "\n".join(f"- {name}: {value}" for name, value in (about.settings | _settings(config)).items()),
        "All settings are in `training.json`.",
        _changes(changes),
        "## Metrics",
        f"Measured on held-out images, with the averaged weights, at step {measured_at:,}:"
        if rows
        else f"Not measured yet: the first validation is at step {min(config.validate_every, config.steps):,}.",
        "\n".join(["| metric | value |", "|---|---|", *rows]) if rows else "",
        _LICENCE.strip(),
        f"`{config.license}`"
        if config.license
        else "No licence is stated, so do not assume one: ask the author before you use or share this model.",
    ]
    page = "\n\n".join(filter(None, blocks))
    hub = ModelCardData(
        license=config.license.lower() or None, library_name=about.library, pipeline_tag=about.task, tags=[*about.tags]
    )
    ModelCard(f"---\n{hub}\n---\n\n{page}\n").save(folder / "README.md")


def state_license(folder: Path, license: str) -> None:
    """Write a licence into the card and the training.json of a finished model, and change nothing else."""
    page, provenance = folder / "README.md", folder / "training.json"
    if not page.is_file():
        return
    try:
        card = ModelCard(read_regular(page).decode())
        content = read_json(provenance)
        card.data.license = license.lower()  # type: ignore[attr-defined]
        card.text = card.text[: card.text.rindex(_LICENCE)] + f"{_LICENCE}`{license}`\n"
        content["config"]["license"] = license
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, YAMLError) as error:
        raise UserError(
            f"--license {license}: can't be added, because {page.name} or {provenance.name} in {folder} was changed by "
            f"hand or is damaged ({one_line(error, 200)}); write the licence into both files yourself"
        ) from None
    for path, text in ((page, str(card)), (provenance, json.dumps(content, indent=2) + "\n")):
        with atomic_file(path) as file:
            file.write(text.encode())


def _changes(changes: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the settings that were changed during the run; "" if there are none."""
    if not changes:
        return ""
    rows = [
        f"| {c['step']:,} | {c['setting']} | {_cell(c['before'])} | {_cell(c['now'])} | {c['date'][:10]} |"
        for c in changes
    ]
    head = ["| after step | setting | before | now | date |", "|---|---|---|---|---|"]
    return "\n\n".join(["Settings were changed during the training:", "\n".join([*head, *rows])])


def _cell(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return code_span(text.replace("|", "¦")) if text else "(empty)"


def _settings(config: RunConfig) -> dict[str, str]:
    """Return the card's rows for the settings that every stage has, by name."""
    optimizer, side = config.optimizer, config.input.resolution
    return {
        "images": f"{'about ' * bool(config.input.buckets)}{side} × {side} pixels, {config.batch_size} per step",
        "optimizer": f"{optimizer.kind}, learning rate {optimizer.lr:g} ({optimizer.schedule}), {config.precision}",
        "weight averaging": f"decay {config.ema_decay:g}",
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }


def source_span(source: str) -> str:
    """Return a path or address as a code span, without private parts (see `redacted`)."""
    return "the output of a command" if source.startswith("pipe:") else code_span(redacted(source))


def code_span(text: str) -> str:
    """Return text as a code span of one line."""
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " * (len(fence) > 1)  # separates backticks of the text from the fence
    return f"{fence}{pad}{line}{pad}{fence}"
