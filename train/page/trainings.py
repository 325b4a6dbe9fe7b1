"""Start, stop and continue runs as processes of their own, which go on when the page or its server is closed.

Beside the folder of a run NAME that the page starts are .NAME.page.yaml, the configuration that the command is given,
.NAME.page.log, its output, and .NAME.page.json, its process. The command is the one that a user would type.
"""

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

from ldm.errors import UserError, one_line
from train.config.load import RESUME_WITH_CHANGES, dump, validate
from train.config.run import RunConfig
from train.config.vae import VaeConfig
from train.data.store.atomic import write_text
from train.engine.changes import Saved
from train.engine.owner import Owner
from train.page.forms import STAGES, TRACKERS, locations
from train.page.places import Place, Places, is_name
from train.page.runs import RunView

_LONGEST_PATH = 4000  # characters
_LOG_END = 2**16  # bytes of a log that are read
_MOVES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # of progress bars in a terminal
_SCHEME = re.compile(r"[a-z0-9+.-]+:", re.IGNORECASE)  # pipe:, openclip:, inception:, https: and the like
_NETWORKS = ("inception", "dinov2", "clip", "-")  # not paths, also where a folder has this name
_REPORTS: dict[str, tuple[Place, ...]] = {"input.duplicates": ("out",)}  # what inspections write
_START = threading.Lock()


def started_by_page(run: Path) -> Owner | None:
    """Return the process that the page has started for a run, if it still runs."""
    owner = Owner.read(_beside(run, "json"))
    return owner if owner and owner.runs and owner.has_open(_beside(run, "log")) is not False else None


def require_inside(config: RunConfig, places: Places) -> None:
    """Raise UserError if a configuration needs something that isn't in the given folders, or another machine."""
    for name, value in locations(config):
        if name == "cache" and value == "off":
            continue
        if not is_name(value) or len(value) > _LONGEST_PATH or _SCHEME.match(value) or value in _NETWORKS:
            raise UserError(f"{name} {value!r:.200}: isn't a plain path; the page accepts no other")
        if name in ("out", "cache"):
            _require_own_folder(name, value, places)
            continue
        among: list[Place] = ["data", "runs", "models", *_REPORTS.get(name, ())]
        if not (path := Path(value)).exists() or all(places.name(place, path) is None for place in among):
            raise UserError(f"{name} {value!r:.200}: isn't in --{', --'.join(among)}; the page accepts no other path")
        if name != "data" and path.is_dir():  # links in datasets aren't followed
            places.require_own_files(path, among, f"{name} {value!r:.200}")
    if others := [name for name in config.trackers if name not in TRACKERS]:
        raise UserError(f"trackers {' '.join(others)}: sends data to other machines; the page accepts tensorboard")
    if config.input.follow_links:
        raise UserError("input.follow_links True: the page reads only files in the given folders; set it to False")
    if isinstance(config, VaeConfig) and config.perceptual.kind.startswith("lpips") and not config.perceptual.model:
        raise UserError(
            f"perceptual.kind {config.perceptual.kind} needs perceptual.model: the page downloads nothing, so give a "
            "file of torchvision's weights"
        )


def _require_own_folder(name: str, value: str, places: Places) -> None:
    """Raise UserError unless a folder is in --runs, and in no run or model, whose files a training might replace."""
    path = Path(value)
    up = max((k + 1 for k, part in enumerate(path.parts) if part == ".."), default=0)
    exists = Path(*path.parts[:up]).is_dir()  # else what is before a .. would be created too
    if not exists or places.name("runs", path) in (None, "."):
        raise UserError(f"{name} {value!r:.200}: must be a folder in --runs, {str(places.runs)!r}")
    root = places.runs.resolve()
    folders = [folder for folder in (path.resolve(), *path.resolve().parents) if folder.is_relative_to(root)][:-1]
    for folder in folders[1:] if name == "out" else folders:
        if (folder / "config.yaml").exists() or (folder / "model_index.json").exists():
            raise UserError(f"{name} {value!r:.200}: {folder.name!r} is a run or a model; choose a folder outside it")


