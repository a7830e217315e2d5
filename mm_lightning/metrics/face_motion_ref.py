"""FM_ref: whether the face moves against the reference. Letters: B videos, F frames, R references."""

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
    sample_frames,
)
from mm_lightning.metrics.base import VideoMetric
from mm_lightning.types import ReferenceFaces, VideoFaces


def in_box(landmarks: Tensor, boxes: Tensor) -> Tensor:
    """Landmarks (..., 5, 2) with the face box (..., 4), x0 y0 x1 y1, as unit square."""
    return (landmarks - boxes[..., None, :2]) / (boxes[..., None, 2:] - boxes[..., None, :2])


def fm_ref(
    landmarks: Tensor, boxes: Tensor, found: Tensor, ref_landmarks: Tensor, ref_boxes: Tensor, ref_mask: Tensor
) -> Tensor:
    """FM_ref of each video.

    Args:
        landmarks, boxes, found: (B, F, 5, 2), (B, F, 4), (B, F) bool.
        ref_landmarks, ref_boxes, ref_mask: (B, R, 5, 2), (B, R, 4), (B, R) bool.

    Returns:
        (B,), NaN where no frame or no reference shows a face.
    """
    offset = in_box(landmarks, boxes)[:, :, None] - in_box(ref_landmarks, ref_boxes)[:, None]  # (B, F, R, 5, 2)
    distance = torch.linalg.vector_norm(offset, dim=-1).sum(-1)  # (B, F, R)
    known = found[:, :, None] & ref_mask[:, None]
    return masked_mean(distance.flatten(1), known.flatten(1))


class FaceMotionRef(VideoMetric):
    """FM_ref of MagicMirror (ICCV 2025): how far expression and pose are from the reference's, in [0, inf).

    Higher is better: a copied face has 0, the paper's models 0.2 to 0.7. Five landmarks in coordinates of the face box,
    so that position, size and aspect drop out; the sum over the points of the distance to the reference's, the mean
    over `num_frames` uniformly sampled frames, in sides of the box. With several references the mean of the distances
    to each. The paper's text leaves sum and mean open; so read it gives the paper's order and magnitude on published
    clips.

    NaN where no sampled frame or no reference shows a face.
    """

    higher_is_better = True
    plot_lower_bound = 0.0

    def __init__(self, num_frames: int = NUM_FACIAL_FRAMES, **kwargs: Any) -> None:
        check_count("num_frames", num_frames)
        super().__init__(settings=(num_frames,), **kwargs)
        self.num_frames = num_frames

    def update(self, faces: VideoFaces, references: ReferenceFaces) -> None:
        """Raises ValueError for tensors that do not fit together."""
        check_faces(faces)
        check_references(references, faces)
        frames = sample_frames(faces.found.shape[1], self.num_frames)
        sampled = faces.landmarks[:, frames], faces.boxes[:, frames], faces.found[:, frames]
        self.append(fm_ref(*sampled, references.landmarks, references.boxes, references.mask))
