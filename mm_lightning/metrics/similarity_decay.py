"""Whether the face stays the person's. Letters: B videos, F frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_lightning.metrics.arithmetic import (
    NUM_FACIAL_FRAMES,
    check_count,
    check_faces,
    check_references,
    masked_mean,
    mean_embedding,
    sample_frames,
)
from mm_lightning.metrics.base import VideoMetric
from mm_lightning.metrics.id_similarity import frame_similarity
from mm_lightning.types import ReferenceFaces, VideoFaces


def fitted_drop(values: Tensor, known: Tensor, times: Tensor) -> Tensor:
    """How far the straight line that fits (B, F) values best falls from time 0 to time 1.

    Args:
        known: (B, F) bool, the values that count.
        times: (F,).

    Returns:
        (B,), NaN where fewer than two times are known.
    """
    times = times - masked_mean(times.expand_as(values), known)[:, None]  # (B, F)
    values = values - masked_mean(values, known)[:, None]
    covariance = torch.where(known, times * values, 0.0).sum(-1)
    variance = torch.where(known, times.square(), 0.0).sum(-1)
    return torch.where(known.sum(-1) > 1, -covariance / variance, torch.nan)


class SimilarityDecay(VideoMetric):
    """Drop of the ID similarity over a video, of MagicMirror (ICCV 2025): in cosine, 0 is best, lower is better.

    Of a video: by how much the least-squares line through the similarities of `num_frames` uniformly sampled frames
    falls from the first frame to the last; below 0 where the similarity grows. The paper gives no formula: a line uses
    all frames, where first minus last would rest on two. Similarity as in `AverageIDSimilarity`.

    NaN with fewer than two sampled frames with a face or no reference.
    """

    higher_is_better = False

    def __init__(self, num_frames: int = NUM_FACIAL_FRAMES, **kwargs: Any) -> None:
        check_count("num_frames", num_frames, least=2)
        super().__init__(settings=(num_frames,), **kwargs)
        self.num_frames = num_frames

    def update(self, faces: VideoFaces, references: ReferenceFaces) -> None:
        """Raises ValueError for tensors that do not fit together."""
        check_faces(faces)
        check_references(references, faces)
        total = faces.found.shape[1]
        frames = sample_frames(total, self.num_frames)
        reference = mean_embedding(references.embeddings, references.mask)  # (B, E)
        similarity = frame_similarity(faces.embeddings[:, frames].double(), reference.double())
        times = similarity.new_tensor(frames) / max(total - 1, 1)
        self.append(fitted_drop(similarity, faces.found[:, frames], times))
