"""Examples of stage 2: latents and text features from the caches, or images and captions to encode in each step."""

from functools import partial
from typing import Any

from train.config.latent import LatentConfig
from train.data.batches.buckets import Buckets
from train.data.batches.cached import CachedDataset, Originals
from train.data.batches.draws import DEFAULT_NOISING, LatentNoise, Noising
from train.data.batches.images import ImageDataset, Inputs, StreamDataset
from train.data.batches.records import DrawnNoise
from train.data.batches.text_cache import TextCache
from train.data.sources.splits import Source
from train.engine.run import Run
from train.stages.caption_warnings import TruncatedCaptions
from train.stages.latents import open_latents, stored_type
from train.stages.ldm_init import Components

Examples = CachedDataset | ImageDataset[DrawnNoise]


def open_examples(
    run: Run[Any], components: Components, inputs: Inputs, noising: Noising, held_out: Noising = DEFAULT_NOISING
) -> tuple[Examples | StreamDataset[DrawnNoise], Examples]:
    """Return the training and the held-out examples.

    noising, held_out: settings of their random numbers. Held-out images are always squares, so that metrics can be
    compared between runs.
    """
    config: LatentConfig = run.config
    if config.cache != "off":
        return (
            cached(run, components, inputs.source, noising, inputs.buckets),
            cached(run, components, inputs.held_out, held_out),
        )
    draws = partial(
        LatentNoise,
        channels=components.autoencoder.latent_channels,
        factor=components.autoencoder.factor,
        masks=components.task == "inpaint",
    )
    center = config.input.center_framing(config.input.resolution)
    return (
        inputs.images(config.input.framing(), config.seed, draws(noising)),
        ImageDataset(inputs.held_out, center, config.seed, draws=draws(held_out)),
    )


def cached(
    run: Run[Any], components: Components, source: Source, noising: Noising, buckets: Buckets | None = None
) -> CachedDataset:
    """Return the latents and text features of a source from the cache; compute and store those that are missing."""
    config: LatentConfig = run.config
    autoencoder, text_encoder, training = components.autoencoder, components.text_encoder, source.split == "train"
    framing = config.input.framing() if training else config.input.center_framing(config.input.resolution)
    latents = open_latents(
        run,
        autoencoder,
        source,
        framing=framing,
        crops=max(1, config.input.crops) if training else 1,
        buckets=buckets,
        count=partial(run.damage.counter(source.left_out).count, complete=True),
    )
    truncated = TruncatedCaptions(run.print, "--text-chunks")
    with truncated.counted():
        text = TextCache.open(
            run.cache,
            source,
            text_encoder.encode,
            digest=text_encoder.digest,
            shape=(text_encoder.tokens, text_encoder.width),
            dtype=stored_type(config.precision),
            processes=run.processes,
        )
    if truncated.count > 1:
        run.print(f"{truncated.count:,} captions were truncated")
    originals = Originals(source, framing, buckets) if components.task == "inpaint" else None
    return CachedDataset(latents, text, config.seed, noising, repeats=source.repeats, originals=originals)
