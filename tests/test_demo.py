"""The demo keeps what the README says of it: the whole road on the CPU, then its pictures read back by the checker."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_demo_paints_what_it_is_asked(tmp_path: Path) -> None:
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    subprocess.run(
        [sys.executable, "scripts/demo.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )
    report = json.loads((tmp_path / "runs/demo/report.json").read_text())
    seen, unseen = report["alignment"]["seen"], report["alignment"]["unseen"]
    assert report["vae"]["psnr"] > 34
    assert min(seen["colour"], seen["shape"], seen["relation"]) > 0.9
    assert seen["all"] > 0.85
    assert unseen["all"] > 0.75
    assert (tmp_path / "runs/demo/samples.png").is_file()
    assert (tmp_path / "runs/demo/model/model_index.json").is_file()
