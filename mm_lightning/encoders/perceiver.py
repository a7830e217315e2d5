"""The two perceivers: tau_id (identity tokens, PhotoMaker-V2's) and tau_face (face tokens, trained).

Letters: B pictures, K latents or tokens, N face tokens, L tokens of the vision encoder, E width of the face embedding,
D_vit width of the vision encoder, D_id width of the identity tokens, D width of the transformer, R references.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEED_FORWARD_MULT = 4
VISION_PREFIX, PERCEIVER_PREFIX = "vision_model.", "qformer_perceiver."
WHERE_TO_GET_PHOTOMAKER = (
    "Get it with `hf download TencentARC/PhotoMaker-V2 photomaker-v2.bin`, or train an IdentityPerceiver from scratch."
)


class PerceiverAttention(nn.Module):
    """Latents attend to the picture's tokens and to themselves; pre-norm, without biases."""

    def __init__(self, dim: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads = num_heads
        inner_dim = num_heads * head_dim
        self.norm1 = nn.LayerNorm(dim)  # of the picture's tokens
        self.norm2 = nn.LayerNorm(dim)  # of the latents
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, hidden_states: Tensor, latents: Tensor) -> Tensor:
        """hidden_states (B, L, D), latents (B, K, D) -> (B, K, D), to be added to the latents."""
        latents = self.norm2(latents)
        context = torch.cat([self.norm1(hidden_states), latents], dim=1)  # (B, L + K, D)
        key, value = self.to_kv(context).chunk(2, dim=-1)
        heads = (self.split_heads(states) for states in (self.to_q(latents), key, value))
        attended = F.scaled_dot_product_attention(*heads)  # (B, heads, K, head_dim)
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def split_heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def feed_forward(dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, FEED_FORWARD_MULT * dim, bias=False),
        nn.GELU(),
        nn.Linear(FEED_FORWARD_MULT * dim, dim, bias=False),
    )


class FacePerceiverResampler(nn.Module):
    """Perceiver resampler with the parameter names of PhotoMaker-V2 (IP-Adapter FaceID Plus has the same equations)."""

    def __init__(self, vision_dim: int, hidden_dim: int, depth: int, num_heads: int, head_dim: int):
        super().__init__()
        self.vision_dim = vision_dim
        self.proj_in = nn.Linear(vision_dim, hidden_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(hidden_dim, num_heads, head_dim), feed_forward(hidden_dim)])
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(hidden_dim, hidden_dim)
        self.norm_out = nn.LayerNorm(hidden_dim)

    def forward(self, latents: Tensor, hidden_states: Tensor) -> Tensor:
        """latents (B, K, D_id), hidden_states (B, L, D_vit) -> (B, K, D_id), normalised.

        Raises ValueError for a vision encoder of another width.
        """
        if hidden_states.shape[-1] != self.vision_dim:
            raise ValueError(
                f"The vision encoder's states are {hidden_states.shape[-1]} wide and the perceiver was built for "
                f"vision_dim={self.vision_dim}: set vision_dim to the hidden_size of the vision encoder's config."
            )
        hidden_states = self.proj_in(hidden_states.to(self.proj_in.weight.dtype))
        for attention, mlp in self.layers:
            latents = latents + attention(hidden_states, latents)
            latents = latents + mlp(latents)
        return self.norm_out(self.proj_out(latents))


class IdentityPerceiver(nn.Module):
    """tau_id: x_id = tau_id(q_id, f), the identity query refined by the dense features of the picture.

    The defaults and all parameter names are those of PhotoMaker-V2's `qformer_perceiver`: 217,122,816 parameters.

    Args:
        id_embed_dim: E, width of the recogniser's embedding (512 for ArcFace, 128 for dlib).
        vision_dim: D_vit, width of the vision encoder.
        hidden_dim: D_id, width of the identity tokens.
        num_tokens: identity tokens per picture.
        depth, num_heads, head_dim: of the resampler.
    """

    def __init__(
        self,
        id_embed_dim: int = 512,
        vision_dim: int = 1024,
        hidden_dim: int = 2048,
        num_tokens: int = 2,
        depth: int = 4,
        num_heads: int = 16,
        head_dim: int = 128,
    ):
        super().__init__()
        self.id_embed_dim, self.hidden_dim, self.num_tokens = id_embed_dim, hidden_dim, num_tokens
        self.token_proj = nn.Sequential(
            nn.Linear(id_embed_dim, FEED_FORWARD_MULT * id_embed_dim),
            nn.GELU(),
            nn.Linear(FEED_FORWARD_MULT * id_embed_dim, num_tokens * hidden_dim),
        )
        self.token_norm = nn.LayerNorm(hidden_dim)
        self.perceiver_resampler = FacePerceiverResampler(vision_dim, hidden_dim, depth, num_heads, head_dim)

    @classmethod
    def from_photomaker(cls, path: str | Path, **sizes: int) -> IdentityPerceiver:
        """tau_id with PhotoMaker-V2's weights; `sizes` are constructor arguments, by default those of the real file.

        Raises what `load_photomaker_v2` raises, and ValueError if the file's tensors do not fit the sizes.
        """
        _, state = load_photomaker_v2(path)
        perceiver = cls(**sizes)
        load_strict(perceiver, state, path)
        return perceiver

    def forward(self, id_query: Tensor, last_hidden_state: Tensor) -> Tensor:
        """id_query (B, E) raw, last_hidden_state (B, L, D_vit) -> x_id (B, num_tokens, D_id).

        Raises ValueError for a recogniser or a vision encoder of another width.
        """
        if id_query.shape[-1] != self.id_embed_dim:
            raise ValueError(
                f"The recogniser's embedding is {id_query.shape[-1]} wide and the identity perceiver was built for "
                f"id_embed_dim={self.id_embed_dim}: set id_embed_dim to the recogniser's width. PhotoMaker-V2's "
                "weights only go with the 512-d ArcFace of insightface's buffalo_l."
            )
        tokens = self.token_proj(id_query.to(self.token_norm.weight.dtype))  # (B, K * D_id)
        tokens = self.token_norm(tokens.unflatten(-1, (self.num_tokens, self.hidden_dim)))  # (B, K, D_id)
        return tokens + self.perceiver_resampler(tokens, last_hidden_state)


