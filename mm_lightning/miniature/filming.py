"""One person before the camera: stills and clips, encoded and described, each with the person's other stills beside it.

Letters: F frames, H W pixels.
"""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm_lightning.miniature.captions import caption, rich_caption
from mm_lightning.miniature.layout import WorldSettings
from mm_lightning.miniature.motion import ACTIONS, Performance, sample_clip, sample_still
from mm_lightning.miniature.people import Person

if TYPE_CHECKING:
    from mm_lightning.miniature.render import Rendered, Renderer

JPEG_QUALITY = 92
# One thread, and no assembly: with it, x264's look-ahead gives other bits now and then at this size.
X264 = {"crf": "24", "tune": "psnr", "preset": "veryslow", "threads": "1", "x264-params": "asm=0"}
CAPTIONS_STREAM, STILLS_STREAM, CLIPS_STREAM = range(3)  # of a person's randomness


class NewSample(NamedTuple):
    """A sample of a shard."""

    folder: str  # images or videos
    key: str
    fields: dict[str, bytes]


class Take(NamedTuple):
    """A still or a clip that was rendered."""

    key: str
    performance: Performance
    rendered: Rendered
    data: bytes  # encoded


def person_samples(renderer: Renderer, person: Person, settings: WorldSettings) -> list[NewSample]:
    """Stills, then clips, each with the person's other stills as references."""
    stills = [render_still(renderer, person, settings, i) for i in range(settings.stills)]
    clips = [render_clip(renderer, person, settings, i) for i in range(settings.clips)]
    samples = []
    for i, take in enumerate(stills):
        others = [*stills[i + 1 :], *stills[:i]]
        samples.append(make_sample("images", "jpg", person, take, others[: settings.references], settings))
    for i, take in enumerate(clips):
        first = (person.index + i) % len(stills)
        others = [*stills[first:], *stills[:first]]
        samples.append(make_sample("videos", "mp4", person, take, others[: settings.references], settings))
    return samples


def render_still(renderer: Renderer, person: Person, settings: WorldSettings, i: int) -> Take:
    performance = sample_still(stream(person, STILLS_STREAM, i))
    rendered = renderer.render(person, performance)
    return Take(f"{person.id}-s{i}", performance, rendered, encode_jpeg(rendered.frames[0]))


def render_clip(renderer: Renderer, person: Person, settings: WorldSettings, i: int) -> Take:
    performance = sample_clip(stream(person, CLIPS_STREAM, i), settings.num_frames, float(settings.fps))
    rendered = renderer.render(person, performance)
    return Take(f"{person.id}-c{i}", performance, rendered, encode_mp4(rendered.frames, settings.fps))


def stream(person: Person, *path: int) -> np.random.Generator:
    """The person's own randomness: more stills, clips or people change nothing of what is there."""
    return np.random.default_rng([person.seed, person.index, *path])


def make_sample(
    folder: str, extension: str, person: Person, take: Take, references: list[Take], settings: WorldSettings
) -> NewSample:
    rng = stream(person, CAPTIONS_STREAM, *take.key.encode())
    text, rich = (tell(person, take.performance, rng) for tell in (caption, rich_caption))
    meta = describe(person, take, references, rich, settings.fps if folder == "videos" else None)
    fields = {extension: take.data, "txt": text.encode(), "json": json.dumps(meta, sort_keys=True).encode()}
    pictures = {f"ref{i}.jpg": reference.data for i, reference in enumerate(references)}
    return NewSample(folder, take.key, fields | pictures)


def describe(person: Person, take: Take, references: list[Take], rich: str, fps: int | None) -> dict[str, Any]:
    """What `{key}.json` holds."""
    num_frames, height, width, _ = take.rendered.frames.shape
    return {
        "identity": person.id,
        "source": "miniature",
        "width": width,
        "height": height,
        "fps": fps,
        "num_frames": num_frames,
        "faces": [describe_face(take.rendered, i) for i in range(num_frames)],
        "references": [
            {"file": f"ref{i}.jpg", "key": reference.key, **describe_face(reference.rendered, 0)}
            for i, reference in enumerate(references)
        ],
        "miniature": describe_performance(person, take.performance) | {"rich_caption": rich},
    }


def describe_face(rendered: Rendered, frame: int) -> dict[str, list]:
    """Pixels, (0, 0) the centre of the first one."""
    return {
        "box": rendered.boxes[frame].astype(float).round(2).tolist(),
        "landmarks": rendered.landmarks[frame].astype(float).round(2).tolist(),
        "visible": rendered.visible[frame].tolist(),
    }


def describe_performance(person: Person, performance: Performance) -> dict[str, Any]:
    """`actions` has a curve for each facial action that does not rest throughout, `head` and `camera` a row a frame."""
    curves = dict(zip(ACTIONS, performance.actions.T.astype(float).round(2), strict=True))
    return {
        "class_word": person.class_word,
        "attributes": person.attributes,
        "action": list(performance.names),
        "background": performance.background,
        "light": performance.light,
        "actions": {name: curve.tolist() for name, curve in curves.items() if curve.any()},
        "head": performance.head.astype(float).round(1).tolist(),
        "camera": performance.camera.astype(float).round(3).tolist(),
    }


# Encoding -------------------------------------------------------------------------------------------------------------


def encode_jpeg(picture: NDArray[np.uint8]) -> bytes:
    """RGB (H, W, 3) -> JPEG, colours not subsampled."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, optimize=True)
    return buffer.getvalue()


def encode_mp4(frames: NDArray[np.uint8], fps: int) -> bytes:
    """RGB (F, H, W, 3) with even sides -> H.264 in mp4, colours not subsampled."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options=X264)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()
