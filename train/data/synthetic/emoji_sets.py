"""Sets of emoji as SVG, drawn by different artists, from packages of the npm registry.

An Iconify package is one JSON file of SVG bodies by name (icons.json), with the names by codepoint (chars.json) where
it has them, and its licence (info.json). Other names are matched with Unicode's names, letters and digits only. The
names and keywords in Unicode's CLDR come from packages too. A package is read without being unpacked or executed.
"""

import json
import re
import shutil
import subprocess
import tarfile
import unicodedata
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ldm.errors import RunError, UserError, one_line
from ldm.files import read_regular
from train.data.synthetic.emoji import Named, name_emoji


class EmojiSet(NamedTuple):
    """A set: its style's name in captions, the artists, and the package with the version that was tested."""

    style: str
    hand: str
    """Artists. Versions of one design have the same hand."""
    package: str
    version: str


SETS = (
    EmojiSet("noto", "noto", "@iconify-json/noto", "1.2.9"),
    EmojiSet("old noto", "noto", "@iconify-json/noto-v1", "1.2.5"),
    EmojiSet("fluent", "fluent", "@iconify-json/fluent-emoji", "1.2.7"),
    EmojiSet("flat fluent", "fluent", "@iconify-json/fluent-emoji-flat", "1.2.6"),
    EmojiSet("twemoji", "twemoji", "@iconify-json/twemoji", "1.2.5"),
    EmojiSet("openmoji", "openmoji", "@iconify-json/openmoji", "1.2.29"),
    EmojiSet("emojione", "emojione", "@iconify-json/emojione", "1.2.3"),
    EmojiSet("old emojione", "emojione", "@iconify-json/emojione-v1", "1.2.3"),
    EmojiSet("firefox", "firefox", "@iconify-json/fxemoji", "1.2.2"),
    EmojiSet("streamline", "streamline", "@iconify-json/streamline-emojis", "1.2.4"),
)
ANNOTATIONS = (("cldr-annotations-full", "annotations"), ("cldr-annotations-derived-full", "annotationsDerived"))
_CLDR_VERSION = "48.2.0"
LICENCES = ("Apache-2.0", "MIT", "CC-BY-4.0", "CC-BY-SA-4.0")
"""Licences that allow to train on the images and to show them: by their name in SPDX."""
_MOST_BYTES = 2**28  # of a file in a package; the largest has 90 MB
_MINUTES = 10  # longest wait for npm


class Drawings(NamedTuple):
    """The drawings of a set."""

    set: EmojiSet
    version: str
    licence: Mapping[str, str]
    """title, spdx, url; and author."""
    svg: Mapping[str, str]
    """SVG by emoji, without variation selectors, in the order of the set."""
    unmatched: int
    """Number of drawings without an emoji of CLDR."""


# Packages


def fetch(folder: Path) -> None:
    """Fetch the packages of all sets and of the names into a folder, with npm as it is configured."""
    specs = [f"{name}@{version}" for name, version in _packages()]
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            "npm isn't installed, which fetches the packages of emoji: install Node.js, or fetch them elsewhere "
            f"(npm pack {' '.join(specs)}) and give their folder with --packages"
        )
    command = [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder), *specs]
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=60 * _MINUTES, check=False
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"npm pack has not ended after {_MINUTES} minutes: try again, or use --packages") from None
    except OSError as error:
        raise RunError(f"{npm} can't be run: {error.strerror}") from None
    if done.returncode:
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if "npm" in line]
        reason = one_line(lines[0]) if lines else f"status {done.returncode}"
        raise RunError(f"npm pack failed ({reason}): check npm's registry, or fetch the packages and use --packages")


def _packages() -> list[tuple[str, str]]:
    """Return the name and version of each package."""
    return [(s.package, s.version) for s in SETS] + [(name, _CLDR_VERSION) for name, _ in ANNOTATIONS]


def find_packages(folder: Path) -> dict[str, Path]:
    """Return the .tgz file or folder of each package. Raises UserError for missing ones and for several versions."""
    if not folder.is_dir():
        raise UserError(f"--packages {folder}: must be a folder with .tgz files of npm pack, or node_modules")
    found, missing = {}, []
    for name, version in _packages():
        unpacked = [path for path in (folder / name, folder / "node_modules" / name) if path.is_dir()]
        packed = sorted(folder.glob(f"{name.removeprefix('@').replace('/', '-')}-[0-9]*.tgz"))
        if len(packed) > 1 and not unpacked:
            raise UserError(f"--packages {folder}: {packed[0].name} and {packed[1].name}: must be one version of each")
        if unpacked or packed:
            found[name] = (unpacked or packed)[0]
        else:
            missing.append(f"{name}@{version}")
    if missing:
        raise UserError(
            f"--packages {folder}: {len(missing)} packages are missing; fetch them there with: npm pack "
            f"{' '.join(missing)}"
        )
    return found


