"""Inspect images and captions before training: write statistics, problems and a contact sheet."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from conditioning.clip import ClipTextEncoder
from conditioning.tokenizer import train_tokenizer
from ldm.errors import UserError
from train.commands.inspect_data import (
    InspectedImages,
    Report,
    Selection,
    caption_report,
    data_report,
    duplicate_report,
    left_out_files,
    list_report,
)
from train.commands.inspect_report import advice
from train.commands.main import require_at_least, require_folder
from train.config.reports import InspectOptions, TokenizerOptions
from train.data.store.atomic import write_text
from train.engine.open_data import open_inputs
from train.engine.provenance import versions
from train.evaluation.sheets import in_rows, save_sheet, sheet, to_uint8

_SHOWN, _COLUMNS, _SIDE = 48, 8, 128  # images, columns and side in pixels of the contact sheet


def inspect(o: InspectOptions, config: str = "", *, progress: Callable[[float], None] = lambda share: None) -> Report:
    """Inspect a dataset and return the report, which is also written to `o.out` with a contact sheet.

    config: configuration that the length of a caption is from; empty: it is from an option. progress: called with the
    share of the images that are read, 0 to 1.
    """
    if not o.data:
        raise UserError("--data is missing: give the images to inspect, e.g. --data data/shapes")
    require_folder(o.out)
    require_at_least(8, o, "resolution")
    require_at_least(0, o, "limit", "workers", "text_chunks")
    encoder = ClipTextEncoder.load(o.text_encoder, chunks=o.text_chunks or None) if o.text_encoder else None
    inputs = open_inputs(o.data, o.input, captioned=False)
    catalogue, column = inputs.source.catalogue, o.input.caption_column
    if column and catalogue.uncaptioned == len(catalogue):
        raise UserError(f"--input.caption-column {column}: {catalogue.location} has no captions in this column")
    folder = Path(o.out)
    folder.mkdir(parents=True, exist_ok=True)  # before the work, so that an error costs no time
    selection = Selection([s for s in (inputs.source, inputs.held_out) if o.split in ("all", s.split)], o.limit)
    if encoder is None:
        texts = Selection([inputs.source], o.limit).texts()
        tokenizer, chunks = train_tokenizer(texts, o.text.vocab_size, o.text.max_length), o.text_chunks or 1
    else:
        tokenizer, chunks = encoder.tokenizer, encoder.chunks
    images = InspectedImages(selection, o.input.center_framing(_SIDE), o.workers, progress)
    duplicates, left_out = images.duplicates(), left_out_files(inputs)
    tokenizer_name = o.text_encoder or "the one that stage 0 would train on these captions"
    report: Report = {
        "data": {"place": o.data, **data_report(inputs), "split": o.split, "looked_at": len(selection)},
        "captions": caption_report(selection, tokenizer, chunks)
        | {"tokenizer": tokenizer_name, "room_from": _room_from(o, config)},
        "images": images.report(o.resolution),
        "left_out": list_report(left_out),
        "damaged": list_report(images.damaged),
        "duplicates": {kind: duplicate_report(groups) for kind, groups in duplicates.items()},
    }
    report |= {"advice": advice(report), "settings": asdict(o), "versions": versions()}
    write_text(folder / "report.json", json.dumps(report, indent=2) + "\n")
    write_lines(folder / "damaged.jsonl", [{"file": f, "reason": reason} for f, reason in (*left_out, *images.damaged)])
    write_lines(
        folder / "duplicates.jsonl", [{"same": kind} | group for kind, groups in duplicates.items() for group in groups]
    )
    save_sheet(contact_sheet(images), folder / "contact_sheet.png")
    return report


def _room_from(o: InspectOptions, config: str) -> str:
    """Return where the number of tokens that fit comes from."""
    if o.text_encoder:
        return "--text-encoder"
    if config:
        return config
    if o.text.max_length != TokenizerOptions().max_length:
        return "--text.max-length"
    return "the default of stage 0; give its configuration, e.g. pictures/clip, or --text.max-length or --text-encoder"


def contact_sheet(images: InspectedImages) -> Image.Image:
    """Draw readable images, spread evenly over the dataset, each above its first caption."""
    selection, framing = images.selection, images.framing
    count = min(_SHOWN, len(images.readable))
    shown = [int(images.readable[k * len(images.readable) // count]) for k in range(count)]
    loaded = (framing.load(selection.read(k), selection.name(k)) for k in shown)
    pixels = torch.stack([framing.apply(image, framing.square, (0.5, 0.5), False) for image in loaded])
    return sheet(in_rows(list(to_uint8(pixels)), _COLUMNS), [selection.row(k).captions[0] for k in shown])


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object per line. If there are none, delete the file."""
    path.unlink(missing_ok=True)
    if lines:
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
