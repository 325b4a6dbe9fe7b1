"""What a start that was killed leaves in its run's folder is completed or removed by the next one."""

from pathlib import Path

import pytest

from ldm.errors import UserError
from support.runs import vae_config
from train.engine.device import open_accelerator
from train.engine.run import open_run

LEFT = (
    ".tmp-model/unet/weights",  # the previous model/, after the exchange of the two
    ".old-model/config.json",
    ".tmp-metrics.jsonl",
    "samples/.tmp-step-00000010.png",
    "checkpoints/.tmp-step-00000010/state.json",  # while an old checkpoint was removed
    "checkpoints/.old-step-00000010/state.json",
)
KEPT = (
    "model/config.json",
    "checkpoints/step-00000010/state.json",
    "samples/step-00000010.png",
    ".hidden",
    "own/.tmp-x",
)


def start(out: Path) -> None:
    config = vae_config("data", out, steps=99)
    with open_run(config, open_accelerator(config), {"data": "x"}):
        pass


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_leftovers_are_removed_by_the_next_start(tmp_path: Path) -> None:
    start(tmp_path)
    write(tmp_path, *LEFT, *KEPT)
    start(tmp_path)
    assert not [name for name in LEFT if (tmp_path / name).exists()]
    assert [(tmp_path / name).read_text() for name in KEPT] == list(KEPT)


def test_a_result_that_was_being_replaced_is_restored(tmp_path: Path) -> None:
    start(tmp_path)
    write(tmp_path, ".old-model/config.json", "checkpoints/.old-step-00000010/state.json", ".tmp-model/config.json")
    start(tmp_path)
    assert (tmp_path / "model/config.json").read_text() == ".old-model/config.json"
    assert (tmp_path / "checkpoints/step-00000010/state.json").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith((".tmp-", ".old-"))]


def test_another_start_removes_nothing_while_a_run_goes_on(tmp_path: Path) -> None:
    config = vae_config("data", tmp_path)
    with open_run(config, open_accelerator(config), {"data": "x"}):
        write(tmp_path, *LEFT)
        with pytest.raises(UserError, match="another process is training there"):
            start(tmp_path)
        assert all((tmp_path / name).exists() for name in LEFT)
