"""Photos of every depth as files and as Pillow's pictures."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
from PIL import Image

from mm_lightning.encoders.photos import PhotoError, load_photo


def test_a_photo_of_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    grey = np.asarray(Image.fromarray(skimage.data.astronaut()).convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    deep.save(tmp_path / "grey.png")
    for photo in (deep, tmp_path / "grey.png"):
        assert np.array_equal(load_photo(photo), np.repeat(grey[..., None], 3, -1))


def test_a_photo_in_floating_point_is_refused(tmp_path):
    picture = Image.new("F", (8, 8), 0.5)
    picture.save(tmp_path / "float.tif")
    with pytest.raises(PhotoError, match=r"float\.tif cannot be read as a picture \(floating-point pixels\)"):
        load_photo(tmp_path / "float.tif")
    with pytest.raises(PhotoError, match="The photo cannot be read as a picture"):
        load_photo(picture)
