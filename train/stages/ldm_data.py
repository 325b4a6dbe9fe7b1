"""Examples of stage 2: latents and text features from the caches, or images and captions to encode in each step."""

from functools import partial

from train.config.ldm import LdmConfig
from train.data.batches.buckets import Buckets
from train.data.batches.cached import CachedDataset, Originals
from train.data.batches.draws import DEFAULT_NOISING, LatentNoise, Noising
from train.data.batches.images import ImageDataset, Inputs, StreamDataset
from train.data.batches.latent_cache import LatentCache
from train.data.batches.records import DrawnNoise
from train.data.batches.text_cache import TextCache
from train.data.sources.splits import Source
from train.data.store.shards import Stored
from train.engine.run import Run
from train.stages.caption_warnings import TruncatedCaptions
from train.stages.ldm_init import Components

Examples = CachedDataset | ImageDataset[DrawnNoise]


def open_examples(
    run: Run[LdmConfig], components: Components, inputs: Inputs
) -> tuple[Examples | StreamDataset[DrawnNoise], Examples]:
    """Return the training and the held-out examples.

    Held-out images are always squares, so that metrics can be compared between runs.
    """
    config = run.config
    noising = Noising(
        dropout=config.caption_dropout,
        strata=config.batch_size if config.diffusion.stratified else 1,
        offset=config.diffusion.offset_noise,
    )
    if config.cache != "off":
        training, held_out = (
            cached(run, components, source, noising, inputs.buckets) for source in (inputs.source, inputs.held_out)
        )
        return training, held_out
    draws = partial(
        LatentNoise,
        channels=components.autoencoder.latent_channels,
        factor=components.autoencoder.factor,
        masks=config.task == "inpaint",
    )
    center = config.input.center_framing(config.input.resolution)
    return (
        inputs.images(config.input.framing(), config.seed, draws(noising)),
        ImageDataset(inputs.held_out, center, config.seed, draws=draws(DEFAULT_NOISING)),
    )


def cached(
    run: Run[LdmConfig], components: Components, source: Source, noising: Noising, buckets: Buckets | None
) -> CachedDataset:
    """Return the latents and text features of a source from the cache; compute and store those that are missing.

    noising, buckets: used for the training split only.
    """
    config, autoencoder, text_encoder = run.config, components.autoencoder, components.text_encoder
    training = source.split == "train"
    if not training:
        noising, buckets = DEFAULT_NOISING, None
    dtype: Stored = "float32" if config.precision == "fp32" else "float16"
    framing = config.input.framing() if training else config.input.center_framing(config.input.resolution)
    latents = LatentCache.open(
        run.cache,
        source,
        autoencoder.encode,
        digest=autoencoder.digest,
        framing=framing,
        channels=autoencoder.latent_channels,
        factor=autoencoder.factor,
        crops=max(1, config.input.crops) if training else 1,
        buckets=buckets,
        dtype=dtype,
        workers=config.workers,
        processes=run.processes,
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
            dtype=dtype,
            processes=run.processes,
        )
    if truncated.count > 1:
        run.print(f"{truncated.count:,} captions were truncated")
    originals = Originals(source, framing, buckets) if config.task == "inpaint" else None
    return CachedDataset(latents, text, config.seed, noising, repeats=source.repeats, originals=originals)
