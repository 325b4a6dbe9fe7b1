"""The report of one or several models as one HTML file, without network or scripts, made from their report.json.

report.html is the template. Everything that is shown is escaped, so markup in a caption is text.
"""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ldm.errors import UserError, one_line
from ldm.files import read_regular
from train.data.store.atomic import write_text
from train.evaluation.plots import merged, svg
from train.evaluation.results import Measure, Part, Table
from train.evaluation.sheets import save_sheet

_SAMPLES = 32  # generated images that are shown
_SMALL = 128  # images of at most this side are shown without loss, with visible pixels
_LARGEST = 384  # side to which larger images are reduced
_WEBP = 88  # quality of images that aren't small
_MOST_PIXELS = 2**26  # of an image in a report
_NOTES = {"lower": "lower", "higher": "higher", "baseline": "near the real images"}


class Model(NamedTuple):
    """An evaluated model: its name for readers, its report.json, and the folder of the files that this names."""

    name: str
    report: Mapping[str, Any]
    folder: Path

    def parts(self, kind: str) -> list[Mapping[str, Any]]:
        """Return a list of the report: measures, sheets, plots, tables or samples."""
        return self.report.get(kind) or []


def read_model(folder: str | Path, name: str = "") -> Model:
    """Read the report.json in a folder. Raises UserError if there is none, or if it isn't a report."""
    path = Path(folder) / "report.json"
    try:
        report = json.loads(read_regular(path))
        if not isinstance(report, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{path} can't be read ({reason}): give a folder that evaluate.py wrote") from None
    return Model(name or str(folder), report, Path(folder))


def write_report(models: Sequence[Model], path: Path, title: str = "", *, most: int = _SAMPLES) -> None:
    """Write the report. most: largest number of generated images of each model. Raises UserError for other content."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    names = [model.name for model in models]
    try:
        measures = list(_measures(models))
        page = environment.get_template("report.html").render(
            title=title or (f"Evaluation of {names[0]}" if len(names) == 1 else f"Evaluation of {len(names)} models"),
            about=_about(models),
            names=names,
            measures=measures,
            baselines=any(row["baseline"] for row in measures),
            methods=list(_methods(models)),
            tables=list(_tables(models)),
            samples=list(_samples(models, most)),
            plots=list(_plots(models)),
            sheets=list(_sheets(models)),
            settings=list(_settings(models)),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        folders = ", ".join(str(model.folder / "report.json") for model in models)
        raise UserError(f"{folders}: can't be shown ({type(error).__name__}: {one_line(error)}); evaluate again") from (
            error
        )
    write_text(path, page)


def _about(models: Sequence[Model]) -> str:
    texts = [str(model.report.get("task") or "") for model in models]
    data = {str(s["data"]) for model in models if "data" in (s := model.report.get("settings") or {})}
    texts += [f"Data: {', '.join(sorted(data))}."] if data else []
    return " ".join(dict.fromkeys(filter(None, texts))) or "Measured by ldm."


def save_samples(folder: Path, images: Sequence[np.ndarray], captions: Sequence[str]) -> list[dict[str, str]]:
    """Write images (h, w, 3) uint8 into a report's folder. Returns the list `samples` of report.json."""
    (folder / "report_images").mkdir(exist_ok=True)
    files = [f"report_images/{k:03d}.png" for k in range(len(images))]
    for file, image in zip(files, images, strict=True):
        save_sheet(Image.fromarray(image), folder / file)
    return [{"file": file, "caption": caption} for file, caption in zip(files, captions, strict=True)]


def standard_parts(report: Mapping[str, Any], images: int) -> list[Part]:
    """Return what report.json has in `vae` (of so many images), `latents` and `alignment` as parts of a report."""
    vae, latents = report["vae"], report["latents"]
    parts: list[Part] = [
        Measure(
            name="psnr",
            title="Autoencoder: PSNR (dB)",
            value=vae["psnr"],
            better="higher",
            reference=images,
            note="Peak signal-to-noise ratio of reconstructed held-out images.",
        ),
        Measure(
            name="ssim",
            title="Autoencoder: SSIM",
            value=vae["ssim"],
            better="higher",
            reference=images,
            note="Structural similarity of reconstructed held-out images.",
        ),
        Measure(
            name="bits_per_dimension",
            title="Likelihood of latents (bits per dimension)",
            value=latents["bits_per_dimension"],
            error=latents["standard_error"],
            note="Variational bound on the negative log likelihood of held-out latents, given their captions.",
        ),
    ]
    if alignment := report.get("alignment"):
        kinds = {"seen": "pairs seen in training", "unseen": "with a pair that never occurred"}
        columns = list(alignment["seen"])
        parts.append(
            Table(
                name="alignment",
                title="Share of images that follow their prompt",
                columns=["prompts", *columns],
                rows=[[title, *(alignment[kind][name] for name in columns)] for kind, title in kinds.items()],
                note=f"A checker without learned parts reads {alignment['prompts']} images of each kind of prompt.",
            )
        )
    return parts


# -- numbers ------------------------------------------------------------------------------------------------------


def _rows(models: Sequence[Model]) -> list[tuple[Mapping[str, Any], list[Mapping[str, Any] | None]]]:
    """Return each measure, as the first model with it describes it, and the measures of all models."""
    keys: dict[tuple[str, str], Mapping[str, Any]] = {}
    for model in models:
        for measure in model.parts("measures"):
            keys.setdefault((measure["name"], measure.get("features") or ""), measure)
    of_models = [{(m["name"], m.get("features") or ""): m for m in model.parts("measures")} for model in models]
    groups = list(dict.fromkeys(features for _, features in keys))
    ordered = sorted(keys.items(), key=lambda entry: groups.index(entry[0][1]))
    return [(first, [found.get(key) for found in of_models]) for key, first in ordered]


def _measures(models: Sequence[Model]) -> Iterator[dict[str, Any]]:
    for first, found in _rows(models):
        better = first.get("better") or "lower"
        baseline = next((m["baseline"] for m in found if m and m.get("baseline") is not None), None)
        values = [m["value"] for m in found if m and m["value"] is not None]
        best = min(values, key=partial(_badness, better, baseline or 0.0)) if len(values) > 1 else None
        yield {
            "title": first["title"],
            "features": first.get("features") or "",
            "cells": [_cell(measure, best) for measure in found],
            "baseline": "" if baseline is None else number(baseline),
            "better": _NOTES[better],
        }


def _badness(better: str, baseline: float, value: float) -> float:
    return {"lower": value, "higher": -value, "baseline": abs(value - baseline)}[better]


def _cell(measure: Mapping[str, Any] | None, best: float | None) -> dict[str, Any]:
    if measure is None:
        return {"value": "", "error": "", "best": False}
    error = measure.get("error")
    return {
        "value": number(measure["value"]),
        "error": "" if error is None else number(error, 2),
        "best": best is not None and measure["value"] == best,
    }


def _methods(models: Sequence[Model]) -> Iterator[dict[str, Any]]:
    """Yield how each measure was made, once for measures in several features."""
    methods: list[dict[str, Any]] = []
    for first, _ in _rows(models):
        counts = {name: f"{first[name]:,}" if first.get(name) else "" for name in ("samples", "reference")}
        method = {"title": first["title"], "note": first.get("note") or "", **counts}
        if (method["note"] or any(counts.values())) and method not in methods:
            methods.append(method)
            yield method


def _tables(models: Sequence[Model]) -> Iterator[dict[str, Any]]:
    for model, table in _of_each(models, "tables"):
        rows = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in table["rows"]]
        yield {
            "title": _titled(models, model, table["title"]),
            "note": table.get("note") or "",
            "columns": table["columns"],
            "rows": rows,
        }


