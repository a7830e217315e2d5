"""Figures of faces in closed form, and against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mm_lightning.metrics import (
    AverageIDDistance,
    AverageIDSimilarity,
    FaceDetectionRate,
    FaceMotionInter,
    FaceMotionRef,
    SimilarityDecay,
)
from mm_lightning.metrics.arithmetic import sample_frames
from mm_lightning.metrics.face_motion_inter import fm_inter
from mm_lightning.metrics.face_motion_ref import fm_ref
from tests.metrics.drawn import (
    AXIS,
    BOX,
    FACE,
    HEIGHT,
    WIDTH,
    at_cosines,
    hidden,
    moved,
    random_inputs,
    reference,
    still,
)


def value(metric, *inputs) -> float:
    metric.update(*inputs)
    return float(metric.compute())


# Identity


def test_similarity_is_the_mean_cosine_of_the_frames_with_the_mean_reference():
    faces = still(3, at_cosines(0.9, 0.6, 0.0))
    assert value(AverageIDSimilarity(), faces, reference(AXIS)) == pytest.approx(0.5)
    # (3, 0) and (0, 4) have the mean (1.5, 2), 0.6 from the x axis; the mean of their directions would give 0.707.
    pair = reference(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    assert value(AverageIDSimilarity(), still(2, at_cosines(1.0, 1.0)), pair) == pytest.approx(0.6)


def test_a_copy_of_one_of_several_references_does_not_reach_one():
    references = reference(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert value(AverageIDSimilarity(), still(2, at_cosines(1.0, 1.0)), references) == pytest.approx(math.sqrt(0.5))
    single = reference(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), mask=[True, False])
    assert value(AverageIDSimilarity(), still(2, at_cosines(1.0, 1.0)), single) == pytest.approx(1)


def test_a_swapped_face_lowers_similarity_and_raises_distance():
    own, swapped = still(4, at_cosines(0.98, 0.97, 0.99, 0.98)), still(4, at_cosines(0.98, 0.97, 0.1, 0.0))
    similarity, distance = AverageIDSimilarity(), AverageIDDistance()
    assert value(similarity, own, reference(AXIS)) == pytest.approx(0.98)
    similarity.update(swapped, reference(AXIS))
    assert similarity.per_video().tolist() == pytest.approx([0.98, 0.5125])
    for faces in (own, swapped):
        distance.update(faces, reference(AXIS))
    assert distance.per_video()[1] > distance.per_video()[0]


def test_distance_is_euclidean():
    embeddings = torch.tensor([[5.0, 4.0], [2.0, 0.0]])
    assert value(AverageIDDistance(), still(2, embeddings), reference(AXIS)) == pytest.approx((5 + 0) / 2)


@pytest.mark.parametrize("kind", [AverageIDSimilarity, AverageIDDistance])
def test_frames_without_a_face_are_left_out_and_a_video_without_one_is_counted(kind):
    metric = kind()
    full = value(kind(), still(2, at_cosines(0.5, 0.7)), reference(AXIS))
    metric.update(hidden(still(4, at_cosines(0.5, 0.7, 0.1, 0.2)), 2, 3), reference(AXIS))
    metric.update(hidden(still(2, at_cosines(0.5, 0.7)), 0, 1), reference(AXIS))
    metric.update(still(2, at_cosines(0.5, 0.7)), reference(AXIS, mask=[False]))
    assert metric.num_unknown() == 2
    assert float(metric.compute()) == pytest.approx(full)


@pytest.mark.parametrize(("kind", "measure"), [(AverageIDSimilarity, "cosine"), (AverageIDDistance, "euclidean")])
def test_identity_agrees_with_scipy(kind, measure):
    from scipy.spatial.distance import cdist

    inputs = random_inputs(6)
    faces, references, metric = inputs["faces"], inputs["references"], kind()
    metric.update(faces, references)
    for i, got in enumerate(metric.per_video().tolist()):
        mean = references.embeddings[i][references.mask[i]].double().numpy().mean(0, keepdims=True)
        frames = faces.embeddings[i][faces.found[i]].double().numpy()
        if len(frames) == 0:
            assert math.isnan(got)
            continue
        expected = cdist(frames, mean, measure).mean()
        assert got == pytest.approx(1 - expected if measure == "cosine" else expected, abs=1e-6)


# Whether there is a face


def test_rate_counts_every_frame_and_every_video():
    metric = FaceDetectionRate()
    metric.update(hidden(still(4), 1))
    metric.update(hidden(still(2), 0, 1))
    metric.update(still(10))
    assert metric.per_video().tolist() == [0.75, 0, 1]
    assert float(metric.compute()) == pytest.approx(1.75 / 3)
    assert metric.num_faceless_frames().tolist() == [1, 2, 0]
    assert metric.num_faceless_videos() == 1
    assert metric.num_unknown() == 0


# Decay


def test_a_still_video_does_not_decay():
    assert value(SimilarityDecay(), still(49, torch.ones(49, 2)), reference(AXIS)) == pytest.approx(0, abs=1e-9)


def test_decay_is_the_fall_of_the_fitted_line():
    cosines = np.linspace(0.95, 0.75, 33)
    assert value(SimilarityDecay(), still(33, at_cosines(*cosines)), reference(AXIS)) == pytest.approx(0.2, abs=1e-6)
    rising = still(33, at_cosines(*cosines[::-1]))
    assert value(SimilarityDecay(), rising, reference(AXIS)) == pytest.approx(-0.2, abs=1e-6)


def test_decay_agrees_with_polyfit_on_the_sampled_frames_with_a_face():
    cosines = np.random.default_rng(0).uniform(0.5, 1, 49)
    faces = hidden(still(49, at_cosines(*cosines)), *range(20), 48)
    frames = [frame for frame in sample_frames(49, 16) if 20 <= frame < 48]
    slope = np.polyfit(np.array(frames) / 48, cosines[frames], 1)[0]
    assert value(SimilarityDecay(), faces, reference(AXIS)) == pytest.approx(-slope, abs=1e-6)
    assert slope != 0


def test_decay_needs_two_frames_with_a_face():
    metric = SimilarityDecay()
    metric.update(hidden(still(3, at_cosines(1, 0.5, 0)), 0, 2), reference(AXIS))
    metric.update(still(1, at_cosines(0.5)), reference(AXIS))
    metric.update(still(3, at_cosines(1, 0.5, 0)), reference(AXIS, mask=[False]))
    assert metric.num_unknown() == 3


# Facial motion


def test_a_still_face_does_not_move():
    assert value(FaceMotionInter(), still(49)) == 0
    assert value(FaceMotionRef(), still(49), reference(torch.ones(1, 4))) == 0


def test_a_translated_face_moves_within_the_video_and_not_against_the_reference():
    faces = moved([(0, 0), (3, 0), (8, 6), (5, 0), (0, 0)])
    assert value(FaceMotionInter(), faces) == pytest.approx(5 * math.hypot(8 / WIDTH, 6 / HEIGHT))
    assert value(FaceMotionRef(), faces, reference(torch.ones(1, 4))) == pytest.approx(0, abs=1e-6)


def test_the_largest_of_all_pairs_counts():
    assert value(FaceMotionInter(), moved([(0, 0), (-4, 0), (6, 0), (1, 0)])) == pytest.approx(5 * 10 / WIDTH)


def test_size_and_aspect_of_the_face_drop_out_of_fm_ref():
    faces = still(3)
    stretch = torch.tensor([1.5, 0.7])
    faces = faces._replace(landmarks=faces.landmarks * stretch, boxes=faces.boxes * stretch.repeat(2))
    assert value(FaceMotionRef(), faces, reference(torch.ones(1, 4))) == pytest.approx(0, abs=1e-6)


def test_fm_ref_is_the_mean_over_frames_of_the_sum_over_points():
    """The mouth's corners sink by 4 of the box's 40 pixels in half of the frames."""
    faces = still(4)
    faces.landmarks[:, 2:, 3:, 1] += 4.0
    assert value(FaceMotionRef(), faces, reference(torch.ones(1, 4))) == pytest.approx(0.5 * 2 * 4 / 40)


def test_several_references_are_averaged_and_absent_ones_ignored():
    open_mouth = FACE.clone()
    open_mouth[3:, 1] += 4.0
    references = reference(torch.ones(3, 4), mask=[True, True, False])
    references = references._replace(landmarks=torch.stack([FACE, open_mouth, FACE * torch.nan])[None])
    assert value(FaceMotionRef(), still(4), references) == pytest.approx(0.5 * 2 * 4 / 40)


def test_only_sixteen_uniformly_sampled_frames_are_looked_at():
    steps = [(0.0, 0.0)] * 49
    unseen = next(frame for frame in range(49) if frame not in sample_frames(49))
    steps[unseen] = (30.0, 0.0)
    faces = moved(steps)
    assert value(FaceMotionInter(), faces) == 0
    assert value(FaceMotionInter(num_frames=49), faces) == pytest.approx(5 * 30 / WIDTH)
    faces.landmarks[:, unseen, :2] += 10
    assert value(FaceMotionRef(), faces, reference(torch.ones(1, 4))) == pytest.approx(0, abs=1e-6)
    assert value(FaceMotionRef(num_frames=49), faces, reference(torch.ones(1, 4))) > 0.01


def test_frames_without_a_face_do_not_move():
    faces = hidden(moved([(0, 0), (2, 0), (30, 0)]), 2)
    assert value(FaceMotionInter(), faces) == pytest.approx(5 * 2 / WIDTH)
    metric = FaceMotionInter()
    metric.update(hidden(faces, 1, 2))
    assert metric.num_unknown() == 1
    ref = FaceMotionRef()
    ref.update(hidden(faces, 0, 1, 2), reference(torch.ones(1, 4)))
    assert ref.num_unknown() == 1


def unit(points: torch.Tensor, box: torch.Tensor) -> np.ndarray:
    corner, size = box.numpy()[:2], box.numpy()[2:] - box.numpy()[:2]
    return (points.numpy() - corner) / size


def test_motion_agrees_with_numpy_in_float64():
    inputs = random_inputs(4, num_frames=12)
    faces, references = inputs["faces"], inputs["references"]
    points, boxes = faces.landmarks.double(), faces.boxes.double()
    ref_points, ref_boxes = references.landmarks.double(), references.boxes.double()
    got_ref = fm_ref(points, boxes, faces.found, ref_points, ref_boxes, references.mask)
    got_inter = fm_inter(points, faces.found, faces.sizes)
    for i in range(3):
        shown = np.flatnonzero(faces.found[i])
        distances = [
            np.linalg.norm(unit(points[i, f], boxes[i, f]) - unit(ref_points[i, r], ref_boxes[i, r]), axis=1).sum()
            for f in shown
            for r in (0, 1)
        ]
        assert float(got_ref[i]) == pytest.approx(np.mean(distances), abs=1e-12)
        scale = np.array([WIDTH, HEIGHT])
        pairs = [
            np.linalg.norm((points[i, a].numpy() - points[i, b].numpy()) / scale, axis=1).sum()
            for a in shown
            for b in shown
        ]
        assert float(got_inter[i]) == pytest.approx(max(pairs), abs=1e-12)
    assert math.isnan(got_inter[3])


def test_the_face_box_may_lie_anywhere():
    """Only its own landmarks matter: a box twice as wide halves what they move by, across."""
    faces = still(2)
    faces.landmarks[:, :, 2, 0] += 4
    narrow = value(FaceMotionRef(), faces, reference(torch.ones(1, 4)))
    assert narrow == pytest.approx(4 / float(BOX[2] - BOX[0]))
