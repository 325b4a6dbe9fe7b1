"""Datasets as other programs and people write them: how they are read, guesses, and reports."""

import csv
import io
import json
import shutil
import sys
import tarfile
import types
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from ldm.errors import UserError
from support.commands import run_script
from train.config.data import DataConfig
from train.data.images.decode import load_image
from train.data.sources import files
from train.data.sources.catalogue import Columns, ignored
from train.data.sources.splits import find_splits, open_source
from train.data.sources.text import evident_encoding, guess_encoding

JAPANESE = ["赤い犬", "青い空と白い雲", "猫が座っている、窓のそば"]
TEXTS = {
    "cp932": JAPANESE,
    "gb18030": ["一只红色的狗", "蓝天白云", "窗边坐着一只猫"],
    "big5": ["一隻紅色的狗", "藍天白雲", "窗邊坐著一隻貓"],
    "cp949": ["빨간 개", "파란 하늘과 흰 구름", "창가에 앉아 있는 고양이"],
    "cp1251": ["красная собака", "синее небо и белые облака", "a dog, собака"],
    "koi8_r": ["красная собака", "синее небо", "кот сидит у окна"],
    "cp1252": ["a café at night", "naïve art – “quoted”", "le chat est à côté"],
    "utf-16-le": JAPANESE,
}


def image(path: Path, kind: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (len(path.name), 30, 40)).save(path, kind)
    return path


def write(folder: Path, content: dict[str, object]) -> Path:
    """Write files by name: images (None), texts, bytes and JSON."""
    for name, of in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if of is None:
            image(path)
        elif isinstance(of, bytes):
            path.write_bytes(of)
        else:
            path.write_text(of if isinstance(of, str) else json.dumps(of), encoding="utf-8")
    return folder


def rows(folder: Path, **how) -> dict[str, tuple[str, ...]]:
    """Return captions by image, of a folder without splits or of all its splits."""
    found = [opener() for opener in find_splits(str(folder), Columns(**how)).values()]
    return {row.name: row.captions for catalogue in found for row in catalogue}


def notes(folder: Path, **how) -> str:
    return "\n".join(note for opener in find_splits(str(folder), Columns(**how)).values() for note in opener().notes)


# -- captions beside images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        {"a.PNG": None, "a.TXT": "a dog"},
        {"a.PNG": None, "a.Txt": "a dog"},
        {"a.PNG": None, "a.caption": "a dog"},
        {"a.PNG": None, "a.CAPTION": "a dog"},
        {"a.PNG": None, "a.PNG.txt": "a dog"},
        {"a.PNG": None, "a.PNG.caption": "a dog"},
        {"a.PNG": None, "a.json": {"caption": "a dog"}},
        {"a.PNG": None, "a.json": {"text": ["a dog"], "width": 4}},
        {"a.PNG": None, "a.PNG.json": {"caption": "a dog"}},
        {"a.PNG": None, "captions/a.txt": "a dog"},
        {"a.PNG": None, "texts/a.txt": "a dog"},
        {"a.PNG": None, "Captions/a.txt": "a dog"},
        {"images/a.PNG": None, "captions/a.txt": "a dog"},
        {"images/x/a.PNG": None, "captions/x/a.txt": "a dog"},
        {"a.PNG": None, "meta_cap.json": {"a": {"caption": "a dog", "tags": "dog"}}},
        {"a.PNG": None, "meta_cap.json": {"a.PNG": {"caption": "a dog"}}},
        {"a.PNG": None, "captions.json": {"a.PNG": "a dog"}},
        {"a.PNG": None, "metadata.json": [{"file_name": "a.PNG", "text": "a dog"}]},
        {
            "a.PNG": None,
            "captions.json": {
                "images": [{"id": 7, "file_name": "a.PNG"}],
                "annotations": [{"image_id": 7, "caption": "a dog"}],
            },
        },
        {"a.PNG": None, "captions.csv": "image,caption\na.PNG,a dog\n"},
        {"a.PNG": None, "captions.tsv": "filename\tcaption\na.PNG\ta dog\n"},
        {"a.PNG": None, "captions.jsonl": '{"file_name": "a.PNG", "prompt": "a dog"}'},
        {"a.PNG": None, "Metadata.CSV": "file_name,text\na.PNG,a dog\n"},
        {"sub/a.PNG": None, "sub/metadata.jsonl": '{"file_name": "a.PNG", "text": "a dog"}'},
        {"x/sub/a.PNG": None, "x/sub/metadata.csv": "file_name,text\na.PNG,a dog\n"},
        {"sub/a.PNG": None, "sub/captions.csv": "file_name,text\na.PNG,a dog\n"},
        {"sub/a.PNG": None, "captions.csv": "file_name,text\nsub/a.PNG,a dog\n"},
    ],
    ids=lambda content: ", ".join(content),
)
def test_captions_are_found(tmp_path, content):
    found = rows(write(tmp_path, content))
    assert list(found.values()) == [("a dog",)]
    assert next(iter(found)).endswith("a.PNG")
    assert notes(tmp_path) == ""


