"""The Emoji dataset in styles, from made packages; and the scores of composition on copies, errors and by chance."""

import hashlib
import io
import json
import re
import shutil
import sys
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import alexnet

import train.commands.make_dataset as make_module
import train.data.synthetic.emoji_sets as sets_module
from autoencoder.perceptual import downloaded_weights
from ldm.errors import RunError, UserError
from ldm.pipeline import LatentDiffusionPipeline
from support.models import save_models
from train.commands.make_dataset import make
from train.config.reports import EvaluateOptions
from train.data.order.permutation import choose
from train.data.sources.catalogue import Columns
from train.data.sources.splits import find_splits, open_source
from train.data.synthetic.emoji import base
from train.data.synthetic.emoji_sets import SETS, Names, fetch, find_packages, read_names, read_sets
from train.data.synthetic.emoji_styles import SPLITS, Picture, resvg, split_pictures, style_captions, write_styles
from train.engine.open_data import open_inputs
from train.evaluation.generated import GeneratedImages
from train.evaluation.quality import Evaluation
from train.evaluation.retrieval import Labels, chance, copies, retrieval
from train.evaluation.styles import measure_styles, open_lpips, psnr

TEXTS = {chr(0x1F400 + k): f"animal {chr(97 + k // 26)}{chr(97 + k % 26)}" for k in range(60)}
TEXTS |= {"👋": "waving hand", "👋🏽": "waving hand: medium skin tone", "🇫🇷": "flag: France"}
SIDE = 32


def svg_body(style: str, text: str) -> str:
    """A disc with its own colour in each style; all skin tones and styles differ."""
    colour = hashlib.sha256(f"{style} {text}".encode()).hexdigest()[:6]
    return f'<circle cx="8" cy="8" r="6" fill="#{colour}"/>'


def icons_of(style: str, with_chars: bool) -> dict[str, Any]:
    slug = {text: re.sub("[^a-z]+", "-", name.lower()).replace("flag-", "flag-for-") for text, name in TEXTS.items()}
    icons: dict[str, Any] = {name: {"body": svg_body(style, text)} for text, name in slug.items()}
    icons["hidden-one"] = {"body": svg_body(style, "hidden"), "hidden": True}
    icons["a-logo"] = {"body": svg_body(style, "logo")}
    chars = {"-".join(f"{ord(c):x}" for c in text): name for text, name in slug.items()}
    return {
        "icons.json": {"icons": icons, "width": 16, "height": 16},
        "info.json": {"license": {"title": "MIT", "spdx": "MIT", "url": "u"}, "author": {"name": "somebody"}},
        "package.json": {"version": "1.0.0"},
        "chars.json": chars if with_chars else {},
    }


def annotations(part: str, texts: dict[str, str]) -> dict[str, Any]:
    entries = {text: {"default": ["word", name, "thing"], "tts": [name]} for text, name in texts.items()}
    return {f"{part}/en/annotations.json": {part: {"annotations": entries}}}


