"""Pixels -> files, the same bytes for the same pixels."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from mm_lightning.prepare.sample import Sample


class EncodePicture:
    """Stores the pixels as JPEG where a stage changed them; untouched files keep their bytes.

    Args:
        quality: of the JPEG, 1 to 95.
    """

    name = "encode"
    reasons = ()

    def __init__(self, quality: int = 95) -> None:
        self.quality = quality

    def __call__(self, sample: Sample) -> list[Sample]:
        if not sample.data:
            sample.data, sample.extension = jpeg(sample.frames[0], self.quality), "jpg"
        return [sample]


class EncodeClip:
    """Stores a window's frames as H.264, on one thread: several cut a picture into slices by their number.

    Args:
        crf: x264's quality; 12 is nearly lossless.
        preset: x264's speed.
    """

    name = "encode"
    reasons = ("unreadable",)

    def __init__(self, crf: int = 12, preset: str = "medium") -> None:
        self.crf, self.preset = crf, preset

    def __call__(self, sample: Sample) -> list[Sample]:
        fps = Fraction(sample.meta["fps"]).limit_denominator(1001)
        sample.data, sample.extension = mp4(list(sample.frames), fps, self.crf, self.preset), "mp4"
        return [sample]


def jpeg(picture: np.ndarray, quality: int = 95) -> bytes:
    """RGB uint8 (H, W, 3) -> JPEG, colours not subsampled."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def mp4(frames: list[np.ndarray], fps: Fraction, crf: int = 12, preset: str = "medium") -> bytes:
    """RGB uint8 frames with even sides -> H.264 in mp4."""
    buffer = io.BytesIO()
    options = {"crf": str(crf), "preset": preset, "threads": "1"}
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
