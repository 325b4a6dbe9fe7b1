"""How folders of images are read, which are refused, and how each kind of image is decoded."""

import csv
import json
import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import UserError
from train.data.images.decode import DamagedImage, image_size, load_image, to_tensor
from train.data.sources.catalogue import Columns
from train.data.sources.folders import Strings
from train.data.sources.splits import Source, find_splits, open_source, take

RNG = np.random.default_rng(0)


def image(path: Path, colour=(200, 30, 40), size=(4, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, "PNG")
    return path


def metadata(folder: Path, rows) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def captioned(folder: Path, count: int) -> Path:
    names = [f"{k:04d}.png" for k in range(count)]
    for name in names:
        image(folder / name)
    return metadata(folder, [{"file_name": name, "text": f"image {name}"} for name in names])


def contents(source) -> list[tuple[str, tuple[str, ...]]]:
    return [(row.name, row.captions) for row in source]


# -- forms ----------------------------------------------------------------------------------------------------------


def test_jsonl_csv_and_texts_are_the_same_source(tmp_path):
    captions = {"b.png": "a blue dog", "a/ü.png": 'says "hi", twice', "c.png": ""}
    rows = [{"file_name": name, "text": text} for name, text in captions.items()]
    for form in ("jsonl", "csv", "txt"):
        folder = tmp_path / form / "train"
        for name in captions:
            image(folder / name)
        match form:
            case "jsonl":
                metadata(folder, rows)
            case "csv":
                with open(folder / "metadata.csv", "w", encoding="utf-8-sig", newline="") as file:
                    writer = csv.DictWriter(file, ["file_name", "text"])
                    writer.writeheader()
                    writer.writerows(rows)
            case "txt":
                for name, text in captions.items():
                    (folder / name).with_suffix(".txt").write_text(text and f"  {text} \n\n", encoding="utf-8")
        image(tmp_path / form / "test" / "x.png")
    sources = [open_source(tmp_path / form, "train") for form in ("jsonl", "csv", "txt")]
    expected = [("a/ü.png", ('says "hi", twice',)), ("b.png", ("a blue dog",)), ("c.png", ("",))]
    for source in sources:
        assert contents(source) == expected
        assert source.catalogue.uncaptioned == 1
    assert len({source.fingerprint for source in sources}) == 1


def test_several_rows_lists_and_lines_are_several_captions(tmp_path):
    for k in range(3):
        image(tmp_path / "train" / f"{k}.png")
    image(tmp_path / "test" / "x.png")
    rows = [("0.png", "one"), ("1.png", ["a", " b ", ""]), ("./0.png", "two"), ("2.png", None)]
    metadata(tmp_path / "train", [{"file_name": name, "text": text} for name, text in rows])
    expected = [("0.png", ("one", "two")), ("1.png", ("a", "b")), ("2.png", ("",))]
    assert contents(open_source(tmp_path, "train")) == expected
    (tmp_path / "test" / "x.txt").write_text("first\n\n  second  \n")
    assert contents(open_source(tmp_path, "test")) == [("x.png", ("first", "second"))]


def test_caption_column(tmp_path):
    for k in range(2):
        image(tmp_path / f"{k}.png")
    rows = [{"picture": f"{k}.png", "caption": "c", "text": "t", "prompt": "p"} for k in range(2)]
    metadata(tmp_path, rows)
    assert open_source(tmp_path, "train", Columns(image="picture"))[0].captions == ("t",)
    assert open_source(tmp_path, "train", Columns(image="picture", caption="prompt"))[0].captions == ("p",)
    with pytest.raises(UserError, match="no column file_name; its columns are: picture, caption, text, prompt"):
        open_source(tmp_path, "train")
    with pytest.raises(UserError, match="no column title; its columns are: picture, caption, text, prompt"):
        open_source(tmp_path, "train", Columns(image="picture", caption="title"))
    metadata(tmp_path, [{"file_name": row["picture"], "caption": "c"} for row in rows])
    assert open_source(tmp_path, "train")[0].captions == ("c",)
    metadata(tmp_path, [{"file_name": row["picture"]} for row in rows])
    with pytest.raises(UserError, match="no column text or caption; its columns are: file_name"):
        open_source(tmp_path, "train")
    assert open_source(tmp_path, "train", Columns(captioned=False))[0].captions == ("",)


# -- splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", ["test", "validation", "val"])
def test_folders_are_splits(tmp_path, held_out):
    captioned(tmp_path / "train", 5)
    captioned(tmp_path / held_out, 3)
    assert len(open_source(tmp_path, "train")) == 5
    for split in ("validation", "test"):
        source = open_source(tmp_path, split)
        assert len(source) == 3
        assert source[0].name == "0000.png"
        assert source.read(0) == (tmp_path / held_out / "0000.png").read_bytes()


def test_validation_and_test_are_distinguished(tmp_path):
    for folder, count in (("train", 5), ("val", 2), ("test", 3)):
        captioned(tmp_path / folder, count)
    assert [len(open_source(tmp_path, split)) for split in ("train", "validation", "test")] == [5, 2, 3]
    captioned(tmp_path / "other" / "test", 3)
    with pytest.raises(UserError, match=r"no split 'train' to train on; the splits are: test; .*--input.train-split"):
        open_source(tmp_path / "other", "train")


def test_one_metadata_file_for_all_splits(tmp_path):
    for name in ("train/a.png", "train/b.png", "test/c.png"):
        image(tmp_path / name)
    metadata(tmp_path, [{"file_name": n, "text": n} for n in ("train/a.png", "test/c.png", "train/b.png")])
    assert [c for _, (c,) in contents(open_source(tmp_path, "train"))] == ["train/a.png", "train/b.png"]
    assert [c for _, (c,) in contents(open_source(tmp_path, "test"))] == ["test/c.png"]


@pytest.mark.parametrize("nested", ["", "train"])
def test_without_a_split_a_share_is_held_out(tmp_path, nested):
    captioned(tmp_path / nested, 400)
    train, held_out = (open_source(tmp_path, s, fraction=0.1) for s in ("train", "validation"))
    names = [{name for name, _ in contents(source)} for source in (train, held_out)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 400
    assert 20 <= len(held_out) <= 65
    assert contents(open_source(tmp_path, "test", fraction=0.1)) == contents(held_out)
    captioned(tmp_path / nested, 600)  # 200 more: every image stays in its split
    more = {name for name, _ in contents(open_source(tmp_path, "validation", fraction=0.1))}
    assert more & (names[0] | names[1]) == names[1]


@pytest.mark.parametrize(
    ("count", "fraction", "expected"), [(2, 0.99, 1), (2, 1e-9, 1), (5, 0.999999, 4), (1400, 0.9, 1000)]
)
def test_from_one_to_a_thousand_images_are_held_out_and_never_all(tmp_path, count, fraction, expected):
    for k in range(count):
        (tmp_path / f"{k}.png").write_bytes(b"not opened")
    metadata(tmp_path, [{"file_name": f"{k}.png", "text": "t"} for k in range(count)])
    assert len(open_source(tmp_path, "test", fraction=fraction)) == expected
    assert len(open_source(tmp_path, "train", fraction=fraction)) == count - expected


def test_splits_by_other_names(tmp_path):
    for name, count in (("mine", 5), ("yours", 3), ("test", 2)):
        captioned(tmp_path / name, count)
    splits = find_splits(str(tmp_path), Columns(), ("mine", "yours"))
    assert len(take(splits, "train", train="mine")) == 5
    assert len(take(splits, "test", train="mine")) == 2
    assert len(take(splits, "test", train="mine", name="yours")) == 3
    with pytest.raises(UserError, match="'other': there is no such split; the splits are: mine, yours, test"):
        take(splits, "train", train="mine", name="other")


def test_rows_are_left_out_without_a_list_of_the_others(tmp_path):
    """Rows selected by exclusion and by inclusion are the same."""
    catalogue = open_source(captioned(tmp_path, 50), "train").catalogue
    for without in ([], [0], [49], [3, 4, 5, 20, 49], list(range(50))):
        stays = [k for k in range(50) if k not in without]
        source = Source(catalogue, without=np.array(without, np.int64))
        assert [row.name for row in source] == [catalogue.row(k).name for k in stays]
        if stays:
            half = np.arange(len(stays)) % 2 == 0
            assert list(source.only_where(half)) == [catalogue.row(k) for k in stays[::2]]
        with pytest.raises(IndexError):
            source[len(stays)]


def test_images_outside_every_split_are_an_error(tmp_path):
    for name in ("train/a.png", "train/b.png", "test/c.png", "extra/d.png"):
        image(tmp_path / name)
    metadata(
        tmp_path, [{"file_name": n, "text": n} for n in ("train/a.png", "train/b.png", "test/c.png", "extra/d.png")]
    )
    with pytest.raises(UserError, match=r"give their split \(train, test\), others don't"):
        open_source(tmp_path, "train")


@pytest.mark.parametrize("other", ["old.tar", "rows.parquet"])
def test_images_next_to_an_archive_are_an_error(tmp_path, other):
    captioned(tmp_path / "train", 3)
    with tarfile.open(tmp_path / "old.tar", "w") as tar:
        tar.add(tmp_path / "train", "train")
    (tmp_path / "old.tar").rename(tmp_path / other)
    with pytest.raises(UserError, match="contains images and also tar or parquet files"):
        open_source(tmp_path, "train")


def test_a_missing_split_is_an_error(tmp_path):
    captioned(tmp_path, 5)
    with pytest.raises(UserError, match="no split 'trian' to train on; the splits are: none"):
        take(find_splits(str(tmp_path), Columns()), "train", train="trian")


def test_an_image_whose_file_is_deleted_is_damaged(tmp_path):
    source = open_source(captioned(tmp_path, 5), "train")
    (tmp_path / source[1].name).unlink()
    with pytest.raises(DamagedImage, match="No such file"):
        source.read(1)


def test_captions_beside_images_may_be_in_any_encoding_but_not_of_any_length(tmp_path):
    for k, text in enumerate((b"caf\xe9", "café".encode(), b"x" * (2**20 + 1), "café".encode("utf-16"))):
        image(tmp_path / "train" / f"{k}.png")
        (tmp_path / "train" / f"{k}.txt").write_bytes(text)
    image(tmp_path / "test" / "x.png")
    source = open_source(tmp_path, "train")
    assert contents(source) == [(f"{k}.png", ("café",)) for k in (0, 1, 3)]
    assert source.left_out == (("2.png", "its .txt file has more than 1,048,576 bytes"),)


def test_class_folders_give_captions_by_a_template(tmp_path):
    for name in ("golden_retriever/1.png", "golden_retriever/2.png", "a/tabby cat/3.png", "4.png"):
        image(tmp_path / "train" / name)
        image(tmp_path / "test" / name)
    source = open_source(tmp_path, "train", Columns(template="a photo of a {}"))
    assert contents(source) == [
        ("4.png", ("",)),
        ("a/tabby cat/3.png", ("a photo of a tabby cat",)),
        ("golden_retriever/1.png", ("a photo of a golden retriever",)),
        ("golden_retriever/2.png", ("a photo of a golden retriever",)),
    ]
    rows = [{"file_name": "4.png", "label": [None, "mixed_breed"]}, {"file_name": "a/tabby cat/3.png", "label": 7}]
    metadata(tmp_path / "train", rows)
    source = open_source(tmp_path, "train", Columns(template="a photo of a {}", caption="label"))
    assert [c for _, (c,) in contents(source)] == ["a photo of a mixed breed", "a photo of a 7"]


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "a/../../secret.png",
        "/etc/passwd",
        "a\0.png",
        "..\\secret.png",
        "C:\\x.png",
        "\\\\host\\x.png",
        "..",
        "",
        None,
        3,
        ["a.png"],
        "\ud800.png",
    ],
)
def test_hostile_names_are_refused(tmp_path, name):
    image(tmp_path / "secret.png")
    for k in range(2):
        image(tmp_path / "data" / f"{k}.png")
    rows = [{"file_name": "0.png", "text": "t"}, {"file_name": "1.png", "text": "t"}, {"file_name": name, "text": "t"}]
    with pytest.raises(UserError, match="row 3: file_name"):
        open_source(metadata(tmp_path / "data", rows), "train")


