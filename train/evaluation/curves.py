"""The curves of training runs, from their metrics.jsonl, as plots of a report."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from train.data.store.lines import read_lines
from train.evaluation.results import Plot, Series

_BAND = re.compile(r"val_error_noise_\d{1,3}-\d{1,3}", re.ASCII)
_MOST_BANDS = 20
_POINTS = 200  # most points of a line; neighbours are averaged


def training_plots(model: str) -> list[Plot]:
    """Return the curves of the run that wrote a model, and of the runs of its autoencoder and text encoder.

    A model that isn't in a run's folder has no curves. The other runs are found by the paths in config.yaml.
    """
    run = Path(model).resolve().parent
    plots = _stage(run, "ldm", "Stage 2, diffusion model")
    settings = _settings(run)
    for key, stage, title in (("vae", "vae", "Stage 1, autoencoder"), ("text_encoder", "clip", "Stage 0, CLIP")):
        if isinstance(folder := settings.get(key), str) and folder:
            plots += _stage(Path(folder).resolve().parent, stage, title)
    return plots


def run_plots(metrics: Sequence[Mapping[str, float]], stage: str) -> list[Plot]:
    """Return all the curves of one run from its lines of metrics: losses, measures of held-out images, and its speed.

    Plots of the same name belong together, also if the runs are of different stages.
    """
    plots = _stage_plots(metrics, stage, "")
    for name, title, label, key in (
        ("lr", "learning rate", "learning rate", "lr"),
        ("speed", "speed", "images per second", "images_per_second"),
        ("skipped", "skipped steps", "steps, since the start", "skipped"),
    ):
        if line := _line(metrics, key, "this run"):
            plots.append(_plot(name, title, label, [line]))
    return [replace(plot, title=plot.title[:1].upper() + plot.title[1:]) for plot in plots]


def _settings(run: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _stage(run: Path, stage: str, title: str) -> list[Plot]:
    if not (run / "config.yaml").is_file():
        return []
    return _stage_plots(list(read_metrics(run / "metrics.jsonl")), stage, f"{title}: ")


def _stage_plots(lines: Sequence[Mapping[str, float]], stage: str, title: str) -> list[Plot]:
    """Return the plots of the losses and of the stage's measures. title: start of their titles."""
    loss = [s for s in (_line(lines, "loss", "training"), _line(lines, "val_loss", "held-out images")) if s]
    others = {
        "ldm": ("Held-out error by noise level", "error", _bands(lines)),
        "vae": ("PSNR of held-out images", "dB", [_line(lines, "val_psnr", "held-out images")]),
        "clip": (
            "Retrieval accuracy on held-out images",
            "share correct",
            [_line(lines, f"val_{n}", n[:-2].replace("_", " ")) for n in ("image_to_text@1", "text_to_image@1")],
        ),
    }
    name, label, further = others.get(stage, others["ldm"])
    plots = [_plot(f"{stage}_loss", f"{title}loss", "loss", loss, log=True)] if loss else []
    shown = [series for series in further if series and len(series.x) > 1]
    return plots + ([_plot(f"{stage}_held_out", f"{title}{name}", label, shown)] if shown else [])


def _bands(lines: Sequence[Mapping[str, float]]) -> list[Series | None]:
    names = sorted({name for line in lines for name in line if _BAND.fullmatch(name)})[:_MOST_BANDS]
    names.sort(key=lambda name: int(name.rpartition("_")[2].partition("-")[0]))
    return [_line(lines, name, f"timesteps {name.rpartition('_')[2].replace('-', '–')} %") for name in names]


def _plot(name: str, title: str, label: str, series: Sequence[Series], *, log: bool = False) -> Plot:
    log = log and all(y is not None and y > 0 for line in series for y in line.y)
    return Plot(name=name, title=title, x="step", y=label, series=series, log_y=log)


def _line(lines: Sequence[Mapping[str, float]], name: str, label: str) -> Series | None:
    """Return a metric over the steps; None if it wasn't logged."""
    points = [(line["step"], line[name]) for line in lines if name in line]
    size = -(-len(points) // _POINTS) or 1
    groups = [points[k : k + size] for k in range(0, len(points), size)]
    means = [[sum(column) / len(group) for column in zip(*group, strict=True)] for group in groups]
    label += f" (means of {size} values)" * (size > 1)
    return Series(name=label, x=[x for x, _ in means], y=[y for _, y in means]) if points else None


def read_metrics(path: Path) -> Iterator[dict[str, float]]:
    """Yield the lines of a metrics.jsonl; others are ignored."""
    return parse_metrics(read_lines(path))


def parse_metrics(lines: Iterable[bytes]) -> Iterator[dict[str, float]]:
    """Yield the metrics in lines of JSON; other lines are ignored."""
    for line in lines:
        try:
            logged = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(logged, dict) and all(isinstance(v, int | float) for v in logged.values()) and "step" in logged:
            yield logged
