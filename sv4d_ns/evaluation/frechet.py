"""Fréchet distance of feature sets, and confidence intervals by bootstrap."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


def frechet_distance(first: Float[np.ndarray, "n d"], second: Float[np.ndarray, "m d"]) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians fitted to two sets of features.

    |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Dowson and Landau 1982; Heusel et al. 2017), covariances with the
    divisor n - 1; one feature alone has the covariance zero. The trace of the root is the sum of the singular values of
    R1 R2^T, where Ri is the triangular factor of the centred features: no matrix root is taken, the value is real and
    does not depend on the version of scipy, and equal sets give 0 to rounding.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"features of shapes {first.shape} and {second.shape} cannot be compared")
    if not len(first) or not len(second):
        raise ValueError("a Fréchet distance needs at least one feature on either side")
    roots: list[np.ndarray] = []
    variance = 0.0
    for features in (first, second):
        centred = (features - features.mean(0)) / np.sqrt(max(len(features) - 1, 1))
        roots.append(np.linalg.qr(centred.astype(np.float64))[1])
        variance += float((roots[-1] ** 2).sum())
    between = float(np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum())
    shift = float(((first.mean(0) - second.mean(0)).astype(np.float64) ** 2).sum())
    return max(shift + variance - 2.0 * between, 0.0)


@dataclass(frozen=True)
class Estimate:
    """A figure with what it rests on."""

    value: float
    low: float
    high: float
    """The ends of the 95 % percentile interval of the bootstrap; both are `value` where there is one unit only."""
    units: int
    """How many independent things were resampled (views of objects, or videos)."""
    note: str = ""
    """What is wrong with the figure, said out loud; empty if nothing is known."""


RESAMPLES = 1000
"""Bootstrap resamples of a mean."""
FRECHET_RESAMPLES = 100
"""Of a Fréchet distance, each of which costs two factorisations."""


def bootstrap(
    statistic: Callable[[Int[np.ndarray, " n"]], float], units: int, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """`statistic` of all units (called with their indices) and the 95 % interval over resamples with replacement."""
    value = statistic(np.arange(units))
    if units < 2:
        return Estimate(value, value, value, units, "one unit only: no interval")
    rng = np.random.default_rng(seed)
    drawn = [statistic(rng.integers(0, units, units)) for _ in range(resamples)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high), units)


def mean_with_interval(values: Float[np.ndarray, " n"], seed: int = 0) -> Estimate:
    """The mean of independent units (for pictures: the mean of each view over time, since frames are alike)."""
    return bootstrap(lambda index: float(values[index].mean()), len(values), seed=seed)


def frechet_with_interval(made: Float[np.ndarray, "n d"], truth: Float[np.ndarray, "n d"], seed: int = 0) -> Estimate:
    """Fréchet distance of paired videos, resampled in pairs, with a note when there are too few of them.

    The distance is biased upward for few videos, and more so in a resample (which repeats videos): its interval can lie
    above the value. Figures are comparable only at the same number of videos.
    """
    estimate = bootstrap(lambda index: frechet_distance(made[index], truth[index]), len(made), FRECHET_RESAMPLES, seed)
    count, dimensions = made.shape
    note = ""
    if count == 1:
        note = "one video a side: this is the squared distance of two features, not of distributions"
    elif count <= dimensions:
        note = (
            f"tiny sample: {count} videos for {dimensions} features, so the covariances are singular and the value is "
            "biased upward; compare only figures with the same number of videos"
        )
    return Estimate(estimate.value, estimate.low, estimate.high, count, note)