def test_several_subfolders_may_have_metadata_and_others_text_files(tmp_path):
    write(tmp_path, {f"{folder}/{k}.png": None for folder in "abc" for k in range(2)})
    write(tmp_path, {"a/metadata.jsonl": '{"file_name": "0.png", "text": "a0"}', "c/1.txt": "c1"})
    write(tmp_path, {"b/metadata.csv": "file_name,text\n0.png,b0\n1.png,b1\n"})
    assert rows(tmp_path) == {"a/0.png": ("a0",), "b/0.png": ("b0",), "b/1.png": ("b1",), "c/1.png": ("c1",)}
    assert "doesn't name are left out: 2 .png, e.g. " in notes(tmp_path)


@pytest.mark.parametrize("other", ["a.caption", "captions.csv", "metadata.json", "sub/metadata.tsv"])
def test_text_files_are_preferred_and_others_are_named(tmp_path, other):
    write(tmp_path, {"a.png": None, "a.txt": "of the text", other: "file_name,text\na.png,other\n"})
    assert rows(tmp_path) == {"a.png": ("of the text",)}
    assert notes(tmp_path) == f"seen in {tmp_path}, but not read: {other!r}"


def test_files_that_are_not_captions_are_named_in_the_error(tmp_path):
    write(tmp_path, {"a.png": None, "b.png": None, "a.xmp": "x", "b.xmp": "x", "labels.xlsx": b"x", "README.md": "x"})
    write(tmp_path, {"metadata.json": {"version": 1}})
    with pytest.raises(UserError) as raised:
        rows(tmp_path)
    assert "but not read: 2 .xmp, 'labels.xlsx'" in str(raised.value)
    assert "metadata.json, row 1: caption '1' must be a text" in str(raised.value)
    assert len(rows(tmp_path, captioned=False)) == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"text": 5}'])
def test_an_image_whose_json_is_unusable_is_left_out(tmp_path, content):
    write(tmp_path, {"a.png": None, "a.json": content, "b.png": None, "b.json": {"text": "b"}})
    (found,) = (opener() for opener in find_splits(str(tmp_path), Columns()).values())
    assert [row.name for row in found] == ["b.png"]
    assert [name for name, _ in found.left_out] == ["a.png"]


def test_a_caption_column_may_be_an_extension_or_a_key_of_the_json(tmp_path):
    write(tmp_path, {"a.png": None, "a.tags": "dog, red", "a.txt": "t", "a.json": {"alt": "j"}})
    assert rows(tmp_path, caption="tags") == {"a.png": ("dog, red",)}
    assert rows(tmp_path, caption="alt") == {"a.png": ("j",)}
    assert rows(tmp_path) == {"a.png": ("t",)}


def test_names_of_files_are_captions_on_request(tmp_path):
    write(tmp_path / "f", {"a_red dog.png": None, "sub/un_café.jpg": None, "sub/un_café.txt": "not read"})
    assert rows(tmp_path / "f", from_names=True) == {"a_red dog.png": ("a red dog",), "sub/un_café.jpg": ("un café",)}
    named = rows(tmp_path / "f", from_names=True, template="a photo of {}")
    assert named["a_red dog.png"] == ("a photo of a red dog",)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "f", "f")
    assert rows(tmp_path / "x.tar", from_names=True)["f/sub/un_café.jpg"] == ("un café",)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": [b"x"], "text": ["t"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"--input.caption-from-names: .* is a table"):
        rows(tmp_path / "x.parquet", from_names=True)


