"""Files -> pixels. What a file is, its first bytes say, whatever it is called."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from collections.abc import Iterator

import av
import numpy as np
from PIL import Image

from mm_lightning.pictures import to_rgb8
from mm_lightning.prepare.sample import Rejected, Sample
from mm_lightning.prepare.stages.frames import DECODE_ERRORS, UNREADABLE, ClipFrames, Video, first_line

# Pillow's formats; its other forty readers are not offered untrusted bytes.
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
PICTURE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*")
PICTURE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, IndexError, MemoryError)
ORIENTATION = 0x0112  # EXIF
STORABLE = {"JPEG": "jpg", "PNG": "png"}
ISO_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"moof")
CLOCK_ERROR = 1e-3  # seconds; decord gives times in float32
FRAME_RATE_TOLERANCE = 0.02  # seconds by which a constant rate's frames may stray


class DecodePicture:
    """Picture -> upright 8-bit RGB: EXIF rotation applied, transparency over white, CMYK, palette and 16 bit converted.

    A plain JPEG or PNG keeps its bytes; anything else is encoded anew by `EncodePicture`.

    Args:
        max_pixels: a picture with more is not decoded; a few kilobytes can unpack to gigabytes.
    """

    name = "decode"
    reasons = ("empty_file", "wrong_type", "truncated", UNREADABLE, "too_many_pixels")

    def __init__(self, max_pixels: int = 100_000_000) -> None:
        self.max_pixels = max_pixels

    def __call__(self, sample: Sample) -> list[Sample]:
        picture = self.open(sample.data)
        try:
            picture.load()
            pixels = to_rgb8(picture)
        except Image.DecompressionBombError as error:
            raise Rejected("too_many_pixels", first_line(error)) from error
        except PICTURE_ERRORS as error:
            raise Rejected(broken_reason(error), first_line(error)) from error
        sample.meta["source_sha256"] = hashlib.sha256(sample.data).hexdigest()
        plain = is_plain(picture)
        sample.data, sample.extension = (sample.data, STORABLE[picture.format]) if plain else (b"", "jpg")
        sample.frames = [pixels]
        describe(sample, num_frames=1, fps=None)
        return [sample]

    def open(self, data: bytes) -> Image.Image:
        """Reads the header alone."""
        if not data:
            raise Rejected("empty_file")
        try:
            picture = Image.open(io.BytesIO(data), formats=PICTURE_FORMATS)
        except Image.UnidentifiedImageError as error:
            reason = UNREADABLE if data.startswith(PICTURE_SIGNATURES) else "wrong_type"
            raise Rejected(reason, f"starts with {data[:12]!r}") from error
        except Image.DecompressionBombError as error:
            raise Rejected("too_many_pixels", first_line(error)) from error
        except PICTURE_ERRORS as error:
            raise Rejected(broken_reason(error), first_line(error)) from error
        if picture.width * picture.height > self.max_pixels:
            raise Rejected("too_many_pixels", f"{picture.width} x {picture.height}")
        return picture


class DecodeClip:
    """Video -> frames at a constant rate, decoded lazily.

    Frames are chosen by their time stamps: at k / fps stands the frame that is then on the screen, so a variable rate
    keeps its speed. Sides become even, as the encoder wants them.

    Args:
        fps: frames per second; None takes the video's average, and leaves a video of constant rate as it is. A slower
            video keeps its own rate: no frame is made up.
        max_side: the shorter side is decoded at this size where it is longer, pixels; None keeps all.
        max_pixels: of a frame, before that.
    """

    name = "decode"
    reasons = ("empty_file", "wrong_type", "truncated", "no_index", "no_frames", UNREADABLE, "too_many_pixels")

    def __init__(self, fps: float | None = None, max_side: int | None = 720, max_pixels: int = 40_000_000) -> None:
        self.fps, self.max_side, self.max_pixels = fps, max_side, max_pixels

    def __call__(self, sample: Sample) -> list[Sample]:
        check_container(sample.data)
        self.check_size(sample.data)
        video = Video(sample.data)
        times, height, width = frame_times(video)
        indices, fps = constant_rate(times, self.fps)
        size = decode_size(width, height, self.max_side)
        sample.frames = ClipFrames(Video(sample.data, size), indices)
        sample.meta["source_sha256"] = hashlib.sha256(sample.data).hexdigest()
        sample.data, sample.extension = b"", "mp4"
        describe(sample, num_frames=len(indices), fps=round(fps, 3), width=size[0], height=size[1])
        return [sample]

    def check_size(self, data: bytes) -> None:
        """From the header, before a frame is decoded."""
        try:
            with av.open(io.BytesIO(data)) as container:
                streams = container.streams.video
                if not streams or not any(packet.size for packet in container.demux(streams[0])):
                    raise Rejected("no_frames", "no video stream" if not streams else "an empty video stream")
                width, height = streams[0].codec_context.width, streams[0].codec_context.height
        except (av.FFmpegError, ValueError) as error:
            raise Rejected(UNREADABLE, first_line(error)) from error
        if width * height > self.max_pixels:
            raise Rejected("too_many_pixels", f"{width} x {height}")


def describe(
    sample: Sample, num_frames: int, fps: float | None, width: int | None = None, height: int | None = None
) -> None:
    """Writes what every sample's json says of its target; the sizes default to those of the first frame."""
    if width is None or height is None:
        height, width = sample.frames[0].shape[:2]
    sample.meta |= {"width": width, "height": height, "num_frames": num_frames, "fps": fps, "source": sample.source}
    sample.meta.setdefault("identity", sample.key)