def start(config: RunConfig, places: Places, *, with_changes: bool = False) -> Path:
    """Start or continue the run in `config.out`. Returns its folder. Raises UserError for what the page doesn't do.

    The command checks the data, the models and the changes itself; `problem` returns what it finds.
    """
    for name in ("data", "out"):
        if not getattr(config, name):
            raise UserError(f"{name} is missing: choose one")
    require_inside(config, places)
    run = Path(config.out)
    with _START:
        if RunView(run, places.runs).owner:
            raise UserError(f"{run.name}: is training already; stop it first")
        if started_by_page(run):
            raise UserError(f"{run.name}: is starting already")
        run.parent.mkdir(parents=True, exist_ok=True)
        for kind in ("yaml", "log", "json"):
            _require_file(_beside(run, kind))
        write_text(_beside(run, "yaml"), dump(config))
        words = [str(_beside(run, "yaml")), *[RESUME_WITH_CHANGES] * with_changes]
        process = _launch(config.stage, words, _beside(run, "log"))
        write_text(_beside(run, "json"), Owner.of(process.pid).text())
    threading.Thread(target=process.wait, daemon=True).start()  # else it would remain as a zombie
    return run


def stop(run: RunView) -> None:
    """Ask a run to save a checkpoint after this step and to end. Raises UserError if it doesn't train.

    Only a process that has the run's files open gets the signal, because anybody may have written its number.
    """
    owner = run.owner or started_by_page(run.path)
    if owner is None:
        raise UserError(f"{run.name}: isn't training")
    if not (owner.has_open(run.folder.lock) or owner.has_open(_beside(run.path, "log"))):
        raise UserError(f"{run.name}: process {owner.pid} isn't known to train it; stop it yourself")
    with suppress(ProcessLookupError):
        os.kill(owner.pid, signal.SIGTERM)


def problem(run: Path) -> str:
    """Return the line with which a run that the page started has failed; "" if it runs, ended well or went on."""
    log, metrics = _beside(run, "log"), run / "metrics.jsonl"
    later = log.exists() and metrics.exists() and metrics.stat().st_mtime > log.stat().st_mtime
    if later or started_by_page(run):
        return ""
    lines = log_lines(run)
    return next((line for line in reversed(lines[-5:]) if line.startswith("error: ")), "").removeprefix("error: ")


def log_lines(run: Path, most: int = 100) -> list[str]:
    """Return the last lines of output of a run that the page started, as a terminal shows them."""
    path = _beside(run, "log")
    if path.is_symlink() or not path.is_file():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_END))
        text = _MOVES.sub("", file.read(_LOG_END).decode(errors="replace"))
    lines = (re.split(r"\r(?!\n)", line.rstrip("\r"))[-1] for line in text.split("\n"))
    return [one_line(line, 500) for line in lines if line.strip()][-most:]


def settings_of(run: RunView) -> RunConfig:
    """Return the configuration of a run, to continue it. Raises UserError if its config.yaml can't be read."""
    if not run.folder.settings.is_file():  # reading a pipe would wait
        raise UserError(f"{run.name}: has no config.yaml")
    return validate(STAGES[run.stage], Saved.read(run.folder.settings).values)


def _launch(stage: str, words: list[str], log: Path) -> "subprocess.Popen[bytes]":
    """Start the training command of a stage in a session of its own."""
    command = "distill" if stage == "distill" else f"train_{stage}"
    program = (
        f"import sys; sys.argv[0] = {f'scripts/{command}.py'!r}; from train.commands.cli import {command}; {command}()"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    with open(log, "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", program, *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )


def _require_file(path: Path) -> None:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path.name}: is not a regular file; move it away")


def _beside(run: Path, kind: str) -> Path:
    return run.with_name(f".{run.name}.page.{kind}")
