"""A small set of people in the miniature's format: real faces that packages ship, moved by moving the crop.

The clip of each pans over the picture, so that its landmarks are known in every frame.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mm_lightning.encoders.detector import DetectedFace, DlibFaceDetector
from mm_lightning.files import write_json
from mm_lightning.miniature.layout import SETTINGS_NAME, WorldSettings
from mm_lightning.prepare.shards import ShardWriter
from mm_lightning.prepare.stages.encode import jpeg, mp4

SIZE, NUM_FRAMES = 64, 17
PICTURES = (("skimage", "data/astronaut.png"), ("insightface", "data/images/t1.jpg"))
STILLS = ((0.0, 0.0, 1.7), (0.06, 0.0, 1.6), (-0.05, 0.05, 1.75), (0.03, -0.05, 1.65))  # shifts and side, in boxes
PAN = 0.25  # of a face box, from the first frame to the last


class View(NamedTuple):
    """A square of a picture, at the miniature's size."""

    pixels: np.ndarray  # (64, 64, 3) uint8
    face: dict  # box and landmarks in its pixels


def find_people() -> list[tuple[np.ndarray, DetectedFace]]:
    """Up to seven people: a picture and a face in it."""
    detector, people = DlibFaceDetector(), []
    for package, file in PICTURES:
        root = Path(importlib.util.find_spec(package).origin).parent
        picture = np.asarray(Image.open(root / file).convert("RGB"))
        people += [(picture, face) for face in detector(picture)]
    return people


def view(picture: np.ndarray, face: DetectedFace, dx: float, dy: float, side: float) -> View:
    width = face.box[2] - face.box[0]
    centre = (face.box[:2] + face.box[2:]) / 2 + np.array([dx, dy - 0.1]) * width
    corner, length = centre - side * width / 2, side * width
    box = (*corner, *(corner + length))
    pixels = Image.fromarray(picture).transform(
        (SIZE, SIZE), Image.Transform.EXTENT, tuple(float(v) for v in box), Image.Resampling.BILINEAR
    )

    def place(points: np.ndarray) -> list:
        return (((points + 0.5 - corner) * SIZE / length) - 0.5).tolist()

    face_box = np.ravel(place(face.box.reshape(2, 2))).tolist()
    return View(np.asarray(pixels), {"box": face_box, "landmarks": place(face.landmarks)})


def describe(person: str, views: list[View], references: dict[str, View]) -> dict:
    return {
        "identity": person,
        "width": SIZE,
        "height": SIZE,
        "fps": None if len(views) == 1 else 8.0,
        "num_frames": len(views),
        "faces": [view.face for view in views],
        "references": [
            {"file": f"ref{i}.jpg", "key": key, **ref.face, "similarity": 1.0}
            for i, (key, ref) in enumerate(references.items())
        ],
    }


def reference_files(references: dict[str, View]) -> dict[str, bytes]:
    return {f"ref{i}.jpg": jpeg(still.pixels) for i, still in enumerate(references.values())}


def write_people(folder: Path, captions: tuple[str, ...] = ("A man img smiles, in front of a green wall",)) -> Path:
    """`folder/{images,videos}` with every still and one clip of each person; returns the folder."""
    people = find_people()
    with ShardWriter(folder / "images", "image") as images, ShardWriter(folder / "videos", "video") as videos:
        for index, (picture, face) in enumerate(people):
            person, caption = f"p{index:05d}", captions[index % len(captions)]
            stills = {f"{person}-s{i}": view(picture, face, *place) for i, place in enumerate(STILLS)}
            for key, still in stills.items():
                others = {name: other for name, other in stills.items() if name != key}
                own = {"jpg": jpeg(still.pixels), "txt": caption, "json": describe(person, [still], others)}
                images.write(key, own | reference_files(others))
            steps = np.linspace(-PAN / 2, PAN / 2, NUM_FRAMES)
            frames = [view(picture, face, step, 0.0, 1.7) for step in steps]
            clip = mp4([frame.pixels for frame in frames], Fraction(8), 12, "medium")
            own = {"mp4": clip, "txt": caption, "json": describe(person, frames, stills)}
            videos.write(f"{person}-c0", own | reference_files(stills))
    return folder


def write_settings(folder: Path, people: int = 7) -> None:
    """What says that the people of all splits are there."""
    settings = WorldSettings(train=people, validation=people, test=people)
    write_json(folder / SETTINGS_NAME, {"settings": asdict(settings), "made_with": {}})
