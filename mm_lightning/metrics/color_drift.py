"""Whether colours stay. Letters: B videos, F frames, H W pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_lightning.metrics.arithmetic import check_video
from mm_lightning.metrics.base import VideoMetric


def color_drift(colors: Tensor) -> Tensor:
    """Mean colours of frames (B, F, 3) -> (B,), the mean distance of the later ones from the first; NaN for F = 1."""
    return torch.linalg.vector_norm(colors[:, 1:] - colors[:, :1], dim=-1).mean(1)


class ColorDrift(VideoMetric):
    """How far the mean colour wanders from the first frame's: in [0, 255 * sqrt(3)] grey levels, lower is better.

    Of a video: the mean over the later frames of the Euclidean distance between their mean RGB and the first frame's.
    Ours: the paper says that training on images alone shifts colours in video, and gives no figure for it. A camera
    that moves or a light that changes counts too, so compare models on the same prompts.

    NaN for a video of one frame.
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    def update(self, video: Tensor) -> None:
        """video: (B, F, 3, H, W) in [-1, 1]; raises ValueError for another."""
        check_video(video)
        self.append(color_drift(video.mean((-1, -2), dtype=torch.float64) * 127.5))
