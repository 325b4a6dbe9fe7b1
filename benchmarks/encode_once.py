"""Compare posteriors that an autoencoder computes in bf16 with those in fp32, and the time that each takes.

    python benchmarks/encode_once.py --model runs/demo/model --data data/shapes

The images are training images in order. Times are CPU ms per image in alternating batches.
"""

import argparse
import time

import torch
from torch import Tensor

from autoencoder.model import Autoencoder, Posterior
from autoencoder.normalisation import latent_statistics, latent_sums
from train.config.data import DataConfig
from train.data.batches.images import ImageDataset
from train.engine.open_data import open_inputs

_BATCH = 64


def posterior(autoencoder: Autoencoder, pixels: Tensor, *, bf16: bool) -> Posterior:
    """Return the posterior, in bf16 as stage 2's cache gives it with encode_once."""
    if not bf16:
        return autoencoder.encode(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = autoencoder.hidden(pixels)
    return autoencoder.last_layer()(hidden.half().float())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a model or of an autoencoder")
    parser.add_argument("--data", required=True, help="dataset")
    parser.add_argument("--resolution", type=int, default=32, help="side of the images")
    parser.add_argument("--images", type=int, default=4096, help="number of images")
    o = parser.parse_args()
    autoencoder = Autoencoder.load(o.model)
    config = DataConfig(resolution=o.resolution)
    source = open_inputs(o.data, config, captioned=False).source
    dataset: ImageDataset[None] = ImageDataset(source, config.center_framing(o.resolution), 0, shuffle=False)
    seconds = [0.0, 0.0]
    parts: list[list[Posterior]] = [[], []]
    for first in range(0, min(o.images, len(source)), _BATCH):
        pixels = dataset.__getitems__(range(first, min(first + _BATCH, len(source)))).pixels
        for k in range(2):
            started = time.process_time()
            parts[k].append(posterior(autoencoder, pixels, bf16=k == 1))
            seconds[k] += time.process_time() - started
    fp32, bf16 = (Posterior(*(torch.cat(x) for x in zip(*each, strict=True))) for each in parts)
    shift, ratio = (bf16.mean - fp32.mean) / fp32.std, bf16.std / fp32.std
    divergence = 0.5 * (shift.square() + ratio.square() - 1 - 2 * ratio.log())
    noise = torch.randn(fp32.mean.shape, generator=torch.Generator().manual_seed(0))
    rows = {
        "ms per image, fp32 and bf16": [1e3 * s / len(noise) for s in seconds],
        "rms deviation of the posterior": [float(fp32.std.square().mean().sqrt())],
        "rms difference of the means": [float((bf16.mean - fp32.mean).square().mean().sqrt())],
        "the same in deviations": [float(shift.square().mean().sqrt())],
        "rms relative difference of the deviations": [float((ratio - 1).square().mean().sqrt())],
        "KL divergence, nats per number": [float(divergence.mean())],
        **{
            f"{name}: mean of each channel's latents": latent_statistics(latent_sums(q, noise)).mean.tolist()
            for name, q in (("fp32", fp32), ("bf16", bf16))
        },
        **{
            f"{name}: their standard deviation": latent_statistics(latent_sums(q, noise)).std.tolist()
            for name, q in (("fp32", fp32), ("bf16", bf16))
        },
    }
    for name, values in rows.items():
        print(f"{name:44} {'  '.join(f'{value:.5f}' for value in values)}")


if __name__ == "__main__":
    main()
