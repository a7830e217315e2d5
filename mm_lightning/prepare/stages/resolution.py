"""How large targets are."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mm_lightning.prepare.sample import Rejected, Sample
from mm_lightning.prepare.stages.decode import decode_size
from mm_lightning.prepare.stages.frames import ClipFrames


class MinimumResolution:
    """Rejects what is smaller; 720 is the paper's bound for pictures of the web.

    Args:
        min_side: of the shorter side, pixels.
    """

    name = "resolution"
    reasons = ("too_small",)

    def __init__(self, min_side: int = 720) -> None:
        self.min_side = min_side

    def __call__(self, sample: Sample) -> list[Sample]:
        width, height = sample.meta["width"], sample.meta["height"]
        if min(width, height) < self.min_side:
            raise Rejected("too_small", f"{width} x {height}")
        return [sample]


class MaximumSide:
    """Reduces what is larger, before faces are looked for: boxes are in pixels of what is stored.

    Args:
        max_side: of the shorter side, pixels.
    """

    name = "reduce"
    reasons = ()

    def __init__(self, max_side: int = 1080) -> None:
        self.max_side = max_side

    def __call__(self, sample: Sample) -> list[Sample]:
        width, height = sample.meta["width"], sample.meta["height"]
        if min(width, height) <= self.max_side:
            return [sample]
        size = decode_size(width, height, self.max_side)
        if isinstance(sample.frames, ClipFrames):
            sample.frames = sample.frames.resized(size)
        else:
            sample.frames = [resize_picture(frame, size) for frame in sample.frames]
        sample.data = b""
        sample.meta["width"], sample.meta["height"] = size
        return [sample]


def resize_picture(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """RGB uint8 (H, W, 3) -> (height, width, 3) for `size` = (width, height)."""
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
