"""Named tuples that travel between the parts.

Letters: B batch, F frames, F' latent frames, C latent channels, H W pixels, h w latent pixels, R references per sample,
S side of a reference picture, T text tokens, N face tokens, L tokens of the vision encoder, D width of the transformer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TextFeatures(NamedTuple):
    """Frozen T5's view of the prompts."""

    prompt_embeds: Tensor  # (B, T, D_txt)
    id_token_mask: Tensor  # (B, T) bool, the two positions of the class word, `m` of equation 5


class FaceFeatures(NamedTuple):
    """What the frozen networks say of the reference pictures: `f` and `q_id` of the paper."""

    last_hidden_state: Tensor  # (B, R, L, D_vit)
    penultimate_hidden_state: Tensor  # (B, R, L, D_vit)
    id_query: Tensor  # (B, R, E), raw, not normalised
    reference_mask: Tensor  # (B, R) bool, False where a sample has fewer references than R


class IdentityCondition(NamedTuple):
    """What the transformer is told about the person; None where a branch is ablated."""

    prompt_embeds: Tensor  # (B, T, D_txt), identity fused in at the class word
    face_hidden_states: Tensor | None  # (B, N, D)
    id_embed: Tensor | None  # (B, c1)

    def attention_kwargs(self, num_copies: int = 1) -> dict[str, Tensor]:
        """What the transformer takes; guidance wants a copy for each half of its batch."""
        tensors = {"face_hidden_states": self.face_hidden_states, "id_embed": self.id_embed}
        return {name: torch.cat([tensor] * num_copies) for name, tensor in tensors.items() if tensor is not None}


class Batch(NamedTuple):
    """Collated samples. Coordinates are pixels of the delivered picture, (0, 0) the centre of its first pixel."""

    keys: list[str]
    captions: list[str]
    pixels: Tensor | None  # (B, F, 3, H, W) in [-1, 1]; None when latent_moments are there
    latent_moments: Tensor | None  # (B, F', 2C, h, w), mean and log-variance of the VAE, unscaled
    face_boxes: Tensor  # (B, F, 4) x0 y0 x1 y1; all zero where the frame shows no face
    face_landmarks: Tensor  # (B, F, 5, 2) eyes, nose, mouth corners (RetinaFace order); zero where there is no face
    references: Tensor  # (B, R, 3, S, S) in [-1, 1]; zero where reference_mask is False
    reference_landmarks: Tensor  # (B, R, 5, 2) in pixels of the reference
    reference_mask: Tensor  # (B, R) bool
    text: TextFeatures | None  # cached, else computed from captions
    face: FaceFeatures | None  # cached, else computed from references
    weights: Tensor | None = None  # (B,) 1, or 0 for a stand-in of a damaged sample (its key is empty); None: all 1


class NoisySample(NamedTuple):
    """A draw of the forward process, all in fp32."""

    latents: Tensor  # (B, F', C, h, w), clean, scaled
    noise: Tensor  # like latents
    noisy_latents: Tensor  # like latents
    velocity: Tensor  # like latents, the target
    timestep: Tensor  # (B,) int64
    alpha_bar: Tensor  # (B,)


class LossOutput(NamedTuple):
    """Per-sample losses; a term that does not apply to a sample is NaN in `terms` and absent from `total`."""

    total: Tensor  # (B,)
    terms: dict[str, Tensor]  # name -> (B,), unweighted
    counts: dict[str, Tensor]  # name -> scalar, how often something noteworthy happened


class Preview(NamedTuple):
    """What a look at a running training shows; pictures are RGB in [-1, 1]."""

    prompt: str
    reference: Tensor  # (3, S, S)
    video: Tensor  # (F, 3, H, W), generated
    denoised: Tensor | None  # (F, 3, H, W), the decoded estimate of a noised target


class VideoFaces(NamedTuple):
    """The person's face in each frame, found and embedded once for all metrics. Coordinates as in Batch.

    Where `found` is False the frame shows no face; what the other tensors hold there is never read.
    """

    found: Tensor  # (B, F) bool
    boxes: Tensor  # (B, F, 4) x0 y0 x1 y1
    landmarks: Tensor  # (B, F, 5, 2)
    embeddings: Tensor  # (B, F, E), raw, by any recogniser, the one of ReferenceFaces
    sizes: Tensor  # (B, 2) height and width of the frames, pixels


class ReferenceFaces(NamedTuple):
    """The person's face in each reference picture, in pixels of that picture; never read where `mask` is False."""

    boxes: Tensor  # (B, R, 4) x0 y0 x1 y1
    landmarks: Tensor  # (B, R, 5, 2)
    embeddings: Tensor  # (B, R, E), raw
    mask: Tensor  # (B, R) bool, False where a sample has fewer references than R or the picture shows no face