@pytest.mark.parametrize("what", ["image", "folder", "metadata", "text", "split"])
def test_links_out_of_the_folder_are_refused(tmp_path, what):
    outside, data = tmp_path / "outside", tmp_path / "data"
    image(outside / "secret.png")
    (outside / "secret.txt").write_text("a secret")
    captioned(outside / "set", 2)
    for k in range(2):
        image(data / f"{k}.png")
    rows = [{"file_name": f"{k}.png", "text": "t"} for k in range(2)]
    match what:
        case "image":
            (data / "link.png").symlink_to(outside / "secret.png")
            metadata(data, [*rows, {"file_name": "link.png", "text": "t"}])
        case "folder":
            (data / "sub").symlink_to(outside)
            metadata(data, [*rows, {"file_name": "sub/secret.png", "text": "t"}])
        case "metadata":
            (data / "metadata.jsonl").symlink_to(metadata(outside, rows) / "metadata.jsonl")
        case "text":
            (data / "0.txt").symlink_to(outside / "secret.txt")
        case "split":
            (data / "train").symlink_to(outside / "set")
    with pytest.raises(UserError, match=r"is a link to a .* outside"):
        open_source(data, "train")


def test_links_inside_the_folder_and_to_it_are_followed(tmp_path):
    captioned(tmp_path / "data", 3)
    (tmp_path / "data" / "also.png").symlink_to("0001.png")
    rows = [{"file_name": name, "text": "t"} for name in ("0000.png", "also.png")]
    metadata(tmp_path / "data", rows)
    (tmp_path / "link").symlink_to("data")
    names = {n for s in ("train", "test") for n, _ in contents(open_source(tmp_path / "link", s))}
    assert names == {"0000.png", "also.png"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ('{"file_name": "0.png", "text": "t"}\n{"file_name": ', "near line 2"),
        ("[1, 2]\n", "line 1: must be a JSON object .* but is a list"),
        ('{"file_name": "0.png", "text": 5}', "caption '5' must be a text"),
        ('{"file_name": "0.png", "text": {"a": "b"}}', "must be a text"),
        ("[" * 100_000, "can't be read near line 1"),
        (b'{"file_name": "0.png", "text": "\xff"}', "can't be read"),
        ('{"file_name": "nothing.png", "text": "t"}', r"lists 1 files, but none of them is in .* 'nothing.png'"),
    ],
)
def test_invalid_metadata_is_refused(tmp_path, text, message):
    for k in range(2):
        image(tmp_path / f"{k}.png")
    (tmp_path / "metadata.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        open_source(tmp_path, "train")


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="--data is missing"):
        open_source("", "train")
    with pytest.raises(UserError, match=r"must be an existing folder, .parquet or .tar file"):
        open_source(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match=r"no images in .*: looked for metadata.jsonl, metadata.csv, and .png"):
        open_source(tmp_path, "train")
    for k in range(3):
        image(tmp_path / f"{k}.PNG")
    with pytest.raises(UserError, match="3 images but no captions: looked for"):
        open_source(tmp_path, "train")
    assert len(open_source(tmp_path, "train", Columns(captioned=False))) == 2
    with pytest.raises(UserError, match="at least two are needed"):
        open_source(captioned(tmp_path / "one", 1), "train")


