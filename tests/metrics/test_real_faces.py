"""A real talking man against his own and other people's photographs; dlib finds and embeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mm_lightning.metrics import (
    AverageIDDistance,
    AverageIDSimilarity,
    ColorDrift,
    DynamicDegree,
    FaceDetectionRate,
    FaceMotionInter,
    FaceMotionRef,
    IdentityRetrieval,
    MotionSmoothness,
    OpenCVFlow,
    SimilarityDecay,
    SuccessRates,
)
from tests.metrics.real_videos import (
    his_photographs,
    others,
    reference_faces,
    talking_frames,
    talking_man,
    video_faces,
)


@pytest.fixture(scope="module")
def man():
    return video_faces(talking_man(), 144, 176)


@pytest.fixture(scope="module")
def video() -> torch.Tensor:
    return torch.from_numpy(talking_frames()).permute(0, 3, 1, 2)[None].float() / 127.5 - 1


def against_all(kind: type, man) -> tuple[float, list[float]]:
    """The figure with his own photographs, and with those of each other person."""
    metric = kind()
    for faces in (his_photographs(), *(person[:1] for person in others())):
        metric.update(man, reference_faces(faces))
    own, *with_others = metric.per_video().tolist()
    return own, with_others


def test_his_face_is_found_in_nearly_all_frames(man):
    metric = FaceDetectionRate()
    metric.update(man)
    assert float(metric.compute()) >= 14 / 16
    assert metric.num_faceless_frames().tolist() == [int((~man.found).sum())]


def test_he_is_like_himself_and_like_nobody_else(man):
    own, with_others = against_all(AverageIDSimilarity, man)
    assert own > 0.95
    assert len(with_others) == 7
    assert max(with_others) < 0.92


def test_his_distance_is_on_his_side_of_dlibs_border(man):
    own, with_others = against_all(AverageIDDistance, man)
    assert own < 0.4
    assert min(with_others) > 0.6


def test_a_face_swapped_half_way_drops_and_decays(man):
    own = reference_faces(his_photographs())
    swapped = man.embeddings.clone()
    swapped[:, 8:] = reference_faces(others()[2][:1]).embeddings
    similarity, decay = AverageIDSimilarity(), SimilarityDecay()
    for faces in (man, man._replace(embeddings=swapped)):
        similarity.update(faces, own)
        decay.update(faces, own)
    assert similarity.per_video()[1] < similarity.per_video()[0] - 0.03
    assert abs(decay.per_video()[0]) < 0.03
    assert decay.per_video()[1] > 0.05


def test_a_frozen_frame_has_no_motion_and_no_decay(man):
    first = int(man.found[0].int().argmax())
    frozen = type(man)(*(tensor[:, [first] * 16] for tensor in man[:4]), man.sizes)
    inter, decay = FaceMotionInter(), SimilarityDecay()
    inter.update(frozen)
    decay.update(frozen, reference_faces(his_photographs()))
    assert float(inter.compute()) == 0
    assert float(decay.compute()) == pytest.approx(0, abs=1e-9)


def test_a_talking_face_moves_and_a_pasted_one_does_not_leave_its_reference(man):
    inter, ref = FaceMotionInter(), FaceMotionRef()
    inter.update(man)
    ref.update(man, reference_faces(his_photographs()))
    picture = others()[0][0]
    ref.update(video_faces([picture] * 4, 886, 1280), reference_faces([picture]))
    assert 0.05 < float(inter.compute()) < 1
    assert ref.per_video()[0] > 0.1
    assert ref.per_video()[1] == 0


def test_a_travelling_crop_moves_the_face_by_its_way(man):
    """The landmarks of the frame in which dlib sees him best, shifted by 11 of 176 pixels."""
    first = int(man.found[0].int().argmax())
    pair = [man.landmarks[:, [first]], man.landmarks[:, [first]] + torch.tensor([11.0, 0.0])]
    faces = type(man)(*(tensor[:, [first] * 2] for tensor in man[:4]), man.sizes)
    metric = FaceMotionInter()
    metric.update(faces._replace(landmarks=torch.cat(pair, dim=1)))
    assert float(metric.compute()) == pytest.approx(5 * 11 / 176, abs=1e-5)


def test_everybody_is_found_among_eight_people(man):
    metric, strict = IdentityRetrieval(), SuccessRates(min_motion=0.05)
    metric.update(man, reference_faces(his_photographs()), torch.tensor([0]))
    similarity = AverageIDSimilarity()
    for number, (picture, *views) in enumerate(others(), start=1):
        metric.update(video_faces(views, 256, 256), reference_faces([picture]), torch.tensor([number]))
        similarity.update(video_faces(views, 256, 256), reference_faces([picture]))
    assert metric.num_people() == 8
    assert float(metric.compute()) == 1
    strict.update(similarity=similarity.per_video())
    assert float(strict.compute()["identity"]) == 1


def test_exchanged_references_find_nobody(man):
    metric = IdentityRetrieval()
    people = [his_photographs(), *([picture] for picture, *_ in others())]
    videos = [man, *(video_faces(views, 256, 256) for _, *views in others())]
    for number, faces in enumerate(videos):
        stranger = (number + 1) % len(people)
        metric.update(faces, reference_faces(people[stranger]), torch.tensor([stranger]))
    assert float(metric.compute()) == 0


def test_the_clip_moves_and_keeps_its_colours(video):
    drift, dynamic, smoothness = ColorDrift(), DynamicDegree(flow=OpenCVFlow()), MotionSmoothness(flow=OpenCVFlow())
    still = video[:, :1].expand_as(video)
    for frames in (video, still):
        for metric in (drift, dynamic, smoothness):
            metric.update(frames)
    colours = talking_frames().reshape(16, -1, 3).astype(np.float64).mean(1)
    expected = np.linalg.norm(colours[1:] - colours[0], axis=1).mean()
    assert drift.per_video().tolist() == pytest.approx([expected, 0], abs=1e-3)
    assert expected < 30
    assert dynamic.per_video().tolist() == [1, 0]
    assert 0.1 < smoothness.per_video()[0] < 1
    assert smoothness.per_video()[1] == 0
