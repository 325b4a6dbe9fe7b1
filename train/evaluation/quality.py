"""Measurement of a model by images that it generates from the captions of a dataset."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.pipeline import LatentDiffusionPipeline
from train.config.reports import EvaluateOptions
from train.data.batches.images import ImageDataset, Inputs
from train.data.batches.records import ImageBatch
from train.data.images.crop import Framing
from train.data.order.permutation import choose
from train.data.sources.splits import Source
from train.engine.provenance import text_encoder_of
from train.evaluation.captions import CaptionFeatures
from train.evaluation.features import Features, PixelFeatures, has_image_tower, load_features
from train.evaluation.generated import GeneratedImages, identity
from train.evaluation.measures import caption_values, distribution_values, measures, seed_values
from train.evaluation.memorisation import Nearest, memorisation_measures, search
from train.evaluation.results import Part, Sheet
from train.evaluation.sheets import in_rows, save_sheet, sheet, to_uint8

_PROMPTS = 16  # prompts of which several images are generated
_PAIRS = 20  # pairs on the sheet of nearest images


@dataclass(frozen=True)
class Evaluation:
    """A model, images to compare it with, and networks that compute features, each loaded once."""

    pipe: LatentDiffusionPipeline
    inputs: Inputs
    o: EvaluateOptions
    networks: Sequence[Features]
    texts: Sequence[CaptionFeatures | None]
    """The text side of each network, if it has one."""

    @classmethod
    def open(cls, pipe: LatentDiffusionPipeline, inputs: Inputs, o: EvaluateOptions) -> "Evaluation":
        """Load the networks of --features, or else the CLIP with which the model was trained."""
        names = o.features
        if not names and has_image_tower(own := text_encoder_of(o.model)):
            names = (own,)
        networks = [load_features(name).to(pipe.device) for name in names]
        texts = [CaptionFeatures(n.name).to(pipe.device) if n.compares_text else None for n in networks]
        return cls(pipe, inputs, o, networks, texts)

    @property
    def source(self) -> Source:
        """The images that the model is compared with."""
        return self.inputs.held_out if self.o.split == "test" else self.inputs.source

    @property
    def other(self) -> Source:
        """The other split: real images in place of generated ones, for the baselines."""
        return self.inputs.source if self.o.split == "test" else self.inputs.held_out

    @property
    def framing(self) -> Framing:
        return self.o.input.center_framing(self.pipe.backbone.sample_size[0] * self.pipe.autoencoder.factor)

    def batches(self, source: Source, count: int) -> Iterator[ImageBatch[None]]:
        """Yield images of a source, on the model's device, in an order that the seed determines."""
        dataset: ImageDataset[None] = ImageDataset(source, self.framing, self.o.seed)
        for first in range(0, count, self.o.batch_size):
            yield dataset.__getitems__(range(first, min(first + self.o.batch_size, count))).to(self.pipe.device)

    def captions(self, count: int) -> list[str]:
        """Return captions of the split's images, in the order of `batches`; each image's next one if it comes again."""
        order = choose(len(self.source), len(self.source), self.o.seed)
        rounds, places = zip(*(divmod(k, len(order)) for k in range(count)), strict=True)
        rows = (self.source[order[place]].captions for place in places)
        return [texts[turn % len(texts)] for texts, turn in zip(rows, rounds, strict=True)]

    def generated(self, name: str, captions: Sequence[str], **sampling: Any) -> GeneratedImages:
        """Return generated images of captions, in a folder of this name; `sampling` replaces sampling arguments."""
        return GeneratedImages(
            Path(self.o.out) / name,
            self.pipe,
            captions,
            identity(self.o.model) | {"data": self.source.fingerprint},
            batch_size=self.o.batch_size,
            seed=self.o.seed,
            **{**self.o.generation(), **sampling},
        )

    @cached_property
    def with_pixels(self) -> list[Features]:
        """The networks, and the pixels themselves."""
        return [*self.networks, PixelFeatures(self.framing.resolution)]

    def features(self, networks: Sequence[Features], batches: Iterable[Tensor]) -> list[Tensor]:
        """Return the features (n, d) of all images by each network, on the CPU."""
        parts: list[list[Tensor]] = [[] for _ in networks]
        for pixels in batches:
            for part, network in zip(parts, networks, strict=True):
                part.append(network(pixels.to(self.pipe.device)).float().cpu())
        return [torch.cat(part) for part in parts]

    def reconstructions(self) -> list[Tensor]:
        """Return the features of held-out images after a pass through the autoencoder, by each of `with_pixels`."""
        autoencoder, source = self.pipe.autoencoder, self.inputs.held_out
        batches = self.batches(source, min(self.o.images, len(source)))
        return self.features(
            self.with_pixels, (autoencoder.decode(autoencoder.encode(batch.pixels).mean) for batch in batches)
        )


