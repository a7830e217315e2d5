"""What the metrics have in common: a figure per video, and its mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from mm_lightning.metrics.arithmetic import mean_of_known


class PlottedMetric(Metric):
    """A Metric with `plot`, and states that can be read in full outside of `compute`."""

    is_differentiable = False
    full_state_update = False

    def gather(self, state: str) -> Tensor:
        """A list state as one tensor, of all processes: ordered by rank, then by update. Empty before any update.

        Every process must call it. Metrics that were updated together give their values in the same order.
        """
        synced = self._is_synced
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=not synced, should_unsync=not synced):
            values = getattr(self, state)
            return torch.empty(0, dtype=self.dtype, device=self.device) if len(values) == 0 else dim_zero_cat(values)

    def plot(self, val: Any = None, ax: Any = None) -> tuple[Any, Any]:
        """Plot `val`, one result of `compute` or several in order of time, by default the present one.

        Returns:
            matplotlib's figure and axes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        return self._plot(val, ax)


class VideoMetric(PlottedMetric):
    """One figure per video; `compute` is the mean over the videos in which it is known.

    NaN stands where a video does not show the figure, such as that of a face in a video without one. Such a video is
    not in the mean, and `num_unknown` counts it: a report should say so, or the mean flatters.

    Args:
        settings: what the figure of a video depends on besides the video.
        **kwargs: torchmetrics' own.
    """

    def __init__(self, settings: tuple[Any, ...] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A MetricCollection takes metrics with equal states for one metric and then updates only the first. Values of
        # different metrics may well be equal for a while, so the state's name tells them apart.
        self._state = f"{type(self).__name__}{settings}"
        self.add_state(self._state, [], dist_reduce_fx="cat")

    def append(self, values: Tensor) -> None:
        """values: (B,)."""
        getattr(self, self._state).append(values.detach().to(self.device, self.dtype))

    def per_video(self) -> Tensor:
        """(N,), NaN where unknown; of all processes, see `gather`."""
        return self.gather(self._state)

    def num_unknown(self) -> int:
        """How many videos are not in the mean."""
        return int(self.per_video().isnan().sum())

    def compute(self) -> Tensor:
        """Scalar; NaN where no video is known."""
        return mean_of_known(self.per_video())
