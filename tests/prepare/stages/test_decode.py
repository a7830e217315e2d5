"""Pixels of odd pictures, and times of odd clips, against what they were made from."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from mm_lightning.prepare.sample import Rejected
from mm_lightning.prepare.stages.decode import DecodeClip, DecodePicture, constant_rate, decode_size
from tests.prepare.bad_inputs import encode, odd_pictures, portrait, variable_times, write_video
from tests.prepare.stages.conftest import picture, portrait_bytes, rejection, through, video

ODD = {item.name.rpartition("/")[2]: item.data for item in odd_pictures()}
PIXELS = np.asarray(portrait()).astype(float)


def decoded(data: bytes) -> np.ndarray:
    [sample] = DecodePicture()(picture(data))
    assert sample.frames[0].dtype == np.uint8
    return sample.frames[0].astype(float)


def test_plain_files_keep_their_bytes_and_others_are_encoded_anew():
    [plain] = DecodePicture()(picture(portrait_bytes(), extension="png"))
    assert (plain.data, plain.extension) == (portrait_bytes(), "jpg")
    for name in ("alpha.png", "cmyk.jpg", "palette.png", "grey_16_bit.png", "rotated_exif.jpg", "webp.webp"):
        [changed] = DecodePicture()(picture(ODD[name]))
        assert (changed.data, changed.extension) == (b"", "jpg")


def test_transparency_lies_over_white():
    alpha = np.asarray(Image.open(io.BytesIO(ODD["alpha.png"])))[..., 3:] / 255.0
    assert np.abs(decoded(ODD["alpha.png"]) - (PIXELS * alpha + 255 * (1 - alpha))).max() <= 1
    assert alpha.min() == 0


def test_palette_with_a_transparent_colour():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((3, 3), 0)
    found = decoded(encode(palette, "PNG", transparency=0))
    assert found[3, 3].tolist() == [255, 255, 255]
    assert found[0, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize(("name", "error"), [("cmyk.jpg", 4), ("rgb_16_bit.png", 0), ("png_called.jpg", 0)])
def test_colours_are_those_of_the_original(name, error):
    assert np.abs(decoded(ODD[name]) - PIXELS).mean() <= error


def test_16_bit_grey_is_scaled_and_not_clipped():
    grey = np.asarray(portrait().convert("L")).astype(float)
    found = decoded(ODD["grey_16_bit.png"])
    assert np.array_equal(found, np.repeat(grey[..., None], 3, -1))


def test_exif_turns_the_picture_upright():
    assert np.abs(decoded(ODD["rotated_exif.jpg"]) - PIXELS).mean() < 3


def test_what_is_written_about_a_picture():
    [sample] = DecodePicture()(picture(portrait_bytes()))
    digest = sample.meta.pop("source_sha256")
    assert len(digest) == 64
    expected = {"width": 256, "height": 256, "num_frames": 1, "fps": None, "source": "test", "identity": "k"}
    assert sample.meta == expected


def test_number_of_pixels_is_told_before_decoding():
    assert rejection(DecodePicture(max_pixels=256 * 256 - 1), picture(portrait_bytes())) == "too_many_pixels"
    assert DecodePicture(max_pixels=256 * 256)(picture(portrait_bytes()))


# Clips


def grey_clip(times: list[float], **options) -> bytes:
    """A clip whose frame i has the grey level 20 + 5 i."""
    frames = [np.full((64, 208, 3), 20 + 5 * i, np.uint8) for i in range(len(times))]
    return write_video(frames, times, **options)


def levels(frames) -> list[int]:
    return [round((float(frame.mean()) - 20) / 5) for frame in frames]


def on_screen(times: list[float], moment: float) -> int:
    return max(i for i, time in enumerate(times) if time <= moment + 1e-6)


def test_constant_rate_is_left_alone():
    times = [i / 25 for i in range(20)]
    [sample] = DecodeClip()(video(grey_clip(times)))
    assert sample.meta["fps"] == 25
    assert levels(sample.frames) == list(range(20))
    assert (sample.extension, sample.data) == ("mp4", b"")


@pytest.mark.parametrize("fps", [None, 8.0])
def test_variable_rate_keeps_its_speed(fps):
    times = variable_times(24)
    [sample] = DecodeClip(fps=fps)(video(grey_clip(times)))
    rate = fps or 23 / times[-1]
    assert sample.meta["fps"] == pytest.approx(rate, abs=1e-3)
    expected = [on_screen(times, k / rate) for k in range(len(sample.frames))]
    assert levels(sample.frames) == expected
    assert len(expected) == int(times[-1] * rate + 1e-3) + 1


def test_lower_rate_takes_frames_by_time_and_a_higher_one_makes_none_up():
    times = [i / 25 for i in range(25)]
    [slow] = DecodeClip(fps=5)(video(grey_clip(times)))
    assert levels(slow.frames) == [0, 5, 10, 15, 20]
    [fast] = DecodeClip(fps=60)(video(grey_clip(times)))
    assert (len(fast.frames), fast.meta["fps"]) == (25, 25)


def test_constant_rate_of_one_frame_and_of_equal_times():
    assert constant_rate(np.array([0.5]), 8) == ([0], 8)
    assert constant_rate(np.array([1.0, 1.0]), None)[0] == [0, 1]


@pytest.mark.parametrize(
    ("size", "max_side", "expected"),
    [((1920, 1080), 720, (1280, 720)), ((1080, 1920), 720, (720, 1280)), ((321, 241), 720, (320, 240))],
)
def test_sides_are_even_and_reduced(size, max_side, expected):
    assert decode_size(*size, max_side) == expected


def test_clip_is_decoded_at_the_reduced_size():
    [sample] = DecodeClip(max_side=48)(video(grey_clip([i / 25 for i in range(9)])))
    assert (sample.meta["width"], sample.meta["height"]) == (156, 48)
    assert sample.frames[3].shape == (48, 156, 3)
    assert levels(sample.frames) == list(range(9))


@pytest.mark.parametrize("width", [24, 48, 96, 144, 176])
def test_narrow_clips_keep_their_colours(width):
    """decord reads three of these as four or eight channels when left alone."""
    colour = np.array([200, 100, 50], np.uint8)
    data = write_video([np.broadcast_to(colour, (64, width, 3))] * 5, [i / 25 for i in range(5)])
    [sample] = DecodeClip()(video(data))
    assert sample.frames[2].shape == (64, width, 3)
    assert np.abs(sample.frames[2].astype(float) - colour).max() < 8


def test_phone_clip_is_turned_upright():
    """The matrix in the track's header says by how much (ISO/IEC 14496-12, 8.3.2)."""
    frame = np.zeros((64, 208, 3), np.uint8)
    frame[:, :52] = 255  # a bar at the left
    data = write_video([frame] * 5, [i / 25 for i in range(5)])
    start = data.find(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # a quarter turn clockwise
    [sample] = DecodeClip()(video(data[:start] + matrix + data[start + 36 :]))
    assert sample.frames[0].shape == (208, 64, 3)
    assert sample.frames[0][:50].min() > 230  # the bar is at the top
    assert sample.frames[0][54:].max() < 25


def test_too_large_frames():
    assert rejection(DecodeClip(max_pixels=64 * 208 - 1), video(grey_clip([0.0, 0.04]))) == "too_many_pixels"


def test_every_cut_of_a_clip_is_rejected_or_read():
    """No length of a broken download leads to anything but a reason."""
    data = grey_clip([i / 25 for i in range(9)], movflags="faststart")
    reasons = set()
    for length in range(0, len(data), len(data) // 23):
        try:
            through(video(data[:length]), DecodeClip(), lambda sample: [list(sample.frames)])
        except Rejected as error:
            reasons.add(error.reason)
    assert reasons <= set(DecodeClip.reasons)
    assert {"empty_file", "truncated"} <= reasons
