"""In how many frames a face is seen at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_lightning.metrics.arithmetic import check_faces
from mm_lightning.metrics.base import VideoMetric
from mm_lightning.types import VideoFaces


class FaceDetectionRate(VideoMetric):
    """Share of frames that show a face: in [0, 1], higher is better.

    It belongs beside every figure of faces, as these look at the frames with a face only: a model whose faces fall
    apart in half of the frames would else be judged by the other half. Of a video: the share of its frames;
    `compute`: the mean over videos, each with the same say. `num_faceless_frames` and `num_faceless_videos` count what
    the other figures have not seen.
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    faceless_frames: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("faceless_frames", [], dist_reduce_fx="cat")

    def update(self, faces: VideoFaces) -> None:
        """Raises ValueError for tensors that do not fit together."""
        check_faces(faces)
        self.append(faces.found.float().mean(1))
        self.faceless_frames.append((~faces.found).sum(1).to(self.device, self.dtype))

    def num_faceless_frames(self) -> Tensor:
        """(N,) int64, per video; of all processes, see `gather`."""
        return self.gather("faceless_frames").to(torch.int64)

    def num_faceless_videos(self) -> int:
        """Videos without a face in any frame."""
        return int((self.per_video() == 0).sum())
