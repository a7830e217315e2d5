"""Finding the one face that a sample is about.

Boxes and landmarks as in `mm_lightning.encoders.detector`: pixels, (0, 0) the centre of the first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mm_lightning.encoders.detector import (
    DetectedFace,
    FaceDetector,
    centre,
    check_detector,
    detector_file,
    face_size,
    load_detector,
    square_around,
)
from mm_lightning.encoders.packs import DEFAULT_ROOT
from mm_lightning.files import fingerprint
from mm_lightning.prepare.sample import Rejected, Sample

SPLIT_MARGINS = (3.2, 2.8, 2.4, 2.0)  # sides of a square around one of several faces, in face boxes


def check_sizes(smallest: int, min_face_size: int) -> None:
    """
    Raises:
        ValueError: faces that would be large enough are not looked for.
    """
    if smallest > min_face_size:
        raise ValueError(f"smallest={smallest} must not exceed min_face_size={min_face_size}.")


class DetectFaces:
    """Finds the face of a picture and rejects pictures without a usable one, or with several.

    Args:
        detector, root: see `load_detector`.
        min_score: below, a detection counts as no face; None takes the detector's own (0.3 of dlib's unbounded
            scores, 0.6 of a pack's).
        min_face_size: shorter side of the box, pixels.
        smallest: faces below are not looked for, so they do not count as further people either, pixels.
        border: share of the face's size that must lie between its box and the picture's border.
    """

    name = "faces"
    reasons = ("no_face", "low_confidence", "several_people", "small_face", "cut_face")

    def __init__(
        self,
        detector: str = "auto",
        min_score: float | None = None,
        min_face_size: int = 96,
        smallest: int = 64,
        border: float = 0.02,
        root: str = DEFAULT_ROOT,
    ) -> None:
        check_sizes(smallest, min_face_size)
        check_detector(detector, root)
        self.detector, self.root, self.min_score = detector, root, min_score
        self.min_face_size, self.smallest, self.border = min_face_size, smallest, border

    def models(self) -> dict[str, str]:
        return fingerprint([detector_file(self.detector, self.root)])

    def __call__(self, sample: Sample) -> list[Sample]:
        detector = load_detector(self.detector, self.root)
        picture = sample.frames[0]
        face = self.choose(detector(picture, self.smallest), detector.sure, picture.shape)
        sample.meta["faces"] = [face_record(face)]
        sample.meta["detector"] = detector_record(detector, self.min_score, self.smallest)
        return [sample]

    def choose(self, faces: list[DetectedFace], sure: float, shape: tuple[int, ...]) -> DetectedFace:
        min_score = sure if self.min_score is None else self.min_score
        certain = [face for face in faces if face.score >= min_score]
        if not faces:
            raise Rejected("no_face")
        if not certain:
            raise Rejected("low_confidence", f"score {max(face.score for face in faces):.2f} < {min_score}")
        if len(certain) > 1:
            raise Rejected("several_people", f"{len(certain)} faces")
        size = face_size(certain[0].box)
        if size < self.min_face_size:
            raise Rejected("small_face", f"{size:.0f} pixels")
        if is_cut(certain[0].box, shape, self.border):
            raise Rejected("cut_face", f"box {certain[0].box.round().tolist()} in {shape[1]} x {shape[0]}")
        return certain[0]


class SplitPeople:
    """A picture of several people -> a square around each face, without caption; other pictures pass unchanged.

    The squares are as large as keeps the centres of other faces out of them. `DetectFaces`, afterwards, judges each.

    Args:
        detector, min_score, smallest, root: as in `DetectFaces`; the same values spare a second detection.
    """

    name = "split"
    reasons = ()

    def __init__(
        self, detector: str = "auto", min_score: float | None = None, smallest: int = 64, root: str = DEFAULT_ROOT
    ) -> None:
        check_detector(detector, root)
        self.detector, self.root, self.min_score, self.smallest = detector, root, min_score, smallest

    def models(self) -> dict[str, str]:
        return fingerprint([detector_file(self.detector, self.root)])

    def __call__(self, sample: Sample) -> list[Sample]:
        detector = load_detector(self.detector, self.root)
        picture = sample.frames[0]
        min_score = detector.sure if self.min_score is None else self.min_score
        faces = [face for face in detector(picture, self.smallest) if face.score >= min_score]
        if len(faces) < 2:
            return [sample]
        faces.sort(key=lambda face: face.box.tolist())  # from left to right
        return [crop_person(sample, index, faces) for index in range(len(faces))]


def crop_person(sample: Sample, index: int, faces: list[DetectedFace]) -> Sample:
    picture = sample.frames[0]
    others = np.array([centre(face.box) for i, face in enumerate(faces) if i != index])  # (N - 1, 2)
    for margin in SPLIT_MARGINS:
        x, y, side = square_around(faces[index].box, margin, picture.shape)
        if not ((others >= [x, y]) & (others < [x + side, y + side])).all(1).any():
            break
    crop = np.ascontiguousarray(picture[y : y + side, x : x + side])
    key = f"{sample.key}-p{index}"
    meta = sample.meta | {"identity": key, "width": side, "height": side, "crop": [x, y, x + side, y + side]}
    return Sample(key, sample.kind, sample.source, extension="jpg", meta=meta, frames=[crop])


def is_cut(box: np.ndarray, shape: tuple[int, ...], border: float) -> bool:
    room = border * face_size(box)
    height, width = shape[:2]
    return bool((box[:2] < room).any() or (box[2:] > np.array([width, height]) - 1 - room).any())


def face_record(face: DetectedFace) -> dict[str, Any]:
    """As `{key}.json` holds it."""
    record = {"box": face.box, "landmarks": face.landmarks.astype(float)}
    score = None if face.score is None else round(face.score, 4)
    return {name: np.round(value, 2).tolist() for name, value in record.items()} | {"score": score}


def detector_record(detector: FaceDetector, min_score: float | None, smallest: int) -> dict[str, Any]:
    min_score = detector.sure if min_score is None else min_score
    return {**detector.info, "min_score": min_score, "smallest_face": smallest}
