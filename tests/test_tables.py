"""The same images as parquet files, saved `datasets` and from the hub; refused data and paths that are never opened."""

import io
import json
import os
import pickle
import socket
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PillowImage

from ldm.errors import RunError, UserError
from train.data.sources.catalogue import Columns
from train.data.sources.tables import find_tables

NAMES = ("train", "validation", "val", "valid", "test")
PLAIN = Image(decode=False)


@pytest.fixture(autouse=True)
def _caches(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))

    def connect(*args, **kwargs):
        raise AssertionError("nothing here needs a network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


def png(k: int) -> bytes:
    pixels = np.random.default_rng(k).integers(0, 256, (6 + k % 5, 8, 3), dtype=np.uint8)
    PillowImage.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


IMAGES = {f"{k:03d}.png": png(k) for k in range(50)}


def rows(names=tuple(IMAGES), **columns) -> dict:
    return {"image": [{"bytes": IMAGES[n], "path": n} for n in names], "text": [f"of {n}" for n in names]} | columns


def dataset(table=None, **features) -> Dataset:
    table = rows() if table is None else table
    made = Dataset.from_dict({name: values for name, values in table.items() if name != "image"})
    images = pa.array(table["image"], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    made = made.add_column("image", images.to_pylist(), feature=PLAIN) if len(made.column_names) else made
    for name, feature in features.items():
        made = made.cast_column(name, feature)
    return made


def parquet(file: Path, table=None, **features) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    # The content that to_parquet would write; to_parquet itself would open files at paths.
    made = dataset(table, **features).data.table
    pq.write_table(made.cast(made.schema), file, row_group_size=20)
    return file


def bare(file: Path, table: dict) -> Path:
    """Write a parquet file without the metadata of `datasets`."""
    pq.write_table(pa.table(table), file)
    return file


def opened(data, split="", **columns):
    return find_tables(str(data), Columns(**columns), NAMES)[split]()


def contents(catalogue) -> dict:
    assert all(len(catalogue.read(k)) == row.size for k, row in enumerate(catalogue))
    return {row.name: (row.captions, catalogue.read(k)) for k, row in enumerate(catalogue)}


ALL = {name: ((f"of {name}",), data) for name, data in IMAGES.items()}
PARTS = {"train": list(IMAGES)[:30], "test": list(IMAGES)[30:]}


# -- forms ----------------------------------------------------------------------------------------------------------


def test_one_dataset_in_every_form(tmp_path):
    parquet(tmp_path / "one" / "images.parquet")
    for k in range(3):
        parquet(tmp_path / "three" / f"{k}.parquet", rows(list(IMAGES)[k * 20 : k * 20 + 20]))
    bare(tmp_path / "bare.parquet", {"image": rows()["image"], "text": rows()["text"]})
    dataset().save_to_disk(tmp_path / "saved")
    dataset().save_to_disk(tmp_path / "shards", num_shards=3)
    forms = ("one", "one/images.parquet", "three", "three/*.parquet", "bare.parquet", "saved", "shards")
    found = [opened(tmp_path / form) for form in forms]
    assert all(contents(catalogue) == ALL for catalogue in found)
    assert [row.name for row in found[0]] == list(IMAGES)
    assert len({catalogue.fingerprint for catalogue in found}) == 1
    assert all(catalogue.left_out == () and catalogue.uncaptioned == 0 for catalogue in found)
    assert found[0].row(0).changed_ns == (tmp_path / "one" / "images.parquet").stat().st_ctime_ns


def test_splits_in_every_form(tmp_path):
    for split, names in PARTS.items():
        halves = (names[: len(names) // 2], names[len(names) // 2 :])
        for k, half in enumerate(halves):
            for file in (f"flat/{split}-{k:05d}-of-00002.parquet", f"data/data/{split}-{k:05d}-of-00002.parquet"):
                parquet(tmp_path / file, rows(half))
            parquet(tmp_path / "folders" / split / f"{k}.parquet", rows(half))
    DatasetDict({split: dataset(rows(names)) for split, names in PARTS.items()}).save_to_disk(tmp_path / "saved")
    for form in ("flat", "data", "folders", "folders/*/*.parquet", "saved"):
        splits = find_tables(str(tmp_path / form), Columns(), NAMES)
        assert set(splits) == set(PARTS)
        for split, names in PARTS.items():
            assert contents(splits[split]()) == {name: ALL[name] for name in names}
    assert set(find_tables(str(tmp_path / "folders" / "train"), Columns(), NAMES)) == {""}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.parquet", "train"),
        ("training.parquet", ""),
        ("val_1.parquet", "val"),
        ("validation.parquet", "validation"),
        ("valid-0.parquet", "valid"),
        ("tests.parquet", ""),
        ("my-test.parquet", ""),
    ],
)
def test_names_of_files_decide_the_split(tmp_path, name, split):
    assert set(find_tables(str(parquet(tmp_path / name)), Columns(), NAMES)) == {split}


def test_other_files_and_folders_are_not_tables(tmp_path):
    (tmp_path / "metadata.parquet").write_bytes(b"")
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "state.json").write_text("{}")
    for data in (tmp_path, tmp_path / "a.tar", tmp_path / "*.tar", tmp_path / "nowhere", "./nowhere", "nowhere", ""):
        assert find_tables(str(data), Columns(), NAMES) is None


def test_odd_names_of_files_are_taken_as_they_are(tmp_path):
    for name in ("a[1].parquet", "what?.parquet", "s*.parquet", "ü {x}.parquet"):
        parquet(tmp_path / "we [i]rd" / ".hidden" / name, rows(list(IMAGES)[:3]))
    parquet(tmp_path / "we [i]rd" / ".hidden" / "a1.parquet", rows(list(IMAGES)[3:4]))
    assert len(opened(tmp_path / "we [i]rd" / ".hidden" / "a[1].parquet")) == 3
    assert len(opened(tmp_path / "we [i]rd" / ".hidden")) == 13


def test_workers_and_other_processes_read_the_same(tmp_path):
    catalogue = opened(parquet(tmp_path / "x.parquet"))
    other = pickle.loads(pickle.dumps(catalogue))
    assert contents(other) == ALL
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, catalogue.read(49))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100_000) == IMAGES["049.png"]


