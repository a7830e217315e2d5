"""Whether anything moves. Letters: B videos, F frames, N pairs of frames, H W pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_lightning.metrics.arithmetic import check_video
from mm_lightning.metrics.base import VideoMetric
from mm_lightning.metrics.optical_flow import OpticalFlow, load_flow, video_flow

FPS = 8.0  # VBench looks at that many frames per second
STRONGEST = 0.05  # share of the pixels
REFERENCE_SIDE = 256  # the threshold's pixels are those of a frame of this side
MOVING_PAIRS = 4 / 16  # of the frames


def strongest_motion(flows: Tensor) -> Tensor:
    """Flows (N, 2, H, W) -> (N,), the mean length of the longest 5%, in pixels."""
    lengths = torch.linalg.vector_norm(flows, dim=1).flatten(1)  # (N, H * W)
    return lengths.topk(max(int(STRONGEST * lengths.shape[1]), 1), dim=1).values.mean(1)


def is_dynamic(motion: Tensor, threshold: float) -> bool:
    """Whether enough of the (N,) pairs of frames move by more than the threshold, in pixels."""
    needed = max(round(MOVING_PAIRS * (len(motion) + 1)), 1)
    return int((motion > threshold).sum()) >= needed


class DynamicDegree(VideoMetric):
    """Dynamic degree of VBench (CVPR 2024): share of videos that move, in [0, 1], higher is better.

    A video, thinned to 8 frames per second, moves if in a quarter as many pairs of neighbours as it has frames the
    longest 5% of the optical flow exceed `threshold` * min(H, W) / 256 pixels on average (more below 8 frames per
    second, in proportion). Except that at least one pair must move: VBench's rounding lets any video of two frames
    pass. It sees the camera's motion as well as the person's.

    NaN for a video of one frame. VBench estimates flow with RAFT; `flow_name` says what was taken here.

    Args:
        fps: of the videos.
        threshold: pixels per frame.
        flow: the estimator; RAFT if it is at hand, else OpenCV's, see `load_flow`.
        **kwargs: torchmetrics' own.

    Raises:
        ValueError: fps or threshold is not positive.
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(
        self, fps: float = FPS, threshold: float = 6.0, flow: OpticalFlow | None = None, **kwargs: Any
    ) -> None:
        if not (fps > 0 and threshold > 0):
            raise ValueError(f"fps={fps}, threshold={threshold}: give numbers above 0.")
        flow = flow or load_flow()
        super().__init__(settings=(fps, threshold, flow.name), **kwargs)
        self.fps, self.threshold, self.flow, self.flow_name = fps, threshold, flow, flow.name

    def update(self, video: Tensor) -> None:
        """video: (B, F, 3, H, W) in [-1, 1]; raises ValueError for another."""
        check_video(video)
        thinned = video[:, :: max(round(self.fps / FPS), 1)]
        self.append(torch.tensor([self.judge(frames) for frames in thinned]))

    def judge(self, frames: Tensor) -> float:
        """(F, 3, H, W) -> 1 if it moves, 0 if not, NaN for one frame."""
        if len(frames) < 2:
            return torch.nan
        threshold = self.threshold * min(frames.shape[-2:]) / REFERENCE_SIDE * max(1.0, FPS / self.fps)
        return float(is_dynamic(strongest_motion(video_flow(self.flow, frames)), threshold))