def read_package(path: Path, file: str) -> Any:
    """Return a JSON object in a package, None if there is no such file. Raises UserError if it can't be read."""
    try:
        if path.is_dir():
            if not (path / file).is_file():
                return None
            content = read_regular(path / file, _MOST_BYTES)
        else:
            with tarfile.open(path, "r:gz") as tar:
                member = next((m for m in tar if m.name == f"package/{file}"), None)
                opened = tar.extractfile(member) if member is not None and member.isreg() else None
                if member is None or opened is None:
                    return None
                if member.size > _MOST_BYTES:
                    raise ValueError(f"{file} has {member.size:,} bytes; up to {_MOST_BYTES:,} are accepted")
                content = opened.read()
        value = json.loads(content)
    except (OSError, ValueError, RecursionError, EOFError, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{path}: {file} can't be read ({one_line(error)}): fetch the package again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: {file} must be a JSON object: fetch the package again")
    return value


# Names


def read_names(packages: Mapping[str, Path]) -> list[Named]:
    """Return the names and captions of all emoji from the packages of CLDR."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for package, part in ANNOTATIONS:
        path = packages[package]
        content = read_package(path, f"{part}/en/annotations.json")
        try:
            for text, entry in content[part]["annotations"].items():
                names |= {plain(text): str(name) for name in entry.get("tts", [])[:1]}
                keywords |= {plain(text): [str(word) for word in entry["default"]]} if "default" in entry else {}
        except (TypeError, KeyError, AttributeError):
            raise UserError(f"{path}: must contain CLDR's {part}/en/annotations.json: fetch it again") from None
    return name_emoji(names, keywords)


def plain(text: str) -> str:
    """Return an emoji without variation selectors, as CLDR and the sets differ in them."""
    return text.replace("\ufe0f", "")


class Names:
    """Search of an emoji by the name that a set gives it."""

    def __init__(self, named: Iterable[Named]) -> None:
        """named: emoji with their captions; the first one is CLDR's name."""
        self.texts = {text: captions[0] for text, captions in named}
        self.by_key: dict[str, str] = {}
        for text, name in self.texts.items():
            self.by_key.setdefault(_key(name), text)
        for text in self.texts:
            if len(text) == 1:
                self.by_key.setdefault(_key(unicodedata.name(text, "")), text)

    def add(self, chars: Mapping[str, str]) -> None:
        """Add the names that a set gives to emoji. chars: names by emoji."""
        for text, name in chars.items():
            if text in self.texts:
                self.by_key.setdefault(_key(name), text)

    def find(self, name: str) -> str | None:
        """Return the emoji of a name, e.g. flag-for-france, alarmclock or bird-1; None if it is unknown."""
        name = re.sub("^flag-for-(flag-)?", "flag-", name)
        return self.by_key.get(_key(name)) or self.by_key.get(_key(re.sub("-1$", "", name)))


def _key(name: str) -> str:
    letters = unicodedata.normalize("NFKD", name.lower().replace("&", "and"))
    return re.sub("[^a-z0-9]", "", letters)


# Drawings


def read_sets(packages: Mapping[str, Path], named: Sequence[Named]) -> list[Drawings]:
    """Return the drawings of each set."""
    names = Names(named)
    chars = {s: _chars(packages[s.package], names) for s in SETS}
    for texts in chars.values():
        names.add(texts)
    return [_drawings(s, packages[s.package], chars[s], names) for s in SETS]


def _chars(path: Path, names: Names) -> dict[str, str]:
    """Return the set's names of the known emoji that chars.json lists; hexadecimal codepoints are joined by -."""
    found: dict[str, str] = {}
    for codes, name in (read_package(path, "chars.json") or {}).items():
        try:
            text = plain("".join(chr(int(code, 16)) for code in codes.split("-")))
        except (ValueError, OverflowError):
            continue
        if text in names.texts and isinstance(name, str):
            found.setdefault(text, name)
    return found


def _drawings(s: EmojiSet, path: Path, chars: Mapping[str, str], names: Names) -> Drawings:
    icons, info = read_package(path, "icons.json"), read_package(path, "info.json")
    version = read_package(path, "package.json")
    try:
        licence = {key: str(info["license"][key]) for key in ("title", "spdx", "url")}
        licence["author"] = str(info["author"]["name"])
        bodies = {name: _svg(icons, icon, "") for name, icon in icons["icons"].items() if not icon.get("hidden")}
        for name, alias in icons.get("aliases", {}).items():
            if alias["parent"] in bodies and set(alias) <= {"parent", "hFlip"}:
                flip = "scale(-1 1)" if alias.get("hFlip") else ""
                bodies[name] = _svg(icons, icons["icons"][alias["parent"]], flip) if flip else bodies[alias["parent"]]
        drawn = icons["icons"]
        version = str(version["version"])
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{path}: isn't a package of Iconify with icons.json and info.json: fetch it again") from None
    svg = {text: bodies[name] for text, name in chars.items() if name in bodies}
    for name, body in bodies.items():
        if (text := names.find(name)) is not None:
            svg.setdefault(text, body)
    used = set(svg.values())
    return Drawings(s, version, licence, svg, sum(bodies.get(name) not in used for name in drawn if name in bodies))


def _svg(icons: Mapping[str, Any], icon: Mapping[str, Any], flip: str) -> str:
    """Return an icon as an SVG document. flip: transformation about the vertical axis, if any."""
    left, top, width, height = (
        float(icon.get(key, icons.get(key, default)))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    body = icon["body"]
    if flip:
        body = f'<g transform="translate({2 * left + width:g} 0) {flip}">{body}</g>'
    box = f"{left:g} {top:g} {width:g} {height:g}"
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {space} viewBox="{box}" width="{width:g}" height="{height:g}">{body}</svg>'
