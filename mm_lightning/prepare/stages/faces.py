"""Finding the one face that a sample is about.

Boxes and landmarks as in `mm_lightning.prepare.faces`: pixels, (0, 0) the centre of the first.
"""

from __future__ import annotations

import importlib.metadata
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from mm_lightning.encoders.packs import DEFAULT_ROOT, HOW_TO_GET, repair_nested_pack
from mm_lightning.prepare.faces import DetectedFace, DlibFaceDetector
from mm_lightning.prepare.sample import Rejected, Sample

PACKS = ("buffalo_l", "antelopev2")  # what "auto" looks for, in this order
DETECTION_PATTERNS = ("det_*.onnx", "scrfd_*.onnx")
HOG_WINDOW = 80  # pixels of the smallest face that dlib's detector finds
SPLIT_MARGINS = (3.2, 2.8, 2.4, 2.0)  # sides of a square around one of several faces, in face boxes


class FaceDetector(Protocol):
    """Finds faces.

    `info` is recorded with every sample; `sure` is the score from which on a detection counts as a face.
    """

    info: dict[str, str]
    sure: float

    def __call__(self, picture: np.ndarray, smallest: int) -> list[DetectedFace]:
        """RGB uint8 (H, W, 3) -> faces of `smallest` pixels and more, the largest first, unsure ones too."""
        ...


class DlibDetector(DlibFaceDetector):
    """dlib's HOG detector at the scale at which the smallest face wanted fills its window. Scores are unbounded."""

    sure = 0.3
    info = {"name": "dlib_frontal_face_detector", "version": importlib.metadata.version("dlib-bin")}

    def __call__(self, picture: np.ndarray, smallest: int) -> list[DetectedFace]:
        scale = min(HOG_WINDOW / smallest, 4.0)
        size = tuple(max(HOG_WINDOW, math.ceil(side * scale)) for side in picture.shape[1::-1])
        kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        scaled = np.ascontiguousarray(cv2.resize(picture, size, interpolation=kind))
        rectangles, scores, _ = self.detector.run(scaled, 0, 0.0)
        ratio = np.array(picture.shape[1::-1]) / size
        return largest_first([self._restore(picture, r, s, ratio) for r, s in zip(rectangles, scores, strict=True)])

    def _restore(self, picture: np.ndarray, rectangle: Any, score: float, ratio: np.ndarray) -> DetectedFace:
        corners = np.array([[rectangle.left(), rectangle.top()], [rectangle.right(), rectangle.bottom()]])
        corners = np.round((corners + 0.5) * ratio - 0.5).astype(int).flatten().tolist()
        return self._locate(picture, type(rectangle)(*corners), score)


class PackDetector:
    """The detector (SCRFD or RetinaFace) of an insightface pack, run by ONNX Runtime. Scores lie in 0 to 1.

    Args:
        path: the detector's ONNX file.

    Raises:
        ValueError: the file is no detector with five landmarks.
    """

    sure = 0.6

    def __init__(self, path: Path) -> None:
        from insightface.model_zoo import get_model

        self.network = get_model(str(path))
        if getattr(self.network, "taskname", None) != "detection" or not self.network.use_kps:
            raise ValueError(f"{path} is no face detector with landmarks. {HOW_TO_GET}")
        self.network.prepare(ctx_id=0, det_thresh=0.3)
        version = importlib.metadata.version("insightface")
        self.info = {"name": f"{path.parent.name}/{path.stem}", "version": version}

    def __call__(self, picture: np.ndarray, smallest: int) -> list[DetectedFace]:
        size = detection_size(*picture.shape[:2], smallest)
        boxes, landmarks = self.network.detect(np.ascontiguousarray(picture[..., ::-1]), input_size=size)
        faces = zip(boxes, landmarks, strict=True)
        return largest_first(
            [DetectedFace(b[:4].astype(np.float32), p.astype(np.float32), float(b[4])) for b, p in faces]
        )


