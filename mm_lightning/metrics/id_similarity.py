"""How much the face looks like the person, as a cosine. Letters: B videos, F frames, R references, E embedding."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mm_lightning.metrics.arithmetic import check_faces, check_references, masked_mean, mean_embedding
from mm_lightning.metrics.base import VideoMetric
from mm_lightning.types import ReferenceFaces, VideoFaces


def frame_similarity(embeddings: Tensor, reference: Tensor) -> Tensor:
    """Cosine of (..., F, E) with (..., E) -> (..., F)."""
    return F.cosine_similarity(embeddings, reference[..., None, :], dim=-1)


class AverageIDSimilarity(VideoMetric):
    """Average ID similarity of MagicMirror (ICCV 2025): in [-1, 1], higher is better.

    Of a video: the mean over its frames with a face of the cosine between the frame's embedding and the mean of the
    references' raw embeddings. The mean of several references keeps a copy of one picture from winning. The recogniser
    is whichever embedded the input: dlib's 128-d as in the paper, or ArcFace. Their figures are not comparable: dlib's
    embeddings lie close together, so that different people reach 0.9.

    NaN where no frame or no reference shows a face. Frames without a face are left out: report `FaceDetectionRate`
    beside it.
    """

    higher_is_better = True
    plot_lower_bound = -1.0
    plot_upper_bound = 1.0

    def update(self, faces: VideoFaces, references: ReferenceFaces) -> None:
        """Raises ValueError for tensors that do not fit together."""
        check_faces(faces)
        check_references(references, faces)
        reference = mean_embedding(references.embeddings, references.mask)  # (B, E)
        self.append(masked_mean(frame_similarity(faces.embeddings, reference), faces.found))
