"""Who a sample shows: an embedding by a face recogniser.

Letters: B faces, H W pixels, E embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from mm_lightning.encoders.packs import DEFAULT_ROOT
from mm_lightning.encoders.recognizer import FaceRecognizer, check_recognizer, load_recognizer
from mm_lightning.files import fingerprint
from mm_lightning.prepare.sample import Sample

# Cosine from which on two embeddings mean one person. ArcFace: the paper's. dlib's vectors share a large mean: two
# photographs of one person gave 0.955 to 0.971, those of two people up to 0.909.
SAME_PERSON = {"dlib": 0.92, "arcface": 0.65}


class EmbedIdentity:
    """Embeds the face that was found; of a clip, the mean over some of its frames.

    Args:
        recognizer, root: see `mm_lightning.encoders.recognizer.load_recognizer`.
        num_frames: of a clip, spread over those that show the face.
    """

    name = "identity"
    reasons = ("unreadable",)

    def __init__(self, recognizer: str = "dlib", num_frames: int = 3, root: str = DEFAULT_ROOT) -> None:
        check_embedder(recognizer, root)
        self.recognizer, self.num_frames, self.root = recognizer, num_frames, root

    def models(self) -> dict[str, str]:
        return fingerprint([check_recognizer(self.recognizer, self.root)])

    def __call__(self, sample: Sample) -> list[Sample]:
        embedder = load_embedder(self.recognizer, self.root)
        faces = sample.meta.get("faces", [])
        shown = spread_faces(sample, self.num_frames)
        embeddings = [embedder(sample.frames[i], np.array(faces[i]["landmarks"])) for i in shown]
        sample.embedding = np.mean(embeddings, axis=0, dtype=np.float32)
        sample.meta["recognizer"] = embedder.info
        return [sample]


class FaceEmbedder:
    """A recogniser for single pictures, always on one thread: sums in another order would end in other bits.

    Attributes: `info`, recorded with every sample; `same_person`, its cosine in SAME_PERSON.
    """

    def __init__(self, recognizer: FaceRecognizer, weights: Path) -> None:
        self.recognizer = recognizer
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        self.info = {"name": recognizer.name, "version": f"sha256:{digest[:16]}"}
        self.same_person = same_person(recognizer.name)

    def __call__(self, picture: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        """RGB uint8 (H, W, 3) and five landmarks (5, 2) -> raw embedding (E,) float32."""
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        points = torch.from_numpy(np.asarray(landmarks, np.float32))[None]
        with one_thread(), torch.inference_mode():
            return self.recognizer.embed(pixels, points)[0].float().numpy()


def load_embedder(name_or_folder: str = "dlib", root: str = DEFAULT_ROOT) -> FaceEmbedder:
    """The recogniser, built once per process; raises what `load_recognizer` raises."""
    return build_embedder(name_or_folder, root, check_recognizer(name_or_folder, root))


@lru_cache(maxsize=2)
def build_embedder(name_or_folder: str, root: str, weights: Path) -> FaceEmbedder:
    return FaceEmbedder(load_recognizer(name_or_folder, root), weights)


def check_embedder(name_or_folder: str, root: str) -> None:
    """Raises what `load_recognizer` raises, as far as names tell."""
    check_recognizer(name_or_folder, root)


def same_person(recognizer_name: str) -> float:
    return SAME_PERSON["dlib" if recognizer_name == "dlib" else "arcface"]


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread within: the same bits however many the process may use."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def spread_faces(sample: Sample, count: int) -> list[int]:
    """`count` of the frames in which the face was detected, evenly spread.

    Raises:
        ValueError: no face is recorded: the stages stand in a wrong order.
    """
    faces = sample.meta.get("faces", [])
    shown = [i for i, face in enumerate(faces) if face is not None and face["score"] is not None]
    if not shown:
        raise ValueError(f"{sample.key}: no face is recorded; put DetectFaces or TrackFace before this stage.")
    return spread(shown, count)


def spread(values: list[int], count: int) -> list[int]:
    """`count` of the values, from the middles of as many equal parts; all where there are no more."""
    if len(values) <= count:
        return list(values)
    return [values[int((i + 0.5) * len(values) / count)] for i in range(count)]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """In float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
