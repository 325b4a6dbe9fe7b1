"""Build the documentation as a static site (`make site`): the pages of the repository and an API reference.

A page keeps its place in the repository, so that its relative links work on the site too. Links to modules lead to the
API reference, which has a page per public module, made from the docstrings.
"""

import argparse
import ast
import html
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from math_core import LatexToMathML

ROOT = Path(__file__).parent.parent
PACKAGES = ("ldm", "autoencoder", "conditioning", "train")
REFERENCE = "reference"
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")  # the target of a relative link, without its anchor
_FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[([](?P<latex>.*?)\\[])]</(?P=tag)>', re.DOTALL)


def main() -> None:
    options = argparse.ArgumentParser(description="Build the documentation as a static site.")
    options.add_argument("--out", type=Path, default=ROOT / "site", help="folder of the site, which is replaced")
    out: Path = options.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        try:
            site = build(Path(folder))
        except subprocess.CalledProcessError as error:  # the reason is printed
            raise SystemExit(error.returncode) from None
        if out.exists():
            shutil.rmtree(out)
        shutil.move(site, out)
    print(f"{out / 'index.html'}")


def build(folder: Path) -> Path:
    """Build the site in an empty folder. Returns the site's folder. Raises CalledProcessError for any warning."""
    shutil.copy(ROOT / "docs/zensical.toml", folder)
    for needed in (*PACKAGES, "docs"):
        (folder / needed).symlink_to(ROOT / needed)
    pages = folder / "pages"
    for page in markdown():
        (pages / page).parent.mkdir(parents=True, exist_ok=True)
        (pages / page).write_text(_rewritten(page, pages), encoding="utf-8")
    for asset in [*ROOT.glob("docs/**/*.png"), ROOT / "docs/site.css"]:
        target = pages / asset.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(asset, target)
    _write_decisions(pages / "docs/adr")
    _write_reference(pages / REFERENCE)
    subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "-f", folder / "zensical.toml"], check=True)
    for page in (folder / "site").rglob("*.html"):
        page.write_text(_FORMULA.sub(_drawn, page.read_text(encoding="utf-8")), encoding="utf-8")
    return folder / "site"


def markdown() -> list[Path]:
    """Return the repository's pages, relative to its root."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/adr/*.md")]
    return sorted(page.relative_to(ROOT) for page in found)


def modules(package: Path) -> Iterator[Path]:
    """Return the public modules below a package, relative to the root: a package before what it contains."""
    for path in sorted((ROOT / package).rglob("*.py"), key=lambda p: (p.parent, p.name)):
        relative = path.relative_to(ROOT)
        if not any(part.startswith("_") for part in relative.with_suffix("").parts if part != "__init__"):
            yield relative


def page_of(module: Path) -> str:
    """Return a module's page: ldm/samplers.py has ldm/samplers.md, and a package the index of its folder."""
    return (module.parent / "index.md" if module.name == "__init__.py" else module.with_suffix(".md")).as_posix()


def name_of(module: Path) -> str:
    return ".".join((module.parent if module.name == "__init__.py" else module.with_suffix("")).parts)


def _rewritten(page: Path, pages: Path) -> str:
    """Return a page's text with links to modules and folders turned to their pages. Other linked files are copied."""
    up = "../" * (len(page.parts) - 1)

    def turned(match: re.Match[str]) -> str:
        target = (ROOT / page.parent / match[1]).resolve().relative_to(ROOT)
        if target.suffix == ".py" and target.parts[0] in PACKAGES:
            return f"{up}{REFERENCE}/{page_of(target)}"
        if (ROOT / target).is_dir():
            return f"{up}{target.as_posix()}/index.md"
        if target.suffix not in (".md", ".png") and (ROOT / target).is_file():
            (pages / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / target, pages / target)
        return match[1]

    return _LINK.sub(turned, (ROOT / page).read_text(encoding="utf-8"))


def _drawn(formula: re.Match[str]) -> str:
    """Return a formula in LaTeX as MathML, which browsers draw without a script. Raises LatexError."""
    return LatexToMathML().convert_with_local_state(
        html.unescape(formula["latex"]), displaystyle=formula["tag"] == "div"
    )


def _write_decisions(folder: Path) -> None:
    """Write the list of decisions and their navigation."""
    titles = {page.name: page.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for page in folder.glob("0*")}
    listed = "\n".join(f"- [{titles[name]}]({name})" for name in sorted(titles))
    (folder / "index.md").write_text(f"# Decisions\n\n{listed}\n", encoding="utf-8")
    (folder / "SUMMARY.md").write_text(f"- [Decisions](index.md)\n{listed}\n", encoding="utf-8")


def _write_reference(folder: Path) -> None:
    """Write a page per module, one per package with the first sentence of each of its modules, and the navigation."""
    navigation, overview = ["- [API reference](index.md)"], ["# API reference", ""]
    for package in PACKAGES:
        for module in modules(Path(package)):
            page = folder / page_of(module)
            page.parent.mkdir(parents=True, exist_ok=True)
            name, depth = name_of(module), len(module.parts) - 1
            if module.name == "__init__.py":
                inside = [m for m in modules(module.parent) if m != module and _inside(m, module.parent)]
                rows = [
                    f"| [{name_of(m)}]({Path(page_of(m)).relative_to(module.parent)}) | {_first(m)} |" for m in inside
                ]
                table = "\n".join(["| module | content |", "|---|---|", *rows]) if rows else ""
                text = f"::: {name}\n    options:\n      members: false\n\n{table}\n"
                depth -= 1
                overview += [f"- [`{name}`]({page_of(module)}): {_first(module)}"] * (depth == 0)
            else:
                text = f"::: {name}\n"
            page.write_text(text, encoding="utf-8")
            navigation.append(f"{'    ' * depth}- [{name.rpartition('.')[2]}]({page_of(module)})")
    (folder / "index.md").write_text("\n".join(overview) + "\n", encoding="utf-8")
    (folder / "SUMMARY.md").write_text("\n".join(navigation) + "\n", encoding="utf-8")


def _inside(module: Path, folder: Path) -> bool:
    """Return whether a module or package is directly in a folder."""
    return (module.parent.parent if module.name == "__init__.py" else module.parent) == folder


def _first(module: Path) -> str:
    """Return the first sentence of a module's docstring, for a table."""
    docstring = ast.get_docstring(ast.parse((ROOT / module).read_text(encoding="utf-8"))) or ""
    return re.split(r"\n\n|(?<=[.])\s", docstring, maxsplit=1)[0].replace("\n", " ").replace("|", "\\|")


if __name__ == "__main__":
    main()
