"""Measures of two sets of features, against their definitions in float64, closed forms, and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from support.draws import draw
from train.evaluation.diversity import pairwise_distance, vendi
from train.evaluation.frechet import frechet_distances
from train.evaluation.kernels import cmmd, kid
from train.evaluation.measures import distribution_values
from train.evaluation.neighbours import NearestSearch, manifold

N, M, D = 700, 600, 24  # several blocks of distances


def sets() -> tuple[Tensor, Tensor]:
    """Two sets of features that overlap in part and are far from the origin."""
    real, made = draw(N, D, seed=1), 1.3 * draw(M, D, seed=2) + 0.2
    made[:300] = real[:300] + 0.1 * draw(300, D, seed=3)
    return (real + 5).float(), (made + 5).float()


def test_the_extrapolated_frechet_distance_is_the_gaussians_own() -> None:
    """Its average over draws is the closed form, within its error; the plain distance is several times as large."""
    a, b = torch.linspace(0.5, 2, 12).double(), torch.linspace(0.6, 1.5, 12).double()
    expected = float((a - b).square().sum()) + 12 * 0.1**2
    found = [
        frechet_distances(draw(150, 12, seed=2 * s) * a, draw(150, 12, seed=2 * s + 1) * b + 0.1) for s in range(12)
    ]
    plain, extrapolated, error = np.array(found).T
    assert plain.mean() > 1.3 * expected
    spread = extrapolated.std(ddof=1)
    assert abs(extrapolated.mean() - expected) < 3 * spread / math.sqrt(len(found))
    assert 0.6 * spread < error.mean() < 2 * spread


def test_kid_equals_torchmetrics() -> None:
    real, made = sets()
    network = nn.Flatten()
    network.num_features = D
    reference = KernelInceptionDistance(network, subsets=5, subset_size=200)
    reference.real_features, reference.fake_features = [real.double()], [made.double()]
    with torch.random.fork_rng():
        torch.manual_seed(7)
        mean, std = reference.compute()
    assert kid(real, made, subsets=5, size=200, seed=7) == pytest.approx((float(mean), float(std)), rel=1e-4)


def test_kid_of_equal_distributions_is_zero_on_average() -> None:
    values = [kid(draw(80, 6, seed=2 * s), draw(80, 6, seed=2 * s + 1), subsets=10)[0] for s in range(30)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(len(values))
    assert np.mean([value < 0 for value in values]) > 0.2  # unbiased: not all positive
    assert all(math.isnan(value) for value in kid(draw(3, 6), draw(80, 6)))


def test_cmmd_equals_its_definition() -> None:
    real, made = sets()

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-cdist(a, b, "sqeuclidean") / 200).mean())

    x, y = (f.double().numpy() / np.linalg.norm(f.double().numpy(), axis=1, keepdims=True) for f in (real, made))
    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert cmmd(real, made) == pytest.approx(expected, rel=1e-3)
    assert cmmd(real, real) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("k", "k_coverage"), [(3, 5), (5, 2)])
def test_precision_recall_density_and_coverage_equal_their_definitions(k: int, k_coverage: int) -> None:
    real, made = sets()
    x, y = real.double().numpy(), made.double().numpy()
    cross = cdist(x, y)  # (n, m)
    within_x, within_y = (np.sort(cdist(f, f), axis=1) for f in (x, y))  # column 0: distance to itself
    r_x, r_y, r_coverage = within_x[:, k], within_y[:, k], within_x[:, k_coverage]
    found = manifold(real, made, k=k, k_coverage=k_coverage)
    assert found.precision == pytest.approx((cross <= r_x[:, None]).any(0).mean())
    assert found.recall == pytest.approx((cross <= r_y).any(1).mean())
    assert found.density == pytest.approx((cross <= r_coverage[:, None]).sum() / (k_coverage * M))
    assert found.coverage == pytest.approx((cross.min(1) <= r_coverage).mean())
    assert 0.2 < found.precision < 0.9  # neither extreme


def test_a_set_agrees_with_itself_and_not_with_a_distant_one() -> None:
    real, _ = sets()
    assert manifold(real, real)[:2] == (1, 1)
    assert manifold(real, real + 100) == (0, 0, 0, 0)
    assert manifold(real[:2], real[:2]).precision == 1  # fewer images than k


def test_the_vendi_score_counts_different_images() -> None:
    assert vendi(torch.eye(7, 20)) == pytest.approx(7)
    assert vendi(torch.eye(20)[torch.arange(60) % 5]) == pytest.approx(5)  # copies don't count
    assert vendi(torch.ones(9, 4)) == pytest.approx(1)
    for n in (10, 200):  # fewer and more images than features
        x = draw(n, 30)
        unit = x / x.norm(dim=1, keepdim=True)
        eigenvalues = np.linalg.eigvalsh((unit @ unit.T / n).numpy()).clip(1e-300)
        assert vendi(x) == pytest.approx(np.exp(-(eigenvalues * np.log(eigenvalues)).sum()), rel=1e-9)


def test_the_distance_between_images_of_a_prompt_is_the_mean_over_pairs() -> None:
    x = draw(6, 4, 9)
    means = [cdist(p, p, "cosine")[np.triu_indices(4, 1)].mean() for p in x.numpy()]
    assert pairwise_distance(x) == pytest.approx((np.mean(means), np.std(means, ddof=1) / 6**0.5))
    assert pairwise_distance(x[:, :1].expand(-1, 4, -1))[0] == pytest.approx(0, abs=1e-12)


def test_features_that_are_not_finite_give_no_numbers() -> None:
    real, made = sets()
    made[3, 2] = torch.nan
    values = distribution_values(real, made, is_clip=True)
    assert all(math.isnan(values[name][0]) for name in ("frechet", "frechet_extrapolated", "kid", "cmmd", "vendi"))


def test_the_nearest_image_is_found_over_blocks() -> None:
    queries, images = sets()
    search = NearestSearch(queries)
    order = torch.randperm(M, generator=torch.Generator().manual_seed(0))
    for part in order.split(130):
        search.add(images[part], part)
    distances = cdist(queries.double().numpy(), images.double().numpy())
    np.testing.assert_array_equal(search.index.numpy(), distances.argmin(1))
    torch.testing.assert_close(search.distance.double(), torch.from_numpy(distances.min(1)), rtol=1e-4, atol=1e-4)
