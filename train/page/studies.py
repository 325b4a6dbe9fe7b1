"""Blind comparisons of two models: pairs of images of the same prompt and seed, and the votes on them.

    runs/compare/NAME/study.json      the two models, the pairs, the settings, and the secret that determines the sides
    runs/compare/NAME/images/         the images of each pair, 00000-first.png and 00000-second.png
    runs/compare/NAME/votes.jsonl     one line per vote, written at once

Order and sides are functions of the secret, the voter's name and the pair. The page is given two arrays of pixels and
the number of a pair, from which nobody can see which model is on which side.
"""

import errno
import json
import os
import random
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from ldm.errors import UserError
from ldm.files import read_json, read_regular
from train.data.images.decode import DamagedImage, load_image
from train.data.store.atomic import plain_errors, sync, write_text
from train.evaluation.preference import Preference
from train.evaluation.sheets import save_sheet
from train.page.places import is_name, shown_names

Choice = Literal["left", "right", "tie"]
_CHOICES = ("left", "right", "tie")
_MOST_PAIRS = 10_000  # in a study.json
_MOST_VOTES = 10**5
_LARGEST_VOTES = 2**27  # bytes of votes.jsonl
_MOST_PIXELS = 2**25  # of an image
_LONGEST_VOTER = 60
_LOCK = threading.Lock()


class Pair(NamedTuple):
    """A pair as a voter sees it."""

    number: int
    prompt: str
    left: np.ndarray
    right: np.ndarray
    done: int
    """Number of pairs on which the voter has voted."""
    total: int


@dataclass(frozen=True, kw_only=True)
class Study:
    """A comparison of two models."""

    first: str
    """Name of a model in --models."""
    second: str
    prompts: tuple[str, ...]
    """Prompt of each pair."""
    seeds: tuple[int, ...]
    """Seed of each pair, the same for both images."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Sampling options that both models used."""
    secret: str = field(default_factory=lambda: secrets.token_hex(16))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a study. Raises UserError if the folder has none."""
        try:
            study = TypeAdapter(cls).validate_python(read_json(_own(folder / "study.json", folder)))
        except (OSError, ValueError, ValidationError):
            raise UserError(f"{folder.name}: isn't a comparison that this page made") from None
        if not len(study.prompts) == len(study.seeds) <= _MOST_PAIRS:
            raise UserError(f"{folder.name}: study.json was edited; make a new comparison")
        return study

    def write(self, folder: Path) -> None:
        """Write study.json, after all images."""
        write_text(folder / "study.json", json.dumps(asdict(self), indent=2) + "\n")

    def order(self, voter: str) -> list[int]:
        """Return the numbers of the pairs in the voter's order."""
        numbers = list(range(len(self.prompts)))
        random.Random(f"{self.secret} order {voter}").shuffle(numbers)
        return numbers

    def first_is_left(self, voter: str, number: int) -> bool:
        """Return whether the first model's image is on the left."""
        return random.Random(f"{self.secret} side {number} {voter}").random() < 0.5


