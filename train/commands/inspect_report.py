"""Convert the statistics of images and captions to readable text, and give advice."""

import math
from collections.abc import Sequence

from train.commands.inspect_data import SHORT, Report
from train.config.data import DataConfig

# Thresholds from which a finding is reported.
_SQUARE_SHARE = 0.8  # share of the average image that a square crop keeps
_FEW_IMAGES = 1000  # training images
_COPY_SHARE = 0.01  # share of images that are copies of others
_FREQUENT_SHARE = 0.01  # share of captions with the same text
_SHORT_SHARE = 0.5  # share of captions with few words
_SHARED_SHARE = 0.2  # share of images that have no caption of their own
_MAX_QUOTED = 100  # characters of a quoted caption


def advice(report: Report) -> list[str]:
    """Return one line for each finding that the user should consider before training."""
    data, captions, images = report["data"], report["captions"], report["images"]
    n, read, side = data["looked_at"], images["read"], images["resolution"]
    lines, stream = [], data["form"].startswith("a stream")
    if damaged := report["damaged"]["count"]:
        limit = f"{100 * DataConfig().max_damaged:g} %"
        lines.append(
            f"unreadable images: {_share(damaged, n, 'image')}; training stops above {limit}, see --input.max-damaged"
        )
    if not captions["count"]:
        lines.append("no captions: you can train an autoencoder, but no text encoder and no diffusion model")
    elif captions["without"]:
        lines.append(f"no caption: {_share(captions['without'], n, 'image')}; they are trained with the empty prompt")
    if captions.get("too_long"):
        long = _share(captions["too_long"], captions["count"], "caption")
        remedy = f"--text-chunks {captions['chunks_for_all']} in stage 2 avoids this"
        if captions["room_from"] != "--text-encoder":
            remedy = f"--text.max-length {captions['longest']} in stage 0 or {remedy}"
        lines.append(f"captions over {captions['room']} tokens: {long}; the rest of them is ignored; {remedy}")
    lines += _word_advice(captions, n)
    if captions.get("left_or_right"):
        count = _share(captions["left_or_right"], captions["count"], "caption")
        lines.append(f"left or right: in {count}; leave --input.flip off, because it mirrors images")
    if small := images["smaller"]:
        lower = f"--input.resolution {max(8, images['median_side'] // 8 * 8)} would suit the dataset better"
        remedy = f"--input.min-size {side} leaves them out" if 2 * small < read and not stream else lower
        lines.append(f"images below {side} pixels: {_share(small, read, 'image')}; they are enlarged; {remedy}")
    if images["square"] < _SQUARE_SHARE:
        kept = f"a square crop keeps {100 * images['square']:.0f} % of the average image"
        step = min(64, max(8, side // 32 * 8))
        remedy = "" if stream else f"; --input.buckets {step} trains stage 2 on rectangles"
        lines.append(f"elongated images: {kept}{remedy}")
    duplicates = report["duplicates"].values()
    if leaks := sum(kind["leaks"] for kind in duplicates):
        lines.append(
            f"held-out images with a copy in training: {leaks:,}; measurements on them are better than on new images"
        )
    if (copies := sum(kind["copies"] for kind in duplicates)) >= _COPY_SHARE * read:
        lines.append(f"copies: {_count(copies, 'image')}; the model sees such images more often; see duplicates.jsonl")
    if data["train"] < _FEW_IMAGES:
        lines.append(
            f"few images: {data['train']:,} for training; a model trained from random weights will memorise them"
        )
    return lines


def _word_advice(captions: Report, images: int) -> list[str]:
    """Return advice on captions that say too little for a model that follows prompts."""
    if not (words := captions.get("words")):
        return []
    lines = []
    if words["short"] >= _SHORT_SHARE * captions["count"]:
        lines.append(
            f"short captions: {_share(words['short'], captions['count'], 'caption')} with fewer than {SHORT} words, "
            f"median {words['median']:g}; a prompt can control only what captions mention, and the rest of the image "
            "will be random; name objects, colours, background and style in 10 to 40 words"
        )
    if words["shared"] >= _SHARED_SHARE * images:
        lines.append(
            f"captions of several images: {_share(words['shared'], images, 'image')} have only captions that others "
            "have too; the model can't distinguish these images by a prompt, and generates any of them"
        )
    return lines


def describe(report: Report) -> str:
    """Return the report as readable text."""
    data, captions, images = report["data"], report["captions"], report["images"]
    n, read = data["looked_at"], images["read"]
    complete = n == data["train"] + data["test"]
    selection = {"all": "spread evenly", "train": "of the training images", "test": "of the held-out images"}
    sizes = ", ".join("{} {} × {}".format(name, *images[name]) for name in ("smallest", "median", "largest"))
    same_size = images["smallest"] == images["largest"]
    shapes = [(shape, count) for shape, count in images["shapes"].items() if count]
    largest = max(count for _, count in shapes)
    rows = [
        ("images", f"{data['train']:,} for training, {data['test']:,} held out"),
        ("", "" if complete else f"{n:,} inspected, {selection[data['split']]}"),
        *_block("reading", data["notes"]),
        *_file_rows("left out", report["left_out"]),
        *_file_rows("damaged", report["damaged"]),
        *_duplicate_rows("same bytes", report["duplicates"]["bytes"]),
        *_duplicate_rows("look alike", report["duplicates"]["looks"]),
        None,
        ("sizes", "all {} × {}".format(*images["median"]) if same_size else sizes),
        ("", f"{_share(images['smaller'], read)} with a shorter side below {images['resolution']} pixels"),
        ("formats", ", ".join(f"{_share(count, read)} {name}" for name, count in images["formats"].items())),
        ("", ", ".join(f"{_share(count, read)} {name}" for name, count in images["traits"].items())),
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
    labels = {"several": "with several captions", "without": "without a caption"}
    notes = [f"{_count(captions[key], 'image')} {label}" for key, label in labels.items() if captions[key]]
    most_frequent = captions["most_frequent"].items()
    frequent = [(text, count) for text, count in most_frequent if count >= _FREQUENT_SHARE * n]
    return [
        ("captions", f"{n:,}, of which {captions['distinct']:,} are distinct; {captions['mean']:.3g} per image"),
        ("", ", ".join(notes)),
        ("", f"{_share(captions['left_or_right'], n)} with left or right"),
        (
            "words",
            f"median {captions['words']['median']:g}, {_share(captions['words']['short'], n)} with fewer than {SHORT}; "
            f"{captions['words']['distinct']:,} distinct words",
        ),
        *_block("frequent", [f"{_share(count, n)}: {_quoted(text)}" for text, count in frequent]),
        (
            "tokens",
            f"median {captions['median']}, 95 % have at most {captions['95_percent']}, longest {captions['longest']}",
        ),
        ("", f"up to {captions['room']} fit, including the begin and end tokens (from {captions['room_from']})"),
        ("tokenizer", captions["tokenizer"]),
        ("longest", _quoted(captions["longest_caption"])),
    ]


def _file_rows(label: str, files: Report) -> list[tuple[str, str]]:
    examples = [f"{name!r}: {reason}" for name, reason in files["first"]]
    return _block(label, [f"{files['count']:,}" if examples else "none", *examples], files["count"] > len(examples))


def _duplicate_rows(label: str, duplicates: Report) -> list[tuple[str, str]]:
    if not duplicates["groups"]:
        return [(label, "none")]
    groups = [
        [f"{name!r} ({split})" for split, names in group.items() for name in names] for group in duplicates["first"]
    ]
    examples = [" = ".join(names[:3] + ["…"] * (len(names) > 3)) for names in groups]
    copies = f"{duplicates['copies']:,} redundant"
    count = f"{_count(duplicates['groups'], 'group')} of images, {copies}"
    return _block(label, [count, *examples], duplicates["groups"] > len(examples))


def _block(label: str, lines: Sequence[str], more: bool = False) -> list[tuple[str, str]]:
    return [("" if k else label, line) for k, line in enumerate([*lines, *["…"] * more])]


def _share(count: int, total: int, what: str = "") -> str:
    """Format a count, its noun and its share of the total."""
    if count in (0, total):
        return f"{'all' if count else 'none of'} {_count(total, what)}"
    share = 100 * count / total
    return f"{_count(count, what)} ({share:.{0 if share >= 1 else 2}f} %)"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (bool(what) and count != 1)}".rstrip()


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "…")
