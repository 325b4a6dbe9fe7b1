"""The documentation's site: it builds without a warning, and its reference contains every public name."""

import ast
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

from support import ROOT
from support.commands import load_module

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def builder() -> ModuleType:
    return load_module(ROOT / "docs/build_site.py")


class Page(HTMLParser):
    """The ids of a page's elements, its links, and the addresses that it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.ids.add(given.get("id") or "")
        if tag == "a":
            self.links.add(given.get("href") or "")
        elif tag in ("img", "script", "link"):
            self.loaded.add(given.get("src") or given.get("href") or "")


@pytest.fixture(scope="module")
def site(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builder.build(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    """The site's pages, without the one for missing addresses, which has absolute links."""
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def public_names(module: Path) -> set[str]:
    """Return the public top-level names of a module, and the public methods of its classes."""
    found = set()
    for node in ast.parse((ROOT / module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.add(node.name)
            inside = node.body if isinstance(node, ast.ClassDef) else []
            methods = [f.name for f in inside if isinstance(f, ast.FunctionDef)]
            found |= {f"{node.name}.{name}" for name in methods if not name.startswith("_") or name == "__call__"}
    return found


def test_the_reference_has_every_public_name(builder: ModuleType, site: Path, pages: dict[Path, Page]) -> None:
    count = 0
    for package in builder.PACKAGES:
        for module in builder.modules(Path(package)):
            if module.name == "__init__.py":
                continue
            page = site / builder.REFERENCE / Path(builder.page_of(module)).with_suffix(".html")
            names = {f"{builder.name_of(module)}.{name}" for name in public_names(module)}
            assert names <= pages[page].ids, page
            count += len(names)
    assert count > 500


def test_private_names_are_left_out(pages: dict[Path, Page]) -> None:
    ids = {i for page in pages.values() for i in page.ids}
    assert not [i for i in ids if re.search(r"^(ldm|autoencoder|conditioning|train)\..*\._(?!_call__)", i)]


def test_links_and_files_of_every_page_exist(site: Path, pages: dict[Path, Page]) -> None:
    wrong = set()
    for path, page in pages.items():
        for link in page.links | page.loaded:
            target, _, anchor = link.partition("#")
            if re.match("[a-z]+:", target):
                continue
            file = (path.parent / target.partition("?")[0]).resolve() if target else path
            if not file.exists() or (anchor and file in pages and anchor not in pages[file].ids):
                wrong.add((str(path.relative_to(site)), link))
    assert not sorted(wrong)[:20]


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert not [source for page in pages.values() for source in page.loaded if re.match("[a-z]*:?//", source)]
    assert not [path for path in site.rglob("*.css") if re.search(r"url\(['\"]?(https?:)?//", path.read_text())]


def test_formulas_are_mathml(site: Path) -> None:
    text = (site / "docs/mathematics.html").read_text(encoding="utf-8")
    assert text.count("<math") > 50
    assert "arithmatex" not in text
