from itertools import pairwise

import cv2
import numpy as np
import pytest

from mm_lightning.encoders.detector import load_detector
from mm_lightning.prepare.sample import Sample
from mm_lightning.prepare.stages.decode import DecodeClip
from mm_lightning.prepare.stages.encode import EncodeClip
from mm_lightning.prepare.stages.frames import ClipFrames, Video
from mm_lightning.prepare.stages.identity import spread_faces
from mm_lightning.prepare.stages.video import CutScenes, MotionScore, TrackFace, Windows, mean_flow, overlap
from tests.prepare.bad_inputs import astronaut, carphone, clip, portrait, write_video
from tests.prepare.stages.conftest import FACES, long_clip, rejection, stages_of, through, video


def textured(num_frames: int, shift: int, seed: int = 0) -> list[np.ndarray]:
    """A smooth random picture that moves to the right by `shift` pixels a frame."""
    noise = np.random.default_rng(seed).integers(0, 255, (16, 26, 3)).astype(np.uint8)
    smooth = np.kron(noise, np.ones((8, 8, 1), np.uint8))
    return [np.roll(smooth, i * shift, axis=1) for i in range(num_frames)]


def moving(num_frames: int, shift: int, fps: float = 25, **kwargs) -> Sample:
    frames = textured(num_frames, shift, **kwargs)
    return Sample("m", "video", "test", frames=frames, meta={"fps": fps, "num_frames": num_frames})


# Lazy frames


def test_frames_read_anyhow_are_those_of_one_pass():
    frames = DecodeClip()(video(long_clip()))[0].frames
    whole = [frame.copy() for frame in frames]
    for start, stop in ((30, 40), (3, 12), (17, 26)):
        part = frames[start:stop]
        assert len(part) == stop - start
        assert all(np.array_equal(a, b) for a, b in zip(part, whole[start:stop], strict=True))
    assert np.array_equal(frames[-1], whole[-1])
    assert np.array_equal(frames[7], whole[7])


def test_long_clip_is_read_in_blocks(monkeypatch):
    monkeypatch.setattr("mm_lightning.prepare.stages.frames.BLOCK", 16)
    frames = DecodeClip()(video(long_clip()))[0].frames
    sizes = []
    inner = Video.read
    monkeypatch.setattr(Video, "read", lambda self, indices: sizes.append(len(indices)) or inner(self, indices))
    assert len(list(frames)) == 40
    assert sizes == [16, 16, 8]


def test_frames_outside_of_a_window():
    frames = ClipFrames(Video(b""), range(10, 30, 2))
    window = frames[2:5]
    assert window.indices == (14, 16, 18)
    assert window.outside().indices == (10, 12, 20, 22, 24, 26, 28)
    assert frames[2:8].as_scene()[1:3].outside().indices == (14, 20, 22, 24)


# Scenes


def test_cut_between_two_shots_is_found_where_it_is():
    frames = [*textured(20, 1, seed=1), *textured(25, 1, seed=2)]
    data = write_video(frames, [i / 25 for i in range(45)])
    scenes = through(video(data), DecodeClip(), CutScenes())
    assert [scene.meta["scene"] for scene in scenes] == [[0, 20], [20, 45]]
    assert [scene.key for scene in scenes] == ["v-s000", "v-s001"]
    assert [scene.meta["identity"] for scene in scenes] == ["v-s000", "v-s001"]
    assert [scene.meta["num_frames"] for scene in scenes] == [20, 25]
    assert scenes[1].frames.scene == tuple(range(20, 45))  # other moments do not come from another shot


def test_one_shot_stays_as_it_is():
    [sample] = DecodeClip()(video(long_clip()))
    assert CutScenes()(sample) == [sample]


# Windows


def test_windows_are_slices_of_the_shot():
    [sample] = DecodeClip()(video(long_clip()))
    windows = Windows(9, 10)(sample)
    assert [window.key for window in windows] == [f"v-w{start:06d}" for start in (0, 10, 20, 30)]
    assert [window.frames.indices[0] for window in windows] == [0, 10, 20, 30]
    assert {window.meta["num_frames"] for window in windows} == {9}
    assert {window.meta["identity"] for window in windows} == {"v"}
    assert [window.meta["first_frame"] for window in Windows(9, 1, max_windows=3)(sample)] == [0, 16, 31]


