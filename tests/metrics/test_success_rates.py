"""Shares of videos that pass."""

from __future__ import annotations

import math

import pytest
import torch

from mm_lightning.metrics import SuccessRates

NAN = math.nan


def test_shares_and_their_mean():
    metric = SuccessRates(min_face_rate=0.5, min_similarity=0.9, min_motion=0.3, min_text=0.2)
    metric.update(
        face_rate=torch.tensor([1.0, 0.5, 0.4, 0.0]),
        similarity=torch.tensor([0.95, 0.85, 0.91, NAN]),
        motion=torch.tensor([0.1, 0.2, 0.3, NAN]),
        text=torch.tensor([0.25, 0.25, 0.25, 0.25]),
    )
    shares = {"face": 0.5, "identity": 0.5, "motion": 0.25, "text": 1.0, "mean": 0.5625}
    assert {name: float(share) for name, share in metric.compute().items()} == pytest.approx(shares)
    assert metric.per_video()["identity"].tolist() == [1, 0, 1, 0]


def test_what_was_not_measured_is_nan_and_not_in_the_mean():
    metric = SuccessRates()
    metric.update(face_rate=torch.tensor([1.0, 0.0]), similarity=torch.tensor([1.0, 1.0]))
    shares = metric.compute()
    assert math.isnan(shares["text"])
    assert math.isnan(shares["motion"])
    assert float(shares["mean"]) == 0.75
    metric.update(face_rate=torch.ones(2), similarity=torch.zeros(2), text=torch.ones(2))
    assert float(metric.compute()["text"]) == 1
    assert metric.per_video()["text"].isnan().tolist() == [True, True, False, False]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"figures of the same videos, each \(B,\), at least one; got {}"):
        SuccessRates().update()
    with pytest.raises(ValueError, match=r"got {'face': \(2,\), 'text': \(3,\)}"):
        SuccessRates().update(face_rate=torch.ones(2), text=torch.ones(3))
    with pytest.raises(ValueError, match="Thresholds must be finite numbers"):
        SuccessRates(min_text=NAN)
