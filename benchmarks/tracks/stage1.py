"""The track of stage 1: CPU seconds until the PSNR of held-out images is 34 dB, with latents that suit stage 2.

A stage 2 with fixed settings is trained on each seed's autoencoder, and its accuracy judges the latents. Their
statistics are stored beside it.
"""

import shlex
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from tracks.options import Options
from tracks.records import Measured, digests_of, held_back, is_complete, record
from tracks.trainings import accuracy, contestant, ldm_arguments, run_folder, script, times, train_seeds
from train.commands.evaluate_vae import evaluate
from train.config.ldm import LdmConfig
from train.config.load import parse
from train.config.reports import EvaluateVaeOptions
from train.config.vae import VaeConfig
from train.data.synthetic.shapes import write_shapes

PSNR, IMAGES, TOLERANCE = 34.0, 1000, 0.01
"""Smallest PSNR of each seed in dB, smallest number of images, and how far stage 2's accuracy may be below that on the
autoencoders of the record before."""
JUDGE = "configs/shapes/ldm.yaml"
_STATISTICS = (
    *("psnr", "ssim", "noise_psnr_0.2", "dead_channels", "kl", "latent_mean_max", "latent_std_min", "latent_std_max"),
    *("latent_kurtosis", "latent_w1", "latent_correlation", "latent_autocorrelation"),
)


def measure(o: Options, before: Mapping[str, Any] | None) -> Measured:
    """Train all seeds, measure their autoencoders, train the judging stage 2 on each, and time the step in turn."""
    o = replace(o, config=o.config or "configs/shapes/vae.yaml")
    words = arguments(o, o.config, o.settings)
    side = parse(VaeConfig, [*words, "--steps", str(o.steps)]).input.resolution
    parse(LdmConfig, ldm_arguments(o, JUDGE, o.judge, "an autoencoder"))  # an error costs no training
    if before is not None and (before.get("judge"), before["prompts"]["count"]) != (o.judge, o.prompts):
        judge, count = before.get("judge"), before["prompts"]["count"]
        raise UserError(f"--before {o.before}: was judged with --judge {judge!r} --prompts {count}; must be the same")
    then = None
    if before is not None:
        then = contestant(o, "before", "vae", arguments(o, before["config"], before["settings"]), o.checkout)
    digests = digests_of(o, before, "text_encoder")
    train_seeds(o, script(o, "train_vae.py", [*words, "--steps", str(o.steps)]))
    images = held_out_images(o, side)
    reports = {str(seed): report(o, run_folder(o, seed), images, side) for seed in o.seeds}
    found = judged(o)
    this = contestant(o, "this", "vae", words)
    seconds, earlier = times(o, this, then, before)
    own = {"psnr": psnr(reports), "latents": reports, "judge": o.judge}
    stored = record(o, found, seconds, earlier, digests, **own)
    stored["valid"] = is_valid(o, stored, before)
    logs = {f"seed-{seed}.jsonl": run_folder(o, seed) / "metrics.jsonl" for seed in o.seeds}
    logs |= {f"seed-{seed}-judge.jsonl": run_folder(o, seed, "-judge") / "metrics.jsonl" for seed in o.seeds}
    return Measured(stored, logs)


def arguments(o: Options, config: str, settings: str) -> list[str]:
    """Return the arguments of train_vae.py, except for steps, seed and output."""
    return [config, "--data", o.data, *shlex.split(settings)]


def held_out_images(o: Options, side: int) -> Path:
    """Return a folder of images that are in no dataset; those of records are used for nothing else."""
    folder = Path(o.work) / f"images-{held_back(o)}-{o.images}-{side}"
    write_shapes(folder, side, 1, o.images, held_back(o))
    return folder


def report(o: Options, run: Path, images: Path, side: int) -> dict[str, Any]:
    """Return the statistics of a run's autoencoder, and those of each latent channel."""
    options = EvaluateVaeOptions(
        vae=str(run / "model"), data=str(images), resolution=side, images=o.images, out=str(run / "report")
    )
    found = evaluate(options)
    return {name: found["vae"][name] for name in _STATISTICS} | {"channels": found["channels"]}


def judged(o: Options) -> dict[str, dict[str, float]]:
    """Train stage 2 on each seed's autoencoder, and return its accuracies."""

    def program(seed: int) -> list[str]:
        words = ldm_arguments(o, JUDGE, o.judge, str(run_folder(o, seed) / "model"))
        return [*script(o, "train_ldm.py", words, "-judge")(seed)]

    train_seeds(o, program)
    return {str(seed): accuracy(o, run_folder(o, seed, "-judge") / "model") for seed in o.seeds}


def psnr(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    found = {seed: r["psnr"] for seed, r in reports.items()}
    return {"mean": statistics.mean(found.values()), "least": min(found.values()), "seeds": found}


def is_valid(o: Options, stored: Mapping[str, Any], before: Mapping[str, Any] | None) -> bool:
    """Return whether each PSNR is a record's, no channel is dead, and stage 2 is as good as with the record before."""
    complete = is_complete(o) and o.images >= IMAGES
    alive = not any(r["dead_channels"] for r in stored["latents"].values())
    least = 0.0 if before is None else before["accuracy"]["mean"] - TOLERANCE
    return complete and alive and stored["psnr"]["least"] >= PSNR and stored["accuracy"]["mean"] >= least
