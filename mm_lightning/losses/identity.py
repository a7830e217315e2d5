"""The identity loss: how far the generated face is from the reference person, as a face recogniser sees it.

Letters: B batch, R references per sample, E width of the recogniser's embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_lightning.types import NoisySample


class IdentityLoss(nn.Module):
    """alpha_bar * (1 - cos(F_id(reference), F_id(D(x0_hat)))), the paper's second loss, per sample and in fp32.

    One step's estimate of the clean latents shows a face only where little noise was added: above `max_timestep` the
    term does not apply, below it alpha_bar weighs it by the share of signal.

    Args:
        max_timestep: the term applies to timesteps below this,
        min_timestep: and from this on. With little noise the estimate is the noisy latents, whatever was predicted: the
            gradient is smaller by sqrt(1 - alpha_bar), and a decode costs as much as ever.
        prob: in (0, 1], chance of such a sample to have its face decoded; below 1 each sample draws once from its own
            generator. The term is not made larger for it, so its mean weight falls with prob.

    Raises:
        ValueError: max_timestep is not positive, min_timestep negative or not below it, or prob not in (0, 1], so that
            the term would never apply.
    """

    def __init__(self, max_timestep: int = 600, prob: float = 1.0, min_timestep: int = 0) -> None:
        super().__init__()
        if max_timestep <= 0:
            raise ValueError(
                f"max_timestep must be positive, not {max_timestep}: the identity loss would never apply. "
                "To train without it use NullIdentityLoss."
            )
        if not 0 <= min_timestep < max_timestep:
            raise ValueError(f"min_timestep={min_timestep}: give 0 or more, less than max_timestep={max_timestep}.")
        if not 0.0 < prob <= 1.0:
            raise ValueError(
                f"The share of samples with an identity loss must lie in (0, 1], not {prob}. "
                "To train without it use NullIdentityLoss."
            )
        self.max_timestep, self.min_timestep = max_timestep, min_timestep
        self.prob = prob

    def applies(self, sample: NoisySample) -> Tensor:
        """Which samples show enough of a face: (B,) bool."""
        return (sample.timestep >= self.min_timestep) & (sample.timestep < self.max_timestep)

    def wanted(self, sample: NoisySample, generators: Sequence[torch.Generator]) -> Tensor:
        """Which samples need their face decoded: (B,) bool. generators: one CPU generator per sample."""
        applies = self.applies(sample)
        if self.prob == 1:
            return applies
        assert len(generators) == len(applies), f"{len(generators)} generators for {len(applies)} samples"
        drawn = torch.stack([torch.rand((), generator=g) for g in generators]) < self.prob
        return applies & drawn.to(applies.device)

    def forward(self, pred_embed: Tensor, ref_embed: Tensor, sample: NoisySample, valid: Tensor) -> Tensor:
        """
        Args:
            pred_embed, ref_embed: (B, E), of any length.
            valid: (B,) bool, False where no face was or could be decoded.

        Returns:
            (B,) in [0, 2], NaN where the term does not apply.
        """
        pred_embed, ref_embed = pred_embed.float(), ref_embed.float()
        with torch.autocast(pred_embed.device.type, enabled=False):
            distance = 1.0 - F.cosine_similarity(pred_embed, ref_embed, dim=-1)
        loss = sample.alpha_bar.float() * distance
        return torch.where(self.applies(sample) & valid, loss, torch.nan)


class NullIdentityLoss(IdentityLoss):
    """No identity loss: takes `IdentityLoss`'s place, wants no face decoded, gives NaN for every sample."""

    def applies(self, sample: NoisySample) -> Tensor:
        """(B,) all False."""
        return torch.zeros_like(sample.timestep, dtype=torch.bool)

    def wanted(self, sample: NoisySample, generators: Sequence[torch.Generator]) -> Tensor:
        """(B,) all False; draws nothing."""
        return self.applies(sample)


def average_reference_embedding(embeddings: Tensor, reference_mask: Tensor) -> Tensor:
    """Average the embeddings of several reference pictures of one person.

    Each is normalised first, so that every picture has the same say: the raw length grows with the quality of the
    picture, not with how well it shows the person. The loss looks at the direction only.

    Args:
        embeddings: (B, R, E), raw.
        reference_mask: (B, R) bool.

    Returns:
        (B, E) fp32; zeros where a sample has no reference.
    """
    weights = reference_mask.unsqueeze(-1).float()
    directions = F.normalize(embeddings.float(), dim=-1) * weights
    return directions.sum(1) / weights.sum(1).clamp(min=1.0)
