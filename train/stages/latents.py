"""The cache of latents, shared by stage 2, which trains on them, and stage 1, which normalises them."""

from typing import Any

from torch import Tensor

from autoencoder.model import Autoencoder
from train.config.latent import LatentConfig
from train.config.run import Precision
from train.config.vae import VaeConfig
from train.data.batches.latent_cache import LatentCache
from train.data.sources.splits import Source
from train.data.store.shards import Stored
from train.engine.precision import autocast
from train.engine.run import Run


def stored_type(precision: Precision) -> Stored:
    """Return the type of the numbers in caches."""
    return "float32" if precision == "fp32" else "float16"


def open_latents(run: Run[Any], autoencoder: Autoencoder, source: Source, **options: Any) -> LatentCache:
    """Open the cache of a source's latents, and complete it; see LatentCache.open for the other options.

    With `encode_once`, it stores the outputs of the encoder before its last layer. Normalisation changes only this
    layer, so stage 1 computes the statistics of the latents from the same rows on which stage 2 trains.
    """
    config: VaeConfig | LatentConfig = run.config
    how: dict[str, Any] = {"encode": autoencoder.encode, "digest": autoencoder.digest}
    if config.encode_once:
        precision: Precision = "bf16" if config.precision == "bf16" else "fp32"  # never fp16, which overflows

        def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
            with autocast(autoencoder.vae.device, precision):
                first, second = autoencoder.hidden(pixels).float().chunk(2, 1)
            return first, second

        about = f"before the last layer, {precision} {autoencoder.encoder_digest}"
        how = {"encode": encode, "digest": about, "last_layer": autoencoder.last_layer()}
    return LatentCache.open(
        run.cache,
        source,
        channels=autoencoder.latent_channels,
        factor=autoencoder.factor,
        dtype=stored_type(config.precision),
        workers=config.workers,
        processes=run.processes,
        **how,
        **options,
    )
