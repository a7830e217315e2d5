"""Pictures of every kind -> 8-bit RGB, the same for raw material and for a user's photos."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps


def to_rgb8(picture: Image.Image) -> NDArray[np.uint8]:
    """-> (H, W, 3), upright as its EXIF says, transparency over white, 16 bit scaled.

    Raises:
        ValueError: pixels that are floating point: there is no telling what is white.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise ValueError("floating-point pixels")
    if picture.mode.startswith("I"):  # 16 bit; Pillow's own conversion clips at 255
        values = np.clip(np.asarray(picture).astype(np.int64), 0, 65535)
        picture = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return np.asarray(picture.convert("RGB"))
