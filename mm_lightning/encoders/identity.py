"""The trained front-end: dense features, identity query and text -> what the transformer is told about the person.

Letters: B batch, R references, T text tokens, K identity tokens, N face tokens, L tokens of the vision encoder;
widths: D_vit vision encoder, E face embedding, D_txt T5, D_id identity tokens, D transformer, c1 identity embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mm_lightning.encoders.perceiver import average_references
from mm_lightning.types import FaceFeatures, IdentityCondition, TextFeatures


def zero_init(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class FusionMLP(nn.Module):
    """MLP_fuse as a residual: x_txt + MLP([x_txt, x_id]). Zero at the end, so that untrained it returns x_txt exactly.

    10,503,168 parameters with hidden_dim 1024 on T5-XXL and PhotoMaker-V2's tokens, 20,989,952 with 2048.

    Args:
        text_dim: D_txt.
        id_dim: D_id.
        hidden_dim: of the MLP.
    """

    def __init__(self, text_dim: int = 4096, id_dim: int = 2048, hidden_dim: int = 2048):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(text_dim + id_dim),
            nn.Linear(text_dim + id_dim, hidden_dim),
            nn.GELU(),
            zero_init(nn.Linear(hidden_dim, text_dim)),
        )

    def forward(self, prompt_embeds: Tensor, id_tokens: Tensor) -> Tensor:
        """prompt_embeds (B, K, D_txt), id_tokens (B, K, D_id) -> fused (B, K, D_txt)."""
        dtype = self.mlp[0].weight.dtype
        return prompt_embeds + self.mlp(torch.cat([prompt_embeds.to(dtype), id_tokens.to(dtype)], dim=-1))


class TwoStageFusion(nn.Module):
    """MLP_fuse with the two stages of PhotoMaker's FuseModule, at T5's width: 92,327,936 parameters.

    PhotoMaker ends in a layer norm, which T5's states do not survive (they are not of unit variance). Here the norm is
    on the projected identity, and the second stage, zero at the end, is added to the untouched x_txt.

    Args:
        text_dim: D_txt.
        id_dim: D_id.
        hidden_dim: of both stages.
    """

    def __init__(self, text_dim: int = 4096, id_dim: int = 2048, hidden_dim: int = 4096):
        super().__init__()
        self.id_proj = nn.Sequential(nn.Linear(id_dim, text_dim), nn.LayerNorm(text_dim))
        self.stage1 = nn.Sequential(
            nn.LayerNorm(2 * text_dim), nn.Linear(2 * text_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, text_dim)
        )
        self.stage2 = nn.Sequential(
            nn.LayerNorm(text_dim),
            nn.Linear(text_dim, hidden_dim),
            nn.GELU(),
            zero_init(nn.Linear(hidden_dim, text_dim)),
        )

    def forward(self, prompt_embeds: Tensor, id_tokens: Tensor) -> Tensor:
        """prompt_embeds (B, K, D_txt), id_tokens (B, K, D_id) -> fused (B, K, D_txt)."""
        dtype = self.id_proj[0].weight.dtype
        text = prompt_embeds.to(dtype)
        mixed = text + self.stage1(torch.cat([text, self.id_proj(id_tokens.to(dtype))], dim=-1))
        return prompt_embeds + self.stage2(mixed)


class IdentityProjection(nn.Module):
    """x_id -> the one vector that every adapted layer's CAN reads (equation 7): the tokens side by side, projected.

    Args:
        num_tokens: K.
        id_dim: D_id.
        id_embed_dim: c1.
    """

    def __init__(self, num_tokens: int = 2, id_dim: int = 2048, id_embed_dim: int = 512):
        super().__init__()
        self.proj = nn.Linear(num_tokens * id_dim, id_embed_dim)

    def forward(self, id_tokens: Tensor) -> Tensor:
        """(B, K, D_id) -> (B, c1)."""
        return self.proj(id_tokens.flatten(1).to(self.proj.weight.dtype))


class NullIdentityPerceiver(nn.Module):
    """Stands for tau_id where neither text nor CAN gets an identity (structure branch only): zero tokens.

    Takes the arguments of what it stands for, as do the other null parts.
    """

    def __init__(self, num_tokens: int = 2, hidden_dim: int = 2048, **sizes: Any):
        super().__init__()
        self.num_tokens, self.hidden_dim = num_tokens, hidden_dim

    def forward(self, id_query: Tensor, last_hidden_state: Tensor) -> Tensor:
        return id_query.new_zeros(len(id_query), self.num_tokens, self.hidden_dim)


class NullFacePerceiver(nn.Module):
    """Stands for tau_face where the face branch is ablated: no tokens."""

    def __init__(self, **sizes: Any):
        super().__init__()

    def forward(self, penultimate_hidden_state: Tensor) -> None:
        return None

    def null_tokens(self) -> None:
        return None


class NullFusion(nn.Module):
    """Stands for MLP_fuse where the text branch is ablated: x_txt, untouched."""

    def __init__(self, **sizes: Any):
        super().__init__()

    def forward(self, prompt_embeds: Tensor, id_tokens: Tensor) -> Tensor:
        return prompt_embeds


class NullIdentityProjection(nn.Module):
    """Stands for the projection of x_id where CAN is ablated: no vector."""

    def __init__(self, **sizes: Any):
        super().__init__()

    def forward(self, id_tokens: Tensor) -> None:
        return None


class IdentityEncoder(nn.Module):
    """The front-end around the transformer; runs once per video.

    Nothing in it is frozen: freeze tau_id from outside by `requires_grad_(False)` where its weights are pre-trained.
    Every parameter takes part in every step, whatever is dropped, so that data-parallel training finds none unused.

    Args:
        id_perceiver: tau_id, `(id_query (B, E), last_hidden_state (B, L, D_vit)) -> (B, K, D_id)`.
        face_perceiver: tau_face, `(penultimate_hidden_state (B, L, D_vit)) -> (B, N, D)`, `null_tokens() -> (N, D)`.
        fusion: MLP_fuse, `(prompt_embeds (B, K, D_txt), id_tokens (B, K, D_id)) -> (B, K, D_txt)`.
        id_projection: `(id_tokens (B, K, D_id)) -> (B, c1)`.
    """

    def __init__(self, id_perceiver: nn.Module, face_perceiver: nn.Module, fusion: nn.Module, id_projection: nn.Module):
        super().__init__()
        self.id_perceiver, self.face_perceiver = id_perceiver, face_perceiver
        self.fusion, self.id_projection = fusion, id_projection
        null_tokens = face_perceiver.null_tokens()
        self.null_face_tokens = None if null_tokens is None else nn.Parameter(null_tokens)

    @property
    def device(self) -> torch.device:
        """Of its first parameter; a pipeline asks its parts."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @classmethod
    def build(
        cls,
        id_perceiver: Callable[..., nn.Module],
        face_perceiver: Callable[..., nn.Module],
        fusion: Callable[..., nn.Module],
        id_projection: Callable[..., nn.Module],
        id_query_dim: int,
        vision_dim: int,
        text_dim: int,
        dim: int,
        id_embed_dim: int,
    ) -> IdentityEncoder:
        """Make the parts fit the loaded networks: each factory gets the widths that are not its own choice.

        Args:
            id_perceiver, face_perceiver, fusion, id_projection: classes of this package or partials of them.
            id_query_dim: E. vision_dim: D_vit. text_dim: D_txt. dim: D. id_embed_dim: c1.
        """
        perceiver = id_perceiver(id_embed_dim=id_query_dim, vision_dim=vision_dim)
        tokens = {"num_tokens": perceiver.num_tokens, "id_dim": perceiver.hidden_dim}
        return cls(
            id_perceiver=perceiver,
            face_perceiver=face_perceiver(vision_dim=vision_dim, out_dim=dim),
            fusion=fusion(text_dim=text_dim, id_dim=perceiver.hidden_dim),
            id_projection=id_projection(**tokens, id_embed_dim=id_embed_dim),
        )

    def forward(
        self, features: FaceFeatures, text: TextFeatures, drop_identity: Tensor | None = None
    ) -> IdentityCondition:
        """References are averaged; a dropped identity, or a sample without any reference, gets the null identity.

        Null identity: learned face tokens, zero `id_embed`, text as T5 has it. Text is dropped apart, by `drop_text`.

        Args:
            features: of the references.
            text: of the prompts.
            drop_identity: (B,) bool.

        Raises ValueError if the text has another number of class-word positions than there are identity tokens.
        """
        dropped = ~features.reference_mask.any(dim=1)
        if drop_identity is not None:
            dropped = dropped | drop_identity.to(dropped.device)
        id_tokens = per_reference(
            self.id_perceiver, features.reference_mask, features.id_query, features.last_hidden_state
        )
        face_tokens = per_reference(self.face_perceiver, features.reference_mask, features.penultimate_hidden_state)
        id_token_mask = text.id_token_mask & ~dropped[:, None]
        return IdentityCondition(
            prompt_embeds=fuse_identity(self.fusion, text.prompt_embeds, id_token_mask, id_tokens),
            face_hidden_states=replace_dropped(face_tokens, self.null_face_tokens, dropped),
            id_embed=replace_dropped(self.id_projection(id_tokens), 0.0, dropped),
        )


