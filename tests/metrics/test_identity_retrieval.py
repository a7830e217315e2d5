"""Top-k among all people."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mm_lightning.metrics import IdentityRetrieval
from mm_lightning.metrics.identity_retrieval import identification_ranks
from tests.metrics.drawn import hidden, reference, still

PEOPLE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0], [9.0, 0.0]])


def show(metric, person: int, at: float, *gone: int) -> None:
    """A video of two frames around `at` on the line of people, and the person's references around its place."""
    frames = torch.tensor([[at - 0.1, 0.0], [at + 0.1, 0.0]])
    pictures = PEOPLE[person] + torch.tensor([[0.0, 0.3], [0.0, -0.3]])
    metric.update(hidden(still(2, frames), *gone), reference(pictures), torch.tensor([person]))


def test_rank_is_the_place_among_all_people():
    metric = IdentityRetrieval(top_k=2)
    for person in range(4):
        show(metric, person, at=1.2)
    assert metric.ranks().tolist() == [2, 1, 3, 4]
    assert metric.per_video().tolist() == [1, 1, 0, 0]
    assert float(metric.compute()) == 0.5
    assert metric.num_people() == 4


def test_people_who_come_later_count_for_earlier_videos():
    metric = IdentityRetrieval()
    show(metric, 0, at=0.9)
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert math.isnan(IdentityRetrieval().compute())
    assert math.isnan(metric.compute())  # nobody to confuse with
    show(metric, 2, at=5.0)
    assert float(metric.compute()) == 1
    show(metric, 1, at=1.0)
    assert metric.ranks().tolist() == [2, 1, 1]


def test_several_videos_of_one_person_are_one_person():
    metric = IdentityRetrieval()
    for at in (4.9, 5.1, 9.0):
        show(metric, 2, at)
    show(metric, 3, at=9.0)
    assert metric.num_people() == 2
    assert metric.per_video().tolist() == [1, 1, 0, 1]


def test_a_video_without_a_face_is_a_miss_and_one_without_a_reference_is_unknown():
    metric = IdentityRetrieval(top_k=100)
    show(metric, 0, at=0.0)
    show(metric, 1, 1.0, 0, 1)
    unreferenced = reference(PEOPLE[2:3], mask=[False])
    metric.update(still(2, PEOPLE[[2, 2]]), unreferenced, torch.tensor([2]))
    assert metric.per_video()[:2].tolist() == [1, 0]
    assert metric.num_unknown() == 1
    assert float(metric.compute()) == 0.5
    assert metric.num_people() == 2


def test_ranks_agree_with_numpy_and_ties_count_against():
    rng = np.random.default_rng(0)
    gallery, videos, own = rng.standard_normal((40, 16)), rng.standard_normal((200, 16)), rng.integers(0, 40, 200)
    got = identification_ranks(torch.from_numpy(videos), torch.from_numpy(gallery), torch.from_numpy(own))
    order = np.linalg.norm(videos[:, None] - gallery[None], axis=2).argsort(1)
    assert got.tolist() == [int(np.flatnonzero(row == person)[0]) + 1 for row, person in zip(order, own, strict=True)]
    tie = identification_ranks(torch.ones(1, 2), torch.zeros(3, 2), torch.tensor([0]))
    assert tie.tolist() == [3]


def test_chance_is_k_of_n():
    rng = torch.Generator().manual_seed(0)
    gallery, videos = torch.randn(64, 16, generator=rng), torch.randn(4000, 16, generator=rng)
    ranks = identification_ranks(videos, gallery, torch.arange(4000) % 64)
    assert float((ranks <= 5).float().mean()) == pytest.approx(5 / 64, abs=0.017)  # four standard deviations


def test_bad_identities_and_widths_are_named():
    metric = IdentityRetrieval()
    faces, references = still(2, PEOPLE[:2]), reference(PEOPLE[:1])
    for identities, message in (
        (torch.tensor([0, 1]), r"must be \(1,\) whole numbers, got torch.int64 \(2,\)"),
        (torch.tensor([0.0]), "got torch.float32"),
        (torch.tensor([-1]), "must lie in 0 to"),
        (torch.tensor([2**24]), "must lie in 0 to"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(faces, references, identities)
    metric.update(faces, references, torch.tensor([0]))
    with pytest.raises(ValueError, match="width 4 after some of width 2"):
        metric.update(still(2), reference(torch.ones(1, 4)), torch.tensor([0]))
    with pytest.raises(ValueError, match="top_k=0: give a number from 1"):
        IdentityRetrieval(top_k=0)
