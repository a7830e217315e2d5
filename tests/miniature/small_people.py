"""A few people in the miniature's format without rendering: each a crop of a photograph, moved by moving the crop."""

from __future__ import annotations

from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import numpy as np
from skimage import data

from mm_lightning.files import write_json
from mm_lightning.miniature.layout import FIRST_PERSON, SETTINGS_NAME, WorldSettings
from mm_lightning.prepare.shards import ShardWriter
from mm_lightning.prepare.stages.encode import jpeg, mp4

SETTINGS = WorldSettings(train=5, validation=2, test=1, stills=3, clips=1, size=32, num_frames=17)
WORDS = {"class_word": "girl", "action": ["smile"], "background": "green wall", "light": "warm"}


def crop(rng: np.random.Generator, num_frames: int, size: int) -> np.ndarray:
    """(F, H, W, 3): a window that moves a pixel to the right with every frame."""
    picture = data.astronaut()
    x, y = rng.integers(0, picture.shape[1] - 2 * size - num_frames), rng.integers(0, picture.shape[0] - 2 * size)
    return np.stack([picture[y : y + 2 * size : 2, x + i : x + i + 2 * size : 2] for i in range(num_frames)])


def face_at(index: int) -> dict[str, list]:
    """Another face box for every person."""
    left = 4.0 + index % 4
    points = [[left + 3, 10.0], [left + 9, 11.0], [left + 6, 15.0], [left + 4, 19.0], [left + 8, 20.0]]
    return {"box": [left, 6.0, left + 14, 24.0], "landmarks": points}


def fields_of(person: int, frames: np.ndarray) -> dict[str, bytes | str | dict]:
    meta = {
        "identity": f"p{person:05d}",
        "width": frames.shape[2],
        "height": frames.shape[1],
        "num_frames": len(frames),
        "faces": [face_at(person)] * len(frames),
        "references": [],
        "miniature": WORDS | {"rich_caption": "A girl img with brown hair smiles"},
    }
    target = {"jpg": jpeg(frames[0])} if len(frames) == 1 else {"mp4": mp4(list(frames), Fraction(8), crf=4)}
    return target | {"txt": "A girl img smiles", "json": meta}


def write_people(root: Path, settings: WorldSettings = SETTINGS) -> Path:
    """Shards of all splits; returns `root`."""
    for split, people in settings.splits.items():
        with (
            ShardWriter(root / split / "images", "image", 4, split) as images,
            ShardWriter(root / split / "videos", "video", 4, split) as videos,
        ):
            for person in people:
                rng = np.random.default_rng(person - FIRST_PERSON[split])
                for i in range(settings.stills):
                    images.write(f"p{person:05d}-s{i}", fields_of(person, crop(rng, 1, settings.size)))
                clip = crop(rng, settings.num_frames, settings.size)
                videos.write(f"p{person:05d}-c0", fields_of(person, clip))
    write_json(root / SETTINGS_NAME, {"settings": asdict(settings), "made_with": {}})
    return root
