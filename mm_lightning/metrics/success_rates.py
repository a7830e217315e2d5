"""How many videos are good enough. Letters: N videos."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mm_lightning.metrics.arithmetic import mean_of_known
from mm_lightning.metrics.base import PlottedMetric

CRITERIA = ("face", "identity", "motion", "text")


class SuccessRates(PlottedMetric):
    """Share of videos that pass each criterion, and the mean of the shares: in [0, 1], higher is better.

    The criteria are those of MagicMirror (ICCV 2025): face recognised, identity check, motion quality, text alignment,
    there 98, 81, 44 and 75.5%, mean 74.6%. It names no thresholds. The defaults are ours: half of the frames show a
    face; dlib's similarity above what two people reach (0.91); FM_inter between the paper's stiffest model (0.18) and
    its liveliest (0.61); ViCLIP's consistency below the paper's means (0.21 to 0.24). With another recogniser or
    encoder give others.

    A figure passes from its threshold on; an unknown one (NaN) fails, as a video without a face is no success. A
    criterion that no video was measured by is NaN and not in the mean.

    Args:
        min_face_rate: of `FaceDetectionRate`.
        min_similarity: of `AverageIDSimilarity`.
        min_motion: of `FaceMotionInter`.
        min_text: of `TextAlignment`.
        **kwargs: torchmetrics' own.

    Raises:
        ValueError: a threshold that is no finite number.
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(
        self,
        min_face_rate: float = 0.5,
        min_similarity: float = 0.92,
        min_motion: float = 0.4,
        min_text: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        given = (min_face_rate, min_similarity, min_motion, min_text)
        if not torch.tensor(given).isfinite().all():
            raise ValueError(f"Thresholds must be finite numbers, got {given}.")
        self.thresholds = dict(zip(CRITERIA, given, strict=True))
        for name, threshold in self.thresholds.items():
            self.add_state(self._state(name, threshold), [], dist_reduce_fx="cat")

    @staticmethod
    def _state(name: str, threshold: float) -> str:
        """With the threshold, so that a MetricCollection does not take two of them for one, see `VideoMetric`."""
        return f"{name} from {threshold}"

    def update(
        self,
        face_rate: Tensor | None = None,
        similarity: Tensor | None = None,
        motion: Tensor | None = None,
        text: Tensor | None = None,
    ) -> None:
        """What the other metrics' `per_video` gives, each (B,) of the same videos; None where it was not measured.

        Raises:
            ValueError: nothing was measured, or figures of different lengths.
        """
        given = dict(zip(CRITERIA, (face_rate, similarity, motion, text), strict=True))
        shapes = {name: tuple(values.shape) for name, values in given.items() if values is not None}
        if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 1:
            raise ValueError(f"Give figures of the same videos, each (B,), at least one; got {shapes}.")
        (num_videos,) = next(iter(shapes.values()))
        for name, values in given.items():
            unmeasured = torch.full((num_videos,), torch.nan)
            passed = unmeasured if values is None else (values >= self.thresholds[name])
            getattr(self, self._state(name, self.thresholds[name])).append(passed.to(self.device, self.dtype))

    def per_video(self) -> dict[str, Tensor]:
        """Criterion -> (N,): 1 passed, 0 failed, NaN not measured; of all processes, see `gather`."""
        return {name: self.gather(self._state(name, threshold)) for name, threshold in self.thresholds.items()}

    def compute(self) -> dict[str, Tensor]:
        """Criterion -> share, and "mean"."""
        shares = {name: mean_of_known(passed) for name, passed in self.per_video().items()}
        return shares | {"mean": mean_of_known(torch.stack(list(shares.values())))}
