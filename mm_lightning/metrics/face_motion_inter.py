"""FM_inter: whether the face moves within the video. Letters: B videos, F frames."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_lightning.metrics.arithmetic import NUM_FACIAL_FRAMES, check_count, check_faces, sample_frames
from mm_lightning.metrics.base import VideoMetric
from mm_lightning.types import VideoFaces


def in_frame(landmarks: Tensor, sizes: Tensor) -> Tensor:
    """Landmarks (B, F, 5, 2) with the whole frame as unit square; sizes: (B, 2) height and width."""
    return (landmarks + 0.5) / sizes.flip(-1)[:, None, None]


def fm_inter(landmarks: Tensor, found: Tensor, sizes: Tensor) -> Tensor:
    """FM_inter of each video.

    Args:
        landmarks, found: (B, F, 5, 2), (B, F) bool.
        sizes: (B, 2) height and width, pixels.

    Returns:
        (B,), NaN with fewer than two faces.
    """
    points = in_frame(landmarks, sizes)
    distance = torch.linalg.vector_norm(points[:, :, None] - points[:, None], dim=-1).sum(-1)  # (B, F, F)
    known = found[:, :, None] & found[:, None]
    largest = torch.where(known, distance, -torch.inf).amax((1, 2))
    return torch.where(found.sum(1) > 1, largest, torch.nan)


class FaceMotionInter(VideoMetric):
    """FM_inter of MagicMirror (ICCV 2025): how far the face moves within a video, in [0, 5 * sqrt(2)].

    Higher is better: a still has 0, the paper's models 0.2 to 0.6. Five landmarks in coordinates of the whole frame,
    width and height as 1, so that translation counts; the sum over the points of the distance between two frames, the
    largest over all pairs of `num_frames` uniformly sampled frames. The paper's text leaves the pairs open; so read it
    gives the paper's order and magnitude on published clips. Trembling landmarks count as motion.

    NaN with fewer than two sampled frames with a face.
    """

    higher_is_better = True
    plot_lower_bound = 0.0

    def __init__(self, num_frames: int = NUM_FACIAL_FRAMES, **kwargs: Any) -> None:
        check_count("num_frames", num_frames, least=2)
        super().__init__(settings=(num_frames,), **kwargs)
        self.num_frames = num_frames

    def update(self, faces: VideoFaces) -> None:
        """Raises ValueError for tensors that do not fit together."""
        check_faces(faces)
        frames = sample_frames(faces.found.shape[1], self.num_frames)
        self.append(fm_inter(faces.landmarks[:, frames], faces.found[:, frames], faces.sizes))