@pytest.mark.parametrize(("train", "valid"), [("Train", "Valid"), ("TRAIN", "Test"), ("train", "Validation")])
def test_splits_may_be_in_any_case(tmp_path, train, valid):
    write(tmp_path / "f", {f"{s}/{k}.png": None for s in (train, valid) for k in range(2)})
    write(tmp_path / "f", {f"{s}/{k}.txt": s for s in (train, valid) for k in range(2)})
    assert {row.captions for row in open_source(tmp_path / "f", "train")} == {(train,)}
    assert {row.captions for row in open_source(tmp_path / "f", "validation")} == {(valid,)}
    (tmp_path / "t").mkdir()
    for split in (train, valid):
        with tarfile.open(tmp_path / "t" / f"{split}-0.tar", "w") as tar:
            tar.add(tmp_path / "f" / split, "x")
    assert {row.captions for row in open_source(tmp_path / "t", "train")} == {(train,)}
    if train != "train":
        assert set(find_splits(str(tmp_path / "f"), Columns(reading=1))) <= {"", "train"}


def test_files_next_to_splits_are_reported(tmp_path):
    write(tmp_path, {"train/a.png": None, "train/a.txt": "a", "test/b.png": None, "test/b.txt": "b"})
    write(tmp_path, {"c.png": None, "old/d.png": None})
    assert "not read, because beside the splits train, test: 1 image, the folder 'old'" in notes(tmp_path)


# -- encodings and CSV ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", TEXTS)
def test_encodings_of_caption_files_are_guessed_together(tmp_path, encoding):
    for k, text in enumerate(TEXTS[encoding]):
        write(tmp_path, {f"{k}.png": None, f"{k}.txt": text.encode(encoding)})
    assert list(rows(tmp_path).values()) == [(text,) for text in TEXTS[encoding]]
    assert f"aren't UTF-8; guessed {encoding}, e.g. '0.txt' is {TEXTS[encoding][0]!r}" in notes(tmp_path)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted(tmp_path.glob("?.*")):
            tar.add(path, path.name)
    assert list(rows(tmp_path / "x.tar").values()) == [(text,) for text in TEXTS[encoding]]
    assert f"guessed {encoding}, e.g. '0.txt'" in notes(tmp_path / "x.tar")


def test_all_splits_are_read_in_the_same_encoding(tmp_path):
    """One short text alone would be taken for Big5."""
    for k, text in enumerate(TEXTS["cp949"]):
        write(tmp_path, {f"train/{k}.png": None, f"train/{k}.txt": text.encode("cp949")})
    write(tmp_path, {"test/0.png": None, "test/0.txt": "빨간 개".encode("cp949")})
    assert guess_encoding(["빨간 개".encode("cp949")]) == "big5"
    assert open_source(tmp_path, "test")[0].captions == ("빨간 개",)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-8-sig", "utf-32"])
@pytest.mark.parametrize("text", ["a dog", "красная собака", "犬 dog"])
def test_unicode_is_recognised_without_a_guess(encoding, text):
    assert text.encode(encoding).decode(evident_encoding(text.encode(encoding))) == text


def test_a_control_character_does_not_make_utf16():
    assert evident_encoding(b"a dog\x01 runs") == "utf-8"
    assert evident_encoding(b"") == "utf-8"


def test_an_encoding_may_be_given_and_one_that_cannot_be_guessed_is_refused(tmp_path):
    write(tmp_path, {"a.png": None, "a.txt": "Šárka".encode("cp1250"), "b.png": None, "b.txt": "é"})
    assert rows(tmp_path, encoding="cp1250") == {"a.png": ("Šárka",), "b.png": ("é",)}
    (found,) = (opener() for opener in find_splits(str(tmp_path), Columns(encoding="ascii")).values())
    assert found.left_out == (("a.png", "its caption file 'a.txt' isn't ascii"),)
    assert guess_encoding([bytes(range(128, 256))]) == ""
    write(tmp_path, {"a.txt": bytes(range(128, 256)) * 2})
    with pytest.raises(UserError, match=r"a.txt: the encoding of the text can't be guessed; give it with --input.enc"):
        rows(tmp_path)
    ended = run_script("inspect_data", "--data", tmp_path, "--input.encoding", "cp9999")
    assert ended.status == 2
    assert "--input.encoding cp9999: is unknown" in ended.err