@dataclass(frozen=True)
class Poll:
    """The votes on a study, in its folder."""

    folder: Path
    study: Study

    @classmethod
    def open(cls, folder: Path) -> Self:
        return cls(folder, Study.read(folder))

    @property
    def file(self) -> Path:
        return self.folder / "votes.jsonl"

    def votes(self) -> list[Mapping[str, Any]]:
        """Return the valid votes, one for each voter and pair; other lines are ignored."""
        try:
            lines = read_regular(_own(self.file, self.folder), _LARGEST_VOTES).split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.file.name}: can't be read: {error.strerror}") from None
        found: dict[tuple[str, int], Mapping[str, Any]] = {}
        for line in lines:
            try:
                vote = json.loads(line)
                key = vote["voter"], vote["pair"]
                valid = vote["winner"] in ("first", "second", "tie") and type(key[0]) is str and type(key[1]) is int
                valid = valid and 0 <= key[1] < len(self.study.prompts)
            except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
                continue
            if valid:
                found.setdefault(key, vote)
        return list(found.values())

    def result(self) -> Preference:
        """Return the counts of the votes."""
        winners = [vote["winner"] for vote in self.votes()]
        return Preference(*(winners.count(side) for side in ("first", "second", "tie")))

    def next_pair(self, voter: str) -> Pair | None:
        """Return the voter's next pair; None when all are done."""
        number, done = self._next(_voter(voter))
        if number is None:
            return None
        images = [self._image(number, side) for side in ("first", "second")]
        left, right = images if self.study.first_is_left(voter, number) else images[::-1]
        return Pair(number, self.study.prompts[number], left, right, done, len(self.study.prompts))

    def vote(self, voter: str, number: int, choice: str) -> None:
        """Write a vote on the voter's present pair. Another pair is ignored: the vote came twice.

        Raises UserError for another choice.
        """
        if choice not in _CHOICES:
            raise UserError(f"vote {choice!r:.50}: choose {', '.join(_CHOICES)}")
        with _LOCK:
            if type(number) is not int or self._next(_voter(voter))[0] != number:
                return
            if len(self.votes()) >= _MOST_VOTES:
                raise UserError(f"{self.folder.name}: has {_MOST_VOTES:,} votes already; no more are accepted")
            left = "first" if self.study.first_is_left(voter, number) else "second"
            right = "second" if left == "first" else "first"
            line = {
                "pair": number,
                "voter": voter,
                "prompt": self.study.prompts[number],
                "seed": self.study.seeds[number],
                "left": left,
                "vote": choice,
                "winner": {"left": left, "right": right, "tie": "tie"}[choice],
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            self._append(json.dumps(line))

    def _append(self, line: str) -> None:
        content = read_regular(self.file, _LARGEST_VOTES) if self.file.is_file() else b""
        if len(content) + len(line) + 2 > _LARGEST_VOTES:
            raise UserError(f"{self.folder.name}: {self.file.name} is full; no more votes are accepted")
        incomplete = content[-1:] not in (b"", b"\n")  # a crash
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        with plain_errors(self.file), os.fdopen(descriptor, "ab") as file:
            file.write(("\n" * incomplete + line + "\n").encode())
            file.flush()
            sync(file.fileno())

    def _next(self, voter: str) -> tuple[int | None, int]:
        """Return the number of the voter's next pair, None after the last one, and how many are done."""
        done = {vote["pair"] for vote in self.votes() if vote["voter"] == voter}
        return next((number for number in self.study.order(voter) if number not in done), None), len(done)

    def _image(self, number: int, side: str) -> np.ndarray:
        path = image_path(self.folder, number, side)
        try:
            return np.asarray(load_image(_own(path, self.folder), max_pixels=_MOST_PIXELS))
        except (OSError, DamagedImage):
            raise UserError(f"{path.name} of the comparison {self.folder.name!r}: can't be read") from None


def _own(path: Path, folder: Path) -> Path:
    """Return the path of a study's file. Raises OSError if a link leads out of its folder."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise OSError(errno.ELOOP, "a link leads out of the comparison's folder", str(path))
    return path


def image_path(folder: Path, number: int, side: str) -> Path:
    """Return the file of an image. side: "first" or "second"."""
    return folder / "images" / f"{number:05d}-{side}.png"


def save_image(folder: Path, number: int, side: str, image: Image.Image) -> None:
    """Write an image of a pair, without metadata."""
    path = image_path(folder, number, side)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_sheet(Image.fromarray(np.asarray(image.convert("RGB"))), path)


def find_studies(folder: Path) -> list[str]:
    """Return the names of the studies in a folder, the newest first."""
    found = [path.parent for path in folder.glob("[!.]*/study.json") if path.is_file()]
    return shown_names(path.name for path in sorted(found, key=lambda path: -path.stat().st_mtime))


def pairs_of(prompts: Sequence[str], count: int, seed: int) -> tuple[list[str], list[int]]:
    """Return the prompt and the seed of `count` pairs: the prompts in turn, each pair with a seed of its own."""
    return [prompts[k % len(prompts)] for k in range(count)], [seed + k for k in range(count)]


def _voter(name: str) -> str:
    """Return a voter's name. Raises UserError if it can't be one."""
    if not isinstance(name, str) or len(name) > _LONGEST_VOTER or not is_name(name):
        raise UserError(f"voter: give a name of up to {_LONGEST_VOTER} characters")
    return name
