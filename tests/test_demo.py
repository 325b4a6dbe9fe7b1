"""The demo reaches the README's numbers: all stages on the CPU, then the checker reads its images."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.pipeline import LatentDiffusionPipeline
from support import ROOT
from train.data.batches.images import ImageDataset
from train.data.images.crop import Framing
from train.data.sources.splits import open_source
from train.evaluation.autoencoder import reconstruction_quality


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo has been run."""
    folder = tmp_path_factory.mktemp("demo")
    for name in ("configs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    run(folder, "scripts/demo.py")
    return folder


def run(folder: Path, line: str) -> None:
    subprocess.run([sys.executable, *line.split()], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


@pytest.mark.slow
def test_the_demo_model_follows_its_prompts(demo: Path) -> None:
    report = json.loads((demo / "runs/demo/report.json").read_text())
    seen, unseen = report["alignment"]["seen"], report["alignment"]["unseen"]
    assert report["vae"]["psnr"] > 34
    assert min(seen["colour"], seen["shape"], seen["relation"]) > 0.9
    assert seen["all"] > 0.85
    assert unseen["all"] > 0.75
    assert (demo / "runs/demo/samples.png").is_file()
    assert (demo / "runs/demo/model/model_index.json").is_file()


@pytest.mark.slow
def test_inverted_images_are_generated_again(demo: Path) -> None:
    """Held-out images, inverted and generated again, equal their reconstructions by the autoencoder."""
    pipe = LatentDiffusionPipeline.from_pretrained(demo / "runs/demo/model")
    held_out = open_source(demo / "data/shapes", "test")
    batch = ImageDataset(held_out, Framing(resolution=32), 0, shuffle=False).__getitems__(range(32))
    z = pipe.autoencoder.encode(batch.pixels).mean
    noise = pipe.invert(z, batch.captions, num_inference_steps=50)
    back = pipe(
        batch.captions, latents=noise, sampler="ddim", num_inference_steps=50, guidance_scale=1.0, output_type="latent"
    ).images
    psnr, _ = reconstruction_quality(pipe.autoencoder.decode(back), pipe.autoencoder.decode(z))
    assert psnr > 30


@pytest.mark.slow
def test_adversarial_training_keeps_the_reconstruction_quality(demo: Path) -> None:
    """200 adversarial steps from the demo's autoencoder: losses are finite, and the PSNR changes by less than 1 dB."""
    run(
        demo,
        "scripts/train_vae.py configs/shapes/vae.yaml --data data/shapes --init runs/demo/vae/model "
        "--out runs/adversarial --steps 200 --optimizer.schedule constant --optimizer.lr 2e-4 --ema-decay 0.9 "
        "--log-every 10 --adversarial.kind hinge --adversarial.start 0",
    )

    def lines(run: str) -> list[dict[str, float]]:
        return [json.loads(line) for line in (demo / f"runs/{run}/metrics.jsonl").read_text().splitlines()]

    before, after = (
        next(line["val_psnr"] for line in lines(r) if "val_psnr" in line) for r in ("demo/vae", "adversarial")
    )
    assert abs(after - before) < 1
    logged = [line for line in lines("adversarial") if "loss" in line]
    assert len(logged) == 20
    for line in logged:
        assert line["skipped"] == 0
        for name in ("loss", "adversarial", "adversarial_weight", "discriminator_loss"):
            assert math.isfinite(line[name])