@pytest.mark.parametrize("delimiter", [";", "\t", "|", ","])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp1252"])
def test_csv_in_other_dialects(tmp_path, delimiter, encoding):
    captions = {"a.png": 'un café, "rouge"; un | deux', "sub/b.png": "deux\ncafés"}
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([("id", "file_name", "text"), *((k, *row) for k, row in enumerate(captions.items()))])
    write(tmp_path, {**dict.fromkeys(captions), "metadata.csv": text.getvalue().encode(encoding)})
    assert {k: v[0].replace("\r", "") for k, v in rows(tmp_path).items()} == captions
    assert ("columns are separated by" in notes(tmp_path)) == (delimiter != ",")
    assert ("guessed cp1252" in notes(tmp_path)) == (encoding == "cp1252")


def test_csv_in_other_encodings(tmp_path):
    lines = "".join(f"{k}.png,{text}\n" for k, text in enumerate(JAPANESE))
    write(tmp_path, {f"{k}.png": None for k in range(3)})
    write(tmp_path, {"metadata.csv": f"file_name,text\n{lines}".encode("cp932")})
    assert list(rows(tmp_path).values()) == [(text,) for text in JAPANESE]


def test_backslashes_in_csv(tmp_path):
    write(tmp_path, {"sub/a.png": None, "b.png": None})
    write(tmp_path, {"metadata.csv": 'file_name,text\nsub\\a.png,"says \\"hi\\", twice"\nb.png,b\n'})
    assert rows(tmp_path) == {"b.png": ("b",), "sub/a.png": ('says "hi", twice',)}
    assert "escaped by backslashes" in notes(tmp_path)
    write(tmp_path, {"metadata.jsonl": b'{"file_name": "b.png", "text": "caf\xe9"}'})
    with pytest.raises(UserError, match=r"line 1: 'utf-8' .*; save it as UTF-8, or set --input.encoding"):
        rows(tmp_path)
    assert rows(tmp_path, encoding="cp1252") == {"b.png": ("café",)}
    (tmp_path / "metadata.jsonl").unlink()
    write(tmp_path, {"metadata.csv": 'file_name,text\nsub\\a.png,"a ""b"" \\"\nb.png,b\\n\n'})
    assert rows(tmp_path) == {"b.png": ("b\\n",), "sub/a.png": ('a "b" \\',)}


def test_captions_with_commas_outside_quotes_are_complete(tmp_path):
    write(tmp_path, {"a.png": None, "metadata.csv": "file_name,text\na.png,a dog, brown, running\n"})
    assert rows(tmp_path) == {"a.png": ("a dog, brown, running",)}
    assert "1 row has more fields than the header" in notes(tmp_path)
    assert rows(tmp_path, reading=1) == {"a.png": ("a dog",)}


def test_csv_without_a_header_is_refused(tmp_path):
    write(tmp_path, {"a.png": None, "metadata.csv": "a.png,a dog\n"})
    with pytest.raises(UserError, match=r"must be the names of the columns: add file_name,text above it"):
        rows(tmp_path)


# -- images -----------------------------------------------------------------------------------------------------------


def test_jpeg_by_other_names_and_files_that_are_not_images(tmp_path):
    for name in ("a.jfif", "b.JPE", "c.jpg"):
        image(tmp_path / name, "JPEG")
        write(tmp_path, {f"{Path(name).stem}.txt": name})
    write(tmp_path, {"d.svg": "<svg/>", "e.svg": "<svg/>", "f.psd": b"8BPS"})
    assert len(rows(tmp_path)) == 3
    assert notes(tmp_path) == f"seen in {tmp_path}, but not read: 2 .svg (convert them to PNG), 'f.psd'"
    ended = run_script("inspect_data", "--data", tmp_path, "--out", tmp_path / "r", "--workers", 0)
    assert "2 .svg (convert them to PNG)" in ended.out
    assert "2 .svg" in json.loads((tmp_path / "r" / "report.json").read_text())["data"]["notes"][0]


def test_heif_is_counted_or_read(tmp_path, monkeypatch):
    write(tmp_path, {"a.png": None, "a.txt": "a", "b.heic": b"x", "b.txt": "b", "c.HEIF": b"x"})
    if not files.HEIF:
        assert "'b.heic' ('pip install pillow-heif' makes them readable)" in notes(tmp_path)
    monkeypatch.setattr(files, "_SUFFIXES", (*files._SUFFIXES, ".heic", ".heif"))
    assert set(rows(tmp_path)) == {"a.png", "b.heic", "c.HEIF"}


