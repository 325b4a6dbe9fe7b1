"""Captions, prompts and file names with any characters never end a command, whatever the terminal's encoding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from support import ROOT
from support.commands import OFFLINE, Ended
from support.processes import run_forked

JAPANESE = "赤い大きな円と小さな青い星、" * 40


def run_without_utf8(*words: str) -> Ended:
    """Run a script in a new process, whose file names are ASCII too."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=kept | OFFLINE | plain, capture_output=True, timeout=120
    )
    return Ended(done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1"))


def dataset(folder: Path) -> Path:
    """Write images with captions in Japanese, with an emoji, with half of a character, and with control characters."""
    folder.mkdir()
    captions = [JAPANESE, "👩‍🚀 naïve", "half \ud83d", "a\x00\x1b[31m\u2028b"] * 5
    rows = [{"file_name": f"{k}-é.png", "text": caption} for k, caption in enumerate(captions)]
    for k, row in enumerate(rows):
        Image.new("RGB", (32, 32), (9 * k, 200 - 9 * k, 40)).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("encoding", ["cp1252", "C"])
def test_a_report_is_printed_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    if encoding == "C":
        data = tmp_path / "data"  # without UTF-8, Python can't open the other names
        data.mkdir()
        Image.new("RGB", (32, 32)).save(data / "a.png")
        (data / "a.txt").write_text(JAPANESE, encoding="utf-8")
        Image.new("RGB", (32, 32), "red").save(data / "b.png")
    else:
        data = dataset(tmp_path / "data")
    line = ["scripts/inspect_data.py", "--data", str(data), "--out", str(tmp_path / "report"), "--workers", "1"]
    ended = run_without_utf8(*line) if encoding == "C" else run_forked(*line, encoding=encoding)
    assert ended.status == 0, ended.err
    assert "\\u8d64\\u3044" in ended.out
    assert "Traceback" not in ended.err


def test_training_prints_and_writes_any_caption_and_name(tmp_path: Path) -> None:
    """The data's folder has a name that isn't valid UTF-8, as old systems wrote it."""
    data = dataset(tmp_path / "data").rename(tmp_path / os.fsdecode(b"caf\xe9 \xff"))
    small = "--text.width 32 --text.layers 1 --text.heads 2 --image.width 32 --image.layers 1 --image.heads 2"
    how = (
        f"--steps 2 --batch-size 4 --optimizer.warmup 0 --text.max-length 16 --workers 1 --input.resolution 32 {small}"
    )
    out = tmp_path / "日本"
    line = ["scripts/train_clip.py", "--data", str(data), "--out", str(out), *how.split()]
    ended = run_forked(*line, encoding="cp1252")
    assert ended.status == 0, ended.err
    assert "caption too long" in ended.out + ended.err
    assert (out / "model/README.md").read_text(encoding="utf-8")
