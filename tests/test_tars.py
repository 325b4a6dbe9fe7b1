"""Tars give the same dataset as the folder that they were made from; hostile, damaged and changing tars."""

import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train.data.sources.tars as tars_module
from ldm.errors import RunError, UserError
from support import ROOT
from train.data.images import MAX_BYTES
from train.data.images.decode import DamagedImage
from train.data.sources.catalogue import Columns, fingerprint, lowest_hashes
from train.data.sources.folders import find_folder
from train.data.sources.tar_index import NoValidIndex, TarIndex, open_index, stat_parts
from train.data.sources.tars import Tars, expand, find_tars

NAMES = ("train", "validation", "val", "valid", "test")
CAPTIONED = Columns()
ANY = Columns(captioned=False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(k: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3 + k % 5, 4), (k % 256, 7, 9)).save(file, "PNG")
    return file.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def write_tar(path: Path, members, **how) -> Path:
    """Write a tar. members: pairs (name, content) or TarInfo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **how) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def numbered(ks, captioned: bool = True):
    """Return the members of numbered samples, such as 0007.png and 0007.txt."""
    for k in ks:
        yield f"{k:04d}.png", png(k)
        if captioned:
            yield f"{k:04d}.txt", f"image {k}\n".encode()


def opened(data, columns: Columns = CAPTIONED, split: str = "") -> Tars:
    splits = find_tars(str(data), columns, NAMES)
    assert splits is not None
    return splits[split]()


def rows(catalogue):
    return [(row.name, row.size, row.captions) for row in catalogue]


# -- samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_give_the_same_dataset_as_their_folder(tmp_path, form):
    folder = tmp_path / "folder"
    for k in range(60):
        path = folder / ("a", "b/ü", "c" * 90 + "/" + "d" * 60)[k % 3] / f"{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(k))
        if k % 5:
            path.with_suffix(".txt").write_text(f" Nr. {k} ä \n\n second\r\nthird" if k % 2 else "", encoding="utf-8")
    (folder / "a" / ".hidden.png").write_bytes(png(1))
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    cut = names.index("b/ü/031.png")
    for number, own in enumerate((names[:cut], names[cut:])):
        members = [(f"./{name}", (folder / name).read_bytes()) for name in own]
        write_tar(tmp_path / f"tars/{number}.tar", members, format=form)
    there = find_folder(str(folder), Columns(), NAMES)[""]()
    here = opened(tmp_path / "tars")
    assert rows(here) == rows(there)
    assert [here.read(k) for k in range(len(here))] == [there.read(k) for k in range(len(there))]
    assert here.fingerprint == there.fingerprint == fingerprint(iter(here))
    assert here.lowest_hashes == there.lowest_hashes == lowest_hashes(iter(here))
    assert here.uncaptioned == there.uncaptioned > 0
    assert here.left_out == ()


@pytest.mark.parametrize(
    ("columns", "members", "captions"),
    [
        (Columns(), {"txt": b"one\n two \n\n"}, ("one", "two")),
        (Columns(), {"txt": b"\xef\xbb\xbfbom"}, ("bom",)),
        (Columns(), {"txt": b"caf\xe9 \xff"}, ("café ÿ",)),
        (Columns(), {"json": b'{"caption": ["a", " b "], "text": null}'}, ("a", "b")),
        (Columns(), {"json": b'{"caption": "c", "text": "t\\nu"}'}, ("t\nu",)),
        (Columns(), {"json": b'{"text": "\\ud800x"}'}, ("?x",)),
        (Columns(), {"json": b'{"text": "j"}', "txt": b"t"}, ("t",)),
        (Columns(), {"json": b"not json", "txt": b"t"}, ("t",)),
        (Columns(caption="alt"), {"json": b'{"alt": "j"}', "txt": b"t"}, ("j",)),
        (Columns(caption="en.txt"), {"en.txt": b"english", "txt": b"t"}, ("english",)),
        (Columns(caption=".json"), {"json": b'{"text": "j"}', "txt": b"t"}, ("j",)),
        (Columns(template="a photo of a {}"), {"cls": b"golden_retriever\n"}, ("a photo of a golden retriever",)),
        (Columns(template="a {}"), {"cls": b"7", "txt": b"seven"}, ("seven",)),
        (Columns(template="a {}", caption="cls"), {"cls": b"7", "txt": b"seven"}, ("a 7",)),
        (Columns(template="a {}", caption="label"), {"json": b'{"label": 7}'}, ("a 7",)),
        (Columns(), {"cls": b"7"}, ("",)),
        (Columns(), {"json": b'{"other": 1}'}, ("",)),
        (Columns(), {}, ("",)),
    ],
)
def test_captions(tmp_path, columns, members, captions):
    members = [("x/0.jpg", png(0)), *((f"x/0.{e}", c) for e, c in members.items()), *numbered([1])]
    write_tar(tmp_path / "a.tar", members)
    columns = Columns(**{**columns.__dict__, "captioned": False})
    assert opened(tmp_path / "a.tar", columns).row(0).captions == captions


def test_by_the_first_rules_a_sample_is_adjacent_members_of_one_key(tmp_path):
    members = [
        ("k.txt", b"of k"),
        ("k.seg.png", png(1)),
        ("k.JPG", png(2)),
        ("k.png", png(3)),
        ("d/k.png", png(4)),
        ("d.e/k.png", png(5)),
        ("k.png", png(6)),
        ("other", b""),
        ("k.txt", b"too late"),
    ]
    catalogue = opened(write_tar(tmp_path / "a.tar", members), Columns(reading=1))
    assert [(r.name, r.captions) for r in catalogue] == [
        ("k.JPG", ("of k",)),
        ("d/k.png", ("",)),
        ("d.e/k.png", ("",)),
        ("k.png", ("",)),
    ]
    assert [catalogue.read(k) for k in range(4)] == [png(2), png(4), png(5), png(6)]
    assert [name for name, _ in catalogue.left_out] == ["a.tar/other", "a.tar/k"]
    named = opened(tmp_path / "a.tar", Columns(image="seg.png"))
    assert [(r.name, named.read(k)) for k, r in enumerate(named)] == [("k.seg.png", png(1))]


def test_a_sample_is_all_members_of_one_key_and_their_first_image(tmp_path):
    members = [
        ("a.png", png(1)),
        ("b.JPG", png(2)),
        ("a.txt", b"of a"),
        ("c.seg.png", png(3)),
        ("d/a.png", png(4)),
        ("b.txt", b"of b"),
        ("b.jpg", png(5)),
        ("b.txt", b"again"),
        ("v1.0_x.png", png(6)),
    ]
    catalogue = opened(write_tar(tmp_path / "a.tar", members))
    assert [(r.name, r.captions) for r in catalogue] == [("a.png", ("of a",)), ("b.JPG", ("of b",)), ("d/a.png", ("",))]
    assert [catalogue.read(k) for k in range(3)] == [png(1), png(2), png(4)]
    assert [name for name, _ in catalogue.left_out] == ["a.tar/b", "a.tar/c", "a.tar/v1"]
    assert "1 more image with the same name" in catalogue.left_out[0][1]
    assert "a key ends at the first dot of a name; rename 'v1.0_x.png'" in catalogue.left_out[2][1]
    assert catalogue.notes == ("a.tar: the files of a sample aren't adjacent; they were collected",)


def test_samples_without_captions_are_read_only_on_request(tmp_path):
    write_tar(tmp_path / "a.tar", numbered(range(3), captioned=False))
    with pytest.raises(UserError, match=r"has 3 images but no captions: looked for"):
        opened(tmp_path)
    assert opened(tmp_path, ANY).uncaptioned == 3


# -- what --data names ------------------------------------------------------------------------------------------------


def test_forms_and_splits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/train-0.tar", "a/train_1.tar", "a/val.tar", "a/trainer.tar", "b/train/x.tar", "b/val/test-1.tar"):
        write_tar(tmp_path / name, numbered(range(3)))

    def found(data):
        splits = find_tars(data, Columns(), NAMES)
        return splits and {k: [os.path.relpath(p, tmp_path) for p in s.args[1]] for k, s in splits.items()}

    assert found("a") == {"train": ["a/train-0.tar", "a/train_1.tar"], "": ["a/trainer.tar"], "val": ["a/val.tar"]}
    assert found("b") == {"train": ["b/train/x.tar"], "val": ["b/val/test-1.tar"]} == found("b/**/*.tar")
    assert found("b/{train,val}/*.tar") == found("b")
    assert found(str(tmp_path / "b/train/*.tar")) == {"": ["b/train/x.tar"]}
    assert found("a/train{-0,_1}.tar") == {"train": ["a/train-0.tar", "a/train_1.tar"]}
    for other in ("tars", "a/x.parquet", "owner/name", "pipe:cat a/val.tar", "https://host/a.tar", "cache"):
        assert found(other) is None
    for wrong, reported in {
        "a/no.tar": "'a/no.tar' doesn't exist",
        "a/x-{0..2}.tar": "'a/x-0.tar' doesn't exist",
        "c/*.tar": r"'c/\*.tar' doesn't exist",
        "a/x.tar.gz": "pipe:",
        "x{0..9999999}.tar": "expands to more than 1,000,000 files",
    }.items():
        with pytest.raises(UserError, match=reported):
            found(wrong)
    os.mkfifo(tmp_path / "fifo.tar")
    with pytest.raises(UserError, match="pipe:cat"):
        found("fifo.tar")


def test_braces():
    assert expand("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert expand("{3..1}") == ["3", "2", "1"]
    assert expand("{0..10}")[-2:] == ["9", "10"]
    assert expand("{00..10}")[0] == "00"
    assert expand("{a,b}{0..1}") == ["a0", "a1", "b0", "b1"]
    assert expand("{a,{b,c}}") == ["a", "b", "c"]
    assert expand("{}x{y}") == ["{}x{y}"]


# -- hostile and damaged ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_hostile_members_are_left_out(tmp_path, streamed):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(99))
    device = tarfile.TarInfo("device.png")
    device.type = tarfile.CHRTYPE
    sparse = tarfile.TarInfo("sparse.png")
    sparse.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1"}
    nul = tarfile.TarInfo("n")
    nul.pax_headers = {"path": "nul\0.png"}
    members = [
        ("good.png", png(1)),
        ("good.txt", b"good"),
        ("../up.png", png(2)),
        ("a/../../up2.png", png(2)),
        ("/rooted.png", png(2)),
        ("C:\\windows.png", png(2)),
        ("a\\..\\x/b.png", png(2)),
        nul,
        link("symbolic.png", str(secret)),
        link("hard.png", "good.png", tarfile.LNKTYPE),
        device,
        sparse,
        ("linked.png", png(3)),
        link("linked.txt", "/etc/passwd"),
        ("long.png", png(4)),
        ("long.txt", b"x" * (2**20 + 1)),
        ("bad.png", png(5)),
        ("bad.json", b"{"),
        ("deep.png", png(5)),
        ("deep.json", b"[" * 100_000),
        ("number.png", png(6)),
        ("number.json", b'{"text": 5}'),
        ("list.png", png(6)),
        ("list.json", b"[]"),
        ("last.png", png(7)),
        ("last.txt", b"last"),
    ]
    path = write_tar(tmp_path / "in" / "a.tar", members, format=tarfile.PAX_FORMAT)
    before = {p for p in tmp_path.rglob("*") if "cache" not in p.parts}
    if streamed:
        left_out, given = [], []
        with tarfile.open(path, "r|", tarinfo=tars_module.Header) as tar:
            for sample in tars_module.read_samples(tar, Columns(), lambda *of: left_out.append(of), images=True):
                given.append((sample.name, sample.image, sample.captions))
    else:
        catalogue = opened(path)
        left_out = [(name.removeprefix("a.tar/"), why) for name, why in catalogue.left_out]
        given = [(row.name, catalogue.read(k), row.captions) for k, row in enumerate(catalogue)]
    assert given == [("good.png", png(1), ("good",)), ("last.png", png(7), ("last",))]
    reasons = {
        "../up": "has an unsafe path",
        "a/../../up2": "has an unsafe path",
        "rooted": "has an unsafe path",
        "C:\\windows": "has an unsafe path",
        "a\\..\\x/b": "has an unsafe path",
        "nul\0": "has an unsafe path",
        "symbolic": "is a link",
        "hard": "is a link",
        "device": "special file",
        "sparse": "special file",
        "linked": "is a link",
        "long": "1,048,577 bytes",
        "bad": "can't be read",
        "deep": "can't be read",
        "number": "must be a text",
        "list": "must be an object",
    }
    assert [name for name, _ in left_out] == list(reasons)
    for name, why in left_out:
        assert reasons[name] in why, (name, why)
    assert {p for p in tmp_path.rglob("*") if "cache" not in p.parts} == before


def test_many_left_out_are_counted_not_listed(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.png", png(0)), ("a.txt", b"a"), *((f"{k}.npz", b"") for k in range(1000))])
    left_out = opened(tmp_path).left_out
    assert len(left_out) == 101
    assert left_out[-1] == ("a.tar", "900 more samples")


@pytest.mark.parametrize("at", [0, 700, 1100, 512 * 20 + 3, 512 * 37])
def test_a_truncated_tar_gives_the_samples_before_its_end(tmp_path, at):
    content = write_tar(tmp_path / "full.tar", numbered(range(10))).read_bytes()
    expected = rows(opened(tmp_path / "full.tar"))
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/a.tar").write_bytes(content[:at])
    write_tar(tmp_path / "cut/b.tar", numbered([50]))
    if at == 0:
        with pytest.raises(UserError, match=r"a\.tar is not a tar file \(empty file\)"):
            opened(tmp_path / "cut")
        return
    catalogue = opened(tmp_path / "cut")
    here = rows(catalogue)
    count = len(here) - 1
    assert here == [*expected[:count], ("0050.png", len(png(50)), ("image 50",))]
    assert count == (at - 512) // 2048  # a sample is two headers with a block each; the next one marks its end
    assert all(catalogue.read(k) == png(k) for k in range(count))
    ((name, why),) = catalogue.left_out
    assert name == "a.tar"
    assert f"truncated after {count} images" in why


def test_a_damaged_header_ends_a_tar_and_is_reported(tmp_path):
    data = bytearray(write_tar(tmp_path / "a.tar", numbered(range(4))).read_bytes())
    data[2048 * 2 + 1] ^= 4
    (tmp_path / "a.tar").write_bytes(data)
    catalogue = opened(tmp_path)
    # The sample before the damage is lost too, because its end isn't known.
    assert [row.name for row in catalogue] == ["0000.png"]
    assert "damaged" in catalogue.left_out[0][1]


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157] = name, size.ljust(12, b"\0"), kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "block",
    [
        header(b"x.png", b"\xff" * 10 + b"\xfe\x00"),  # −512: a loop to itself
        header(b"x.png", b"\xff" * 10 + b"\xff\x9c"),
        header(b"x", b"77777777777", b"x"),  # 8 GiB of extended headers
        header(b"x", b"77777777777", b"L"),
        header(b"x", b"\xff" * 12, b"x"),
        b"".join([header(b"x", b"0", b"x")] * 3000),  # deeper than the stack
        header(b"x", b"16", b"x") + b"14 size=-1536\n".ljust(512, b"\0") + header(b"y.png", b"0"),
    ],
)
def test_headers_that_loop_or_fill_the_memory(tmp_path, block):
    start = write_tar(tmp_path / "a.tar", numbered(range(3))).read_bytes()[: 2048 * 3]
    (tmp_path / "a.tar").write_bytes(start + block)
    os.truncate(tmp_path / "a.tar", 2**28)  # a sparse file
    started = time.perf_counter()
    tracemalloc.start()
    catalogue = opened(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()
    assert [row.name for row in catalogue][:2] == ["0000.png", "0001.png"]
    assert "damaged" in catalogue.left_out[0][1]
    assert time.perf_counter() - started < 5


def test_other_files_are_refused_as_tars(tmp_path):
    for content, reported in ((b"hello" * 999, "is not a tar"), (b"\x1f\x8b" + bytes(999), "pipe:gzip -dc")):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(UserError, match=reported):
            opened(tmp_path)
    write_tar(tmp_path / "a.tar", [("a.txt", b"only text")])
    with pytest.raises(UserError, match="no images in"):
        opened(tmp_path)


def test_a_huge_member_is_a_row_that_is_not_read(tmp_path):
    info = tarfile.TarInfo("huge.png")
    info.size = MAX_BYTES + 1
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(info.tobuf())
        file.truncate(512 + (info.size + 511) // 512 * 512 + 1024)  # a sparse file
    catalogue = opened(tmp_path, ANY)
    assert catalogue.row(0).size == MAX_BYTES + 1
    with pytest.raises(DamagedImage, match="up to 1,073,741,824"):
        catalogue.read(0)


# -- the index --------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of tars whose headers are read."""
    names: list[str] = []
    rows = tars_module._rows

    def counted(columns, part, left_out):
        names.append(os.path.basename(part.path))
        return rows(columns, part, left_out)

    monkeypatch.setattr(tars_module, "_rows", counted)
    return names


