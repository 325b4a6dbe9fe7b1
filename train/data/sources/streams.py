"""Tars that are read sequentially: remote ones by address, or the output of a command.

    https://host/data/{000..099}.tar       http and https by Python's own client, others (s3://, gs://) by fsspec
    pipe:zstd -dc /disk/{000..099}.tar.zst one command per shard, run by the shell; braces are expanded first

gzip, bzip2 and xz are recognised. Samples in a shard are those of train/data/sources/webdataset.py. The content of a
stream isn't known before it is read, so its fingerprint is that of its addresses. Where rows must be known, the head is
used: the first examples, some of which are held out.

An epoch visits the shards in its own order and draws from a buffer of examples read and not yet drawn, until the buffer
is empty: each example once. Each draw is a function of (seed, position) and of the buffer, which is a function of the
draws before. So the examples from any position on are always the same, and to reach a position, those before it are
read again.
"""

import contextlib
import hashlib
import itertools
import json
import os
import signal
import stat
import subprocess
import tarfile
import tempfile
import urllib.request
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ldm.errors import RunError, UserError, one_line
from train.data.order.permutation import permute
from train.data.order.rng import Purpose, generator
from train.data.sources.catalogue import MOST_HELD_OUT, Catalogue, Columns, Row, lowest
from train.data.sources.tars import REMOTE, expand
from train.data.sources.webdataset import DAMAGE, Header, read_samples

_HEAD = 2048
_STAND_INS = 8
_RECENT = 64  # examples that may be substitutes besides the buffer's, when it runs low
_LISTED = 10_000  # examples left out, by name
_TIMEOUT = 60  # seconds without data
_REST = 2**26  # bytes that a command may write after the end of its tar


class Example(NamedTuple):
    """An image with its captions, as streamed."""

    name: str
    image: bytes
    captions: tuple[str, ...]


Examples = Generator[Example, None, None]


class Memory(Catalogue):
    """Examples kept in memory."""

    def __init__(self, place: str, examples: Sequence[Example]) -> None:
        self.place, self.examples = place, list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def row(self, k: int) -> Row:
        name, image, captions = self.examples[k]
        return Row(name, len(image), 0, captions)

    def read(self, k: int) -> bytes:
        return self.examples[k].image


class _Head(NamedTuple):
    training: Memory
    held_out: Memory
    skipped: frozenset[tuple[int, str]]
    """(shard, name) of the held-out examples."""


def is_stream(data: str) -> bool:
    """Return whether `--data` names something that can only be read sequentially."""
    return bool(REMOTE.match(data)) or data == "-" or _is_pipe(data)


