"""The Emoji dataset: annotations, captions, held-out emoji, files; and the font itself if it is installed."""

import hashlib
import json
import unicodedata
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

import train.data.synthetic.emoji as emoji_module
from ldm.errors import RunError, UserError
from support.commands import Ended, run_command
from train.data.sources.splits import open_source
from train.data.synthetic.emoji import (
    FONT,
    Font,
    Named,
    base,
    character_names,
    compose_captions,
    held_out,
    is_usable,
    read_annotations,
    render_all,
    write_emoji,
)

ANNOTATIONS = """<?xml version="1.0" encoding="UTF-8" ?>
<!DOCTYPE ldml SYSTEM "../../common/dtd/ldml.dtd">
<ldml><annotations>
    <annotation cp="😀">face | grin | grinning face</annotation>
    <annotation cp="😀" type="tts">grinning face</annotation>
    <annotation cp="❤️">heart</annotation>
    <annotation cp="❤️" type="tts">red heart</annotation>
    <annotation cp="🕐">00 | 1 | : | o’clock | one</annotation>
    <annotation cp="🕐" type="tts">one&#9;o’clock&#x9f;</annotation>
    <annotation cp="→" type="tts">right-pointing arrow</annotation>
    <annotation cp="👋🏽">hand | medium skin tone | wave | waving</annotation>
    <annotation cp="👋🏽" type="tts">waving hand: medium skin tone</annotation>
    <annotation cp="🇫🇷">flag</annotation>
    <annotation cp="🇫🇷" type="tts">flag: France</annotation>
    <annotation cp="🇲🇫" type="tts">flag: St. Martin</annotation>
    <annotation cp="🇿🇿🇿" type="tts"> ! </annotation>
</annotations></ldml>
"""
SKINS = "🏻🏼🏽🏾🏿"


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    path = tmp_path / "en.xml"
    path.write_text(ANNOTATIONS, encoding="utf-8")
    return path


def render(text: str) -> Image.Image | None:
    """Stand-in for the font: each emoji has its own disc, arrows have none, and France's flag is St. Martin's."""
    if text == "→":
        return None
    colour = hashlib.sha256(text.replace("🇲🇫", "🇫🇷").encode()).digest()[:3]
    y, x = np.mgrid[:136, :136] - 67.5
    return Image.fromarray(np.where((np.hypot(x, y) < 60)[..., None], np.uint8([*colour]), np.uint8(255)))


