"""Batches are functions of (seed, positions); caches give exactly the encoders' outputs, or are built again."""

import contextlib
import errno
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import train.data.store.row_index as row_index
import train.data.store.shards as shards_module
from ldm.errors import RunError, UserError
from support.batches import flat, joined, same
from train.data.batches.buckets import measure
from train.data.batches.cached import CachedDataset
from train.data.batches.draws import LatentNoise, Noising, PosteriorNoise
from train.data.batches.images import ImageDataset
from train.data.batches.latent_cache import LatentCache, stored_place
from train.data.batches.loading import loader
from train.data.batches.text_cache import TextCache
from train.data.batches.unreadable import UnreadableCounter
from train.data.images import decode
from train.data.images.crop import Framing
from train.data.images.decode import DamagedImage, load_image, to_tensor
from train.data.order.permutation import index_at, substitute
from train.data.order.rng import Purpose, normal, uniform
from train.data.sources.catalogue import Catalogue, Row
from train.data.sources.splits import Source, open_source
from train.data.store.shards import Processes

SIDE, LATENT, TEXT = 16, (2, 4, 4), (3, 5)
PLAIN = Framing(resolution=SIDE)
CHANCE = Framing(resolution=SIDE, crop="random", flip=True)
COLOURS = ("red", "green", "blue")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards_module, "_SHARD_ROWS", 8)


def folder_of(tmp_path: Path, count: int = 30, bad: tuple[int, ...] = ()) -> Path:
    """Images with one to three captions each, and one held out."""
    rng = np.random.default_rng(0)
    for split, n in (("train", count), ("test", 1)):
        rows = []
        (tmp_path / "data" / split).mkdir(parents=True)
        for k in range(n):
            path = tmp_path / "data" / split / f"{k:03d}.png"
            Image.fromarray(rng.integers(0, 256, (SIDE + k % 3, SIDE, 3), dtype=np.uint8)).save(path)
            if k in bad:
                path.write_bytes(path.read_bytes()[:60])
            rows += [{"file_name": path.name, "text": f"{COLOURS[j]} {k % 7}"} for j in range(1 + k % 3)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / split / "metadata.jsonl").write_text(lines)
    return tmp_path / "data"


def source_of(tmp_path: Path, count: int = 30, bad: tuple[int, ...] = ()):
    return open_source(folder_of(tmp_path, count, bad), "train")


class Encoder:
    """Stand-in for an autoencoder: a fixed function of the image. It counts its inputs."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.rows = scale, 0

    def __call__(self, pixels):
        self.rows += len(pixels)
        small = torch.nn.functional.avg_pool2d(pixels, 4)  # (b, 3, 4, 4)
        return self.scale * small[:, :2], self.scale * (small[:, 1:] / 10).exp()


class TextEncoder:
    """Stand-in for a text encoder."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, captions):
        self.rows += len(captions)
        seeds = [int.from_bytes(c.encode()[-4:].ljust(4)) + 7 * len(c) for c in captions]
        return torch.stack([torch.randn(TEXT, generator=torch.Generator().manual_seed(s)) for s in seeds])


def never(*_):
    raise AssertionError("the encoder was called")


def latents_of(tmp_path, source, encode, digest="one", messages=None, **options):
    processes = options.pop("processes", Processes(print=(messages if messages is not None else []).append))
    return LatentCache.open(
        tmp_path / "cache",
        source,
        encode,
        digest=digest,
        framing=options.pop("framing", PLAIN),
        channels=LATENT[0],
        factor=4,
        batch_size=3,
        processes=processes,
        **options,
    )


def text_of(tmp_path, source, encode, digest="text", **options):
    processes = options.pop("processes", Processes(print=lambda _: None))
    return TextCache.open(
        tmp_path / "cache", source, encode, digest=digest, shape=TEXT, batch_size=4, processes=processes, **options
    )


def cached(tmp_path, source, seed=5, **noising):
    latents, text = latents_of(tmp_path, source, Encoder()), text_of(tmp_path, source, TextEncoder())
    return CachedDataset(latents, text, seed, Noising(**noising))


def shown(source, index) -> torch.Tensor:
    """Return the whole image as the encoder receives it."""
    return to_tensor(load_image(source.read(index)), SIDE)


def both_kinds(tmp_path, bad=(3, 4, 11)):
    source = source_of(tmp_path, bad=bad)
    return [
        ImageDataset(source, CHANCE, 5, draws=PosteriorNoise(2, 4)),
        cached(tmp_path, source, dropout=0.2),
    ]


# -- batches --------------------------------------------------------------------------------------------------------


def test_batches_are_the_same_for_any_workers_processes_accumulation_and_start(tmp_path):
    for dataset in both_kinds(tmp_path):
        how = {"steps": 7, "batch_size": 8}  # 56 examples: nearly two epochs of 30
        expected = [joined(parts) for parts in loader(dataset, start_step=0, **how)]
        assert [b["position"].tolist() for b in expected] == [list(range(8 * s, 8 * s + 8)) for s in range(7)]
        assert len({tuple(b["index"].tolist()) for b in expected}) == 7
        read_ahead = [joined(parts) for parts in loader(dataset, start_step=0, workers=2, accumulation=2, **how)]
        assert all(map(same, expected, read_ahead))
        for start in range(1, 7):
            assert all(map(same, expected[start:], [joined(p) for p in loader(dataset, start_step=start, **how)]))
        for world, accumulation in ((2, 1), (4, 1), (2, 4), (1, 8)):
            ranks = [
                list(loader(dataset, start_step=0, rank=r, world=world, accumulation=accumulation, **how))
                for r in range(world)
            ]
            for step, batch in enumerate(expected):
                parts = [ranks[r][step][a] for a in range(accumulation) for r in range(world)]
                assert same(joined(parts), batch)


def test_workers_leave_the_global_generators_alone(tmp_path):
    dataset = ImageDataset(source_of(tmp_path), PLAIN, 0)
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(1)
    np.random.seed(1)
    for workers in (0, 2):
        next(loader(dataset, start_step=0, steps=2, batch_size=4, workers=workers))
    assert torch.equal(torch.rand(3), expected[0])
    assert (np.random.rand(3) == expected[1]).all()


