"""The table's formulas against cases that are known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mm_lightning.miniature.figures import (
    colour_drift,
    fm_inter,
    fm_ref,
    identification_rank,
    in_box,
    mean_of_known,
    sample_frames,
    similarity,
    top_share,
)

FACE = np.array([[20.0, 24.0], [40.0, 24.0], [30.0, 34.0], [23.0, 44.0], [37.0, 44.0]])
BOX = np.array([12.0, 10.0, 52.0, 50.0])
NAN = math.nan


def moved(steps: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Landmarks (F, 5, 2) and boxes (F, 4) of a face that is shifted as a whole."""
    steps = np.array(steps)
    return FACE + steps[:, None], BOX + np.tile(steps, 2)


# Frames


def test_sampled_frames_reach_from_the_first_to_the_last():
    assert sample_frames(17) == [*range(8), *range(9, 17)]  # the middle one, 8, lies between 7.47 and 8.53
    assert sample_frames(17, 4) == [0, 5, 11, 16]
    assert sample_frames(49, 16)[::15] == [0, 48]
    assert sample_frames(5, 16) == [0, 1, 2, 3, 4]
    assert sample_frames(1, 4) == [0]


# Facial motion


def test_a_still_clip_does_not_move():
    landmarks, boxes = moved([(0, 0)] * 16)
    assert fm_inter(landmarks, 64, 64) == 0
    assert fm_ref(landmarks, boxes, FACE, BOX) == 0


def test_a_face_that_travels_moves_between_frames_and_not_against_the_reference():
    """Five points by 8 of 64 pixels there and back: 5 * 8 / 64, whatever the path; the box goes along."""
    landmarks, boxes = moved([(0, 0), (3, 0), (8, 0), (5, 0), (0, 0)])
    assert fm_inter(landmarks, 64, 64) == pytest.approx(5 * 8 / 64)
    assert fm_ref(landmarks, boxes, FACE, BOX) == pytest.approx(0, abs=1e-12)


def test_width_and_height_count_as_one():
    landmarks, _ = moved([(0, 0), (3, 4)])
    assert fm_inter(landmarks, height=32, width=64) == pytest.approx(5 * math.hypot(3 / 64, 4 / 32))


def test_the_largest_pair_counts_not_the_last():
    landmarks, _ = moved([(0, 0), (-4, 0), (6, 0), (1, 0)])
    assert fm_inter(landmarks, 64, 64) == pytest.approx(5 * 10 / 64)


def test_fm_ref_is_the_mean_over_frames_of_the_sum_over_points():
    """The mouth opens by 4 of 40 pixels of the box in half of the frames: two points of five, 0.1 each."""
    landmarks, boxes = moved([(0, 0)] * 4)
    landmarks[2:, 3:, 1] += 4.0
    assert fm_ref(landmarks, boxes, FACE, BOX) == pytest.approx(0.5 * 2 * 4 / 40)


def test_size_and_aspect_of_the_face_drop_out_of_fm_ref():
    stretch = np.array([1.5, 0.7])
    landmarks, boxes = FACE[None] * stretch, BOX[None] * np.tile(stretch, 2)
    assert fm_ref(landmarks, boxes, FACE, BOX) == pytest.approx(0, abs=1e-12)
    assert in_box(np.array([[12.0, 10.0], [52.0, 50.0]]), BOX).tolist() == [[0, 0], [1, 1]]


def test_frames_without_a_face_are_left_out_of_motion():
    landmarks, boxes = moved([(0, 0), (2, 0), (30, 0)])
    landmarks[2], boxes[2] = NAN, NAN
    assert fm_inter(landmarks, 64, 64) == pytest.approx(5 * 2 / 64)
    assert fm_ref(landmarks, boxes, FACE, BOX) == pytest.approx(0, abs=1e-12)


def test_motion_of_too_few_faces_is_unknown():
    landmarks, boxes = moved([(0, 0), (2, 0)])
    landmarks[1], boxes[1] = NAN, NAN
    assert math.isnan(fm_inter(landmarks, 64, 64))
    assert fm_ref(landmarks, boxes, FACE, BOX) == 0
    assert math.isnan(fm_ref(landmarks[1:], boxes[1:], FACE, BOX))


# Identity


def test_rank_counts_the_people_who_are_nearer():
    gallery = np.array([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0], [9.0, 0.0]])
    assert [identification_rank(np.array([1.2, 0.0]), gallery, own) for own in range(4)] == [2, 1, 3, 4]


def test_distance_is_euclidean_not_cosine():
    gallery = np.array([[1.0, 1.0], [10.0, 0.0]])
    assert identification_rank(np.array([2.0, 0.0]), gallery, 0) == 1


def test_a_clip_without_a_face_has_no_place_and_a_tie_is_no_hit():
    gallery = np.zeros((3, 2))
    assert identification_rank(None, gallery, 0) is None
    assert identification_rank(np.ones(2), gallery, 0) == 3


def test_shares_count_every_clip():
    assert top_share([1, 2, None, 5], 1) == 0.25
    assert top_share([1, 2, None, 5], 5) == 0.75
    assert top_share([None, None], 100) == 0  # not even where places count beyond the last
    assert math.isnan(top_share([], 1))


def test_chance_is_one_in_as_many_as_there_are_people():
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((64, 16))
    ranks = [identification_rank(rng.standard_normal(16), gallery, i % 64) for i in range(4000)]
    assert top_share(ranks, 1) == pytest.approx(1 / 64, abs=0.008)  # four standard deviations
    assert top_share(ranks, 5) == pytest.approx(5 / 64, abs=0.017)


def test_similarity_is_the_cosine_with_ones_own_and_with_all_others():
    gallery = np.array([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    frames = np.array([[1.0, 0.0, 0.0], [3.0, 4.0, 0.0]])
    found = similarity(frames, gallery, own=0, times=[0, 1])
    assert found.own == pytest.approx((1 + 0.6) / 2)
    assert found.others == pytest.approx((0 + 0 + 0.8 + 0) / 4)
    assert found.margin == pytest.approx(0.8 - 0.2)
    assert found.decay == pytest.approx(0.4)


def test_decay_is_the_fall_of_the_fitted_line_over_the_whole_clip():
    """Cosines 0.9, 0.8, 0.7 at a quarter, half and three quarters of the clip: 0.4 from end to end."""
    cosines = np.array([0.9, 0.8, 0.7])
    frames = np.stack([cosines, np.sqrt(1 - cosines**2)], axis=1)
    gallery = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert similarity(frames, gallery, 0, [0.25, 0.5, 0.75]).decay == pytest.approx(0.4)
    assert math.isnan(similarity(frames[:1], gallery, 0, [0.25]).decay)
    assert all(math.isnan(value) for value in similarity(frames[:0], gallery, 0, []))


# Colour


def test_drift_is_the_mean_distance_to_the_first_frames_colour():
    frames = np.full((3, 4, 5, 3), 100, np.uint8)
    frames[1, ..., 0] += 3
    frames[1, ..., 2] += 4
    frames[2, :2] += 20  # half of the picture
    assert colour_drift(frames) == pytest.approx((5 + 10 * math.sqrt(3)) / 2)
    assert colour_drift(frames[:1]) == 0


def test_means_leave_out_what_is_unknown():
    assert mean_of_known([1.0, NAN, 2.0]) == 1.5
    assert math.isnan(mean_of_known([NAN, NAN]))
    assert math.isnan(mean_of_known([]))
