"""Photos of every depth as files and as Pillow's pictures."""

from __future__ import annotations

import io
import math
import re

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


def damaged(kind, **options):
    """The file of a photo, to be damaged."""
    file = io.BytesIO()
    Image.fromarray(skimage.data.astronaut()).resize((96, 96)).save(file, kind, **options)
    return file.getvalue()


def test_damaged_files_of_every_decoder_are_told(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    avif = damaged("AVIF")
    unknown_colours = avif.index(b"nclx") + 8  # the matrix of ITU-T H.273, of which 3 is reserved
    files = {
        "cut.avif": avif[: len(avif) * 9 // 10],  # a SyntaxError of Pillow's
        "colours.avif": avif[:unknown_colours] + b"\x00\x03" + avif[unknown_colours + 2 :],  # a RuntimeError
        "exif.webp": damaged("WEBP", exif=exif).replace(b"MM\x00*", b"MM\x002"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PhotoError, match=re.escape(name) + " cannot be read as a picture"):
            load_photo(tmp_path / name)


def test_a_photo_that_is_too_large_is_to_be_reduced(tmp_path):
    side = math.isqrt(2 * Image.MAX_IMAGE_PIXELS) + 1
    Image.new("1", (side, side)).save(tmp_path / "wall.png")
    with pytest.raises(PhotoError, match=rf"wall\.png is too large: reduce it to {Image.MAX_IMAGE_PIXELS} pixels"):
        load_photo(tmp_path / "wall.png")