def test_an_image_batch_follows_from_its_positions_and_draws(tmp_path):
    source = source_of(tmp_path)
    draws = LatentNoise(Noising(dropout=0.5), 2, 4)
    dataset, at = ImageDataset(source, CHANCE, 5, draws=draws), np.arange(100, 140)
    batch = dataset.__getitems__(at.tolist())
    np.testing.assert_array_equal(batch.index, index_at(at, 30, 5))
    np.testing.assert_array_equal(batch.drawn.posterior_noise, normal(5, Purpose.POSTERIOR, at, LATENT))
    np.testing.assert_array_equal(batch.drawn.noise, normal(5, Purpose.NOISE, at, LATENT))
    np.testing.assert_array_equal(batch.drawn.dropped, uniform(5, Purpose.DROPOUT, at) < 0.5)
    flips = uniform(5, Purpose.FLIP, at) < 0.5
    assert 5 < flips.sum() < 35
    for k, index in enumerate(batch.index.tolist()):
        assert batch.captions[k] in source[index].captions
        image = np.asarray(load_image(source.read(index)))
        crops = [image[top : top + SIDE] for top in range(len(image) - SIDE + 1)]
        crops = [to_tensor(Image.fromarray(c), SIDE, flip=bool(flips[k])) for c in crops]
        assert any(torch.equal(batch.pixels[k], c) for c in crops)
    plain = ImageDataset(source, PLAIN, 5, shuffle=False).__getitems__(range(30))
    assert plain.index.tolist() == list(range(30))
    assert torch.equal(plain.pixels[7], shown(source, 7))


def test_an_images_captions_are_drawn_equally_often(tmp_path):
    source = source_of(tmp_path, 3)  # with one, two and three captions
    dataset = ImageDataset(source, PLAIN, 2)
    batch = dataset.__getitems__(range(1800))
    for index in range(3):
        chosen = [c for c, i in zip(batch.captions, batch.index.tolist(), strict=True) if i == index]
        counts = np.array([chosen.count(c) for c in source[index].captions])
        assert counts.sum() == 600
        assert np.abs(counts - 600 / (index + 1)).max() < 4.5 * np.sqrt(600 / 4)


def test_a_cached_batch_equals_the_outputs_of_the_encoders(tmp_path):
    source, at = source_of(tmp_path), np.arange(64)
    batch = cached(tmp_path, source, dropout=0.3).__getitems__(at)
    index = index_at(at, 30, 5)
    np.testing.assert_array_equal(batch.index, index)
    mean, std = Encoder()(torch.stack([shown(source, i) for i in index]))
    torch.testing.assert_close(batch.mean, mean, rtol=0, atol=0)
    torch.testing.assert_close(batch.std, std, rtol=0, atol=0)
    np.testing.assert_array_equal(batch.drawn.noise, normal(5, Purpose.NOISE, at, LATENT))
    np.testing.assert_array_equal(batch.drawn.posterior_noise, normal(5, Purpose.POSTERIOR, at, LATENT))
    np.testing.assert_array_equal(batch.drawn.timestep, uniform(5, Purpose.TIMESTEP, at).astype(np.float32))
    u, dropped = uniform(5, Purpose.CAPTION, at), uniform(5, Purpose.DROPOUT, at) < 0.3
    captions = [source[i].captions for i in index]
    chosen = ["" if d else c[int(x * len(c))] for c, x, d in zip(captions, u, dropped, strict=True)]
    assert torch.equal(batch.condition, TextEncoder()(chosen))
    found = {k: v.dtype for k, v in flat(batch).items() if torch.is_tensor(v)}
    assert [k for k, dtype in found.items() if dtype != torch.float32] == ["position", "index", "drawn.dropped"]


def test_the_null_condition_has_its_probability_and_is_exact(tmp_path):
    source, n = source_of(tmp_path), 4000
    null = TextEncoder()([""])[0]
    for dropout in (0.0, 0.1, 0.5):
        condition = cached(tmp_path, source, dropout=dropout).__getitems__(range(n)).condition
        count = int((condition == null).flatten(1).all(1).sum())
        assert abs(count - n * dropout) <= 4 * np.sqrt(n * dropout * (1 - dropout))
    undropped = cached(tmp_path, source).__getitems__(range(50))
    assert undropped.condition.shape == (50, *TEXT)


def test_timesteps_are_below_one_in_float32(tmp_path, monkeypatch):
    dataset = cached(tmp_path, source_of(tmp_path))
    monkeypatch.setattr(
        "train.data.batches.draws.uniform", lambda seed, purpose, at: np.full(len(at), np.nextafter(1, 0))
    )
    timestep = dataset.__getitems__([0]).drawn.timestep
    assert timestep.dtype == torch.float32
    assert timestep.item() < 1


def test_mirrored_latents_are_those_of_mirrored_images(tmp_path):
    source = source_of(tmp_path, bad=(3,))
    latents = latents_of(tmp_path, source, Encoder(), framing=Framing(resolution=SIDE, flip=True))
    dataset = CachedDataset(latents, text_of(tmp_path, source, TextEncoder()), 5)
    at = np.arange(200)
    batch, flips = dataset.__getitems__(at), uniform(5, Purpose.FLIP, at) < 0.5
    images = [shown(source, i) for i in batch.index.tolist()]
    images = [x.flip(2) if f else x for x, f in zip(images, flips, strict=True)]
    torch.testing.assert_close(batch.mean, Encoder()(torch.stack(images))[0], rtol=0, atol=0)


def test_a_batch_size_that_does_not_divide_is_refused_at_once(tmp_path):
    dataset = ImageDataset(source_of(tmp_path), PLAIN, 0)
    with pytest.raises(UserError, match="batch_size 9"):
        loader(dataset, start_step=0, steps=1, batch_size=9, world=2)


def test_signals_to_the_process_group_lose_no_batches(tmp_path):
    dataset = ImageDataset(source_of(tmp_path), PLAIN, 0)
    steps = loader(dataset, start_step=0, steps=40, batch_size=4, workers=2)
    seen = [next(steps), next(steps)]  # one from each worker, so both have started
    for number in (signal.SIGINT, signal.SIGTERM):
        for child in multiprocessing.active_children():
            os.kill(child.pid, number)
    time.sleep(0.2)
    seen += list(steps)
    assert len(seen) == 40
    started = time.monotonic()
    steps = loader(dataset, start_step=0, steps=40, batch_size=4, workers=2)
    next(steps)
    del steps
    assert time.monotonic() - started < 10
    assert not multiprocessing.active_children()


# -- damage ---------------------------------------------------------------------------------------------------------


