"""Where the faces of many small pictures are: dlib's detector and landmarks, in several processes.

Letters: N pictures, H W pixels. Coordinates are pixels of the picture as given, (0, 0) the centre of the first.
"""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import cv2
import dlib
import numpy as np
from tqdm import tqdm

from mm_lightning.encoders.detector import LANDMARKS_FILE, five_points, model_path

SIDE = 192  # pixels; a face of the miniature then fills more than dlib's window of 80
CHUNK = 32
WORTH_A_PROCESS = 256  # pictures; starting a process takes about as long as these


class Detections(NamedTuple):
    """The best face of each picture; zeros where none was found."""

    found: np.ndarray  # (N,) bool
    boxes: np.ndarray  # (N, 4) float32, x0 y0 x1 y1
    landmarks: np.ndarray  # (N, 5, 2) float32, eyes, nose, mouth corners; the viewer's left first
    scores: np.ndarray  # (N,) float32, dlib's, above 0 where found


def detect(frames: np.ndarray, num_workers: int = 2, side: int = SIDE, progress: str | None = None) -> Detections:
    """RGB (N, H, W, 3) uint8 -> the best face of each picture, by dlib's HOG detector and its 68 landmarks.

    Args:
        num_workers: processes, at most; few pictures are searched in this one. Started afresh (spawn), so a script
            that asks for more than one keeps its work under `if __name__ == "__main__":`.
        side: the pictures' shorter side is enlarged to so many pixels, as dlib overlooks faces below 80.
        progress: name of a progress bar; None shows none.

    Raises:
        ValueError: pictures of another shape or type.
        FileNotFoundError: dlib's landmark model is not installed.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be RGB uint8 (N, H, W, 3), got {frames.dtype} {frames.shape}.")
    model_path(LANDMARKS_FILE)
    chunks = [frames[i : i + CHUNK] for i in range(0, len(frames), CHUNK)]
    workers = max(min(num_workers, len(frames) // WORTH_A_PROCESS), 1)
    with mapper(workers) as apply, tqdm(total=len(frames), desc=progress, disable=progress is None) as bar:
        parts = [empty_detections(0)]
        for part in apply(functools.partial(detect_chunk, side=side), chunks):
            parts.append(part)
            bar.update(len(part.found))
    return Detections(*map(np.concatenate, zip(*parts, strict=True)))


@contextmanager
def mapper(num_workers: int) -> Iterator[type[map]]:
    """`map`, or its like over processes."""
    if num_workers == 1:
        yield map
        return
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        yield pool.imap


def empty_detections(num_frames: int) -> Detections:
    return Detections(
        found=np.zeros(num_frames, bool),
        boxes=np.zeros((num_frames, 4), np.float32),
        landmarks=np.zeros((num_frames, 5, 2), np.float32),
        scores=np.zeros(num_frames, np.float32),
    )


def detect_chunk(frames: np.ndarray, side: int) -> Detections:
    detections = empty_detections(len(frames))
    for i, picture in enumerate(enlarge(frames, side)):
        rectangles, scores, _ = face_detector().run(picture, 0, 0.0)
        if not rectangles:
            continue
        rectangle = rectangles[0]  # sorted by score
        points = np.array([(p.x, p.y) for p in landmark_predictor()(picture, rectangle).parts()], np.float32)
        box = np.array([rectangle.left(), rectangle.top(), rectangle.right(), rectangle.bottom()], np.float32)
        detections.found[i], detections.scores[i] = True, scores[0]
        detections.boxes[i] = shrink(box, side / min(frames.shape[1:3]))
        detections.landmarks[i] = shrink(five_points(points), side / min(frames.shape[1:3]))
    return detections


def enlarge(frames: np.ndarray, side: int) -> Iterable[np.ndarray]:
    height, width = frames.shape[1:3]
    scale = side / min(height, width)
    size = round(width * scale), round(height * scale)
    return (cv2.resize(frame, size, interpolation=cv2.INTER_CUBIC) for frame in frames)


def shrink(positions: np.ndarray, scale: float) -> np.ndarray:
    """Positions in the enlarged picture -> in the picture; both count from the centre of their first pixel."""
    return (positions + 0.5) / scale - 0.5


@functools.cache
def face_detector() -> dlib.fhog_object_detector:
    return dlib.get_frontal_face_detector()


@functools.cache
def landmark_predictor() -> dlib.shape_predictor:
    return dlib.shape_predictor(str(model_path(LANDMARKS_FILE)))
