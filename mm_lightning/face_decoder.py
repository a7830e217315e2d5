"""From estimated clean latents to the embedding of the face that they show, with gradient: D and F_id of the loss.

Letters: B batch, F frames, F' latent frames, C latent channels, h w latent pixels, E width of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mm_lightning.fewer_operations import fewer_operations


class LatentCrop(NamedTuple):
    """A window of the latent grid, half open."""

    top: int
    left: int
    bottom: int
    right: int


class FaceDecoder(nn.Module):
    """Decode the first latent frame around the face, align the face, embed it.

    Only latent frame 0 stands for one picture (the VAE is causal): a later one alone holds four frames, and two
    together decode to eight frames, as if neither were the first. A crop is decoded, not the picture: at 5B size
    32x32 latents cost a fifth of a 480x720 frame. The VAE works in its own dtype, the recogniser in fp32, both outside
    of autocast. Both are frozen here and stay in evaluation mode. The decoder runs with `fewer_operations`.

    Args:
        vae: CogVideoX's; its config gives the scaling factor of the latents and the pixels per latent.
        recognizer: has `embed_dim` and `embed(pixels, landmarks)`, which aligns and embeds faces, differentiably:
            pixels (B, 3, H, W) in [-1, 1], landmarks (B, 5, 2) in pixels -> (B, E).
        crop_size: smallest side of the crop, in latents, where the picture is that large. A face that is larger, margin
            included, gets a larger crop.
        margin: latents to keep around the face box: at its border a crop decodes otherwise than the whole picture.
        checkpointing: recompute the VAE's activations in the backward pass; a small VAE need not.

    Raises:
        ValueError: crop_size or margin make no crop.
    """

    def __init__(
        self,
        vae: AutoencoderKLCogVideoX,
        recognizer: nn.Module,
        crop_size: int = 32,
        margin: int = 4,
        checkpointing: bool = True,
    ) -> None:
        super().__init__()
        if crop_size < 1 or margin < 0:
            raise ValueError(f"crop_size must be at least 1 and margin at least 0, not {crop_size} and {margin}.")
        self.vae = vae
        self.recognizer = recognizer
        self.crop_size = crop_size
        self.margin = margin
        self.scaling_factor = vae.config.scaling_factor
        self.spatial_ratio = 2 ** (len(vae.config.block_out_channels) - 1)
        self.requires_grad_(False).eval()
        if checkpointing:
            vae.enable_gradient_checkpointing(partial(recomputed, lambda: (nullcontext(), fewer_operations(vae))))

    def train(self, mode: bool = True) -> FaceDecoder:
        """Stay in evaluation mode: a recogniser's batch norm must not learn from the training run."""
        return super().train(False)

    def forward(
        self, denoised: Tensor, face_boxes: Tensor, face_landmarks: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            denoised: (B, F', C, h, w), scaled latents.
            face_boxes: (B, F, 4) and
            face_landmarks: (B, F, 5, 2) in pixels of the target video; frame 0 is used. Zeros: no face.
            wanted: (B,) bool, the samples to decode.

        Returns:
            embeddings (B, E) fp32, zeros where not valid; valid (B,) bool, the samples that are wanted and have a face
            in frame 0. Nothing is decoded for the others.

        Raises:
            RuntimeError: the latents carry a gradient that the decoded face lost.
        """
        landmarks = face_landmarks[:, 0]
        boxes = self._clip(face_boxes[:, 0], *denoised.shape[-2:])
        valid = wanted & (boxes[:, 2:] > boxes[:, :2]).all(1) & (landmarks.amax(1) > landmarks.amin(1)).any(1)
        embeddings = torch.zeros(len(denoised), self.recognizer.embed_dim, device=denoised.device)
        rows = valid.nonzero().flatten().tolist()
        if not rows:
            return embeddings, valid
        with torch.autocast(denoised.device.type, enabled=False):
            faces = self._embed(denoised[rows, 0], boxes[rows], landmarks[rows])
        if torch.is_grad_enabled() and denoised.requires_grad and not faces.requires_grad:
            raise RuntimeError("The gradient ends in the face decode: the VAE or the recogniser runs under no_grad.")
        return embeddings.index_put((torch.tensor(rows, device=faces.device),), faces), valid

    def crop_around(self, box: list[float], height: int, width: int) -> LatentCrop:
        """The window of an (height, width) latent grid around a face box x0 y0 x1 y1 given in pixels."""
        top, bottom = self._span(box[1], box[3], height)
        left, right = self._span(box[0], box[2], width)
        return LatentCrop(top, left, bottom, right)

    def _clip(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """boxes (B, 4) in pixels, cut to the picture of a (height, width) latent grid."""
        limit = boxes.new_tensor([width, height, width, height]) * self.spatial_ratio - 0.5
        return boxes.clamp(torch.full_like(limit, -0.5), limit)

    def _span(self, low: float, high: float, limit: int) -> tuple[int, int]:
        # Half a pixel: (0, 0) is the centre of the first pixel, cells count from its edge.
        start = max(math.floor((low + 0.5) / self.spatial_ratio) - self.margin, 0)
        stop = min(math.ceil((high + 0.5) / self.spatial_ratio) + self.margin, limit)
        size = min(max(stop - start, self.crop_size), limit)
        start = min(max((start + stop - size) // 2, 0), limit - size)
        return start, start + size

    def _embed(self, latents: Tensor, boxes: Tensor, landmarks: Tensor) -> Tensor:
        """latents (n, C, h, w), boxes (n, 4), landmarks (n, 5, 2) -> (n, E); crops of one size go together."""
        crops = [self.crop_around(box, *latents.shape[-2:]) for box in boxes.tolist()]
        corners = latents.new_tensor([(crop.left, crop.top) for crop in crops]) * self.spatial_ratio
        landmarks = (landmarks - corners[:, None]).float()
        embeddings: list[Tensor] = [None] * len(crops)
        for rows in same_size(crops):
            pixels = self._decode(torch.stack([cut(latents[i], crops[i]) for i in rows]))
            for i, embedding in zip(rows, self.recognizer.embed(pixels.float(), landmarks[rows]).float(), strict=True):
                embeddings[i] = embedding
        return torch.stack(embeddings)

    def _decode(self, latents: Tensor) -> Tensor:
        """(n, C, h, w) -> (n, 3, H, W), not clamped to [-1, 1]: a clamp would stop the gradient."""
        video = (latents / self.scaling_factor)[:, :, None].to(self.vae.dtype)  # (n, C, 1, h, w)
        with fewer_operations(self.vae):
            return self.vae.decode(video).sample[:, :, 0]


def recomputed(contexts: Callable[[], tuple[Any, Any]], module: nn.Module, *args: Any) -> Any:
    """`module(*args)`, its activations computed again in the backward pass, by the arithmetic of the forward pass."""
    return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=contexts)


def same_size(crops: Sequence[LatentCrop]) -> list[list[int]]:
    """Places of the crops, by height and width."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, crop in enumerate(crops):
        groups.setdefault((crop.bottom - crop.top, crop.right - crop.left), []).append(i)
    return list(groups.values())


def cut(latents: Tensor, crop: LatentCrop) -> Tensor:
    """(C, h, w) -> the crop of it."""
    return latents[:, crop.top : crop.bottom, crop.left : crop.right]
