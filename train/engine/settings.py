"""config.yaml: the settings and inputs of a run, and whether a command may continue it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ldm.errors import UserError
from train.config.load import plain, read_yaml, validate
from train.config.resumable import differences
from train.config.run import RunConfig
from train.data.store.atomic import atomic_file
from train.engine.open_data import reading_change
from train.engine.provenance import commit, versions

Config = TypeVar("Config", bound=RunConfig)
_EARLIER = "earlier_data"


def write_settings(path: Path, config: Config, inputs: Mapping[str, str]) -> Config:
    """Write the settings of a new or continued run. Returns them, with the licence that was stated earlier, if any.

    inputs: fingerprint of each input of the run, by name, e.g. {"data": fingerprint}. Raises UserError if the inputs of
    the existing run were different (data: unless this is accepted), or if a setting differs that must not change
    (`train.config.resumable`).
    """
    final, out = config, str(path.parent)
    earlier: list[str] = []
    if path.is_file():
        saved = read_yaml(path)
        about = saved.pop("about", {})
        saved.setdefault("input", {}).setdefault("reading", 1)  # the rules before there was a choice
        before, earlier = about.get("inputs", {}), about.get(_EARLIER, [])
        if config.accept_changed_data and before.get("data", "") != inputs["data"]:
            earlier, before = [*earlier, before.get("data", "")], {**before, "data": inputs["data"]}
        _require_same_inputs(config, saved["input"]["reading"], before, inputs)
        try:
            old_config = validate(type(config), saved)  # settings that the old file doesn't have get their defaults
        except UserError as error:
            raise UserError(
                f"--out {out!r}: contains a run of another stage or version ({error}); choose another folder"
            ) from None
        final = replace(config, license=config.license or old_config.license)
        for name, old, new in differences(old_config, config):
            raise UserError(
                f"--{name.replace('_', '-')} {_shown(new)}: the run in {out!r} was started with {_shown(old)}; give "
                "that to continue the run, or choose another --out"
            )
    about = {"inputs": dict(inputs), "versions": versions(), "commit": commit()}
    about |= {_EARLIER: earlier} if earlier else {}
    text = yaml.safe_dump(plain(final) | {"about": about}, sort_keys=False, allow_unicode=True)
    with atomic_file(path) as file:
        file.write(text.encode())
    return final


def earlier_data(path: Path) -> list[str]:
    """Return the fingerprints of the datasets that a run was trained on before its dataset changed."""
    return list(read_yaml(path).get("about", {}).get(_EARLIER, []))


def _require_same_inputs(config: RunConfig, reading: Any, saved: Mapping[str, str], inputs: Mapping[str, str]) -> None:
    out = config.out
    for name, value in inputs.items():
        if (old := saved.get(name, "")) != value:
            other = name == "data" and reading in (1, 2) and reading != config.input.reading
            if other and (change := reading_change(config.data, config.input, reading, old)):
                raise UserError(
                    f"--data: is read differently than in the run in {out!r} ({change}); to continue the run as "
                    f"before, give --input.reading {reading}; or choose another --out, or accept the new reading with "
                    "--accept-changed-data True"
                )
            raise UserError(
                f"--{name.replace('_', '-')}: not the same content as in the run in {out!r} (fingerprint "
                f"{old[:12] or 'none'}, now {value[:12] or 'none'}); give the same to continue, or choose another --out"
                + (", or train on the changed dataset from here with --accept-changed-data True" * (name == "data"))
            )


def _shown(value: object) -> str:
    return (" ".join(map(str, value)) if isinstance(value, tuple) else str(value)) or "''"