def test_missing_files_are_counted(tmp_path):
    for k in range(2):
        image(tmp_path / f"{k}.png")
    os.mkfifo(tmp_path / "pipe.png")  # opening it would block forever
    names = ["0.png", "1.png", "missing.png", "pipe.png", "x" * 5000]
    source = open_source(metadata(tmp_path, [{"file_name": n, "text": "t"} for n in names]), "train")
    assert len(source) == 1
    assert {name for name, _ in source.left_out} == set(names[2:])
    assert "3 left out" in str(source)


def test_fingerprint_depends_on_content_and_not_on_location(tmp_path):
    one, two = (open_source(captioned(tmp_path / name, 30), "train") for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint
    name = one[0].name
    image(tmp_path / "one" / name, size=(64, 64))
    assert open_source(tmp_path / "one", "train").fingerprint != two.fingerprint
    rows = [json.loads(line) for line in (tmp_path / "two" / "metadata.jsonl").read_text().splitlines()]
    changed = [row | {"text": "other"} if row["file_name"] == name else row for row in rows]
    assert open_source(metadata(tmp_path / "two", changed), "train").fingerprint != two.fingerprint


def test_packed_strings_read_back_unchanged():
    strings = ["", "ü\n", "a" * 1000, "\udc80 from a file system", "日本"]
    packed = Strings(strings)
    assert [packed[k] for k in range(len(packed))] == strings
    again = pickle.loads(pickle.dumps(packed))
    assert [again[k] for k in range(len(again))] == strings


# -- decoding -------------------------------------------------------------------------------------------------------

RGB = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def decoded(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def png16(path: Path, pixels: np.ndarray, colour_type: int) -> None:
    """Write a 16-bit PNG, which Pillow can't write in colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    h, w = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, colour_type, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_rgb_is_exact(tmp_path, form):
    Image.fromarray(RGB).save(tmp_path / "x", form, lossless=True)
    np.testing.assert_array_equal(decoded(tmp_path / "x"), RGB)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "big-endian TIFF"])
def test_16_bit_grey_is_scaled(tmp_path, form):
    grey = RNG.integers(0, 65536, (20, 30), dtype=np.uint16)
    grey[0, :3] = 0, 65535, 257 * 100
    match form:
        case "PNG" | "TIFF":
            Image.fromarray(grey).save(tmp_path / "x", form)
        case _:
            Image.frombytes("I;16B", (30, 20), grey.astype(">u2").tobytes()).save(tmp_path / "x", "TIFF")
    found = decoded(tmp_path / "x")
    assert found[0, :3, 0].tolist() == [0, 255, 100]
    np.testing.assert_array_equal(found, np.rint(grey / 257).astype(int)[..., None].repeat(3, 2))


@pytest.mark.parametrize(("channels", "colour_type"), [(2, 4), (3, 2), (4, 6)])
def test_16_bit_colour_and_alpha_are_scaled(tmp_path, channels, colour_type):
    wide = RNG.integers(0, 65536, (20, 30, channels), dtype=np.uint16)
    png16(tmp_path / "x", wide, colour_type)
    colour = wide[..., : channels - (channels % 2 == 0)] / 257
    alpha = wide[..., -1:] / 65535 if channels % 2 == 0 else 1
    expected = np.broadcast_to(colour * alpha + 255 * (1 - alpha), (20, 30, 3))
    assert np.abs(decoded(tmp_path / "x") - expected).max() < 2


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk(tmp_path, form):
    ink = np.zeros((32, 48, 4), np.uint8)
    ink[:, :16], ink[:, 16:32], ink[:, 32:] = (255, 0, 0, 0), (0, 0, 0, 128), (0, 255, 255, 0)  # cyan, grey, red
    Image.fromarray(ink, "CMYK").save(tmp_path / "x", form, **({"quality": 100} if form == "JPEG" else {}))
    found = decoded(tmp_path / "x")[16, [8, 24, 40]]
    assert np.abs(found - [(0, 255, 255), (127, 127, 127), (255, 0, 0)]).max() <= 3


def test_cmyk_mixes_inks(tmp_path):
    ink = RNG.integers(0, 256, (8, 8, 4), dtype=np.uint8)
    Image.fromarray(ink, "CMYK").save(tmp_path / "x", "TIFF")
    expected = 255 * (1 - ink[..., :3] / 255) * (1 - ink[..., 3:] / 255)
    assert np.abs(decoded(tmp_path / "x") - expected).max() <= 1


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, form, orientation):
    """The EXIF standard defines where the image's row 0 and column 0 appear; NumPy puts them there."""
    upright = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: x.swapaxes(0, 1)[:, ::-1],
        7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
        8: lambda x: x.swapaxes(0, 1)[::-1],
    }[orientation]
    blocks = np.kron(RGB[:2, :3], np.ones((16, 16, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {"lossless": True} if form == "WEBP" else {}
    Image.fromarray(blocks).save(tmp_path / "x", form, exif=exif, **options)
    found = decoded(tmp_path / "x")
    assert found.shape == upright(blocks).shape
    assert np.abs(found - upright(blocks)).max() <= (4 if form == "JPEG" else 0)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_over_the_background(tmp_path, form, mode):
    pixels = RNG.integers(0, 256, (20, 30, len(mode)), dtype=np.uint8)
    pixels[0, :2, -1] = 0, 255
    Image.fromarray(pixels, mode).save(tmp_path / "x", form, lossless=True, exact=True)
    alpha = pixels[..., -1:] / 255
    for background in ((255, 255, 255), (0, 128, 255)):
        expected = pixels[..., :-1] * alpha + np.array(background) * (1 - alpha)
        found = np.asarray(load_image(tmp_path / "x", background=background)).astype(int)
        assert found[0, 0].tolist() == list(background)
        assert np.abs(found - expected).max() <= 1


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.fromarray(RNG.integers(0, 3, (20, 30), dtype=np.uint8), "P")
    colours = np.array([(255, 0, 0), (0, 200, 0), (0, 0, 90)])
    image.putpalette(colours.astype(np.uint8).tobytes())
    index = np.asarray(image)
    for form in ("PNG", "GIF", "BMP", "TIFF"):
        image.save(tmp_path / "x", form)
        np.testing.assert_array_equal(decoded(tmp_path / "x"), colours[index])
    for form, transparency in (("PNG", 1), ("GIF", 1), ("PNG", bytes([255, 0, 255]))):
        image.save(tmp_path / "x", form, transparency=transparency)
        np.testing.assert_array_equal(decoded(tmp_path / "x"), np.where(index[..., None] == 1, 255, colours[index]))
    image.save(tmp_path / "x", "PNG", transparency=bytes([255, 51, 255]))  # a fifth of it opaque
    assert np.abs(decoded(tmp_path / "x")[index == 1] - (204, 244, 204)).max() <= 1


def test_transparent_colour(tmp_path):
    pixels = RGB.copy()
    pixels[:5] = 1, 2, 3
    Image.fromarray(pixels).save(tmp_path / "x", "PNG", transparency=(1, 2, 3))
    pixels[:5] = 255
    np.testing.assert_array_equal(decoded(tmp_path / "x"), pixels)


def test_grey_and_black_and_white(tmp_path):
    Image.fromarray(RGB[..., 0]).save(tmp_path / "grey", "PNG")
    np.testing.assert_array_equal(decoded(tmp_path / "grey"), RGB[..., :1].repeat(3, 2))
    Image.fromarray(RGB[..., 0] > 128).save(tmp_path / "bits", "PNG")
    np.testing.assert_array_equal(decoded(tmp_path / "bits"), 255 * (RGB[..., :1] > 128).repeat(3, 2))


@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP", "TIFF"])
def test_animations_give_their_first_frame(tmp_path, form):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "x", form, save_all=True, append_images=frames[1:], lossless=True)
    assert (decoded(tmp_path / "x") == (255, 0, 0)).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_range_are_refused(tmp_path, mode):
    Image.new(mode, (8, 8)).save(tmp_path / "x", "TIFF")
    with pytest.raises(DamagedImage, match="no fixed range of values"):
        load_image(tmp_path / "x")


def test_a_limit_above_pillows_own_applies(tmp_path):
    Image.new("1", (14_000, 14_000)).save(tmp_path / "x.png")
    assert image_size(tmp_path / "x.png", max_pixels=10**9) == (14_000, 14_000)
    with pytest.raises(DamagedImage, match=r"14000 × 14000 pixels; up to 89,478,485 are accepted"):
        image_size(tmp_path / "x.png")


def test_bombs_are_refused_before_they_are_decoded(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "x", "PNG")
    with pytest.raises(DamagedImage, match="30 × 20 pixels; up to 599 are accepted"):
        load_image(tmp_path / "x", max_pixels=599)
    load_image(tmp_path / "x", max_pixels=600)
    for side in (10_000, 12_000, 60_000):  # below, between and above Pillow's own two limits; never 8 bytes a pixel
        raw = bytearray((tmp_path / "x").read_bytes())
        raw[16:24] = struct.pack(">II", side, side)
        raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
        (tmp_path / "bomb").write_bytes(raw)
        with pytest.raises(DamagedImage, match=r"accepted|exceeds limit"):
            load_image(tmp_path / "bomb")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8])
def test_truncated_images_are_damaged_and_not_filled_with_grey(tmp_path, form, share):
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "x", form)
    raw = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(DamagedImage):
        load_image(tmp_path / "x")


