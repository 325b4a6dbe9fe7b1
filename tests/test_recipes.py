"""Models of the configurations that the README names become single files, which diffusers opens."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from autoencoder.model import Autoencoder
from conditioning.clip import ClipTextEncoder
from conditioning.tokenizer import train_tokenizer
from ldm.pipeline import LatentDiffusionPipeline
from support import ROOT
from support.commands import run_script
from support.models import PROMPTS
from train.config.clip import ClipConfig
from train.config.ldm import LdmConfig
from train.config.load import parse
from train.config.shipped import shipped
from train.config.vae import VaeConfig
from train.engine.provenance import unfinished

LARGE = ("emoji128", "shapes128", "styles128")
RECIPES = [
    pytest.param(recipe.name, marks=[pytest.mark.slow] if recipe.name in LARGE else [])
    for recipe in sorted((ROOT / "configs").iterdir())
    if (recipe / "clip.yaml").is_file()  # sd15 uses a text encoder of others; test_single_file.py has its shape
]


def build(recipe: str) -> LatentDiffusionPipeline:
    """Build the networks of a recipe's three stages; no weight is zero."""
    clip_config, vae_config, config = (
        parse(kind, [f"{recipe}/{kind.stage}"]) for kind in (ClipConfig, VaeConfig, LdmConfig)
    )
    tokenizer = train_tokenizer(PROMPTS, 600, clip_config.text.max_length)
    text_encoder = ClipTextEncoder(clip_config.build(tokenizer).clip.text_model, tokenizer)
    autoencoder = Autoencoder(vae_config.build().eval().requires_grad_(False))
    unet = config.unet.build(
        latent_channels=autoencoder.latent_channels,
        latent_size=config.input.resolution // autoencoder.factor,
        text_width=text_encoder.width,
        learned_variance=config.diffusion.variance == "learned",
    )
    with torch.no_grad():
        for weight in unet.parameters():
            weight += 0.01
    return LatentDiffusionPipeline(
        unet.eval().requires_grad_(False), autoencoder, text_encoder, config.diffusion.build_process()
    )


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_model_opens_as_a_single_file(recipe: str, tmp_path: Path) -> None:
    pipe = build(recipe)
    pipe.save_pretrained(tmp_path / "model")
    ended = run_script("convert", "--model", tmp_path / "model", "--out", tmp_path / "model.safetensors")
    assert ended.status == 0, ended.err
    file = str(tmp_path / "model.safetensors")
    theirs = StableDiffusionPipeline.from_single_file(file, config=str(tmp_path / "model"), local_files_only=True)
    assert equal(pipe.unet.state_dict(), theirs.unet.state_dict())
    assert equal(pipe.autoencoder.vae.state_dict(), theirs.vae.state_dict())
    assert equal(pipe.text_encoder.model.state_dict(), theirs.text_encoder.state_dict())
    assert type(theirs.scheduler).__name__ == "DDIMScheduler"


def test_the_readme_describes_each_recipe() -> None:
    rows = re.findall(r"\| `configs/(\w+)` \| .* \| (\d+) \| ([\d.]+) M", (ROOT / "README.md").read_text())
    assert {name for name, _, _ in rows} == {folder.name for folder in (ROOT / "configs").iterdir()}
    for name, side, millions in rows:
        if f"{name}/clip" not in shipped("clip"):
            continue  # the parts come from Stable Diffusion
        config, width = parse(LdmConfig, [f"{name}/ldm"]), parse(ClipConfig, [f"{name}/clip"]).text.width
        channels = parse(VaeConfig, [f"{name}/vae"]).model.latent_channels
        with torch.device("meta"):
            unet = config.unet.build(latent_channels=channels, latent_size=8, text_width=width)
        count = sum(weight.numel() for weight in unet.parameters()) / 1e6
        assert (int(side), float(millions)) == (config.input.resolution, float(f"{count:.{3 if count > 100 else 2}g}"))


def test_a_run_on_unfinished_parts_warns(parts: Path, tmp_path: Path) -> None:
    assert unfinished("--vae", str(parts / "vae")) == unfinished("--vae", "owner/name") == unfinished("--vae", "") == []
    shutil.copytree(parts / "vae/model", tmp_path / "vae/model")
    about = json.loads((parts / "vae/model/training.json").read_text())
    for change, lines in (({"step": 3, "final": False}, 1), ({"final": None}, 0), ({"config": 3, "final": False}, 0)):
        (tmp_path / "vae/model/training.json").write_text(json.dumps(about | change))
        assert len(unfinished("--vae", str(tmp_path / "vae/model"))) == lines
    (tmp_path / "vae/model/training.json").write_text("[")
    assert not unfinished("--vae", str(tmp_path / "vae/model"))