def many() -> list[Named]:
    """Return 200 single symbols, and 20 emoji in five skin tones and without."""
    single = [chr(0x2200 + k) for k in range(200)]
    hands = [chr(0x1F910 + k) + skin for k in range(20) for skin in ("", *SKINS)]
    return [Named(text, (f"number {k}",)) for k, text in enumerate(single + hands)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Names and captions


def test_annotations_become_captions(annotations: Path) -> None:
    assert dict(read_annotations(annotations)) == {
        "😀": ("grinning face", "face, grin, grinning face"),
        "❤": ("red heart",),  # Unicode's name for it is heavy black heart
        "🕐": ("one o'clock", "clock face one oclock", "00, 1, o'clock, one"),
        "→": ("right-pointing arrow", "rightwards arrow"),
        "👋🏽": ("waving hand: medium skin tone", "waving hand with medium skin tone"),
        "🇫🇷": ("flag: France", "flag of France"),
        "🇲🇫": ("flag: St. Martin", "flag of St. Martin"),
    }


def test_both_annotation_files_of_a_folder_are_read(tmp_path: Path) -> None:
    for part, text, name in (
        ("annotations", "👋", "waving hand"),
        ("annotationsDerived", "👋🏽", "waving hand: medium"),
    ):
        (tmp_path / part).mkdir()
        line = f'<ldml><annotation cp="{text}" type="tts">{name}</annotation></ldml>'
        (tmp_path / part / "en.xml").write_text(line, encoding="utf-8")
    assert [named.text for named in read_annotations(tmp_path)] == ["👋", "👋🏽"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "not well-formed"),
        (b"<ldml><annotation", "not well-formed"),
        (b"<?xml version='1.0' encoding='klingon'?><ldml/>", "not well-formed"),
        (b"<ldml>\xff</ldml>", "not well-formed"),
        (b"<ldml/>", "contains no names"),
        (
            b"<ldml><annotation>stray</annotation><annotation cp='' type='tts'>!</annotation></ldml>",
            "contains no names",
        ),
        (None, "can't be read"),
    ],
)
def test_other_files_are_refused_as_annotations(tmp_path: Path, content: bytes | None, what: str) -> None:
    if content is not None:
        (tmp_path / "en.xml").write_bytes(content)
    with pytest.raises(UserError, match=what) as raised:
        read_annotations(tmp_path / "en.xml")
    assert "en.xml" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_captions_are_one_line_without_repeats() -> None:
    assert compose_captions("🎅", "Santa Claus", ["santa CLAUS"]) == ("Santa Claus", "father christmas")
    assert compose_captions("❤", "", []) == ("heavy black heart",)
    assert compose_captions("🖤", "black heart", ["black", "Black", "heart"]) == ("black heart", "black, heart")
    assert compose_captions("1⃣", "keycap: 1", ["keycap"]) == ("keycap: 1", "keycap 1")
    assert compose_captions("👋🏽", "", ["!", " ", "wave"]) == ()
    for name, spoken in (
        ("woman: medium skin tone, red hair", "woman with medium skin tone and red hair"),
        ("kiss: man, man, light skin tone", "kiss: man, man with light skin tone"),
        ("person: beard", "person with beard"),
    ):
        assert compose_captions("👩🏽", name, ["adult", "woman"]) == (name, spoken)
    assert compose_captions("👪", "family: man, boy", ["home"])[0] == "family: man, boy"
    assert compose_captions("🏴", "flag", []) == ("flag",)
    for _, captions in character_names():
        assert len(captions) == 1
        assert captions[0] == " ".join(captions[0].split())
        assert not any(unicodedata.category(c) in ("Cc", "Cf") for c in captions[0])


# Variants


def test_variants_of_one_emoji_have_one_base() -> None:
    for same in (
        ["👋", "👋🏻", "👋🏿"],
        ["👮", "👮‍♀", "👮🏽‍♂️", "👮‍♀️"],
        ["🧑‍🚀", "👨‍🚀", "👩🏾‍🚀"],
        ["🧑", "👨", "👩🏽", "👨‍🦰", "🧑🏿‍🦲", "👱‍♀", "🧔🏻‍♂"],
        ["👪", "👨‍👩‍👧", "👩‍👧‍👦", "👨‍👨‍👦‍👦"],
        ["💑", "👩‍❤‍👩", "👨🏻‍❤️‍👨🏿", "💑🏽"],
        ["💏", "👩‍❤️‍💋‍👨", "🧑🏻‍❤‍💋‍🧑🏿"],
        ["👫", "👭", "👬🏽", "🧑🏻‍🤝‍🧑🏿", "👩🏻‍🤝‍👨🏿"],
        ["🤝", "🤝🏽", "🫱🏻‍🫲🏿"],
        ["🏃", "🏃‍♀", "🏃🏽‍➡️", "🏃‍♂‍➡"],
        ["🎅", "🤶🏿", "🧑🏽‍🎄"],
        ["❤", "🖤", "💙"],
        ["🕐", "🕧"],
        ["1⃣", "#⃣"],
        ["🔈", "🔊"],
    ):
        assert len({base(text) for text in same}) == 1, same
    others = [
        "😀",
        "👋",
        "🏻",
        "🏿",
        "🦰",
        "♀",
        "♂",
        "➡",
        "🏴",
        "🏴‍☠",
        "🇫🇷",
        "🇫🇮",
        "1⃣",
        "❤",
        "❤‍🔥",
        "🧑",
        "🧒",
        "👪",
    ]
    assert len({base(text) for text in others}) == len(others)


