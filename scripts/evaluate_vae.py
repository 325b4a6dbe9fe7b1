"""Measure an autoencoder on images: the quality of reconstructions, and whether its latents suit a diffusion model."""

import json

from train.commands.main import command
from train.config.load import overlay
from train.config.reports import EvaluateVaeOptions


def main() -> None:
    o = overlay(EvaluateVaeOptions, EvaluateVaeOptions())
    from train.commands.evaluate_vae import evaluate  # slow import

    report = evaluate(o)
    print(json.dumps({k: report[k] for k in ("vae", "channels")}, indent=2))
    if damaged := report["damaged"]:
        print(f"{len(damaged)} images can't be read, others stood in, e.g. for {': '.join(damaged[0])}")
    print(f"written to {o.out}/report.json and {o.out}/reconstructions.png")


if __name__ == "__main__":
    command(main)