def number(value: float | None, digits: int = 4) -> str:
    """Return a number for readers; – if there is none."""
    if value is None:
        return "–"
    return (f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}").replace("-", "−")


def _settings(models: Sequence[Model]) -> Iterator[dict[str, Any]]:
    for key, title in (("settings", "Settings"), ("seconds", "Time in seconds"), ("versions", "Versions")):
        found = [_flat(model.report.get(key) or {}) for model in models]
        names = dict.fromkeys(name for values in found for name in values)
        rows = [{"name": name, "values": [values.get(name, "") for values in found]} for name in names]
        if rows:
            yield {"title": title, "rows": rows}
    damaged = [", ".join(f"{name}: {reason}" for name, reason in model.parts("damaged")) for model in models]
    if any(damaged):
        yield {"title": "Images that can't be read", "rows": [{"name": "replaced by others", "values": damaged}]}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        match value:
            case dict():
                flat |= _flat(value, f"{prefix}{name}.")
            case list():
                flat[prefix + name] = " ".join(map(str, value))
            case None:
                flat[prefix + name] = "–"
            case _:
                flat[prefix + name] = str(value)
    return flat


# -- images and plots -----------------------------------------------------------------------------------------------


def _samples(models: Sequence[Model], most: int) -> Iterator[dict[str, Any]]:
    """Yield rows of the generated images with the same caption and place."""
    rows: dict[tuple[int, str], list[dict[str, Any] | None]] = {}
    for k, model in enumerate(models):
        for place, sample in enumerate(model.parts("samples")[:most]):
            row = rows.setdefault((place, sample["caption"]), [None] * len(models))
            row[k] = embedded(model.folder, sample["file"])
    for (_, caption), images in rows.items():
        yield {"caption": caption, "images": images}


def _sheets(models: Sequence[Model]) -> Iterator[dict[str, Any]]:
    for model, sheet in _of_each(models, "sheets"):
        image = embedded(model.folder, sheet["file"], largest=None)
        yield {"title": _titled(models, model, sheet["title"]), "note": sheet.get("note") or "", "uri": image["uri"]}


def embedded(folder: Path, file: str, largest: int | None = _LARGEST) -> dict[str, Any]:
    """Return an image of the folder as a data URI, and whether it is small. Raises UserError if it can't be read.

    largest: side in pixels to which a larger image is reduced.
    """
    path = folder / file
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise UserError(f"{folder / 'report.json'}: names the image {file!r}, which must be in the same folder")
    try:
        with Image.open(io.BytesIO(read_regular(path)), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError("too large")
            pixels = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} can't be read ({one_line(error)}): evaluate again") from None
    small = max(pixels.size) <= _SMALL
    if largest and max(pixels.size) > largest:
        pixels.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    content, kind = io.BytesIO(), "png" if small else "webp"
    pixels.save(content, kind.upper(), **({"optimize": True} if small else {"quality": _WEBP}))
    return {"uri": f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}", "small": small}


def _plots(models: Sequence[Model]) -> Iterator[dict[str, Any]]:
    """Yield the plots; those with the same name are drawn into one."""
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for model, plot in _of_each(models, "plots"):
        found.setdefault(plot["name"], []).append((model.name, plot))
    for plots in found.values():
        plot = merged(plots)
        yield {"title": plot["title"], "note": plot.get("note") or "", "svg": Markup(svg(plot))}


def _of_each(models: Sequence[Model], kind: str) -> Iterator[tuple[Model, Mapping[str, Any]]]:
    return ((model, part) for model in models for part in model.parts(kind))


def _titled(models: Sequence[Model], model: Model, title: str) -> str:
    return title if len(models) == 1 else f"{model.name}: {title}"