def test_a_damaged_image_is_substituted_and_listed_once(tmp_path):
    bad = (3, 4, 11)
    messages: list[str] = []
    for dataset in both_kinds(tmp_path, bad):
        at = np.arange(300)
        found, drawn = dataset.__getitems__(at).index.numpy(), index_at(at, 30, 5)
        assert not np.isin(found, bad).any()
        assert (found == drawn)[~np.isin(drawn, bad)].all()
        for p in at[np.isin(drawn, bad)].tolist():
            drawn = (substitute(p, attempt, 30, 5) for attempt in range(1, 100))
            assert found[p] == next(i for i in drawn if i not in bad)
    report = tmp_path / "run" / "damaged.jsonl"
    images = both_kinds(tmp_path / "again", bad)[0]
    for workers in (0, 2):
        damage = UnreadableCounter(report, limit=0.2, print=messages.append)
        for parts in loader(images, start_step=0, steps=15, batch_size=8, workers=workers, counter=damage):
            assert len(parts) == 1
        tried = sum(int(i) in bad for i in index_at(np.arange(120), 30, 5))
        assert tried <= damage.unreadable <= 2 * tried
        assert damage.images == 120 + damage.unreadable  # draws, because the number of images isn't given
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert sorted(line["file"] for line in lines) == ["003.png", "004.png", "011.png"]
    assert all("truncated" in line["reason"] or "broken" in line["reason"] for line in lines)
    assert len(messages) == 1


def test_too_many_damaged_images_stop_the_run_and_a_few_do_not(tmp_path):
    dataset = ImageDataset(source_of(tmp_path, bad=tuple(range(10))), PLAIN, 0)
    damage = UnreadableCounter(tmp_path / "damaged.jsonl", limit=0.1, print=lambda _: None)
    with pytest.raises(RunError, match=r"of .* images can't be read, but --input.max-damaged 0.1"):
        list(loader(dataset, start_step=0, steps=50, batch_size=8, counter=damage))
    assert 19 < damage.unreadable <= 19 + 8  # a tenth of a hundred and an allowance for chance
    damage = UnreadableCounter(tmp_path / "damaged.jsonl", limit=0.5, print=lambda _: None)
    list(loader(dataset, start_step=0, steps=50, batch_size=8, counter=damage))
    assert 90 < damage.unreadable < 300


def test_the_limit_on_damage_is_exact_for_all_images_and_allows_for_chance_in_a_sample(tmp_path):
    def bad(count):
        return [(f"{k}.png", "x") for k in range(count)]

    UnreadableCounter(tmp_path / "one.jsonl", limit=0.1, print=lambda _: None).count(45, bad(5), complete=True)
    with pytest.raises(RunError, match=r"^6 of 50 images"):
        UnreadableCounter(tmp_path / "two.jsonl", limit=0.1, print=lambda _: None).count(44, bad(6), complete=True)
    rng, stopped = np.random.default_rng(0), 0
    for run in range(100):
        damage = UnreadableCounter(tmp_path / f"{run}.jsonl", limit=0.1, print=lambda _: None)
        damage.add_to_report(bad(16))  # so that the report is written once
        try:
            for _ in range(200):
                count = rng.binomial(16, 0.08)
                damage.count(16 - count, bad(count))
        except RunError:
            stopped += 1
    assert stopped <= 2


def test_a_truncated_report_is_continued(tmp_path):
    report = tmp_path / "damaged.jsonl"
    report.write_text('{"file": "a.png", "reason": "x"}\n{"file": "b.p')
    damage = UnreadableCounter(report, print=lambda _: None)
    damage.count(8, [("a.png", "x"), ("b.png", "y")])
    damage.count(8, [("c.png", "z"), ("b.png", "y")])
    UnreadableCounter(report, print=lambda _: None).count(8, [("b.png", "y"), ("c.png", "z")])
    lines = report.read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines if line.endswith("}")] == ["a.png", "b.png", "c.png"]
    assert len(lines) == 4