def test_heif_is_read_by_its_plugin(tmp_path):
    plugin = pytest.importorskip("pillow_heif")
    plugin.register_heif_opener()
    Image.new("RGB", (16, 16), (200, 30, 40)).save(tmp_path / "a.heic")
    assert load_image(tmp_path / "a.heic").size == (16, 16)


def test_the_plugin_is_registered_if_it_is_installed(monkeypatch):
    from train.data.images import decode

    called = []
    plugin = types.SimpleNamespace(register_heif_opener=lambda **how: called.append(how))
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    assert decode._register_heif()
    assert called


def test_images_that_the_metadata_does_not_name_are_counted(tmp_path):
    write(tmp_path, {f"{k}.png": None for k in range(4)} | {"x.bmp": None})
    write(tmp_path, {"metadata.jsonl": '{"file_name": "0.png", "text": "t"}\n{"file_name": "1.png", "text": "u"}'})
    assert "metadata.jsonl doesn't name are left out: 2 .png, 1 .bmp, e.g. " in notes(tmp_path)


@pytest.mark.parametrize("junk", ["@eaDir", "__MACOSX", "#recycle", ".thumbnails", "$RECYCLE.BIN", "@Recycle"])
def test_thumbnails_and_recycle_bins_are_ignored(tmp_path, junk):
    write(tmp_path / "f", {"a.png": None, "a.txt": "a", f"{junk}/a.png/SYNOPHOTO_THUMB_M.png": None, "Thumbs.db": b""})
    assert rows(tmp_path / "f") == {"a.png": ("a",)}
    assert notes(tmp_path / "f") == ""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "f", "f")
    assert rows(tmp_path / "x.tar") == {"f/a.png": ("a",)}
    assert ignored("@eaDir", 2)
    assert not ignored("@eaDir", 1)


@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_names_in_either_unicode_form(tmp_path, written):
    on_disk = {"NFC": "NFD", "NFD": "NFC"}[written]
    names = [unicodedata.normalize(on_disk, name) for name in ("é.png", "ü/ö.png", "が.png")]
    write(tmp_path / "t", dict.fromkeys(names))
    for name in names:
        write(tmp_path / "t", {unicodedata.normalize(written, f"{Path(name).stem}.txt"): "t"}) if "/" not in name else 0
    assert rows(tmp_path / "t")[names[0]] == rows(tmp_path / "t")[names[2]] == ("t",)
    lines = [json.dumps({"file_name": unicodedata.normalize(written, n), "text": "t"}) for n in names]
    write(tmp_path / "t", {"metadata.jsonl": "\n".join(lines)})
    assert rows(tmp_path / "t") == dict.fromkeys(sorted(names), ("t",))
    (found,) = (opener() for opener in find_splits(str(tmp_path / "t"), Columns()).values())
    assert found.read(0)


# -- links ------------------------------------------------------------------------------------------------------------


