"""Videos and pictures as arrays. Letters: F frames, H W pixels."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm_lightning.encoders.photos import load_photo

PICTURES = (".png", ".jpg", ".jpeg")


class Clip(NamedTuple):
    """A decoded video."""

    frames: NDArray[np.uint8]  # (F, H, W, 3) RGB
    fps: float | None  # None of a picture, or where the file does not say


def read_clip(file: Path) -> Clip:
    """All frames of an mp4, webm, GIF or whatever FFmpeg reads, upright as players show them; of a picture, one.

    Raises:
        ValueError: nothing in it can be decoded.
    """
    if file.suffix.lower() in PICTURES:
        return Clip(load_photo(file)[None], None)
    try:
        with av.open(str(file), metadata_errors="replace") as container:
            stream = container.streams.video[0]
            frames = [upright(frame) for frame in container.decode(stream)]
            rate = stream.average_rate or stream.guessed_rate
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{file} cannot be decoded as a video ({error}).") from error
    if not frames:
        raise ValueError(f"{file} has no frames.")
    return Clip(np.stack(frames), float(rate) if rate else None)


def upright(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """(H, W, 3) RGB, turned by the quarter turns that the file asks for."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def thumbnail(picture: NDArray[np.uint8], height: int) -> Image.Image:
    """Reduced to that height; smaller ones are enlarged."""
    size = max(round(picture.shape[1] * height / picture.shape[0]), 1), height
    return Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