def test_changed_files_are_read_anew(tmp_path):
    file = parquet(tmp_path / "x.parquet")
    assert len(opened(file)) == 50
    parquet(file, rows(list(IMAGES)[:7]))
    assert len(opened(file)) == 7


# -- columns --------------------------------------------------------------------------------------------------------


def test_columns_are_found_or_given(tmp_path):
    data = list(IMAGES.values())
    words = {"text": ["t"] * 50, "caption": ["c"] * 50, "prompt": ["p"] * 50}
    for name in ("image", "jpg", "png", "img", "picture"):
        file = bare(tmp_path / f"{name}.parquet", {name: data} | words)
        assert [opened(file).read(k) for k in range(50)] == data
        assert [row.name for row in opened(file)] == [f"{k:08d}" for k in range(50)]
    assert opened(file).row(0).captions == ("t",)
    assert opened(file, caption="prompt").row(0).captions == ("p",)
    large = bare(tmp_path / "large.parquet", {"scan": pa.array(data, pa.large_binary())} | words)
    assert [opened(large, image="scan").read(k) for k in range(50)] == data
    typed = dataset().rename_column("image", "photo").add_column("image", data)
    typed.to_parquet(tmp_path / "typed.parquet")  # "photo" is recognised as the image by its type
    assert contents(opened(tmp_path / "typed.parquet")) == ALL
    assert opened(bare(tmp_path / "none.parquet", {"png": data}), captioned=False).row(0).captions == ("",)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": "scan"}, "no column scan; its columns are: text, image"),
        ({"caption": "title"}, "no column title; its columns are: text, image"),
        ({"caption": "title", "captioned": False}, "no column title; its columns are: text, image"),
        ({"image": "text"}, "column 'text' has the type string; must contain the bytes of images"),
        ({"caption": "image"}, "column 'image' has the type struct.*; must contain texts"),
    ],
)
def test_missing_columns_and_columns_of_other_types_are_refused(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        opened(parquet(tmp_path / "x.parquet"), **columns)


def test_no_usual_columns(tmp_path):
    file = bare(tmp_path / "x.parquet", {"photo": [b"x"], "title": ["t"]})
    with pytest.raises(
        UserError, match=r"no column image or .* picture, text or caption; its columns are: photo, title"
    ):
        opened(file)
    with pytest.raises(UserError, match="'text' has the type double; must contain texts, lists of texts, or labels"):
        opened(bare(tmp_path / "y.parquet", {"image": [b"x"], "text": [1.5]}))


def test_labels_become_captions(tmp_path):
    label = ClassLabel(names=["golden_retriever", "cat"])
    table = {"image": rows()["image"][:4], "label": [0, 1, None, -1]}
    file = parquet(tmp_path / "x.parquet", table, label=label)
    catalogue = opened(file, template="a photo of a {}")
    spoken = [("a photo of a golden retriever",), ("a photo of a cat",), ("",), ("",)]
    assert [row.captions for row in catalogue] == spoken
    assert catalogue.uncaptioned == 2
    dataset(table, label=label).save_to_disk(tmp_path / "saved")
    assert [row.captions for row in opened(tmp_path / "saved", template="a photo of a {}")] == spoken
    with pytest.raises(UserError, match=r"no column text or caption.*label.*--input.caption-template"):
        opened(file)
    with pytest.raises(UserError, match=r"labels, e.g. 'golden_retriever', not captions.*--input.caption-template"):
        opened(file, caption="label")
    numbers = bare(tmp_path / "y.parquet", {"image": [b"x", b"y"], "digit": [7, 3], "name": ["se_ven", None]})
    assert [row.captions for row in opened(numbers, caption="digit", template="{}!")] == [("7!",), ("3!",)]
    assert [row.captions for row in opened(numbers, caption="name", template="{}!")] == [("se ven!",), ("",)]
    with pytest.raises(UserError, match="contains labels, not captions"):
        opened(numbers, caption="digit")


def test_several_captions(tmp_path):
    texts = [["a", " b ", ""], [], None, ["c", None]]
    table = {"image": rows()["image"][:4], "text": texts}
    expected = [("a", "b"), ("",), ("",), ("c",)]
    file = parquet(tmp_path / "x.parquet", table, text=List(Value("string")))
    assert [row.captions for row in opened(file)] == expected
    large = bare(tmp_path / "y.parquet", table | {"text": pa.array(texts, pa.large_list(pa.large_string()))})
    assert [row.captions for row in opened(large)] == expected
    labels = Features({"image": PLAIN, "text": List(ClassLabel(names=["cat", "dog"]))})
    Dataset.from_dict(table | {"text": [[0, 1], [1], [], None]}, features=labels).save_to_disk(tmp_path / "z")
    spoken = [("a cat", "a dog"), ("a dog",), ("",), ("",)]
    assert [row.captions for row in opened(tmp_path / "z", caption="text", template="a {}")] == spoken


def test_rows_without_an_image_are_left_out(tmp_path):
    images = [*rows()["image"][:3], None, {"bytes": None, "path": None}, {"bytes": b"", "path": "empty.png"}]
    table = {"image": [images[k] for k in (0, 3, 1, 4, 2, 5)], "text": list("abcdef")}
    for data in (parquet(tmp_path / "x.parquet", table), bare(tmp_path / "y.parquet", table)):
        catalogue = opened(data)
        assert [(row.name, row.captions) for row in catalogue] == [
            ("000.png", ("a",)),
            ("001.png", ("c",)),
            ("002.png", ("e",)),
            ("empty.png", ("f",)),
        ]
        assert catalogue.read(1) == IMAGES["001.png"]
        assert catalogue.read(3) == b""  # damaged, which the decoder reports
        assert catalogue.left_out == (("00000001", "no image"), ("00000003", "no image"))
        assert contents(pickle.loads(pickle.dumps(catalogue))) == contents(catalogue)
    nothing = parquet(tmp_path / "z.parquet", {"image": [images[3]] * 2, "text": ["a", "b"]})
    with pytest.raises(UserError, match=r"no images: none of its 2 rows has one, e.g. 00000000: no image"):
        opened(nothing)
    empty = {"image": pa.array([], pa.binary()), "text": pa.array([], "string")}
    with pytest.raises(UserError, match="no images: it has no rows"):
        opened(bare(tmp_path / "empty.parquet", empty))
    (tmp_path / "shards").mkdir()
    bare(tmp_path / "shards" / "0.parquet", empty)
    bare(tmp_path / "shards" / "1.parquet", {"image": [b"x"], "text": ["t"]})
    assert len(opened(tmp_path / "shards")) == 1


def test_files_beyond_the_limit_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.sources.arrow.MAX_BYTES", 4)
    table = {"image": [{"bytes": b"x" * k, "path": f"{k}.png"} for k in (4, 5)], "text": ["a", "b"]}
    catalogue = opened(bare(tmp_path / "x.parquet", table))
    assert [row.name for row in catalogue] == ["4.png"]
    assert catalogue.left_out == (("5.png", "5 bytes; up to 4 are accepted"),)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["./a//b.png", "c.png", "d"], ["a/b.png", "c.png", "d"]),
        (["/home/me/a.png", r"C:\me\b.png", r"\\host\c.png"], ["a.png", "b.png", "c.png"]),
        (["../a.png", "b.png", "c.png"], None),
        ([r"a\..\b.png", "b.png", "c.png"], None),
        (["a.png", None, "c.png"], None),
        (["a.png", "zip://b.png::c.zip", "c.png"], None),
        (["https://host/a.png", "b.png", "c.png"], None),
        (["a\0.png", "b.png", "c.png"], None),
        (["x" * 5000, "b.png", "c.png"], None),
    ],
)
def test_names_are_safe_paths_or_numbers(tmp_path, paths, names):
    table = {"image": [{"bytes": b"x", "path": path} for path in paths], "text": ["t"] * 3}
    found = [row.name for row in opened(bare(tmp_path / "x.parquet", table))]
    assert found == (names or ["00000000", "00000001", "00000002"])


