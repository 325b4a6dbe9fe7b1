"""The demo keeps what the README says of it: the whole road on the CPU, then its pictures read back by the checker."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.pipeline import LatentDiffusionPipeline
from train.config import DataConfig
from train.data.dataset import PictureDataset
from train.reconstruction import reconstruction_quality
from train.run import open_sources

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

    # Held-out pictures led back to their noise and painted again come out as the autoencoder alone would have them.
    pipe = LatentDiffusionPipeline.from_pretrained(tmp_path / "runs/demo/model")
    _, held_out = open_sources(str(tmp_path / "data/shapes"), DataConfig(resolution=32))
    batch = PictureDataset(held_out, 32, 0, shuffle=False).__getitems__(range(32))
    z = pipe.autoencoder.encode(batch["pixels"]).mean
    noise = pipe.invert(z, batch["caption"], num_inference_steps=50)
    back = pipe(
        batch["caption"], latents=noise, sampler="ddim", num_inference_steps=50, guidance_scale=1.0, output_type="latent"
    ).images  # fmt: skip
    psnr, _ = reconstruction_quality(pipe.autoencoder.decode(back), pipe.autoencoder.decode(z))
    assert psnr > 30
