"""The page's tab of datasets: search by caption, small copies, and the report of inspect_data."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.errors import UserError
from train.page import data, datasets
from train.page.datasets import dataset_names, duplicate_groups, enlarged, search
from train.page.places import Places
from train.page.shared import Page

MARKUP = "<script>alert(1)</script> $x$"


@pytest.fixture
def page(tmp_path: Path) -> Page:
    """A page with one dataset: 30 images, of which two are equal and one can't be read."""
    folder = tmp_path / "data/mine"
    folder.mkdir(parents=True)
    for k in range(30):
        pixels = np.random.default_rng(k).integers(0, 256, (20, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{k:02d}.png")
        (folder / f"{k:02d}.txt").write_text(f"number {k} of {'Even' if k % 2 == 0 else 'odd'} things\n")
    (folder / "01.png").write_bytes((folder / "00.png").read_bytes())
    (folder / "02.png").write_bytes(b"no image")
    (folder / "03.txt").write_text(MARKUP)
    datasets._OPENED.clear()
    return Page(Places(tmp_path / "runs", tmp_path / "runs", tmp_path / "data", tmp_path / "out"))


def test_search_finds_captions_with_all_words(page: Page) -> None:
    path = page.places.data / "mine"
    count, found = search(path, "EVEN number", 0, 100)
    assert count == 15
    assert all("Even" in image.caption for image in found)
    assert sorted(image.name for image in found) == [f"{k:02d}.png" for k in range(0, 30, 2)]
    assert search(path, "even odd", 0, 100) == (0, [])
    count, everything = search(path, "", 0, 100)
    assert count == len(everything) == 30
    count, part = search(path, "", 10, 5)
    assert (count, [image.name for image in part]) == (30, [image.name for image in everything[10:15]])
    assert search(path, "script", 0, 5)[1][0].caption == MARKUP


def test_the_page_gets_small_copies_only(page: Page) -> None:
    Image.effect_noise((2000, 100), 50).save(page.places.data / "mine/large.png")
    _, found = search(page.places.data / "mine", "", 0, 100)
    sizes = {image.name: image.image.size for image in found}
    assert sizes["large.png"] == (256, 13)
    assert sizes["00.png"] == (120, 60)
    assert sizes["02.png"] == (64, 64)  # grey, in place of the damaged one
    pixels = enlarged(Image.new("RGB", (3, 2)), 128)
    assert pixels.size == (129, 86)


def test_an_inspection_is_a_job_whose_report_stays(page: Page) -> None:
    job = data.submit(page, "mine", "all", 32, 0)
    assert page.jobs.wait(job, 60)
    assert (job.state, job.text) == ("done", "")
    folder = data.report_folder(page.places, "mine")
    report = json.loads((folder / "report.json").read_text())
    assert report["data"]["looked_at"] == 30
    version, figures, text, sheet, copies, groups, damaged = data._report(page.places, "mine", "")
    assert "Length of the captions" in figures
    assert "<script" not in figures + text + copies + damaged
    assert "02.png" in damaged
    assert sheet is not None
    assert [caption for _, caption in groups] == ["group 1: 00.png", "group 1: 01.png"]
    assert "1 groups, 1 redundant images" in copies
    (again,) = {type(part) for part in data._report(page.places, "mine", version)}  # nothing new
    assert again is not str
    (found,) = duplicate_groups(page.places.data / "mine", folder)
    assert found[0].image.tobytes() == found[1].image.tobytes()


def test_a_report_that_somebody_changed_is_none(page: Page) -> None:
    folder = data.report_folder(page.places, "mine")
    folder.mkdir(parents=True)
    for text in ("", "[]", "{}", '{"captions": 3, "images": []}', "[" * 100_000):
        (folder / "report.json").write_text(text)
        assert "not inspected yet" in data._report(page.places, "mine", "")[1]


@pytest.mark.parametrize("name", ["../data/mine", "/etc", "pipe:touch x", "some/dataset", "", None, "none", "mine\0"])
def test_only_datasets_in_the_folder_are_read(page: Page, name: str) -> None:
    with pytest.raises(UserError):
        data.submit(page, name, "all", 32, 0)
    if name:
        with pytest.raises(UserError):
            data._search(page.places, name, "", 1)
    else:
        line = f"no dataset is chosen: there must be one in --data {str(page.places.data)!r}"
        assert data._search(page.places, name, "", 1) == (line, [])
    assert page.jobs.all() == []


def test_links_in_a_dataset_lead_nowhere(page: Page, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    Image.new("RGB", (8, 8)).save(secret / "s.png")
    (secret / "s.txt").write_text("secret")
    (page.places.data / "mine/link.png").symlink_to(secret / "s.png")
    (page.places.data / "mine/link.txt").symlink_to(secret / "s.txt")
    with pytest.raises(UserError, match="is a link to a file outside"):
        search(page.places.data / "mine", "secret", 0, 10)
    (page.places.data / "out").symlink_to(secret, target_is_directory=True)
    with pytest.raises(UserError, match="a link leads out"):
        data._search(page.places, "out", "", 1)
    assert dataset_names(page.places) == ["mine", "out"]


@pytest.mark.parametrize("values", [("nothing", 32, 0), ("all", "x", 0), ("all", 10**9, 0), (None, 32, 0)])
def test_wrong_settings_are_one_line(page: Page, values: tuple[object, ...]) -> None:
    with pytest.raises((UserError, ValueError)):
        data.submit(page, "mine", *values)
    assert page.jobs.all() == []


@pytest.mark.parametrize(("values", "line"), [(("all", 4, 0), "--resolution 4"), (("all", 32, -1), "--limit -1")])
def test_a_failed_job_has_the_commands_line(page: Page, values: tuple[object, ...], line: str) -> None:
    job = data.submit(page, "mine", *values)
    assert page.jobs.wait(job, 60)
    assert (job.state, job.text.startswith(line)) == ("failed", True)
    assert line in data._status(page)


def test_a_cancelled_inspection_ends(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    read = datasets.SourceConfig().center_framing(8).load
    monkeypatch.setattr("train.data.images.crop.Framing.load", lambda self, *a: (time.sleep(0.05), read(*a))[1])
    monkeypatch.setattr("train.commands.inspect_data._IMAGE_BATCH", 1)
    job = data.submit(page, "mine", "all", 32, 0)
    while not job.progress:
        time.sleep(0.01)
    page.jobs.cancel(job.id)
    assert page.jobs.wait(job, 10)
    assert job.state == "cancelled"
    assert not (data.report_folder(page.places, "mine") / "report.json").exists()


def test_lengths_are_binned() -> None:
    assert data._binned({3: 1, 5: 2}) == [("3", 1), ("4", 0), ("5", 2)]
    bins = data._binned(dict.fromkeys(range(1, 101), 1))
    assert sum(count for _, count in bins) == 100
    assert len(bins) <= 24
    assert bins[0] == ("1 – 5", 5)
