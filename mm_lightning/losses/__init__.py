"""Loss terms: pure, per sample, no reduction over the batch."""

from mm_lightning.losses.combined import CombinedLoss
from mm_lightning.losses.diffusion import DiffusionLoss, FaceRegion, VelocityLoss, WholeFrame, boxes_to_latent_mask
from mm_lightning.losses.identity import IdentityLoss, NullIdentityLoss, average_reference_embedding

__all__ = [
    "CombinedLoss",
    "DiffusionLoss",
    "FaceRegion",
    "IdentityLoss",
    "NullIdentityLoss",
    "VelocityLoss",
    "WholeFrame",
    "average_reference_embedding",
    "boxes_to_latent_mask",
]
