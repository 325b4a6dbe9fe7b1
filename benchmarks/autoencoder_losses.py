"""Compare losses of the autoencoder on the Shapes dataset, at equal steps of the demo's stage 1.

    python benchmarks/autoencoder_losses.py --data data/shapes --clip runs/demo/clip/model --out out/losses

Prints a row per loss: the CPU seconds of training, and the metrics of scripts/evaluate_vae.py on the held-out images.
What is in `out` already isn't trained again. About three minutes per loss on one core.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.errors import UserError
from train.commands.evaluate_vae import evaluate
from train.commands.main import command
from train.config.load import overlay, parse
from train.config.reports import EvaluateVaeOptions
from train.config.vae import VaeConfig
from train.stages.vae import train

METRICS: tuple[str, ...] = ("psnr", "ssim", "noise_psnr_0.1", "noise_psnr_0.2", "noise_psnr_0.5")
METRICS += ("kl", "latent_kurtosis", "latent_autocorrelation")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare losses of the autoencoder."""

    data: str = "data/shapes"
    """Folder of the Shapes dataset."""
    clip: str = "runs/demo/clip/model"
    """CLIP of the perceptual loss."""
    out: str = "out/losses"
    """Folder of the runs."""
    steps: int = 200
    """Steps of each run; the demo has 400."""
    losses: tuple[str, ...] = ()
    """Names of the losses to compare; empty: all."""


def options(o: Options) -> dict[str, list[str]]:
    """Return the options of train_vae.py for each loss, in addition to configs/shapes/vae.yaml."""
    perceptual = ["--perceptual.kind", "clip", "--perceptual.model", o.clip, "--perceptual.weight", "0.2"]
    hinge = ["--adversarial.kind", "hinge", "--adversarial.lr", "1e-3", "--adversarial.weight", "0.1"]
    hinge += ["--adversarial.start", str(o.steps // 2)]
    return {
        "l2": [],
        "l2-kl-1e-6": ["--kl-weight", "1e-6"],
        "l1": ["--reconstruction", "l1"],
        "l2-perceptual-discriminator": perceptual + hinge,
        "l2-equivariance": ["--equivariance.share", "0.5"],
    }


def measure(name: str, arguments: list[str], o: Options) -> dict[str, float]:
    """Train and measure one autoencoder."""
    out, common = f"{o.out}/{name}", ["--data", o.data, "--steps", str(o.steps), "--validate-every", str(o.steps)]
    common += ["--normalisation", "channels"]  # so that a noise level means the same for each
    started = time.process_time()
    train(parse(VaeConfig, ["shapes/vae", "--out", out, *common, *arguments]))
    seconds = time.process_time() - started
    report = evaluate(EvaluateVaeOptions(vae=f"{out}/model", data=o.data, resolution=32, out=f"{out}/report"))
    return {"CPU seconds": seconds} | {metric: report["vae"][metric] for metric in METRICS}


@command
def main() -> None:
    o = overlay(Options, Options())
    variants = options(o)
    if unknown := set(o.losses) - set(variants):
        raise UserError(f"--losses {' '.join(sorted(unknown))}: choose from {' '.join(variants)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in o.losses or variants:
        path = Path(o.out) / f"{name}.json"
        if not path.is_file():
            row = measure(name, variants[name], o)
            path.write_text(json.dumps(row), encoding="utf-8")
        row = json.loads(path.read_text(encoding="utf-8"))
        print(f"{name:28}", "  ".join(f"{metric} {value:.4g}" for metric, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
