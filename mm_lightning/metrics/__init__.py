"""Figures of generated videos, a torchmetrics.Metric per file: batched, resettable, reducible over processes.

Faces are found and embedded once, elsewhere, and come in as `VideoFaces` and `ReferenceFaces`; videos as
(B, F, 3, H, W) in [-1, 1]. All but `InceptionScore` also give their figures per video.
"""

from mm_lightning.metrics.color_drift import ColorDrift
from mm_lightning.metrics.dynamic_degree import DynamicDegree
from mm_lightning.metrics.face_detection_rate import FaceDetectionRate
from mm_lightning.metrics.face_motion_inter import FaceMotionInter
from mm_lightning.metrics.face_motion_ref import FaceMotionRef
from mm_lightning.metrics.id_distance import AverageIDDistance
from mm_lightning.metrics.id_similarity import AverageIDSimilarity
from mm_lightning.metrics.identity_retrieval import IdentityRetrieval
from mm_lightning.metrics.inception_score import InceptionScore
from mm_lightning.metrics.motion_smoothness import MotionSmoothness
from mm_lightning.metrics.optical_flow import OpenCVFlow, RaftFlow, load_flow
from mm_lightning.metrics.similarity_decay import SimilarityDecay
from mm_lightning.metrics.success_rates import SuccessRates
from mm_lightning.metrics.text_alignment import TextAlignment
from mm_lightning.metrics.video_text import CLIPEncoder, ViCLIPEncoder

__all__ = [
    "AverageIDDistance",
    "AverageIDSimilarity",
    "CLIPEncoder",
    "ColorDrift",
    "DynamicDegree",
    "FaceDetectionRate",
    "FaceMotionInter",
    "FaceMotionRef",
    "IdentityRetrieval",
    "InceptionScore",
    "MotionSmoothness",
    "OpenCVFlow",
    "RaftFlow",
    "SimilarityDecay",
    "SuccessRates",
    "TextAlignment",
    "ViCLIPEncoder",
    "load_flow",
]
