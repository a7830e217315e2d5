"""Faces and videos whose figures are known in closed form, and every metric fed with random ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from mm_lightning.metrics import (
    AverageIDDistance,
    AverageIDSimilarity,
    ColorDrift,
    DynamicDegree,
    FaceDetectionRate,
    FaceMotionInter,
    FaceMotionRef,
    IdentityRetrieval,
    InceptionScore,
    MotionSmoothness,
    SimilarityDecay,
    SuccessRates,
    TextAlignment,
)
from mm_lightning.types import ReferenceFaces, VideoFaces

FACE = torch.tensor([[20.0, 24.0], [40.0, 24.0], [30.0, 34.0], [23.0, 44.0], [37.0, 44.0]])
BOX = torch.tensor([12.0, 10.0, 52.0, 50.0])
HEIGHT, WIDTH = 64, 128
NUM_CLASSES = 5


def moved(steps: Sequence[tuple[float, float]], embeddings: Tensor | None = None) -> VideoFaces:
    """One video of a face that is shifted as a whole, x and y."""
    shift = torch.tensor(steps)  # (F, 2)
    return VideoFaces(
        found=torch.ones(1, len(shift), dtype=torch.bool),
        boxes=(BOX + shift.repeat(1, 2))[None],
        landmarks=(FACE + shift[:, None])[None],
        embeddings=torch.ones(1, len(shift), 4) if embeddings is None else embeddings[None],
        sizes=torch.tensor([[HEIGHT, WIDTH]]),
    )


def still(num_frames: int, embeddings: Tensor | None = None) -> VideoFaces:
    return moved([(0.0, 0.0)] * num_frames, embeddings)


def hidden(faces: VideoFaces, *frames: int) -> VideoFaces:
    """The faces of some frames gone, garbage in their place."""
    found, garbage = faces.found.clone(), [tensor.clone() for tensor in faces[1:4]]
    found[:, list(frames)] = False
    for tensor in garbage:
        tensor[:, list(frames)] = torch.nan
    return VideoFaces(found, *garbage, faces.sizes)


def reference(embeddings: Tensor, landmarks: Tensor = FACE, mask: Sequence[bool] | None = None) -> ReferenceFaces:
    """The references of one video, (R, E), all with the same landmarks."""
    num = len(embeddings)
    return ReferenceFaces(
        boxes=BOX.expand(1, num, 4),
        landmarks=landmarks.expand(1, num, 5, 2),
        embeddings=embeddings[None],
        mask=torch.ones(1, num, dtype=torch.bool) if mask is None else torch.tensor([mask]),
    )


def at_cosines(*cosines: float) -> Tensor:
    """(N, 2) vectors of different lengths, at these cosines from the x axis."""
    lengths = torch.arange(1.0, len(cosines) + 1)
    vectors = torch.tensor([(c, math.sqrt(1 - c * c)) for c in cosines])
    return lengths[:, None] * vectors


AXIS = torch.tensor([[2.0, 0.0]])


def texture(height: int, width: int, seed: int = 0) -> Tensor:
    """(3, H, W) in [-1, 1], smooth enough for flow and without repetition."""
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((1, 3, height // 4, width // 4)))
    picture = torch.nn.functional.interpolate(noise.float(), size=(height, width), mode="bicubic")[0]
    return (picture / picture.abs().max()).clamp(-1, 1)


def panned(offsets: Sequence[int], height: int = 64, width: int = 96, seed: int = 0) -> Tensor:
    """(1, F, 3, H, W): a window on a texture, `offsets` pixels to the left of where it starts: content moves right."""
    margin = max(map(abs, offsets))
    picture = texture(height, width + 2 * margin, seed)
    return torch.stack([picture[..., margin - x : margin - x + width] for x in offsets])[None]


class Colors(torch.nn.Module):
    """A classifier by mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(3, NUM_CLASSES, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-20, 20, 3 * NUM_CLASSES).reshape(NUM_CLASSES, 3).sin() * 20)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(pictures.mean((-1, -2)))


class ColorsAndLetters(torch.nn.Module):
    """An encoder of videos by mean colour and of texts by their letters: shows the metric, not the meaning."""

    name = "colours"

    def embed_videos(self, video: Tensor) -> Tensor:
        return video.mean((1, 3, 4)) + 0.1

    def embed_texts(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([[float(prompt.count(letter)) for letter in "abc"] for prompt in prompts])


def random_inputs(num_videos: int, num_frames: int = 9, seed: int = 0) -> dict[str, object]:
    """What the metrics' `update` takes, by the names of its arguments; half of the frames without a face."""
    rng = torch.Generator().manual_seed(seed)
    draw = partial(torch.rand, generator=rng)
    landmarks = FACE + 4 * draw(num_videos, num_frames, 5, 2)
    faces = VideoFaces(
        found=draw(num_videos, num_frames) > 0.5,
        boxes=BOX + draw(num_videos, num_frames, 4),
        landmarks=landmarks,
        embeddings=draw(num_videos, num_frames, 6),
        sizes=torch.tensor([[HEIGHT, WIDTH]]).expand(num_videos, 2),
    )
    faces.found[-1] = False
    references = ReferenceFaces(
        boxes=BOX + draw(num_videos, 3, 4),
        landmarks=FACE + 4 * draw(num_videos, 3, 5, 2),
        embeddings=draw(num_videos, 3, 6),
        mask=torch.tensor([[True, True, False]]).expand(num_videos, 3),
    )
    offsets = [[(5 * i + 1) * t % 7 for t in range(num_frames)] for i in range(num_videos)]
    video = torch.cat([panned(row, 32, 48, seed=i) for i, row in enumerate(offsets)])
    video = video * 0.5 + 0.4 * (draw(num_videos, num_frames, 3, 1, 1) - 0.5)
    names = ("face_rate", "similarity", "motion", "text")
    return {
        "faces": faces,
        "references": references,
        "video": video,
        "prompts": ["abc" * (i % 3) + "ab" + "c" * i for i in range(num_videos)],
        "identities": torch.arange(num_videos) % 3,
        **{name: draw(num_videos) for name in names},
    }


def batch_of(inputs: dict[str, object], start: int, end: int) -> dict[str, object]:
    """Some of the videos."""
    part = slice(start, end)
    return {
        name: type(value)(*(tensor[part] for tensor in value))
        if isinstance(value, VideoFaces | ReferenceFaces)
        else value[part]
        for name, value in inputs.items()
    }


def every_metric() -> dict[str, Metric]:
    return {
        "similarity": AverageIDSimilarity(),
        "distance": AverageIDDistance(),
        "rate": FaceDetectionRate(),
        "decay": SimilarityDecay(),
        "fm_ref": FaceMotionRef(),
        "fm_inter": FaceMotionInter(),
        "top1": IdentityRetrieval(),
        "top2": IdentityRetrieval(top_k=2),
        "drift": ColorDrift(),
        "dynamic": DynamicDegree(threshold=20.0),
        "smoothness": MotionSmoothness(),
        "text": TextAlignment(ColorsAndLetters()),
        "inception": InceptionScore(Colors(), splits=1),
        "success": SuccessRates(),
    }


def update(metric: Metric, inputs: dict[str, object]) -> None:
    metric.update(**metric._filter_kwargs(**inputs))