@pytest.mark.parametrize("arguments", [(48,), (0,), (9, 0), (9, 1, 0)])
def test_windows_that_cannot_be(arguments):
    with pytest.raises(ValueError, match=r"4k\+1|at least 1"):
        Windows(*arguments)


def test_nearest_number_of_frames_is_named():
    with pytest.raises(ValueError, match="nearest is 49"):
        Windows(48)


# Tracking


def test_face_is_followed_through_a_window(window):
    faces = window.meta["faces"]
    boxes = np.array([face["box"] for face in faces if face])
    assert len(faces) == 9
    assert len(boxes) >= 8
    assert np.abs(np.diff(boxes, axis=0)).max() < 25
    assert all(overlap(a, b) > 0.5 for a, b in pairwise(boxes))


def people(frames: list[np.ndarray]) -> Sample:
    return Sample("p", "video", "test", frames=frames, meta={"num_frames": len(frames), "fps": 8.0})


def test_jump_of_the_same_person_is_bridged_by_the_embedding():
    canvas = np.full((256, 640, 3), 90, np.uint8)
    left, right = canvas.copy(), canvas.copy()
    left[:, :256] = right[:, 384:] = np.asarray(portrait())
    [sample] = TrackFace(**FACES)(people([left] * 3 + [right] * 2))
    assert [face["box"][0] > 320 for face in sample.meta["faces"]] == [False] * 3 + [True] * 2


def test_jump_to_another_person_is_not_followed():
    canvas = np.full((256, 640, 3), 90, np.uint8)
    left, right = canvas.copy(), canvas.copy()
    left[:, :256] = np.asarray(portrait())
    right[:144, 400:576] = carphone()[0]
    assert rejection(TrackFace(**FACES), people([left] * 3 + [right] * 2)) == "lost_face"


def test_dissolve_into_another_person_in_the_same_place():
    first = np.asarray(portrait(288).crop((0, 0, 288, 236)))
    second = np.asarray(astronaut().resize((288, 236)))
    second = np.repeat(np.repeat(carphone()[0], 2, 0), 2, 1)[:236, 32:320]
    sample = people([first] * 3 + [second] * 3)
    assert rejection(TrackFace(**FACES, min_overlap=0.0), sample) == "lost_face"


def test_frames_without_face_are_told():
    frame, nothing = np.asarray(portrait()), np.zeros((256, 256, 3), np.uint8)
    [sample] = TrackFace(**FACES, min_share=0.5, max_gap=0)(people([frame, nothing, frame, frame]))
    assert [face is None for face in sample.meta["faces"]] == [False, True, False, False]
    assert rejection(TrackFace(**FACES, min_share=0.8), people([frame, nothing, frame, frame])) == "lost_face"


def test_small_face_in_a_clip():
    options = FACES | {"min_face_size": 200}
    assert rejection(TrackFace(**options), people([np.asarray(portrait())] * 2)) == "small_face"
    with pytest.raises(ValueError, match="smallest=64 must not exceed min_face_size=40"):
        TrackFace("dlib", min_face_size=40)


def test_faces_too_small_are_not_called_lost():
    """Below `smallest` many are missed: that is their size's fault."""
    [sample] = DecodeClip()(video(clip(49)))
    assert rejection(TrackFace("dlib", max_gap=0), sample) == "small_face"


@pytest.mark.parametrize(("max_gap", "num_filled"), [(0, 0), (1, 0), (2, 2), (5, 2)])
def test_short_gaps_are_filled_in_between(max_gap, num_filled):
    """The face moves by 12 pixels a frame; in two frames there is none to be found."""
    frames = [np.zeros((256, 400, 3), np.uint8) for _ in range(7)]
    for i in (0, 1, 4, 5, 6):
        frames[i][:, 12 * i : 12 * i + 256] = np.asarray(portrait())
    [sample] = TrackFace(**FACES, min_share=0.5, max_gap=max_gap)(people(frames))
    faces = sample.meta["faces"]
    filled = [i for i, face in enumerate(faces) if face and face["score"] is None]
    assert len(filled) == num_filled
    assert [face is None for face in faces] == [i in (2, 3) and i not in filled for i in range(7)]
    for i in filled:
        assert np.abs(np.array(faces[i]["box"]) - faces[0]["box"] - [12 * i, 0, 12 * i, 0]).max() < 6
        assert np.abs(np.array(faces[i]["landmarks"]) - faces[0]["landmarks"] - [12 * i, 0]).max() < 4
    assert not set(filled) & set(spread_faces(sample, 9))  # nobody is recognised, no reference cut there


