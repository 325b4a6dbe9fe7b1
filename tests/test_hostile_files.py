"""Files that aren't what a command expects, e.g. pipes and devices: each gives one line, and none hangs."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import ldm.files
from ldm.errors import UserError
from ldm.files import open_regular, read_json, read_regular, require_plausible
from ldm.formats.plain_yaml import read_yaml
from ldm.formats.png import read_png
from support.commands import run_script
from train.commands.generate import open_image, options_like, read_prompts
from train.config.data import SourceConfig
from train.config.generation import Txt2ImgOptions
from train.config.load import parse
from train.config.vae import VaeConfig
from train.data.images.decode import DamagedImage
from train.data.sources.tars import expand
from train.data.synthetic.emoji import read_annotations
from train.engine.open_data import open_inputs, without_copies


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ldm.files, "_PIPE_SECONDS", 0.1)


@pytest.fixture(params=["pipe", "/dev/zero", "/dev/tty0", "folder", "loop", "missing", "socket"])
def odd(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A path at which there is no regular file."""
    path = tmp_path / "odd"
    match request.param:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
        case "socket":
            os.mknod(path, 0o140600)
        case str(device) if device.startswith("/"):
            return device
    return str(path)


READERS: dict[str, Callable[[str], object]] = {
    "CONFIG": lambda path: parse(VaeConfig, [path]),
    "--prompts": lambda path: read_prompts(Txt2ImgOptions(prompts=path)),
    "--like": lambda path: options_like(Txt2ImgOptions(like=path)),
    "--image": lambda path: open_image(path, "--image"),
    "--annotations": lambda path: read_annotations(Path(path)),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS.keys())
def test_only_regular_files_are_read(read: Callable[[str], object], odd: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        read(odd)
    assert "\n" not in str(caught.value)
    assert odd in str(caught.value)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("read", [open_regular, read_regular, read_json, read_png])
def test_every_reader_raises_an_error_of_the_system(read: Callable[[str], object], odd: str) -> None:
    with pytest.raises(OSError, match=r"odd|/dev") as caught:
        read(odd)
    assert caught.value.strerror
    with pytest.raises(OSError, match="NUL"):
        read(f"{odd}\0")


def test_a_file_above_the_limit_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**40)  # a file with a hole
    with pytest.raises(OSError, match=r"1,099,511,627,776 bytes; up to 16,777,216 are accepted"):
        read_regular(tmp_path / "large")
    with pytest.raises(UserError, match=r"up to 131,072 are accepted"):
        parse(VaeConfig, [str(tmp_path / "large")])
    with pytest.raises(UserError, match=r"up to 16,777,216 are accepted"):
        read_prompts(Txt2ImgOptions(prompts=str(tmp_path / "large")))
    with pytest.raises(OSError, match="bytes"):
        read_regular("/proc/self/maps", 10)  # its size is 0, according to the system


def test_limits_are_exact(tmp_path: Path) -> None:
    """What a message accepts is accepted, and one more isn't."""
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    assert read_regular(path, 100) == b"x" * 100
    with pytest.raises(OSError, match="100 bytes; up to 99 are accepted"):
        read_regular(path, 99)
    for accepted in ({"num_layers": 1000}, {"a": [[0] * 1000, {"width": 2**20}]}, {"width": -(2**20)}):
        require_plausible(accepted)
    for refused in ({"num_layers": 1001}, {"a": {"b": [0] * 1001}}, {"a": [2**20 + 1]}, {"width": -(2**20) - 1}):
        with pytest.raises(ValueError, match="accepted"):
            require_plausible(refused)

    def load(text: str) -> dict[str, object]:
        path.write_text(text)
        return read_yaml(path)

    values = f"a: &a [{'1,' * 640}]\nb: [{'*a,' * 155}{{}}]"  # a mapping, two keys, and lists of 641 and 156 · 641
    for accepted, refused in (
        (f"a: {'[' * 49}1{']' * 49}", f"a: {'[' * 50}1{']' * 50}"),
        (values.format(""), values.format("2")),
        (f"a: -{2**64}", f"a: -{2**64 + 1}"),
        ("a: 1" + "#" * (2**17 - 4), "a: 1" + "#" * (2**17 - 3)),
    ):
        assert load(accepted)["a"] is not None
        with pytest.raises(UserError):
            load(refused)
    with pytest.raises(UserError, match=rf"'{2**64 + 1}' is too large an integer"):
        load(f"a: {2**64 + 1}")
    with pytest.raises(UserError, match="'2001-99-99' isn't a valid timestamp"):
        load("a: 2001-99-99")


