"""How the people of the miniature lie on disk: who is in which split, what the folders are called, how to read them.

    {people}/settings.json
    {people}/{train,validation,test}/{images,videos}/index.json, {split}-000000.tar, ...
    {people}/{train,validation,test}/queries.safetensors

Keys: person p00017 has the stills p00017-s0, p00017-s1, ... and the clips p00017-c0, ...
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm_lightning.prepare.shards import INDEX_NAME

SETTINGS_NAME = "settings.json"
KINDS = {"images": "image", "videos": "video"}
# Index of each split's first person: more training people never change who is held out.
FIRST_PERSON = {"train": 0, "validation": 80_000, "test": 90_000}
SPLITS = tuple(FIRST_PERSON)
MAX_PEOPLE = {"train": 80_000, "validation": 10_000, "test": 10_000}
VAE_STEP = 8  # pixels per latent pixel


@dataclass(frozen=True)
class WorldSettings:
    """Who and how much is rendered: people per split, stills and clips per person, sizes in pixels and frames.

    `references` bounds the reference stills of a sample; `people_per_shard` counts people, not samples.

    Raises:
        ValueError: a number that cannot be.
    """

    train: int = 1200
    validation: int = 64
    test: int = 64
    stills: int = 4
    clips: int = 1
    size: int = 64
    num_frames: int = 17
    fps: int = 8
    references: int = 4
    people_per_shard: int = 150
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"stills": 2, "size": 32, "num_frames": 5, "fps": 1, "references": 1, "people_per_shard": 1}
        for name in (field.name for field in fields(self)):
            value, minimum = getattr(self, name), least.get(name, 0)
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}.")
        for split, most in MAX_PEOPLE.items():
            if getattr(self, split) > most:
                raise ValueError(f"{split}={getattr(self, split)}: there are {most} people in this split at most.")
        if self.size % VAE_STEP:
            raise ValueError(f"size={self.size}: the VAE needs a multiple of {VAE_STEP}.")
        if self.num_frames % 4 != 1:
            raise ValueError(f"num_frames={self.num_frames}: the video VAE takes 4k+1 frames.")
        if not self.train + self.validation + self.test:
            raise ValueError("train, validation and test are all 0: there is nobody to render.")

    @property
    def splits(self) -> dict[str, range]:
        """Indices of the people of every split that has any."""
        counts = {split: getattr(self, split) for split in SPLITS if getattr(self, split)}
        return {split: range(FIRST_PERSON[split], FIRST_PERSON[split] + count) for split, count in counts.items()}


class StoredSample(NamedTuple):
    """A sample as it lies in a tar."""

    key: str
    fields: dict[str, bytes]  # by extension: "jpg", "txt", "json", "ref0.jpg", ...

    @property
    def meta(self) -> dict[str, Any]:
        return json.loads(self.fields["json"])


def read_index(folder: Path) -> dict[str, Any]:
    """
    Raises:
        FileNotFoundError: no finished shards lie there.
    """
    file = folder / INDEX_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no finished shards ({INDEX_NAME} is missing). `python -m mm_lightning.miniature.world "
            "unpack --out FOLDER` writes the people that come with the package, `world render` makes new ones."
        )
    return json.loads(file.read_text())


def read_samples(folder: Path) -> Iterator[StoredSample]:
    """Every sample of a folder of shards (`{people}/{split}/images`), in stored order; raises as `read_index`."""
    for shard in read_index(folder)["shards"]:
        yield from read_tar((folder / shard["name"]).read_bytes())


def read_tar(data: bytes) -> Iterator[StoredSample]:
    """The samples of a tar; files of one sample stand in a row."""
    sample: StoredSample | None = None
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = StoredSample(key, {})
            sample.fields[extension] = tar.extractfile(member).read()
    if sample is not None:
        yield sample


def set_digest(folder: Path) -> str:
    """Says which samples a folder of shards holds: what is derived from others is stale. Raises as `read_index`."""
    digests = [shard["sha256"] for shard in read_index(folder)["shards"]]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def decode_still(data: bytes) -> NDArray[np.uint8]:
    """Encoded picture -> (H, W, 3) RGB."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def decode_clip(data: bytes) -> NDArray[np.uint8]:
    """Encoded video -> (F, H, W, 3) RGB; threads take ten times as long to hand over a picture this small."""
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0)])
