"""The inspection of images before training: a folder with known contents gives exactly the known report."""

import io
import json
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from support import ROOT
from support.commands import run_script
from train.commands.inspect_data import difference_hash, equal_groups, look_alikes

inspect = partial(run_script, "inspect_data")
ORIENTATION = 0x0112


def image(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Return an image of soft blots."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images for training, of which two can't be read, a row without a file, and three held-out images."""
    folder = tmp_path_factory.mktemp("known")
    train, test = folder / "train", folder / "test"
    train.mkdir()
    test.mkdir()
    image(0).save(train / "a.png")
    (train / "a copy.png").write_bytes((train / "a.png").read_bytes())
    image(0).save(train / "a.jpg", quality=90)
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    image(1, (100, 50)).save(train / "turned.jpg", exif=turned)
    image(2, (40, 40)).convert("RGBA").save(train / "alpha.png")
    image(3, (60, 30)).convert("CMYK").save(train / "cmyk.jpg")
    image(4, (30, 60)).convert("L").save(train / "grey.png")
    image(5).save(train / "moving.gif", save_all=True, append_images=[image(6)])
    Image.new("RGB", (64, 64), (200, 30, 30)).save(train / "flat red.png")
    Image.new("RGB", (64, 64), (30, 60, 200)).save(train / "flat blue.png")
    (train / "torn.png").write_bytes((train / "a.png").read_bytes()[:200])
    (train / "text.png").write_bytes(b"no image at all")
    (test / "turned.jpg").write_bytes((train / "turned.jpg").read_bytes())
    image(0).save(test / "a.webp", lossless=True)
    image(7).save(test / "own.png")
    captions: dict[str, list[str]] = {path.name: ["ab cd"] for path in sorted(train.iterdir())}
    captions |= {
        "a.png": ["left", "the Right one"],
        "alpha.png": [""],
        "cmyk.jpg": ["abcdefghijkl"],
        "missing.png": ["x"],
    }
    rows = [{"file_name": f"train/{name}", "text": texts} for name, texts in captions.items()]
    rows += [{"file_name": f"test/{path.name}", "text": "y"} for path in sorted(test.iterdir())]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_report_of_a_known_folder(known: Path, small_clip: Path, tmp_path: Path) -> None:
    """The small CLIP's tokenizer has no merges: a letter is a token. It has room for 8 tokens with begin and end."""
    status, printed, errors = inspect(
        "--data", known, "--out", tmp_path, "--resolution", 60, "--text-encoder", small_clip, "--workers", 0
    )
    assert (status, errors) == (0, "")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["data"] == {
        "place": str(known),
        "form": "a folder with metadata.jsonl",
        "train": 12,
        "test": 3,
        "split": "all",
        "notes": [],
        "looked_at": 15,
    }
    # 9 times "ab cd" (6 tokens), "left" (6), "the Right one" (13), "abcdefghijkl" (14), 3 times "y" (3)
    assert report["captions"] == {
        "count": 15,
        "mean": 1.0,
        "several": 1,
        "without": 1,
        "distinct": 5,
        "most_frequent": {"ab cd": 9, "y": 3},
        "median": 6,
        "95_percent": 14,
        "longest": 14,
        "lengths": {"3": 3, "6": 10, "13": 1, "14": 1},
        "longest_caption": "abcdefghijkl",
        "room": 8,
        "too_long": 2,
        "chunks_for_all": 2,
        "left_or_right": 2,
        "words": {"median": 2.0, "short": 15, "distinct": 8, "shared": 12},
        "tokenizer": str(small_clip),
        "room_from": "--text-encoder",
    }
    assert report["images"] == {
        "read": 13,
        "smallest": [40, 40],
        "median": [64, 64],
        "largest": [50, 100],
        "median_side": 64,
        "resolution": 60,
        "smaller": 5,
        "square": pytest.approx((9 + 4 * 0.5) / 13),
        "shapes": {"3:1": 0, "2:1": 1, "3:2": 0, "4:3": 0, "1:1": 9, "3:4": 0, "2:3": 0, "1:2": 3, "1:3": 0},
        "formats": {"PNG": 7, "JPEG": 4, "GIF": 1, "WEBP": 1},
        "traits": {"turned by EXIF": 2, "with alpha": 1, "CMYK": 1, "greyscale": 1, "animated": 1},
    }
    assert report["left_out"] == {
        "count": 1,
        "first": [["train/missing.png", "listed in the metadata, but the file doesn't exist"]],
    }
    assert report["damaged"]["count"] == 2
    assert [name for name, _ in report["damaged"]["first"]] == ["train/text.png", "train/torn.png"]
    same_bytes = [
        {"train": ["train/a copy.png", "train/a.png"], "test": []},
        {"train": ["train/turned.jpg"], "test": ["test/turned.jpg"]},
    ]
    same_looks = [{"train": ["train/a copy.png", "train/a.jpg"], "test": ["test/a.webp"]}]
    assert report["duplicates"] == {
        "bytes": {"groups": 2, "copies": 2, "leaks": 1, "first": same_bytes},
        "looks": {"groups": 1, "copies": 2, "leaks": 1, "first": same_looks},
    }
    assert report["advice"] == [
        "unreadable images: 2 images (13 %); training stops above 10 %, see --input.max-damaged",
        "no caption: 1 image (7 %); they are trained with the empty prompt",
        "captions over 8 tokens: 2 captions (13 %); the rest of them is ignored; "
        "--text-chunks 2 in stage 2 avoids this",
        "short captions: all 15 captions with fewer than 8 words, median 2; a prompt can control only what captions "
        "mention, and the rest of the image will be random; name objects, colours, background and style in 10 to 40 "
        "words",
        "captions of several images: 12 images (80 %) have only captions that others have too; the model can't "
        "distinguish these images by a prompt, and generates any of them",
        "left or right: in 2 captions (13 %); leave --input.flip off, because it mirrors images",
        "images below 60 pixels: 5 images (38 %); they are enlarged; --input.min-size 60 leaves them out",
        "held-out images with a copy in training: 2; measurements on them are better than on new images",
        "copies: 4 images; the model sees such images more often; see duplicates.jsonl",
        "few images: 12 for training; a model trained from random weights will memorise them",
    ]
    assert all(f"  - {line}\n" in printed for line in report["advice"])
    assert printed.startswith(f"{known}: a folder with metadata.jsonl\n")
    assert "'train/turned.jpg' (train) = 'test/turned.jpg' (test)\n" in printed
    listed = read(tmp_path / "damaged.jsonl")
    assert [line["file"] for line in listed] == ["train/missing.png", "train/text.png", "train/torn.png"]
    assert all(line.keys() == {"file", "reason"} for line in listed)
    assert read(tmp_path / "duplicates.jsonl") == [
        *({"same": "bytes"} | group for group in same_bytes),
        *({"same": "looks"} | group for group in same_looks),
    ]
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.width == 8 * 132 + 4
        assert sheet.height > 2 * 132  # 13 images in two rows
        colours = [sheet.convert("RGB").getpixel((4 + 132 * k + 64, 4 + 64)) for k in range(8)]
    assert (200, 30, 30) in colours
    assert (30, 60, 200) in colours


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_make_no_difference(known: Path, tmp_path: Path) -> None:
    reports = []
    for workers in (0, 2):
        assert inspect("--data", known, "--out", tmp_path, "--workers", workers)[0] == 0
        reports.append(json.loads((tmp_path / "report.json").read_text()))
        del reports[-1]["settings"]
    assert reports[0] == reports[1]
    assert reports[0]["captions"]["room"] == 77


OWN = "text: {max_length: 20, vocab_size: 600}\ninput: {resolution: 40}\n"
DEFAULT = "the default of stage 0; give its configuration"


@pytest.mark.parametrize(
    ("arguments", "room", "source"),
    [
        ((), 77, DEFAULT),
        (("pictures/clip",), 32, "pictures/clip"),
        (("configs/shapes/clip.yaml",), 16, "configs/shapes/clip.yaml"),
        (("own.yaml",), 20, "own.yaml"),
        (("--text.max-length", 24), 24, "--text.max-length"),
        (("pictures/clip", "--text.max-length", 24), 24, "--text.max-length"),
        (("pictures/ldm", "--text-encoder", "{clip}"), 8, "--text-encoder"),
        (("pictures/ldm", "--text-encoder", "{clip}", "--text-chunks", 2), 14, "--text-encoder"),
        (("two.yaml", "--text-encoder", "{clip}"), 14, "--text-encoder"),
        (("pictures/ldm",), 77, DEFAULT),
        (("pictures/vae",), 77, DEFAULT),
    ],
)
def test_tokens_are_counted_against_the_length_of_the_training(
    small_clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    room: int,
    source: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "own.yaml").write_text(OWN)
    (tmp_path / "two.yaml").write_text("text_chunks: 2\n")
    (tmp_path / "data").mkdir()
    for k in range(3):
        image(k).save(tmp_path / f"data/{k}.png")
        (tmp_path / f"data/{k}.txt").write_text("a long caption of many different words " * 3)
    words = [str(word).format(clip=small_clip) for word in arguments]
    status, printed, error = inspect(*words, "--data", "data", "--workers", 0)
    assert status == 0, error
    report = json.loads(Path("report-data/report.json").read_text())
    assert report["captions"]["room"] == room
    assert report["captions"]["room_from"].startswith(source)
    assert f"up to {room} fit, including the begin and end tokens (from {source}" in printed
    assert report["captions"]["too_long"] == (3 if room < 23 else 0)
    assert (report["settings"]["resolution"] == 40) == ("own.yaml" in words)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("pictures/clop", "not the name of a configuration of this command; names: emoji/clip, "),
        ("wrong.yaml", "wrong.yaml: unknown key 'stepz': did you mean 'steps'?"),
        ("pipe.yaml", "commands aren't allowed in a configuration file"),
    ],
)
def test_wrong_configurations_of_an_inspection_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text("stepz: 3\n")
    Path("pipe.yaml").write_text("data: 'pipe:touch x'\n")
    status, _, printed = inspect(given)
    assert (status, printed.count("\n")) == (2, 1)
    assert error in printed