def test_a_name_that_all_rows_share_is_not_used(tmp_path):
    def names(paths):
        table = {"image": [{"bytes": b"x", "path": path} for path in paths], "text": ["t"] * len(paths)}
        return {row.name for row in opened(bare(tmp_path / "x.parquet", table))}

    assert len(names(["image.png"] * 50)) == 50
    assert len(names([f"{k // 5}.png" for k in range(50)])) == 10  # five rows an image, which are in one split


# -- with suspicion -------------------------------------------------------------------------------------------------


def test_paths_in_place_of_images_are_never_opened(tmp_path):
    os.mkfifo(tmp_path / "canary")  # opening it would block forever
    away = [str(tmp_path / "canary"), "file://" + str(tmp_path / "canary"), f"zip://a.png::{tmp_path}/canary"]
    away += ["http://localhost:9/a.png", "hf://datasets/a/b/c.png", "canary", "../canary"]
    images = [*rows()["image"][:2], *({"bytes": None, "path": path} for path in away)]
    table = {"image": images, "text": ["t"] * len(images)}
    dataset().save_to_disk(tmp_path / "saved")
    arrow = str(next((tmp_path / "saved").glob("*.arrow")))
    made = dataset(table).data.table  # save_to_disk would open the paths
    with pa.OSFile(arrow, "wb") as file, pa.ipc.new_stream(file, made.schema) as writer:
        writer.write_table(made)
    for data in (parquet(tmp_path / "x.parquet", table), bare(tmp_path / "y.parquet", table), tmp_path / "saved"):
        catalogue = opened(data)
        assert [row.name for row in catalogue] == ["000.png", "001.png"]
        assert len(catalogue.left_out) == len(away)
        assert {reason for _, reason in catalogue.left_out} == {
            "the table contains a path instead of the image's bytes, and paths aren't opened"
        }
    with pytest.raises(UserError, match="column 'image' has the type string; must contain the bytes"):
        opened(bare(tmp_path / "z.parquet", {"image": away, "text": away}))


