"""What several metrics compute with: sampled frames, means over what is known, checks of the input.

Letters: B videos, F frames, R references, E width of the embedding, H W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mm_lightning.types import ReferenceFaces, VideoFaces

NUM_FACIAL_FRAMES = 16  # the paper's, for facial motion
TOLERANCE = 0.01  # of the range of pixels: what rounding to bf16 adds


def sample_frames(num_frames: int, count: int = NUM_FACIAL_FRAMES) -> list[int]:
    """`count` frames at equal distances from the first to the last, all where there are no more."""
    return np.unique(np.linspace(0, num_frames - 1, min(count, num_frames)).round().astype(int)).tolist()


def masked_mean(values: Tensor, known: Tensor, dim: int = -1) -> Tensor:
    """Mean over `dim` where `known`; NaN where nothing is."""
    return torch.where(known, values, 0.0).sum(dim) / known.sum(dim)


def mean_of_known(values: Tensor) -> Tensor:
    """(N,) -> scalar, the mean without NaN; NaN where nothing else is there."""
    return values.nanmean()


def mean_embedding(embeddings: Tensor, known: Tensor) -> Tensor:
    """(B, N, E) with (B, N) bool -> (B, E), the mean of the raw embeddings; NaN where none is known."""
    return masked_mean(embeddings, known[..., None], dim=-2)


# Checks ---------------------------------------------------------------------------------------------------------------


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raises ValueError below `least`."""
    if value < least:
        raise ValueError(f"{name}={value}: give a number from {least}.")


def check_video(video: Tensor) -> None:
    """Raises ValueError for anything but (B, F, 3, H, W) floats in [-1, 1]."""
    if video.ndim != 5 or video.shape[2] != 3 or not video.is_floating_point() or 0 in video.shape:
        raise ValueError(
            f"A video must be (B, F, 3, H, W) floats, got {video.dtype} {tuple(video.shape)}: move the channels before "
            "the pixels, and bring uint8 to [-1, 1] by `video.float() / 127.5 - 1`."
        )
    low, high = video.aminmax()
    if not (low >= -1 - TOLERANCE and high <= 1 + TOLERANCE):
        raise ValueError(
            f"The pixels of a video must lie in [-1, 1], these reach from {low:.4g} to {high:.4g}: scale them."
        )


def check_faces(faces: VideoFaces) -> None:
    """Raises ValueError for shapes that do not fit together, and for found faces with empty boxes or NaN landmarks."""
    check_shapes("faces", faces.found, faces.boxes, faces.landmarks, faces.embeddings)
    num_videos, num_frames = faces.found.shape
    if faces.sizes.shape != (num_videos, 2) or num_frames == 0 or not (faces.sizes > 0).all():
        raise ValueError(
            f"faces.sizes must be the height and width of each of {num_videos} videos of at least one frame, got "
            f"{faces.sizes.tolist()} for {num_frames} frames."
        )


def check_references(references: ReferenceFaces, faces: VideoFaces) -> None:
    """Raises ValueError as `check_faces`, and where the references are not those of the videos."""
    check_shapes("references", references.mask, references.boxes, references.landmarks, references.embeddings)
    if len(references.mask) != len(faces.found):
        raise ValueError(
            f"{len(references.mask)} samples of references for {len(faces.found)} videos: give each its own."
        )
    widths = references.embeddings.shape[-1], faces.embeddings.shape[-1]
    if widths[0] != widths[1]:
        raise ValueError(
            f"References have embeddings of width {widths[0]}, videos of width {widths[1]}: embed both with one "
            "recogniser."
        )


def check_shapes(name: str, known: Tensor, boxes: Tensor, landmarks: Tensor, embeddings: Tensor) -> None:
    """Raises ValueError, naming the tensor: (B, N) bool with (B, N, 4), (B, N, 5, 2), (B, N, E), sound where known."""
    if known.ndim != 2 or known.dtype != torch.bool:
        raise ValueError(
            f"{name}: which faces are there must be (B, N) bool, got {known.dtype} {tuple(known.shape)}; convert by "
            "`tensor.bool()`."
        )
    tensors = {"boxes": (boxes, (4,)), "landmarks": (landmarks, (5, 2)), "embeddings": (embeddings, ("E",))}
    for part, (tensor, tail) in tensors.items():
        shape = (*known.shape, *(tensor.shape[-1:] if tail == ("E",) else tail))
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            wanted = ", ".join(map(str, (*known.shape, *tail)))
            raise ValueError(f"{name}.{part} must be floats ({wanted}), got {tensor.dtype} {tuple(tensor.shape)}.")
        if not tensor[known].isfinite().all():
            raise ValueError(f"{name}.{part} has NaN or infinity where a face is said to be: mark that face as absent.")
    if not (boxes[known][:, 2:] > boxes[known][:, :2]).all():
        raise ValueError(f"{name}.boxes must be x0 y0 x1 y1 with x0 < x1 and y0 < y1 where a face is said to be.")