def test_no_gap_is_filled_across_a_jump():
    canvas = np.full((256, 640, 3), 90, np.uint8)
    left, right = canvas.copy(), canvas.copy()
    left[:, :256] = right[:, 384:] = np.asarray(portrait())
    [sample] = TrackFace(**FACES, min_share=0.5)(people([left] * 2 + [canvas] + [right] * 2))
    assert [face is None for face in sample.meta["faces"]] == [False, False, True, False, False]


def test_unsure_detections_count_where_the_face_was_and_nowhere_else():
    """The man of the clip, in a frame that scores below 0.5 wherever he stands, and in one that scores above 1."""
    weak, sure = (np.pad(frame, ((0, 0), (0, 176), (0, 0))) for frame in (carphone()[60], carphone()[43]))
    elsewhere = np.roll(weak, 176, axis=1)
    scores = [load_detector("dlib")(frame, 40)[0].score for frame in (weak, elsewhere, sure)]
    assert max(scores[:2]) < 0.5
    assert scores[2] > 1
    tracker = TrackFace(**FACES, min_score=0.9, min_share=0.3, max_gap=0)
    [sample] = tracker(people([weak, sure, weak, elsewhere, sure]))
    assert [face is None for face in sample.meta["faces"]] == [False, False, False, True, False]


@pytest.mark.slow
def test_the_clip_enlarged_passes_at_the_default_thresholds():
    """120 frames of 144 x 176 pixels, as large as the defaults ask for; they last 4.8 s, so windows of 33 frames."""
    large = [cv2.resize(frame, (880, 720), interpolation=cv2.INTER_CUBIC) for frame in carphone()]
    stages = stages_of("video", {"windows": {"num_frames": 33}})
    [sample] = through(video(write_video(large, [i / 25 for i in range(120)])), *stages)
    assert all(sample.meta["faces"])
    assert sample.meta["num_frames"] == 33
    assert sample.meta["references"]


# Motion


@pytest.mark.parametrize("shift", [1, 3])
def test_flow_of_a_known_shift(shift):
    """The seam at the border moves otherwise, the rest by `shift` of 128 pixels."""
    assert mean_flow(textured(4, shift)) * 128 == pytest.approx(shift, rel=0.2)


def test_score_does_not_depend_on_rate_or_step():
    [slow] = MotionScore(step=1, max_score=9)(moving(9, 2, fps=10))
    [fast] = MotionScore(step=1, max_score=9)(moving(9, 1, fps=20))
    [stepped] = MotionScore(step=2, max_score=9)(moving(9, 1, fps=20))
    assert slow.meta["motion"] == pytest.approx(2 * 10 / 128, rel=0.2)
    assert fast.meta["motion"] == pytest.approx(slow.meta["motion"], rel=0.2)
    assert stepped.meta["motion"] == pytest.approx(slow.meta["motion"], rel=0.2)


def test_still_and_wild():
    assert rejection(MotionScore(), moving(5, 0)) == "too_still"
    assert rejection(MotionScore(step=1), moving(5, 10)) == "too_wild"
    [talking] = MotionScore()(DecodeClip()(video(clip(25)))[0])
    assert 0.01 < talking.meta["motion"] < 0.3


# Encoding


def test_windows_are_encoded_alike_every_time(window):
    import av

    frames = list(window.frames)
    [first], data = EncodeClip()(window), window.data
    with av.open(__import__("io").BytesIO(data)) as container:
        assert container.streams.video[0].average_rate == 25
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == 9
    assert np.mean([np.abs(a.astype(float) - b).mean() for a, b in zip(frames, decoded, strict=True)]) < 4
    window.data = b""
    assert EncodeClip()(window)[0].data == data
    assert first.extension == "mp4"
