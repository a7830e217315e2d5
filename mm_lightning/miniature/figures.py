"""The figures of the table, as formulas: identification, similarity and its decay, facial motion, drift of colour.

Facial motion follows the MagicMirror paper (ICCV 2025) as read in the README; similarity is its cosine of dlib's
embedding with the average over several references.

Letters: K clips, F sampled frames, P people, E width of the embedding, H W pixels. Landmarks are five points in pixels,
(0, 0) the centre of the first pixel; frames without a face are NaN, or False in `found`, and NaN comes out where no
frame is left to judge.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
NUM_FACIAL_FRAMES = 16


class Similarity(NamedTuple):
    """Cosines of a clip's frames with people."""

    own: float  # with its own person, mean over frames
    others: float  # with all others, mean over frames and people
    decay: float  # how far the similarity to its own person falls from the first frame to the last

    @property
    def margin(self) -> float:
        """What the clip has of its person beyond what any face has."""
        return self.own - self.others


def sample_frames(num_frames: int, count: int = NUM_FACIAL_FRAMES) -> list[int]:
    """`count` frames at equal distances from the first to the last, all where there are no more."""
    return np.unique(np.linspace(0, num_frames - 1, min(count, num_frames)).round().astype(int)).tolist()


# Whose face is it? ----------------------------------------------------------------------------------------------------


def identification_rank(embedding: Array | None, gallery: Array, own: int) -> int | None:
    """At which place, from 1, the own person comes when people are sorted by Euclidean distance to the embedding.

    Ties count against it. A clip without a face (None) has no place: a miss, however many places count.

    Args:
        embedding: (E,), the mean over a clip's frames.
        gallery: (P, E), the mean over each person's pictures.
        own: row of the gallery.
    """
    if embedding is None:
        return None
    distance = np.linalg.norm(gallery - embedding, axis=1)  # (P,)
    return int((np.delete(distance, own) <= distance[own]).sum()) + 1


def top_share(ranks: Sequence[int | None], k: int) -> float:
    """Share of all clips whose own person is among the first k."""
    return float(np.mean([rank is not None and rank <= k for rank in ranks])) if ranks else float("nan")


def similarity(embeddings: Array, gallery: Array, own: int, times: Sequence[float]) -> Similarity:
    """Cosine similarity of frames to each person's average reference.

    The decay is the drop of the straight line that fits the similarity best, from the clip's first to its last frame.

    Args:
        embeddings: (F, E) of the frames that show a face.
        gallery: (P, E), averages over references.
        own: row of the gallery.
        times: where each of these frames stands in the clip, 0 for the first and 1 for the last.
    """
    if len(embeddings) == 0:
        return Similarity(*[float("nan")] * 3)
    cosines = _unit(embeddings) @ _unit(gallery).T  # (F, P)
    ours = cosines[:, own]
    others = np.delete(cosines, own, axis=1)
    mean_others = float(others.mean()) if others.size else float("nan")
    return Similarity(float(ours.mean()), mean_others, -_slope(np.asarray(times, float), ours))


def _unit(vectors: Array) -> Array:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _slope(times: Array, values: Array) -> float:
    if len(values) < 2 or np.ptp(times) == 0:
        return float("nan")
    return float(np.polyfit(times, values, 1)[0])


# Does it move? --------------------------------------------------------------------------------------------------------


def in_box(landmarks: Array, box: Array) -> Array:
    """Landmarks (..., 5, 2) with the face box (..., 4), x0 y0 x1 y1, as unit square."""
    return (landmarks - box[..., None, :2]) / (box[..., None, 2:] - box[..., None, :2])


def in_frame(landmarks: Array, height: int, width: int) -> Array:
    """Landmarks (..., 5, 2) with the whole frame as unit square."""
    return (landmarks + 0.5) / np.array([width, height])


def fm_ref(landmarks: Array, boxes: Array, ref_landmarks: Array, ref_box: Array) -> float:
    """FM_ref: how far the face's expression and pose are from the reference's.

    Five landmarks in coordinates of the face box, so that position, size and aspect drop out; the sum over the points
    of the distance to the reference's, the mean over frames.

    Args:
        landmarks, boxes: (F, 5, 2) and (F, 4), NaN where a frame shows no face.
        ref_landmarks, ref_box: (5, 2) and (4,), the reference's.
    """
    distance = np.linalg.norm(in_box(landmarks, boxes) - in_box(ref_landmarks, ref_box), axis=-1).sum(-1)  # (F,)
    return mean_of_known(distance)


def fm_inter(landmarks: Array, height: int, width: int) -> float:
    """FM_inter: how far the face moves within a clip.

    Five landmarks in coordinates of the whole frame, so that translation counts; the sum over the points of the
    distance between two frames, the largest over all pairs of frames. NaN with fewer than two faces.

    Args:
        landmarks: (F, 5, 2), NaN where a frame shows no face.
    """
    points = in_frame(landmarks, height, width)
    points = points[~np.isnan(points).any(axis=(1, 2))]
    if len(points) < 2:
        return float("nan")
    pairs = np.linalg.norm(points[:, None] - points[None], axis=-1).sum(-1)  # (F, F)
    return float(pairs.max())


def colour_drift(frames: NDArray[np.uint8]) -> float:
    """How far the mean colour of (F, H, W, 3) is from the first frame's: mean distance of the later ones, of 255."""
    colours = frames.reshape(len(frames), -1, 3).astype(np.float64).mean(1)  # (F, 3)
    if len(colours) < 2:
        return 0.0
    return float(np.linalg.norm(colours[1:] - colours[0], axis=1).mean())


# Several clips --------------------------------------------------------------------------------------------------------


def mean_of_known(values: Sequence[float] | Array) -> float:
    """Mean without NaN; NaN where nothing else is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(np.nanmean(np.asarray(values, dtype=np.float64))) if len(values) else float("nan")
