"""The training loss: denoising plus identity.

Letters: B batch, F frames, F' latent frames, C latent channels, h w latent pixels, E width of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mm_lightning.types import LossOutput, NoisySample

EmbedFace = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class CombinedLoss(nn.Module):
    """L = L_noise + lambda * L_id, per sample. lambda is not given in the paper.

    Args:
        diffusion: `DiffusionLoss`.
        identity: `IdentityLoss` or `NullIdentityLoss`.
        identity_weight: lambda; at 0 no face is decoded.

    Raises:
        ValueError: identity_weight is negative.
    """

    def __init__(self, diffusion: nn.Module, identity: nn.Module, identity_weight: float = 0.1) -> None:
        super().__init__()
        if not identity_weight >= 0:
            raise ValueError(f"identity_weight must be 0 (no identity loss) or positive, not {identity_weight}.")
        self.diffusion = diffusion
        self.identity = identity
        self.identity_weight = identity_weight

    def forward(
        self,
        velocity_pred: Tensor,
        sample: NoisySample,
        face_boxes: Tensor,
        ref_embed: Tensor | Callable[[], Tensor],
        embed_face: EmbedFace,
        generators: Sequence[torch.Generator],
    ) -> LossOutput:
        """
        Args:
            velocity_pred: (B, F', C, h, w).
            face_boxes: (B, F, 4) in pixels, zeros where there is no face.
            ref_embed: (B, E) of the reference person, or a function that computes it, called only if it is needed.
            embed_face: (denoised latents (B, F', C, h, w), wanted (B,) bool) -> (embeddings (B, E), valid (B,) bool).
                Called at most once, and not at all when no sample wants it.
            generators: one CPU generator per sample.

        Returns:
            total with gradient; terms "velocity" and "identity" without; counts "empty_face_mask", "identity".
        """
        velocity_loss, num_fallbacks = self.diffusion(velocity_pred, sample.velocity, face_boxes, generators)
        identity_loss, applies = self._identity(velocity_pred, sample, ref_embed, embed_face, generators)
        total = velocity_loss + self.identity_weight * torch.where(applies, identity_loss, 0.0)
        return LossOutput(
            total=total,
            terms={"velocity": velocity_loss.detach(), "identity": identity_loss.detach()},
            counts={"empty_face_mask": num_fallbacks, "identity": applies.sum()},
        )

    def _identity(
        self,
        velocity_pred: Tensor,
        sample: NoisySample,
        ref_embed: Tensor | Callable[[], Tensor],
        embed_face: EmbedFace,
        generators: Sequence[torch.Generator],
    ) -> tuple[Tensor, Tensor]:
        wanted = self.identity.wanted(sample, generators)
        if self.identity_weight == 0 or not wanted.any():
            return torch.full_like(sample.alpha_bar, torch.nan), torch.zeros_like(wanted)
        pred_embed, valid = embed_face(_denoised(velocity_pred, sample), wanted)
        reference = ref_embed() if callable(ref_embed) else ref_embed
        return self.identity(pred_embed, reference, sample, valid), wanted & valid


def _denoised(velocity_pred: Tensor, sample: NoisySample) -> Tensor:
    # x0 = sqrt(a) x_t - sqrt(1 - a) v, as in Diffusion.denoised
    alpha_bar = sample.alpha_bar.view(-1, *[1] * (velocity_pred.ndim - 1))
    return alpha_bar.sqrt() * sample.noisy_latents - (1.0 - alpha_bar).sqrt() * velocity_pred.to(sample.noisy_latents)