def test_missing_files_are_reported(tmp_path):
    folder = folder_of(tmp_path)
    with open(folder / "train" / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": "missing.png", "text": "t"}) + "\n")
    damage = UnreadableCounter(tmp_path / "damaged.jsonl", print=lambda _: None)
    damage.add_to_report(open_source(folder, "train").left_out)
    assert json.loads((tmp_path / "damaged.jsonl").read_text())["file"] == "missing.png"


def test_only_damaged_images_are_an_error(tmp_path):
    source = source_of(tmp_path, 4, bad=(0, 1, 2, 3))
    with pytest.raises(RunError, match="no readable image"):
        ImageDataset(source, PLAIN, 0).__getitems__([0])
    with pytest.raises(RunError, match=r"none of the images in .* can be read"):
        latents_of(tmp_path, source, Encoder())
    listed = []
    source = source_of(tmp_path / "again", 30, bad=(2, 9))
    for encode in (Encoder(), never):
        latents_of(tmp_path, source, encode, count=lambda *reported: listed.append(reported))
        count, names = listed.pop()
        assert count == 28
        assert [name for name, _ in names] == ["002.png", "009.png"]


# -- caches ---------------------------------------------------------------------------------------------------------


def shard_files(tmp_path, kind="latents", suffix="npy"):
    """Return the shards' files in the order in which they were written."""
    return sorted((tmp_path / "cache").glob(f"{kind}-*/*.{suffix}"), key=lambda path: path.stat().st_mtime_ns)


def stamps(tmp_path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.*")}


def expected_of(source) -> torch.Tensor:
    """Return the means and deviations of all images, (n, 2, c, h, w)."""
    return torch.stack(Encoder()(torch.stack([shown(source, k) for k in range(len(source))])), 1)


def test_a_complete_cache_needs_no_encoder(tmp_path):
    source, messages = source_of(tmp_path), []
    first, text = latents_of(tmp_path, source, Encoder(), messages=messages), text_of(tmp_path, source, TextEncoder())
    assert ": 30 rows to compute, 0.0 MiB, about " in messages[0]
    again, text_again = latents_of(tmp_path, source, never, messages=messages), text_of(tmp_path, source, never)
    assert len(messages) == 1
    rows = np.arange(30)
    assert torch.equal(first.gather(rows), again.gather(rows))
    assert torch.equal(text.gather(text.captions), text_again.gather(text.captions))


def test_each_caption_is_encoded_once(tmp_path):
    source, encode = source_of(tmp_path), TextEncoder()
    text = text_of(tmp_path, source, encode)
    captions = list(source.captions())
    assert encode.rows == len({"", *captions}) == 22 < len(captions)
    assert torch.equal(text.gather(np.zeros(1, np.int64)), TextEncoder()([""]))


@pytest.mark.parametrize(
    "where",
    [
        "values",
        "header",
        "records",
        "json",
        "list of the damaged",
        "cut",
        "missing values",
        "missing records",
        "missing json",
    ],
)
def test_only_a_damaged_shard_is_built_again(tmp_path, where):
    source, messages = source_of(tmp_path, bad=(9,)), []
    expected = latents_of(tmp_path, source, Encoder()).gather(np.arange(30))
    path = shard_files(tmp_path)[1]
    about = path.with_suffix(".json")
    raw = bytearray(path.read_bytes())
    match where:
        case "values" | "header":
            raw[-1 if where == "values" else 20] ^= 1
            path.write_bytes(raw)
        case "records":
            records = bytearray(path.with_suffix(".idx").read_bytes())
            records[100] ^= 1
            path.with_suffix(".idx").write_bytes(records)
        case "json":
            about.write_text(about.read_text()[:-9])
        case "list of the damaged":
            assert json.loads(about.read_text())["bad"][0][0] == 1
            about.write_text(about.read_text().replace("[[1,", "[[0,"))
        case "cut":
            path.write_bytes(raw[:-64])
        case "missing values":
            path.unlink()
        case "missing records":
            path.with_suffix(".idx").unlink()
        case "missing json":
            about.unlink()
    others = {p: at for p, at in stamps(tmp_path).items() if p.stem != path.stem}
    encode = Encoder()
    latents = latents_of(tmp_path, source, encode, messages=messages)
    assert encode.rows == 8
    assert ": 8 rows to compute, 0.0 MiB" in messages[-1]
    assert ("damaged shards: 1;" in messages[0]) == (where not in ("missing records", "missing json"))
    assert torch.equal(latents.gather(np.arange(30)), expected)
    assert latents.damaged.nonzero()[0].tolist() == [9]
    assert others.items() <= stamps(tmp_path).items()
    assert path.exists() == (where in ("missing records", "missing json"))  # another process may be writing them
    latents_of(tmp_path, source, never)


@pytest.mark.parametrize("made_by", ["another encoder", "another type of number", "an earlier version's other type"])
def test_another_cache_in_place_of_a_folder_is_not_used(tmp_path, made_by):
    """All its sums are right, so nothing but the name in the shards, or their shape and type, tells them apart."""
    source, messages = source_of(tmp_path), []
    expected = latents_of(tmp_path, source, Encoder()).gather(np.arange(30))
    mine = shard_files(tmp_path)[0].parent
    other = {"digest": "other"} if made_by == "another encoder" else {"dtype": "float16"}
    latents_of(tmp_path, source, lambda pixels: [2 * part for part in Encoder()(pixels)], **other)
    (theirs,) = {path.parent for path in shard_files(tmp_path)} - {mine}
    if made_by.startswith("an earlier version"):  # which didn't write the folder's name
        for about in theirs.glob("*.json"):
            about.write_text(json.dumps({k: v for k, v in json.loads(about.read_text()).items() if k != "for"}))
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    assert torch.equal(latents_of(tmp_path, source, Encoder(), messages=messages).gather(np.arange(30)), expected)
    assert ("damaged shards" if "earlier" in made_by else f"shards of another cache, {theirs.name!r}: 4") in messages[0]
    assert torch.equal(latents_of(tmp_path, source, never).gather(np.arange(30)), expected)


def test_a_text_cache_of_another_encoder_is_not_used(tmp_path):
    """Its keys are the captions, which are the same."""
    source = source_of(tmp_path)
    expected = text_of(tmp_path, source, TextEncoder()).gather(np.arange(22))
    mine = shard_files(tmp_path, "text")[0].parent
    text_of(tmp_path, source, lambda captions: TextEncoder()(captions) + 1, digest="other")
    (theirs,) = {path.parent for path in shard_files(tmp_path, "text")} - {mine}
    shutil.rmtree(mine)
    theirs.rename(mine)
    assert torch.equal(text_of(tmp_path, source, TextEncoder()).gather(np.arange(22)), expected)


def test_shards_of_earlier_versions_are_used(tmp_path):
    source = source_of(tmp_path)
    latents_of(tmp_path, source, Encoder())
    for about in shard_files(tmp_path, suffix="json"):
        about.write_text(json.dumps({k: v for k, v in json.loads(about.read_text()).items() if k != "for"}))
    latents_of(tmp_path, source, never)


@pytest.mark.parametrize("change", ["digest", "dtype", "flip"])
def test_another_encoder_or_transform_has_another_folder(tmp_path, change):
    source = source_of(tmp_path)
    latents_of(tmp_path, source, Encoder())
    mirrored = Framing(resolution=SIDE, flip=True)
    option = {"digest": {"digest": "two"}, "dtype": {"dtype": "float16"}, "flip": {"framing": mirrored}}[change]
    encode = Encoder(2.0)
    latents = latents_of(tmp_path, source, encode, **option)
    assert encode.rows == (60 if change == "flip" else 30)
    images = torch.stack([shown(source, i) for i in range(30)])
    exact = torch.stack(Encoder(2.0)(images), 1)
    expected = exact.half().float() if change == "dtype" else exact
    assert torch.equal(latents.gather(np.arange(30)), expected)
    latents_of(tmp_path, source, never)  # the first is still there


def test_a_changed_image_and_a_changed_caption_are_encoded_again(tmp_path):
    folder = folder_of(tmp_path)
    source = open_source(folder, "train")
    latents_of(tmp_path, source, Encoder())
    text_of(tmp_path, source, TextEncoder())
    Image.new("RGB", (SIDE, SIDE), (9, 9, 9)).save(folder / "train" / "012.png")
    about = folder / "train" / "metadata.jsonl"
    about.write_text(about.read_text().replace('"red 6"', '"a red six"'))
    source, encode, text_encode = open_source(folder, "train"), Encoder(), TextEncoder()
    latents, text = latents_of(tmp_path, source, encode), text_of(tmp_path, source, text_encode)
    assert encode.rows == 1
    assert text_encode.rows == 1
    assert latents.gather(np.array([12]))[0, 0].unique().tolist() == [pytest.approx(9 / 127.5 - 1, abs=1e-6)]
    rows = text.rows(np.arange(30), np.zeros(30))
    assert torch.equal(text.gather(rows), TextEncoder()([source[k].captions[0] for k in range(30)]))


def test_touched_and_copied_images_keep_their_latents(tmp_path):
    """Unread if name, size and time are known, otherwise by content. A changed image of the same size is encoded."""
    folder = folder_of(tmp_path, bad=(9,))
    latents_of(tmp_path, open_source(folder, "train"), Encoder())
    shutil.copy(folder / "train" / "005.png", folder / "train" / "000a.png")  # shifts all other images by a row
    with open(folder / "train" / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": "000a.png", "text": "t"}) + "\n")
    source, encode, messages = open_source(folder, "train"), Encoder(), []
    before = stamps(tmp_path)
    latents = latents_of(tmp_path, source, encode, messages=messages)
    assert encode.rows == 1
    assert ": 1 rows to compute, 0.0 MiB" in messages[0]
    assert before.items() <= stamps(tmp_path).items()
    assert len(stamps(tmp_path)) == len(before) + 3
    images = torch.stack([shown(source, i) for i in range(31) if i != 10])
    kept = np.array([i for i in range(31) if i != 10])
    assert torch.equal(latents.gather(kept)[:, 0], Encoder()(images)[0])
    assert latents.damaged.nonzero()[0].tolist() == [10]

    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy)  # with new times
    flat = folder / "train" / "003.png", tmp_path / "copy" / "train" / "003.png"
    for path, colour in zip(flat, ((9, 9, 9), (8, 8, 8)), strict=True):
        Image.new("RGB", (SIDE, SIDE), colour).save(path, compress_level=0)
    assert flat[0].stat().st_size == flat[1].stat().st_size
    latents_of(tmp_path, open_source(folder, "train"), Encoder())
    copy, encode = open_source(tmp_path / "copy", "train"), Encoder()
    latents = latents_of(tmp_path, copy, encode)
    assert encode.rows == 1  # the changed one
    assert copy[4].name == "003.png"
    assert torch.equal(latents.gather(np.array([4]))[0, 0], Encoder()(shown(copy, 4)[None])[0][0])
    assert latents.damaged.nonzero()[0].tolist() == [10]


def rewritten(path: Path, content: bytes) -> None:
    """Replace a file's content by one of equal size, and restore its modification time."""
    before = path.stat()
    assert len(content) == before.st_size
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("form", ["folder", "links", "tar"])
def test_a_file_rewritten_with_equal_size_and_restored_time_is_encoded_again(tmp_path, monkeypatch, form):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    twins(tmp_path)
    location, image = tmp_path / "one", tmp_path / "one" / "3.bmp"
    if form == "links":
        for path in sorted(location.glob("*.bmp")):
            (location / "files").mkdir(exist_ok=True)
            path.rename(location / "files" / f"{path.name}.bin")
            path.symlink_to(f"files/{path.name}.bin")
        image = location / "files" / "3.bmp.bin"
    if form == "tar":
        for name in ("one", "two"):
            with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
                for path in sorted((tmp_path / name).iterdir()):
                    tar.addfile(*member(path))
        location = image = tmp_path / "one.tar"
    source = open_source(location, "train")
    latents_of(tmp_path, source, Encoder())
    rewritten(image, (tmp_path / "two.tar" if form == "tar" else tmp_path / "two" / "3.bmp").read_bytes())
    source, encode = open_source(location, "train"), Encoder()
    latents = latents_of(tmp_path, source, encode)
    assert encode.rows == (len(source) if form == "tar" else 1)
    assert torch.equal(latents.gather(np.arange(len(source))), expected_of(source))
    latents_of(tmp_path, open_source(location, "train"), never)


def member(path: Path) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(path.name)
    info.size = path.stat().st_size
    return info, io.BytesIO(path.read_bytes())


def test_the_size_of_a_rewritten_image_is_read_again(tmp_path):
    folder = folder_of(tmp_path)
    quiet = Processes(print=lambda _: None)
    path = folder / "train" / "003.png"
    Image.new("RGB", (20, 10)).save(path)
    measure(open_source(folder, "train"), tmp_path / "sizes", 10**6, 0, quiet)
    before = path.stat()
    Image.new("RGB", (10, 20)).save(path)
    rewritten_size = path.stat().st_size
    os.truncate(path, before.st_size) if rewritten_size > before.st_size else path.write_bytes(
        path.read_bytes().ljust(before.st_size, b"\0")
    )
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    shapes, _ = measure(open_source(folder, "train"), tmp_path / "sizes", 10**6, 0, quiet)
    assert shapes[3].tolist() == [10, 20]


def test_the_time_of_change_is_no_part_of_the_fingerprint(tmp_path):
    folder = folder_of(tmp_path)
    before = open_source(folder, "train").fingerprint
    os.chmod(folder / "train" / "003.png", 0o600)
    os.utime(folder / "train" / "004.png", ns=(1, 1))
    assert open_source(folder, "train").fingerprint == before


def refused(source, names, reason="Permission denied"):
    """Let files of a source be unreadable, as for another user."""
    read = type(source.catalogue).read

    def denied(k):
        if source.catalogue.names[k] in names:
            raise DamagedImage(source.catalogue.names[k], reason)
        return read(source.catalogue, k)

    source.catalogue.read = denied
    return source


@pytest.mark.parametrize("cured", ["for another user", "by chmod", "by half"])
def test_an_image_that_could_not_be_read_is_tried_at_the_next_start(tmp_path, cured):
    """Its file need not have changed; and one that is damaged isn't decoded again."""
    folder, bad = folder_of(tmp_path, bad=(9,)), {"003.png", "004.png"}
    assert not latents_of(tmp_path, refused(open_source(folder, "train"), bad), Encoder()).damaged[5]
    still, before = refused(open_source(folder, "train"), bad), stamps(tmp_path)
    assert latents_of(tmp_path, still, never).damaged.nonzero()[0].tolist() == [3, 4, 9]
    noted = stamps(tmp_path)
    assert latents_of(tmp_path, still, never).damaged.nonzero()[0].tolist() == [3, 4, 9]
    assert stamps(tmp_path) == noted  # a failure that repeats writes nothing more
    assert before.items() <= noted.items()
    if cured == "by chmod":
        for name in bad:
            os.chmod(folder / "train" / name, 0o640)
    source, encode = open_source(folder, "train"), Encoder()
    if cured == "by half":
        source = refused(source, {"004.png"})
    latents = latents_of(tmp_path, source, encode)
    assert latents.damaged.nonzero()[0].tolist() == ([4, 9] if cured == "by half" else [9])
    assert encode.rows == (1 if cured == "by half" else 2)
    assert torch.equal(latents.gather(np.array([3]))[0, 0], Encoder()(shown(source, 3)[None])[0][0])
    again = latents_of(tmp_path, source, never)
    assert torch.equal(again.gather(np.arange(30)), latents.gather(np.arange(30)))


def test_an_image_of_an_unknown_format_is_tried_when_a_package_reads_it(tmp_path, monkeypatch):
    folder = folder_of(tmp_path, bad=(9,))
    Image.new("RGB", (16, 16), "red").save(folder / "train/003.png", format="GIF")
    with monkeypatch.context() as patch:
        patch.setattr(decode, "FORMATS", tuple(name for name in decode.FORMATS if name != "GIF"))
        assert latents_of(tmp_path, open_source(folder, "train"), Encoder()).damaged.nonzero()[0].tolist() == [3, 9]
        assert latents_of(tmp_path, open_source(folder, "train"), never).damaged.nonzero()[0].tolist() == [3, 9]
        noted = stamps(tmp_path)
        assert latents_of(tmp_path, open_source(folder, "train"), never).damaged[3]
        assert stamps(tmp_path) == noted
    encode = Encoder()
    assert latents_of(tmp_path, open_source(folder, "train"), encode).damaged.nonzero()[0].tolist() == [9]
    assert encode.rows == 1
    assert latents_of(tmp_path, open_source(folder, "train"), never).damaged.nonzero()[0].tolist() == [9]


def test_a_size_that_could_not_be_read_is_tried_at_the_next_start(tmp_path):
    folder, quiet = folder_of(tmp_path, bad=(9,)), Processes(print=lambda _: None)
    (folder / "train" / "009.png").write_bytes(b"no image")
    for names, bad in (({"003.png"}, ["003.png", "009.png"]), (set(), ["009.png"]), (set(), ["009.png"])):
        source = refused(open_source(folder, "train"), names)
        shapes, unreadable = measure(source, tmp_path / "sizes", 10**6, 0, quiet)
        assert [name for name, _ in unreadable] == bad
        assert (shapes[3].min() > 0) == (not names)


def test_a_copied_dataset_is_compared_once(tmp_path, monkeypatch):
    """A start writes an alias file, and the next start reads no image. Flips and crops need no further reading."""
    folder = folder_of(tmp_path, bad=(9,))
    how = {"framing": CHANCE, "crops": 2}
    latents_of(tmp_path, open_source(folder, "train"), Encoder(), **how)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy)
    copy, before, reads = open_source(tmp_path / "copy", "train"), stamps(tmp_path), []
    monkeypatch.setattr(copy.catalogue, "read", lambda k, read=copy.catalogue.read: reads.append(k) or read(k))
    latents = latents_of(tmp_path, copy, never, **how)
    assert sorted(reads) == list(range(30))
    added = stamps(tmp_path).keys() - before.keys()
    assert sorted(path.suffix for path in added) == [".idx", ".json"]
    assert before.items() <= stamps(tmp_path).items()
    assert latents.damaged.nonzero()[0].tolist() == [9]
    again = latents_of(tmp_path, copy, never, **how)
    assert len(reads) == 30
    rows = np.arange(30)
    for crop in range(2):
        assert torch.equal(again.gather(rows, crop, True), latents.gather(rows, crop, True))

    for path in shard_files(tmp_path):  # an alias of a deleted shard is not used
        path.with_suffix(".json").unlink()
    encode = Encoder()
    assert torch.equal(latents_of(tmp_path, copy, encode, **how).gather(rows), latents.gather(rows))
    assert encode.rows == 120
    latents_of(tmp_path, copy, never, **how)


def twins(tmp_path, count=6):
    """Return two datasets with equal names, sizes and times, but other pixels."""
    for name, first in (("one", 0), ("two", 100)):
        (tmp_path / name).mkdir(parents=True)
        for k in range(count):
            path = tmp_path / name / f"{k}.bmp"
            Image.new("RGB", (SIDE, SIDE), (first + k, 0, 0)).save(path)
            path.with_suffix(".txt").write_text("t")
    sources = [open_source(tmp_path / name, "train") for name in ("one", "two")]
    for source in sources:
        source.catalogue.changed_ns[:] = 10**18
    return sources


def test_datasets_with_equal_names_sizes_and_times_have_their_own_latents(tmp_path):
    one, two = twins(tmp_path)
    assert [row[:3] for row in one] == [row[:3] for row in two]
    for source, encode in ((one, Encoder()), (two, Encoder()), (one, never), (two, never)):
        latents = latents_of(tmp_path, source, encode)
        assert torch.equal(latents.gather(np.arange(len(source))), expected_of(source))


class Tars(Catalogue):
    """Images whose numbers restart every three images, all of one size and time."""

    location = "tars"

    def __init__(self, count: int = 9) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def row(self, k: int) -> Row:
        return Row(f"{k % 3:06d}.bmp", 822, 0, ("t",))

    def read(self, k: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (SIDE, SIDE + k), (10 * k, 0, 0)).save(file, "BMP")
        return file.getvalue()


@pytest.mark.parametrize("interrupted_at", range(9))
def test_images_with_equal_names_in_a_dataset_are_not_mixed_up(tmp_path, monkeypatch, interrupted_at):
    monkeypatch.setattr(shards_module, "_SHARD_ROWS", 2)
    source, encode = Source(Tars()), Encoder()

    def interrupted(pixels):
        if encode.rows >= interrupted_at:
            raise KeyboardInterrupt
        return encode(pixels)

    with pytest.raises(KeyboardInterrupt):
        latents_of(tmp_path, source, interrupted)
    kept, rest = len(shard_files(tmp_path)), Encoder()
    latents = latents_of(tmp_path, source, rest)
    assert rest.rows == 9 - 2 * kept
    assert torch.equal(latents.gather(np.arange(9)), expected_of(source))
    shard_files(tmp_path)[interrupted_at % 5].unlink()
    for encode in (rest, never):
        latents = latents_of(tmp_path, source, encode)
        assert torch.equal(latents.gather(np.arange(9)), expected_of(source))
    some = source.only_where(np.arange(9) < 3)  # now each name is unique
    assert torch.equal(latents_of(tmp_path, some, never).gather(np.arange(3)), expected_of(some))
    shapes, _ = measure(source, tmp_path / "sizes", 10**6, 0, Processes(print=lambda _: None))
    again, _ = measure(source, tmp_path / "sizes", 10**6, 0, Processes(print=never))
    assert shapes[:, 1].tolist() == again[:, 1].tolist() == list(range(SIDE, SIDE + 9))


def test_a_key_with_two_contents_is_not_trusted(tmp_path):
    """Two simultaneous runs may leave this state, if an image was replaced between them."""
    one, two = twins(tmp_path)
    two.catalogue.location = one.location
    for source, cache in ((one, tmp_path), (two, tmp_path / "other")):
        latents_of(cache, source, Encoder())
    shutil.copytree(tmp_path / "other" / "cache", tmp_path / "cache", dirs_exist_ok=True)
    for source in (one, two, one):
        assert torch.equal(latents_of(tmp_path, source, never).gather(np.arange(len(source))), expected_of(source))


def test_the_duration_is_estimated_after_the_first_shard(tmp_path):
    class Slow(Encoder):
        def __call__(self, pixels):
            time.sleep(0.3)
            return super().__call__(pixels)

    messages, source, encode = [], source_of(tmp_path), Slow()
    processes = Processes(print=lambda line: messages.append((line, encode.rows, shard_files(tmp_path))))
    latents_of(tmp_path, source, encode, processes=processes)
    [(line, made, written)] = messages
    assert ": 30 rows to compute, 0.0 MiB, about " in line
    assert 2 <= int(line.split()[-2]) <= 5  # 22 rows in batches of three, or less
    assert made == 8  # those of the first shard
    assert not written
    assert encode.rows == 30  # each once


def test_a_batch_is_as_large_as_memory_allows(tmp_path):
    sizes, source = [], source_of(tmp_path)

    def small(pixels):
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Encoder()(pixels)

    latents = latents_of(tmp_path, source, small)
    assert torch.equal(latents.gather(np.arange(30)), expected_of(source))
    assert sizes[:4] == [3, 1, 1, 1]
    assert max(sizes[1:]) == 1
    with pytest.raises(torch.OutOfMemoryError):
        latents_of(tmp_path, source, lambda pixels: small(pixels.repeat(3, 1, 1, 1)), digest="two")
    for side, most, images in ((16, 8, 8), (512, 8, 8), (1024, 4, 5), (4096, 1, 2)):
        framing, seen = Framing(resolution=side), []

        def encode(pixels, side=side, seen=seen):
            seen.append(len(pixels))
            return (torch.zeros(len(pixels), 2, side // 256 or 1, side // 256 or 1),) * 2

        some = source.only_where(np.arange(30) < images)
        LatentCache.open(
            tmp_path / "cache",
            some,
            encode,
            digest="three",
            framing=framing,
            channels=2,
            factor=min(side, 256),
            processes=Processes(print=lambda _: None),
        )
        assert max(seen) == most


def test_crops_of_an_image_are_cached_and_drawn_from(tmp_path):
    source = source_of(tmp_path, bad=(4,))
    latents = latents_of(tmp_path, source, Encoder(), framing=CHANCE, crops=3)
    dataset = CachedDataset(latents, text_of(tmp_path, source, TextEncoder()), 5)
    at = np.arange(300)
    batch = dataset.__getitems__(at)
    crops, flips = (uniform(5, Purpose.CROP, at) * 3).astype(int), uniform(5, Purpose.FLIP, at) < 0.5
    expected = []
    for index, crop, flip in zip(batch.index.tolist(), crops, flips, strict=True):
        image, place = load_image(source.read(index)), stored_place(source[index].name, int(crop))
        expected.append(to_tensor(image, SIDE, crop="random", place=place, flip=bool(flip)))
    assert torch.equal(batch.mean, Encoder()(torch.stack(expected))[0])
    assert len({stored_place(f"{k}.png", c) for k in range(10) for c in range(3)}) == 30


def test_two_sources_may_share_a_folder(tmp_path):
    one, two = source_of(tmp_path), source_of(tmp_path / "other", 13)
    first = latents_of(tmp_path, one, Encoder()).gather(np.arange(30))
    latents_of(tmp_path, two, Encoder())
    assert torch.equal(latents_of(tmp_path, one, never).gather(np.arange(30)), first)
    latents_of(tmp_path, two, never)


def _killed(tmp_path, source):
    """Kill this process in the middle of the third shard."""
    torch.set_num_threads(1)  # a forked process has none of its parent's threads

    class Deadly(Encoder):
        def __call__(self, pixels):
            if self.rows >= 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(pixels)

    latents_of(tmp_path, source, Deadly())


def test_a_killed_build_is_continued(tmp_path):
    source = source_of(tmp_path)
    child = multiprocessing.get_context("fork").Process(target=_killed, args=(tmp_path, source))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    encode, messages = Encoder(), []
    latents = latents_of(tmp_path, source, encode, messages=messages)
    assert encode.rows == 30 - 16
    assert ": 14 rows to compute" in messages[0]
    images = torch.stack([shown(source, i) for i in range(30)])
    assert torch.equal(latents.gather(np.arange(30))[:, 0], Encoder()(images)[0])


@pytest.mark.parametrize("fails_at", range(9))
def test_a_full_disk_leaves_no_partial_files(tmp_path, monkeypatch, fails_at):
    source, calls = source_of(tmp_path), []
    write = shards_module.atomic_file

    @contextlib.contextmanager
    def full(path):
        calls.append(path)
        with write(path) as file:
            if len(calls) > fails_at:
                file.write(b"some")
                raise OSError(errno.ENOSPC, "No space left on device")
            yield file

    monkeypatch.setattr(shards_module, "atomic_file", full)
    with pytest.raises(RunError, match="disk full"):
        latents_of(tmp_path, source, Encoder())
    monkeypatch.undo()
    assert not list((tmp_path / "cache").rglob(".tmp-*"))
    monkeypatch.setattr(shards_module, "_SHARD_ROWS", 8)
    assert {p.stem for p in (tmp_path / "cache").rglob("*.*")} == {p.stem for p in shard_files(tmp_path)}
    encode = Encoder()
    latents = latents_of(tmp_path, source, encode)
    assert encode.rows == 30 - 8 * (fails_at // 3)
    assert torch.equal(latents.gather(np.arange(30)), expected_of(source))


def test_a_cache_that_cannot_fit_is_refused_before_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(RunError, match=r"needs .* GiB more"):
        latents_of(tmp_path, source_of(tmp_path), never)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_processes_share_the_work_and_have_the_same_values(tmp_path, world):
    source = source_of(tmp_path, bad=(4, 20))
    single = latents_of(tmp_path, source, Encoder())
    shared = tmp_path / "shared"

    def once(source, count):
        results = together(world, lambda rank: shared, source)
        assert sum(rows for rows, _, _ in results) == count
        for _, values, damaged in results:
            np.testing.assert_array_equal(values, single.gather(np.arange(30)))
            np.testing.assert_array_equal(damaged, single.damaged)

    once(source, 30)
    once(source, 0)
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copy)
    once(open_source(tmp_path / "copy", "train"), 0)  # each process compares some of them
    assert len(shard_files(shared, suffix="idx")) - len(shard_files(shared)) == world
    for path in shard_files(shared)[1:3]:  # the values of one, the records of the other
        rows = len(np.load(path))
        damaged = path if path == shard_files(shared)[1] else path.with_suffix(".idx")
        raw = bytearray(damaged.read_bytes())
        raw[-1] ^= 1
        damaged.write_bytes(raw)
        once(source, rows)


def together(world, folder, source):
    """Return for each process: the rows that it encoded, all values and the damaged images, or an error."""
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(world), context.Queue()

    def work(rank):
        torch.set_num_threads(1)  # a forked process has none of its parent's threads
        encode = Encoder()
        processes = Processes(rank=rank, world=world, barrier=barrier.wait, print=lambda _: None)
        try:
            latents = latents_of(folder(rank), source, encode, processes=processes)
            queue.put((encode.rows, latents.gather(np.arange(len(source))).numpy(), latents.damaged))
        except (RunError, threading.BrokenBarrierError) as error:
            queue.put(error)
            time.sleep(2)  # for processes that are still leaving the last barrier
            barrier.abort()

    workers = [context.Process(target=work, args=(rank,)) for rank in range(world)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    return results


def test_processes_without_a_shared_folder_are_refused(tmp_path):
    """Whatever each process finds in its folder, none continues with wrong rows."""
    source = source_of(tmp_path)
    with pytest.raises(
        RunError, match=r"15 of 30 rows are missing after the build: all processes of a run must share this folder"
    ):
        latents_of(tmp_path, source, Encoder(), processes=Processes(rank=1, world=2, print=lambda _: None))
    results = together(2, lambda rank: tmp_path / f"own-{rank}", source)
    assert all(isinstance(result, RunError) for result in results)
    assert all("must share this folder" in str(result) for result in results)


def test_processes_that_see_different_folders_are_refused(tmp_path, monkeypatch):
    """One process doesn't see a shard yet that another sees, so their shares of the work don't match."""
    source = source_of(tmp_path)
    latents_of(tmp_path, source, Encoder())
    for path in shard_files(tmp_path)[2:]:
        path.with_suffix(".json").unlink()
    listing = shards_module.listing
    late = shard_files(tmp_path)[0].stem

    def mine(rank):
        if rank == 1:  # in its own process, after the fork
            for module in (shards_module, row_index):
                monkeypatch.setattr(module, "listing", lambda folder: [n for n in listing(folder) if n != late])
        return tmp_path

    results = together(2, mine, source)
    assert any(isinstance(result, RunError) and "run the same command again" in str(result) for result in results)
    assert torch.equal(latents_of(tmp_path, source, Encoder()).gather(np.arange(30)), expected_of(source))


def test_workers_decode_the_same_latents(tmp_path):
    source = source_of(tmp_path, bad=(4,))
    one, two = (latents_of(tmp_path / str(k), source, Encoder(), workers=k) for k in (0, 2))
    assert torch.equal(one.gather(np.arange(30)), two.gather(np.arange(30)))
    assert (one.damaged == two.damaged).all()


def test_an_encoder_output_of_another_shape_or_not_finite_is_refused(tmp_path):
    source = source_of(tmp_path)
    with pytest.raises(RunError, match=r"returned the shape \(2, 1, 4, 4\), but \(2, 2, 4, 4\) was expected"):
        latents_of(tmp_path, source, lambda x: tuple(y[:, :1] for y in Encoder()(x)))
    for value, dtype in ((float("nan"), "float32"), (1e30, "float16")):
        with pytest.raises(RunError, match=f"finite in {dtype}, in the batch that starts with 000.png"):
            latents_of(
                tmp_path, source, lambda x, value=value: (torch.full((len(x), *LATENT), value),) * 2, dtype=dtype
            )
    with pytest.raises(RunError, match=r"returned the shape .*, but"):
        text_of(tmp_path, source, lambda captions: torch.zeros(len(captions), 2, 2))


def test_a_pickled_cache_reads_the_same(tmp_path):
    dataset = cached(tmp_path, source_of(tmp_path))
    before = dataset.__getitems__(range(20))
    copy = pickle.dumps(dataset)
    assert len(copy) < 20_000  # paths, not rows
    assert same(pickle.loads(copy).__getitems__(range(20)), before)


def test_gathered_rows_are_a_copy(tmp_path):
    latents = latents_of(tmp_path, source_of(tmp_path), Encoder())
    rows = latents.gather(np.arange(5))
    kept = rows.clone()
    rows.zero_()
    assert torch.equal(latents.gather(np.arange(5)), kept)
    latents_of(tmp_path, open_source(tmp_path / "data", "train"), never)


def test_many_shards_keep_no_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_SHARD_ROWS", 1)
    latents = latents_of(tmp_path, source_of(tmp_path), Encoder())
    before = len(os.listdir("/proc/self/fd"))
    latents.gather(np.arange(30))
    assert len(shard_files(tmp_path)) == 30
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shard_is_a_plain_numpy_file(tmp_path):
    latents = latents_of(tmp_path, source_of(tmp_path), Encoder())
    rows = np.concatenate([np.load(path, allow_pickle=False) for path in shard_files(tmp_path)])  # in order of encoding
    np.testing.assert_array_equal(rows, latents.gather(np.arange(30)))
    order = np.array([29, 0, 8, 7, 0, 16])
    np.testing.assert_array_equal(rows[order], latents.gather(order))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_truncated_in_use_is_an_error(tmp_path, workers):
    dataset = cached(tmp_path, source_of(tmp_path))
    for path in shard_files(tmp_path):
        os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(RunError, match=r"^\S*npy was truncated while in use: run the same command again$"):
        list(loader(dataset, start_step=0, steps=5, batch_size=8, workers=workers))
    for path in shard_files(tmp_path):
        path.unlink()
    with pytest.raises(RunError, match=r"^\S*npy was removed while in use: run the same command again$"):
        list(loader(dataset, start_step=0, steps=5, batch_size=8, workers=workers))