def measure_generated(e: Evaluation, reconstructions: Sequence[Tensor] = ()) -> list[Part]:
    """Return measures of --samples generated images, and of their nearest training images.

    reconstructions: those of the evaluation, if they have been computed already.
    """
    reference = min(e.o.images, len(e.source))
    if reference < 2:
        warnings.warn(
            f"--split {e.o.split} has {reference} image: generated images aren't measured, because at least 2 are "
            "needed to compare with",
            stacklevel=2,
        )
        return []
    if not e.networks:
        warnings.warn(
            "generated images are compared by their pixels only: for more, give --features, e.g. the folder of a CLIP",
            stacklevel=2,
        )
    captions = e.captions(e.o.samples)
    generated = e.generated("generated", captions)
    made = e.features(e.with_pixels, generated.batches())
    parts = _distribution(e, made, captions, reference)
    if e.networks and e.o.seeds:
        parts += _seeds(e, made)
    if e.o.copies:
        parts += _memorisation(e, made, generated, reconstructions or e.reconstructions())
    return parts


def _distribution(e: Evaluation, made: Sequence[Tensor], captions: list[str], reference: int) -> list[Part]:
    """Return measures against the split's images. Their baseline is that of as many real images of the other split."""
    count = min(e.o.samples, len(e.other))
    own_captions: list[str] = []

    def images() -> Iterator[Tensor]:
        for batch in e.batches(e.source, reference):
            own_captions.extend(batch.captions)
            yield batch.pixels

    real = e.features(e.networks, images())
    other = e.features(e.networks, (batch.pixels for batch in e.batches(e.other, count))) if count > 1 else None
    parts: list[Part] = []
    for k, network in enumerate(e.networks):
        is_clip = network.compares_text
        values = distribution_values(real[k], made[k], is_clip=is_clip)
        baselines = distribution_values(real[k], other[k], is_clip=is_clip) if other else {}
        if (text := e.texts[k]) is not None:
            values |= caption_values(made[k], text.all(captions, e.o.batch_size))
            baselines |= caption_values(real[k], text.all(own_captions, e.o.batch_size))
        parts += measures(values, baselines, network, samples=e.o.samples, reference=reference)
    return parts


def _seeds(e: Evaluation, made: Sequence[Tensor]) -> list[Part]:
    """Return the distance between images of one prompt; the baseline is that between images of different prompts."""
    prompts = e.captions(_PROMPTS)
    generated = e.generated("seeds", [prompt for prompt in prompts for _ in range(e.o.seeds)])
    parts: list[Part] = []
    for k, (network, x) in enumerate(zip(e.networks, e.features(e.networks, generated.batches()), strict=True)):
        values = seed_values(x.view(len(prompts), e.o.seeds, -1))
        parts += measures(values, seed_values(made[k][None]), network, samples=len(x), reference=0)
    return parts


def _memorisation(
    e: Evaluation, made: Sequence[Tensor], generated: GeneratedImages, reconstructions: Sequence[Tensor]
) -> list[Part]:
    """Return measures and sheets of the generated images' nearest training images."""
    source = e.inputs.source
    searched = min(e.o.copies, len(source))
    training = tqdm(
        e.batches(source, searched),
        desc="searching copies",
        total=-(-searched // e.o.batch_size),
        unit="batch",
        dynamic_ncols=True,
    )
    pairs = ((batch.pixels, batch.index.cpu()) for batch in training)
    parts: list[Part] = []
    for k, nearest in enumerate(search(e.with_pixels, made, reconstructions, pairs)):
        parts += memorisation_measures(nearest, searched)
        name = "pixels" if nearest.network.name == "pixels" else f"features_{k + 1}"
        parts.append(_nearest_sheet(e, nearest, generated, f"nearest_{name}"))
    return parts


def _nearest_sheet(e: Evaluation, nearest: Nearest, generated: GeneratedImages, name: str) -> Sheet:
    """Draw the pairs of a generated image and its nearest training image with the smallest distances."""
    source, framing, images, texts = e.inputs.source, e.framing, [], []
    for k in nearest.made.distance.topk(min(_PAIRS, len(generated)), largest=False).indices.tolist():
        index, distance = int(nearest.made.index[k]), float(nearest.made.distance[k])
        row = source[index]
        training = framing.apply(framing.load(source.read(index), row.name), framing.square, (0.5, 0.5), False)
        images += [generated[k], to_uint8(training[None])[0]]
        texts += [f"generated: {generated.captions[k]}", f"{distance:.3g} from {row.name}: {' | '.join(row.captions)}"]
    save_sheet(sheet(in_rows(images, 4), texts), Path(e.o.out) / f"{name}.png")
    return Sheet(
        name=name,
        title=f"Nearest training images: {nearest.network.name}",
        file=f"{name}.png",
        note="Pairs of a generated image and, right of it, the nearest training image; the smallest distances first.",
    )
