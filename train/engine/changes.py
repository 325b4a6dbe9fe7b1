"""The content of config.yaml, and the changes that were requested when a run was continued."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ldm.errors import UserError
from train.config.load import read_yaml, validate
from train.config.resumable import Difference, differences
from train.config.run import RunConfig
from train.data.store.atomic import atomic_file
from train.engine.folder import RunFolder
from train.engine.provenance import redacted

_NEVER = {  # inputs whose content can't change within a run, with the reason; that of others can on request
    "init": "the run's weights come from it",
    "teacher": "the student learns its predictions",
    "vae": "the network was trained on its latents",
    "text_encoder": "the network was trained with its features",
}


@dataclass(frozen=True)
class Change:
    """Change of a setting, or of an input's content, that was requested when the run was continued."""

    step: int
    """Number of steps that were done before the change."""
    position: int | None
    """Position of the next example; None until training goes on."""
    date: str
    setting: str
    """Dotted name of the setting, or name of the input."""
    before: Any
    """Value before the change; of an input, its fingerprint."""
    now: Any


class About(TypedDict, total=False):
    """Part of config.yaml that isn't settings."""

    inputs: dict[str, str]
    changes: list[Change]
    earlier_data: list[str]


_ABOUT = TypeAdapter(About)


@dataclass(frozen=True)
class Saved:
    """Content of a config.yaml."""

    values: dict[str, Any]
    """Settings."""
    inputs: dict[str, str]
    """Fingerprint of each input, by name."""
    changes: list[Change]
    """Changes in the order of their steps. They are applied in `values` and `inputs`."""
    earlier: list[str]
    """Fingerprints of earlier datasets, of runs whose data changed before changes were recorded."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the content. Raises UserError if a run can't have written it."""
        values = read_yaml(path)
        values.pop("accept_changed_data", None)  # a former setting
        try:
            if values.get("optimizer", {}).get("matrix_lr") == 0:  # another; with a value, the run can't be continued
                del values["optimizer"]["matrix_lr"]
            about = _ABOUT.validate_python(values.pop("about", {}))
            values.setdefault("input", {}).setdefault("reading", 1)  # the rules before there was a choice
        except (ValidationError, AttributeError):
            raise UserError(
                f"{path}: was edited or damaged, so the run can't be continued; restore it, or choose another --out"
            ) from None
        return cls(values, about.get("inputs", {}), about.get("changes", []), about.get("earlier_data", []))

    @property
    def earlier_data(self) -> list[str]:
        """Fingerprints of the datasets that the run was trained on before its present one."""
        return [*self.earlier, *(change.before for change in self.changes if change.setting == "data")]

    def published(self) -> list[dict[str, Any]]:
        """Return the changes without private parts of paths."""
        return [
            asdict(change) | {name: _redacted(getattr(change, name)) for name in ("before", "now")}
            for change in self.changes
        ]

    def before(self, step: int) -> Self:
        """Return the content without the changes at this step or later, for its checkpoint was made before them."""
        values, inputs = copy.deepcopy(self.values), dict(self.inputs)
        for change in reversed([c for c in self.changes if c.step >= step]):
            if change.setting in inputs:
                inputs[change.setting] = change.before
            else:
                *records, last = change.setting.split(".")
                record = reduce(lambda tree, name: tree.get(name) or {}, records, values)
                record[last] = change.before
        return replace(self, values=values, inputs=inputs, changes=[c for c in self.changes if c.step < step])

    def differences(self, config: RunConfig, inputs: Mapping[str, str]) -> list[Difference]:
        """Return the settings and inputs that aren't those of the saved run, without those that change freely.

        Raises UserError if the settings are those of another stage.
        """
        try:
            saved = validate(type(config), self.values)  # settings that the file doesn't have get their defaults
        except UserError as error:
            raise UserError(
                f"--out {config.out!r}: contains a run of another stage or version ({error}); choose another folder"
            ) from None
        pairs = ((name, self.inputs.get(name, ""), value) for name, value in inputs.items())
        contents = [Difference(name, old, new, _NEVER.get(name, "")) for name, old, new in pairs if old != new]
        return [*differences(saved, config), *contents]


def record_changes(folder: RunFolder, step: int, position: int, print: Callable[[str], object] = print) -> None:
    """Write changes.jsonl when a run continues from the checkpoint of a step, and print that step.

    Changes that were requested since then get this step and the position of its next example. config.yaml is written
    first: it has the changes too, so that neither file can miss one or have it twice, whenever the process ends.
    """
    before, content = Saved.read(folder.settings).changes, read_yaml(folder.settings)
    changes = _merged([replace(c, step=step, position=position) if c.step >= step else c for c in before])
    if changes != before:
        content["about"]["changes"] = [asdict(change) for change in changes]
        write_yaml(folder.settings, content)
    text = "".join(json.dumps(asdict(change)) + "\n" for change in changes)
    if not text:
        folder.changes.unlink(missing_ok=True)
    elif not folder.changes.is_file() or folder.changes.read_text(encoding="utf-8") != text:
        with atomic_file(folder.changes) as file:
            file.write(text.encode())
    if any(change.step == step for change in changes):
        print(
            f"the changes apply from step {step} on, after {position:,} examples; they are recorded in {folder.changes}"
        )


def examples_of_earlier_code(path: Path, step: int, config: RunConfig) -> dict[str, Any]:
    """Return the state of the feed (`Feed.state`) at a checkpoint that was made before checkpoints contained it."""
    later = {change.setting: change for change in reversed(Saved.read(path).changes) if change.step >= step}
    size = later["batch_size"].before if "batch_size" in later else config.batch_size
    other = any(name in ("data", "seed") or name.startswith("input.") for name in later)
    other |= "batch_size" in later and config.input.buckets > 0
    return {"position": step * size, "order": "other" if other else "", "shift": 0, "epochs": None}


def _merged(changes: list[Change]) -> list[Change]:
    """Return the changes with one for each setting and step, and without those that change nothing."""
    merged: dict[tuple[int, str], Change] = {}
    for change in changes:
        key = (change.step, change.setting)
        merged[key] = replace(change, before=merged[key].before) if key in merged else change
    return [change for change in merged.values() if change.before != change.now]


def _redacted(value: Any) -> Any:
    return redacted(value) if isinstance(value, str) else value


def write_yaml(path: Path, content: dict[str, Any]) -> None:
    """Write a YAML file, which replaces an earlier one only when it is complete."""
    with atomic_file(path) as file:
        file.write(yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())
