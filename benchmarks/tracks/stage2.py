"""The track of stage 2: steps and CPU seconds until images follow their prompts, on fixed latents and text features."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tracks.options import Options
from tracks.records import Measured, digests_of, record
from tracks.trainings import Training, accuracy, contestant, ldm_arguments, run_folder, script, times, train_seeds
from train.config.ldm import LdmConfig
from train.config.load import parse


def measure(o: Options, before: Mapping[str, Any] | None) -> Measured:
    """Train all seeds, measure their accuracies, and time the step in turn with that of the record before."""
    o = replace(o, config=o.config or "configs/shapes/ldm.yaml")
    words = ldm_arguments(o, o.config, o.settings, o.vae)
    ended = [*words, "--steps", str(o.steps)]
    parse(LdmConfig, ended)  # an error costs no training
    digests, then = digests_of(o, before, "vae", "text_encoder"), contestant_before(o, before)
    train_seeds(o, script(o, "train_ldm.py", ended))
    found = {str(seed): accuracy(o, run_folder(o, seed) / "model") for seed in o.seeds}
    this = contestant(o, "this", "ldm", words)
    seconds, earlier = times(o, this, then, before)
    logs = {f"seed-{seed}.jsonl": run_folder(o, seed) / "metrics.jsonl" for seed in o.seeds}
    return Measured(record(o, found, seconds, earlier, digests), logs)


def contestant_before(o: Options, before: Mapping[str, Any] | None) -> Training | None:
    """Return the training of the record before, with its own code and settings, as a contestant."""
    if before is None:
        return None
    return contestant(o, "before", "ldm", ldm_arguments(o, before["config"], before["settings"], o.vae), o.checkout)