def write_package(folder: Path, name: str, files: dict[str, Any]) -> Path:
    path = folder / f"{name.removeprefix('@').replace('/', '-')}-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for file, value in files.items():
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            info = tarfile.TarInfo(f"package/{file}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    for k, s in enumerate(SETS):
        write_package(folder, s.package, icons_of(s.style, with_chars=k % 2 == 0))
    toned = {text: name for text, name in TEXTS.items() if "skin" in name or "flag" in name}
    plain = {text: name for text, name in TEXTS.items() if text not in toned}
    write_package(folder, "cldr-annotations-full", annotations("annotations", plain))
    write_package(folder, "cldr-annotations-derived-full", annotations("annotationsDerived", toned))
    return folder


def rasterise(svg: str, side: int) -> Image.Image | None:
    """Stand-in for the renderer: the whole image has the colour of the disc."""
    found = re.search('fill="(#[0-9a-f]{6})"', svg)
    return Image.new("RGB", (side, side), found[1]) if found else None


def write(packages: Path, out: Path, **change: Any) -> Any:
    found = find_packages(packages)
    named = read_names(found)
    settings = {"side": SIDE, "pair_fraction": 0.1, "concept_fraction": 0.1, "seed": 1}
    return write_styles(out, named, read_sets(found, named), rasterise, **settings | change)


@pytest.fixture(scope="module")
def dataset(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("styles") / "set"
    write(packages, out)
    return out


def rows(dataset: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (dataset / split / "metadata.jsonl").read_text().splitlines()]


# Packages


def test_sets_are_joined_by_codepoint_or_by_name(packages: Path) -> None:
    found = find_packages(packages)
    named = read_names(found)
    assert {text: captions[0] for text, captions in named} == TEXTS
    for drawn in read_sets(found, named):
        assert set(drawn.svg) == set(TEXTS)  # without chars.json by name; neither the hidden one nor the logo
        assert drawn.unmatched == 1
        assert all(svg_body(drawn.set.style, text) in svg for text, svg in drawn.svg.items())
        assert (drawn.version, drawn.licence["author"]) == ("1.0.0", "somebody")
    names = Names(named)
    assert names.find("flag-for-flag-france") == names.find("flagfrance") == "🇫🇷"
    assert names.find("waving-hand-1") == "👋"
    assert names.find("waving-hand-2") is None


def test_an_alias_may_be_mirrored(packages: Path, tmp_path: Path) -> None:
    shutil.copytree(packages, tmp_path / "p")
    files = icons_of("noto", True)
    body = files["icons.json"]["icons"].pop("flag-for-france")
    files["icons.json"]["icons"]["ecnarf"] = body
    files["icons.json"]["aliases"] = {"flag-for-france": {"parent": "ecnarf", "hFlip": True}}
    write_package(tmp_path / "p", SETS[0].package, files)
    found = find_packages(tmp_path / "p")
    svg = read_sets(found, read_names(found))[0].svg["🇫🇷"]
    assert 'transform="translate(16 0) scale(-1 1)"' in svg
    assert body["body"] in svg


def test_unpacked_packages_are_the_same(packages: Path, tmp_path: Path, dataset: Path) -> None:
    for name, path in find_packages(packages).items():
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "x", filter="data")
        target = tmp_path / "node_modules" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(tmp_path / "x" / "package", target)
    write(tmp_path, tmp_path / "set")
    for split in SPLITS:
        assert rows(tmp_path / "set", split) == rows(dataset, split)


def test_missing_double_and_damaged_packages_are_refused(packages: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"12 packages are missing; .*: npm pack @iconify-json/noto@"):
        find_packages(tmp_path)
    with pytest.raises(UserError, match="must be a folder"):
        find_packages(tmp_path / "none")
    shutil.copytree(packages, tmp_path / "p")
    first = find_packages(tmp_path / "p")[SETS[0].package]
    shutil.copy(first, first.with_name(first.name.replace("1.0.0", "1.1.0")))
    with pytest.raises(UserError, match="must be one version"):
        find_packages(tmp_path / "p")
    first.with_name(first.name.replace("1.0.0", "1.1.0")).unlink()
    found = find_packages(tmp_path / "p")
    named = read_names(found)
    whole = first.read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2]):
        first.write_bytes(content)
        with pytest.raises(UserError, match="fetch the package again") as raised:
            read_sets(found, named)
        assert "\n" not in str(raised.value)
    for wrong in ({"icons.json": []}, {"icons.json": {"icons": {"a": 1}}}, {"info.json": {}}, {"icons.json": b"{"}):
        write_package(tmp_path / "p", SETS[0].package, icons_of("noto", True) | wrong)
        with pytest.raises(UserError, match="fetch"):
            read_sets(found, named)