def hub_snapshot(root: Path) -> Path:
    snapshot = root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    lines = "".join(f'{{"file_name": "{k}.png", "text": "{k}"}}\n' for k in range(3))
    for k, name in enumerate(("0.png", "1.png", "2.png", "metadata.jsonl")):
        blob = root / "blobs" / (f"{k:x}" * 3)
        write(blob.parent, {blob.name: lines}) if name[0] == "m" else image(blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


def test_links_that_the_metadata_does_not_name_are_not_opened(tmp_path):
    image(tmp_path / "out.png")
    write(tmp_path / "in", {"a.png": None, "metadata.jsonl": '{"file_name": "a.png", "text": "a"}'})
    (tmp_path / "in" / "b.png").symlink_to(tmp_path / "out.png")
    assert rows(tmp_path / "in") == {"a.png": ("a",)}
    assert "metadata.jsonl doesn't name are left out: 1 .png, e.g. 'b.png'" in notes(tmp_path / "in")


def test_a_hub_snapshot_is_read_on_request(tmp_path):
    snapshot = hub_snapshot(tmp_path)
    with pytest.raises(UserError, match=r"is a link to a file outside .*, or set --input.follow-links True"):
        rows(snapshot)
    assert rows(snapshot, follow_links=True) == {f"{k}.png": (f"{k}",) for k in range(3)}
    assert "--input.follow-links: reads 3 files outside" in notes(snapshot, follow_links=True)


def test_links_to_folders_are_followed_on_request(tmp_path):
    write(tmp_path / "out", {"a.png": None, "a.txt": "a"})
    (tmp_path / "out" / "loop").symlink_to(tmp_path / "out")
    write(tmp_path / "in", {"b.png": None, "b.txt": "b"})
    (tmp_path / "in" / "more").symlink_to(tmp_path / "out")
    assert rows(tmp_path / "in", follow_links=True) == {"b.png": ("b",), "more/a.png": ("a",)}
    (tmp_path / "splits").mkdir()
    for split in ("train", "test"):
        (tmp_path / "splits" / split).symlink_to(tmp_path / "in")
    assert "b.png" in rows(tmp_path / "splits", follow_links=True)
    with pytest.raises(UserError, match=r"input\.follow-links"):
        rows(tmp_path / "splits")


def test_absolute_paths(tmp_path):
    image(tmp_path / "out" / "a.png")
    folder = write(tmp_path / "in", {"b.png": None})
    line = json.dumps({"file_name": str(folder / "b.png"), "text": "b"}) + "\n"
    write(folder, {"metadata.jsonl": line})
    assert rows(folder) == {"b.png": ("b",)}
    outside = [str(tmp_path / "out" / "a.png"), "../out/a.png"]
    for name in outside:
        write(folder, {"metadata.jsonl": line + json.dumps({"file_name": name, "text": "a"})})
        with pytest.raises(UserError, match=r"is outside the folder; .* or set --input.follow-links True"):
            rows(folder)
        assert rows(folder, follow_links=True) == {str(tmp_path / "out" / "a.png"): ("a",), "b.png": ("b",)}
        (found,) = (opener() for opener in find_splits(str(folder), Columns(follow_links=True)).values())
        assert found.read(0) == (tmp_path / "out" / "a.png").read_bytes()


def test_parquet_that_is_a_link_is_read_on_request(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"image": [image(tmp_path / "x.png").read_bytes()], "text": ["t"]}), tmp_path / "blob")
    (tmp_path / "in" / "train-0.parquet").symlink_to("../blob")
    with pytest.raises(UserError, match=r"input\.follow-links"):
        rows(tmp_path / "in")
    assert rows(tmp_path / "in", follow_links=True) == {"00000000": ("t",)}


# -- lines and complete files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["\u2028", "\x0b", "\u0085", "\x0c", "\x1c", "\u2029"])
def test_lines_end_at_line_feeds_only(tmp_path, mark):
    write(tmp_path / "f", {"a.png": None, "a.txt": f"one{mark}two\nthree\r\n".encode()})
    assert rows(tmp_path / "f") == {"a.png": (f"one{mark}two", "three")}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "f", "")
    assert rows(tmp_path / "x.tar") == {"a.png": (f"one{mark}two", "three")}
    assert rows(tmp_path / "f", reading=1) == {"a.png": ("one", "two", "three")}


def test_a_file_may_be_one_caption(tmp_path):
    text = "A dog runs.\n\nThe sky is blue,\nwith clouds.\n"
    write(tmp_path / "f", {"a.png": None, "a.txt": text})
    assert rows(tmp_path / "f") == {"a.png": ("A dog runs.", "The sky is blue,", "with clouds.")}
    assert "1 caption file has empty lines" in notes(tmp_path / "f")
    assert "--input.caption-files whole" in notes(tmp_path / "f")
    assert rows(tmp_path / "f", whole_files=True) == {"a.png": (text.strip(),)}
    assert notes(tmp_path / "f", whole_files=True) == ""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "f", "")
    assert rows(tmp_path / "x.tar", whole_files=True) == {"a.png": (text.strip(),)}


def test_settings_of_captions_are_used_in_reading():
    settings = {"caption_from_names": True, "encoding": "cp932", "follow_links": True, "reading": 1}
    columns = DataConfig(**settings, caption_files="whole").columns(True)
    assert (columns.from_names, columns.whole_files, columns.encoding) == (True, True, "cp932")
    assert (columns.follow_links, columns.reading) == (True, 1)
    assert DataConfig().columns(True) == Columns()


