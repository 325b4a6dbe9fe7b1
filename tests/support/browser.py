"""The web page in headless Chromium. SHOTS=FOLDER keeps the screenshots."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from playwright.sync_api import Browser, Locator, expect, sync_playwright
from playwright.sync_api import Page as Tab

from support.page import Served

SECONDS = 60_000  # milliseconds


class Shown(NamedTuple):
    """A browser's tab with the page, and what it has requested and reported."""

    tab: Tab
    requests: list[str]
    errors: list[str]

    def button(self, id: str) -> Locator:
        return self.tab.locator(f"#{id}")

    def mode(self, name: str) -> None:
        self.tab.get_by_role("tab", name=name, exact=True).click()

    def fill(self, label: str, value: object) -> None:
        field = self.tab.get_by_label(label, exact=True).locator("visible=true").first
        field.fill(str(value))
        field.blur()

    def choose(self, k: int) -> None:
        """Choose an image of the gallery."""
        thumbnail = self.tab.locator("#gallery .thumbnail-item").nth(k)
        expect(thumbnail).to_be_visible(timeout=SECONDS)
        thumbnail.click()
        expect(self.tab.locator("#settings textarea")).to_have_value(re.compile("Steps: "))

    def see(self, path: Path) -> None:
        """Wait until the gallery shows a file as its newest."""
        newest = self.tab.locator("#gallery .thumbnail-item img").first
        expect(newest).to_have_attribute("src", re.compile(re.escape(path.name) + "$"), timeout=SECONDS)

    def to_inpaint(self) -> None:
        """Send the chosen image to the editor, and wait until it is there."""
        self.button("to-inpaint").click()
        expect(self.tab.locator("#canvas canvas").first).to_be_visible(timeout=SECONDS)
        expect(self.tab.locator("#canvas").get_by_text("Upload an image")).to_be_hidden(timeout=SECONDS)
        self.tab.wait_for_timeout(2000)

    def settings(self) -> str:
        return self.tab.locator("#settings textarea").input_value()

    def shoot(self, name: str) -> None:
        if folder := os.environ.get("SHOTS"):
            Path(folder).mkdir(exist_ok=True)
            self.tab.wait_for_timeout(700)
            self.tab.screenshot(path=f"{folder}/{name}.png", full_page=True)

    def check(self, served: Served) -> None:
        """Check that no request has left this machine, and that no script has failed."""
        outside = [url for url in self.requests if not url.startswith((served.url, "data:", "blob:"))]
        assert outside == []
        assert self.errors == []


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a headless Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert program, "these tests need Chromium, e.g. apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser: Browser, served: Served) -> Shown:
    tab = browser.new_page(viewport={"width": 1400, "height": 1100})
    tab.set_default_timeout(SECONDS)
    shown = Shown(tab, [], [])
    tab.on("request", lambda request: shown.requests.append(request.url))
    tab.on("pageerror", lambda error: shown.errors.append(str(error)))
    tab.goto(served.url)
    expect(shown.button("generate-text")).to_be_visible(timeout=SECONDS)
    return shown