def test_paths_and_scripts_that_a_folder_names_are_not_used(tmp_path):
    folder, other = tmp_path / "set", parquet(tmp_path / "other.parquet", rows(list(IMAGES)[:3]))
    parquet(folder / "x.parquet", rows(list(IMAGES)[5:9]))
    files = [str(other), "../other.parquet"]
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: default\n  data_files: {json.dumps(files)}\n---\n"
    )
    for script in ("set.py", "x.py", "parquet.py", "conftest.py"):
        (folder / script).write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    assert set(contents(opened(folder))) == set(list(IMAGES)[5:9])
    dataset().save_to_disk(folder / "saved")
    (folder / "saved" / "saved.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    assert contents(opened(folder / "saved")) == ALL
    assert not (tmp_path / "canary").exists()


def test_links_that_lead_out_are_refused(tmp_path):
    out = parquet(tmp_path / "out" / "x.parquet")
    folder = tmp_path / "set"
    parquet(folder / "y.parquet")
    (folder / "inside.parquet").symlink_to("y.parquet")
    assert len(opened(folder)) == 100
    (folder / "train").symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match="link to a file outside"):
        opened(folder)
    (folder / "train").unlink()
    (folder / "z.parquet").symlink_to(out)
    with pytest.raises(UserError, match="link to a file outside"):
        opened(folder)
    assert len(opened(folder / "z.parquet")) == 50  # the user named the file