def test_good_images_need_no_advice_and_clear_old_lists(shapes: Path, tmp_path: Path) -> None:
    for name in ("damaged.jsonl", "duplicates.jsonl"):
        (tmp_path / name).write_text("of another folder\n")
    status, printed, _ = inspect("--data", shapes / "train", "--out", tmp_path, "--resolution", 32, "--workers", 0)
    assert status == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [line.partition(":")[0] for line in report["advice"]] == ["left or right", "few images"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["contact_sheet.png", "report.json"]
    assert "all 32 × 32\n" in printed


def test_a_limit_takes_images_evenly_of_one_split(shapes: Path, tmp_path: Path) -> None:
    options = ("--limit", 10, "--split", "train")
    assert inspect("--data", shapes, "--out", tmp_path, *options, "--workers", 0)[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["data"] | {"place": ""} == {
        "place": "",
        "form": "a folder with metadata.jsonl",
        "train": 64,
        "test": 24,
        "split": "train",
        "notes": [],
        "looked_at": 10,
    }
    rows = read(shapes / "train" / "metadata.jsonl")
    texts = {rows[k * 64 // 10]["text"] for k in range(10)}
    assert report["captions"]["count"] == 10
    assert report["captions"]["distinct"] == len(texts)
    assert report["captions"]["longest_caption"] in texts


def test_the_first_images_of_a_stream_are_inspected(known: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for k in range(6):
            image(k).save(tmp_path / f"{k}.png")
            (tmp_path / f"{k}.txt").write_text(f"number {k}")
            for suffix in ("png", "txt"):
                tar.add(tmp_path / f"{k}.{suffix}", f"{k}.{suffix}")
    status, printed, _ = inspect("--data", f"pipe:cat {tmp_path}/0.tar", "--out", tmp_path / "out", "--workers", 0)
    assert status == 0
    assert "a stream, of which the first images are inspected" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["data"]["train"] + report["data"]["test"] == report["images"]["read"] == 6


def test_images_without_captions(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for k in range(4):
        image(k).save(tmp_path / "data" / f"{k}.png")
    status, printed, _ = inspect("--data", tmp_path / "data", "--out", tmp_path / "out", "--workers", 0)
    assert status == 0
    assert "  captions    none\n" in printed
    assert "no captions: you can train an autoencoder" in printed


def test_a_misspelt_caption_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for k in range(4):
        image(k).save(tmp_path / "data" / f"{k}.png")
    rows = [json.dumps({"file_name": f"{k}.png", "title": f"image {k}"}) + "\n" for k in range(4)]
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(rows))
    words = ("--data", tmp_path / "data", "--out", tmp_path / "out", "--workers", 0, "--input.caption-column")
    assert inspect(*words, "title")[0] == 0
    status, _, errors = inspect(*words, "tilte")
    assert status == 2
    assert errors == f"error: --input.caption-column tilte: {tmp_path / 'data'} has no captions in this column\n"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), "--data is missing"),
        (("--data", "{}/nowhere/at/all"), "must be an existing folder"),
        (("--data", "{}", "--limit", "-1"), "--limit -1: must be at least 0"),
        (("--data", "{}", "--split", "half"), "split"),
        (("--data", "{}", "--text-encoder", "{}"), "no text encoder"),
        (("--data", "{}"), "none of the 2 images can be read, e.g. "),
    ],
)
def test_errors_are_one_line(arguments: tuple[str, ...], error: str, tmp_path: Path) -> None:
    for k in range(2):
        (tmp_path / f"{k}.png").write_bytes(b"nothing")
    status, printed, errors = inspect(
        *(a.replace("{}", str(tmp_path)) for a in arguments), "--out", tmp_path / "out", "--workers", 0
    )
    assert (status, printed) == (2, "")
    assert errors.startswith("error: ")
    assert error in errors
    assert errors.count("\n") == 1


def test_the_difference_hash_marks_where_brightness_increases() -> None:
    """Bits are in row order; the first one compares the two pixels at the upper left."""
    ramp = np.repeat(np.arange(9, dtype=np.uint8)[None] * 20, 8, 0)
    ramp[0, :2] = (100, 20)
    ramp[7, 8] = 0
    assert difference_hash(Image.fromarray(ramp).convert("RGB")) == 2**63 - 2
    assert difference_hash(Image.fromarray(255 - ramp)) == (1 << 63) | 1
    assert difference_hash(Image.new("RGB", (300, 200), (9, 99, 9))) == 0


def test_near_duplicates_are_found_across_formats_and_sizes() -> None:
    """Each of 60 images is stored as PNG, as JPEG and at half size. Recoloured, mirrored and rotated ones differ."""
    images = []
    for k in range(60):
        drawn = image(k, (128, 96))
        stored = io.BytesIO()
        drawn.save(stored, "JPEG", quality=80)
        images += [drawn, Image.open(stored).convert("RGB"), drawn.resize((64, 48), Image.Resampling.LANCZOS)]
    first = images[0]
    images += [ImageOps.mirror(first), ImageOps.flip(first), Image.merge("RGB", first.split()[::-1])]
    images += [Image.new("RGB", (64, 64), (0, 0, 8 * k)) for k in range(1, 31, 2)]  # with equal hashes
    looks = np.array([difference_hash(image) for image in images], np.uint64)
    reduced = np.stack([np.asarray(image.resize((8, 8), Image.Resampling.BOX)).ravel() for image in images])
    for order in (np.arange(len(images)), np.random.default_rng(0).permutation(len(images))):
        groups = sorted(sorted(order[group].tolist()) for group in look_alikes(looks[order], reduced[order]))
        assert groups == [[3 * k, 3 * k + 1, 3 * k + 2] for k in range(60)]


def test_equal_keys_are_found_together() -> None:
    keys = np.array([5, 1, 5, 2, 1, 5])
    assert [group.tolist() for group in equal_groups(keys)] == [[1, 4], [0, 2, 5]]
    assert equal_groups(np.arange(4)) == []