def test_the_same_share_of_every_kind_is_held_out() -> None:
    texts = [named.text for named in many()]
    chosen = held_out(texts, 0.05, 0)
    variants = Counter(map(base, texts))
    assert Counter(variants[b] for b in chosen) == {1: 10, 6: 1}
    assert chosen == held_out(texts[::-1], 0.05, 0)
    others = [held_out(texts, 0.05, seed) for seed in range(1, 30)]
    assert all(other != chosen for other in others)
    assert len(set().union(*others)) > 150  # of 220: the seed chooses
    assert len(held_out(texts, 0.001, 0)) == 1


def test_parts_and_couples_of_two_skin_tones_are_left_out() -> None:
    assert not any(map(is_usable, ["🏻", "🦰", "🧑🏻‍🤝‍🧑🏿", "🫱🏻‍🫲🏿"]))
    assert all(map(is_usable, ["😀", "👋🏽", "👨🏽‍🦰", "👩🏽‍🤝‍👨🏽", "🧑‍🤝‍🧑"]))


# Files


def test_emoji_that_look_the_same_share_one_image_with_all_captions(annotations: Path) -> None:
    images = render_all(read_annotations(annotations), render, 64)
    assert [image.text for image in images] == ["😀", "❤", "🕐", "👋🏽", "🇫🇷"]
    flags = ["flag: France", "flag of France", "flag: St. Martin", "flag of St. Martin"]
    assert images[-1].captions == flags
    assert images[-1].name == "1f1eb-1f1f7.png"


