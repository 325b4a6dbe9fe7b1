"""All measures of generated images in one feature space, each beside its value for real images."""

import math
from typing import Literal, NamedTuple

from torch import Tensor

from train.evaluation.captions import clip_scores
from train.evaluation.diversity import pairwise_distance, vendi
from train.evaluation.features import Features
from train.evaluation.frechet import frechet_distances
from train.evaluation.kernels import cmmd, kid
from train.evaluation.neighbours import manifold
from train.evaluation.results import Measure

Better = Literal["lower", "higher", "baseline"]


class _About(NamedTuple):
    title: str
    better: Better
    note: str


_ABOUT = {
    "frechet": _About("Fréchet distance", "lower", "Depends on the number of images."),
    "frechet_extrapolated": _About(
        "Fréchet distance, extrapolated",
        "lower",
        "Extrapolated to infinitely many images; the error is the jackknife's standard error.",
    ),
    "kid": _About(
        "KID", "lower", "Unbiased; the error is the standard deviation over random subsets of at most 1,000 images."
    ),
    "cmmd": _About("CMMD", "lower", "Depends on the number of images if they are few."),
    "precision": _About("Precision", "baseline", "Share of generated images that look like real ones; k = 3."),
    "recall": _About("Recall", "baseline", "Share of real images that the model could have generated; k = 3."),
    "density": _About("Density", "baseline", "Precision without the influence of outliers; k = 5."),
    "coverage": _About("Coverage", "baseline", "Share of real images with a generated one nearby; k = 5."),
    "vendi": _About("Vendi score", "baseline", "Effective number of different images; depends on their number."),
    "clip_score": _About("CLIP score", "baseline", "100 × the cosine of image and caption."),
    "seeds_distance": _About(
        "Distance between images of one prompt",
        "baseline",
        "Mean cosine distance of images with different seeds; the baseline is that of real images of any captions.",
    ),
}

Values = dict[str, tuple[float, float | None]]


def distribution_values(real: Tensor, made: Tensor, *, is_clip: bool) -> Values:
    """Return the measures of features `made` (m, d) against `real` (n, d), each with its error if it has one.

    is_clip: whether the features are a CLIP's, for CMMD.
    """
    plain, extrapolated, error = frechet_distances(real, made)
    values: Values = {"frechet": (plain, None), "frechet_extrapolated": (extrapolated, error), "kid": kid(real, made)}
    if is_clip:
        values["cmmd"] = (cmmd(real, made), None)
    values |= {name: (value, None) for name, value in manifold(real, made)._asdict().items()}
    return values | {"vendi": (vendi(made), None)}


def caption_values(images: Tensor, captions: Tensor) -> Values:
    """Return the CLIP score of image and caption features, (n, d) each, and its standard error."""
    scores = clip_scores(images, captions).double()
    return {"clip_score": (float(scores.mean()), float(scores.std()) / math.sqrt(len(scores)))}


def seed_values(features: Tensor) -> Values:
    """Return the mean distance between images of one prompt; features: (prompts, seeds, d)."""
    return {"seeds_distance": pairwise_distance(features)}


def measures(values: Values, baselines: Values, features: Features, *, samples: int, reference: int) -> list[Measure]:
    """Return values as parts of a report. baselines: the same measures of real images."""
    return [
        Measure(
            name=name,
            title=_ABOUT[name].title,
            value=value,
            error=error,
            baseline=baselines[name][0] if name in baselines else None,
            better=_ABOUT[name].better,
            features=described(features),
            samples=samples,
            reference=reference,
            note=_ABOUT[name].note,
        )
        for name, (value, error) in values.items()
    ]


def described(features: Features) -> str:
    """Return the name of a network with its resizing and the form of its images."""
    resizing = f"{features.resizing}, " if features.resizing else ""
    return f"{features.name} ({resizing}from 8-bit images)"
