"""Guidance against the papers' formulas, diffusers' rescaling, and distributions with known scores."""

import math
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ldm.denoiser import Denoised, Denoiser
from ldm.errors import UserError
from ldm.guidance import Autoguided, ClassifierFree, ClassifierGuided, Conditioned, DynamicThreshold, Interval
from ldm.parameterization import target_of, to_eps, to_x0
from ldm.process import score
from ldm.samplers import make_sampler
from ldm.schedule import RectifiedFlow, Schedule
from ldm.spacing import make_plan
from ldm.steps import sample
from support.draws import draw

TARGETS = ("eps", "x0", "v", "flow")
VP, FLOW = Schedule.build("scaled_linear"), RectifiedFlow(shift=3.0)
LEVELS = {f"{name} {i}": path.level(i) for name, path in (("vp", VP), ("flow", FLOW)) for i in (0, 250, 900, 999)}
LEVELS["zero snr 999"] = Schedule.build("scaled_linear", zero_terminal_snr=True).level(999)
CASES = {
    f"{kind} {name}": (kind, level)
    for kind in TARGETS
    for name, level in LEVELS.items()
    if kind != "eps" or level.alpha > 0  # eps of pure noise contains no information about the image
}
in_every_target = pytest.mark.parametrize("kind", TARGETS)
at_every_level = pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
in_every_target_at_every_level = pytest.mark.parametrize(("kind", "level"), CASES.values(), ids=CASES)


def network(x_t, index, condition):
    return torch.sin(3 * x_t + condition.view(-1, 1, 1, 1)) + index.view(-1, 1, 1, 1) / 1000


def outputs(x_t, level, *conditions):
    """Return the network's output for each condition, evaluated one by one."""
    index = torch.full((len(x_t),), level.model_time)
    return [network(x_t, index, condition) for condition in conditions]


def translated(output, kind, space, x_t, level):
    """Convert an output from one target to another."""
    x0, eps = (f(kind, output, x_t, level.alpha, level.sigma) for f in (to_x0, to_eps))
    return target_of(space, x0, eps, level.alpha, level.sigma)


class Recorder:
    """The network, which records the conditions of every evaluation."""

    def __init__(self):
        self.asked = []

    def __call__(self, x_t, index, condition):
        assert len(x_t) == len(index) == len(condition)
        self.asked.append(condition.tolist())
        return network(x_t, index, condition)


def never(*_):
    raise AssertionError("an evaluation that has no weight was made")


# -- classifier-free ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 3.5, 12.0])
@in_every_target_at_every_level
def test_guidance_is_the_same_for_any_target(kind, level, scale):
    x_t, negative, positive = draw(4, 3, 2, 2), draw(4, seed=6), draw(4, seed=5)
    guided = ClassifierFree(Denoiser(network, kind), negative, [(positive, scale)])(x_t, level).x0
    predicted = outputs(x_t, level, negative, positive)
    for space in TARGETS:
        if space == "eps" and level.alpha == 0:
            continue
        y_neg, y_pos = (translated(output, kind, space, x_t, level) for output in predicted)
        expected = to_x0(space, y_neg + scale * (y_pos - y_neg), x_t, level.alpha, level.sigma)
        torch.testing.assert_close(guided, expected, rtol=0, atol=1e-11 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("scales", "needed"),
    [
        ([1.0], [1]),
        ([0.0], [0]),
        ([4.0], [0, 1]),
        ([-1.0], [0, 1]),
        ([], [0]),
        ([2.0, 3.0], [0, 1, 2]),
        ([2.0, -2.0], [0, 1, 2]),
        ([0.25, 0.75], [1, 2]),  # the negative has no weight
        ([2.0, 0.0], [0, 1]),
        ([0.0, 1.0], [2]),
    ],
)
def test_the_network_receives_the_negative_then_the_prompts_that_have_weight(scales, needed):
    x_t, level, recorder = draw(2, 3, 2, 2), LEVELS["vp 250"], Recorder()
    conditions = [torch.tensor([10.0 * k, 10.0 * k + 1]).double() for k in range(3)]
    prompts = list(zip(conditions[1:], scales, strict=False))
    guided = ClassifierFree(Denoiser(recorder, "x0"), conditions[0], prompts)(x_t, level).x0
    assert recorder.asked == [torch.cat([conditions[k] for k in needed]).tolist()]
    base, *others = outputs(x_t, level, *conditions)
    expected = base + sum(s * (other - base) for s, other in zip(scales, others, strict=False))
    torch.testing.assert_close(guided, expected, rtol=0, atol=1e-13)