def npm(folder: Path, script: str) -> None:
    path = folder / "npm"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_npm_fetches_the_packages(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "there").mkdir()
    npm(tmp_path, f'echo "$@" > {tmp_path}/words; cp {packages}/*.tgz "$5"')
    fetch(tmp_path / "there")
    assert len(find_packages(tmp_path / "there")) == 12
    words = (tmp_path / "words").read_text().split()
    assert words[:4] == ["pack", "--silent", "--ignore-scripts", "--pack-destination"]
    assert words[5] == "@iconify-json/noto@1.2.9"
    npm(tmp_path, "echo 'npm error code E404' >&2; exit 1")
    with pytest.raises(RunError, match=r"npm pack failed \(npm error code E404\)"):
        fetch(tmp_path / "there")
    npm(tmp_path, "sleep 5")
    monkeypatch.setattr(sets_module, "_MINUTES", 0.001)
    with pytest.raises(RunError, match="has not ended"):
        fetch(tmp_path / "there")
    monkeypatch.setenv("PATH", str(tmp_path / "there"))
    with pytest.raises(UserError, match="install Node"):
        fetch(tmp_path / "there")


# The dataset


def test_captions_name_the_style() -> None:
    assert style_captions(("red apple", "apple, fruit, red"), "noto") == (
        "red apple, noto style",
        "noto style: apple, fruit, red",
    )


def test_held_out_pairs_have_other_hands_in_training(dataset: Path) -> None:
    found = {split: rows(dataset, split) for split in SPLITS}
    assert sum(map(len, found.values())) == len(TEXTS) * len(SETS)
    hands = {split: defaultdict(set) for split in SPLITS}  # type: ignore[var-annotated]
    for split, part in found.items():
        for row in part:
            assert row["concept"] == base(row["emoji"])
            assert all(row["style"] in caption for caption in row["text"])
            hands[split][row["concept"]].add(row["hand"])
    assert not set(hands["concepts"]) & (set(hands["train"]) | set(hands["test"]))
    assert hands["test"]
    for concept, held in hands["test"].items():
        assert not held & hands["train"][concept]  # all versions of one artist's design are on one side
        assert len(hands["train"][concept]) >= 2
    share = len(found["test"]) / (len(found["test"]) + len(found["train"]))
    assert 0.05 < share < 0.17


