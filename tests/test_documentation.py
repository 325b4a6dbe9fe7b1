"""The Markdown pages: their links have targets, and the repository's host and the site render them alike."""

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

import ldm
from support import ROOT
from support.commands import load_module, run_script

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "tests/stored/README.md"])
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s#]*)(?:#([^)\s]+))?\)")


COMMAND = re.compile(r"python scripts/(\w+)\.py([^`\n|;]*)")


def prose(page: Path) -> str:
    """Return a page's text, with the lines of fenced code blank."""
    lines, fenced = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.lstrip().startswith("```")
        lines.append("" if fence or fenced else line)
        fenced ^= fence
    return "\n".join(lines)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    wrong = []
    for target, anchor in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        file = (page.parent / target) if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(f"{target}#{anchor}" if anchor else target)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lists_and_tables_are_read_alike(page: Path) -> None:
    """A list or table follows a blank line, and the content of a list's item is indented by four spaces."""
    wrong, before = [], ""
    for number, line in enumerate(prose(page).splitlines(), 1):
        item = re.match(r" *([-*]|\d+\.) ", line)
        starts = (item and not re.match(r" *([-*]|\d+\.) |  ", before)) or (line[:1] == "|" and before[:1] != "|")
        indented = (len(line) - len(line.lstrip())) % 4 and line.strip()
        if (starts and before.strip()) or (indented and (item or not before.strip())):
            wrong.append(f"line {number}: {line[:60]}")
        before = line
    assert not wrong


@cache
def options_of(name: str, *words: str) -> set[str]:
    """Return the options that a script's help lists."""
    ended = run_script(name, *words, "--help")
    assert ended.status == 0, ended.err
    return set(re.findall(r"--[a-z][\w.-]*", ended.out))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in ("LOG.md", "CHANGELOG.md")], ids=str)
def test_commands_exist_and_have_their_options(page: Path) -> None:
    """The log and the changes are left out: they have the commands of their date."""
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:scripts|benchmarks|examples)/\w+\.(?:py|sh|json)\b", text))
    assert [name for name in named if not (ROOT / name).is_file()] == []
    text = re.sub(r"(?<=python)\n| *\\\n *", " ", text)
    for name, rest in COMMAND.findall(text):
        if options := set(re.findall(r"(?<!\S)--[a-z][\w.-]*", rest)):
            assert options <= options_of(name, *re.findall(r"^ +([\w./]+)", rest)), (name, rest)


def test_every_page_is_in_the_sites_navigation() -> None:
    def pages(entries: list[dict[str, object]]) -> list[str]:
        found: list[str] = []
        for entry in entries:
            for value in entry.values():
                found += pages(value) if isinstance(value, list) else [str(value)]
        return found

    listed = pages(tomllib.loads((ROOT / "docs/zensical.toml").read_text(encoding="utf-8"))["project"]["nav"])
    single = [str(page.relative_to(ROOT)) for page in PAGES if page.parent in (ROOT, ROOT / "docs")]
    assert sorted(listed) == sorted([*single, "docs/adr/", "reference/"])


def test_versions_agree() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == ldm.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest
    assert newest[1] == ldm.__version__


def test_docstrings_become_lists_and_columns() -> None:
    as_markdown = load_module(ROOT / "docs/docstrings.py").as_markdown
    text = "Return it.\n\nof x: not one.\nx, y: the place,\n    in two. z: the depth.\nRaises UserError: never."
    listed = "- `x, y`: the place,\n    in two.\n- `z`: the depth."
    shown = f"Return it.\n\nof x: not one.\n\n{listed}\n\nRaises UserError: never."
    assert as_markdown(text, {"x", "y", "z"}) == shown
    assert as_markdown("A      one\nB      two", set()) == "    A      one\n    B      two"
