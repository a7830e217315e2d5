"""Tiny drawn samples: one coloured rectangle per picture, its place known to the json."""

import io
from fractions import Fraction

import av
import numpy as np
from PIL import Image

SOURCE = (80, 60)  # width, height
BOX = [30.0, 20.0, 45.0, 35.0]
LANDMARKS = [[34.0, 25.0], [41.0, 25.0], [37.0, 28.0], [35.0, 32.0], [40.0, 32.0]]


def encode(picture: np.ndarray, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format)
    return buffer.getvalue()


def encode_video(frames: list[np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(25), options={"crf": "1"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def draw(size=SOURCE, box=BOX, colour=(255, 255, 255), background=0) -> np.ndarray:
    """A filled rectangle whose corner pixels are centred on the box's corners."""
    picture = np.full((size[1], size[0], 3), background, np.uint8)
    x0, y0, x1, y1 = (round(v) for v in box)
    picture[y0 : y1 + 1, x0 : x1 + 1] = colour
    return picture


def meta(num_frames=1, size=SOURCE, boxes=None, num_references=1, landmarks=LANDMARKS) -> dict:
    boxes = boxes or [BOX] * num_frames
    return {
        "identity": "square",
        "source": "drawn",
        "width": size[0],
        "height": size[1],
        "fps": None,
        "num_frames": num_frames,
        "faces": [b and {"box": b, "landmarks": landmarks, "score": 1.0} for b in boxes],
        "references": [
            {"file": f"ref{i}.jpg", "box": BOX, "landmarks": LANDMARKS, "similarity": 1.0}
            for i in range(num_references)
        ],
    }


def picture_fields(index: int = 0, num_references: int = 1) -> dict:
    references = {f"ref{i}.jpg": encode(draw(colour=(255, 60 * i, 0)), "JPEG") for i in range(num_references)}
    return {
        "png": encode(draw(colour=(40 + index % 200, 200, 90))),
        "txt": f"A man img, number {index}",
        "json": meta(num_references=num_references),
        **references,
    }


def video_fields(num_frames: int = 9) -> dict:
    boxes = [[10.0 + 3 * i, 20.0, 25.0 + 3 * i, 35.0] for i in range(num_frames)]
    frames = [draw(box=box, background=20 * i) for i, box in enumerate(boxes)]
    return {
        "mp4": encode_video(frames),
        "txt": "A woman img moves",
        "json": meta(num_frames, boxes=boxes),
        "ref0.jpg": encode(draw(), "JPEG"),
    }
