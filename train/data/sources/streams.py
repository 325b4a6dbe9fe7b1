"""Tars that can only be read sequentially: from a remote address, or from the output of a command.

    https://host/data/{000..099}.tar       http and https through Python's client, others (s3://, gs://) through fsspec
    pipe:zstd -dc /disk/{000..099}.tar.zst one command per shard, run by the shell; braces are expanded first

gzip, bzip2 and xz are recognised. The samples of a shard are described in train/data/sources/webdataset.py. The content
of a stream isn't known before it is read, so its fingerprint is computed from its addresses. The stream's first
examples are its head. Some of them are held out. Code that needs examples before training, such as that of the
tokenizer, uses the head.

An epoch reads the shards in its own order into a buffer, and draws examples from the buffer until it is empty: each
example once. A draw depends on (seed, position) and on the buffer, which depends on the earlier draws. So the examples
from any position on are always the same. To reach a position, all examples before it are read again.
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
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from ldm.errors import RunError, UserError, one_line
from train.data.order.permutation import permute
from train.data.order.rng import Purpose, generator
from train.data.sources.catalogue import MOST_HELD_OUT, Catalogue, Columns, Row, lowest_hashes
from train.data.sources.tars import CAPTION_FILES, REMOTE, expand
from train.data.sources.text import guess_encoding, guess_note
from train.data.sources.webdataset import DAMAGE, Header, read_samples, unclear_texts

_HEAD_SIZE = 2048  # examples
_SUBSTITUTES = 8  # per example
_RECENT = 64  # recent examples that may be substitutes too when the buffer is nearly empty
_MOST_LISTED = 10_000  # examples left out that are listed by name
_GUESS_FROM = 100  # caption files of the head from which an encoding is guessed
_TIMEOUT = 60  # seconds without data
_MOST_TRAILING = 2**26  # bytes that a command may write after the end of its tar


class Example(NamedTuple):
    """An image with its captions, as streamed."""

    name: str
    image: bytes
    captions: tuple[str, ...]


Examples = Generator[Example, None, None]


class InMemory(Catalogue):
    """Catalogue of examples that are kept in memory."""

    def __init__(self, location: str, examples: Sequence[Example]) -> None:
        self.location, self.examples = location, list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def row(self, k: int) -> Row:
        name, image, captions = self.examples[k]
        return Row(name, len(image), 0, captions)

    def read(self, k: int) -> bytes:
        return self.examples[k].image


class _Head(NamedTuple):
    training: InMemory
    held_out: InMemory
    skipped: frozenset[tuple[int, str]]
    """(shard, name) of the held-out examples."""


def is_stream(data: str) -> bool:
    """Return whether `--data` names a stream, which can only be read sequentially."""
    return bool(REMOTE.match(data)) or data == "-" or _is_pipe(data)


class Stream:
    """Endless, shuffled examples of a stream.

    Raises UserError for input that can't be read more than once or isn't a tar. Reading the head raises UserError if it
    has fewer than two images, or if captions are required and it has none. Failures while reading raise RunError.
    """

    def __init__(self, data: str, columns: Columns, *, fraction: float, buffer_size: int = 1000) -> None:
        """fraction: share of the head that is held out. buffer_size: number of examples from which one is drawn."""
        if not REMOTE.match(data):
            raise UserError(
                f"--data {data!r} can be read only once: give --data 'pipe:COMMAND', which is run every epoch"
            )
        self.location, self.columns, self.fraction, self.buffer_size = data, columns, fraction, buffer_size
        self.urls = expand(data)
        identity = [self.urls, *columns.identity()]
        self.fingerprint = hashlib.sha256(os.fsencode(json.dumps(identity))).hexdigest()
        self._left_out: dict[str, str] = {}
        self._encoding: str | None = None  # of captions that aren't UTF-8; None until the head has been read
        self._notes: tuple[str, ...] = ()

    @property
    def training(self) -> Catalogue:
        """The head's training examples."""
        return self.head.training

    @property
    def held_out(self) -> Catalogue:
        """The head's held-out examples, which `examples` never yields."""
        return self.head.held_out

    @property
    def left_out(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of what has been left out so far, at most 10,000."""
        return tuple(self._left_out.items())

    def examples(self, seed: int, start: int = 0) -> Generator[tuple[Example, ...], None, None]:
        """Yield each example from position `start` on, with 8 substitutes in case it is damaged; never ends.

        If the stream has only one training example, the first example has no substitutes. To reach `start`, everything
        before it is read again, because an epoch's length isn't known otherwise.
        """
        position, recent = 0, deque[Example](maxlen=_RECENT)
        for epoch in itertools.count():
            epoch_start = position
            shards = permute(np.arange(len(self.urls)), len(self.urls), seed, epoch)
            with contextlib.closing(self._training_examples(shards.tolist())) as incoming:
                buffer = list(itertools.islice(incoming, self.buffer_size))
                while buffer:
                    random = generator(seed, Purpose.STREAM, position)
                    k = int(random.integers(len(buffer)))
                    drawn, last = buffer[k], buffer.pop()
                    if k < len(buffer):
                        buffer[k] = last
                    buffer.extend(itertools.islice(incoming, 1))
                    if position >= start:
                        pool = buffer if len(buffer) >= _RECENT else [*buffer, *recent]
                        substitutes = random.integers(len(pool), size=_SUBSTITUTES).tolist() if pool else []
                        yield drawn, *(pool[j] for j in substitutes)
                    recent.append(drawn)
                    position += 1
            if position == epoch_start:
                raise RunError(f"{self.location}: a full epoch contained no image to train on{self._first_reason()}")

    @cached_property
    def head(self) -> _Head:
        """First 2,048 examples, from the shards in their given order."""
        with contextlib.closing(self._read_shards(range(len(self.urls)))) as examples:
            numbered = list(itertools.islice(examples, _HEAD_SIZE))
        self._encoding = self._encoding or ""  # later captions never change it, so that it doesn't depend on the order
        shards, first = [shard for shard, _ in numbered], [example for _, example in numbered]
        head = InMemory(self.location, first)
        head.notes = self._notes
        if not first:
            raise RunError(f"{self.location} contains no usable image{self._first_reason()}")
        if len(first) < 2:
            raise UserError(f"{self.location} has one image: at least two are needed, because one is held out")
        if self.columns.captioned and head.uncaptioned == len(first):
            raise UserError(
                f"{self.location}: none of the first {len(first):,} images has a caption: looked for {CAPTION_FILES}"
                f"{self._first_reason()}"
            )
        lowest = lowest_hashes(head)[:MOST_HELD_OUT]
        count = min(max(sum(value < self.fraction for value, _ in lowest), 1), len(first) - 1)
        held_out = {k for _, k in lowest[:count]}
        skipped = frozenset((shards[k], first[k].name) for k in held_out)
        trained = [e for shard, e in zip(shards, first, strict=True) if (shard, e.name) not in skipped]
        training = InMemory(self.location, trained)
        training.notes = self._notes
        return _Head(training, InMemory(self.location, [first[k] for k in sorted(held_out)]), skipped)

    def _training_examples(self, shards: Sequence[int]) -> Examples:
        skipped = self.head.skipped
        for shard, example in self._read_shards(shards):
            if (shard, example.name) not in skipped:
                yield example

    def _read_shards(self, shards: Sequence[int]) -> Generator[tuple[int, Example], None, None]:
        """Yield (shard, example) for all examples of these shards in turn."""
        for shard in shards:
            with contextlib.closing(self._read_url(self.urls[shard])) as examples:
                yield from ((shard, example) for example in examples)

    def _read_url(self, url: str) -> Examples:
        def leave_out(name: str, reason: str) -> None:
            if len(self._left_out) < _MOST_LISTED:
                self._left_out.setdefault(f"{url}: {name}" if name else url, reason)

        count, not_a_tar = 0, ""
        tar: tarfile.TarFile | None = None
        with _open(url) as file:
            try:
                tar = tarfile.open(  # noqa: SIM115  `file` is closed instead
                    fileobj=file, mode="r|*", tarinfo=Header, encoding="utf-8", errors="surrogateescape"
                )
                for sample in read_samples(tar, self.columns, leave_out, images=True, guess=partial(self._guess, url)):
                    count += 1
                    yield Example(sample.name, sample.image, sample.captions)
            except DAMAGE as error:
                if tar is None:
                    not_a_tar = str(error)
                else:
                    leave_out("", f"damaged or truncated after {count:,} images: {error}")
        if not_a_tar:  # raised only now, because a failed command has raised a better message before
            raise UserError(f"{url} is not a tar ({not_a_tar}): must be a .tar, .tar.gz, .tar.bz2 or .tar.xz")

    def _guess(self, url: str) -> str:
        """Return the encoding of captions that aren't UTF-8: guessed from the first shard of the head that has some."""
        if self._encoding is None:
            with (
                _open(url) as file,
                tarfile.open(
                    fileobj=file, mode="r|*", tarinfo=Header, encoding="utf-8", errors="surrogateescape"
                ) as tar,
            ):
                texts = list(itertools.islice(unclear_texts(tar, self.columns), _GUESS_FROM))
            self._encoding = guess_encoding(text for _, text in texts)
            if self._encoding:
                self._notes = (guess_note(url, self._encoding, *texts[0]),)
        return self._encoding

    def _first_reason(self) -> str:
        return f"; e.g. {': '.join(self.left_out[0])}" if self.left_out else ""


class _Reader:
    """Reader of a stream for tarfile; its errors name the stream."""

    def __init__(self, url: str, file: Any, length: int | None = None) -> None:
        self.url, self.file, self.length, self.bytes_read = url, file, length, 0

    def read(self, count: int) -> bytes:
        try:
            data: bytes = self.file.read(count)
        except Exception as error:  # each protocol has its own exceptions
            raise RunError(
                f"reading {self.url} failed after {self.bytes_read:,} bytes ({one_line(error, 300)}): "
                "run the same command again"
            ) from error
        self.bytes_read += len(data)
        if not data and self.length is not None and self.bytes_read < self.length:
            raise RunError(
                f"{self.url} ended after {self.bytes_read:,} of {self.length:,} bytes: run the same command again"
            )
        return data


@contextlib.contextmanager
def _open(url: str) -> Iterator[Any]:
    if url.startswith("pipe:"):
        with _run_command(url) as output:
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
def _run_command(url: str) -> Iterator[Any]:
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
            if any(not output.read(2**16) for _ in range(_MOST_TRAILING // 2**16)):
                status = process.wait()
        finally:
            if process.poll() is None:  # kill the shell and every process that it has started
                os.killpg(process.pid, signal.SIGKILL)
            output.close()
            process.wait()
        stderr.seek(0)
        last_line = stderr.read()[-300:].decode(errors="replace").strip().splitlines()[-1:]
    if status:
        raise RunError(f"{url}: the command failed with status {status}: {''.join(last_line) or 'no error message'}")


def _is_pipe(data: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        mode = os.stat(data).st_mode
        return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)
    return False
