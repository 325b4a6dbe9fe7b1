"""The page's models: their own settings in the form, students of distillation, and the warnings of commands."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from ldm.formats.png import read_png
from support.models import distilled_pipeline
from support.page import make_folders
from train.config.generation import Txt2ImgOptions
from train.page import painting
from train.page.jobs import Job
from train.page.models import Traits
from train.page.paint_form import OWN, Form
from train.page.painter import Painter
from train.page.shared import Page
from train.page.view import describe

SKIP = gr.skip()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(make_folders(tmp_path_factory.mktemp("page")), device="cpu")
    distilled_pipeline().save_pretrained(page.places.models / "student")
    (page.places.models / "student/training.json").write_text(json.dumps({"config": {"scales": [2, 6]}}))
    yield page
    page.jobs.close()


def generated(page: Page, **values: Any) -> Job:
    """Generate with the page's form; return the job, which has ended."""
    given = {"model": "small", "prompt": "a small red star", "steps": 2, "seed": 0, "num_images": 1} | values
    o = painting.options(Txt2ImgOptions, page, given)
    job = painting.submit(page, "test", lambda job: painting.generate(o, job, page))
    assert page.jobs.wait(job, 60)
    return job


def test_traits_are_read_without_loading_the_model(page: Page, tmp_path: Path) -> None:
    models = page.places.models
    assert Traits.read(models / "small") == Traits("dpmpp_2m", 25, (32, 32))
    assert Traits.read(models / "small").line() == "Its own settings: 25 steps of dpmpp_2m, 32 × 32 pixels."
    assert Traits.read(models / "student") == Traits("lcm", 4, (32, 32), distilled=True, scales=(2, 6))
    assert Traits.read(models / "student").line().endswith("Guidance 2 to 6. No negative prompt.")
    for content in ("", "[]", "{}", '{"sample_size": "x"}', '{"sample_size": [1]}', '{"sample_size": 8}'):
        (tmp_path / "unet").mkdir(exist_ok=True)
        (tmp_path / "unet/config.json").write_text(content)
        assert Traits.read(tmp_path).line() == ""


def test_another_kind_of_model_brings_its_own_steps_sampler_and_guidance(page: Page) -> None:
    with gr.Blocks():
        form = Form(page)
    small, student = form.traits("small"), form.traits("student")
    field, traits, *settings = form.switched("student", small)
    assert (field.info, traits, settings) == (student.line(), student, [0, OWN, 3.0])
    assert form.switched("small", student)[1:] == [small, 0, OWN, 3.0]
    # What was chosen for one model stays for another that is sampled in the same way.
    assert form.switched("other", small)[2:] == [SKIP] * 3
    # A name that is being typed changes nothing.
    assert form.switched("stud", small)[1:] == [small, *[SKIP] * 3]


def test_the_form_s_own_settings_are_the_student_s(page: Page) -> None:
    job = generated(page, model="student", steps=0, sampler=None)
    (name,) = job.result
    saved = read_png(page.places.out / name)
    assert (saved["sampler"], saved["steps"], job.warnings) == ("lcm", 4, [])


@pytest.mark.parametrize("change", [{"negative_prompt": "blue"}, {"guidance_rescale": 0.5}], ids=str)
def test_what_a_student_does_not_have_is_refused_in_one_line(page: Page, change: dict[str, Any]) -> None:
    job = generated(page, model="student", steps=0, **change)
    assert job.state == "failed"
    assert job.text.endswith("this model's guidance is distilled, so only its scale can be chosen; leave it out")


def test_warnings_are_shown_beside_the_result(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    """One of each way in which commands warn, again in each job."""
    long = "<b> star " * 30
    for model, change, said in (
        ("small", {"prompt": long}, "this part is ignored"),
        ("small", {"width": 64, "height": 64}, "far from the 32 × 32 of the model's training"),
        ("student", {"guidance_scale": 9.0}, "--guidance-scale 9: this model was trained with 2 to 6"),
        ("small", {"sampler": "lcm"}, "the model isn't saved as a consistency model"),
    ) * 2:
        job = generated(page, model=model, **change)
        (line,) = job.warnings
        assert (job.state, said in line) == ("done", True)
        shown = describe(page)
        assert 'class="warned"' in shown
        assert "<b>" not in shown
        assert f"warning: {line[:40]}" in capsys.readouterr().err
    assert generated(page).warnings == []
    assert "warned" not in describe(page)


def test_a_job_has_a_limited_number_of_warnings_of_one_line(page: Page) -> None:
    job = page.jobs.submit("paint", "x", lambda job: [job.warn(f"a\nb {k // 2}" + "x" * 10_000) for k in range(100)])
    assert page.jobs.wait(job, 60)
    assert len(job.warnings) == 20
    assert job.warnings[1].startswith("a b 1xx")
    assert max(map(len, job.warnings)) <= 500


def test_an_image_that_was_sent_to_the_editor_keeps_its_size_and_pixels(page: Page) -> None:
    """Although the editor shows it enlarged, and the browser may round its colours."""
    with gr.Blocks():
        painter = Painter(page, Form(page))
    (name,) = generated(page, width=24, height=32).result
    original = Image.open(page.places.out / name).convert("RGB")
    shown, sent = painter.to_inpaint(name)
    enlarged = shown["background"]
    assert enlarged.size == (24 * 16, 32 * 16)
    rounded = enlarged.point(lambda value: max(0, value - 3))
    for image in (enlarged, rounded):
        assert painter._as_sent(image, sent).tobytes() == original.tobytes()
    other = enlarged.copy()
    other.paste((0, 255, 0), (100, 100, 200, 200))
    small = enlarged.resize((24, 40))
    for image, name_of_sent in ((other, sent), (small, sent), (enlarged, ""), (enlarged, None), (enlarged, "../x.png")):
        assert painter._as_sent(image, name_of_sent) is image


def test_a_page_without_models_says_what_to_do(tmp_path: Path) -> None:
    places = make_folders(tmp_path)
    page = Page(type(places)(tmp_path / "data", places.runs, places.data, places.out), device="cpu")
    with gr.Blocks():
        form = Form(page)
    assert "start the page with --models" in str(form.model.info)
    with pytest.raises(ValueError, match="no model is chosen: there must be one in --models"):
        painting.options(Txt2ImgOptions, page, {"model": None, "prompt": "x"})