# -- tars -------------------------------------------------------------------------------------------------------------


def test_streams_name_samples_whose_files_are_not_adjacent(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.png", "b.png", "c.png", "a.txt", "b.txt", "c.txt"):
            write(tmp_path, {name: None if name.endswith("png") else name})
            tar.add(tmp_path / name, name)
    assert rows(tmp_path / "x.tar") == {f"{k}.png": (f"{k}.txt",) for k in "abc"}
    from train.data.sources.streams import Stream

    stream = Stream(f"pipe:cat {tmp_path}/x.tar", Columns(), fraction=0.1)
    with pytest.raises(UserError, match=r"its key occurs before, with other files between: in a stream"):
        len(stream.training)


def test_captions_by_other_extensions_in_tars(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.jfif", "a.caption", "b.PNG", "b.TXT"):
            (image(tmp_path / name, "JPEG") if name[2] in "jP" else write(tmp_path, {name: name}))
            tar.add(tmp_path / name, name)
    assert rows(tmp_path / "x.tar") == {"a.jfif": ("a.caption",), "b.PNG": ("b.TXT",)}


# -- runs that were started before ------------------------------------------------------------------------------------

ALL = [
    "--batch-size",
    "2",
    "--log-every",
    "1",
    "--checkpoint-every",
    "2",
    "--validate-every",
    "2",
    "--trackers",
    "--input.resolution",
    "8",
    "--text.vocab-size",
    "600",
    "--text.max-length",
    "8",
    "--text.width",
    "4",
    "--text.layers",
    "1",
    "--text.heads",
    "2",
    "--image.width",
    "4",
    "--image.layers",
    "1",
    "--image.heads",
    "2",
    "--image.patch-size",
    "4",
    "--projection",
    "8",
    "--tokens.echo",
    "0",
]


@pytest.mark.parametrize(
    ("added", "change"),
    [
        ({"0.caption": "new"}, ""),
        ({"0.txt": b"one\x0btwo"}, r"'0.png' had the caption 'one' | 'two', now 'one\x0btwo'"),
        ({"Valid/9.png": None, "Valid/9.txt": "v"}, "its images were called 'Train/0.png', …, now '0.png'"),
        ({"x/9.png": None, "x/9.TXT": "new"}, "'x/9.png' had the caption '', now 'new'"),
    ],
)
def test_a_run_of_the_first_rules_is_continued_if_the_dataset_reads_the_same(tmp_path, added, change):
    folder = "Train/" if any(name.startswith("Valid") for name in added) else ""
    write(tmp_path / "data", {f"{folder}{k}.png": None for k in range(6)})
    write(tmp_path / "data", {f"{folder}{k}.txt": f"image {k}" for k in range(6)})
    write(tmp_path / "data", added)
    line = ["--data", tmp_path / "data", "--out", tmp_path / "run", *ALL]
    assert run_script("train_clip", *line, "--steps", 2, "--input.reading", 1).status == 0
    settings = tmp_path / "run" / "config.yaml"
    settings.write_text("".join(s for s in settings.read_text().splitlines(True) if "  reading:" not in s))
    ended = run_script("train_clip", *line, "--steps", 4)
    if not change:
        assert ended.status == 0, ended.err
        return
    assert ended.status == 2
    assert "--data: is read differently than in the run" in ended.err
    assert change in ended.err
    assert "--input.reading 1" in ended.err
    assert run_script("train_clip", *line, "--steps", 4, "--input.reading", 1).status == 0


def test_the_log_of_a_run_has_the_notes(tmp_path):
    for k, text in enumerate(JAPANESE * 2):
        write(tmp_path / "data", {f"{k}.png": None, f"{k}.txt": text.encode("cp932"), f"{k}.svg": "<svg/>"})
        write(tmp_path / "data", {f"{k}.json": "not read", "x.png": None, "x.json": "["})
    ended = run_script("train_clip", "--data", tmp_path / "data", "--out", tmp_path / "run", *ALL, "--steps", 1)
    assert ended.status == 0, ended.err
    assert "left out of the dataset: 1, listed in" in ended.out
    assert ended.out.count("guessed cp932") == 1
    assert "6 .svg (convert them to PNG)" in ended.out


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    yield
    shutil.rmtree(folder, ignore_errors=True)
