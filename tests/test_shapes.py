"""The Shapes dataset: captions, held-out scenes, geometry, files, and the checker that reads images."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

import train.data.synthetic.shapes as shapes_module
from ldm.errors import RunError, UserError
from support.commands import run_command
from train.data.synthetic.shapes import (
    BACKGROUNDS,
    COLOURS,
    DIAMETERS,
    HELD_OUT,
    RELATIONS,
    SHAPES,
    Box,
    Object,
    Placed,
    Scene,
    all_scenes,
    coverage,
    example,
    is_unseen,
    outline,
    parse_caption,
    place,
    prompts,
    render,
    write_shapes,
)
from train.data.synthetic.shapes_checker import read_scene, score, score_images

EVERY_SCENE = [s for count in (1, 2) for unseen in (False, True) for s in all_scenes(count, unseen)]


def rendered(count: int, side: int, seed: int = 1) -> tuple[list[np.ndarray], list[Scene]]:
    examples = [example(seed, "test", index) for index in range(count)]
    return [render(scene, side, rng) for scene, rng in examples], [scene for scene, _ in examples]


def softened(image: np.ndarray, rng: np.random.Generator, blur: float = 0.5, noise: float = 5) -> np.ndarray:
    """Blur an image and add noise, about as much as an autoencoder of 30 dB does."""
    soft = ndimage.gaussian_filter(image.astype(float), (blur, blur, 0)) + rng.normal(0, noise, image.shape)
    return np.clip(np.rint(soft), 0, 255).astype(np.uint8)


# Words


def test_captions_and_dicts_read_back_for_every_scene() -> None:
    assert len(EVERY_SCENE) == 60 * 4 + 60 * 59 * 4 * 4
    assert len({scene.caption for scene in EVERY_SCENE}) == len(EVERY_SCENE)
    for scene in EVERY_SCENE[::7]:
        assert parse_caption(scene.caption) == scene
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_captions_are_those_of_the_documentation() -> None:
    one, two = (
        "a large red circle on a white background",
        ("a small blue star above a large yellow square on a black background"),
    )
    assert parse_caption(one) == Scene((Object("circle", "red", "large"),), None, "white")
    assert parse_caption(two).objects == (Object("star", "blue", "small"), Object("square", "yellow", "large"))
    assert not is_unseen(parse_caption(one))
    assert not is_unseen(parse_caption(two))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a large red circle",
        "a large red circle on a mauve background",
        "A large red circle on a white background",
        "a large red circle on a white background ",
        "a red large circle on a white background",
        "a large red circle near a small red star on a white background",
    ],
)
def test_other_texts_are_not_captions(text: str) -> None:
    with pytest.raises(ValueError, match="is not a caption"):
        parse_caption(text)


def test_scenes_of_other_words_are_refused() -> None:
    thing = Object("circle", "red", "large")
    for wrong in (
        lambda: Object("disc", "red", "large"),
        lambda: Scene((thing,), "above", "white"),
        lambda: Scene((thing, thing), None, "white"),
        lambda: Scene((thing,), None, "red"),
        lambda: Scene((thing, thing), "inside", "white"),
        lambda: Scene.from_dict({"objects": [{"shape": "circle"}], "relation": None, "background": "white"}),
    ):
        with pytest.raises(ValueError, match=r"must be one|not a scene"):
            wrong()


# Held-out scenes


def test_held_out_pairs_touch_each_colour_once_and_each_shape_once_or_twice() -> None:
    assert Counter(colour for colour, _ in HELD_OUT) == dict.fromkeys(COLOURS, 1)
    assert {1, 2} == set(Counter(shape for _, shape in HELD_OUT).values())
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)


def test_training_never_shows_a_held_out_pair_and_shows_every_other() -> None:
    shown = Counter((t.colour, t.shape) for k in range(3000) for t in example(0, "train", k)[0].objects)
    assert set(shown) == set(itertools.product(COLOURS, SHAPES)) - HELD_OUT
    assert max(shown.values()) < 1.5 * min(shown.values())  # 208 each, standard deviation 14


def test_examples_have_the_documented_mix() -> None:
    train = [example(3, "train", k)[0] for k in range(3000)]
    single = sum(scene.relation is None for scene in train)
    assert abs(single - 1000) < 4 * np.sqrt(3000 * 2 / 9)
    relations = Counter(scene.relation for scene in train if scene.relation)
    assert all(abs(relations[r] - 500) < 90 for r in RELATIONS)
    assert [is_unseen(example(3, "test", k)[0]) for k in range(100)] == [False, True] * 50


@pytest.mark.parametrize("kind", ["seen", "unseen"])
def test_prompts(kind: str) -> None:
    chosen = prompts(kind, 300, 0)
    assert chosen == prompts(kind, 300, 0)
    assert chosen[:50] == prompts(kind, 50, 0)
    assert chosen != prompts(kind, 300, 1)
    assert {is_unseen(scene) for scene in chosen} == {kind == "unseen"}
    assert [scene.relation is None for scene in chosen] == [k % 3 == 0 for k in range(300)]
    pairs, singles = (Counter(s for s in chosen if (s.relation is None) is single) for single in (False, True))
    assert max(pairs.values()) == 1
    assert max(singles.values()) - min(singles.values()) <= 1  # 48 unseen scenes of one object: 100 prompts repeat some
    assert len(singles) == min(100, len(all_scenes(1, kind == "unseen")))


# Images


def test_an_example_is_a_function_of_seed_split_and_index() -> None:
    def image(*key) -> np.ndarray:
        scene, rng = example(*key)
        return render(scene, 32, rng)

    later = [image(0, "train", k) for k in (5, 3)]
    assert np.array_equal(later[1], image(0, "train", 3))
    assert np.array_equal(later[0], image(0, "train", 5))
    for other in ((1, "train", 3), (0, "test", 3), (0, "train", 4)):
        assert not np.array_equal(later[1], image(*other))


def test_objects_are_inside_apart_and_in_their_relation() -> None:
    directions = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
    for k in range(2000):
        scene, rng = example(7, "train", k)
        placed = place(scene, rng)
        for thing, (x, y, radius) in zip(scene.objects, placed, strict=True):
            assert min(x, y, 1 - x, 1 - y) - radius >= 1 / 32 - 1e-9
            assert abs(2 * radius / DIAMETERS[thing.size] - 1) <= 0.03 + 1e-9
        if scene.relation:
            (x, y, radius), (x2, y2, radius2) = placed
            right, down = directions[scene.relation]
            along, across = (x - x2) * right + (y - y2) * down, abs((x - x2) * down) + abs((y - y2) * right)
            assert along >= radius + radius2 + 2 / 32 - 1e-9
            assert across <= along / 2 + 1e-9


def test_positions_fill_the_image() -> None:
    scene = parse_caption("a small red circle on a white background")
    x = np.array([place(scene, np.random.default_rng(k))[0][:2] for k in range(500)])
    room = 1 / 32 + DIAMETERS["small"] / 2
    assert np.all(np.abs(x.min(0) - room) < 0.02)
    assert np.all(np.abs(x.max(0) - (1 - room)) < 0.02)


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_the_exact_area_wherever_the_pixels_fall(shape: str) -> None:
    grid = (np.arange(2000) + 0.5) / 1000 - 1
    area = (outline(shape, grid[None, :], grid[:, None]) <= 0).mean() * 4
    for k in range(20):
        x, y = np.random.default_rng(k).uniform(7.5, 8.5, size=2)
        assert coverage(shape, Placed(x, y, 4.5), Box(0, 0, 16, 16)).sum() == pytest.approx(area * 4.5**2, rel=0.015)


def test_every_size_shows_the_same_image() -> None:
    for k in range(60):
        fine, coarse = (
            render(*(lambda s, r: (s, side, r))(*example(2, "train", k))).astype(float) for side in (128, 32)
        )
        averaged = fine.reshape(32, 4, 32, 4, 3).mean((1, 3))
        assert np.abs(averaged - coarse).mean() < 0.5
        assert np.abs(averaged - coarse).max() < 25


# Files


def test_a_written_dataset_re_renders_and_loads_as_an_imagefolder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes_module, "FILES_PER_FOLDER", 8)
    out = tmp_path / "nested" / "set"
    assert write_shapes(out, 33, 20, 6, 4)
    for split, count in (("train", 20), ("test", 6)):
        lines = [json.loads(line) for line in (out / split / "metadata.jsonl").read_text().splitlines()]
        assert len(lines) == count == len(list((out / split).rglob("*.png")))
        for index, line in enumerate(lines):
            scene, rng = example(4, split, index)
            assert Scene.from_dict(line["scene"]) == scene == parse_caption(line["text"])
            assert line["unseen"] == is_unseen(scene)
            with Image.open(out / split / line["file_name"]) as file:
                assert file.mode == "RGB"
                assert np.array_equal(np.asarray(file), render(scene, 33, rng))
    assert max(len(list(folder.iterdir())) for folder in (out / "train").iterdir() if folder.is_dir()) == 8
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(out), cache_dir=str(tmp_path / "cache"))
    assert {split: part.num_rows for split, part in loaded.items()} == {"train": 20, "test": 6}
    assert loaded["train"][3]["text"] == example(4, "train", 3)[0].caption
    assert loaded["train"][3]["image"].size == (33, 33)


def test_an_existing_dataset_is_kept_and_other_folders_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert write_shapes(out, 32, 3, 2, 0)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert not write_shapes(out, 32, 3, 2, 0)
    for other, name in (((64, 3, 2, 0), "side"), ((32, 4, 2, 0), "train"), ((32, 3, 2, 1), "seed")):
        with pytest.raises(UserError, match=name):
            write_shapes(out, *other)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_bytes(b"x")
    with pytest.raises(UserError, match="not a Shapes dataset"):
        write_shapes(tmp_path / "mine", 32, 3, 2, 0)
    for wrong in ((31, 3, 2, 0), (32, -1, 2, 0), (32, 3, -2, 0), (32, 3, 2, -1), (32, 3, 2, 2**64)):
        with pytest.raises(UserError, match="must be from"):
            write_shapes(tmp_path / "new", *wrong)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "set"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure) -> None:
    calls = itertools.count()

    def failing(*arguments) -> np.ndarray:
        if next(calls) == 7:
            raise failure
        return render(*arguments)

    monkeypatch.setattr(shapes_module, "render", failing)
    with pytest.raises(failure if isinstance(failure, type) else RunError):
        write_shapes(tmp_path / "set", 32, 10, 2, 0)
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path: Path) -> None:
    made = run_command(
        "scripts/make_dataset.py", "shapes", "--out", str(tmp_path / "set"), "--train", "5", "--test", "2"
    )
    assert (made.status, len(made.out.splitlines())) == (0, 1)
    assert (tmp_path / "set" / "shapes.json").is_file()
    refused = run_command("scripts/make_dataset.py", "shapes", "--out", str(tmp_path / "other"), "--size", "16")
    assert refused.status == 2
    assert "16" in refused.err
    assert len(refused.err.splitlines()) == 1
    assert not (tmp_path / "other").exists()


# The checker


@pytest.mark.parametrize(("side", "count"), [(32, 500), (64, 200), (128, 200), (75, 60)])
def test_checker_reads_the_renderers_own_images(side: int, count: int) -> None:
    shares = score_images(*rendered(count, side))
    assert min(shares.values()) >= 0.99
    assert shares["all"] >= 0.99


def test_checker_reads_images_as_an_autoencoder_leaves_them() -> None:
    images, scenes = rendered(600, 32, seed=2)
    rng = np.random.default_rng(0)
    assert score_images([softened(image, rng) for image in images], scenes)["all"] >= 0.98
    assert score_images([softened(image, rng, 0.8, 8) for image in images], scenes)["all"] >= 0.95


def test_each_wrong_attribute_is_wrong_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    words = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(DIAMETERS)}
    for image, scene in zip(*rendered(200, 32, seed=3), strict=True):
        reading = read_scene(softened(image, rng))
        which = rng.integers(len(scene.objects))
        for name, values in words.items():
            asked = scene.objects[which]
            changed = replace(asked, **{name: rng.choice([v for v in values if v != getattr(asked, name)]).item()})
            objects = tuple(changed if k == which else thing for k, thing in enumerate(scene.objects))
            marks = score(reading, replace(scene, objects=objects))
            assert not marks["all"]
            assert sum(not right for n in words for right in marks[n]) == 1
        other = rng.choice([b for b in BACKGROUNDS if b != scene.background]).item()
        marks = score(reading, replace(scene, background=other))
        assert (marks["background"], marks["all"], marks["colour"]) == (False, False, (True,) * len(scene.objects))
        if scene.relation:
            opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
            for relation in RELATIONS:
                marks = score(reading, replace(scene, relation=relation))
                assert marks["relation"] is marks["all"] is (relation == scene.relation)
            mirrored = Scene(scene.objects[::-1], opposite[scene.relation], scene.background)
            assert score(reading, mirrored)["all"]


def test_the_number_of_objects_is_exact() -> None:
    for image, scene in zip(*rendered(120, 32, seed=4), strict=True):
        reading = read_scene(image)
        if scene.relation:
            fewer = Scene(scene.objects[:1], None, scene.background)
            marks = score(reading, fewer)
            assert (marks["shape"], marks["relation"], marks["all"]) == ((True,), None, False)
        else:
            more = Scene((*scene.objects, Object("cross", "green", "small")), "above", scene.background)
            marks = score(reading, more)
            assert (marks["relation"], marks["all"]) == (False, False)
            assert marks["shape"] == (True, False)


def test_relation_decides_between_objects_that_match_equally_well() -> None:
    # Two equal red circles: either relation holds, and a requested star is compared with one of them.
    equal = Scene((Object("circle", "red", "small"),) * 2, "above", "white")
    reading = read_scene(render(equal, 32, np.random.default_rng(0)))
    assert score(reading, equal)["all"]
    assert score(reading, replace(equal, relation="below"))["all"]
    wrong = replace(equal, objects=(Object("star", "red", "small"), Object("star", "red", "small")))
    assert score(reading, wrong) == {
        "background": True,
        "colour": (True, True),
        "shape": (False, False),
        "size": (True, True),
        "relation": True,
        "all": False,
    }


def test_other_shapes_sizes_and_backgrounds_are_not_recognised() -> None:
    white = np.full((64, 64, 3), 255, np.uint8)
    assert read_scene(white).objects == ()
    y, x = np.mgrid[:64, :64] - 31.5
    for inside in (
        (np.abs(x) < 13) & (np.abs(y) < 5),  # a bar
        (np.hypot(x, y) < 13) & (np.hypot(x, y) > 7),  # a ring
        outline("triangle", x / 13, -y / 13) < 0,  # on its tip
    ):
        reading = read_scene(np.where(inside[..., None], np.uint8(COLOURS["blue"]), white))
        assert [(f.shape, f.colour) for f in reading.objects] == [(None, "blue")]
    for radius in (6, 22):
        (found,) = read_scene(np.where((np.hypot(x, y) < radius)[..., None], np.uint8(COLOURS["red"]), white)).objects
        assert (found.shape, found.size) == ("circle", None)
    black_on_white = read_scene(np.where((np.hypot(x, y) < 13)[..., None], np.uint8(0), white))
    assert [f.colour for f in black_on_white.objects] == ["black"]
    pink_on_white = read_scene(np.where((np.hypot(x, y) < 13)[..., None], np.uint8(BACKGROUNDS["pink"]), white))
    assert [f.colour for f in pink_on_white.objects] == ["pink"]
    assert read_scene(np.tile(np.uint8(COLOURS["green"]), (32, 32, 1))).background == "green"


def test_speckles_are_ignored_and_touching_colours_are_separated() -> None:
    scene = parse_caption("a large red circle on a white background")
    image = render(scene, 32, np.random.default_rng(1))
    clear = np.argwhere((image == 255).all(-1))
    for row, column in clear[:: len(clear) // 6]:
        image[row, column] = COLOURS["blue"]
    assert score(read_scene(image), scene)["all"]
    touching = np.full((32, 32, 3), 255, np.uint8)
    touching[4:16, 10:22] = COLOURS["yellow"]
    touching[16:28, 10:22] = COLOURS["purple"]
    assert score(
        read_scene(touching), parse_caption("a large yellow square above a large purple square on a white background")
    )["all"]


@pytest.mark.parametrize(
    "image",
    [np.zeros((32, 32)), np.zeros((32, 32, 3)), np.zeros((32, 48, 3), np.uint8), np.zeros((32, 32, 4), np.uint8)],
)
def test_other_arrays_are_refused_as_images(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="must be uint8"):
        read_scene(image)


def test_any_image_can_be_read() -> None:
    rng = np.random.default_rng(0)
    palette = np.array([*COLOURS.values(), *BACKGROUNDS.values()], np.uint8)
    for _ in range(40):
        for image in (
            rng.integers(0, 256, (32, 32, 3), np.uint8),
            palette[rng.integers(0, 10, (32, 32))],
            palette[rng.integers(0, 10, (4, 4))].repeat(8, 0).repeat(8, 1),
            np.clip(ndimage.gaussian_filter(rng.normal(128, 900, (32, 32, 3)), (3, 3, 0)), 0, 255).astype(np.uint8),
        ):
            assert score(read_scene(image), prompts("seen", 2, 0)[1])["all"] is False
