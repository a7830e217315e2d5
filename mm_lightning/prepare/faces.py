"""Faces in pictures: dlib's HOG detector, five landmarks out of its 68, its 128-d embedding.

The model files come from the package `face_recognition_models`; it is located, never imported (it wants pkg_resources).
Coordinates are pixels, (0, 0) the centre of the first pixel.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import NamedTuple

import dlib
import numpy as np

LANDMARKS_FILE = "shape_predictor_68_face_landmarks.dat"
RECOGNIZER_FILE = "dlib_face_recognition_resnet_model_v1.dat"


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
        rectangles, scores, _ = self.detector.run(picture, upsampling(*picture.shape[:2]), threshold)
        return [self._locate(picture, r, s) for r, s in zip(rectangles, scores, strict=True)]

    def embed(self, picture: np.ndarray, face: DetectedFace) -> np.ndarray:
        """RGB (H, W, 3) uint8 and a face in it -> (128,) float64, not normalised."""
        shape = self.predictor(_checked(picture), dlib.rectangle(*(round(float(v)) for v in face.box)))
        return np.array(self.recognizer.compute_face_descriptor(picture, shape))

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
