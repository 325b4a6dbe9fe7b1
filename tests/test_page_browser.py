"""The web page in a real browser, headless Chromium: every feature by clicks, and no request leaves the machine."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from ldm.formats.png import read_png
from support.browser import SECONDS, Shown, chromium, open_page
from support.models import distilled_pipeline
from support.page import Served, serving
from train.config.generation import Txt2ImgOptions
from train.page import painting

pytestmark = pytest.mark.slow
MARKUP = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script> ${1+1} {{ 1+1 }}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("page")) as served:
        distilled_pipeline().save_pretrained(served.page.places.models / "student")
        (served.page.places.models / "student/training.json").write_text('{"config": {"scales": [2, 6]}}')
        values = {"model": "small", "prompt": "a small red star", "steps": 2, "num_images": 2, "seed": 0}
        o = painting.options(Txt2ImgOptions, served.page, values)
        painting.submit(served.page, "first", lambda job: painting.generate(o, job, served.page))
        done(served, 1)
        yield served


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def shown(browser: Browser, served: Served) -> Iterator[Shown]:
    shown = open_page(browser, served)
    yield shown
    shown.tab.close()
    shown.check(served)


def newest_job(served: Served):
    return served.page.jobs.all()[0]


def done(served: Served, count: int) -> list[Path]:
    """Wait until job number `count` is done; return its files."""
    deadline = time.monotonic() + 60
    while not ((jobs := served.page.jobs.all()) and jobs[0].id >= count and jobs[0].finished):
        assert time.monotonic() < deadline, jobs
        time.sleep(0.05)
    job = newest_job(served)
    assert job.state == "done", job
    return [served.page.places.out / name for name in job.result]


def after(served: Served) -> int:
    """Number of the next job."""
    jobs = served.page.jobs.all()
    return jobs[0].id + 1 if jobs else 1


def test_an_image_from_text_with_its_settings(shown: Shown, served: Served) -> None:
    number = after(served)
    shown.fill("Prompt", "a small red star")
    shown.fill("Steps (0: own)", 5)
    shown.fill("Seed (−1: any)", 7)
    shown.fill("Images", 2)
    shown.button("generate-text").click()
    first, second = done(served, number)
    assert [read_png(path)["seed"] for path in (first, second)] == [7, 8]
    assert read_png(first)["steps"] == 5
    shown.see(second)
    shown.choose(1)
    assert shown.settings().startswith("a small red star\nSteps: 5")
    shown.shoot("text")


def test_every_tab_opens(shown: Shown) -> None:
    """Without an error, also where there is nothing to show."""
    for name in ("Train", "Data", "Compare", "Paint"):
        shown.mode(name)
        expect(shown.tab.get_by_role("tab", name=name, exact=True)).to_have_attribute("aria-selected", "true")
        shown.shoot(f"tab-{name}")
    expect(shown.tab.locator(".toast-body")).to_have_count(0)


def choose_model(shown: Shown, name: str) -> None:
    shown.tab.locator("#model input").click()
    shown.tab.get_by_role("option", name=name, exact=True).click()


def value(shown: Shown, label: str) -> str:
    return shown.tab.get_by_label(label, exact=True).locator("visible=true").first.input_value()


def test_a_student_brings_its_own_settings_and_warnings_are_shown(shown: Shown, served: Served) -> None:
    expect(shown.button("model")).to_contain_text("25 steps of dpmpp_2m, 32 × 32 pixels")
    shown.fill("Steps (0: own)", 30)
    shown.fill("Images", 1)
    choose_model(shown, "student")
    expect(shown.button("model")).to_contain_text(
        "4 steps of lcm, 32 × 32 pixels. Guidance 2 to 6. No negative prompt."
    )
    assert value(shown, "Steps (0: own)") == "0"
    shown.fill("Guidance (CFG)", 9)
    number = after(served)
    shown.button("generate-text").click()
    (path,) = done(served, number)
    assert (read_png(path)["steps"], read_png(path)["sampler"]) == (4, "lcm")
    expect(shown.tab.locator("#status .warned")).to_contain_text("this model was trained with 2 to 6")
    shown.see(path)
    shown.choose(0)
    expect(shown.tab.locator("#note textarea")).to_have_value(re.compile("trained with 2 to 6"))
    shown.shoot("student")
    shown.fill("Negative prompt", "blue")
    number = after(served)
    shown.button("generate-text").click()
    expect(shown.tab.locator("#status")).to_contain_text(f"job {number}, failed")
    expect(shown.tab.locator("#status .failed")).to_contain_text("this model's guidance is distilled")
    choose_model(shown, "small")
    expect(shown.button("model")).to_contain_text("25 steps of dpmpp_2m")
    assert value(shown, "Guidance (CFG)") == "3"


def test_the_seen_image_stays_when_newer_ones_come(shown: Shown, served: Served) -> None:
    shown.fill("Steps (0: own)", 2)
    shown.choose(1)
    settings, seen = shown.settings(), shown.tab.locator("#gallery .media-button img").first
    source = seen.get_attribute("src")
    number = after(served)
    shown.button("generate-text").click()
    done(served, number)
    shown.tab.wait_for_timeout(2000)
    assert (seen.get_attribute("src"), shown.settings()) == (source, settings)


def test_control_enter_generates_and_a_reload_keeps_the_form(shown: Shown, served: Served) -> None:
    shown.fill("Steps (0: own)", 3)
    shown.fill("Images", 1)
    shown.fill("Prompt", "a kept prompt")
    number = after(served)
    shown.tab.get_by_label("Prompt", exact=True).locator("visible=true").first.press("Control+Enter")
    (path,) = done(served, number)
    assert (read_png(path)["steps"], read_png(path)["prompt"]) == (3, "a kept prompt")
    shown.tab.reload()
    expect(shown.tab.get_by_label("Prompt", exact=True).locator("visible=true").first).to_have_value("a kept prompt")
    assert (value(shown, "Steps (0: own)"), value(shown, "Images")) == ("3", "1")


def test_models_are_switched_without_a_restart(shown: Shown, served: Served) -> None:
    shown.fill("Seed (−1: any)", 1)
    shown.fill("Images", 1)
    shown.fill("Steps (0: own)", 3)
    files = []
    for name in ("small", "other"):
        number = after(served)
        choose_model(shown, name)
        shown.button("generate-text").click()
        files += done(served, number)
    small, other = (np.asarray(Image.open(path)) for path in files)
    assert (small != other).any()


def test_preview_cancel_and_a_reload_in_the_middle(shown: Shown, browser: Browser, served: Served) -> None:
    shown.fill("Prompt", "a large blue circle")
    shown.fill("Steps (0: own)", 1000)
    shown.fill("Images", 8)
    number = after(served)
    shown.button("generate-text").click()
    expect(shown.tab.locator("#status img")).to_be_visible(timeout=SECONDS)  # the preview
    shown.shoot("preview")
    shown.tab.reload()
    expect(shown.tab.locator("#status")).to_contain_text(f"job {number}, running", timeout=SECONDS)
    second = open_page(browser, served)  # sees the same job
    expect(second.tab.locator("#status")).to_contain_text(f"job {number}, running")
    second.button("cancel").click()
    expect(shown.tab.locator("#status")).to_contain_text(f"job {number}, cancelled")
    second.tab.close()
    assert newest_job(served).result == []


def test_image_to_image_from_the_gallery_and_from_an_upload(shown: Shown, served: Served, tmp_path: Path) -> None:
    shown.fill("Steps (0: own)", 4)
    shown.fill("Images", 1)
    shown.choose(0)
    shown.button("to-image").click()
    expect(shown.tab.locator("#start-image img")).to_be_visible()
    number = after(served)
    shown.button("generate-image").click()
    (path,) = done(served, number)
    assert read_png(path)["strength"] == 0.8
    shown.shoot("image")
    Image.effect_noise((40, 56), 90).convert("RGB").save(tmp_path / "noise.jpg")
    shown.tab.locator("#start-image button[aria-label*='emove'], #start-image button[aria-label*='lear']").first.click()
    shown.tab.locator("#start-image input[type=file]").set_input_files(tmp_path / "noise.jpg")
    expect(shown.tab.locator("#start-image img")).to_be_visible()
    number = after(served)
    shown.button("generate-image").click()
    (path,) = done(served, number)
    assert Image.open(path).size == (40, 56)


def drag(shown: Shown, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw on the canvas with the mouse; positions are shares of its width and height."""
    box = shown.tab.locator("#canvas canvas").first.bounding_box()
    assert box
    points = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in (start, end)]
    mouse = shown.tab.mouse
    mouse.move(*points[0])
    mouse.down()
    mouse.move(*points[1], steps=15)
    mouse.up()


