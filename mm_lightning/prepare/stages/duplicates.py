"""Steps over the whole set: duplicates of pictures and of people.

A set-wide step takes a small summary of every sample, `{"key", "meta", "embedding"}` (the embedding a list of numbers,
an array, or None), and says which samples to leave out, whatever the order of the summaries.

Letters: N identities, E embedding.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from mm_lightning.prepare.sample import Rejected
from mm_lightning.prepare.stages.identity import same_person

MARGIN = 1e-4  # float32's error in a product of unit vectors, with room


class DuplicatePictures:
    """Leaves out what was made from a file with the same bytes as another's; the first in the order of keys stays."""

    name = "duplicate_pictures"
    reasons = ("duplicate_picture",)

    def __call__(self, summaries: list[dict[str, Any]]) -> dict[str, Rejected]:
        rejected, kept = {}, {}  # kept: digest -> source
        for summary in sorted(summaries, key=lambda summary: summary["key"]):
            digest, source = summary["meta"].get("source_sha256"), summary["meta"].get("source")
            if digest is None or kept.setdefault(digest, source) == source:
                continue
            rejected[summary["key"]] = Rejected("duplicate_picture", f"the same bytes as {kept[digest]}")
        return rejected


class DuplicateIdentities:
    """Leaves out people who are in the set already, told by the nearest neighbours of their embeddings.

    All samples of one `identity` (windows of one shot) stay or go together. People are taken from the largest face
    down; one is left out if somebody kept is as similar as `min_similarity`, so that no chain of neighbours swallows
    strangers.

    Args:
        min_similarity: cosine from which on two identities count as one; None takes the recogniser's own (0.65 for
            ArcFace, 0.92 for dlib, see `SAME_PERSON`).

    Raises:
        ValueError: when called, for embeddings of different recognisers.
    """

    name = "duplicate_identities"
    reasons = ("duplicate_identity",)

    def __init__(self, min_similarity: float | None = None) -> None:
        self.min_similarity = min_similarity

    def __call__(self, summaries: list[dict[str, Any]]) -> dict[str, Rejected]:
        groups = group_by_identity(summaries)
        if not groups:
            return {}
        names = sorted(groups, key=lambda name: (-median_face_size(groups[name]), name))
        vectors = np.stack([mean_direction(groups[name]) for name in names])  # (N, E)
        threshold = self.threshold(summaries)
        rejected = {}
        for i, j in duplicates(vectors, threshold).items():
            similarity = float(vectors[i] @ vectors[j])
            for summary in groups[names[i]]:
                detail = f"{names[j]}, similarity {similarity:.3f}"
                rejected[summary["key"]] = Rejected("duplicate_identity", detail)
        return rejected

    def threshold(self, summaries: list[dict[str, Any]]) -> float:
        recognizers = {summary["meta"]["recognizer"]["name"] for summary in summaries if has_embedding(summary)}
        if len(recognizers) > 1:
            raise ValueError(f"embeddings of several recognisers, {sorted(recognizers)}: prepare all with one.")
        return same_person(*recognizers) if self.min_similarity is None else self.min_similarity


def duplicates(vectors: np.ndarray, threshold: float) -> dict[int, int]:
    """Unit vectors (N, E), the preferred first -> {left out: the kept one that it repeats}."""
    import faiss  # loads its own OpenMP: only where it is used

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors.astype(np.float32))
    bounds, _, neighbours = index.range_search(vectors.astype(np.float32), threshold - MARGIN)
    left_out: dict[int, int] = {}
    for i in range(len(vectors)):
        near = sorted(int(j) for j in neighbours[bounds[i] : bounds[i + 1]] if j < i and int(j) not in left_out)
        repeated = [j for j in near if vectors[i] @ vectors[j] >= threshold]  # float64 has the last word
        if repeated:
            left_out[i] = max(repeated, key=lambda j: (vectors[i] @ vectors[j], -j))
    return left_out


def group_by_identity(summaries: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Samples with an embedding, by their person, in the order of keys."""
    groups = defaultdict(list)
    for summary in sorted(summaries, key=lambda summary: summary["key"]):
        if has_embedding(summary):
            groups[summary["meta"]["identity"]].append(summary)
    return groups


def has_embedding(summary: dict[str, Any]) -> bool:
    return summary.get("embedding") is not None


def mean_direction(group: list[dict[str, Any]]) -> np.ndarray:
    """(E,) float64 of length one."""
    vectors = np.stack([np.asarray(summary["embedding"], np.float64) for summary in group])
    mean = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(0)
    return mean / np.linalg.norm(mean)


def median_face_size(group: list[dict[str, Any]]) -> float:
    """Shorter side of the face's box, pixels."""
    boxes = [np.array(face["box"]) for summary in group for face in summary["meta"]["faces"] if face]
    return float(np.median([(box[2:] - box[:2]).min() for box in boxes])) if boxes else 0.0