@in_every_target_at_every_level
def test_scale_1_is_the_condition_and_scale_0_the_negative(kind, level):
    x_t, negative, positive = draw(4, 3, 2, 2), draw(4, seed=6), draw(4, seed=5)
    denoiser = Denoiser(network, kind)
    for scale, condition in ((1.0, positive), (0.0, negative)):
        guided = ClassifierFree(denoiser, negative, [(positive, scale)])
        assert torch.equal(guided(x_t, level).x0, Conditioned(denoiser, condition)(x_t, level).x0)


# -- rescaling ------------------------------------------------------------------------------------------------


def rescaled(kind, level, scale, phi):
    """Return the guided output in the network's own target, (b, …), and the outputs that it is computed from."""
    x_t, negative, positive = draw(4, 3, 8, 8), draw(4, seed=6), draw(4, seed=5)
    x_t *= torch.tensor([0.2, 1, 3, 0.01]).double().view(-1, 1, 1, 1)  # images of different contrast
    x0 = ClassifierFree(Denoiser(network, kind), negative, [(positive, scale)], phi)(x_t, level).x0
    return translated(x0, "x0", kind, x_t, level), *outputs(x_t, level, negative, positive)


@in_every_target_at_every_level
def test_rescaling_equals_diffusers_on_the_networks_output(kind, level):
    for scale, phi in ((7.5, 0.7), (3.0, 1.0), (-2.0, 0.3), (7.5, 0.0)):
        output, y_neg, y_pos = rescaled(kind, level, scale, phi)
        expected = rescale_noise_cfg(y_neg + scale * (y_pos - y_neg), y_pos, phi)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)


@in_every_target
def test_full_rescaling_gives_every_image_the_contrast_of_its_conditional_prediction(kind):
    output, _, y_pos = rescaled(kind, LEVELS["vp 250"], 7.5, 1.0)
    torch.testing.assert_close(output.std((1, 2, 3)), y_pos.std((1, 2, 3)), rtol=1e-10, atol=0)


def test_no_rescaling_is_no_change():
    x_t, negative, positive = draw(4, 3, 2, 2), draw(4, seed=6), draw(4, seed=5)
    for level in LEVELS.values():
        for scale, phi in ((5.0, 0.0), (1.0, 0.7)):  # at scale 1 the prediction is already the conditional one
            prompts = [(positive, scale)]
            denoiser = Denoiser(network, "v")
            guided, plain = (ClassifierFree(denoiser, negative, prompts, by)(x_t, level) for by in (phi, 0.0))
            assert torch.equal(guided.x0, plain.x0)


@in_every_target
def test_one_prompt_in_two_parts_is_one_prompt(kind):
    # With rescaling too: the conditional prediction of several prompts is their mean, weighted by scale.
    x_t, negative, positive = draw(4, 3, 4, 4), draw(4, seed=6), draw(4, seed=5)
    denoiser, level = Denoiser(network, kind), LEVELS["vp 250"]
    for parts in ((1.5, 2.5), (0.25, 0.75)):
        prompts = [(positive, part) for part in parts], [(positive, sum(parts))]
        two, one = (ClassifierFree(denoiser, negative, p, 0.7)(x_t, level).x0 for p in prompts)
        torch.testing.assert_close(two, one, rtol=0, atol=1e-12)