def test_a_mask_drawn_with_the_mouse_is_inpainted(shown: Shown, served: Served) -> None:
    shown.fill("Prompt", "a small red star")
    shown.fill("Steps (0: own)", 4)
    shown.fill("Images", 1)
    shown.choose(0)
    shown.mode("Inpaint")  # the empty editor is seen before
    expect(shown.tab.locator("#canvas").get_by_text("Upload an image")).to_be_visible(timeout=SECONDS)
    shown.mode("Text to image")
    shown.to_inpaint()
    shown.shoot("canvas")
    drag(shown, (0.4, 0.4), (0.6, 0.4))
    shown.shoot("drawn")
    number = after(served)
    shown.button("generate-inpaint").click()
    (path,) = done(served, number)
    settings = read_png(path)
    sent = served.page.places.out / painting.gallery(served.page.places)[1]
    assert (np.asarray(Image.open(settings["image"])) == np.asarray(Image.open(sent))).all()
    mask, given, made = (np.asarray(Image.open(p).convert("RGB")) for p in (settings["mask"], settings["image"], path))
    white = mask[..., 0] == 255
    assert 0 < white.mean() < 0.5
    assert (made[~white] == given[~white]).all()
    assert (made[white] != given[white]).any()


def test_an_image_is_extended(shown: Shown, served: Served) -> None:
    shown.fill("Steps (0: own)", 4)
    shown.fill("Images", 1)
    shown.choose(0)
    shown.to_inpaint()
    shown.fill("right", 8)
    number = after(served)
    shown.button("generate-inpaint").click()
    (path,) = done(served, number)
    given = np.asarray(Image.open(read_png(path)["image"]))
    made = np.asarray(Image.open(path))
    assert made.shape == (given.shape[0], given.shape[1] + 8, 3)
    assert (made[:, :-8] == given).all()


