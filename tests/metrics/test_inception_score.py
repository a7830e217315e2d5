"""The score in closed form and against torchmetrics' own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchmetrics.image.inception import InceptionScore as TorchmetricsScore

from mm_lightning.metrics import InceptionScore
from mm_lightning.metrics.inception_score import inception_score, split_scores
from tests.metrics.drawn import Colors


def videos(num_videos: int = 4, num_frames: int = 5) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.rand(num_videos, num_frames, 3, 1, 1, generator=rng).expand(-1, -1, 3, 8, 8) * 2 - 1


def class_of(pictures: torch.Tensor) -> torch.Tensor:
    """Sure of one of four classes, by brightness."""
    return nn.functional.one_hot(((pictures.mean((1, 2, 3)) + 1) * 2).long().clamp(0, 3), 4).float()


def brightness(*levels: float) -> torch.Tensor:
    return torch.tensor(levels)[None, :, None, None, None].expand(1, -1, 3, 8, 8)


def test_sure_and_varied_is_the_number_of_classes_and_one_of_them_is_one():
    metric = InceptionScore(class_of, from_logits=False, splits=1)
    metric.update(brightness(-0.75, -0.25, 0.25, 0.75))
    assert float(metric.compute()) == pytest.approx(4)
    metric.reset()
    metric.update(brightness(0.25, 0.25, 0.3))
    assert float(metric.compute()) == pytest.approx(1)
    metric.update(brightness(0.75, 0.75, 0.8))
    assert float(metric.compute()) == pytest.approx(2)


def test_unsure_is_one():
    assert float(inception_score(torch.full((7, 10), 0.1))) == pytest.approx(1)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save", "ignore:std")
def test_agrees_with_torchmetrics():
    class Flat(Colors):
        num_features = 5

    ours, theirs = InceptionScore(Flat(), splits=1, batch_size=3), TorchmetricsScore(Flat(), splits=1)
    ours.update(videos())
    theirs.update(videos().flatten(0, 1))
    expected = float(theirs.compute()[0])
    assert expected > 1.1
    assert float(ours.compute()) == pytest.approx(expected, abs=1e-5)


def test_splits_are_equal_parts_in_order():
    probabilities = torch.rand(23, 6).softmax(1)
    parts = [probabilities[i * 23 // 4 : (i + 1) * 23 // 4] for i in range(4)]
    torch.testing.assert_close(split_scores(probabilities, 4), torch.stack([inception_score(part) for part in parts]))
    assert len(split_scores(probabilities, 100)) == 23


def test_a_module_is_run_in_evaluation_mode():
    classifier = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(192, 4))
    scores = []
    for _ in range(2):
        metric = InceptionScore(classifier.train(), splits=1)
        metric.update(videos())
        scores.append(float(metric.compute()))
    assert scores[0] == scores[1]


def test_logits_and_probabilities_are_not_confused():
    with pytest.raises(ValueError, match="gives probabilities: set from_logits=False"):
        InceptionScore(class_of).update(videos())
    with pytest.raises(ValueError, match=r"gives no probabilities .*: set from_logits=True"):
        InceptionScore(Colors(), from_logits=False).update(videos())


def test_a_classifier_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"The classifier gave \(20, 3, 8, 8\) for 20 pictures"):
        InceptionScore(nn.Identity()).update(videos())
    for settings in ({"splits": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="=0: give a number from 1"):
            InceptionScore(Colors(), **settings)
