"""The denoising loss: velocity MSE, over the whole frame or over the face only.

Letters: B batch, F frames, F' latent frames, C latent channels, h w latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class RegionMask(NamedTuple):
    """Where the denoising loss looks."""

    mask: Tensor  # (B, F', 1, h, w) bool, never empty for any sample
    num_fallbacks: Tensor  # scalar int64, samples that wanted their face region and had none


class DiffusionTerm(NamedTuple):
    """The denoising loss and how often it fell back to the whole frame."""

    loss: Tensor  # (B,)
    num_fallbacks: Tensor  # scalar int64


class VelocityLoss(nn.Module):
    """Mean squared error of the velocity, per sample, in fp32 (fp64 where the inputs are).

    It equals the x0 error weighted by 1 / (1 - alpha_bar), the form of diffusers' training scripts, since
    x0_hat - x0 = -sqrt(1 - alpha_bar) (v_hat - v); this form has no division by a vanishing number.
    """

    def forward(self, velocity_pred: Tensor, velocity: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            velocity_pred, velocity: (B, F', C, h, w).
            mask: (B, F', 1, h, w) bool or in [0, 1]; the mean is taken over its area. An all-zero mask gives NaN.

        Returns:
            (B,)
        """
        dtype = torch.promote_types(velocity.dtype, torch.float32)
        error = (velocity_pred.to(dtype) - velocity.to(dtype)).square()
        if mask is None:
            return error.flatten(1).mean(1)
        mask = mask.to(dtype)
        return (error * mask).flatten(1).sum(1) / (mask.flatten(1).sum(1) * error.shape[2])


class FaceRegion(nn.Module):
    """Look at the face only, for a random part of the samples (the paper takes half).

    Args:
        prob: in [0, 1], chance of a sample to be masked; each sample draws once from its own generator.
        spatial_ratio, temporal_ratio: pixels per latent pixel, frames per latent frame of the VAE.

    Raises:
        ValueError: prob is no probability.
    """

    def __init__(self, prob: float = 0.5, spatial_ratio: int = 8, temporal_ratio: int = 4) -> None:
        super().__init__()
        if not 0.0 <= prob <= 1.0:
            raise ValueError(f"The share of samples with a face-region loss must lie in [0, 1], not {prob}.")
        self.prob = prob
        self.spatial_ratio = spatial_ratio
        self.temporal_ratio = temporal_ratio

    def forward(
        self, face_boxes: Tensor, latents_shape: Sequence[int], generators: Sequence[torch.Generator]
    ) -> RegionMask:
        """
        Args:
            face_boxes: (B, F, 4) pixels, see `boxes_to_latent_mask`.
            latents_shape: (B, F', C, h, w).
            generators: one CPU generator per sample.

        Returns:
            The mask; a sample without any face in any frame keeps the whole frame and is counted if it was drawn.
        """
        assert len(generators) == len(face_boxes), f"{len(generators)} generators for {len(face_boxes)} samples"
        _, num_latent_frames, _, latent_height, latent_width = latents_shape
        face = boxes_to_latent_mask(
            face_boxes, num_latent_frames, latent_height, latent_width, self.spatial_ratio, self.temporal_ratio
        )
        drawn = torch.stack([torch.rand((), generator=g) for g in generators]).to(face.device) < self.prob
        found = face.flatten(1).any(1)
        masked = (drawn & found).view(-1, 1, 1, 1, 1)
        return RegionMask(face | ~masked, (drawn & ~found).sum())


class WholeFrame(FaceRegion):
    """Look everywhere: the null object that takes `FaceRegion`'s place, with the same arguments, none of them used."""

    def forward(
        self, face_boxes: Tensor, latents_shape: Sequence[int], generators: Sequence[torch.Generator]
    ) -> RegionMask:
        """A full mask; draws nothing."""
        batch, num_latent_frames, _, latent_height, latent_width = latents_shape
        shape = (batch, num_latent_frames, 1, latent_height, latent_width)
        mask = torch.ones(shape, dtype=torch.bool, device=face_boxes.device)
        return RegionMask(mask, torch.zeros((), dtype=torch.int64, device=face_boxes.device))


class DiffusionLoss(nn.Module):
    """Velocity MSE over the region that a selector picks.

    Args:
        region: `FaceRegion` or `WholeFrame`.
    """

    def __init__(self, region: nn.Module) -> None:
        super().__init__()
        self.region = region
        self.velocity = VelocityLoss()

    def forward(
        self, velocity_pred: Tensor, velocity: Tensor, face_boxes: Tensor, generators: Sequence[torch.Generator]
    ) -> DiffusionTerm:
        """velocity_pred, velocity (B, F', C, h, w); face_boxes (B, F, 4) pixels; one CPU generator per sample."""
        mask, num_fallbacks = self.region(face_boxes, velocity.shape, generators)
        return DiffusionTerm(self.velocity(velocity_pred, velocity, mask), num_fallbacks)


def boxes_to_latent_mask(
    face_boxes: Tensor,
    num_latent_frames: int,
    latent_height: int,
    latent_width: int,
    spatial_ratio: int = 8,
    temporal_ratio: int = 4,
) -> Tensor:
    """Every latent cell that a face box touches.

    The VAE is causal: latent frame 0 holds frame 0 alone, each later one holds the next `temporal_ratio` frames and
    gets the union of their boxes.

    Args:
        face_boxes: (B, F, 4) x0 y0 x1 y1 in pixels, (0, 0) the centre of the first pixel. What lies outside of the
            picture is cut off; a box without area (or with NaN) covers nothing.

    Returns:
        (B, F', 1, h, w) bool

    Raises:
        ValueError: F is not 1 + temporal_ratio * (F' - 1).
    """
    num_frames = 1 + temporal_ratio * (num_latent_frames - 1)
    if face_boxes.shape[1] != num_frames:
        raise ValueError(
            f"{face_boxes.shape[1]} frames of face boxes for {num_latent_frames} latent frames, which hold {num_frames}"
            f" frames. Clips must have {temporal_ratio}k + 1 frames, with one box (zeros: no face) for each."
        )
    x0, y0, x1, y1 = face_boxes.unbind(-1)
    columns = _touched(x0, x1, latent_width, spatial_ratio)  # (B, F, w)
    rows = _touched(y0, y1, latent_height, spatial_ratio)  # (B, F, h)
    cells = rows[..., :, None] & columns[..., None, :]  # (B, F, h, w)
    groups = cells[:, 1:].unflatten(1, (num_latent_frames - 1, temporal_ratio)).any(2)
    return torch.cat([cells[:, :1], groups], dim=1).unsqueeze(2)


def _touched(low: Tensor, high: Tensor, num_cells: int, ratio: int) -> Tensor:
    # Cell i spans pixel centres i * ratio ... (i + 1) * ratio - 1, each half a pixel wide on both sides.
    left = torch.arange(num_cells, device=low.device) * ratio - 0.5
    low, high = low.unsqueeze(-1), high.unsqueeze(-1)
    return (low < left + ratio) & (high > left) & (high > low)
