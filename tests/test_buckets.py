"""Batches of one shape: each image is in its nearest rectangle, at least once an epoch, on any number of processes."""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import RunError, UserError
from support.batches import flat, joined, same
from train.data.batches.buckets import Buckets, assign, bucket_sizes, measure, no_rectangles
from train.data.batches.cached import CachedDataset
from train.data.batches.draws import LatentNoise, Noising
from train.data.batches.images import ImageDataset
from train.data.batches.latent_cache import LatentCache
from train.data.batches.loading import loader
from train.data.batches.text_cache import TextCache
from train.data.images.crop import Framing
from train.data.sources.catalogue import Catalogue, Row
from train.data.sources.splits import Source
from train.data.store.shards import Processes

QUIET = Processes(print=lambda _: None)


class Made(Catalogue):
    """Images of given shapes, each of one colour. An image of size 0 can't be read."""

    location = "memory"

    def __init__(self, shapes) -> None:
        self.shapes = list(shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def row(self, k: int) -> Row:
        return Row(f"{k:04d}.png", k, 0, (f"image {k}",))

    def read(self, k: int) -> bytes:
        file = io.BytesIO()
        if self.shapes[k] != (0, 0):
            Image.new("RGB", self.shapes[k], (k % 256, k // 256, 9)).save(file, "PNG")
        return file.getvalue()


def shapes_of(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [tuple(int(x) for x in rng.integers(20, 60, 2)) for _ in range(count)]


def buckets_of(shapes, batch_size: int = 6, seed: int = 3) -> Buckets:
    sizes = bucket_sizes(32, 8, 4.0)
    return Buckets(sizes, assign(np.array(shapes), sizes), batch_size, seed)


@pytest.mark.parametrize(
    ("resolution", "step", "ratio"), [(512, 64, 2.0), (256, 8, 3.0), (1024, 64, 4.0), (64, 64, 1.0)]
)
def test_rectangles_have_the_area_of_the_square(resolution, step, ratio):
    sizes = bucket_sizes(resolution, step, ratio)
    assert (resolution, resolution) in sizes
    assert {(h, w) for w, h in sizes} == set(sizes)
    ratios = [w / h for w, h in sizes]
    assert all(a < b for a, b in pairwise(ratios))
    assert max(ratios) <= ratio
    for width, height in sizes:
        assert width % step == height % step == 0
        assert width * height <= resolution**2 < (max(width, height) + step) * min(width, height)  # the longest


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ((32, 16, 2.0), "set --input.buckets 8"),
        ((64, 64, 2.0), "set --input.buckets 16"),  # side by side with resolution = buckets
        ((64, 8, 1.0), "give a higher --input.bucket-ratio"),
        ((32, 16, 2.0, 16), "give a higher --input.bucket-ratio"),  # the networks need multiples of 16
    ],
)
def test_buckets_that_have_no_effect_are_reported_with_a_remedy(settings, remedy):
    resolution, step, *_ = settings
    warning = no_rectangles(*settings)
    assert f"--input.buckets {step} has no effect" in warning
    assert f"{resolution}×{resolution} is the only rectangle" in warning
    assert remedy in warning
    assert not no_rectangles(64, 16, 2.0)
    if "set" in remedy:
        assert not no_rectangles(resolution, int(remedy.split()[-1]), *settings[2:])


def test_images_of_one_shape_in_one_bucket_are_reported():
    same = Buckets.assigned(np.array([(64, 64)] * 40), bucket_sizes(64, 16, 2.0), 8, 0)
    assert "1 bucket (64×64: 40)" in str(same)
    assert "all images are in one bucket" in str(same)
    few = Buckets.assigned(np.array([(64, 64)] * 40 + [(64, 32)] * 3), bucket_sizes(64, 16, 2.0), 8, 0)
    assert "all images are in one bucket" in str(few)
    assert "one bucket" not in str(Buckets.assigned(np.array([(64, 64), (64, 32)] * 20), few.sizes, 8, 0))


def test_a_resolution_that_is_not_a_multiple_is_refused():
    with pytest.raises(UserError, match=r"--input.resolution 100: must be a multiple of --input.buckets 64"):
        bucket_sizes(100, 64, 2.0)


def test_each_image_goes_to_the_nearest_rectangle():
    sizes = bucket_sizes(256, 32, 2.5)
    shapes = np.random.default_rng(0).integers(1, 1000, (500, 2))
    distance = np.abs(np.log(shapes[:, :1] / shapes[:, 1:]) - np.log([w / h for w, h in sizes]))  # (n, sizes)
    np.testing.assert_array_equal(assign(shapes, sizes), distance.argmin(1))
    assert assign(np.array([[5, 5]]), [(64, 64)]).tolist() == [0]


def test_a_batch_has_one_shape_and_an_epoch_every_image():
    shapes, size = shapes_of(101), 6
    buckets = buckets_of(shapes, size)
    batches = int(buckets.batches.sum())
    epochs = []
    for epoch in range(3):
        at = np.arange(epoch * batches * size, (epoch + 1) * batches * size)
        found = buckets.at(at).reshape(batches, size)
        assert all(len({buckets.size(k) for k in batch}) == 1 for batch in found)
        counts = np.bincount(found.ravel(), minlength=101)
        assert counts.min() == 1
        assert counts.sum() - 101 == buckets.filled
        for members in buckets.members:  # repeats that fill a bucket's last batch are spread evenly
            assert not len(members) or counts[members].max() - counts[members].min() <= 1
        epochs.append(found)
        np.testing.assert_array_equal(buckets.at(at[17:40]), found.ravel()[17:40])  # from any position
    assert not (epochs[0] == epochs[1]).all()
    first = [[buckets.bucket_of[b[0]] for b in epoch] for epoch in epochs]
    assert first[0] != first[1]  # the buckets are in another order
    assert f"an epoch has {batches} batches, in which {buckets.filled} images are repeats" in str(buckets)


def test_every_order_of_a_bucket_is_equally_likely():
    """The first image of an epoch, counted over many seeds."""
    shapes = [(32, 32)] * 5 + [(64, 16)] * 3
    first = [buckets_of(shapes, 2, seed).at([0])[0] for seed in range(3000)]
    counts = np.bincount(first, minlength=8)
    batches = np.array([3, 3, 3, 3, 3, 2, 2, 2])  # of 5, each of which is the first with equal probability
    expected = 3000 * np.where(batches == 3, 3 / 5 / 5, 2 / 5 / 3)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected.max())


def test_sizes_are_measured_once_and_unreadable_images_are_reported(tmp_path):
    source = Source(Made([*shapes_of(20), (0, 0)]))
    shapes, unreadable = measure(source, tmp_path, 10**6, 0, QUIET)
    np.testing.assert_array_equal(shapes[:20], source.catalogue.shapes[:20])
    assert shapes[20].tolist() == [0, 0]
    assert [name for name, _ in unreadable] == ["0020.png"]
    read = source.catalogue.read
    source.catalogue.read = lambda k: read(k) if k == 20 else None  # only the header that couldn't be read
    again, _ = measure(source, tmp_path, 10**6, 0, QUIET)
    np.testing.assert_array_equal(again, shapes)


class Encoder:
    """Stand-in for an autoencoder: mean colours, in latents four times smaller."""

    def __call__(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels, 4)
        return small[:, :2], small[:, 1:].exp()


def test_caches_and_images_give_the_same_batches(tmp_path):
    """Images and caches give the same examples, random numbers and latents, on one process or two."""
    shapes = shapes_of(40)
    source, buckets = Source(Made(shapes)), buckets_of(shapes)
    framing, noising = Framing(resolution=32, flip=True), Noising(dropout=0.2, strata=6)
    images = ImageDataset(source, framing, 5, buckets=buckets, draws=LatentNoise(noising, 2, 4))
    latents = LatentCache.open(
        tmp_path, source, Encoder(), digest="", framing=framing, channels=2, factor=4, buckets=buckets, processes=QUIET
    )
    text = TextCache.open(
        tmp_path,
        source,
        lambda texts: torch.tensor([[[float(len(t))]] for t in texts]),
        digest="",
        shape=(1, 1),
        processes=QUIET,
    )
    stored = CachedDataset(latents, text, 5, noising)
    how = {"start_step": 0, "steps": 30, "batch_size": 6}
    sides = set()
    for (made,), (kept,) in zip(loader(images, **how), loader(stored, **how), strict=True):
        mean, std = Encoder()(made.pixels)
        assert torch.equal(kept.mean, mean)
        assert torch.equal(kept.std, std)
        one, two = flat(made), flat(kept)
        for name in ("position", "index", "drawn.timestep", "drawn.noise", "drawn.posterior_noise", "drawn.dropped"):
            assert torch.equal(one[name], two[name])
        assert (kept.condition == 0).flatten().tolist() == made.drawn.dropped.tolist()
        sides.add(tuple(made.pixels.shape[2:]))
    assert len(sides) > 3
    halves = [list(loader(stored, rank=r, world=2, **how)) for r in range(2)]
    for step, (expected,) in enumerate(loader(stored, **how)):
        parts = [halves[r][step][0] for r in range(2)]
        assert same(joined(parts), joined([expected]))


def test_sizes_with_less_than_a_batch_are_not_used():
    shapes = np.array([*shapes_of(200), (60, 15), (15, 60)])
    sizes = bucket_sizes(32, 8, 4.0)
    assert np.bincount(assign(shapes, sizes)).min() < 20
    for least in (20, 60, 1000):
        of = assign(shapes, sizes, least)
        counts = np.bincount(of, minlength=len(sizes))
        assert counts[counts > 0].min() >= min(least, len(shapes))
        kept = [sizes[k] for k in np.flatnonzero(counts)]
        np.testing.assert_array_equal(
            [kept[k] for k in assign(shapes, kept)], [sizes[k] for k in of]
        )  # the nearest of the kept sizes
    assert (counts > 0).sum() == 1


def test_a_bucket_of_only_damaged_images_is_an_error(tmp_path):
    shapes = [(32, 32)] * 12 + [(64, 16)] * 6
    source, buckets = Source(Made(shapes)), buckets_of(shapes)
    for k in range(12, 18):
        source.catalogue.shapes[k] = (0, 0)
    latents = LatentCache.open(
        tmp_path,
        source,
        Encoder(),
        digest="",
        framing=Framing(resolution=32),
        channels=2,
        factor=4,
        buckets=buckets,
        processes=QUIET,
    )
    text = TextCache.open(
        tmp_path, source, lambda t: torch.zeros(len(t), 1, 1), digest="", shape=(1, 1), processes=QUIET
    )
    for dataset in (
        CachedDataset(latents, text, 5),
        ImageDataset(source, Framing(resolution=32), 5, buckets=buckets),
    ):
        with pytest.raises(RunError, match="no readable image found"):
            list(loader(dataset, start_step=0, steps=3, batch_size=6))


def test_a_damaged_image_is_replaced_from_its_own_bucket(tmp_path):
    shapes = shapes_of(60)
    source, buckets = Source(Made(shapes)), buckets_of(shapes)
    broken = [k for k in range(60) if k % 5 == 0 and len(buckets.members[buckets.bucket_of[k]]) > 1]
    for k in broken:
        source.catalogue.shapes[k] = (0, 0)
    dataset, seen = ImageDataset(source, Framing(resolution=32), 5, buckets=buckets), 0
    for (batch,) in loader(dataset, start_step=0, steps=40, batch_size=6):
        drawn = buckets.at(batch.position.numpy())
        for k, index in zip(drawn, batch.index.tolist(), strict=True):
            assert index not in broken
            assert buckets.bucket_of[index] == buckets.bucket_of[k]
            seen += k in broken
    assert seen > 10
