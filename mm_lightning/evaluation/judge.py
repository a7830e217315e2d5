"""One video judged: its faces and figures, kept by the contents of what was judged.

Letters: F frames, H W pixels, S sampled frames.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchmetrics import Metric

from mm_lightning.checkpoint import replace_path
from mm_lightning.encoders.photos import load_photo
from mm_lightning.encoders.reader import FaceReader
from mm_lightning.evaluation.clips import Clip, read_clip, thumbnail
from mm_lightning.evaluation.manifest import Entry
from mm_lightning.metrics.arithmetic import NUM_FACIAL_FRAMES, sample_frames
from mm_lightning.metrics.dynamic_degree import DynamicDegree
from mm_lightning.metrics.inception_score import InceptionScore
from mm_lightning.metrics.text_alignment import TextAlignment
from mm_lightning.types import ReferenceFaces, VideoFaces

FRAMES_SHOWN, THUMBNAIL_HEIGHT = 6, 160
FORMAT = 4  # raise it when the same video would be judged otherwise


class Judged(NamedTuple):
    """What was found in a video."""

    faces: VideoFaces  # a batch of one, S sampled frames
    references: ReferenceFaces  # a batch of one
    values: dict[str, float]  # figures of the whole video, NaN where unknown
    classes: dict[str, Tensor]  # of every frame by a set's metric, (F, K), rows that sum to 1
    info: dict[str, Any]  # num_frames, fps, height, width
    thumbnails: list[Path]  # the first photo, then frames


class Judge:
    """Judges videos, each once.

    Args:
        reader: finds and embeds faces.
        cache: folder; what lies there is not judged again, whichever run judged it.
        num_frames: S, in which faces are looked for; at equal distances.
        video_metrics: name -> metric of whole videos; `TextAlignment` is given the prompt too,
            `DynamicDegree` the video's own frames per second. `InceptionScore` is of a set: of one video only what the
            classifier says is kept.
        settings: what their values depend on, for the cache.
    """

    def __init__(
        self,
        reader: FaceReader,
        cache: Path,
        num_frames: int = NUM_FACIAL_FRAMES,
        video_metrics: Mapping[str, Metric] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(num_frames, int) or num_frames < 2:
            raise ValueError(
                f"num_frames={num_frames}: give a whole number, at least 2; the paper takes {NUM_FACIAL_FRAMES}."
            )
        self.reader, self.cache, self.num_frames = reader, cache, num_frames
        given = dict(video_metrics or {})
        self.set_metrics = {name: metric for name, metric in given.items() if isinstance(metric, InceptionScore)}
        self.video_metrics = {name: metric for name, metric in given.items() if name not in self.set_metrics}
        self.settings = {"format": FORMAT, "num_frames": num_frames, **reader.info, **(settings or {})}

    def __call__(self, entry: Entry) -> Judged:
        """
        Raises:
            ValueError: the video or a photo cannot be decoded, or no photo shows a face.
        """
        folder = self.cache / self.key(entry)
        if not (folder / "values.json").is_file():
            self.judge(entry, folder)
        return load_judged(folder)

    def key(self, entry: Entry) -> str:
        """Follows from contents and settings, not from places."""
        names = sorted([*self.video_metrics, *self.set_metrics])
        digest = hashlib.sha256(json.dumps([self.settings, names, entry.prompt]).encode())
        for file in (entry.video, *entry.references):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()[:24]

    def judge(self, entry: Entry, folder: Path) -> None:
        clip, references = read_clip(entry.video), self.reader.read_photos(entry.references)
        if not references.mask.any():
            photos = ", ".join(str(photo) for photo in entry.references)
            raise ValueError(f"No face found in the references of {entry.video} ({photos}): give others.")
        faces = self.reader.read_video(clip.frames[sample_frames(len(clip.frames), self.num_frames)])
        values = {name: self.value(metric, clip, entry) for name, metric in self.video_metrics.items()}
        classes = {name: metric.classify(pixels(clip)) for name, metric in self.set_metrics.items()}
        known = {name: None if np.isnan(value) else value for name, value in values.items()}
        self.cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=self.cache) as work:
            partial = Path(work) / "judged"
            partial.mkdir()
            save_faces(partial / "faces.safetensors", faces, references)
            save_file(classes, partial / "classes.safetensors")
            write_thumbnails(partial, load_photo(entry.references[0]), clip.frames)
            (partial / "values.json").write_text(json.dumps({"values": known, "info": describe(clip)}))
            move_unless_there(partial, folder)

    def value(self, metric: Metric, clip: Clip, entry: Entry) -> float:
        """Of one video."""
        video = pixels(clip)
        metric.reset()
        if isinstance(metric, DynamicDegree):
            metric.fps = clip.fps or metric.fps
        metric.update(video, [entry.prompt]) if isinstance(metric, TextAlignment) else metric.update(video)
        return float(metric.per_video()[0])


def pixels(clip: Clip) -> Tensor:
    """(1, F, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(clip.frames).movedim(-1, 1)[None].float() / 127.5 - 1


def move_unless_there(partial: Path, folder: Path) -> None:
    """Another process may have judged the same video meanwhile: what is there and whole stays."""
    try:
        partial.rename(folder)  # fails where a folder lies that is not empty
    except OSError:
        if not (folder / "values.json").is_file():
            replace_path(partial, folder)


def describe(clip: Clip) -> dict[str, Any]:
    num_frames, height, width, _ = clip.frames.shape
    return {"num_frames": num_frames, "fps": clip.fps, "height": height, "width": width}


def save_faces(file: Path, faces: VideoFaces, references: ReferenceFaces) -> None:
    parts: dict[str, Tensor] = {}
    for prefix, tensors in (("video", faces), ("reference", references)):
        parts |= {f"{prefix}.{name}": tensor.contiguous() for name, tensor in tensors._asdict().items()}
    save_file(parts, file)


def write_thumbnails(folder: Path, photo: NDArray[np.uint8], frames: NDArray[np.uint8]) -> None:
    shown = [photo, *frames[sample_frames(len(frames), FRAMES_SHOWN)]]
    for i, picture in enumerate(shown):
        thumbnail(picture, THUMBNAIL_HEIGHT).save(folder / f"{i}.jpg", quality=80)


def load_judged(folder: Path) -> Judged:
    stored = load_file(folder / "faces.safetensors")
    faces, references = (
        kind(**{name: stored[f"{prefix}.{name}"] for name in kind._fields})
        for kind, prefix in ((VideoFaces, "video"), (ReferenceFaces, "reference"))
    )
    read = json.loads((folder / "values.json").read_text())
    values = {name: float("nan") if value is None else value for name, value in read["values"].items()}
    thumbnails = sorted(folder.glob("*.jpg"), key=lambda file: int(file.stem))
    classes = load_file(folder / "classes.safetensors")
    return Judged(faces, references, values, classes, read["info"], thumbnails)