# Pictures


def is_plain(picture: Image.Image) -> bool:
    """Whether the file can be stored as it is: any reader sees the same pixels in it."""
    upright = picture.getexif().get(ORIENTATION, 1) == 1
    return picture.format in STORABLE and picture.mode == "RGB" and "transparency" not in picture.info and upright


def broken_reason(error: Exception) -> str:
    text = str(error).lower()
    return "truncated" if "truncated" in text or isinstance(error, EOFError) else UNREADABLE


# Clips


def check_container(data: bytes) -> None:
    """Raises Rejected unless the bytes begin like a video and, in an mp4, all its boxes are there."""
    if not data:
        raise Rejected("empty_file")
    if data[4:8] not in ISO_BOXES:
        if data[:4] != b"\x1aE\xdf\xa3" and not (data[:4] == b"RIFF" and data[8:12] == b"AVI "):
            raise Rejected("wrong_type", f"starts with {data[:12]!r}")
        return
    names = []
    for name, end in iso_boxes(data):
        names.append(name)
        if end > len(data):
            reason = "truncated" if b"moov" in names[:-1] else "no_index"
            raise Rejected(reason, f"{name.decode('latin-1')} ends at byte {end} of {len(data)}")
    if b"moov" not in names:
        raise Rejected("no_index", f"no moov box, only {[name.decode('latin-1') for name in names[:6]]}")


def iso_boxes(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Names of the top-level boxes of an mp4 and where they end (ISO/IEC 14496-12, 4.2)."""
    start = 0
    while start + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, start)
        if size == 1 and start + 16 <= len(data):
            (size,) = struct.unpack_from(">Q", data, start + 8)
        end = len(data) if size == 0 else start + max(size, 8)
        yield name, end
        start = end


def frame_times(video: Video) -> tuple[np.ndarray, int, int]:
    """When each frame appears, seconds (F,), and height and width of the frames."""
    try:
        count = len(video.reader)
        if not count:
            raise Rejected("no_frames")
        height, width = video.reader[0].shape[:2]
        times = np.asarray(video.reader.get_frame_timestamp(list(range(count))), np.float64)[:, 0]
    except DECODE_ERRORS as error:
        raise Rejected(UNREADABLE, first_line(error)) from error
    return times, height, width


def constant_rate(times: np.ndarray, fps: float | None) -> tuple[list[int], float]:
    """Which frames to show at a constant rate, and that rate. `times` (F,) rise."""
    count = len(times)
    if count < 2 or times[-1] <= times[0]:
        return list(range(count)), fps or 1.0
    average = (count - 1) / (times[-1] - times[0])
    even = times[0] + np.arange(count) / average
    if (fps is None or fps >= average) and np.abs(times - even).max() < min(FRAME_RATE_TOLERANCE, 0.5 / average):
        return list(range(count)), float(average)
    fps = min(fps or average, average)
    wanted = np.arange(times[0], times[-1] + CLOCK_ERROR, 1 / fps)
    return (np.searchsorted(times, wanted + CLOCK_ERROR, side="right") - 1).tolist(), float(fps)


def decode_size(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    """Width and height with the shorter side at most `max_side`, both even."""
    scale = 1.0 if max_side is None else min(1.0, max_side / min(width, height))
    return tuple(max(2, round(side * scale / 2) * 2) for side in (width, height))
