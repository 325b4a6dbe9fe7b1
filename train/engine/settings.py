"""config.yaml: the settings and inputs of a run, and whether a command may continue it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import yaml

from ldm.errors import UserError
from train.config.load import plain, read_yaml, validate
from train.config.resumable import differences
from train.config.run import RunConfig
from train.data.store.atomic import atomic_file
from train.engine.provenance import commit, versions

Config = TypeVar("Config", bound=RunConfig)


def write_settings(path: Path, config: Config, inputs: Mapping[str, str]) -> Config:
    """Write the settings of a new or continued run. Returns them, with the licence that was stated earlier, if any.

    inputs: fingerprint of each input of the run, by name, e.g. {"data": fingerprint}. Raises UserError if the run was
    made with other inputs, or with other settings than those that may differ.
    """
    settled, out = config, str(path.parent)
    if path.is_file():
        before = read_yaml(path)
        about = before.pop("about", {})
        _refuse_other_inputs(out, about.get("inputs", {}), inputs)
        try:
            was = validate(type(config), before)  # settings that the old file lacks get their defaults
        except UserError as error:
            raise UserError(f"{out!r} holds a run of another stage or version ({error}): take another --out") from None
        settled = replace(config, license=config.license or was.license)
        for name, old, new in differences(was, config):
            raise UserError(
                f"{out!r} was made with --{name.replace('_', '-')} {_shown(old)}, not {_shown(new)}: "
                "give the same to continue it, or another --out"
            )
    about = {"inputs": dict(inputs), "versions": versions(), "commit": commit()}
    text = yaml.safe_dump(plain(settled) | {"about": about}, sort_keys=False, allow_unicode=True)
    with atomic_file(path) as file:
        file.write(text.encode())
    return settled


def _refuse_other_inputs(out: str, before: Mapping[str, str], inputs: Mapping[str, str]) -> None:
    for name, value in inputs.items():
        if (was := before.get(name, "")) != value:
            raise UserError(
                f"--{name.replace('_', '-')} holds something else than what {out!r} was trained on "
                f"({was[:12] or 'nothing'}…, now {value[:12] or 'nothing'}…): use the same, or another --out"
            )


def _shown(value: object) -> str:
    return (" ".join(map(str, value)) if isinstance(value, tuple) else str(value)) or "''"
