"""Faces in small pictures: the landmarks of the large ones, in one process or two."""

from __future__ import annotations

import numpy as np
import pytest

from mm_lightning.miniature.detection import WORTH_A_PROCESS, detect
from tests.miniature.real_people import STILLS, find_people, view


@pytest.fixture(scope="module")
def stills():
    """(28, 64, 64, 3), and the landmarks (28, 5, 2) that were found in the large pictures."""
    views = [view(picture, face, *place) for picture, face in find_people() for place in STILLS]
    return np.stack([v.pixels for v in views]), np.array([v.face["landmarks"] for v in views])


def test_landmarks_are_those_of_the_large_picture(stills):
    frames, landmarks = stills
    found = detect(frames)
    assert found.found.mean() > 0.9
    error = np.linalg.norm(found.landmarks - landmarks, axis=-1)[found.found]
    assert np.median(error) < 1
    assert np.percentile(error, 95) < 3
    assert ((found.landmarks > 0) & (found.landmarks < 64))[found.found].all()
    centres = found.boxes.reshape(-1, 2, 2).mean(1)
    assert np.abs(centres - landmarks.mean(1))[found.found].max() < 8


def test_a_picture_without_a_face_has_none(stills):
    frames = np.concatenate([stills[0][:1], np.full((1, 64, 64, 3), 128, np.uint8)])
    found = detect(frames)
    assert found.found.tolist() == [True, False]
    assert not found.landmarks[1].any()
    assert not found.boxes[1].any()
    assert found.scores[0] > 0 == found.scores[1]


def test_positions_follow_the_size_of_the_picture(stills):
    """Twice as large by repeating pixels: the centre of pixel i comes to 2i + 0.5."""
    frames = stills[0]
    small, large = detect(frames), detect(frames.repeat(2, axis=1).repeat(2, axis=2))
    both = small.found & large.found
    assert both.mean() > 0.8
    error = np.linalg.norm(large.landmarks - (2 * small.landmarks + 0.5), axis=-1)[both]
    assert np.median(error) < 1.5  # of 128


def test_two_processes_find_the_same(stills):
    frames = np.resize(stills[0], (2 * WORTH_A_PROCESS, 64, 64, 3))
    alone, together = detect(frames[: len(stills[0])], num_workers=1), detect(frames, num_workers=2)
    for one, many in zip(alone, together, strict=True):
        assert np.array_equal(np.resize(one, many.shape), many)


def test_nothing_to_search_gives_nothing():
    assert [part.shape for part in detect(np.zeros((0, 64, 64, 3), np.uint8))] == [(0,), (0, 4), (0, 5, 2), (0,)]


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 64, 64), np.uint8), np.zeros((2, 3, 64, 64), np.uint8), np.zeros((2, 8, 8, 3))]
)
def test_other_pictures_are_refused(frames):
    with pytest.raises(ValueError, match=r"frames must be RGB uint8 \(N, H, W, 3\)"):
        detect(frames)
