"""Figures of many videos -> means with confidence intervals.

Letters: V videos, I identities, N resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean; NaN where nothing is known."""

    mean: float
    low: float  # of the interval, NaN with fewer than two identities
    high: float
    num_videos: int  # in which the figure is known
    num_unknown: int  # left out of the mean


def bootstrap(
    values: Sequence[float], identities: Sequence[str], num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Estimate:
    """The mean over videos, and the percentile interval of 95 % over resampled identities.

    Videos of one person are alike, so people are drawn, with all their videos, and not videos (cluster bootstrap).

    Args:
        values: (V,), NaN where unknown.
        identities: (V,) whose video each is.
    """
    known = ~np.isnan(np.asarray(values, np.float64))
    kept = np.asarray(values, np.float64)[known]
    if not len(kept):
        return Estimate(np.nan, np.nan, np.nan, 0, len(known))
    sums, counts = by_identity(kept, [who for who, is_known in zip(identities, known, strict=True) if is_known])
    low = high = np.nan
    if len(sums) > 1:
        generator = np.random.default_rng(seed)
        drawn = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=num_resamples)  # (N, I)
        means = (drawn @ sums) / (drawn @ counts)
        low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(kept.mean()), float(low), float(high), int(known.sum()), int((~known).sum()))


def by_identity(values: NDArray[np.float64], identities: Sequence[str]) -> tuple[NDArray, NDArray]:
    """Sum and number of each person's values, (I,) each."""
    _, rows = np.unique(np.asarray(identities), return_inverse=True)
    return np.bincount(rows, weights=values), np.bincount(rows).astype(np.float64)