def test_a_prompt_may_be_the_negatives_own_tensor():
    x_t, empty, level = draw(4, 3, 4, 4), draw(4, seed=6), LEVELS["vp 250"]
    for kind in TARGETS:
        denoiser = Denoiser(network, kind)
        guided = ClassifierFree(denoiser, empty, [(empty, 3.0)], 0.7)(x_t, level)
        torch.testing.assert_close(guided.x0, Conditioned(denoiser, empty)(x_t, level).x0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scales", [(2.0, -2.0), (2.0, -1.9)], ids=str)
def test_rescaling_a_prompt_and_a_negated_one_adds_no_contrast(scales):
    # The mean weighted by scale isn't a prediction if the scales sum to (nearly) 0: it is undefined or arbitrarily
    # large. Either such scales are refused, or the result has about the contrast of the predictions.
    x_t, negative, *prompts = draw(4, 3, 8, 8), *(draw(4, seed=k) for k in (5, 6, 7))
    level = LEVELS["vp 250"]
    own = torch.stack([output.std((1, 2, 3)) for output in outputs(x_t, level, *prompts)])
    for kind in TARGETS:
        try:
            guided = ClassifierFree(Denoiser(network, kind), negative, list(zip(prompts, scales, strict=True)), 1.0)
        except UserError:
            continue
        contrast = translated(guided(x_t, level).x0, "x0", kind, x_t, level).std((1, 2, 3))
        assert (contrast > 0.7 * own.amin(0)).all(), kind
        assert (contrast < 1.4 * own.amax(0)).all(), kind


def test_rescaling_outside_0_to_1_is_refused():
    for phi in (-0.1, 1.1, math.nan, math.inf):
        with pytest.raises(UserError, match=f"guidance rescale {phi}"):
            ClassifierFree(Denoiser(network, "v"), draw(1), [(draw(1), 2.0)], phi)


# -- interval -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("limit", [1.0, 2.5])
def test_dynamic_thresholding_equals_diffusers(share, limit):
    # diffusers knows only limit 1: thresholding commutes with a change of units.
    scheduler = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=share, sample_max_value=1e9)
    x0 = draw(3, 4, 6, 6) * torch.tensor([0.2, 1.0, 9.0]).double().view(3, 1, 1, 1)
    expected = limit * scheduler._threshold_sample(x0 / limit)
    guided = DynamicThreshold(lambda x, level: Denoised(x0), share, limit)(x0, VP.level(500))
    torch.testing.assert_close(guided.x0, expected, rtol=1e-12, atol=0)
    assert torch.equal(guided.x0[0], x0[0])  # it is within the limit already


def test_an_interval_guides_only_inside_and_saves_evaluations_outside():
    recorder, x_t = Recorder(), draw(2, 3, 2, 2)
    denoiser, negative, positive = Denoiser(recorder, "v"), torch.zeros(2).double(), torch.ones(2).double()
    guided, plain = ClassifierFree(denoiser, negative, [(positive, 3.0)]), Conditioned(denoiser, positive)
    levels = [VP.level(i) for i in (999, 700, 500, 300, 0)]
    interval = Interval(guided, plain, levels[3].noise, levels[1].noise)  # without the lower end, with the upper end
    made = [interval(x_t, level) for level in levels]
    assert [len(asked) for asked in recorder.asked] == [2, 4, 4, 2, 2]
    for got, level, by in zip(made, levels, (plain, guided, guided, plain, plain), strict=True):
        assert torch.equal(got.x0, by(x_t, level).x0)


def test_an_interval_may_reach_from_the_data_to_pure_noise():
    x_t = draw(2, 3, 2, 2)
    everywhere = Interval(lambda x, level: x, never, 0.0, math.inf)
    up_to_noise = Interval(never, lambda x, level: x, 0.0, 1e9)
    assert all(torch.equal(everywhere(x_t, level), x_t) for level in LEVELS.values())
    assert torch.equal(up_to_noise(x_t, LEVELS["flow 999"]), x_t)


def test_an_interval_with_swapped_ends_is_refused():
    for low, high in ((2.0, 1.0), (1.0, 1.0), (-1.0, 1.0), (-2.0, -1.0), (math.nan, 1.0), (0.0, math.nan)):
        with pytest.raises(UserError, match=f"guidance interval {low} to {high}"):
            Interval(never, never, low, high)


# -- Gaussian data: composition and autoguidance --------------------------------------------------------------


def gaussian(x_t, level, mean, std):
    """E[x0 | x_t] of data ~ N(mean, std^2), element by element."""
    gain = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)
    return mean + gain * (x_t - level.alpha * mean)


def informed(level):
    """Return the exact denoiser of the Gaussian that its condition gives, (b, 2, …) = mean and std."""
    return Denoiser(lambda x_t, index, condition: gaussian(x_t, level, *condition.unbind(1)), "x0")


def as_condition(mean, std):
    return torch.stack([mean, std]).expand(4, 2, 3, 2, 2)


MEAN, STD = draw(3, 2, 2, seed=1), 0.3 + draw(3, 2, 2, seed=2).abs()
composed_by_scales = pytest.mark.parametrize("scales", [(1.0, 1.0), (3.0, 0.5), (2.0, -1.5), (0.25, 0.75)], ids=str)


