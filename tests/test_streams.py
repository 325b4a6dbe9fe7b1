"""Streams give each example once an epoch, in an order that any start continues, for every kind of address."""

import bz2
import contextlib
import gzip
import http.server
import io
import itertools
import lzma
import os
import pickle
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from ldm.errors import RunError, UserError
from train.data.sources import streams
from train.data.sources.catalogue import Columns, Row, lowest_hashes
from train.data.sources.streams import Example, Stream, is_stream
from train.data.sources.tars import find_tars

CAPTIONED = Columns()


def content(k: int) -> bytes:
    return f"image {k}".encode() * (1 + k % 7)


def write_tar(path: Path, ks, captioned: bool = True, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for k in ks:
            for extension, data in (("png", content(k)), ("txt", f"caption {k}\n".encode())):
                if extension == "png" or captioned:
                    info = tarfile.TarInfo(f"{k:04d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return path


def example(k: int) -> Example:
    return Example(f"{k:04d}.png", content(k), (f"caption {k}",))


@pytest.fixture
def shards(tmp_path) -> str:
    """The address of 60 examples in 5 shards of unequal length."""
    ends = [0, 3, 20, 21, 45, 60]
    for number, (a, b) in enumerate(itertools.pairwise(ends)):
        write_tar(tmp_path / f"{number}.tar", range(a, b))
    return f"file://{tmp_path}/{{0..4}}.tar"


def take(stream: Stream, count: int, seed: int = 0, start: int = 0) -> list[tuple[Example, ...]]:
    with contextlib.closing(stream.examples(seed, start)) as examples:
        return list(itertools.islice(examples, count))


def names(taken) -> list[str]:
    return [first.name for first, *_ in taken]


# -- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer", [1, 7, 1000])
def test_every_epoch_has_each_example_once_but_the_held_out(shards, buffer):
    stream = Stream(shards, CAPTIONED, fraction=0.2, buffer_size=buffer)
    held = {row.name for row in stream.held_out}
    n = 60 - len(held)
    assert len(stream.training) == n
    assert held == {f"{k:04d}.png" for _, k in lowest_hashes(map(row_of, range(60)))[: len(held)]}
    assert 1 < len(held) < 30
    taken = take(stream, 3 * n)
    expected = sorted(example(k) for k in range(60) if f"{k:04d}.png" not in held)
    epochs = [taken[k : k + n] for k in range(0, 3 * n, n)]
    for epoch in epochs:
        assert sorted(first for first, *_ in epoch) == expected
    assert len({tuple(names(epoch)) for epoch in epochs}) == 3
    other = names(take(stream, n, seed=1))
    assert sorted(other) == sorted(names(epochs[0]))
    assert other != names(epochs[0])


def row_of(k: int) -> Row:
    return Row(f"{k:04d}.png", len(content(k)), 0, (f"caption {k}",))


@pytest.mark.parametrize("buffer", [1, 7, 1000])
def test_any_start_continues_exactly(shards, buffer):
    """Examples and substitutes are the same in another process's stream, across the ends of epochs."""
    stream = Stream(shards, CAPTIONED, fraction=0.1, buffer_size=buffer)
    expected = take(stream, 140, seed=5)
    for start in (0, 1, 6, 7, len(stream.training) - 1, len(stream.training), 100, 139):
        again = Stream(shards, CAPTIONED, fraction=0.1, buffer_size=buffer)
        assert take(again, 140 - start, seed=5, start=start) == expected[start:]


def test_held_out_is_an_example_of_a_shard_not_a_name(tmp_path):
    """Each shard numbers its images from 0."""
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", range(900))
    stream = Stream(f"file://{tmp_path}/{{0..2}}.tar", CAPTIONED, fraction=0.01, buffer_size=50)
    counted = Counter(names(take(stream, 2700 - len(stream.held_out))))
    held = Counter(row.name for row in stream.held_out)
    assert counted + held == Counter({f"{k:04d}.png": 3 for k in range(900)})
    assert set(held.values()) >= {2}  # the head ends in the third shard, where an equal name is trained on


@pytest.mark.parametrize("buffer", [10, 1000])
def test_a_buffer_shuffles_neighbours_of_a_shard(shards, buffer):
    """The buffer is much larger than a shard: few pairs of neighbours in a shard are still neighbours."""
    stream = Stream(shards, CAPTIONED, fraction=0.01, buffer_size=buffer)
    order = [int(name[:4]) for name in names(take(stream, len(stream.training)))]
    assert sum(b == a + 1 for a, b in itertools.pairwise(order)) < 15
    firsts = {names(take(stream, 1, seed=seed))[0] for seed in range(60)}
    assert len(firsts) > (25 if buffer > 60 else 15)


def test_substitutes_are_eight_other_examples(shards):
    stream = Stream(shards, CAPTIONED, fraction=0.1, buffer_size=20)
    held = {row.name for row in stream.held_out}
    for position, (_, *others) in enumerate(take(stream, 130)):
        assert len(others) == (8 if position or len(stream.training) > 1 else 0)
        assert not held & {other.name for other in others}
    last = take(stream, len(stream.training))[-1]  # the buffer is empty, so earlier examples are the substitutes
    assert len(set(last[1:])) > 3


def test_one_example_to_train_on(tmp_path):
    write_tar(tmp_path / "a.tar", range(2))
    stream = Stream(f"pipe:cat {tmp_path}/a.tar", CAPTIONED, fraction=0.9)
    assert (len(stream.training), len(stream.held_out)) == (1, 1)
    taken = take(stream, 3)
    assert [len(t) for t in taken] == [1, 9, 9]
    assert {e.name for t in taken for e in t} == {stream.training.row(0).name}


# -- the head ---------------------------------------------------------------------------------------------------------


def test_the_head_equals_the_first_samples_of_the_same_tars_on_disk(tmp_path, shards, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    splits = find_tars(str(tmp_path), CAPTIONED, ())
    assert splits is not None
    disk = splits[""]()
    stream = Stream(shards, CAPTIONED, fraction=0.1)
    held = [k for _, k in disk.lowest_hashes[: len(stream.held_out)]]
    for side, ks in ((stream.held_out, sorted(held)), (stream.training, [k for k in range(60) if k not in held])):
        assert [(r.name, r.size, r.captions) for r in side] == [(r.name, r.size, r.captions) for r in map(disk.row, ks)]
        assert [side.read(k) for k in range(len(side))] == [disk.read(k) for k in ks]
    assert pickle.loads(pickle.dumps(stream)).fingerprint == stream.fingerprint


def test_only_the_head_is_read_for_the_held_out_split(tmp_path):
    log = tmp_path / "log"
    for k in range(3):
        write_tar(tmp_path / f"{k}.tar", range(2000 * k, 2000 * k + (2000 if k < 2 else 1)))
    stream = Stream(f"pipe:f={tmp_path}/{{0..2}}.tar; echo $f >> {log}; cat $f", CAPTIONED, fraction=0.05)
    assert len(stream.training) + len(stream.held_out) == 2048
    assert [Path(line).name for line in log.read_text().split()] == ["0.tar", "1.tar"]
    assert len(stream.training) == len(list(stream.training))


def test_fingerprints_depend_on_addresses_and_columns(shards):
    first = Stream(shards, CAPTIONED, fraction=0.1).fingerprint
    assert first == Stream(shards, CAPTIONED, fraction=0.1).fingerprint
    assert first != Stream(shards, Columns(caption="alt"), fraction=0.1).fingerprint
    assert first != Stream(shards.replace("4", "3"), CAPTIONED, fraction=0.1).fingerprint


# -- what carries it --------------------------------------------------------------------------------------------------


def test_addresses_of_streams_are_recognised(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for data in ("http://h/a.tar", "s3://b/{0..3}.tar", "pipe:cat a", "/dev/stdin", "-", str(tmp_path / "fifo")):
        assert is_stream(data), data
    for data in ("data/a.tar", "owner/name", "", str(tmp_path), "a{0..1}.tar", "owner/name:config", "C:\\data"):
        assert not is_stream(data), data
    for data in ("-", str(tmp_path / "fifo"), "/dev/null"):
        with pytest.raises(UserError, match="give --data 'pipe:COMMAND'"):
            Stream(data, CAPTIONED, fraction=0.1)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, bytes])
def test_compressed(tmp_path, pack):
    plain = write_tar(tmp_path / "a.tar", range(30)).read_bytes()
    (tmp_path / "packed").write_bytes(pack(plain))
    expected = take(Stream(f"pipe:cat {tmp_path}/a.tar", CAPTIONED, fraction=0.1), 70)
    for data in (f"pipe:cat {tmp_path}/packed", f"file://{tmp_path}/packed"):
        assert take(Stream(data, CAPTIONED, fraction=0.1), 70) == expected


class Handler(http.server.SimpleHTTPRequestHandler):
    """Server of a folder; /cut/… announces more bytes than it sends."""

    def do_GET(self):
        if self.path.startswith("/cut/"):
            data = (Path(self.directory) / self.path[5:]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2 // 2048 * 2048])  # up to the end of a sample
            return
        super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    make = lambda *of: Handler(*of, directory=str(tmp_path))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), make) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_over_http(tmp_path, shards, server):
    there = Stream(f"{server}/{{0..4}}.tar", CAPTIONED, fraction=0.1, buffer_size=10)
    assert take(there, 130) == take(Stream(shards, CAPTIONED, fraction=0.1, buffer_size=10), 130)
    with pytest.raises(RunError, match=r"none\.tar can't be opened: HTTP Error 404"):
        take(Stream(f"{server}/none.tar", CAPTIONED, fraction=0.1), 1)
    with pytest.raises(RunError, match=r"cut/3\.tar ended after [\d,]+ of [\d,]+ bytes"):
        take(Stream(f"{server}/cut/3.tar", CAPTIONED, fraction=0.1), 100)
    with pytest.raises(RunError, match=r"can't be opened: .*refused"):
        take(Stream("http://127.0.0.1:9/a.tar", CAPTIONED, fraction=0.1), 1)


def test_other_protocols():
    import fsspec

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for k in range(4):
            info = tarfile.TarInfo(f"{k:04d}.png")
            info.size = len(content(k))
            tar.addfile(info, io.BytesIO(content(k)))
    with fsspec.open("memory://stream/a.tar", "wb") as there:
        there.write(file.getvalue())
    stream = Stream("memory://stream/a.tar", Columns(captioned=False), fraction=0.1)
    assert sorted(names(take(stream, 3))) == sorted(row.name for row in stream.training)
    with pytest.raises(UserError, match=r"nonsense://a can't be opened: .*nonsense"):
        take(Stream("nonsense://a", CAPTIONED, fraction=0.1), 1)
    with pytest.raises(RunError, match="can't be opened"):
        take(Stream("memory://stream/none.tar", CAPTIONED, fraction=0.1), 1)


def test_commands_that_fail(tmp_path):
    path = write_tar(tmp_path / "a.tar", range(20))
    for command, reported in {
        f"cat {path}; echo why not >&2; exit 3": "failed with status 3: why not",
        f"head -c 10240 {path}; exit 4": "failed with status 4: no error message",
        "exit 5": "failed with status 5",
        "no-such-command": "failed with status 127",
        f"cat {path}; kill -9 $$": "failed with status -9",
    }.items():
        with pytest.raises(RunError, match=reported):
            take(Stream(f"pipe:{command}", CAPTIONED, fraction=0.1), 100)
    for command in ("echo hello", "true", "yes"):
        with pytest.raises(UserError, match="is not a tar"):
            take(Stream(f"pipe:{command}", CAPTIONED, fraction=0.1), 1)


def test_a_command_that_isnt_read_to_its_end_is_stopped(tmp_path):
    path = write_tar(tmp_path / "a.tar", range(3000))
    command = f"pipe:echo $$ >> {tmp_path}/pids; sleep 1000 & cat {path}; wait"
    stream = Stream(command, CAPTIONED, fraction=0.1)
    started = time.perf_counter()
    take(stream, 3)
    assert time.perf_counter() - started < 10
    groups = (tmp_path / "pids").read_text().split()
    assert len(groups) == 2

    def alive():
        for process in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = process.read_text().rpartition(")")[2].split()[:3]
                if group in groups and state != "Z":
                    yield process

    while any(alive()):  # a killed process runs until it is scheduled
        assert time.perf_counter() - started < 30
        time.sleep(0.05)


def test_damage_is_skipped_and_reported(tmp_path):
    for k in range(3):
        write_tar(tmp_path / f"{k}.tar", range(10 * k, 10 * k + 10))
    cut = (tmp_path / "1.tar").read_bytes()[: 2048 * 4 + 700]
    (tmp_path / "1.tar").write_bytes(cut)
    with tarfile.open(tmp_path / "2.tar", "a") as tar:
        link = tarfile.TarInfo("evil.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    stream = Stream(f"pipe:cat {tmp_path}/{{0..2}}.tar", CAPTIONED, fraction=0.01)
    n = len(stream.training)
    assert n + len(stream.held_out) == 24
    first, second = names(take(stream, n)), names(take(stream, 2 * n))[n:]
    assert sorted(first) == sorted(second)
    (one, why), (two, because) = stream.left_out
    assert "1.tar" in one
    assert "truncated after 4 images" in why
    assert two.endswith("2.tar: evil")
    assert "is a link" in because


def test_a_stream_without_examples_is_an_error(tmp_path):
    write_tar(tmp_path / "none.tar", [])
    write_tar(tmp_path / "one.tar", [1])
    write_tar(tmp_path / "bare.tar", range(5), captioned=False)
    for name, error, reported in (
        ("none", RunError, "contains no usable image"),
        ("one", UserError, "has one image"),
        ("bare", UserError, "none of the first 5 images has a caption"),
    ):
        with pytest.raises(error, match=reported):
            take(Stream(f"pipe:cat {tmp_path}/{name}.tar", CAPTIONED, fraction=0.1), 1)
    assert take(Stream(f"pipe:cat {tmp_path}/bare.tar", Columns(captioned=False), fraction=0.1), 9)
    write_tar(tmp_path / "some.tar", range(5))
    once = f"pipe:cat {tmp_path}/some.tar; cp {tmp_path}/none.tar {tmp_path}/some.tar"
    with pytest.raises(RunError, match="a full epoch contained no image to train on"):
        take(Stream(once, CAPTIONED, fraction=0.1), 1)


# -- encodings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp932", "赤い大きな円と小さな青い星"),
        ("cp1251", "Маленькая рыжая кошка сидит на подоконнике"),
        ("utf-16", "a red circle é"),
    ],
)
def test_captions_in_other_encodings_are_read_as_in_folders(encoding: str, text: str, tmp_path: Path) -> None:
    def write(name: str, captions: list[bytes]) -> None:
        with tarfile.open(tmp_path / name, "w") as tar:
            for k, caption in enumerate(captions):
                for extension, data in (("png", content(k)), ("txt", caption)):
                    info = tarfile.TarInfo(f"{k:04d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))

    write("0.tar", [f"plain {k}".encode() for k in range(4)])
    write("1.tar", [f"{text} {k}".encode(encoding) for k in range(4)])
    write("2.tar", ["déjà vu".encode(), *[f"{text} {k}".encode(encoding) for k in range(4, 8)]])
    stream = Stream(f"file://{tmp_path}/{{0..2}}.tar", Columns(), fraction=0.1)
    found = {caption for first, *_ in take(stream, 12) for caption in first.captions}
    found |= {row.captions[0] for row in (stream.held_out.row(k) for k in range(len(stream.held_out)))}
    assert found == {*[f"plain {k}" for k in range(4)], *[f"{text} {k}" for k in range(8)], "déjà vu"}
    assert not stream.left_out
    assert len(stream.training.notes) == (encoding != "utf-16")
    assert all(f"guessed {encoding}, e.g. '0000.txt' is '{text} 0'" in note for note in stream.training.notes)
    assert [first for first, *_ in take(stream, 6, start=6)] == [first for first, *_ in take(stream, 12)][6:]


def test_an_encoding_that_only_later_captions_have_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_HEAD_SIZE", 16)
    write_tar(tmp_path / "0.tar", range(20))
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        for extension, data in (("png", b"image"), ("txt", "赤い大きな円".encode("cp932"))):
            info = tarfile.TarInfo(f"late.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    stream = Stream(f"file://{tmp_path}/{{0..1}}.tar", Columns(), fraction=0.01)
    take(stream, 40)
    assert [reason for name, reason in stream.left_out] == [
        "its .txt isn't UTF-8; give its encoding with --input.encoding, e.g. cp932"
    ]
