"""A video -> shots -> windows of 4k+1 frames, each with one person who stays in the picture and moves."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import cv2
import numpy as np
from scenedetect import ContentDetector, FrameTimecode

from mm_lightning.encoders.detector import (
    DetectedFace,
    FaceDetector,
    check_detector,
    detector_file,
    face_size,
    load_detector,
)
from mm_lightning.encoders.packs import DEFAULT_ROOT
from mm_lightning.encoders.recognizer import check_recognizer
from mm_lightning.files import fingerprint
from mm_lightning.prepare.sample import Rejected, Sample
from mm_lightning.prepare.stages.faces import check_sizes, detector_record, face_record, is_cut
from mm_lightning.prepare.stages.frames import UNREADABLE
from mm_lightning.prepare.stages.identity import FaceEmbedder, check_embedder, cosine, load_embedder

SCENE_SIDE = 128  # pixels; cuts show at any size
FLOW_SIDE = 256  # pixels


class CutScenes:
    """A video -> its shots, by PySceneDetect's content detector; each is a person of its own.

    Args:
        threshold: difference of neighbouring frames that makes a cut, 0 to 255; lower finds more.
        min_seconds: shorter shots stay joined to their neighbour.
    """

    name = "scenes"
    reasons = (UNREADABLE,)

    def __init__(self, threshold: float = 27.0, min_seconds: float = 0.5) -> None:
        self.threshold, self.min_seconds = threshold, min_seconds

    def __call__(self, sample: Sample) -> list[Sample]:
        fps = sample.meta["fps"]
        min_frames = max(1, round(self.min_seconds * fps))
        detector, cuts = ContentDetector(self.threshold, min_frames), []
        for number, frame in enumerate(sample.frames):
            reduced = cv2.cvtColor(shrink(frame, SCENE_SIDE), cv2.COLOR_RGB2BGR)
            cuts += [cut.frame_num for cut in detector.process_frame(FrameTimecode(number, fps), reduced)]
        bounds = [0, *cuts, len(sample.frames)]
        if len(bounds) == 2:
            return [sample]
        return [cut_scene(sample, i, start, stop) for i, (start, stop) in enumerate(pairwise(bounds))]


def cut_scene(sample: Sample, index: int, start: int, stop: int) -> Sample:
    key = f"{sample.key}-s{index:03d}"
    meta = sample.meta | {"identity": key, "num_frames": stop - start, "scene": [start, stop]}
    frames = sample.frames[start:stop].as_scene()
    return Sample(key, sample.kind, sample.source, caption=sample.caption, meta=meta, frames=frames)


class Windows:
    """A shot -> windows of `num_frames` frames.

    Args:
        num_frames: 4k+1, what the video VAE takes.
        stride: from one window's start to the next, frames; `num_frames` for windows that do not overlap.
        max_windows: of one shot, spread evenly over it; None takes all.

    Raises:
        ValueError: num_frames is not 4k+1, or a count below 1.
    """

    name = "windows"
    reasons = ("too_short",)

    def __init__(self, num_frames: int = 49, stride: int = 49, max_windows: int | None = None) -> None:
        if num_frames < 1 or num_frames % 4 != 1:
            nearest = max(1, round((num_frames - 1) / 4) * 4 + 1)
            raise ValueError(f"num_frames={num_frames}: the video VAE takes 4k+1 frames; the nearest is {nearest}.")
        if stride < 1 or (max_windows is not None and max_windows < 1):
            raise ValueError(f"stride={stride} and max_windows={max_windows} must be at least 1.")
        self.num_frames, self.stride, self.max_windows = num_frames, stride, max_windows

    def __call__(self, sample: Sample) -> list[Sample]:
        spare = len(sample.frames) - self.num_frames
        if spare < 0:
            raise Rejected("too_short", f"{len(sample.frames)} frames of {self.num_frames}")
        starts = list(range(0, spare + 1, self.stride))
        if self.max_windows is not None and len(starts) > self.max_windows:
            picks = np.linspace(0, len(starts) - 1, self.max_windows).round().astype(int)
            starts = [starts[i] for i in picks]
        return [self.cut(sample, start) for start in starts]

    def cut(self, sample: Sample, start: int) -> Sample:
        meta = sample.meta | {"num_frames": self.num_frames, "first_frame": start}
        frames = sample.frames[start : start + self.num_frames]
        key = f"{sample.key}-w{start:06d}"
        return Sample(key, sample.kind, sample.source, caption=sample.caption, meta=meta, frames=frames)


class FrameFaces(NamedTuple):
    """What the detector found in a frame, the largest first."""

    every: list[DetectedFace]
    certain: list[DetectedFace]  # those of `every` that score enough


class Track(NamedTuple):
    """A face per frame, or None, and who it is."""

    faces: list[DetectedFace | None]
    person: np.ndarray  # (E,) float32, of the first certain face


class TrackFace:
    """Follows one person's face through a window, by overlap from frame to frame and, where that breaks, by embedding.

    The track starts at the first certain detection and goes both ways. Where the face was, an unsure detection counts
    too: a head that turns away lowers the score, not the place. A gap of few frames is filled in between its ends; such
    faces have the score None. At the end the last certain face is compared with the first.

    Args:
        detector, min_score, min_face_size, smallest, border, root: as in `DetectFaces`.
        recognizer: see `load_recognizer`.
        min_share: of the frames in which the face must be found.
        max_others: share of the frames that may show further faces.
        max_gap: frames without detection that are filled; 0 leaves them without a face.
        min_overlap: intersection over union from one frame to the next, below which the embedding decides.
        same_person: cosine; None takes the recogniser's own.
    """

    name = "track"
    version = 2
    reasons = ("no_face", "low_confidence", "several_people", "small_face", "cut_face", "lost_face", UNREADABLE)

    def __init__(
        self,
        detector: str = "auto",
        recognizer: str = "dlib",
        min_score: float | None = None,
        min_face_size: int = 96,
        smallest: int = 64,
        border: float = 0.02,
        min_share: float = 0.8,
        max_others: float = 0.1,
        max_gap: int = 2,
        min_overlap: float = 0.3,
        same_person: float | None = None,
        root: str = DEFAULT_ROOT,
    ) -> None:
        check_sizes(smallest, min_face_size)
        check_detector(detector, root)
        check_embedder(recognizer, root)
        self.detector, self.recognizer, self.root = detector, recognizer, root
        self.min_score, self.min_face_size, self.smallest, self.border = min_score, min_face_size, smallest, border
        self.min_share, self.max_others, self.max_gap, self.min_overlap = min_share, max_others, max_gap, min_overlap
        self.same_person = same_person

    def models(self) -> dict[str, str]:
        return fingerprint([detector_file(self.detector, self.root), check_recognizer(self.recognizer, self.root)])

    def __call__(self, sample: Sample) -> list[Sample]:
        detector, embedder = load_detector(self.detector, self.root), load_embedder(self.recognizer, self.root)
        frames = list(sample.frames)
        found = self.detect(frames, detector)
        track = self.follow(frames, found, embedder)
        self.check(track.faces, frames[0].shape)
        self.check_end(frames, found, track, embedder)
        faces = fill_gaps(track.faces, self.max_gap, self.min_overlap)
        sample.meta["faces"] = [None if face is None else face_record(face) for face in faces]
        sample.meta["detector"] = detector_record(detector, self.min_score, self.smallest)
        return [sample]

    def detect(self, frames: list[np.ndarray], detector: FaceDetector) -> list[FrameFaces]:
        min_score = detector.sure if self.min_score is None else self.min_score
        every = [detector(frame, self.smallest) for frame in frames]
        certain = [[face for face in faces if face.score >= min_score] for faces in every]
        if not any(every):
            raise Rejected("no_face")
        if not any(certain):
            raise Rejected("low_confidence", f"score {max(f.score for faces in every for f in faces):.2f}")
        crowded = sum(len(faces) > 1 for faces in certain) / len(frames)
        if crowded > self.max_others:
            raise Rejected("several_people", f"in {crowded:.0%} of the frames")
        return [FrameFaces(*faces) for faces in zip(every, certain, strict=True)]

    def follow(self, frames: list[np.ndarray], found: list[FrameFaces], embedder: FaceEmbedder) -> Track:
        start = next(i for i, faces in enumerate(found) if faces.certain)
        first = found[start].certain[0]
        track = Track([None] * len(frames), embedder(frames[start], first.landmarks))
        for order in (range(start, len(frames)), range(start, -1, -1)):
            last = first
            for i in order:
                track.faces[i] = self.link(frames[i], found[i], last, track.person, embedder)
                last = track.faces[i] or last
        return track

    def link(
        self, frame: np.ndarray, faces: FrameFaces, last: DetectedFace, person: np.ndarray, embedder: FaceEmbedder
    ) -> DetectedFace | None:
        """The face where the last one was, or else the certain one that is the same person."""
        near = max(faces.every, key=lambda face: overlap(last.box, face.box), default=None)
        if near is not None and overlap(last.box, near.box) >= self.min_overlap:
            return near
        alike = [(cosine(person, embedder(frame, face.landmarks)), face) for face in faces.certain]
        similarity, face = max(alike, key=lambda pair: pair[0], default=(-1.0, None))
        return face if similarity >= self.threshold(embedder) else None

    def threshold(self, embedder: FaceEmbedder) -> float:
        return embedder.same_person if self.same_person is None else self.same_person

    def check_end(
        self, frames: list[np.ndarray], found: list[FrameFaces], track: Track, embedder: FaceEmbedder
    ) -> None:
        """One face may turn into another while the boxes overlap, in a dissolve for instance."""
        certain = (i for i, face in enumerate(track.faces) if any(face is other for other in found[i].certain))
        last = max(certain)
        similarity = cosine(track.person, embedder(frames[last], track.faces[last].landmarks))
        if similarity < self.threshold(embedder):
            raise Rejected("lost_face", f"another person at the end, similarity {similarity:.2f}")

    def check(self, track: list[DetectedFace | None], shape: tuple[int, ...]) -> None:
        """Size first: of faces that are too small, many are not found at all."""
        shown = [face for face in track if face is not None]
        size = float(np.median([face_size(face.box) for face in shown]))
        if size < self.min_face_size:
            raise Rejected("small_face", f"{size:.0f} pixels")
        if len(shown) < self.min_share * len(track):
            raise Rejected("lost_face", f"in {len(track) - len(shown)} of {len(track)} frames")
        num_cut = sum(is_cut(face.box, shape, self.border) for face in shown)
        if num_cut > self.max_others * len(track):
            raise Rejected("cut_face", f"in {num_cut} of {len(track)} frames")


def fill_gaps(track: list[DetectedFace | None], max_gap: int, min_overlap: float) -> list[DetectedFace | None]:
    """Faces between two detections at most `max_gap` frames apart, by linear interpolation; none across a jump."""
    filled = list(track)
    shown = [i for i, face in enumerate(track) if face is not None]
    for start, stop in pairwise(shown):
        before, after = track[start], track[stop]
        if stop - start - 1 > max_gap or overlap(before.box, after.box) < min_overlap:
            continue
        for i in range(start + 1, stop):
            filled[i] = between(before, after, (i - start) / (stop - start))
    return filled


def between(before: DetectedFace, after: DetectedFace, share: float) -> DetectedFace:
    box, landmarks = ((1 - share) * a + share * b for a, b in zip(before[:2], after[:2], strict=True))
    return DetectedFace(box, landmarks, None)


class MotionScore:
    """Measures how much moves, by dense optical flow (OpenCV's DIS), and rejects stills and shaky footage.

    The score is the mean length of the flow in picture sides per second, so it depends on neither size nor rate.

    Args:
        min_score: below is too still.
        max_score: above is too wild.
        step: every how many frames the flow is measured.
    """

    name = "motion"
    reasons = ("too_still", "too_wild", UNREADABLE)

    def __init__(self, min_score: float = 0.01, max_score: float = 1.5, step: int = 2) -> None:
        self.min_score, self.max_score, self.step = min_score, max_score, step

    def __call__(self, sample: Sample) -> list[Sample]:
        frames = list(sample.frames)[:: self.step]
        score = round(mean_flow(frames) * sample.meta["fps"] / self.step, 4)
        sample.meta["motion"] = score
        if score < self.min_score:
            raise Rejected("too_still", f"{score} < {self.min_score}")
        if score > self.max_score:
            raise Rejected("too_wild", f"{score} > {self.max_score}")
        return [sample]


def mean_flow(frames: list[np.ndarray]) -> float:
    """Mean length of the flow from one frame to the next, in sides of the picture (the shorter one)."""
    greys = [cv2.cvtColor(shrink(frame, FLOW_SIDE), cv2.COLOR_RGB2GRAY) for frame in frames]
    side = min(greys[0].shape)
    estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    lengths = [np.linalg.norm(estimator.calc(a, b, None), axis=-1).mean(dtype=np.float64) for a, b in pairwise(greys)]
    return float(np.mean(lengths)) / side if lengths else 0.0


def shrink(frame: np.ndarray, side: int) -> np.ndarray:
    """Reduced until the shorter side is `side`; what is smaller stays."""
    scale = side / min(frame.shape[:2])
    if scale >= 1:
        return frame
    size = tuple(round(length * scale) for length in frame.shape[1::-1])
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes (4,)."""
    sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    inner = sides.prod()
    return float(inner / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner))