@composed_by_scales
@at_every_level
def test_composed_prompts_that_tilt_a_gaussian(level, scales):
    # p(x | c_k) ∝ p(x) exp(tilt_k x) is p, moved by variance × tilt_k; tilts add up in the product, at any noise level.
    tilts, x_t = [draw(3, 2, 2, seed=k) for k in (3, 4)], draw(4, 3, 2, 2)
    prompts = [(as_condition(MEAN + STD**2 * tilt, STD), s) for tilt, s in zip(tilts, scales, strict=True)]
    composed = ClassifierFree(informed(level), as_condition(MEAN, STD), prompts)
    moved = MEAN + STD**2 * sum(s * tilt for s, tilt in zip(scales, tilts, strict=True))
    torch.testing.assert_close(composed(x_t, level).x0, gaussian(x_t, level, moved, STD), rtol=0, atol=1e-12)


@composed_by_scales
@at_every_level
def test_composed_prompts_have_the_score_of_the_product(level, scales):
    # Of p(x_t) prod_k (p(x_t | c_k) / p(x_t))^s_k (Liu et al. 2022, eq. 11), differentiated; any Gaussians.
    models = [(MEAN, STD), *((draw(3, 2, 2, seed=k), 0.2 + draw(3, 2, 2, seed=k + 9).abs()) for k in (3, 4))]
    negative, *conditions = (as_condition(*model) for model in models)
    x_t = draw(4, 3, 2, 2).requires_grad_()
    base, *logs = (
        torch.distributions.Normal(level.alpha * mean, (level.alpha**2 * std**2 + level.sigma**2).sqrt()).log_prob(x_t)
        for mean, std in models
    )
    product = base + sum(s * (log - base) for s, log in zip(scales, logs, strict=True))
    (expected,) = torch.autograd.grad(product.sum(), x_t)
    x0 = ClassifierFree(informed(level), negative, list(zip(conditions, scales, strict=True)))(x_t.detach(), level).x0
    made = score(x_t.detach(), x0, level)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


MAIN, WEAK = (0.7, 0.4), (0.5, 0.6)


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0, 2.0, 5.0])
def test_autoguidance_extrapolates_away_from_the_weaker_model(scale):
    main, weak = (lambda x, level, m=model: Denoised(gaussian(x, level, *m)) for model in (MAIN, WEAK))
    x_t = draw(4, 3, 2, 2)
    for level in LEVELS.values():
        by_main, by_weak = (denoise(x_t, level).x0 for denoise in (main, weak))
        expected = by_weak + scale * (by_main - by_weak)  # Karras et al. 2024, eq. 3
        torch.testing.assert_close(Autoguided(main, weak, scale)(x_t, level).x0, expected, rtol=0, atol=1e-13)
    assert torch.equal(Autoguided(main, never, 1.0)(x_t, level).x0, main(x_t, level).x0)


@pytest.mark.parametrize("path", [VP, FLOW], ids=["vp", "flow"])
def test_autoguided_gaussians_stay_affine(path):
    # The ODE's samples are slope × noise + offset, found numerically. Guidance away from a broader model narrows them.
    main, weak = (lambda x, level, m=model: Denoised(gaussian(x, level, *m)) for model in (MAIN, WEAK))
    pairs, noise, spreads = (
        make_plan(path, make_sampler("ddim").grid, 20, "trailing", set_alpha_to_one=True).pairs,
        draw(4, 1, 2, 2),
        [],
    )
    for scale in (1.0, 2.0, 3.0):
        slope, offset = 1.0, 0.0
        for t, s in pairs:
            gains = [t.alpha * std**2 / (t.alpha**2 * std**2 + t.sigma**2) for _, std in (MAIN, WEAK)]
            gain = scale * gains[0] + (1 - scale) * gains[1]
            still = sum(
                w * mean * (1 - g * t.alpha)
                for w, g, (mean, _) in zip((scale, 1 - scale), gains, (MAIN, WEAK), strict=True)
            )
            kept = s.sigma / t.sigma  # alpha_s x̂0 + sigma_s eps, with eps = (x - alpha_t x̂0) / sigma_t
            factor = s.alpha - kept * t.alpha
            slope, offset = (kept + factor * gain) * slope, (kept + factor * gain) * offset + factor * still
        x = sample(Autoguided(main, weak, scale), noise, pairs, make_sampler("ddim").step(path), never)
        torch.testing.assert_close(x, slope * noise + offset, rtol=0, atol=1e-12)
        spreads.append(slope)
    assert spreads[0] > spreads[1] > spreads[2] > 0


