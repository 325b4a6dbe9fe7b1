"""The track of the peer: diffusers' loop on the latents, text features and network of stage 2, with the same accuracy.

Its step is timed in turn with that of our record. `shipped` is diffusers' script as it is, which encodes images and
captions in each step; `best` and `compiled` are its loop improved by hand (against/finetuning.py).
"""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from against.contest import Contestant
from against.equality import script_spec
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from ldm.errors import UserError
from ldm.pipeline import LatentDiffusionPipeline
from tracks.options import Options
from tracks.records import Measured, digests_of, record
from tracks.stage2 import contestant_before
from tracks.trainings import accuracy, ldm_arguments, run_folder, threads, times, train_seeds
from train.config.ldm import LdmConfig
from train.config.load import parse
from train.data.batches.draws import Noising
from train.data.store.atomic import atomic_folder
from train.engine.device import open_accelerator
from train.engine.run import open_run
from train.stages.ldm import open_captioned
from train.stages.ldm_data import cached
from train.stages.ldm_init import load_components

HOW = {"best": "fused attention", "compiled": "fused attention compiled", "shipped": ""}
"""Words for `Finetuning`."""
Spec = dict[str, Any]


def measure(o: Options, before: Mapping[str, Any] | None) -> Measured:
    """Train all seeds, measure their accuracies, and time the step in turn with that of our record.

    Without a record, it is timed in turn with stage 2 of the configuration, at the same number of steps.
    """
    o = replace(o, config=o.config or "configs/shapes/ldm.yaml")
    config = parse(LdmConfig, [*ldm_arguments(o, o.config, o.settings, o.vae), "--steps", str(o.steps)])
    if config.diffusion.target != "eps" or config.diffusion.schedule != "scaled_linear":
        raise UserError("--track peer: diffusers' loop needs diffusion.target eps and diffusion.schedule scaled_linear")
    if o.peer == "shipped" and not (Path(o.diffusers) / "examples/text_to_image/train_text_to_image.py").is_file():
        raise UserError(f"--diffusers {o.diffusers!r}: must be a checkout of diffusers, for --peer shipped")
    ours = {"name": "stage 2 as configured", "steps": o.steps, "config": o.config, "settings": o.settings}
    then = contestant_before(o, before or ours)
    digests = digests_of(o, before, "vae", "text_encoder")
    work = run_folder(o, o.seeds[0], "-start").parent.resolve()
    prepare(o, config, work)
    waiting = replace(o, seeds=tuple(seed for seed in o.seeds if not (own_folder(o, seed) / "model").is_dir()))
    train_seeds(waiting, lambda seed: training(o, config, work, seed).command())
    for seed in waiting.seeds:
        keep_model(work / f"seed-{seed}", own_folder(o, seed))
    found = {str(seed): accuracy(o, own_folder(o, seed) / "model") for seed in o.seeds}
    this = timing(o, config, work, o.seeds[0])
    seconds, earlier = times(o, this, then, before or ours)
    logs = {f"seed-{seed}.jsonl": own_folder(o, seed) / "metrics.jsonl" for seed in o.seeds}
    own = {"peer": o.peer, "peer_lr": o.peer_lr}
    return Measured(record(o, found, seconds, earlier, digests, **own), logs)


def own_folder(o: Options, seed: int) -> Path:
    """Return the folder of a seed, which depends on the loop."""
    return run_folder(o, seed, f"-{o.peer}-{o.peer_lr:g}")


def prepare(o: Options, config: LdmConfig, work: Path) -> None:
    """Write what the loop needs: inputs.safetensors, and for each seed a pipeline with diffusers' initial weights."""
    with tempfile.TemporaryDirectory() as out:
        config = replace(config, out=out, trackers=())
        accelerator, inputs = open_accelerator(config), open_captioned(config)
        components = load_components(config, config.build_objective(), accelerator.device)
        with open_run(config, accelerator, {"data": inputs.fingerprint, **components.digests}) as run:
            dataset = cached(run, components, inputs.source, Noising())
            images = np.flatnonzero(~dataset.latents.damaged)
            mean, std = (part.contiguous() for part in dataset.latents.gather(images).unbind(1))
            captions = dataset.text.rows(images, np.zeros(len(images)))  # the first of each image
            rows, places = np.unique(np.append(0, captions), return_inverse=True)
            texts = {"texts": dataset.text.gather(rows).contiguous(), "rows": torch.from_numpy(places[1:].copy())}
    work.mkdir(parents=True, exist_ok=True)
    save_file({"mean": mean, "std": std, **texts}, work / "inputs.safetensors")
    unet: Any = components.backbone.module
    shape = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    parts = components.autoencoder, components.text_encoder, components.process
    for seed in o.seeds:
        torch.manual_seed(seed)
        with atomic_folder(work / f"seed-{seed}") as folder:
            LatentDiffusionPipeline(UNet2DConditionModel(**shape).eval(), *parts).save_pretrained(folder)


def training(o: Options, config: LdmConfig, work: Path, seed: int) -> Contestant:
    """Return the program that trains one seed to its end; it writes a folder unet and metrics.jsonl."""
    out = own_folder(o, seed).resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if o.peer == "shipped":
        spec = _script(o, config, work / f"seed-{seed}", out / "script", seed, o.steps)
        return Contestant("this", "script.py", spec | {"log": str(out / "metrics.jsonl"), "threads": threads(o)})
    spec = _loop(o, config, work, seed)
    return Contestant("this", "training.py", spec | {"steps": o.steps, "out": str(out), "threads": threads(o)})


def timing(o: Options, config: LdmConfig, work: Path, seed: int) -> Contestant:
    """Return the same training as a contestant that makes steps without an end."""
    if o.peer == "shipped":
        spec = _script(o, config, work / f"seed-{seed}", Path(o.work).resolve() / "timing/script", seed, 1_000_000)
        return Contestant("this", "script.py", spec)
    return Contestant("this", "training.py", _loop(o, config, work, seed))


def _loop(o: Options, config: LdmConfig, work: Path, seed: int) -> Spec:
    start, inputs = str(work / f"seed-{seed}"), str(work / "inputs.safetensors")
    spec = {"who": "diffusers", "stage": "ldm", "start": start, "inputs": inputs, "seed": seed, "lr": o.peer_lr}
    spec |= {"how": HOW[o.peer], "precision": config.precision, "batch": config.batch_size}
    return spec | {"threads": torch.get_num_threads()}


def _script(o: Options, config: LdmConfig, start: Path, out: Path, seed: int, steps: int) -> Spec:
    sizes = {"resolution": config.input.resolution, "train_batch_size": config.batch_size, "max_train_steps": steps}
    settings: Spec = {"learning_rate": o.peer_lr, "mixed_precision": config.precision, "seed": seed}
    return script_spec(o.diffusers, start, str(Path(o.data).resolve()), out, settings | sizes)


def keep_model(start: Path, out: Path) -> None:
    """Write out/model: the pipeline that the training started from, with the trained network."""
    trained = next(folder for folder in (out / "unet", out / "script/unet") if folder.is_dir())
    with atomic_folder(out / "model") as folder:
        shutil.copytree(start, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("unet"))
        shutil.copytree(trained, folder / "unet")