def test_again_with_this_seed_and_use_its_settings(shown: Shown, served: Served) -> None:
    shown.choose(0)
    name = re.search(r"Seed: (\d+)", shown.settings())
    assert name
    shown.fill("Prompt", "a blue square")
    shown.fill("Steps (0: own)", 3)
    number = after(served)
    shown.button("again").click()
    (path,) = done(served, number)
    assert read_png(path)["seed"] == int(name[1])
    assert read_png(path)["prompt"] == "a blue square"
    shown.fill("Prompt", "")
    shown.see(path)
    shown.choose(0)
    shown.button("use").click()
    expect(shown.tab.get_by_label("Prompt", exact=True).locator("visible=true").first).to_have_value("a blue square")


def test_a_dropped_png_repeats_its_image(shown: Shown, served: Served) -> None:
    number = after(served)
    shown.fill("Prompt", "a green square")
    shown.fill("Steps (0: own)", 6)
    shown.fill("Seed (−1: any)", 5)
    shown.fill("Images", 1)
    shown.button("generate-text").click()
    (path,) = done(served, number)
    shown.tab.reload()
    expect(shown.button("generate-text")).to_be_visible()
    shown.tab.locator("#dropped input[type=file]").set_input_files(path)
    expect(shown.tab.get_by_label("Prompt", exact=True).locator("visible=true").first).to_have_value("a green square")
    shown.shoot("dropped")
    content = path.read_bytes()
    path.unlink()
    number = after(served)
    shown.button("generate-text").click()
    (again,) = done(served, number)
    assert again.read_bytes() == content


