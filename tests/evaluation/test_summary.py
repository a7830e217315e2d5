"""Means and intervals, against closed forms and scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from mm_lightning.evaluation.summary import bootstrap


def test_one_video_a_person_is_the_percentile_bootstrap_of_scipy():
    values = np.random.default_rng(0).normal(2, 1, 40)
    ours = bootstrap(values, [str(i) for i in range(40)], num_resamples=20_000)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert ours.mean == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


def test_people_are_drawn_and_not_videos():
    """A hundred videos of each of two people say no more of a third than one of each does."""
    many = bootstrap([0.0] * 100 + [1.0] * 100, ["a"] * 100 + ["b"] * 100)
    few = bootstrap([0.0, 1.0], ["a", "b"])
    assert (many.low, many.high) == (few.low, few.high) == (0.0, 1.0)


def test_unequal_people_are_weighted_by_their_videos():
    estimate = bootstrap([0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"])
    assert estimate.mean == 0.25
    assert (estimate.low, estimate.high) == (0.0, 1.0)


def test_unknown_videos_are_counted_and_left_out():
    estimate = bootstrap([1.0, math.nan, 3.0], ["a", "b", "c"])
    assert (estimate.mean, estimate.num_videos, estimate.num_unknown) == (2.0, 2, 1)
    nothing = bootstrap([math.nan], ["a"])
    assert (nothing.num_videos, nothing.num_unknown, math.isnan(nothing.mean)) == (0, 1, True)


def test_one_person_has_no_interval():
    estimate = bootstrap([1.0, 2.0], ["a", "a"])
    assert (estimate.mean, math.isnan(estimate.low), math.isnan(estimate.high)) == (1.5, True, True)