def test_saved_folders_stay_inside(tmp_path):
    dataset().save_to_disk(tmp_path / "out")
    dataset().save_to_disk(tmp_path / "saved")
    arrow = next((tmp_path / "out").glob("*.arrow"))
    (tmp_path / "saved" / "link.arrow").symlink_to(arrow)
    (tmp_path / "saved" / "a::b.arrow").write_bytes(arrow.read_bytes())
    index = tmp_path / "saved" / "state.json"
    state = json.loads(index.read_text())
    for name, message in [
        ("../out/" + arrow.name, "is outside"),
        (str(arrow), "is outside"),
        ("x/../../out/" + arrow.name, "is outside"),
        ("link.arrow", "link to a file outside"),
        ("a::b.arrow", "is outside"),
        ("a\0", "is outside"),
        ("missing.arrow", "is missing"),
        (5, "lists no files"),
        ("state.json", "can't be read"),
    ]:
        index.write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
        with pytest.raises(UserError, match=message):
            opened(tmp_path / "saved")
    for text in ("", "[]", "{", "[" * 100_000, "{}", '{"_data_files": []}', '{"_data_files": [7]}'):
        index.write_text(text)
        with pytest.raises(UserError, match=r"can't be read|lists no files"):
            opened(tmp_path / "saved")
    index.unlink()
    index.symlink_to(tmp_path / "out" / "state.json")
    with pytest.raises(UserError, match="link to a file outside"):
        opened(tmp_path / "saved")