def test_a_grid_of_two_settings(shown: Shown, served: Served) -> None:
    shown.fill("Prompt", "a small red star")
    shown.mode("Grid")
    shown.tab.get_by_label("Values", exact=True).nth(0).fill("2, 4-6 (+2)")
    shown.tab.get_by_label("Values", exact=True).nth(1).fill("1, 3")
    number = after(served)
    shown.button("generate-grid").click()
    *cells, sheet = done(served, number)
    assert [(read_png(p)["steps"], read_png(p)["guidance_scale"]) for p in cells] == [
        (steps, guidance) for guidance in (1, 3) for steps in (2, 4, 6)
    ]
    assert read_png(sheet)["grid"] == {"Steps": ["2", "4", "6"], "Guidance": ["1", "3"]}
    shown.see(sheet)
    shown.choose(0)
    shown.shoot("grid")


def test_a_grid_of_image_to_image(shown: Shown, served: Served) -> None:
    shown.fill("Steps (0: own)", 4)
    shown.choose(0)
    shown.button("to-image").click()
    expect(shown.tab.locator("#start-image img")).to_be_visible()
    shown.mode("Grid")
    shown.tab.locator("#grid-of").get_by_label("Image to image").click()
    shown.tab.get_by_label("Columns", exact=True).click()
    shown.tab.get_by_role("option", name="Strength", exact=True).click()
    shown.tab.get_by_label("Values", exact=True).nth(0).fill("0.25, 0.75")
    number = after(served)
    shown.button("generate-grid").click()
    *cells, _ = done(served, number)
    assert [read_png(path)["strength"] for path in cells] == [0.25, 0.75] * 3
    shown.shoot("grid-image")


def test_an_animation(shown: Shown, served: Served) -> None:
    shown.fill("Prompt", "a small red star")
    shown.fill("Steps (0: own)", 2)
    shown.mode("Animation")
    shown.fill("Prompts to change to, one per line", "a large blue square")
    shown.fill("Frames per prompt", 5)
    number = after(served)
    shown.button("generate-gif").click()
    *frames, animation = done(served, number)
    assert len(frames) == 5
    with Image.open(animation) as image:
        assert (image.format, image.n_frames) == ("GIF", 5)
    shown.see(animation)
    shown.choose(0)
    shown.shoot("animation")


def test_markup_in_a_prompt_is_text(shown: Shown, served: Served, tmp_path: Path) -> None:
    number = after(served)
    shown.fill("Prompt", MARKUP)
    shown.fill("Steps (0: own)", 2)
    shown.fill("Images", 1)
    shown.button("generate-text").click()
    (path,) = done(served, number)
    expect(shown.tab.locator("#status")).to_contain_text("<img src=x")
    shown.see(path)
    shown.choose(0)
    assert shown.settings().startswith(MARKUP)
    named = tmp_path / "<img src=x onerror=document.title='run'>.png"
    named.write_bytes(b"not an image")
    shown.tab.locator("#dropped input[type=file]").set_input_files(named)
    expect(shown.tab.locator(".toast-body")).to_be_visible()
    shown.shoot("markup")
    assert shown.tab.title() != "run"


def test_an_error_is_one_line(shown: Shown, served: Served) -> None:
    shown.fill("Prompt", "a star")
    shown.fill("Width (0: own)", 33)
    number = after(served)
    shown.button("generate-text").click()
    expect(shown.tab.locator("#status")).to_contain_text(f"job {number}, failed")
    expect(shown.tab.locator("#status")).to_contain_text("must be positive multiples")
    shown.mode("Inpaint")
    shown.button("generate-inpaint").click()
    expect(shown.tab.locator(".toast-body")).to_contain_text("give an image to inpaint")
    shown.shoot("error")