def test_a_pipe_may_contain_as_much_as_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for limit, fits in ((100_000, True), (99_999, False)):
        writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(b"x" * 100_000,))
        writer.start()
        if fits:
            assert len(read_regular(tmp_path / "pipe", limit, pipe=True)) == limit
        else:
            with pytest.raises(OSError, match="more than 99,999 bytes"):
                read_regular(tmp_path / "pipe", limit, pipe=True)
        writer.join()


def test_the_output_of_a_command_is_read_to_its_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    def write(parts: list[bytes], pause: float) -> None:
        with open(tmp_path / "pipe", "wb", buffering=0) as file:
            for part in parts:
                file.write(part)
                time.sleep(pause)

    writer = threading.Thread(target=write, args=([b"ste", b"ps: 7\n" + b"#" * 100_000], 0.02))
    writer.start()
    assert parse(VaeConfig, [str(tmp_path / "pipe")]).steps == 7
    writer.join()
    with pytest.raises(OSError, match="nothing was written for"):
        read_regular(tmp_path / "pipe", pipe=True)


@pytest.mark.parametrize("text", ["[1]", "3", "[" * 100_000, "{", "\xff", "", "9" * 5000, '"text"', "null"])
def test_only_objects_are_read_from_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r".") as caught:
        read_json(tmp_path / "a.json")
    assert str(caught.value)


def test_an_image_that_became_a_pipe_is_damaged(tmp_path: Path) -> None:
    for k in range(3):
        Image.new("RGB", (8, 8), (80 * k, 0, 0)).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text("a")
    source = open_inputs(str(tmp_path), SourceConfig()).source
    for k in range(3):
        (tmp_path / f"{k}.png").unlink()
        os.mkfifo(tmp_path / f"{k}.png")
    for k in range(len(source)):
        with pytest.raises(DamagedImage, match="not a regular file"):
            source.read(k)


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl", "metadata.csv"])
def test_captions_and_metadata_in_pipes_are_not_read(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="no captions"):
        open_inputs(str(tmp_path), SourceConfig())


def test_duplicates_in_a_pipe_are_refused(tmp_path: Path) -> None:
    for k in range(3):
        Image.new("RGB", (8, 8), (80 * k, 0, 0)).save(tmp_path / f"{k}.png")
    inputs = open_inputs(str(tmp_path), SourceConfig(), captioned=False)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        without_copies(inputs.source, inputs.held_out, str(tmp_path / "pipe"), True)


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..9999}" * 3 + ".tar",
        "{0..9999999999}.tar",
        "{9999999999..0}.tar",
        "{a,b}" * 40 + ".tar",
        "{1..{2,99999999}}.tar",
        "{0.." + "9" * 5000 + "}{,}" * 30 + ".tar",
    ],
)
def test_braces_for_too_many_files_are_refused_at_once(pattern: str) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match="expands to more than 1,000,000 files"):
        expand(pattern)
    assert time.process_time() - start < 10


def test_braces_are_expanded_in_the_shells_order() -> None:
    assert expand("{a,b}{08..10}.tar") == [f"{a}{k}.tar" for a in "ab" for k in ("08", "09", "10")]
    assert expand("x{a{1,2},b}") == ["xa1", "xb", "xa2"]
    assert expand("{3..1}") == ["3", "2", "1"]
    assert expand("{a}") == ["{a}"]


def test_commands_refuse_pipes_and_devices(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for words in (
        ("train_vae", tmp_path / "pipe.safetensors"),
        ("inspect_data", "/dev/zero"),
        ("txt2img", "--like", "/dev/urandom"),
        ("inpaint", "--image", tmp_path / "pipe.safetensors", "--mask", "/dev/zero", "--model", tmp_path),
        ("convert", "--model", tmp_path / "pipe.safetensors", "--out", tmp_path / "new"),
        ("make_dataset", "emoji", "--font", "/dev/zero", "--out", tmp_path / "new"),
    ):
        ended = run_script(*words)
        assert (ended.status, ended.err.count("\n"), ended.err[:7]) == (2, 1, "error: "), ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe.safetensors"]


@pytest.mark.parametrize("name", ["x" * 100_000, "a/" * 5000, "/x" * 3000])
def test_a_path_that_is_too_long_is_one_line(name: str, tmp_path: Path) -> None:
    for words in (("--data", name, "--out", tmp_path / "o"), ("--data", tmp_path, "--out", name), ("--init", name)):
        ended = run_script("train_vae", *words)
        assert (ended.status in (1, 2), ended.err.count("\n"), ended.err[:7]) == (True, 1, "error: "), ended.err
        assert len(ended.err) < 2100
