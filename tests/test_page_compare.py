"""The page's blind comparison: the statistics in closed form, the order and sides of pairs, votes that last."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from ldm.errors import UserError
from support.models import PROMPTS, distilled_pipeline, tiny_pipeline
from train.evaluation.preference import Interval, Preference, Z, sign_test, wilson
from train.page import compare, comparing
from train.page.places import Places
from train.page.shared import Page
from train.page.studies import Poll, Study, find_studies, image_path, save_image

# -- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wins", "n"), [(0, 10), (10, 10), (5, 10), (1, 3), (37, 90), (1, 1)])
def test_the_interval_is_wilsons(wins: int, n: int) -> None:
    low, high = wilson(wins / n, n)
    reference = binomtest(wins, n).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-9)
    share = wins / n
    for end in {low, high} - {0.0, 1.0}:  # both ends solve (p̂ − p)² = z² p (1 − p) / n
        assert (share - end) ** 2 == pytest.approx(Z**2 * end * (1 - end) / n)


def test_the_interval_in_closed_form() -> None:
    assert wilson(0.0, 10) == pytest.approx((0.0, Z**2 / (10 + Z**2)))
    low, high = wilson(0.5, 16)
    assert high - 0.5 == pytest.approx(0.5 - low) == pytest.approx(0.5 * Z / math.sqrt(16 + Z**2))
    assert wilson(0.5, 0) == Interval(0.0, 1.0)


def test_the_interval_covers_its_share_with_and_without_ties() -> None:
    rng = np.random.default_rng(0)
    for ties in (0.0, 0.4):
        p = 0.6 * (1 - ties) + ties / 2
        votes = rng.multinomial(80, [0.4 * (1 - ties), 0.6 * (1 - ties), ties], 2000)
        intervals = [Preference(*row.tolist()).interval for row in votes]
        assert np.mean([low <= p <= high for low, high in intervals]) >= 0.94


@pytest.mark.parametrize(("a", "b"), [(0, 0), (5, 5), (0, 5), (1, 7), (30, 12), (3, 4)])
def test_the_sign_test_is_exact(a: int, b: int) -> None:
    assert sign_test(a, b) == pytest.approx(binomtest(a, a + b).pvalue if a + b else 1.0)
    assert sign_test(a, b) == sign_test(b, a)


def test_ties_count_half() -> None:
    counts = Preference(first=3, second=5, ties=4)
    assert (counts.votes, counts.share) == (12, 7 / 12)
    assert counts.p_value == sign_test(3, 5)
    assert Preference().share == 0.5


# -- votes ----------------------------------------------------------------------------------------------------------


def made(folder: Path, pairs: int = 8, secret: str = "s") -> Poll:
    """Write a study whose first model's images are black and whose second model's are white."""
    for k in range(pairs):
        save_image(folder, k, "first", Image.new("RGB", (8, 8)))
        save_image(folder, k, "second", Image.new("RGB", (8, 8), "white"))
    prompts = tuple(f"prompt {k}" for k in range(pairs))
    Study(first="m1", second="m2", prompts=prompts, seeds=tuple(range(pairs)), secret=secret).write(folder)
    return Poll.open(folder)


def test_each_voter_has_an_order_and_sides_of_their_own(tmp_path: Path) -> None:
    study = Study(first="a", second="b", prompts=("p",) * 400, seeds=tuple(range(400)), secret="x")
    orders = {voter: study.order(voter) for voter in ("", "me", "you")}
    assert all(sorted(order) == list(range(400)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 3
    sides = {voter: [study.first_is_left(voter, k) for k in range(400)] for voter in orders}
    assert all(140 < sum(left) < 260 for left in sides.values())
    assert sides["me"] != sides["you"]
    other = Study(first="a", second="b", prompts=("p",) * 400, seeds=tuple(range(400)))
    assert other.order("me") != orders["me"]
    assert len(other.secret) == 32


def test_votes_go_to_the_model_on_that_side_and_survive(tmp_path: Path) -> None:
    """A voter who always prefers the white image prefers the second model, whatever the side."""
    poll = made(tmp_path / "study")
    seen, lefts = [], []
    while pair := Poll.open(tmp_path / "study").next_pair("me"):  # as after a restart
        assert pair.done == len(seen)
        assert pair.total == 8
        assert {int(pair.left.mean()), int(pair.right.mean())} == {0, 255}
        assert pair.prompt == f"prompt {pair.number}"
        seen.append(pair.number)
        lefts.append(bool(pair.left.mean()))
        poll.vote("me", pair.number, "left" if pair.left.mean() else "right")
        poll.vote("me", pair.number, "tie")  # a second click on the same pair changes nothing
    assert seen == poll.study.order("me")
    assert 0 < sum(lefts) < 8
    assert poll.result() == Preference(0, 8, 0)
    poll.vote("you", poll.study.order("you")[0], "tie")
    assert poll.result() == Preference(0, 8, 1)
    rows = [json.loads(line) for line in poll.file.read_text().splitlines()]
    assert all(row["seed"] == row["pair"] and row["left"] in ("first", "second") for row in rows)


def test_bad_votes_are_refused_and_bad_lines_ignored(tmp_path: Path) -> None:
    poll = made(tmp_path / "study")
    first = poll.study.order("me")[0]
    for choice in ("first", "", "<b>", "LEFT"):
        with pytest.raises(UserError):
            poll.vote("me", first, choice)
    for voter in ("x" * 61, "a\0b", None):
        with pytest.raises(UserError):
            poll.vote(voter, first, "tie")  # type: ignore[arg-type]
    for number in (poll.study.order("me")[1], -1, 99):
        poll.vote("me", number, "tie")
    assert poll.result().votes == 0
    poll.vote("me", first, "tie")
    with open(poll.file, "ab") as file:
        file.write(b'[1]\n{"pair": 1}\n{"pair": 1e999, "voter": "x", "winner": "tie"}\n\xff\n{"pair": 3, "voter"')
    poll.vote("me", poll.study.order("me")[1], "tie")
    assert poll.result() == Preference(ties=2)
    for text in ("", "{}", "[]", json.dumps({"first": "a", "second": "b", "prompts": ["x"], "seeds": []})):
        (tmp_path / "study/study.json").write_text(text)
        with pytest.raises(UserError):
            Poll.open(tmp_path / "study")


def test_a_link_in_place_of_the_votes_is_not_followed(tmp_path: Path) -> None:
    poll, other = made(tmp_path / "study"), tmp_path / "other"
    other.write_text("")
    poll.file.symlink_to(other)
    with pytest.raises(UserError, match="link leads out"):
        poll.vote("me", poll.study.order("me")[0], "tie")
    assert other.read_text() == ""


def test_the_page_shows_no_sign_of_the_side(tmp_path: Path) -> None:
    """Only pixels, a number and the prompt reach the page: no file names, no metadata, no names of models."""
    places = Places(tmp_path, tmp_path, tmp_path, tmp_path)
    made(tmp_path / "compare/mine")
    number, prompt, left, right, *buttons = compare._pair(places, "mine", "me")
    assert isinstance(number, int)
    assert prompt.value == f"prompt {number}"
    for image in (left, right):
        assert type(image) is Image.Image
        assert (image.size, image.info, getattr(image, "filename", "")) == ((448, 448), {}, "")
    shown = compare._voting(places, "left")("mine", "me", number)
    assert shown[0] != number
    assert "m1" not in repr([prompt.value, prompt.label, *(b.value for b in buttons)])
    result = compare._result(places, "mine")
    assert "m1" in result
    assert "95 % interval" in result
    for name in ("../x", "mine/..", "", None, "none", "a/b"):
        with pytest.raises(UserError):
            compare._voting(places, "left")(name or "/", "me", 0)


# -- images ---------------------------------------------------------------------------------------------------------


SETTINGS = {"prompts": "\n".join(PROMPTS), "dataset": "", "pairs": 3, "seed": 5, "steps": 2} | {
    "guidance_scale": 1.5,
    "sampler": "ddim",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(folder / "a")
    tiny_pipeline(target="eps").save_pretrained(folder / "b")
    return folder


def test_both_models_generate_from_the_same_prompts_and_seeds(models: Path, tmp_path: Path) -> None:
    page = Page(Places(models, tmp_path / "runs", tmp_path, tmp_path / "out"), device="cpu")
    job = comparing.submit(page, "mine", ("a", "b"), SETTINGS)
    assert page.jobs.wait(job, 60)
    assert (job.state, job.text) == ("done", "")
    folder = tmp_path / "runs/compare/mine"
    assert find_studies(folder.parent) == ["mine"]
    poll = Poll.open(folder)
    assert poll.study.prompts == (PROMPTS[0], PROMPTS[1], PROMPTS[0])
    assert poll.study.seeds == (5, 6, 7)
    own = tiny_pipeline()(
        PROMPTS[1],
        num_inference_steps=2,
        guidance_scale=1.5,
        sampler="ddim",
        generator=torch.Generator().manual_seed(6),
    ).images[0]
    with Image.open(image_path(folder, 1, "first")) as stored:
        assert stored.info == {}
        assert np.abs(np.asarray(stored, int) - np.asarray(own, int)).max() <= 1  # batches round differently
    with pytest.raises(UserError, match="there is a comparison with this name"):
        comparing.submit(page, "mine", ("a", "b"), SETTINGS)


def test_each_model_can_have_its_own_sampler_and_steps(tmp_path: Path) -> None:
    distilled_pipeline().save_pretrained(tmp_path / "models/student")
    tiny_pipeline().save_pretrained(tmp_path / "models/plain")
    page = Page(Places(tmp_path / "models", tmp_path / "runs", tmp_path, tmp_path / "out"), device="cpu")
    job = comparing.submit(page, "mine", ("plain", "student"), SETTINGS | {"sampler": "own", "pairs": 1, "steps": 7})
    assert page.jobs.wait(job, 60)
    assert (job.state, job.text) == ("done", "")
    for side, pipe, steps, sampler in (
        ("first", tiny_pipeline(), 25, "dpmpp_2m"),
        ("second", distilled_pipeline(), 4, "lcm"),
    ):
        (expected,) = pipe(
            PROMPTS[0],
            num_inference_steps=steps,
            guidance_scale=1.5,
            sampler=sampler,
            generator=torch.Generator().manual_seed(5),
        ).images
        with Image.open(image_path(tmp_path / "runs/compare/mine", 0, side)) as stored:
            assert np.abs(np.asarray(stored, int) - np.asarray(expected, int)).max() <= 1


@pytest.mark.parametrize(
    "change",
    [
        {"pairs": 0},
        {"pairs": 501},
        {"pairs": "x"},
        {"steps": 0},
        {"seed": -1},
        {"seed": 2**63},
        {"prompts": " \n"},
        {"prompts": "x" * 2001},
        {"sampler": "none"},
        {"guidance_scale": "much"},
        {"prompts": "", "dataset": "../.."},
        {"name": "../x"},
        {"name": ".hidden"},
        {"name": ""},
        {"name": "a/b"},
        {"first": "someone/model"},
        {"first": "../a"},
        {"first": None},
    ],
    ids=str,
)
def test_wrong_settings_are_one_line_and_no_job(models: Path, tmp_path: Path, change: dict[str, object]) -> None:
    page = Page(Places(models, tmp_path / "runs", tmp_path, tmp_path / "out"))
    values = SETTINGS | change
    with pytest.raises((UserError, ValueError)) as refused:
        comparing.submit(page, change.get("name", "mine"), (change.get("first", "a"), "b"), values)
    assert refused.value
    assert page.jobs.all() == []
    assert not (tmp_path / "runs").exists()


def test_a_cancelled_comparison_leaves_nothing(models: Path, tmp_path: Path) -> None:
    page = Page(Places(models, tmp_path / "runs", tmp_path, tmp_path / "out"))
    job = comparing.submit(page, "mine", ("a", "b"), SETTINGS | {"pairs": 500, "steps": 100})
    while not job.progress:
        assert not job.finished, job.text
    page.jobs.cancel(job.id)
    assert page.jobs.wait(job, 20)
    assert job.state == "cancelled"
    assert list((tmp_path / "runs/compare").iterdir()) == []
