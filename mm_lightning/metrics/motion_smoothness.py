"""Whether things move on as they moved. Letters: B videos, F frames, N flows, H W pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_lightning.metrics.arithmetic import check_video
from mm_lightning.metrics.base import VideoMetric
from mm_lightning.metrics.optical_flow import OpticalFlow, load_flow, video_flow


def carry(values: Tensor, flows: Tensor) -> tuple[Tensor, Tensor]:
    """What stands in `values` (N, C, H, W) where the flows (N, 2, H, W) lead to.

    Returns:
        (N, C, H, W), bilinear, and (N, H, W) bool, False where the flow leaves the frame.
    """
    height, width = flows.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    target = torch.stack([x, y]).to(flows) + flows  # (N, 2, H, W)
    limits = flows.new_tensor([width - 1, height - 1])[:, None, None]
    inside = ((target >= 0) & (target <= limits)).all(1)
    grid = (2 * target / limits - 1).movedim(1, -1)  # align_corners: the outer pixels' centres at -1 and 1
    return F.grid_sample(values, grid, mode="bilinear", padding_mode="border", align_corners=True), inside


def flow_change(flows: Tensor) -> Tensor:
    """Consecutive flows (N, 2, H, W) -> scalar in [0, 1], how much of the motion is change of motion.

    Each pixel is followed to the next frame: sum |v' - v| / sum (|v'| + |v|), v its flow here and v' its flow there.
    0 where nothing moves, NaN for fewer than two flows.
    """
    if len(flows) < 2:
        return flows.new_tensor(torch.nan)
    after, inside = carry(flows[1:], flows[:-1])
    lengths = [torch.linalg.vector_norm(v, dim=1)[inside].sum() for v in (after - flows[:-1], after, flows[:-1])]
    return lengths[0] / (lengths[1] + lengths[2]).clamp_min(torch.finfo(flows.dtype).tiny)


class MotionSmoothness(VideoMetric):
    """Cross-frame consistency of optical flow: in [0, 1], lower is smoother and better.

    Of a video: following each pixel by its flow, the change of the flow from one pair of frames to the next in
    proportion to the motion. 0: everything moves on with constant velocity, or not at all; 0.5: speeds alternate
    between 1 and 3; 1: all motion is turned back in every frame, as in trembling or flicker. Pixels that leave the
    frame are left out. In a nearly still video noise of the estimator weighs as motion: read it beside
    `DynamicDegree`.

    MagicMirror (ICCV 2025) names "cross-frame optical-flow consistency, lower is better" without a formula; this is our
    reading of these words. The paper's values, 0.48 to 0.52, lie in its range; compare only figures that were made
    alike all the same: `flow_name` says with which estimator.

    NaN with fewer than three frames.

    Args:
        flow: the estimator; RAFT if it is at hand, else OpenCV's, see `load_flow`.
        **kwargs: torchmetrics' own.
    """

    higher_is_better = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, flow: OpticalFlow | None = None, **kwargs: Any) -> None:
        flow = flow or load_flow()
        super().__init__(settings=(flow.name,), **kwargs)
        self.flow, self.flow_name = flow, flow.name

    def update(self, video: Tensor) -> None:
        """video: (B, F, 3, H, W) in [-1, 1]; raises ValueError for another."""
        check_video(video)
        self.append(torch.stack([self.judge(frames) for frames in video]))

    def judge(self, frames: Tensor) -> Tensor:
        """(F, 3, H, W) -> scalar, NaN with fewer than three frames."""
        if len(frames) < 3:
            return torch.tensor(torch.nan, device=frames.device)
        return flow_change(video_flow(self.flow, frames).double())
