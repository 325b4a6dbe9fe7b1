"""config.yaml: the settings and inputs of a run, and whether a command may continue it."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from ldm.errors import UserError
from train.config.load import RESUME_WITH_CHANGES, plain
from train.config.resumable import Difference
from train.config.run import RunConfig
from train.data.store.atomic import recover_all, remove
from train.engine.changes import Change, Saved, write_yaml
from train.engine.checkpoint import Checkpoints
from train.engine.folder import RunFolder
from train.engine.open_data import reading_change
from train.engine.provenance import commit, versions

Config = TypeVar("Config", bound=RunConfig)


def write_settings(
    folder: RunFolder,
    config: Config,
    inputs: Mapping[str, str],
    *,
    with_changes: bool = False,
    print: Callable[[str], object] = print,
) -> Config:
    """Write the settings of a new or continued run. Returns them, with the licence that was stated earlier, if any.

    inputs: fingerprint of each input of the run, by name, e.g. {"data": fingerprint}. with_changes: whether settings
    and inputs may change that don't change freely (`train.config.resumable`). Raises UserError, and writes nothing, if
    they have changed and may not. A run that has saved nothing begins anew with any settings.
    """
    final, changes, earlier = config, [], []
    if folder.settings.is_file():
        recover_all(folder.checkpoints, "step-*")
        step = Checkpoints(folder.checkpoints).newest_step()
        if step or folder.model.is_dir():
            saved = Saved.read(folder.settings)
            changes, earlier = _accepted(saved, step, config, inputs, with_changes), saved.earlier
            final = replace(config, license=config.license or saved.values.get("license", ""))
            for change in changes:
                if change.step == step:
                    print(_announcement(change))
        else:
            _discard_other_run(folder, config, inputs, print)
    about: dict[str, Any] = {"inputs": dict(inputs), "versions": versions(), "commit": commit()}
    about |= {"earlier_data": earlier} if earlier else {}
    about |= {"changes": [asdict(change) for change in changes]} if changes else {}
    write_yaml(folder.settings, plain(final) | {"about": about})
    return final


def _accepted(
    saved: Saved, step: int, config: RunConfig, inputs: Mapping[str, str], with_changes: bool
) -> list[Change]:
    """Return the run's changes, including those requested now. Raises UserError for those that aren't accepted.

    Settings are compared with those of the newest checkpoint. What an earlier command changed since then, without
    reaching another checkpoint, may be given again or be taken back.
    """
    new = {d.name for d in saved.differences(config, inputs)}
    base = saved.before(step)
    found = base.differences(config, inputs)
    for difference in found:
        if difference.why or (difference.name in new and not with_changes):
            raise UserError(_refusal(difference, base, config))
    if found and (not step or step >= config.steps):
        state = f"is finished ({step} steps): give a larger --steps too" if step else "has no checkpoint"
        raise UserError(
            f"{found[0].option}: can't change, because the run in {config.out!r} {state}; or choose another --out"
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    dates = {(c.setting, repr(c.now)): c.date for c in saved.changes if c.step >= step}
    changes = [(d.name, _plain(d.before), _plain(d.now)) for d in found]
    requested = [Change(step, None, dates.get((name, repr(b)), now), name, a, b) for name, a, b in changes]
    return [*base.changes, *requested]


def _refusal(difference: Difference, saved: Saved, config: RunConfig) -> str:
    """Return why a difference is refused, and what to do."""
    name, before, now, why = difference
    out, option = config.out, difference.option
    if name not in {**saved.inputs, "data": ""}:
        verb = "was changed to" if any(change.setting == name for change in saved.changes) else "was started with"
        start = f"{option} {_shown(now)}: the run in {out!r} {verb} {_shown(before)}"
        if why:
            return (
                f"{start}, which can't change in a run ({why}); give that to continue the run, or choose another --out"
            )
        return (
            f"{start}; give that to continue the run as before, add {RESUME_WITH_CHANGES} to continue it with "
            f"{_shown(now)}, or choose another --out"
        )
    reading = saved.values["input"]["reading"]
    other = name == "data" and reading in (1, 2) and reading != config.input.reading
    if other and (change := reading_change(config.data, config.input, reading, before)):
        return (
            f"--data: is read differently than in the run in {out!r} ({change}); to continue the run as before, "
            f"give --input.reading {reading}; or choose another --out, or accept the new reading with "
            f"{RESUME_WITH_CHANGES}"
        )
    start = (
        f"{option}: not the same content as in the run in {out!r} (fingerprint {_short(before)}, now {_short(now)}); "
        "give the same to continue, or choose another --out"
    )
    if why:
        further = f" and --init {out}/model" if config.stage == "ldm" and name != "init" else ""
        return f"{start}{further}: it can't change in a run, because {why}"
    return f"{start}, or train with this one from here on with {RESUME_WITH_CHANGES}"


def _announcement(change: Change) -> str:
    option = f"--{change.setting.replace('_', '-')}"
    if change.setting == "data":
        return (
            f"--data: other images or captions than before (fingerprint {_short(change.now)}, before "
            f"{_short(change.before)})"
        )
    return f"{option} {_shown(change.now)}: changed on request (before: {_shown(change.before)})"


def _discard_other_run(
    folder: RunFolder, config: RunConfig, inputs: Mapping[str, str], print: Callable[[str], object]
) -> None:
    """Remove the logs and sheets of a run that has saved nothing, if its settings were others."""
    with suppress(UserError):  # it may also be another stage's
        saved = Saved.read(folder.settings)
        if not saved.differences(config, inputs):
            return
    print(f"{folder} has no checkpoint yet: the run begins anew, with other settings than before")
    for path in (folder.metrics, folder.damaged, folder.changes, folder.samples, folder.best):
        remove(path)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: object) -> str:
    return (" ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)) or "''"


def _short(fingerprint: str) -> str:
    return fingerprint[:12] or "none"
