"""How far the face is from the person, as a distance. Letters: B videos, F frames, R references, E embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_lightning.metrics.arithmetic import check_faces, check_references, masked_mean, mean_embedding
from mm_lightning.metrics.base import VideoMetric
from mm_lightning.types import ReferenceFaces, VideoFaces


def frame_distance(embeddings: Tensor, reference: Tensor) -> Tensor:
    """Euclidean distance of (..., F, E) from (..., E) -> (..., F)."""
    return torch.linalg.vector_norm(embeddings - reference[..., None, :], dim=-1)


class AverageIDDistance(VideoMetric):
    """`AverageIDSimilarity` with the Euclidean distance for the cosine: in [0, inf), lower is better.

    Of a video: the mean over its frames with a face of the distance between the frame's raw embedding and the mean of
    the references'. It is the distance for which dlib's recogniser was trained, with 0.6 as the border between two
    people (`face_recognition.compare_faces`). Of ArcFace's raw embeddings the length has no meaning: normalise those
    before.

    NaN where no frame or no reference shows a face.
    """

    higher_is_better = False
    plot_lower_bound = 0.0

    def update(self, faces: VideoFaces, references: ReferenceFaces) -> None:
        """Raises ValueError for tensors that do not fit together."""
        check_faces(faces)
        check_references(references, faces)
        reference = mean_embedding(references.embeddings, references.mask)  # (B, E)
        self.append(masked_mean(frame_distance(faces.embeddings, reference), faces.found))
