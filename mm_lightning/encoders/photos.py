"""A user's photos -> square pictures of one face each, as preparation cuts references.

Letters: R photos, H W pixels, S side of a square. Coordinates are pixels, (0, 0) the centre of the first pixel.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mm_lightning.encoders.detector import DetectedFace, FaceDetector, face_size, square_around
from mm_lightning.pictures import to_rgb8

logger = logging.getLogger(__name__)

Photo = str | os.PathLike | Image.Image | NDArray[np.uint8]
MARGIN = 2.0  # side of the square, in face boxes: what preparation gives references
LARGEST_SIDE = 1280  # pixels in which faces are looked for
SMALLEST_SHARE = 1 / 12  # of a photo's shorter side: smaller faces are not looked for
SMALLEST_FACE = 20  # pixels; below, recognisers see nothing
SECOND_LOOK = 1.6  # times the smallest face: a coarser scale finds some that a fine one misses


class ReferencePhotos(NamedTuple):
    """One face each, all of one person."""

    pixels: Tensor  # (1, R, 3, S, S) in [-1, 1]
    landmarks: Tensor  # (1, R, 5, 2) in pixels of the square
    mask: Tensor  # (1, R) bool, all True


class PhotoError(ValueError):
    """A photo that cannot be used, and why."""


def load_photo(photo: Photo) -> NDArray[np.uint8]:
    """A file, a PIL picture or an array -> RGB (H, W, 3) uint8, turned as its EXIF says, transparency on white.

    Raises:
        FileNotFoundError: no such file.
        PhotoError: the file is no picture, damaged or too large, its pixels are floating point, or the array no RGB
            bytes.
    """
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[-1] != 3:
            raise PhotoError(f"A photo as array is RGB uint8 (H, W, 3), got {photo.dtype} {photo.shape}.")
        return photo
    name = "The photo" if isinstance(photo, Image.Image) else os.fspath(photo)
    try:
        with nullcontext(photo) if isinstance(photo, Image.Image) else Image.open(photo) as picture:
            return np.array(to_rgb8(picture))  # Pillow's own cannot be written to
    except FileNotFoundError:
        raise FileNotFoundError(f"No photo at {name}.") from None
    except Image.DecompressionBombError as error:
        raise PhotoError(f"{name} is too large: reduce it to {Image.MAX_IMAGE_PIXELS} pixels or fewer.") from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, RuntimeError) as error:  # decoders raise any
        raise PhotoError(f"{name} cannot be read as a picture ({error}): give a JPEG or PNG.") from error


def describe(photo: Photo, index: int) -> str:
    return os.fspath(photo) if isinstance(photo, str | os.PathLike) else f"photo {index + 1}"


def find_faces(picture: NDArray[np.uint8], detector: FaceDetector) -> list[DetectedFace]:
    """Sure faces, or unsure ones where there are no others, from left to right; large pictures are searched reduced."""
    height, width = picture.shape[:2]
    scale = min(1.0, LARGEST_SIDE / max(height, width))
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    reduced = cv2.resize(picture, size, interpolation=cv2.INTER_AREA) if scale < 1 else picture
    smallest = max(SMALLEST_FACE * scale, min(size) * SMALLEST_SHARE)
    reduced = np.ascontiguousarray(reduced)
    found = detector(reduced, round(smallest)) or detector(reduced, round(smallest * SECOND_LOOK))
    found = [face for face in found if face.score >= detector.sure] or found
    ratio = np.array([width, height], np.float32) / size
    faces = [enlarge(face, ratio) for face in found]
    return sorted(faces, key=lambda face: face.box.tolist())


def enlarge(face: DetectedFace, ratio: NDArray[np.float32]) -> DetectedFace:
    """Positions in the reduced picture -> in the picture; both count from the centre of their first pixel."""
    box = (face.box.reshape(2, 2) + 0.5) * ratio - 0.5
    return DetectedFace(box.reshape(4), (face.landmarks + 0.5) * ratio - 0.5, face.score)


def choose_face(faces: Sequence[DetectedFace], name: str, face_index: int | None = None) -> DetectedFace:
    """The face meant: the only one, the one of that index, or the largest, with a warning.

    Args:
        faces: from left to right.
        name: of the photo, for messages.

    Raises:
        PhotoError: no face, no such index, or a face too small to be known.
    """
    if not faces:
        raise PhotoError(f"No face found in {name}: give a photo that shows it from the front, and not too small.")
    if face_index is not None and not 0 <= face_index < len(faces):
        raise PhotoError(
            f"face_index={face_index}, but {name} shows {len(faces)} faces, from the left 0 to {len(faces) - 1}."
        )
    chosen = max(faces, key=lambda face: face_size(face.box)) if face_index is None else faces[face_index]
    if face_index is None and len(faces) > 1:
        logger.warning("%s shows %d faces; the largest is taken. face_index=0, 1, ... chooses, from the left.",
                       name, len(faces))  # fmt: skip
    if face_size(chosen.box) < SMALLEST_FACE:
        raise PhotoError(
            f"The face in {name} measures {face_size(chosen.box):.0f} pixels, at least {SMALLEST_FACE} are needed: "
            "give a larger photo."
        )
    return chosen


def crop_face(picture: NDArray[np.uint8], face: DetectedFace, side: int) -> tuple[Tensor, Tensor]:
    """A square around the face, `side` pixels wide: (3, S, S) in [-1, 1] and the landmarks in it (5, 2)."""
    x, y, width = square_around(face.box, MARGIN, picture.shape)
    crop = np.ascontiguousarray(picture[y : y + width, x : x + width])
    resized = cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA if side < width else cv2.INTER_CUBIC)
    landmarks = (face.landmarks - [x, y] + 0.5) * (side / width) - 0.5
    return torch.from_numpy(resized).movedim(-1, 0).float() / 127.5 - 1, torch.from_numpy(landmarks).float()


def read_references(
    photos: Sequence[Photo], detector: FaceDetector, face_index: int | None = None, largest: int = 512
) -> ReferencePhotos:
    """Photos of one person, read, searched and cut; they share the side of the smallest, `largest` at most.

    Args:
        face_index: which face of each photo, from the left; None takes the largest.

    Raises:
        FileNotFoundError, PhotoError: as `load_photo` and `choose_face`, naming the photo; no photo at all.
    """
    if not photos:
        raise PhotoError("No reference photo was given: at least one is needed.")
    pictures = [load_photo(photo) for photo in photos]
    names = [describe(photo, i) for i, photo in enumerate(photos)]
    faces = [
        choose_face(find_faces(picture, detector), name, face_index)
        for picture, name in zip(pictures, names, strict=True)
    ]
    sides = [square_around(face.box, MARGIN, picture.shape)[2] for picture, face in zip(pictures, faces, strict=True)]
    crops = [crop_face(picture, face, min(*sides, largest)) for picture, face in zip(pictures, faces, strict=True)]
    pixels, landmarks = (torch.stack(parts)[None] for parts in zip(*crops, strict=True))
    return ReferencePhotos(pixels, landmarks, torch.ones(1, len(photos), dtype=torch.bool))