class FacePerceiver(nn.Module):
    """tau_face: x_face = tau_face(q_face, f), q_face being learned queries over the penultimate dense features.

    Ends in a projection to the transformer's width, which the resampler's own `proj_out` is where the widths agree.
    In a 3072-wide transformer: hidden_dim 768 (12 heads x 64) has 32.1M parameters, 1024 (16 x 64) 55.6M,
    2048 (16 x 128) 214.0M, 3072 (24 x 128) 465.8M.

    Args:
        vision_dim: D_vit, width of the vision encoder.
        hidden_dim, depth, num_heads, head_dim: of the resampler.
        num_tokens: N, learned queries.
        out_dim: D, width of the transformer.
    """

    def __init__(
        self,
        vision_dim: int = 1024,
        hidden_dim: int = 1024,
        depth: int = 4,
        num_heads: int = 16,
        head_dim: int = 64,
        num_tokens: int = 32,
        out_dim: int = 3072,
    ):
        super().__init__()
        self.out_dim, self.num_tokens = out_dim, num_tokens
        self.queries = nn.Parameter(torch.randn(num_tokens, hidden_dim) * hidden_dim**-0.5)
        self.perceiver_resampler = FacePerceiverResampler(vision_dim, hidden_dim, depth, num_heads, head_dim)
        self.projection = nn.Identity() if hidden_dim == out_dim else nn.Linear(hidden_dim, out_dim)

    def forward(self, penultimate_hidden_state: Tensor) -> Tensor:
        """(B, L, D_vit) -> x_face (B, N, D). Raises ValueError for a vision encoder of another width."""
        queries = self.queries.expand(len(penultimate_hidden_state), -1, -1)
        return self.projection(self.perceiver_resampler(queries, penultimate_hidden_state))

    def null_tokens(self) -> Tensor:
        """Initial value (N, D) of the tokens that stand for no identity: small, so that they start out unobtrusive."""
        return 0.02 * torch.randn(self.num_tokens, self.out_dim)


def average_references(tokens: Tensor, reference_mask: Tensor) -> Tensor:
    """Mean over the present references of each sample; zero where there are none.

    tokens (B, R, K, D), reference_mask (B, R) bool -> (B, K, D). What stands for absent references has no influence.
    """
    mask = reference_mask[:, :, None, None]
    total = tokens.masked_fill(~mask, 0.0).sum(dim=1)
    return total / mask.sum(dim=1).clamp(min=1)


def load_photomaker_v2(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The vision tower's and tau_id's tensors of `photomaker-v2.bin`, names without their prefix; the rest is left out.

    Raises FileNotFoundError if there is no such file, ValueError if it is not PhotoMaker-V2's. Nothing is unpickled but
    tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No PhotoMaker-V2 weights at {path}. {WHERE_TO_GET_PHOTOMAKER}")
    checkpoint = load_tensors(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("id_encoder"), dict):
        found = sorted(map(str, checkpoint))[:5] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path} has no 'id_encoder' but {found}: not PhotoMaker-V2's file. {WHERE_TO_GET_PHOTOMAKER}")
    return tuple(strip_prefix(checkpoint["id_encoder"], p, path) for p in (VISION_PREFIX, PERCEIVER_PREFIX))


def load_tensors(path: Path) -> object:
    try:
        # Mapped, not read: the file also holds a LoRA for SDXL that is not wanted here.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError):
        # torch's own text is left out: it advises to unpickle whatever the file holds.
        raise ValueError(f"{path} is no PyTorch file of tensors alone. {WHERE_TO_GET_PHOTOMAKER}") from None


def strip_prefix(state: dict[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    chosen = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not chosen:
        raise ValueError(
            f"{path} has no '{prefix}*' in its id_encoder: it may be PhotoMaker's first version, version 2 is needed. "
            f"{WHERE_TO_GET_PHOTOMAKER}"
        )
    return chosen


def load_strict(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load `state` into `module`; ValueError names the first tensors missing, left over or of another shape."""
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    misshaped = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(shape)}"
        for name, shape in wanted.items()
        if name in state and state[name].shape != shape
    ]
    if missing or extra or misshaped:
        raise ValueError(
            f"{source} does not fit {type(module).__name__}: missing {missing[:3]}, left over {extra[:3]}, "
            f"of another shape {misshaped[:3]} ({len(missing)}, {len(extra)} and {len(misshaped)} in all)."
        )
    module.load_state_dict(state)