@pytest.mark.parametrize("side", [16, 64, 128])
def test_a_written_dataset_loads_and_no_emoji_is_in_both_splits(tmp_path: Path, side: int) -> None:
    out = tmp_path / "nested" / "set"
    written = write_emoji(out, many(), render, side, 0.05, 3)
    assert written == (320 - 16, 16, 320)
    bases = {}
    for split in ("train", "test"):
        lines = [json.loads(line) for line in (out / split / "metadata.jsonl").read_text().splitlines()]
        assert len(lines) == len(list((out / split).glob("*.png"))) == getattr(written, split)
        bases[split] = {base(line["emoji"]) for line in lines}
        source = open_source(out, split)
        captions = {row.name: list(row.captions) for row in source}
        assert captions == {line["file_name"]: line["text"] for line in lines}
        for line in lines[::10]:
            with Image.open(out / split / line["file_name"]) as image:
                assert (image.mode, image.size) == ("RGB", (side, side))
                assert image.getpixel((0, 0)) == (255, 255, 255)
                colour = hashlib.sha256(line["emoji"].encode()).digest()[:3]
                assert image.getpixel((side // 2, side // 2)) == tuple(colour)
    assert not bases["train"] & bases["test"]
    write_emoji(tmp_path / "again", many(), render, side, 0.05, 3)
    assert files(out) == files(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "nested"]


def test_the_dataset_loads_as_an_imagefolder(tmp_path: Path, annotations: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write_emoji(tmp_path / "set", read_annotations(annotations), render, 64, 0.05, 0)
    loaded = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert {split: part.num_rows for split, part in loaded.items()} == {"train": 4, "test": 1}
    texts = [row["text"] for part in loaded.values() for row in part]
    assert ["waving hand: medium skin tone", "waving hand with medium skin tone"] in texts


def test_wrong_numbers_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_bytes(b"x")
    with pytest.raises(UserError, match="must be a new or empty folder"):
        write_emoji(tmp_path / "mine", many(), render, 64, 0.05, 0)
    with pytest.raises(UserError, match="must be a new or empty folder"):
        write_emoji(tmp_path / "mine" / "photo.png", many(), render, 64, 0.05, 0)
    for wrong in ((15, 0.05, 0), (129, 0.05, 0), (64, 0, 0), (64, 0.6, 0), (64, float("nan"), 0), (64, 0.05, -1)):
        with pytest.raises(UserError, match="must be from"):
            write_emoji(tmp_path / "new", many(), render, *wrong)
    for few in ([], [Named("👋", ("hand",)), Named("👋🏽", ("hand: medium",))], [Named("→", ("arrow",))]):
        with pytest.raises(UserError, match="at least two"):
            write_emoji(tmp_path / "new", few, render, 64, 0.05, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    (tmp_path / "empty").mkdir()
    assert write_emoji(tmp_path / "empty", many(), render, 16, 0.05, 0).train > 0


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    write_emoji(tmp_path / "link", many(), render, 16, 0.05, 0)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "train" / "metadata.jsonl").is_file()


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(emoji_module, "_write_split", failing)
    with pytest.raises(RunError, match="disk full"):
        write_emoji(tmp_path / "set", many(), render, 64, 0.05, 0)
    assert list(tmp_path.iterdir()) == []


# The font


def test_other_fonts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"absent\.ttf.*fonts-noto-color-emoji"):
        Font(tmp_path / "absent.ttf")
    (tmp_path / "text.ttf").write_text("not a font")
    with pytest.raises(UserError, match=r"text\.ttf can't be used"):
        Font(tmp_path / "text.ttf")
    plain = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    with pytest.raises(UserError, match="no 😀 in colour"):
        Font(plain)
    monkeypatch.setattr(emoji_module.features, "check", lambda name: False)
    with pytest.raises(UserError, match="libfribidi0"):
        Font(plain)


def test_the_command_names_the_package_of_a_missing_font(tmp_path: Path) -> None:
    refused = make_emoji("--out", str(tmp_path / "set"), "--font", str(tmp_path / "absent.ttf"))
    assert refused.status == 2
    assert "fonts-noto-color-emoji" in refused.err
    assert len(refused.err.splitlines()) == 1
    assert not (tmp_path / "set").exists()


def make_emoji(*words: str) -> Ended:
    return run_command("scripts/make_dataset.py", "emoji", *words)


if FONT.is_file():  # otherwise there is nothing to test
    SEQUENCES = [
        "😀",
        "❤",
        "👋🏽",
        "👮‍♀",
        "👮🏾‍♂",
        "🧑‍🚀",
        "👨‍👩‍👧",
        "👩🏻‍❤‍💋‍👨🏻",
        "🧑🏽‍🤝‍🧑🏽",
        "👨🏻‍🦰",
        "🇫🇷",
        "🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "1⃣",
        "🏳‍🌈",
    ]

    @pytest.fixture(scope="module")
    def font() -> Font:
        return Font(FONT)

    @pytest.mark.parametrize("text", SEQUENCES)
    def test_a_sequence_is_one_whole_glyph_in_the_middle(font: Font, text: str) -> None:
        image = font(text)
        assert image is not None
        assert image.mode == "RGB"
        assert image.size == (font.side, font.side)
        rows, columns = np.nonzero((np.asarray(image) < 250).any(-1))
        for places in (rows, columns):
            assert 3 <= places.min() <= places.max() < font.side - 3
            assert places.max() - places.min() > font.side / 2
        assert abs(columns.min() + columns.max() - font.side) < 30
        again = font(text)
        assert again is not None
        assert image.tobytes() == again.tobytes()

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "\n",
            "😀\n",
            "a",
            "→",
            "\ufe0f",
            "\u200d",
            "😀😀",
            "😀🏽",
            "👩‍🚗",
            "👩‍👩‍👩",
            "🇦🇦",
            "🇿🇿",
            "🏂🏿",
            "\U0010fffd",
        ],
    )
    def test_text_that_is_not_a_single_glyph_has_no_image(font: Font, text: str) -> None:
        assert font(text) is None

    def test_emoji_differ(font: Font) -> None:
        assert len(render_all([Named(text, ("x",)) for text in SEQUENCES], font, 64)) == len(SEQUENCES)

    def test_the_command(tmp_path: Path, annotations: Path) -> None:
        made = make_emoji("--out", str(tmp_path / "set"), "--annotations", str(annotations), "--size", "32")
        assert (made.status, len(made.out.splitlines())) == (0, 1)
        assert "4 training and 1 test images of 32 × 32" in made.out
        assert str(annotations) in made.out
        again = make_emoji("--out", str(tmp_path / "set"), "--annotations", str(annotations))
        assert again.status == 2
        assert "must be a new or empty folder" in again.err
