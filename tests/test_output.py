"""Text from files, names and settings can't control the terminal, whichever line of a command quotes it."""

import io
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from PIL import Image
from tqdm import tqdm

from ldm.errors import RunError, UserError, one_line, printable
from support.commands import run_script
from train.commands import main
from train.config.load import parse, read_yaml
from train.config.vae import VaeConfig
from train.data.batches.unreadable import UnreadableCounter
from train.engine.console import Console
from train.output import PrintableStream, make_printable

EVIL = "\x1b[2J\x1b]0;title\x07\r\x08\x9b31m\u202eabc\u2066\ud800\x00\x7f"
RAW = set("\x1b\x07\r\x08\x9b\u202e\u2066\ud800\x00\x7f")
LONG = "x" * 1_000_000


def raise_error(error: Exception) -> None:
    raise error


SAY: dict[str, Callable[[str], object]] = {
    "print": print,
    "bad input": lambda text: raise_error(UserError(text)),
    "failure": lambda text: raise_error(RunError(text)),
    "file": lambda text: raise_error(FileNotFoundError(2, "No such file or directory", text)),
    "warning": lambda text: sys.stderr.write(warnings.formatwarning(text, UserWarning, "file", 1)),
    "log": lambda text: Console()(text),
    "progress": lambda text: tqdm([1], desc=text).update(),
    "damaged": lambda text: UnreadableCounter(Path("/no/such/report"), print=Console()).print(f"{text} is left out"),
}


@pytest.mark.parametrize("text", [EVIL, LONG], ids=["escapes", "long"])
@pytest.mark.parametrize("say", SAY.values(), ids=SAY.keys())
def test_every_line_is_escaped_and_cut(
    say: Callable[[str], object], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(warnings, "filters", [*warnings.filters])
    with redirect_stdout(out), redirect_stderr(out), pytest.raises(SystemExit):
        main.command(lambda: say(text))()
    for line in re.split(r"\r|\n", out.getvalue()):  # a bar returns to the start of its line
        assert not RAW & set(line)
        assert len(line) <= 5000
    assert "\\x1b[2J" in out.getvalue() or "1,000," in out.getvalue()


@pytest.mark.parametrize("kind", ["warning", "error"])
def test_logged_lines_say_what_they_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    err, logger = io.StringIO(), logging.getLogger("ldm.nothing")
    monkeypatch.setattr(logger, "propagate", False)  # pytest's handlers are the root's
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(warnings, "filters", [*warnings.filters])
    with redirect_stderr(err), pytest.raises(SystemExit):
        main.command(lambda: getattr(logger, kind)("the model is large"))()
    assert err.getvalue() == f"{kind}: the model is large\n"


def test_printable_text_stays_as_it_is() -> None:
    for text in ("a\tb\nc", "赤い星 👩‍🚀 עברית naïve", "x" * 5000):
        assert printable(text) == text
    assert printable(printable(EVIL)) == printable(EVIL)
    short = one_line("begin " + "x" * 10_000 + " end", 200)
    assert (len(short), short[:6], short[-4:]) == (200, "begin ", " end")


def test_progress_bars_move_and_nothing_else_does() -> None:
    out = io.StringIO()
    stream = PrintableStream(out)
    for text in ("\r 50%", "\x1b[A\x1b[A", "\n", "a\x1b[A", "\ra\rb"):
        stream.write(text)
    assert out.getvalue() == "\r 50%\x1b[A\x1b[A\na\\x1b[A\ra\\x0db"
    with redirect_stdout(out):
        make_printable()
        make_printable()
        assert sys.stdout.unescaped is out


def test_a_configuration_with_escapes_is_shown_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "vae.yaml"
    file.write_text('input: {caption_template: "\\x1b[31m{}\\u202E"}\n')
    shown = run_script("train_vae", file, "--print-config")
    assert (shown.status, RAW & set(shown.out)) == (0, set())
    (again := tmp_path / "again.yaml").write_text(shown.out)
    assert parse(VaeConfig, [str(again)]) == parse(VaeConfig, [str(file)])
    described = run_script("train_vae", file, "--help")
    assert (described.status, RAW & set(described.out)) == (0, set())
    file.write_text(f"input: {{caption_template: 'é{LONG[:100_000]}{{}}'}}\n")
    assert f"é{LONG[:100_000]}" in run_script("train_vae", file, "--print-config").out


def test_an_inspection_escapes_captions_and_names(tmp_path: Path) -> None:
    folder = tmp_path / "da\x1b[2Jta"
    folder.mkdir()
    for k in range(4):
        Image.new("RGB", (8, 8), (60 * k, 0, 0)).save(folder / f"\x1b[3{k}m\u202e.png")
    (folder / "\x9bbroken.png").write_bytes(b"\x89PNG\r\n\x1a\n\x1b[2J")
    rows = [{"file_name": p.name, "text": EVIL.replace("\ud800", "") + "a" * 5000} for p in folder.iterdir()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = run_script("inspect_data", "--data", folder, "--out", tmp_path / "out", "--workers", 0)
    assert ended.status == 0, ended.err
    assert not RAW & set(ended.out + ended.err)
    assert max(map(len, ended.out.splitlines())) < 5001


@pytest.mark.parametrize("text", ["{}: 1", "steps: {}", "optimizer: {{{}: 1}}", "input: {{crop: {}}}", "{}"])
def test_errors_on_a_configuration_quote_it_escaped(text: str, tmp_path: Path) -> None:
    file = tmp_path / "vae.yaml"
    for value in ('"\\x1b[2J\\u202e"', '"' + "x" * 100_000 + '"'):
        file.write_text(text.format(value))
        ended = run_script("train_vae", file)
        assert (ended.status, ended.err.count("\n"), RAW & set(ended.err)) == (2, 1, set())
        assert len(ended.err) < 2100


def test_a_file_with_raw_control_characters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"data: a\x1b[2J\n")
    with pytest.raises(UserError, match="plain YAML"):
        read_yaml(tmp_path / "c.yaml")
