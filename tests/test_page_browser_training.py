"""The tabs Train, Data and Compare in headless Chromium, by clicks and keys."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from support.browser import SECONDS, Shown, chromium, open_page
from support.page import Served, make_folders, serving
from train.page import trainings
from train.page.runs import RunView
from train.page.studies import Poll

pytestmark = pytest.mark.slow
MARKUP = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script> ${1+1} {{ 1+1 }}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, shapes: Path, parts: Path) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("page")
    places = make_folders(root)
    for stage in ("clip", "vae"):
        shutil.copytree(parts / stage, places.runs / stage)
        config = places.runs / stage / "config.yaml"
        config.write_text(config.read_text().replace(str(shapes), str(places.data / "shapes")))
    shutil.copytree(shapes, places.data / "shapes")
    (places.runs / "vae/damaged.jsonl").write_text(json.dumps({"file": MARKUP, "reason": MARKUP}) + "\n")
    card = places.runs / "vae/model/README.md"
    card.write_text(
        card.read_text() + f"\n{MARKUP}\n\n![x](https://example.com/x.png) ![y][z]\n\n[z]: https://example.com/y\n"
    )
    metadata = places.data / "shapes/train/metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    rows[0]["text"] = f"odd {MARKUP}"
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(root, places=places) as served:
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def shown(browser: Browser, served: Served) -> Iterator[Shown]:
    shown = open_page(browser, served)
    yield shown
    assert shown.tab.title() != "run"
    shown.tab.close()
    shown.check(served)


def pick(shown: Shown, id: str, option: str) -> None:
    """Choose an option of a dropdown."""
    shown.tab.locator(f"#{id} input").click()
    shown.tab.get_by_role("option", name=option, exact=True).last.click()
    shown.tab.wait_for_timeout(500)  # the list fades


def test_runs_are_shown_side_by_side(shown: Shown) -> None:
    shown.mode("Train")
    expect(shown.tab.locator("#run-curves svg").first).to_be_visible(timeout=SECONDS)
    pick(shown, "run", "vae")
    pick(shown, "run-beside", "clip")
    expect(shown.tab.locator("#run-status")).to_contain_text("clip")
    expect(shown.tab.locator("#run-status")).to_contain_text("finished: 8 steps")
    expect(shown.tab.locator("#run-curves figcaption", has_text="Learning rate")).to_be_visible()
    expect(shown.tab.locator("#run-curves svg", has_text="clip").first).to_be_visible()
    shown.shoot("train-curves")
    shown.mode("Samples")
    expect(shown.tab.locator("#run-samples img").first).to_be_visible(timeout=SECONDS)
    expect(shown.tab.locator("#run-samples")).to_contain_text("step 8")
    shown.shoot("train-samples")
    shown.mode("Card")
    expect(shown.tab.locator("#run-card")).to_contain_text("autoencoder")
    expect(shown.tab.locator("#run-card")).to_contain_text("onerror")  # as text
    assert shown.tab.locator("#run-card img").count() == 0
    shown.mode("Damaged images")
    expect(shown.tab.locator("#run-damaged")).to_contain_text("<script>")
    shown.shoot("train-damaged")


def test_a_run_is_started_stopped_and_continued_by_clicks(shown: Shown, served: Served, browser: Browser) -> None:
    """The settings of a small run are given another name; the run goes on when the page is closed."""
    shown.mode("Train")
    shown.tab.locator("#run-form button").first.click()
    shown.tab.get_by_label("1: autoencoder").click()
    expect(shown.tab.locator("#run-point input")).to_have_value("pictures/vae", timeout=SECONDS)
    pick(shown, "run-point", "the run vae")
    name = shown.tab.locator("#run-name input, #run-name textarea").first
    expect(name).to_have_value("vae", timeout=SECONDS)
    name.fill("../new")
    shown.button("run-start").click()
    result = shown.tab.locator("#run-result textarea, #run-result input").first
    expect(result).to_have_value(re.compile("^not started: .*leads out of"))
    name.fill("mine/new")
    steps = shown.tab.locator("#field-steps input")
    steps.fill("0")
    shown.button("run-start").click()
    expect(result).to_have_value("not started: steps = 0: must be greater than 0")
    steps.fill("100000")
    shown.shoot("train-form")
    shown.button("run-start").click()
    expect(result).to_have_value(re.compile("^mine/new is starting"), timeout=SECONDS)
    run = served.page.places.runs / "mine/new"
    shown.tab.reload()  # the run goes on without the page
    shown.mode("Train")
    expect(shown.tab.locator("#run-status")).to_contain_text("mine/new", timeout=SECONDS)
    expect(shown.tab.locator("#run-status")).to_contain_text(re.compile("training: step .* left"), timeout=2 * SECONDS)
    expect(shown.tab.locator("#run-curves svg").first).to_be_visible(timeout=SECONDS)
    shown.shoot("train-live")
    shown.button("run-stop").click()
    expect(shown.tab.locator("#run-status")).to_contain_text("stopped: step", timeout=SECONDS)
    step = RunView(run, served.page.places.runs).step
    assert list((run / "checkpoints").glob("step-*"))
    shown.mode("Output")
    expect(shown.tab.locator("#run-output")).to_contain_text("SIGTERM received", timeout=SECONDS)
    expect(shown.button("run-stop")).to_be_disabled(timeout=SECONDS)
    shown.tab.locator("#run-form button").first.click()
    shown.tab.get_by_label("1: autoencoder").click()
    expect(shown.tab.locator("#run-point input")).to_have_value("pictures/vae", timeout=SECONDS)
    pick(shown, "run-point", "the run mine/new")
    expect(shown.tab.locator("#run-name input, #run-name textarea").first).to_have_value("mine/new", timeout=SECONDS)
    shown.tab.locator("#field-steps input").fill(str(step + 20))
    shown.button("run-start").click()
    expect(shown.tab.locator("#run-status")).to_contain_text(f"finished: {step + 20:,} steps", timeout=2 * SECONDS)
    assert trainings.started_by_page(run) is None


def test_a_dataset_is_searched_and_inspected(shown: Shown, served: Served) -> None:
    shown.mode("Data")
    expect(shown.tab.locator("#search-images img").first).to_be_visible(timeout=SECONDS)
    words = shown.tab.locator("#search-words input, #search-words textarea").first
    words.fill("odd")
    shown.button("search").click()
    expect(shown.tab.locator("#search-found")).to_contain_text("1 image;")
    expect(shown.tab.locator("#search-images")).to_contain_text("<script>")
    shown.shoot("data-search")
    shown.button("inspect").click()
    shown.mode("Report")
    expect(shown.tab.locator("#data-figures .bars").first).to_be_visible(timeout=SECONDS)
    expect(shown.tab.locator("#data-report")).to_contain_text("64 for training, 24 held out")
    shown.shoot("data-report")
    shown.mode("Contact sheet")
    expect(shown.tab.locator("#contact-sheet img")).to_be_visible(timeout=SECONDS)
    shown.mode("Duplicates")
    expect(shown.tab.locator("#duplicates-text")).to_contain_text("redundant images")
    shown.mode("Damaged")
    expect(shown.tab.locator("#data-damaged")).to_contain_text("no damaged images")


def test_two_models_are_compared_blindly_with_keys(shown: Shown, served: Served, browser: Browser) -> None:
    shown.mode("Compare")
    shown.tab.locator("#new-comparison button").first.click()
    name = shown.tab.locator("#compare-name input, #compare-name textarea").first
    name.fill("a/b")
    shown.button("compare-start").click()
    expect(shown.tab.get_by_text("give the new comparison a name without /")).to_be_visible()
    name.fill("mine")
    shown.tab.locator("#compare-prompts textarea").fill(f"a red star\n{MARKUP}")
    shown.tab.locator("#compare-pairs input").fill("4")
    shown.tab.locator("#compare-steps input").fill("2")
    shown.button("compare-start").click()
    expect(shown.tab.locator("#image-1 img")).to_be_visible(timeout=SECONDS)
    expect(shown.tab.locator("#image-2 img")).to_be_visible(timeout=SECONDS)
    shown.shoot("compare")
    page = shown.tab.content()
    sources = [shown.tab.locator(f"#image-{k} img").get_attribute("src") or "" for k in (1, 2)]
    assert not re.search(r"first\.png|second\.png|-first|-second", page)
    assert not any(word in source for source in sources for word in ("first", "second", "small", "other"))
    poll = Poll.open(served.page.places.runs / "compare/mine")
    label = shown.tab.locator("#compare-prompt")
    shown.tab.locator("#voter input, #voter textarea").first.fill("me")
    shown.tab.keyboard.press("1")  # in a field, a digit is text
    shown.tab.locator("#voter input, #voter textarea").first.fill("me")
    shown.tab.mouse.click(3, 500)
    expect(label).to_contain_text("Pair 1 of 4", timeout=SECONDS)
    shown.tab.wait_for_timeout(500)
    for k, key in enumerate("120", 2):
        shown.tab.keyboard.press(key)
        expect(label).to_contain_text(f"Pair {k} of 4", timeout=SECONDS)
    again = open_page(browser, served)  # after a reload, the voter goes on
    again.mode("Compare")
    again.tab.locator("#voter input, #voter textarea").first.fill("me")
    expect(again.tab.locator("#compare-prompt")).to_contain_text("Pair 4 of 4", timeout=SECONDS)
    again.tab.mouse.click(3, 500)
    again.tab.keyboard.press("=")
    expect(again.tab.locator("#compare-prompt")).to_contain_text("All pairs are done", timeout=SECONDS)
    again.tab.locator("#compare-result button").first.click()
    again.button("show-result").click()
    expect(again.tab.locator("#result")).to_contain_text("95 % interval")
    again.shoot("compare-result")
    again.tab.close()
    again.check(served)
    votes = poll.votes()
    assert [vote["pair"] for vote in votes] == poll.study.order("me")
    assert [vote["vote"] for vote in votes] == ["left", "right", "tie", "tie"]
    sides = {True: "first", False: "second"}
    expected = [sides[poll.study.first_is_left("me", pair)] for pair in poll.study.order("me")]
    assert [vote["left"] for vote in votes] == expected
    assert poll.result().ties == 2