# -- classifier guidance of a mixture -------------------------------------------------------------------------

WEIGHTS = torch.tensor([0.3, 0.15, 0.35, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-1.2, -1.0], [-1.0, 1.2], [1.2, 0.9], [1.1, -1.2]], dtype=torch.float64)
STDS = torch.tensor([0.1, 0.25, 0.2, 0.15], dtype=torch.float64)
LABELS = torch.tensor([[1, 0, 0, 0.5], [0, 1, 1, 0], [0, 0, 0, 0.5]], dtype=torch.float64)
"""p(y | component): label 0 has all of the first component and half of the last, 1 has two, 2 a part of one."""


def log_joint(x_t, level, weights=WEIGHTS):
    """Return the log of weight × density of x_t (b, 2, 1, 1) in each component, (b, 4), up to a constant."""
    variance = level.alpha**2 * STDS**2 + level.sigma**2
    squares = (x_t.flatten(1)[:, None] - level.alpha * MEANS).square().sum(2)
    return weights.log() - squares / (2 * variance) - variance.log()  # in 2 dimensions


def mixture(x_t, level, weights=WEIGHTS):
    """Return E[x0 | x_t] exactly for components of these weights, (4,) or (b, 4)."""
    shares = log_joint(x_t, level, weights).softmax(1)
    each = gaussian(x_t.flatten(1)[:, None], level, MEANS, STDS[:, None])  # (b, 4, 2)
    return Denoised(torch.einsum("bk,bkd->bd", shares, each).view_as(x_t))


def log_probability(label, x_t, level):
    """Return log p(y | x_t) by Bayes' rule at this noise level."""
    joint = log_joint(x_t, level)
    return (joint + LABELS[label].log()).logsumexp(1) - joint.logsumexp(1)


def noisy(level, n=200):
    """Draw x_t from the mixture, and as many from a wide Gaussian, which also covers places without data."""
    x0 = MEANS[torch.arange(n) % 4] + STDS[torch.arange(n) % 4, None] * draw(n, 2, seed=3)
    return torch.cat([level.alpha * x0 + level.sigma * draw(n, 2, seed=4), 2 * draw(n, 2, seed=5)]).view(-1, 2, 1, 1)


@torch.no_grad()
@pytest.mark.parametrize("label", range(3))
def test_an_exact_classifier_gives_the_exact_conditional_denoiser(label):
    guided = ClassifierGuided(mixture, partial(log_probability, label))
    levels = [path.level(i) for path in (VP, FLOW) for i in (0, 20, 100, 300, 600, 900, 998, 998.9)]
    for level in [*levels, VP.level(999)]:
        x_t = noisy(level)
        x0 = guided(x_t, level).x0
        torch.testing.assert_close(x0, mixture(x_t, level, WEIGHTS * LABELS[label]).x0, rtol=0, atol=1e-9)
        assert not x0.requires_grad
        assert not x_t.requires_grad


@torch.no_grad()
def test_a_classifiers_weight_is_the_scale_of_classifier_free_guidance():
    # With exact models, grad log p(y | x_t) is the difference of the two scores (Ho & Salimans 2022, section 3.2).
    def informed_by_weights(x_t, index, condition):
        return mixture(x_t, VP.level(int(index[0])), condition).x0

    for label, weight, i in [(0, 0.5, 999), (1, 3.0, 600), (2, -1.0, 300), (1, 0.0, 100)]:
        level = VP.level(i)
        x_t = noisy(level)
        everything, some = (w.expand(len(x_t), 4) for w in (WEIGHTS, WEIGHTS * LABELS[label]))
        free = ClassifierFree(Denoiser(informed_by_weights, "x0"), everything, [(some, weight)])
        guided = ClassifierGuided(mixture, partial(log_probability, label), weight)
        torch.testing.assert_close(guided(x_t, level).x0, free(x_t, level).x0, rtol=0, atol=1e-9)


def test_a_classifier_without_effect_is_not_evaluated():
    for weight, level in ((0.0, LEVELS["vp 250"]), (1.0, LEVELS["flow 999"])):
        x_t = noisy(level)
        assert torch.equal(ClassifierGuided(mixture, never, weight)(x_t, level).x0, mixture(x_t, level).x0)


