"""The identity query of every still, by dlib's recogniser: it takes a tenth of a second each, so it is stored.

Letters: N stills of a split, R references.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from mm_lightning.devices import find_device
from mm_lightning.encoders.packs import DEFAULT_ROOT
from mm_lightning.encoders.recognizer import DLIB_STATISTICS, FaceRecognizer, load_recognizer
from mm_lightning.files import write_bytes
from mm_lightning.miniature.layout import SPLITS, StoredSample, decode_still, read_samples, set_digest

QUERIES_NAME = "queries.safetensors"
PARTIAL_SUFFIX = ".partial"
RECOGNIZER = "dlib"
BATCH = 32  # a batch of one is oddly slow on a CPU


class Queries(NamedTuple):
    """Raw embeddings, of half precision when stored."""

    rows: dict[str, int]  # key of a still -> row
    values: Tensor  # (N, 128) float32
    record: dict[str, str]  # the recogniser, see `describe_recognizer`

    def of(self, keys: Sequence[str]) -> Tensor:
        """(R, 128)."""
        return self.values[[self.rows[key] for key in keys]]


def load_queries(split: Path) -> Queries:
    """The stored queries of `{people}/{split}`.

    Raises:
        FileNotFoundError: nobody computed them.
        ValueError: they are those of other stills.
    """
    file = split / QUERIES_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: run `python -m mm_lightning.miniature.world queries --people {split.parent}`."
        )
    values, meta = read_queries(file)
    if meta["images"] != set_digest(split / "images"):
        raise ValueError(f"{file} is of other stills: remove it and run `world queries` again.")
    rows = {key: row for row, key in enumerate(json.loads(meta["keys"]))}
    return Queries(rows, values.float(), json.loads(meta["recognizer"]))


def read_queries(file: Path) -> tuple[Tensor, dict[str, str]]:
    """(N, 128) float16 and what was recorded with them."""
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor("queries"), tensors.metadata()


def embed_people(people: Path) -> None:
    """Embeds every still of every split that has no queries yet; goes on where it was cut.

    Raises:
        FileNotFoundError: there are no people.
    """
    splits = [people / split for split in SPLITS if (people / split).is_dir()]
    if not splits:
        raise FileNotFoundError(f"{people} holds none of {', '.join(SPLITS)}: render or unpack people first.")
    for split in splits:
        embed_split(split)


def write_statistics(people: Path, file: Path = DLIB_STATISTICS) -> None:
    """Mean and standard deviation (128,) of the train people's queries, for `dlib_standardized`.

    Raises:
        FileNotFoundError, ValueError: as `load_queries`.
    """
    values = load_queries(people / "train").values.double()
    statistics = {"mean": values.mean(0).float(), "std": values.std(0).float()}
    write_bytes(file, save(statistics, {"people": set_digest(people / "train/images"), "recognizer": RECOGNIZER}))


def embed_split(split: Path) -> None:
    """Writes `{split}/queries.safetensors`."""
    from mm_lightning.provenance import describe_recognizer  # takes seconds, and every renderer imports this

    file, digest = split / QUERIES_NAME, set_digest(split / "images")
    if file.is_file() and read_queries(file)[1]["images"] == digest:
        return
    samples = list(read_samples(split / "images"))
    meta = {
        "keys": json.dumps([sample.key for sample in samples]),
        "images": digest,
        "recognizer": json.dumps(describe_recognizer(RECOGNIZER, DEFAULT_ROOT)),
    }
    partial = file.with_name(file.name + PARTIAL_SUFFIX)
    embed_samples(samples, meta, partial)
    partial.replace(file)


def embed_samples(samples: list[StoredSample], meta: dict[str, str], partial: Path) -> None:
    """Embeds what `partial` lacks, and saves it after every batch."""
    done = torch.empty(0, 128, dtype=torch.float16)
    if partial.is_file() and read_queries(partial)[1] == meta:
        done = read_queries(partial)[0]
    recognizer = load_recognizer(RECOGNIZER, DEFAULT_ROOT).to(find_device())
    with tqdm(total=len(samples), initial=len(done), desc=f"queries of {partial.parent.name}", unit="still") as bar:
        for start in range(len(done), len(samples), BATCH):
            batch = samples[start : start + BATCH]
            done = torch.cat([done, embed(recognizer, batch).half().cpu()])
            write_bytes(partial, save({"queries": done}, meta))
            bar.update(len(batch))


@torch.inference_mode()
def embed(recognizer: FaceRecognizer, samples: Sequence[StoredSample]) -> Tensor:
    """Stills -> (N, 128) float32, aligned by the landmarks that were rendered with them, as
    `mm_lightning.encoders.face.FaceFeatureEncoder` does with references of the same size."""
    pictures = np.stack([decode_still(sample.fields["jpg"]) for sample in samples])
    landmarks = np.stack([sample.meta["faces"][0]["landmarks"] for sample in samples])
    device = recognizer.template.device
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return recognizer.embed(pixels.to(device), torch.from_numpy(landmarks).float().to(device))