def index_folder(cache: Path) -> Path:
    (folder,) = (cache / "ldm" / "index").iterdir()
    return folder


def three_tars(folder: Path) -> Path:
    for k, name in enumerate("abd"):
        write_tar(folder / f"{name}.tar", numbered(range(10 * k, 10 * k + 10)))
    return folder


def fresh(data, cache: Path, monkeypatch):
    """Return the catalogue of a newly built index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "fresh"))
    catalogue = opened(data)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return rows(catalogue), catalogue.fingerprint, catalogue.lowest_hashes, catalogue.uncaptioned, catalogue.left_out


def same(catalogue, expected) -> None:
    contents = [catalogue.read(k) for k in range(len(catalogue))]
    assert contents == [png(int(row.name[:4])) for row in catalogue]
    about = catalogue.fingerprint, catalogue.lowest_hashes, catalogue.uncaptioned, catalogue.left_out
    assert (rows(catalogue), *about) == expected


def test_only_what_changed_is_read_again(tmp_path, cache, reads, monkeypatch):
    data = three_tars(tmp_path / "data")
    opened(data)
    assert reads == ["a.tar", "b.tar", "d.tar"]
    opened(data)
    assert len(reads) == 3
    write_tar(data / "c.tar", [*numbered(range(40, 45)), ("0045.png", png(45)), ("x.txt", b"")])
    write_tar(data / "b.tar", numbered(range(50, 57)))
    reads.clear()
    catalogue = opened(data)
    assert reads == ["b.tar", "c.tar"]
    (data / "a.tar").unlink()
    reads.clear()
    later = opened(data)
    assert reads == []
    os.utime(data / "d.tar", ns=(1, 1))
    touched = opened(data)
    assert reads == ["d.tar"]
    same(touched, fresh(data, cache, monkeypatch))
    assert rows(touched) == rows(later)
    assert rows(catalogue)[10:] == rows(later)  # the older catalogue still reads its own files
    with pytest.raises(FileNotFoundError):
        catalogue.read(0)
    with pytest.raises(RunError, match=r"d\.tar was changed while in use"):
        later.read(len(later) - 1)
    assert len(list((cache / "ldm/index").glob("*/*.rows"))) == 1


@pytest.mark.parametrize("damage", ["cut rows", "cut lines", "about", "no about", "parts", "foreign", "no rows"])
def test_a_damaged_index_is_built_again(tmp_path, cache, reads, monkeypatch, damage):
    data = three_tars(tmp_path / "data")
    expected = fresh(data, cache, monkeypatch)
    (cache / "fresh").rename(tmp_path / "away")
    opened(data)
    folder = index_folder(cache)
    (rows_file,), (lines,), (parts,) = (list(folder.glob(f"*.{kind}")) for kind in ("rows", "lines", "parts"))
    about = folder / "about.json"
    match damage:
        case "cut rows":
            os.truncate(rows_file, rows_file.stat().st_size - 3)
        case "cut lines":
            os.truncate(lines, lines.stat().st_size // 2)
        case "about":
            about.write_text(about.read_text().replace('"lowest": [[0.', '"lowest": [[0.5'))
        case "no about":
            about.write_bytes(b"[]")
        case "parts":
            parts.write_bytes(parts.read_bytes().replace(b", 0, []]", b", 7, []]"))  # uncaptioned
        case "foreign":
            write_tar(tmp_path / "other" / "a.tar", numbered(range(60, 70)))
            opened(tmp_path / "other")
            other = next(f for f in (cache / "ldm/index").iterdir() if f != folder)
            for path in other.iterdir():
                (folder / path.name).write_bytes(path.read_bytes())
        case "no rows":
            rows_file.unlink()
    reads.clear()
    same(opened(data), expected)
    assert set(reads) <= {"a.tar", "b.tar", "d.tar"}
    same(opened(data), expected)


@pytest.mark.parametrize("kind", ["rows", "lines"])
def test_a_flipped_bit_is_reported_and_repaired(tmp_path, cache, reads, monkeypatch, kind):
    data = three_tars(tmp_path / "data")
    expected = fresh(data, cache, monkeypatch)
    (cache / "fresh").rename(tmp_path / "away")
    catalogue = opened(data)
    (path,) = index_folder(cache).glob(f"*.{kind}")
    content = bytearray(path.read_bytes())
    size = len(content)
    for at in (0, 9, size // 2, size - 2):
        flipped = content.copy()
        flipped[at] ^= 8
        path.write_bytes(flipped)
        with pytest.raises(RunError, match="is damaged: run the same command again"):
            list(opened(data))
        reads.clear()
        catalogue = opened(data)
        assert reads == [["a.tar"], ["a.tar"], ["b.tar"], ["d.tar"]][(0, 9, size // 2, size - 2).index(at)]
        same(catalogue, expected)
        (path,) = index_folder(cache).glob(f"*.{kind}")


def _open_and_tell(data: str, log: str, barrier, answers) -> None:
    rows = tars_module._rows

    def slow(columns, part, left_out):
        with open(log, "a") as file:
            file.write(f"{os.path.basename(part.path)}\n")
        time.sleep(0.1)
        return rows(columns, part, left_out)

    tars_module._rows = slow
    barrier.wait(60)
    catalogue = opened(data)
    answers.put((catalogue.fingerprint, [row.name for row in catalogue]))


def test_processes_that_start_together_build_it_once(tmp_path):
    data = three_tars(tmp_path / "data")
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_open_and_tell, args=(str(data), str(tmp_path / "log"), barrier, answers))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    reported = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert (tmp_path / "log").read_text().split() == ["a.tar", "b.tar", "d.tar"]
    assert reported[0] == reported[1] == reported[2]
    assert len(reported[0][1]) == 30


def test_a_killed_build_is_continued(tmp_path, cache, reads, monkeypatch):
    data = three_tars(tmp_path / "data")
    code = """if True:
        import os, signal, sys
        import train.data.sources.tars as tars
        from train.data.sources.catalogue import Columns
        rows = tars._rows
        def killed(columns, part, left_out):
            for number, row in enumerate(rows(columns, part, left_out)):
                if part.path.endswith("d.tar") and number == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield row
        tars._rows = killed
        tars.find_tars(sys.argv[1], Columns(), ())[""]()
    """
    for _ in range(4):  # repeated, because leftovers must not accumulate
        killed = subprocess.run([sys.executable, "-c", code, str(data)], cwd=ROOT)
        assert killed.returncode == -signal.SIGKILL
    assert not (index_folder(cache) / "about.json").exists()
    assert len(list(index_folder(cache).glob("*.parts"))) <= 3
    catalogue = opened(data)
    assert reads == ["d.tar"]
    same(catalogue, fresh(data, cache, monkeypatch))


def test_workers_read_what_the_process_reads(tmp_path):
    data = three_tars(tmp_path / "data")
    catalogue = opened(data)
    expected = [(catalogue.row(k), catalogue.read(k)) for k in range(30)]
    assert b"_files" in pickle.dumps(catalogue)
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(catalogue.row, range(30)) == [row for row, _ in expected]
            assert pool.map(catalogue.read, range(30)) == [content for _, content in expected]
    copy = pickle.loads(pickle.dumps(catalogue))
    write_tar(data / "c.tar", numbered([40]))
    opened(data)
    assert catalogue.row(29) == expected[29][0]
    with pytest.raises(RunError, match="replaced while in use"):
        copy.row(0)


def test_an_unwritable_cache_gives_a_warning(tmp_path, monkeypatch):
    data = three_tars(tmp_path / "data")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=".*file/ldm/index/.* isn't writable"):
        catalogue = opened(data)
    assert len(catalogue) == 30
    assert catalogue.read(29) == png(29)


def test_a_record_that_points_outside_its_tar_is_not_read(tmp_path):
    """The record's checksum is right."""
    path = write_tar(tmp_path / "a.tar", numbered([0]))

    def read(part, left_out):
        row = next(iter(opened(path)))
        yield part.size - 1, row

    index = open_index(tmp_path / "index", [str(path)], read)
    with pytest.raises(RunError, match="is damaged"):
        index[0]
    with pytest.raises(NoValidIndex):
        TarIndex(tmp_path / "index", stat_parts([str(path)]))


def test_memory_does_not_grow_with_the_tar(tmp_path):
    """Names of 10 MB in total, one per sample and all in one sample."""
    for distinct in (True, False):
        path = tmp_path / f"{distinct}.tar"
        with open(path, "wb") as file:
            for k in range(2000):
                info = tarfile.TarInfo(f"{k if distinct else 0}-{'x' * 5000}.png")
                file.write(info.tobuf(tarfile.PAX_FORMAT))
            file.write(bytes(1024))
        tracemalloc.start()
        catalogue = opened(path, ANY)
        assert tracemalloc.get_traced_memory()[1] < 2**22
        tracemalloc.stop()
        assert len(catalogue) == (2000 if distinct else 1)


def test_indices_beyond_the_rows(tmp_path):
    catalogue = opened(three_tars(tmp_path / "data"))
    for k in (-1, 30, np.int64(31)):
        with pytest.raises(IndexError):
            catalogue.row(k)
    assert json.dumps(catalogue.lowest_hashes)