def std_of_gaussian(pairs, std, eta):
    """Return the std that these steps give for N(mean, std^2), by DDIM's eq. 12 and 16 (eta 1 is DDPM)."""
    variance = 1.0
    for t, s in pairs:
        gain = t.alpha * std**2 / (t.alpha**2 * std**2 + t.sigma**2)
        added = eta**2 * s.sigma**2 * (1 - (s.noise / t.noise) ** 2)
        kept = math.sqrt(s.sigma**2 - added) / t.sigma
        variance = (kept + (s.alpha - kept * t.alpha) * gain) ** 2 * variance + added
    return math.sqrt(variance)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 1.0)])
@pytest.mark.parametrize("path", [VP, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("label", [0, 1])
def test_an_exact_classifier_samples_the_conditional_distribution(label, path, kind, eta):
    n, generator = 4000, torch.Generator().manual_seed(7)
    noise = lambda: torch.randn((n, 2, 1, 1), generator=generator, dtype=torch.float64)  # noqa: E731
    route = make_plan(path, make_sampler(kind).grid, 100, "trailing", set_alpha_to_one=True)
    step = make_sampler(kind, eta if kind == "ddim" else 0.0).step(path)
    guided = ClassifierGuided(mixture, partial(log_probability, label))
    x = sample(guided, route.start(noise()), route.pairs, step, noise).flatten(1)

    # The tolerance is 3 standard errors and a bias, from finite steps and from a start without the data's part in x_T
    # (alpha 0.07). Finite steps make a component too narrow, also if it is the only one.
    expected = WEIGHTS * LABELS[label] / (WEIGHTS * LABELS[label]).sum()
    which = torch.cdist(x, MEANS).argmin(1)
    for k, share in enumerate(expected.tolist()):
        own = x[which == k]
        assert len(own) / n == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / n) + 0.02)
        if share > 0:
            std = std_of_gaussian(route.pairs, STDS[k].item(), eta)
            error = std / math.sqrt(len(own))
            assert (own.mean(0) - MEANS[k]).abs().max() < 3 * error + 0.02
            assert (own.std(0) - std).abs().max() < 3 * error / math.sqrt(2) + 0.02 * std


# -- wrappers in wrappers -------------------------------------------------------------------------------------


def test_guidance_wrappers_can_be_nested():
    x_t, negative, positive = draw(2, 3, 2, 2), draw(2, seed=6), draw(2, seed=5)
    main, weak = Recorder(), Recorder()
    free = ClassifierFree(Denoiser(main, "v"), negative, [(positive, 3.0)])
    plain, weaker = Conditioned(Denoiser(main, "v"), positive), Conditioned(Denoiser(weak, "x0"), positive)
    low, high = VP.level(300), VP.level(700)
    guided = Autoguided(Interval(free, plain, 0.0, VP.level(500).noise), weaker, 2.0)
    guided = ClassifierGuided(guided, lambda x, level: -x.square().flatten(1).sum(1), 0.5)
    for level, inner, rows in ((low, free, 4), (high, plain, 2)):
        main.asked.clear()
        weak.asked.clear()
        x0 = guided(x_t, level).x0
        assert ([len(asked) for asked in main.asked], [len(asked) for asked in weak.asked]) == ([rows], [2])
        expected = 2 * inner(x_t, level).x0 - weaker(x_t, level).x0 + 0.5 * level.sigma**2 / level.alpha * (-2 * x_t)
        torch.testing.assert_close(x0, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("path", [VP, FLOW], ids=["vp", "flow"])
def test_guidance_never_synchronises_with_the_device(path, kind):
    # A meta tensor has no values: reading one would raise.
    x, condition = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, device="meta")
    denoiser = Denoiser(network, "v", torch.bfloat16)
    plain = Conditioned(denoiser, condition)
    guided = ClassifierFree(denoiser, condition, [(condition.clone(), 3.0), (condition.clone(), 2.0)], 0.7)
    guided = Autoguided(Interval(guided, plain, 0.1, 5.0), plain, 2.0)
    guided = ClassifierGuided(guided, lambda x, level: -x.square().flatten(1).sum(1))
    route = make_plan(path, make_sampler(kind).grid, 10, "trailing")
    with torch.no_grad():
        end = sample(guided, route.start(x), route.pairs, make_sampler(kind).step(path), never)
    assert (end.device.type, end.dtype, end.shape) == ("meta", torch.float32, x.shape)
