"""Describe the statistics of images and captions in words, and give advice."""

import math
from collections.abc import Sequence

from train.commands.inspect_data import Report
from train.config.data import DataConfig

_LITTLE = 0.8  # share of the average image inside its square crop
_FEW = 1000  # training images
_MANY = 0.01  # share of images that are copies of others
_OFTEN = 0.01  # share of captions with the same text
_QUOTED = 100  # characters
_CAPTIONED = {"several for": "several", "none for": "without"}


def advice(report: Report) -> list[str]:
    """Return one line for each finding that needs a decision."""
    data, captions, images = report["data"], report["captions"], report["images"]
    n, read, side = data["looked_at"], images["read"], images["resolution"]
    lines, stream = [], data["form"].startswith("a stream")
    if bad := report["damaged"]["count"]:
        most = DataConfig().max_damaged
        lines.append(
            f"can't be read: {_of(bad, n, 'image')}; training stops above {100 * most:g} %, see --input.max-damaged"
        )
    if not captions["count"]:
        lines.append("no captions: an autoencoder can be trained, a text encoder and a diffusion model can't")
    elif captions["without"]:
        lines.append(f"without a caption: {_of(captions['without'], n, 'image')}; they teach the empty prompt")
    if captions.get("too_long"):
        long = _of(captions["too_long"], captions["count"], "caption")
        whole = f"--text-chunks {captions['chunks_for_all']} reads them whole"
        lines.append(f"longer than {captions['room']} tokens: {long}, which will be cut; {whole}")
    if captions.get("left_or_right"):
        say = _of(captions["left_or_right"], captions["count"], "caption")
        lines.append(f"left or right: said in {say}; leave --input.flip off, it mirrors images")
    if small := images["smaller"]:
        fitting = f"{max(8, images['median_side'] // 8 * 8)} suits them better"
        way_out = f"--input.min-size {side} leaves them out" if 2 * small < read and not stream else fitting
        lines.append(f"smaller than {side}: {_of(small, read, 'image')}, which will be enlarged; {way_out}")
    if images["square"] < _LITTLE:
        shown = f"a square shows {100 * images['square']:.0f} % of the average image"
        step = min(64, max(8, side // 32 * 8))
        buckets = "" if stream else f"; --input.buckets {step} trains stage 2 on rectangles"
        lines.append(f"long images: {shown}{buckets}")
    same = report["duplicates"].values()
    if leaks := sum(kind["leaks"] for kind in same):
        lines.append(f"held out, but also in training: {_many(leaks, 'image')}; what is measured on them flatters")
    if (copies := sum(kind["copies"] for kind in same)) >= _MANY * read:
        lines.append(f"copies: {_many(copies, 'image')}, seen more often than others; duplicates.jsonl lists them")
    if data["train"] < _FEW:
        lines.append(f"few: {_many(data['train'], 'image')} to train on; from random weights a model will repeat them")
    return lines


def describe(report: Report) -> str:
    """Return the report as readable text."""
    data, captions, images = report["data"], report["captions"], report["images"]
    n, read = data["looked_at"], images["read"]
    whole = n == data["train"] + data["test"]
    among = {"all": "spread evenly", "train": "of those for training", "test": "of those held out"}[data["split"]]
    sizes = " — ".join("{} × {}".format(*images[name]) for name in ("smallest", "median", "largest"))
    alike = images["smallest"] == images["largest"]
    shapes = [(shape, count) for shape, count in images["shapes"].items() if count]
    largest = max(count for _, count in shapes)
    rows = [
        ("images", f"{data['train']:,} for training, {data['test']:,} held out"),
        ("", "" if whole else f"{n:,} looked at, {among}"),
        *_listed("left out", report["left_out"]),
        *_listed("damaged", report["damaged"]),
        *_copies("same bytes", report["duplicates"]["bytes"]),
        *_copies("look alike", report["duplicates"]["looks"]),
        None,
        ("sizes", "all {} × {}".format(*images["median"]) if alike else f"{sizes} (smallest, median, largest)"),
        ("", f"{_of(images['smaller'], read)} under {images['resolution']} on the shorter side"),
        ("formats", ", ".join(f"{_of(count, read)} {name}" for name, count in images["formats"].items())),
        ("", ", ".join(f"{_of(count, read)} {name}" for name, count in images["traits"].items())),
        *_block("shapes", [f"{shape} {count:>9,}  {'█' * math.ceil(40 * count / largest)}" for shape, count in shapes]),
        None,
        *_caption_rows(captions),
    ]
    lines = ["" if row is None else f"  {row[0]:<11} {row[1]}" for row in rows if row is None or any(row)]
    if report["advice"]:
        lines += ["", "To consider", *(f"  - {line}" for line in report["advice"])]
    return "\n".join([f"{data['place']}: {data['form']}", "", *lines])


def _caption_rows(captions: Report) -> list[tuple[str, str]]:
    n = captions["count"]
    if not n:
        return [("captions", "none")]
    notes = [f"{name} {_many(captions[key], 'image')}" for name, key in _CAPTIONED.items() if captions[key]]
    often = [(text, times) for text, times in captions["most_frequent"].items() if times >= _OFTEN * n]
    return [
        ("captions", f"{n:,}, {captions['distinct']:,} of them different; {captions['mean']:.3g} an image"),
        ("", ", ".join(notes)),
        ("", f"{_of(captions['left_or_right'], n)} with left or right"),
        *_block("frequent", [f"{_of(times, n)}: {_quoted(text)}" for text, times in often]),
        (
            "tokens",
            f"median {captions['median']}, 95 % have {captions['95_percent']} at most, longest {captions['longest']}",
        ),
        ("", f"of {captions['room']} that fit, begin and end included; by {captions['tokenizer']}"),
        ("longest", _quoted(captions["longest_caption"])),
    ]


def _listed(label: str, found: Report) -> list[tuple[str, str]]:
    examples = [f"{name!r}: {reason}" for name, reason in found["first"]]
    return _block(label, [f"{found['count']:,}" if examples else "none", *examples], found["count"] > len(examples))


def _copies(label: str, found: Report) -> list[tuple[str, str]]:
    if not found["groups"]:
        return [(label, "none")]
    groups = [[f"{name!r} ({side})" for side, names in group.items() for name in names] for group in found["first"]]
    examples = [" = ".join(names[:3] + ["…"] * (len(names) > 3)) for names in groups]
    count = f"{_many(found['groups'], 'group')}, {_many(found['copies'], 'image')} too many"
    return _block(label, [count, *examples], found["groups"] > len(examples))


def _block(label: str, lines: Sequence[str], more: bool = False) -> list[tuple[str, str]]:
    return [("" if k else label, line) for k, line in enumerate([*lines, *["…"] * more])]


def _of(count: int, total: int, what: str = "") -> str:
    """Format a count, its noun and its share of the total."""
    if count in (0, total):
        return f"{'all' if count else 'none of'} {_many(total, what)}"
    share = 100 * count / total
    return f"{_many(count, what)} ({share:.{0 if share >= 1 else 2}f} %)"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (bool(what) and count != 1)}".rstrip()


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _QUOTED else text[:_QUOTED] + "…")