def test_other_files_are_damaged_images(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "other.ppm")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "vector.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (tmp_path / "folder.png").mkdir()
    for name in ("other.ppm", "text.png", "vector.png", "folder.png", "missing.png"):
        with pytest.raises(DamagedImage, match=r"not an image of an accepted format|directory|No such file"):
            load_image(tmp_path / name)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_flipped_bytes_give_an_image_or_a_reason(tmp_path, form):
    Image.fromarray(RGB).save(tmp_path / "x", form)
    sound = np.frombuffer((tmp_path / "x").read_bytes(), np.uint8)
    outcomes = set()
    for trial in range(150):
        rng = np.random.default_rng(trial)
        raw = sound.copy()
        where = rng.integers(0, len(raw) if trial % 2 else 100, 4)
        raw[where] = rng.integers(0, 256, 4)
        (tmp_path / "x").write_bytes(raw.tobytes())
        try:
            outcomes.add(load_image(tmp_path / "x").mode)
        except DamagedImage as error:
            outcomes.add("damaged" if error.reason else "no reason")
    assert "damaged" in outcomes <= {"RGB", "damaged"}


# -- tensors --------------------------------------------------------------------------------------------------------


def test_a_square_of_the_requested_size_is_unchanged():
    square = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels = to_tensor(Image.fromarray(square), 32)  # (3, h, w)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    np.testing.assert_array_equal(((pixels.numpy() + 1) * 127.5).round().transpose(1, 2, 0), square)
    assert to_tensor(Image.new("RGB", (8, 8), (0, 128, 255)), 8)[:, 0, 0].tolist() == pytest.approx(
        [-1, 1 / 255, 1], abs=1e-6
    )
    torch.testing.assert_close(to_tensor(Image.fromarray(square), 32, flip=True), pixels.flip(2), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(32, 50), (50, 32), (33, 32)])