def test_saved_splits_stay_inside(tmp_path):
    dataset().save_to_disk(tmp_path / "out")
    DatasetDict(train=dataset()).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "link").symlink_to(tmp_path / "out")
    for split in ("../out", str(tmp_path / "out"), "link", "missing", "train/../../out", "a::b", ""):
        (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": [split]}))
        with pytest.raises(UserError, match=r"outside|is missing"):
            opened(tmp_path / "saved", split)
    for text in ("{}", "[]", '{"splits": "train"}', '{"splits": [1]}', '{"splits": []}', "\xff"):
        (tmp_path / "saved" / "dataset_dict.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=r"lists no splits|can't be read"):
            find_tables(str(tmp_path / "saved"), Columns(), NAMES)


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "flipped footer", "folder"])
def test_files_that_are_no_parquet(tmp_path, damage, capfd):
    file = parquet(tmp_path / "x.parquet")
    raw = bytearray(file.read_bytes())
    match damage:
        case "text":
            file.write_text("no parquet")
        case "empty":
            file.write_bytes(b"")
        case "cut":
            file.write_bytes(raw[: len(raw) // 2])
        case "flipped footer":
            raw[-200:-8] = bytes(192)
            file.write_bytes(raw)
        case "folder":
            file.unlink()
            file.mkdir()
    with pytest.raises(UserError, match=r"x.parquet can't be read: ") as raised:
        opened(tmp_path)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_damaged_pages_give_one_line(tmp_path, capfd):
    file = parquet(tmp_path / "x.parquet")
    raw = bytearray(file.read_bytes())
    raw[4:400] = bytes(396)  # the first page, which is only read by the conversion
    file.write_bytes(raw)
    with pytest.raises(UserError, match=r"x.parquet can't be read: ") as raised:
        opened(tmp_path)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_files_that_differ_in_columns(tmp_path):
    parquet(tmp_path / "a.parquet")
    bare(tmp_path / "b.parquet", {"image": [b"x"], "title": ["t"]})
    with pytest.raises(UserError, match=r"b.parquet has no column text, but a.parquet has"):
        opened(tmp_path)


def test_arrow_files_that_point_beyond_themselves(tmp_path):
    images = [b"abc", b"def", b"ghij"]
    Dataset.from_dict({"image": images, "text": ["ab", "cd", "ef"]}).save_to_disk(tmp_path / "saved")
    file = next((tmp_path / "saved").glob("*.arrow"))
    assert [opened(tmp_path / "saved").read(k) for k in range(3)] == images
    sound = file.read_bytes()
    offsets = [
        np.array(ends, np.int32).tobytes() for ends in ([0, 3, 6, 10], [0, 3, 6, 2**30], [0, 6, 3, 10], [0, -9, 6, 10])
    ]
    damage = [(offsets[0], other) for other in offsets[1:]] + [(b"abcdef\0\0", b"ab\xff\xffef\0\0")]
    for old, new in damage:
        assert sound.count(old) == 1
        file.write_bytes(sound.replace(old, new))
        with pytest.raises(UserError, match=r"column '(image|text)' is damaged"):
            opened(tmp_path / "saved")


def test_a_full_disk_is_not_reported_as_damaged_data(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from OSError(
            28, "No space left on device"
        )

    file = parquet(tmp_path / "x.parquet")
    monkeypatch.setattr(Dataset, "from_parquet", full)
    with pytest.raises(RunError, match=r"disk full in .* set HF_DATASETS_CACHE"):
        opened(file)


# -- the hub --------------------------------------------------------------------------------------------------------


class Builder:
    """The part of a `datasets` builder that the code uses."""

    name = "parquet"

    def __init__(self, made: dict, url: str = "hf://datasets/me/set@abc/train.parquet") -> None:
        self.made, self.config = made, SimpleNamespace(data_files={split: [url] for split in made})

    def download_and_prepare(self) -> None: ...

    def as_dataset(self, split: str, in_memory: bool) -> Dataset:
        assert not in_memory
        return self.made[split]


def hub(monkeypatch, answer) -> list:
    asked = []

    def load(*args, **kwargs):
        asked.append((*args, kwargs["revision"]))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    return asked


def test_names_on_the_hub(monkeypatch):
    asked = hub(monkeypatch, Builder({split: dataset(rows(names)) for split, names in PARTS.items()}))
    for data in ("me/set", "me/set:small", "me/set@v1.0", "me/set:small@refs/pr/1"):
        splits = find_tables(data, Columns(), NAMES)
        assert set(splits) == set(PARTS)
        assert contents(splits["test"]()) == {name: ALL[name] for name in PARTS["test"]}
    config, revision = "small", "refs/pr/1"
    assert asked == [
        ("me/set", None, None),
        ("me/set", config, None),
        ("me/set", None, "v1.0"),
        ("me/set", config, revision),
    ]
    one, two = (splits["train"]().row(0).changed_ns for _ in range(2))
    assert one == two != splits["test"]().row(0).changed_ns
    assert 0 < one < 2**63


def test_misspelt_paths_are_not_requested_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    asked = hub(monkeypatch, Builder({"train": dataset()}))
    for data in (
        "data/shapez",
        "./me/set",
        "/me/set",
        "~/set",
        "me/set/",
        "a/b/c",
        "me",
        "../set",
        "http://host/x",
        "me/ set",
    ):
        assert find_tables(data, Columns(), NAMES) is None
    assert asked == []
    assert contents(opened("hf://datasets/data/set", "train")) == ALL
    assert asked == [("data/set", None, None)]


def test_files_in_the_librarys_cache_are_read_as_images(tmp_path, monkeypatch):
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "downloads"
    cache.mkdir(parents=True)
    os.mkfifo(tmp_path / "canary")
    (cache / "abc.png").write_bytes(IMAGES["000.png"])
    (cache / "out.png").symlink_to(tmp_path / "canary")
    paths = [cache / "abc.png", cache / "out.png", f"{cache}/../../canary", tmp_path / "canary", cache / "missing.png"]
    table = {"image": [{"bytes": None, "path": str(path)} for path in paths], "text": list("abcde")}
    hub(monkeypatch, Builder({"train": dataset(table)}))
    catalogue = opened("me/set", "train")
    assert contents(catalogue) == {"abc.png": (("a",), IMAGES["000.png"])}
    assert len(catalogue.left_out) == 4
    assert contents(pickle.loads(pickle.dumps(catalogue))) == contents(catalogue)


@pytest.mark.parametrize("url", ["/etc/passwd", "https://host/x.parquet", "zip://x::https://host/y", "file:///etc/x"])
def test_datasets_that_name_files_elsewhere(monkeypatch, url):
    hub(monkeypatch, Builder({"train": dataset()}, url))
    with pytest.raises(UserError, match="me/set on the hub lists files outside its repository"):
        find_tables("me/set", Columns(), NAMES)


def test_other_kinds_of_datasets_on_the_hub(monkeypatch):
    builder = Builder({"train": dataset()})
    builder.name = "hdf5"
    hub(monkeypatch, builder)
    with pytest.raises(UserError, match="me/set on the hub has the format 'hdf5'"):
        find_tables("me/set", Columns(), NAMES)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'me/set' on the Hub\n(LocalEntryNotFoundError)"),
        datasets.exceptions.DatasetNotFoundError("Dataset 'me/set' doesn't exist on the Hub or cannot be accessed."),
        datasets.exceptions.DatasetNotFoundError("Dataset 'me/set' is a gated dataset on the Hub. You must log in."),
        RuntimeError("Dataset scripts are no longer supported, but found set.py"),
    ],
)
def test_failures_of_the_hub_give_one_line(monkeypatch, error):
    hub(monkeypatch, error)
    with pytest.raises(
        UserError, match=r"'me/set' is not a local file or folder, and .* can't be read: Data|Could"
    ) as raised:
        find_tables("me/set", Columns(), NAMES)
    assert "\n" not in str(raised.value)