def test_the_split_depends_on_the_seed_and_not_on_other_concepts(packages: Path, tmp_path: Path, dataset: Path) -> None:
    write(packages, tmp_path / "other", seed=2)
    assert {r["emoji"] for r in rows(tmp_path / "other", "concepts")} != {r["emoji"] for r in rows(dataset, "concepts")}
    pictures = [Picture(text, s, b"", ()) for text in TEXTS for s in SETS]
    every = split_pictures(pictures, 0.1, 0.1, 1)
    few = split_pictures(pictures[: len(pictures) // 3], 0.1, 0.1, 1)
    assert few == {key: every[key] for key in few}
    assert set(few.values()) == set(SPLITS)


def test_equal_arguments_write_equal_bytes(packages: Path, tmp_path: Path, dataset: Path) -> None:
    write(packages, tmp_path / "again")
    files = [path.relative_to(dataset) for path in dataset.rglob("*") if path.is_file()]
    assert len(files) == len(TEXTS) * len(SETS) + 5
    assert all((tmp_path / "again" / file).read_bytes() == (dataset / file).read_bytes() for file in files)


def test_the_dataset_is_read_with_its_held_out_pairs(dataset: Path) -> None:
    for split, source in (
        ("train", open_source(dataset, "train")),
        ("test", open_source(dataset, "validation")),
    ):
        assert {(row.name, row.captions) for row in source} == {
            (r["file_name"], tuple(r["text"])) for r in rows(dataset, split)
        }
    splits = find_splits(str(dataset), Columns(), ("concepts",))
    assert len(splits["concepts"]()) == len(rows(dataset, "concepts"))


def test_a_licence_that_does_not_allow_it_leaves_the_set_out(packages: Path, tmp_path: Path) -> None:
    shutil.copytree(packages, tmp_path / "p")
    files = icons_of(SETS[4].style, True)
    files["info.json"]["license"]["spdx"] = "LicenseRef-own"
    write_package(tmp_path / "p", SETS[4].package, files)
    written = write(tmp_path / "p", tmp_path / "set")
    assert set(written.left_out) == {SETS[4].style}
    assert not any(row["style"] == SETS[4].style for split in SPLITS for row in rows(tmp_path / "set", split))
    card = (tmp_path / "set" / "README.md").read_text()
    assert "Left out: twemoji, because its licence LicenseRef-own isn't one of" in card
    assert card.count("[MIT](u)") == len(SETS) - 1


@pytest.mark.parametrize(
    ("svg", "drawn"),
    [
        ('<image href="file:///etc/hostname"/>', False),
        ('<use xlink:href="other.svg#a"/>', False),
        ("<text>a</text>", False),
        ('<path fill="url(http://a/b)"/>', False),
        ('<path fill="url(#a)"/><use href="#b"/>', True),
    ],
)
def test_drawings_that_need_other_files_are_left_out(packages: Path, tmp_path: Path, svg: str, drawn: bool) -> None:
    shutil.copytree(packages, tmp_path / "p")
    files = icons_of("noto", True)
    files["icons.json"]["icons"]["flag-for-france"]["body"] += svg
    write_package(tmp_path / "p", SETS[0].package, files)
    write(tmp_path / "p", tmp_path / "set")
    found = {(row["emoji"], row["style"]) for split in SPLITS for row in rows(tmp_path / "set", split)}
    assert (("🇫🇷", "noto") in found) == drawn


def test_equal_images_are_one_image_of_the_first_set(packages: Path, tmp_path: Path) -> None:
    shutil.copytree(packages, tmp_path / "p")
    files = icons_of(SETS[2].style, True)
    same = files["icons.json"]["icons"]["waving-hand"]
    files["icons.json"]["icons"]["flag-for-france"] = same
    write_package(tmp_path / "p", SETS[2].package, files)
    other = icons_of(SETS[3].style, True)
    other["icons.json"]["icons"]["animal-aa"] = same
    write_package(tmp_path / "p", SETS[3].package, other)
    write(tmp_path / "p", tmp_path / "set")
    found = {(r["emoji"], r["style"]): r["text"] for split in SPLITS for r in rows(tmp_path / "set", split)}
    assert len(found) == len(TEXTS) * len(SETS) - 2
    merged = found["👋", SETS[2].style]
    assert {"waving hand, fluent style", "flag of France, fluent style"} <= set(merged)


def test_wrong_settings_are_refused(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for change in ({"side": 15}, {"pair_fraction": 0.0}, {"concept_fraction": 0.6}, {"seed": -1}):
        with pytest.raises(UserError, match="must be from"):
            write(packages, tmp_path / "set", **change)
    with pytest.raises(UserError, match="there would be none in"):
        write(packages, tmp_path / "set", pair_fraction=0.001, concept_fraction=0.001)
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="must be a new or empty folder"):
        write(packages, tmp_path / "mine")
    with pytest.raises(UserError, match="must be shapes, emoji or emoji-styles"):
        make(["emojis"])
    monkeypatch.setattr(make_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install resvg_py"):
        make(["emoji-styles", "--out", str(tmp_path / "set")])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_command(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make_module.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(make_module, "resvg", rasterise)
    monkeypatch.setattr(sys, "argv", ["make_dataset.py"])
    out = tmp_path / "set"
    words = ["--out", str(out), "--packages", str(packages), "--size", "16", "--concept-fraction", "0.1"]
    make(["emoji-styles", *words])
    counts = [len(rows(out, split)) for split in SPLITS]
    said = capsys.readouterr().out
    assert f"{counts[0]} training images, {counts[1]} of held-out pairs (test) and {counts[2]} of held-out" in said
    assert len(said.splitlines()) == 1


def test_resvg_draws_filters_smoothly_and_keeps_the_shape() -> None:
    pytest.importorskip("resvg_py")
    space = 'xmlns="http://www.w3.org/2000/svg"'
    disc = '<circle cx="8" cy="8" r="7" fill="#f00"/>'
    plain = resvg(f'<svg {space} viewBox="0 0 16 16">{disc}</svg>', 32)
    blur = '<filter id="f"><feGaussianBlur stdDeviation="0.01"/></filter>'
    filtered = resvg(f'<svg {space} viewBox="0 0 16 16">{blur}<g filter="url(#f)">{disc}</g></svg>', 32)
    wide = resvg(f'<svg {space} viewBox="0 0 32 16"><rect width="32" height="16" fill="#00f"/></svg>', 32)
    assert plain is not None
    assert filtered is not None
    assert wide is not None
    assert plain.size == filtered.size == wide.size == (32, 32)
    assert len(filtered.getcolors() or []) > 2  # with steps between red and white
    assert np.abs(np.asarray(plain, float) - np.asarray(filtered, float)).mean() < 6
    assert wide.getpixel((16, 2)) == (255, 255, 255)
    assert wide.getpixel((16, 16)) == (0, 0, 255)
    assert resvg("<svg", 32) is None


# The scores


@pytest.fixture(scope="module")
def collection() -> tuple[torch.Tensor, Labels]:
    """150 concepts in 8 styles; a feature is 4 numbers of the concept and 4 of the style."""
    random = np.random.default_rng(0)
    concepts, styles = random.normal(size=(150, 4)), random.normal(size=(8, 4))
    emoji, style = np.repeat(np.arange(150), 8), np.tile(np.arange(8), 150)
    features = np.concatenate([concepts[emoji], styles[style]], 1).astype(np.float32)
    return torch.from_numpy(features), Labels(emoji, style, random.random(1200) < 0.8)


def test_exact_copies_score_one_and_errors_score_zero(collection: tuple[torch.Tensor, Labels]) -> None:
    features, labels = collection
    right = list(range(0, 1200, 7))
    found = retrieval(features[right], right, features, labels, 0)
    assert (found.concept_100, found.concept_all, found.style) == (1, 1, 1)
    other_style = [8 * (k // 8) + (k + 1) % 8 for k in right]  # the same concept in another style
    found = retrieval(features[other_style], right, features, labels, 0)
    assert (found.concept_100, found.concept_all, found.style) == (1, 0, 0)
    other_concept = [(k + 8) % 1200 for k in right]  # the same style
    found = retrieval(features[other_concept], right, features, labels, 0)
    assert found.concept_100 < 0.4  # the right one is among the nearest only if the other isn't one of the 99
    assert (found.concept_all, found.style) == (0, 1)
    equal = retrieval(torch.zeros(len(right), 8), right, torch.zeros(1200, 8), labels, 0)
    assert (equal.concept_100, equal.concept_all, equal.style) == (0, 0, 0)  # equal features are no success


def test_random_images_score_as_by_chance(collection: tuple[torch.Tensor, Labels]) -> None:
    features, labels = collection
    random = torch.Generator().manual_seed(0)
    right = torch.randint(1200, (4000,), generator=random).tolist()
    made = features[torch.randint(1200, (4000,), generator=random)]
    expected = chance(right, labels)
    assert (expected.concept_100, expected.concept_all, expected.style) == (0.01, 1 / 1200, 1 / 8)
    found = retrieval(made, right, features, labels, 3)
    assert found.concept_100 == pytest.approx(0.01, abs=0.006)
    assert found.concept_all == pytest.approx(1 / 1200, abs=0.0015)
    assert found.style == pytest.approx(1 / 8, abs=0.02)


def test_copying_takes_the_nearest_training_image_of_the_concept(collection: tuple[torch.Tensor, Labels]) -> None:
    features, labels = collection
    right = list(range(0, 1200, 11))
    for index, copied in zip(right, copies(right, features, labels), strict=True):
        same = [k for k in range(1200) if labels.training[k] and labels.emoji[k] == labels.emoji[index] and k != index]
        assert copied in same
        assert (features[copied] - features[index]).norm() == min((features[k] - features[index]).norm() for k in same)
    unknown = labels._replace(training=labels.training & (labels.emoji != 0))  # no training image of the concept
    assert labels.style[copies([3], features, unknown)[0]] == labels.style[3]


def test_psnr_of_equal_images_is_none() -> None:
    a, b = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 16, np.uint8)
    assert psnr([a], [a]) is None
    assert psnr([a], [b]) == pytest.approx(-20 * np.log10(16 / 255))


def evaluation(dataset: Path, models: Path, out: Path) -> Evaluation:
    o = EvaluateOptions(
        model=str(models / "model"), data=str(dataset), out=str(out), prompts=12, steps=1, guidance_scale=1.0
    )
    pipe = LatentDiffusionPipeline.from_pretrained(o.model)
    return Evaluation.open(pipe, open_inputs(o.data, o.input), o)


def test_a_model_that_paints_the_right_images_scores_one(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    save_models(tmp_path / "models")
    true = {
        row["text"][0]: np.asarray(Image.open(dataset / split / row["file_name"]))
        for split in SPLITS
        for row in rows(dataset, split)
    }

    def right_images(self: GeneratedImages, numbers: range) -> np.ndarray:
        for k in numbers:
            Image.fromarray(true[self.captions[k]]).save(self.path(k))
        return np.stack([true[self.captions[k]] for k in numbers])

    monkeypatch.setattr(GeneratedImages, "_generate", right_images)
    report, parts = measure_styles(evaluation(dataset, tmp_path / "models", tmp_path / "out"))
    json.dumps(report)
    for split in SPLITS:
        found = report[split]
        assert found["pixels"]["model"] == {"concept_100": 1, "concept_all": 1, "style": 1}
        assert found["psnr"] is None
        assert (tmp_path / "out" / f"styles_{split}.png").is_file()
    assert report["test"]["pixels"]["copying"]["style"] == 0
    assert report["test"]["psnr_of_copying"] < 40
    assert "copying" not in report["train"]["pixels"]
    assert len(parts) == 4
    assert "LPIPS is left out, because neither" in parts[0].note


def test_lpips_is_measured_by_weights_at_hand(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    file = downloaded_weights("alex")
    file.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save({f"features.{k}": v for k, v in alexnet().features.state_dict().items()}, file)
    save_models(tmp_path / "models")
    monkeypatch.setattr(GeneratedImages, "_generate", black_images)
    report, parts = measure_styles(evaluation(dataset, tmp_path / "models", tmp_path / "out"))
    lpips, about = open_lpips()
    assert about == "LPIPS (alex)"
    assert about in parts[0].columns
    members = [dataset / "concepts" / row["file_name"] for row in sorted(rows(dataset, "concepts"), key=file_name)]
    right = [np.array(Image.open(members[k])) for k in choose(min(12, len(members)), len(members), 0)]
    values = [float(lpips(torch.full((1, 3, SIDE, SIDE), -1.0), pixels(image))) for image in right]
    assert report["concepts"]["lpips"] == pytest.approx(np.mean(values), rel=1e-5)
    assert report["test"]["lpips_of_copying"] > 0
    file.write_bytes(b"damaged")
    assert open_lpips()[0] is None
    assert "LPIPS is left out: LPIPS with alex: its weights" in open_lpips()[1]


def black_images(self: GeneratedImages, numbers: range) -> np.ndarray:
    for k in numbers:
        Image.new("RGB", (SIDE, SIDE)).save(self.path(k))
    return np.zeros((len(numbers), SIDE, SIDE, 3), np.uint8)


def file_name(row: dict[str, Any]) -> str:
    return row["file_name"]


def pixels(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image)[None].permute(0, 3, 1, 2) / 127.5 - 1
