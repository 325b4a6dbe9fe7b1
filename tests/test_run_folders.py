"""The folder of a run names the model in it, for every option that takes a model."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from autoencoder.model import Autoencoder
from autoencoder.perceptual import ClipPerceptual
from conditioning.clip import ClipTextEncoder
from conditioning.tokenizer import save_tokenizer
from ldm.errors import UserError
from ldm.formats.hub import find_pipeline, model_folder
from ldm.pipeline import LatentDiffusionPipeline
from support.commands import run_script
from support.models import small_clip_model, tiny_pipeline
from train.commands.generate import model_sha256
from train.evaluation.features import load_features


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of the three stages, and a run that has no model yet."""
    root, pipe = tmp_path_factory.mktemp("runs"), tiny_pipeline()
    for name in ("clip", "vae", "ldm", "early"):
        (root / name / "checkpoints").mkdir(parents=True)
        (root / name / "config.yaml").write_text("steps: 1\n")
    pipe.save_pretrained(root / "ldm/model")
    pipe.autoencoder.save(root / "vae/model")
    tokenizer = pipe.text_encoder.tokenizer
    small_clip_model(tokenizer).save_pretrained(root / "clip/model")
    save_tokenizer(tokenizer, root / "clip/model")
    return root


READERS: list[tuple[str, Callable[[str], object]]] = [
    ("ldm", LatentDiffusionPipeline.from_pretrained),
    ("ldm", find_pipeline),
    ("ldm", Autoencoder.load),
    ("ldm", ClipTextEncoder.load),
    ("vae", Autoencoder.load),
    ("clip", ClipTextEncoder.load),
    ("clip", ClipPerceptual),
    ("clip", load_features),
]


@pytest.mark.parametrize(("run", "read"), READERS)
def test_every_reader_of_a_model_takes_the_folder_of_a_run(runs: Path, run: str, read: Callable[[str], object]) -> None:
    read(str(runs / run))
    with pytest.raises(UserError, match="has no model/ yet") as caught:
        read(str(runs / "early"))
    assert "\n" not in str(caught.value)


def test_other_places_stay_as_they_are(runs: Path, tmp_path: Path) -> None:
    for place in (runs / "ldm/model", tmp_path, "owner/name", "clip", tmp_path / "none"):
        assert model_folder(place) == place


def test_commands_take_the_folder_of_a_run(runs: Path, tmp_path: Path) -> None:
    how = ("txt2img", "--prompt", "x", "--steps", 2, "--out")
    (one,) = run_script(*how, tmp_path / "a", "--model", runs / "ldm").paths
    (other,) = run_script(*how, tmp_path / "b", "--model", runs / "ldm/model").paths
    assert one.name == other.name
    assert model_sha256(runs / "ldm") == model_sha256(runs / "ldm/model")
    ended = run_script("txt2img", "--like", one, "--out", tmp_path / "c")
    assert (ended.status, "warning" in ended.err) == (0, False)
    (file,) = run_script("convert", "--model", runs / "ldm", "--out", tmp_path / "m.safetensors").paths
    assert run_script("convert", "--model", file, "--config", runs / "ldm", "--out", tmp_path / "m").paths
    shutil.rmtree(tmp_path / "m")
    for script in ("txt2img", "interpolate", "convert"):
        ended = run_script(
            script, "--model", runs / "early", "--out", tmp_path / "new", *["--to", "y"] * (script[0] == "i")
        )
        assert ended.status == 2
        assert (
            ended.err
            == f"error: the run {str(runs / 'early')!r} has no model/ yet: its first checkpoint will write it\n"
        )