def per_reference(perceiver: nn.Module, reference_mask: Tensor, *features: Tensor) -> Tensor | None:
    """Run a perceiver on every reference (B, R, ...) and average its tokens: (B, K, D), or None from a null one."""
    tokens = perceiver(*(feature.flatten(0, 1) for feature in features))  # (B * R, K, D)
    if tokens is None:
        return None
    return average_references(tokens.unflatten(0, reference_mask.shape), reference_mask)


def replace_dropped(values: Tensor | None, null: Tensor | float, dropped: Tensor) -> Tensor | None:
    """values (B, ...), null for one sample, dropped (B,) bool -> values with null where dropped."""
    if values is None:
        return None
    null = torch.as_tensor(null, dtype=values.dtype, device=values.device)
    return torch.where(dropped.view(-1, *(1,) * (values.ndim - 1)), null, values)


def fuse_identity(fusion: nn.Module, prompt_embeds: Tensor, id_token_mask: Tensor, id_tokens: Tensor) -> Tensor:
    """Equation 5: m * xhat_id + (1 - m) * x_txt; the k-th class-word position takes the k-th identity token.

    prompt_embeds (B, T, D_txt), id_token_mask (B, T) bool with K positions or none, id_tokens (B, K, D_id)
    -> (B, T, D_txt) in the type of prompt_embeds. Raises ValueError for another number of positions.
    """
    check_positions(id_token_mask, id_tokens.shape[1])
    order = id_token_mask.long().argsort(dim=1, descending=True, stable=True)  # class word first, else as in the text
    positions = order[:, : id_tokens.shape[1], None]  # (B, K, 1)
    index = positions.expand(-1, -1, prompt_embeds.shape[-1])
    words = prompt_embeds.gather(1, index)  # (B, K, D_txt)
    fused = fusion(words, id_tokens).to(prompt_embeds.dtype)
    chosen = id_token_mask[..., None].gather(1, positions)  # (B, K, 1)
    return prompt_embeds.scatter(1, index, torch.where(chosen, fused, words))


def check_positions(id_token_mask: Tensor, num_tokens: int) -> None:
    if id_token_mask.is_meta:
        return
    counts = set(id_token_mask.sum(dim=1).tolist())
    if not counts <= {0, num_tokens}:
        raise ValueError(
            f"The class words have {sorted(counts)} positions and the identity {num_tokens} tokens: tokenize the "
            f"prompts (or cache them anew) with num_id_tokens={num_tokens}."
        )


def sample_drops(generators: Sequence[Generator], text_rate: float, identity_rate: float) -> tuple[Tensor, Tensor]:
    """Which samples lose their text and which their identity, drawn independently: two (B,) bool.

    Raises ValueError for a rate outside of [0, 1].
    """
    if not (0 <= text_rate <= 1 and 0 <= identity_rate <= 1):
        raise ValueError(f"Drop rates are probabilities, not text_rate={text_rate}, identity_rate={identity_rate}.")
    draws = torch.stack([torch.rand(2, generator=generator) for generator in generators])  # (B, 2)
    return draws[:, 0] < text_rate, draws[:, 1] < identity_rate
