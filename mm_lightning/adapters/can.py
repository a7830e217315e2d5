"""Modulation by time and by identity: equations 6 and 7 of MagicMirror.

Letters: B batch, D width of the transformer, E_t width of the time embedding, c1 width of the identity embedding,
h hidden width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Modulation(NamedTuple):
    """One stream's factors before one sub-layer, mu, sigma and gamma of the paper, each (B, 1, D)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def zero_init(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


def split_modulation(modulation: Tensor, num_streams: int) -> list[Modulation]:
    """(B, 3 * num_streams * D) -> one `Modulation` per stream, in the packed order."""
    factors = modulation.unsqueeze(1).chunk(3 * num_streams, dim=-1)  # each (B, 1, D)
    return [Modulation(*factors[i : i + 3]) for i in range(0, len(factors), 3)]


class ConditionedAdaptiveNorm(nn.Module):
    """CAN, equation 7: identity moves the distribution of every modulation factor of the frozen block.

    m_hat = phi_cond(x_id, t, mu1_vid) is added to the base's own factors; zero at initialisation.

    Args:
        dim: D, width of the transformer.
        time_embed_dim: E_t.
        id_embed_dim: c1, width of the projected identity.
        hidden_dim: h, hidden width of phi_cond; it decides the size.
    """

    def __init__(self, dim: int, time_embed_dim: int, id_embed_dim: int, hidden_dim: int):
        super().__init__()
        self.dim = dim
        self.phi_cond = nn.Sequential(
            nn.Linear(id_embed_dim + time_embed_dim + dim, hidden_dim),
            nn.SiLU(),
            zero_init(nn.Linear(hidden_dim, 12 * dim)),
        )

    def forward(self, modulation: Tensor, temb: Tensor, id_embed: Tensor, scale: float = 1.0) -> Tensor:
        """Return the conditioned factors (B, 12 D).

        Args:
            modulation: (B, 12 D), the base's factors in diffusers' order
                [norm1: video shift, scale, gate, text shift, scale, gate | norm2: the same].
            temb: (B, E_t), time embedding after the base's SiLU.
            id_embed: (B, c1).
            scale: strength of the residual.
        """
        shift = modulation[:, : self.dim]  # mu1_vid (B, D)
        delta = self.phi_cond(torch.cat([id_embed, temb, shift], dim=1))  # (B, 12 D)
        return modulation + scale * delta


class NullConditionedAdaptiveNorm(nn.Module):
    """Stands in for CAN in the ablation without it: the base's factors stay, the identity is not looked at."""

    def __init__(self, dim: int, time_embed_dim: int, id_embed_dim: int, hidden_dim: int):
        super().__init__()

    def forward(self, modulation: Tensor, temb: Tensor, id_embed: Tensor | None, scale: float = 1.0) -> Tensor:
        return modulation


class FaceAdaptiveNorm(nn.Module):
    """m_face = phi_face(t), equation 6: the face stream's own factors; zero at initialisation.

    Args:
        dim: D.
        time_embed_dim: E_t.
        hidden_dim: None for SiLU and one linear like the base's own norm; else the width of a hidden layer between.
    """

    def __init__(self, dim: int, time_embed_dim: int, hidden_dim: int | None = None):
        super().__init__()
        hidden = [] if hidden_dim is None else [nn.Linear(time_embed_dim, hidden_dim), nn.SiLU()]
        self.phi_face = nn.Sequential(nn.SiLU(), *hidden, zero_init(nn.Linear(hidden_dim or time_embed_dim, 6 * dim)))

    def forward(self, temb: Tensor) -> Tensor:
        """(B, E_t), before any SiLU -> (B, 6 D), [norm1: shift, scale, gate | norm2: the same]."""
        return self.phi_face(temb)


class ConstantFaceNorm(nn.Module):
    """Stands in for `FaceAdaptiveNorm` in the ablation without m_face: all factors zero at any time.

    The face tokens are then seen by every adapted layer as they came from the perceiver.
    """

    def __init__(self, dim: int, time_embed_dim: int, hidden_dim: int | None = None):
        super().__init__()
        self.dim = dim

    def forward(self, temb: Tensor) -> Tensor:
        return temb.new_zeros(temb.shape[0], 6 * self.dim)