def detection_size(height: int, width: int, smallest: int) -> tuple[int, int]:
    """Width and height, multiples of 32, at which a face of `smallest` pixels measures 20: SCRFD's limit."""
    scale = min(1.0, 20 / smallest)
    return tuple(min(1280, max(320, math.ceil(side * scale / 32) * 32)) for side in (width, height))


def largest_first(faces: list[DetectedFace]) -> list[DetectedFace]:
    return sorted(faces, key=lambda face: (-face_size(face.box), *face.box.tolist()))


def face_size(box: np.ndarray) -> float:
    """The shorter side, pixels."""
    return float((box[2:] - box[:2]).min()) + 1


def load_detector(name_or_folder: str = "auto", root: str = DEFAULT_ROOT) -> FaceDetector:
    """The detector, built once per process.

    Args:
        name_or_folder: "dlib", the name or folder of an insightface pack, its detector's ONNX file, or "auto": the
            first of PACKS that is there, else dlib.
        root: insightface's root folder.

    Raises:
        FileNotFoundError: no such pack, or one without detector.
        ValueError: several detectors, or a file that is none.
    """
    if name_or_folder == "auto":
        name_or_folder = next((name for name in PACKS if find_detector(name, root)), "dlib")
    check_detector(name_or_folder, root)
    return build_detector(None if name_or_folder == "dlib" else find_detector(name_or_folder, root))


@lru_cache(maxsize=2)
def build_detector(path: Path | None) -> FaceDetector:
    return Remembering(DlibDetector() if path is None else PackDetector(path))


def check_detector(name_or_folder: str, root: str) -> None:
    """Raises what `load_detector` raises, as far as names tell."""
    if name_or_folder not in ("auto", "dlib") and find_detector(name_or_folder, root) is None:
        raise FileNotFoundError(
            f"No face detector {name_or_folder!r}: looked for {' or '.join(DETECTION_PATTERNS)} there and in "
            f"{Path(root).expanduser() / 'models' / name_or_folder}. {HOW_TO_GET} Or take detector=dlib."
        )


def check_sizes(smallest: int, min_face_size: int) -> None:
    """
    Raises:
        ValueError: faces that would be large enough are not looked for.
    """
    if smallest > min_face_size:
        raise ValueError(f"smallest={smallest} must not exceed min_face_size={min_face_size}.")


def find_detector(name_or_folder: str, root: str) -> Path | None:
    """The detector's ONNX file, None where there is none; ValueError where there are several."""
    given = Path(name_or_folder).expanduser()
    if given.suffix == ".onnx":
        return given if given.is_file() else None
    for folder in (Path(root).expanduser() / "models" / given, given):
        if folder.is_dir():
            folder = repair_nested_pack(folder)
            found = sorted(file for pattern in DETECTION_PATTERNS for file in folder.glob(pattern))
            if len(found) > 1:
                raise ValueError(f"{folder} holds several face detectors ({found}): give one of these files.")
            if found:
                return found[0]
    return None


class Remembering:
    """A detector that knows the last picture again: two stages that look at one picture detect once."""

    def __init__(self, detector: FaceDetector) -> None:
        self.detector, self.info, self.sure = detector, detector.info, detector.sure
        self.last: tuple[np.ndarray | None, int, list[DetectedFace]] = (None, 0, [])

    def __call__(self, picture: np.ndarray, smallest: int) -> list[DetectedFace]:
        if self.last[0] is not picture or self.last[1] != smallest:
            self.last = picture, smallest, self.detector(picture, smallest)
        return self.last[2]


# Stages


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


def square_around(box: np.ndarray, margin: float, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """x, y and side of a square `margin` boxes wide, the face in its middle where the borders allow."""
    height, width = shape[:2]
    side = min(round(margin * float((box[2:] - box[:2]).max())), height, width)
    x, y = np.clip(np.round(centre(box) + 0.5 - side / 2), 0, [width - side, height - side]).astype(int).tolist()
    return x, y, side


def centre(box: np.ndarray) -> np.ndarray:
    return (box[:2] + box[2:]) / 2


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
