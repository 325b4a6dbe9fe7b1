"""Measure a trained model on a dataset, and write a report and a sheet of sample images."""

import json

from train.commands.main import command
from train.config.load import overlay
from train.config.reports import EvaluateOptions


def main() -> None:
    o = overlay(EvaluateOptions, EvaluateOptions())
    from train.commands.evaluate import evaluate  # slow import

    report = evaluate(o)
    print(json.dumps({k: report[k] for k in ("task", "vae", "latents", "alignment") if k in report}, indent=2))
    if damaged := report["damaged"]:
        print(f"{len(damaged)} images can't be read, others stood in, e.g. for {': '.join(damaged[0])}")
    print(f"written to {o.out}/report.json and {o.out}/samples.png")


if __name__ == "__main__":
    command(main)