def test_crops_are_parts_of_the_image(size):
    w, h = size
    pixels = RNG.integers(0, 256, (h, w, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)

    def window(left, top):
        return torch.from_numpy(pixels[top : top + 32, left : left + 32].transpose(2, 0, 1)).float() / 127.5 - 1

    torch.testing.assert_close(to_tensor(image, 32), window((w - 32) // 2, (h - 32) // 2))
    torch.testing.assert_close(to_tensor(image, 32, crop="random", place=(0.0, 0.0)), window(0, 0))
    last = float(np.nextafter(1, 0))
    torch.testing.assert_close(to_tensor(image, 32, crop="random", place=(last, last)), window(w - 32, h - 32))


def test_shrinking_does_not_alias():
    """Stripes finer than the new pixels become their mean, and a smooth wave is unchanged."""
    stripes = np.tile(np.array([0, 255], np.uint8), (256, 128))
    small = to_tensor(Image.fromarray(stripes).convert("RGB"), 32)
    assert float(small[:, 4:-4, 4:-4].abs().max()) < 0.02
    x = (np.arange(256) + 0.5) / 256
    wave = np.rint(127.5 + 100 * np.sin(2 * np.pi * 2 * x)).astype(np.uint8)
    found = to_tensor(Image.fromarray(np.tile(wave, (256, 1))).convert("RGB"), 32)[0, 16].numpy()
    expected = 100 / 127.5 * np.sin(2 * np.pi * 2 * (np.arange(32) + 0.5) / 32)
    assert np.abs(found - expected)[2:-2].max() < 0.02


# -- folders that this project has written --


OUTPUTS = {
    "run": (
        "config.yaml",
        "metrics.jsonl",
        ".lock",
        "samples/step-00000010.png",
        "checkpoints/step-00000010/state.json",
    ),
    "report of data": ("report.json", "contact_sheet.png", "duplicates.jsonl"),
    "report of a model": ("report.json", "samples.png"),
    "report of an autoencoder": ("report.json", "reconstructions.png"),
}


def output(folder: Path, kind: str) -> None:
    for name in OUTPUTS[kind]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image(path) if path.suffix == ".png" else path.write_text("{}")


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("form", ["captions", "no captions", "classes", "metadata", "a link"])
def test_outputs_inside_the_data_are_not_read(tmp_path: Path, kind: str, form: str) -> None:
    """Else, with --data X --out X/runs/a, the samples of a run would be images of the next."""
    data, columns = tmp_path / "data", Columns(captioned=False)
    for k in range(4):
        image(data / f"cats/{k}.png").with_suffix(".txt").write_text(f"cat {k}")
    match form:
        case "no captions":
            for path in data.rglob("*.txt"):
                path.unlink()
        case "classes":
            columns = Columns(template="a photo of {}")
        case "metadata":
            metadata(data, [{"file_name": f"cats/{k}.png", "text": "cat"} for k in range(4)])
        case "a link":
            columns = Columns(follow_links=True)
    before = open_source(str(data), "train", columns)
    output(data / "runs/a", kind)
    output(data / "b", kind)
    if form == "a link":
        output(tmp_path / "elsewhere", kind)
        (data / "linked").symlink_to(tmp_path / "elsewhere")
    after = open_source(str(data), "train", columns)
    assert [row.name for row in after.catalogue] == [f"cats/{k}.png" for k in range(4)]
    assert after.fingerprint == before.fingerprint
    assert any("with a run or a report of this project" in note for note in after.notes)


def test_the_samples_of_a_run_can_be_the_data(tmp_path: Path) -> None:
    output(tmp_path / "a", "run")
    for data in (tmp_path / "a", tmp_path / "a/samples"):
        assert len(find_splits(str(data), Columns(captioned=False))[""]()) == 1
    assert len(find_splits(str(tmp_path), Columns(captioned=False, reading=1))[""]()) == 1  # as before