class Stream:
    """Endless, shuffled examples of a stream.

    Raises UserError for input that can't be read more than once or isn't a tar. Reading the head raises UserError if it
    has fewer than two images, or no caption although `columns.captioned`. Raises RunError for failures while reading.
    """

    def __init__(self, data: str, columns: Columns, *, held_out: float, buffer: int = 1000) -> None:
        """held_out: share of the head. buffer: number of examples in memory from which the next one is drawn."""
        if not REMOTE.match(data):
            raise UserError(f"--data {data!r} can be read only once: write 'pipe:COMMAND', which is run every epoch")
        self.place, self.columns, self.share, self.buffer = data, columns, held_out, buffer
        self.urls = expand(data)
        about = [self.urls, columns.image, columns.caption, columns.template]
        self.fingerprint = hashlib.sha256(os.fsencode(json.dumps(about))).hexdigest()
        self._left_out: dict[str, str] = {}

    @property
    def training(self) -> Catalogue:
        """The head's examples that are trained on."""
        return self.head.training

    @property
    def held_out(self) -> Catalogue:
        """The head's other examples, never among `examples`."""
        return self.head.held_out

    @property
    def left_out(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of what was left out so far, at most 10,000."""
        return tuple(self._left_out.items())

    def examples(self, seed: int, start: int = 0) -> Generator[tuple[Example, ...], None, None]:
        """Yield an example and 8 substitutes for it if it is damaged, from position `start` on and without end.

        (In a stream with a single training example, the first has no substitutes.) To reach `start`, everything before
        it is read again, because an epoch's length isn't known otherwise.
        """
        position, recent = 0, deque[Example](maxlen=_RECENT)
        for epoch in itertools.count():
            epoch_start = position
            shards = permute(np.arange(len(self.urls)), len(self.urls), seed, epoch)
            with contextlib.closing(self._epoch(shards.tolist())) as incoming:
                waiting = list(itertools.islice(incoming, self.buffer))
                while waiting:
                    random = generator(seed, Purpose.STREAM, position)
                    k = int(random.integers(len(waiting)))
                    drawn, last = waiting[k], waiting.pop()
                    if k < len(waiting):
                        waiting[k] = last
                    waiting.extend(itertools.islice(incoming, 1))
                    if position >= start:
                        pool = waiting if len(waiting) >= _RECENT else [*waiting, *recent]
                        others = random.integers(len(pool), size=_STAND_INS).tolist() if pool else []
                        yield drawn, *(pool[j] for j in others)
                    recent.append(drawn)
                    position += 1
            if position == epoch_start:
                raise RunError(f"{self.place} gave no image to train on in a whole epoch{self._why()}")

    @cached_property
    def head(self) -> _Head:
        """First 2,048 examples, with shards in the order given."""
        with contextlib.closing(self._all(range(len(self.urls)))) as examples:
            numbered = list(itertools.islice(examples, _HEAD))
        shards, first = [shard for shard, _ in numbered], [example for _, example in numbered]
        whole = Memory(self.place, first)
        if not first:
            raise RunError(f"{self.place} gave no image{self._why()}")
        if len(first) < 2:
            raise UserError(f"{self.place} has one image: at least two are needed, as one is held out")
        if self.columns.captioned and whole.uncaptioned == len(first):
            raise UserError(f"{self.place}: none of the first {len(first):,} images has a caption beside it")
        nearest = lowest(whole)[:MOST_HELD_OUT]
        count = min(max(sum(place < self.share for place, _ in nearest), 1), len(first) - 1)
        held = {k for _, k in nearest[:count]}
        skipped = frozenset((shards[k], first[k].name) for k in held)
        return _Head(
            Memory(self.place, [e for shard, e in zip(shards, first, strict=True) if (shard, e.name) not in skipped]),
            Memory(self.place, [first[k] for k in sorted(held)]),
            skipped,
        )

    def _epoch(self, shards: Sequence[int]) -> Examples:
        skipped = self.head.skipped
        for shard, example in self._all(shards):
            if (shard, example.name) not in skipped:
                yield example

    def _all(self, shards: Sequence[int]) -> Generator[tuple[int, Example], None, None]:
        """Yield (shard, example) of these shards in turn."""
        for shard in shards:
            with contextlib.closing(self._read(self.urls[shard])) as examples:
                yield from ((shard, example) for example in examples)

    def _read(self, url: str) -> Examples:
        def leave_out(name: str, reason: str) -> None:
            if len(self._left_out) < _LISTED:
                self._left_out.setdefault(f"{url}: {name}" if name else url, reason)

        given, refused = 0, ""
        tar: tarfile.TarFile | None = None
        with _opened(url) as file:
            try:
                tar = tarfile.open(  # noqa: SIM115  closed with what it reads
                    fileobj=file, mode="r|*", tarinfo=Header, encoding="utf-8", errors="surrogateescape"
                )
                for sample in read_samples(tar, self.columns, leave_out, images=True):
                    given += 1
                    yield Example(sample.name, sample.image, sample.captions)
            except DAMAGE as error:
                if tar is None:
                    refused = str(error)
                else:
                    leave_out("", f"damaged or cut short after {given:,} images: {error}")
        if refused:  # raised only now, as a failed command gives a better message
            raise UserError(f"{url} gives no tar ({refused}): a .tar, .tar.gz, .tar.bz2 or .tar.xz is accepted")

    def _why(self) -> str:
        return f"; e.g. {': '.join(self.left_out[0])}" if self.left_out else ""


class _Reader:
    """Reader of a stream for tarfile; its errors name the stream."""

    def __init__(self, url: str, file: Any, length: int | None = None) -> None:
        self.url, self.file, self.length, self.got = url, file, length, 0

    def read(self, count: int) -> bytes:
        try:
            data: bytes = self.file.read(count)
        except Exception as error:  # each protocol has its own exceptions
            raise RunError(f"{self.url} broke off after {self.got:,} bytes: {one_line(error, 300)}") from error
        self.got += len(data)
        if not data and self.length is not None and self.got < self.length:
            raise RunError(f"{self.url} broke off after {self.got:,} of {self.length:,} bytes")
        return data


@contextlib.contextmanager
def _opened(url: str) -> Iterator[Any]:
    if url.startswith("pipe:"):
        with _running(url) as output:
            yield _Reader(url, output)
        return
    try:
        if url.startswith(("http://", "https://")):
            file: Any = urllib.request.urlopen(url, timeout=_TIMEOUT)
            length = file.length
        else:
            import fsspec

            file, length = fsspec.open(url, "rb").open(), None
    except (ImportError, ValueError) as error:
        raise UserError(f"{url} can't be opened: {one_line(error, 300)}") from None
    except Exception as error:
        raise RunError(f"{url} can't be opened: {one_line(error, 300)}") from error
    with contextlib.closing(file):
        yield _Reader(url, file, length)


@contextlib.contextmanager
def _running(url: str) -> Iterator[Any]:
    """Yield the output of a command. Raises RunError if it fails; a command that isn't read to its end is stopped."""
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            url.removeprefix("pipe:"),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
        output: Any = process.stdout
        status = 0
        try:
            yield output
            if any(not output.read(2**16) for _ in range(_REST // 2**16)):
                status = process.wait()
        finally:
            if process.poll() is None:  # including every process that the shell has started
                os.killpg(process.pid, signal.SIGKILL)
            output.close()
            process.wait()
        stderr.seek(0)
        last = stderr.read()[-300:].decode(errors="replace").strip().splitlines()[-1:]
    if status:
        raise RunError(f"{url} ended with status {status}: {''.join(last) or 'no error message'}")


def _is_pipe(data: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        mode = os.stat(data).st_mode
        return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)
    return False
