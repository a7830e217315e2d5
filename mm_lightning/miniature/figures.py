"""The figures of the table, as formulas: identification, similarity and its decay, facial motion, drift of colour.

Facial motion follows the MagicMirror paper (ICCV 2025) as read in the README; similarity is its cosine of dlib's
embedding with the average over several references.

Letters: K clips, F sampled frames, P people, E width of the embedding, H W pixels. Landmarks are five points in pixels,
(0, 0) the centre of the first pixel; frames without a face are NaN, or False in `found`, and NaN comes out where no
frame is left to judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mm_lightning.metrics import arithmetic, color_drift, face_motion_inter, face_motion_ref
from mm_lightning.metrics.arithmetic import sample_frames
from mm_lightning.metrics.face_motion_ref import in_box
from mm_lightning.metrics.id_similarity import frame_similarity
from mm_lightning.metrics.identity_retrieval import identification_ranks, within_top
from mm_lightning.metrics.similarity_decay import fitted_drop

__all__ = [
    "Similarity",
    "colour_drift",
    "fm_inter",
    "fm_ref",
    "identification_rank",
    "in_box",
    "mean_of_known",
    "sample_frames",
    "similarity",
    "top_share",
]

Array = NDArray[np.float64]


class Similarity(NamedTuple):
    """Cosines of a clip's frames with people."""

    own: float  # with its own person, mean over frames
    others: float  # with all others, mean over frames and people
    decay: float  # how far the similarity to its own person falls from the first frame to the last

    @property
    def margin(self) -> float:
        """What the clip has of its person beyond what any face has."""
        return self.own - self.others


def as_tensor(values: Sequence[float] | Array) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float64))


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
    return int(identification_ranks(as_tensor(embedding)[None], as_tensor(gallery), torch.tensor([own])))


def top_share(ranks: Sequence[int | None], k: int) -> float:
    """Share of all clips whose own person is among the first k."""
    return float(within_top(as_tensor([np.inf if rank is None else rank for rank in ranks]), k).mean())


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
    cosines = frame_similarity(as_tensor(embeddings), as_tensor(gallery))  # (P, F)
    ours, others = cosines[own], torch.cat([cosines[:own], cosines[own + 1 :]])
    decay = fitted_drop(ours[None], torch.ones(1, len(ours), dtype=torch.bool), as_tensor(times))
    return Similarity(float(ours.mean()), float(others.mean()), float(decay))


# Does it move? --------------------------------------------------------------------------------------------------------


def fm_ref(landmarks: Array, boxes: Array, ref_landmarks: Array, ref_box: Array) -> float:
    """FM_ref: how far the face's expression and pose are from the reference's.

    Five landmarks in coordinates of the face box, so that position, size and aspect drop out; the sum over the points
    of the distance to the reference's, the mean over frames.

    Args:
        landmarks, boxes: (F, 5, 2) and (F, 4), NaN where a frame shows no face.
        ref_landmarks, ref_box: (5, 2) and (4,), the reference's.
    """
    found = torch.from_numpy(~np.isnan(boxes[:, 0]))
    video = as_tensor(landmarks)[None], as_tensor(boxes)[None], found[None]
    reference = as_tensor(ref_landmarks)[None, None], as_tensor(ref_box)[None, None], torch.ones(1, 1, dtype=torch.bool)
    return float(face_motion_ref.fm_ref(*video, *reference))


def fm_inter(landmarks: Array, height: int, width: int) -> float:
    """FM_inter: how far the face moves within a clip.

    Five landmarks in coordinates of the whole frame, so that translation counts; the sum over the points of the
    distance between two frames, the largest over all pairs of frames. NaN with fewer than two faces.

    Args:
        landmarks: (F, 5, 2), NaN where a frame shows no face.
    """
    found = torch.from_numpy(~np.isnan(landmarks).any(axis=(1, 2)))
    return float(face_motion_inter.fm_inter(as_tensor(landmarks)[None], found[None], torch.tensor([[height, width]])))


def colour_drift(frames: NDArray[np.uint8]) -> float:
    """How far the mean colour of (F, H, W, 3) is from the first frame's: mean distance of the later ones, of 255."""
    colours = frames.reshape(len(frames), -1, 3).mean(1, dtype=np.float64)  # (F, 3)
    return float(color_drift.color_drift(as_tensor(colours)[None])) if len(colours) > 1 else 0.0


# Several clips --------------------------------------------------------------------------------------------------------


def mean_of_known(values: Sequence[float] | Array) -> float:
    """Mean without NaN; NaN where nothing else is there."""
    return float(arithmetic.mean_of_known(as_tensor(values)))
