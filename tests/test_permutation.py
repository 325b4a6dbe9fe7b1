"""Random numbers as data: every number and every example is a function of (seed, position)."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator, Philox
from scipy.stats import chisquare, kstest

from ldm.errors import UserError
from train.data.order.permutation import index_at, permute, positions, substitute
from train.data.order.rng import Purpose, fork, generator, normal, uniform, uniforms


def test_purposes_keep_their_numbers():
    """They are part of every run: other numbers would change a run after an upgrade."""
    assert {p.name: p.value for p in Purpose} == {
        "ORDER": 1,
        "TIMESTEP": 2,
        "NOISE": 3,
        "CAPTION": 4,
        "DROPOUT": 5,
        "CROP": 6,
        "FLIP": 7,
        "POSTERIOR": 8,
        "VALIDATION": 9,
        "SUBSTITUTE": 10,
        "OFFSET": 11,
        "TRANSFORM": 12,
        "STREAM": 13,
        "BUCKET": 14,
        "MASK": 15,
        "MASKED": 16,
        "LEVEL": 17,
        "GUIDANCE": 18,
        "TAGS": 19,
        "RENOISE": 20,
    }


def test_generator_is_numpys_philox_keyed_as_stated():
    reference = Generator(Philox(key=[7, Purpose.NOISE], counter=[0, 0, 12345, 0]))
    np.testing.assert_array_equal(generator(7, Purpose.NOISE, 12345).random(9), reference.random(9))


@given(
    seed=st.integers(0, 2**64 - 1),
    places=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=8),
    purpose=st.sampled_from(Purpose),
)
@settings(max_examples=50, deadline=None)
def test_a_batch_is_its_positions_one_by_one(seed, places, purpose):
    each = [generator(seed, purpose, p) for p in places]
    np.testing.assert_array_equal(uniform(seed, purpose, places), [g.random() for g in each])
    each = [generator(seed, purpose, p) for p in places]
    np.testing.assert_array_equal(uniforms(seed, purpose, places, 3), [g.random(3) for g in each])
    each = [generator(seed, purpose, p) for p in places]
    expected = [g.standard_normal((3, 5), dtype=np.float32) for g in each]
    np.testing.assert_array_equal(normal(seed, purpose, places, (3, 5)), expected)


def test_numbers_over_positions_are_uniform_normal_and_independent():
    at = np.arange(20_000)
    u, z = uniform(3, Purpose.TIMESTEP, at), normal(3, Purpose.NOISE, at, (2,)).astype(np.float64)
    assert kstest(u, "uniform").pvalue > 1e-3
    assert kstest(z.ravel(), "norm").pvalue > 1e-3
    series = [u[:-1], u[1:], z[:-1, 0], z[1:, 0], z[:-1, 1], uniform(4, Purpose.TIMESTEP, at)[:-1]]
    series += [uniform(3, purpose, at)[:-1] for purpose in (Purpose.CAPTION, Purpose.DROPOUT, Purpose.FLIP)]
    off_diagonal = np.corrcoef(series) - np.eye(len(series))
    assert np.abs(off_diagonal).max() < 4.5 / np.sqrt(len(at))


def test_fork_gives_another_seed_each_time():
    seeds = [fork(s, p) for s in range(50) for p in Purpose]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds)


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 20_000])
def test_every_example_once_an_epoch(n):
    for epoch in (0, 1):
        np.testing.assert_array_equal(np.sort(permute(np.arange(n), n, 5, epoch)), np.arange(n))


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_every_example_once_an_epoch_whatever_the_key(n, seed, epoch):
    assert len(set(permute(np.arange(n), n, seed, epoch).tolist())) == n


@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_a_billion_examples_are_permuted_without_collisions(seed, epoch):
    places = np.random.default_rng(epoch).choice(10**9, 5000)
    assert len(np.unique(permute(places, 10**9, seed, epoch))) == len(np.unique(places))


def test_one_position_maps_as_it_does_in_a_batch():
    expected = permute(np.arange(5000), 5000, 1, 2)
    assert [int(permute(p, 5000, 1, 2)) for p in (0, 17, 4999)] == expected[[0, 17, 4999]].tolist()


def test_order_is_fair():
    """Over epochs, an example's position is uniform, and so is the step from one example to the next."""
    n, epochs = 1280, 1500  # above the size below which the order is drawn directly
    orders = np.array([permute(np.arange(n), n, 11, e) for e in range(epochs)])
    for place in (0, 1, n // 2, n - 1):
        assert chisquare(np.bincount(orders[:, place] // 20, minlength=n // 20)).pvalue > 1e-3
    for example in (0, 7, n - 1):
        where = np.nonzero(orders == example)[1]
        assert chisquare(np.bincount(where // 20, minlength=n // 20)).pvalue > 1e-3
    steps = np.bincount(((orders[:, 1:] - orders[:, :-1]) % n).ravel(), minlength=n)[1:]
    assert chisquare(steps).pvalue > 1e-3
    kept = (orders == np.arange(n)).sum(1)  # fixed points are Poisson(1)
    assert abs(kept.mean() - 1) < 4 / np.sqrt(epochs)
    again = (orders[1:] == orders[:-1]).sum(1)  # and so are equal positions in two epochs
    assert abs(again.mean() - 1) < 4 / np.sqrt(epochs)


def test_seeds_are_as_different_as_epochs():
    n = 1280
    orders = np.array([permute(np.arange(n), n, seed, 0) for seed in range(600)])
    assert chisquare(np.bincount(orders[:, 3] // 20, minlength=n // 20)).pvalue > 1e-3
    assert abs((orders[1:] == orders[:-1]).sum(1).mean() - 1) < 4 / np.sqrt(600)


def test_all_orders_of_few_examples_are_equally_likely():
    seen = Counter(tuple(permute(np.arange(4), 4, 0, epoch).tolist()) for epoch in range(6000))
    assert len(seen) == 24
    assert chisquare(list(seen.values())).pvalue > 1e-3


def test_order_of_a_hundred_million_takes_no_memory():
    tracemalloc.start()
    found = permute(np.arange(64) + 99_000_000, 100_000_000, 0, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(found.tolist())) == 64
    assert peak < 100_000


def test_positions_run_on_over_epochs():
    n = 10
    expected = np.concatenate([permute(np.arange(n), n, 4, e) for e in range(5)])
    np.testing.assert_array_equal(index_at(np.arange(50), n, 4), expected)
    np.testing.assert_array_equal(index_at([[7, 32], [13, 9]], n, 4), expected[[[7, 32], [13, 9]]])


@given(step=st.integers(0, 10**9), world=st.integers(1, 8), accumulation=st.integers(1, 8), part=st.integers(1, 6))
def test_parts_of_all_ranks_make_the_batch(step, world, accumulation, part):
    batch_size = world * accumulation * part
    parts = [p for rank in range(world) for p in positions(step, batch_size, rank, world, accumulation)]
    assert all(len(p) == part and (np.diff(p) == 1).all() for p in parts)
    expected = np.arange(step * batch_size, (step + 1) * batch_size)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), expected)


def test_a_batch_that_does_not_divide_is_refused_by_name():
    with pytest.raises(UserError, match=r"batch_size 30 .* 4 process.* accumulation 2.* multiple of 8"):
        positions(0, 30, 0, 4, 2)


def test_positions_out_of_range_are_refused():
    for place in (-1, 10):
        with pytest.raises(ValueError, match=f"place {place} of 10"):
            permute([3, place], 10, 0, 0)


def test_substitutes_are_fixed_and_fair():
    n = 16
    drawn = np.array([[substitute(p, attempt, n, 9) for attempt in (1, 2, 3)] for p in range(4000)])
    assert drawn[123].tolist() == [substitute(123, attempt, n, 9) for attempt in (1, 2, 3)]
    for attempt in range(3):
        assert chisquare(np.bincount(drawn[:, attempt], minlength=n)).pvalue > 1e-3
    joint = np.bincount(drawn[:, 0] * n + drawn[:, 1], minlength=n * n)
    assert chisquare(joint).pvalue > 1e-3
