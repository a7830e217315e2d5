"""Joint self-attention over [text, face, video] plus decoupled cross-attention to the face: equation 8 of MagicMirror.

Letters: B batch, S video tokens, T text tokens, N face tokens, D width, r rank.
"""

import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, cat, nn

from mm_lightning.adapters.can import zero_init


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """(B, S, D) -> (B, heads, S, D / heads)."""
    return states.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def rotate(states: Tensor, image_rotary_emb: tuple[Tensor, Tensor] | None, num_prefix_tokens: int) -> Tensor:
    """RoPE on the video tokens alone; text and face have no place in the picture."""
    if image_rotary_emb is None:
        return states
    prefix, video = states[:, :, :num_prefix_tokens], states[:, :, num_prefix_tokens:]
    return cat([prefix, apply_rotary_emb(video, image_rotary_emb)], dim=2)


class FaceKeyValue(nn.Module):
    """The cross-attention's own keys and values, W^_kv of equation 8; values are zero at initialisation.

    Args:
        attn: the frozen block's attention; K and its norm start as copies of the block's own.
        rank: None for full matrices; else each is a product of two of this rank, K's from scratch.
    """

    def __init__(self, attn: Attention, rank: int | None = None):
        super().__init__()
        self.num_heads = attn.heads
        dim, bias = attn.inner_dim, attn.to_k.bias is not None
        like = {"device": attn.to_k.weight.device, "dtype": attn.to_k.weight.dtype}
        if rank is None:
            self.to_k = nn.Linear(dim, dim, bias=bias, **like)
            self.to_k.load_state_dict(attn.to_k.state_dict())
            self.to_v = zero_init(nn.Linear(dim, dim, bias=bias, **like))
        else:
            self.to_k = nn.Sequential(nn.Linear(dim, rank, bias=False, **like), nn.Linear(rank, dim, **like))
            self.to_v = nn.Sequential(nn.Linear(dim, rank, bias=False, **like), zero_init(nn.Linear(rank, dim, **like)))
        self.norm_k = nn.LayerNorm(dim // attn.heads, eps=1e-6, **like) if attn.norm_k is not None else nn.Identity()
        if attn.norm_k is not None:
            self.norm_k.load_state_dict(attn.norm_k.state_dict())

    def forward(self, face_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N, D), modulated -> key and value, each (B, heads, N, D / heads)."""
        key = self.norm_k(split_heads(self.to_k(face_hidden_states), self.num_heads))
        return key, split_heads(self.to_v(face_hidden_states), self.num_heads)


class MagicMirrorAttnProcessor(CogVideoXAttnProcessor2_0):
    """x_out = T_SA(W_qkv x_full) + T_CA(W_q x_full, W^_kv x_face), then the block's own output projection.

    The query is shared: after the block's query norm, before RoPE, since face tokens have no position. Without
    `face_key` it is diffusers' own processor.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,  # (B, S, D)
        encoder_hidden_states: Tensor,  # (B, T + N, D), text then face
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        face_key: Tensor | None = None,  # (B, heads, N, D / heads)
        face_value: Tensor | None = None,  # like face_key
        face_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return video (B, S, D) and text with face (B, T + N, D)."""
        if face_key is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if attention_mask is not None:
            raise ValueError("attention_mask is not supported together with a face: CogVideoX attends to every token.")
        num_prefix_tokens = encoder_hidden_states.shape[1]
        full = cat([encoder_hidden_states, hidden_states], dim=1)  # (B, T + N + S, D)
        query, key, value = (split_heads(project(full), attn.heads) for project in (attn.to_q, attn.to_k, attn.to_v))
        query = attn.norm_q(query) if attn.norm_q is not None else query
        key = attn.norm_k(key) if attn.norm_k is not None else key

        face = F.scaled_dot_product_attention(query, face_key, face_value)  # T_CA
        query, key = (rotate(states, image_rotary_emb, num_prefix_tokens) for states in (query, key))
        out = F.scaled_dot_product_attention(query, key, value) + face_scale * face  # (B, heads, T + N + S, D / heads)

        out = out.transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            out = layer(out)
        return out[:, num_prefix_tokens:], out[:, :num_prefix_tokens]
