"""Faces in pictures: where they are, by dlib or by an insightface pack's detector, and dlib's own embedding.

dlib's files come from the package `face_recognition_models`; it is located, never imported (it wants pkg_resources).
Coordinates are pixels, (0, 0) the centre of the first pixel.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Protocol

import cv2
import dlib
import numpy as np

from mm_lightning.encoders.packs import DEFAULT_ROOT, HOW_TO_GET, repair_nested_pack

LANDMARKS_FILE = "shape_predictor_68_face_landmarks.dat"
RECOGNIZER_FILE = "dlib_face_recognition_resnet_model_v1.dat"
PACKS = ("buffalo_l", "antelopev2")  # what "auto" looks for, in this order
DETECTION_PATTERNS = ("det_*.onnx", "scrfd_*.onnx")
HOG_WINDOW = 80  # pixels of the smallest face that dlib's detector finds
# dlib lets go of the GIL; a detector or network that two threads use at once crashes the process.
ONE_AT_A_TIME = Lock()


class DetectedFace(NamedTuple):
    """One face of one picture."""

    box: np.ndarray  # (4,) float32, x0 y0 x1 y1
    landmarks: np.ndarray  # (5, 2) float32, eyes, nose, mouth corners; the viewer's left first
    score: float | None  # dlib's: above 0, a clear frontal face has 1 to 3; None of one put in between two detections


def model_path(name: str) -> Path:
    """Path of one of the files that `face_recognition_models` ships.

    Raises:
        FileNotFoundError: the package or the file is missing.
    """
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"{name}: the package face_recognition_models is not installed; run `pip install face_recognition_models`."
        )
    path = Path(spec.submodule_search_locations[0]) / "models" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; reinstall the package face_recognition_models.")
    return path


def five_points(points: np.ndarray) -> np.ndarray:
    """iBUG's 68 points (68, 2) -> eye centres, nose tip, mouth corners (5, 2)."""
    eyes = points[36:42].mean(0), points[42:48].mean(0)
    return np.stack([*eyes, points[30], points[48], points[54]]).astype(np.float32)


def upsampling(height: int, width: int) -> int:
    """How often to double the picture: dlib's HOG window finds no face below 80 pixels."""
    side = min(height, width)
    return 0 if side >= 400 else 1 if side >= 128 else 2


class DlibFaceDetector:
    """Detects, locates and embeds faces with dlib, on the CPU.

    Raises:
        FileNotFoundError: the model files are not installed.
    """

    detector_info = {"name": "dlib_frontal_face_detector", "version": dlib.__version__}

    def __init__(self) -> None:
        self.detector = dlib.get_frontal_face_detector()
        self.predictor = dlib.shape_predictor(str(model_path(LANDMARKS_FILE)))
        self.recognizer = dlib.face_recognition_model_v1(str(model_path(RECOGNIZER_FILE)))
        version = importlib.metadata.version("face_recognition_models")
        self.recognizer_info = {"name": Path(RECOGNIZER_FILE).stem, "version": version}

    def __call__(self, picture: np.ndarray, threshold: float = 0.0) -> list[DetectedFace]:
        """RGB (H, W, 3) uint8 -> faces scoring above `threshold`, the best first."""
        picture = _checked(picture)
        rectangles, scores = self._detect(picture, upsampling(*picture.shape[:2]), threshold)
        return [self._locate(picture, r, s) for r, s in zip(rectangles, scores, strict=True)]

    def embed(self, picture: np.ndarray, face: DetectedFace) -> np.ndarray:
        """RGB (H, W, 3) uint8 and a face in it -> (128,) float64, not normalised."""
        shape = self.predictor(_checked(picture), dlib.rectangle(*(round(float(v)) for v in face.box)))
        with ONE_AT_A_TIME:
            return np.array(self.recognizer.compute_face_descriptor(picture, shape))

    def _detect(self, picture: np.ndarray, times_doubled: int, threshold: float) -> tuple[Any, Any]:
        """-> rectangles, their scores."""
        with ONE_AT_A_TIME:
            rectangles, scores, _ = self.detector.run(picture, times_doubled, threshold)
        return rectangles, scores

    def _locate(self, picture: np.ndarray, rectangle: dlib.rectangle, score: float) -> DetectedFace:
        points = np.array([(p.x, p.y) for p in self.predictor(picture, rectangle).parts()], np.float32)
        box = np.array([rectangle.left(), rectangle.top(), rectangle.right(), rectangle.bottom()], np.float32)
        return DetectedFace(box, five_points(points), float(score))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two embeddings. dlib's lie close together: one person above 0.95, two people up to 0.91."""
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def _checked(picture: np.ndarray) -> np.ndarray:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a picture must be RGB uint8 (H, W, 3), got {picture.dtype} {picture.shape}.")
    return np.ascontiguousarray(picture)


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
        rectangles, scores = self._detect(scaled, 0, 0.0)
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
    return build_detector(resolve_detector(name_or_folder, root))


def resolve_detector(name_or_folder: str, root: str) -> Path | None:
    """The ONNX file that `load_detector` takes, None for dlib's; raises as it does."""
    if name_or_folder == "auto":
        name_or_folder = next((name for name in PACKS if find_detector(name, root)), "dlib")
    check_detector(name_or_folder, root)
    return None if name_or_folder == "dlib" else find_detector(name_or_folder, root)


def detector_file(name_or_folder: str, root: str) -> Path:
    """The weights that `load_detector` reads, those of dlib's landmarks for dlib; raises as it does."""
    return resolve_detector(name_or_folder, root) or model_path(LANDMARKS_FILE)


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


def square_around(box: np.ndarray, margin: float, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """x, y and side of a square `margin` boxes wide, the face in its middle where the borders allow."""
    height, width = shape[:2]
    side = min(round(margin * float((box[2:] - box[:2]).max())), height, width)
    x, y = np.clip(np.round(centre(box) + 0.5 - side / 2), 0, [width - side, height - side]).astype(int).tolist()
    return x, y, side


def centre(box: np.ndarray) -> np.ndarray:
    return (box[:2] + box[2:]) / 2
