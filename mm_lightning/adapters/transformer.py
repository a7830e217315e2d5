"""CogVideoX's transformer with MagicMirror's adapters in every even block.

Letters: B batch, F' latent frames, C channels, h w latent pixels, S video tokens, T text tokens, N face tokens,
D width, E_t width of the time embedding, c1 width of the identity embedding.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import CogVideoXTransformer3DModel, PyramidAttentionBroadcastConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn

from mm_lightning.adapters.attention import FaceKeyValue, MagicMirrorAttnProcessor
from mm_lightning.adapters.can import (
    ConditionedAdaptiveNorm,
    ConstantFaceNorm,
    FaceAdaptiveNorm,
    Modulation,
    NullConditionedAdaptiveNorm,
    split_modulation,
)

CONDITIONED_NORMS = {"can": ConditionedAdaptiveNorm, "none": NullConditionedAdaptiveNorm}
FACE_NORMS = {"adaptive": FaceAdaptiveNorm, "constant": ConstantFaceNorm}
FACE_ATTENTIONS = ("decoupled", "none")
IDENTITY_KEYS = ("face_hidden_states", "id_embed", "face_scale")


@dataclass(frozen=True)
class AdapterConfig:
    """Sizes and components of the adapter; the defaults are the `base` preset."""

    id_embed_dim: int = 512
    """c1, width of the identity embedding that CAN reads."""
    hidden_dim: int = 512
    """Hidden width of CAN's phi_cond."""
    face_norm_hidden_dim: int | None = None
    """Hidden width of phi_face; None for SiLU and one linear."""
    face_kv_rank: int | None = None
    """Rank of the cross-attention's key and value; None for full matrices."""
    conditioned_norm: str = "can"
    """Component of equation 7: `can`, or `none` for the ablation."""
    face_norm: str = "adaptive"
    """Component of equation 6: `adaptive`, or `constant` for the ablation."""
    face_attention: str = "decoupled"
    """Component of equation 8: `decoupled`, or `none` for an adapter without a face stream."""

    def __post_init__(self):
        for name, known in (
            ("conditioned_norm", CONDITIONED_NORMS),
            ("face_norm", FACE_NORMS),
            ("face_attention", FACE_ATTENTIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"AdapterConfig.{name} is {getattr(self, name)!r}; known are {sorted(known)}.")


class Identity(NamedTuple):
    """What an adapted block is told about the person; either tensor may be None."""

    face_hidden_states: Tensor | None  # (B, N, D)
    id_embed: Tensor | None  # (B, c1)
    face_scale: float


def modulate(hidden_states: Tensor, norm: nn.LayerNorm, factors: Modulation) -> Tensor:
    return norm(hidden_states) * (1 + factors.scale) + factors.shift


class FaceBranch(nn.Module):
    """The face stream of one block: its modulation, its norms, its cross-attention's key and value."""

    def __init__(self, block: CogVideoXBlock, time_embed_dim: int, config: AdapterConfig):
        super().__init__()
        dim = block.attn1.inner_dim
        self.modulation = FACE_NORMS[config.face_norm](dim, time_embed_dim, config.face_norm_hidden_dim)
        self.norm1 = self._copy(block.norm1.norm)
        self.norm2 = self._copy(block.norm2.norm)
        self.key_value = FaceKeyValue(block.attn1, config.face_kv_rank)

    @staticmethod
    def _copy(norm: nn.LayerNorm) -> nn.LayerNorm:
        own = nn.LayerNorm(norm.normalized_shape, norm.eps, norm.elementwise_affine)
        own.load_state_dict({key: value for key, value in norm.state_dict().items() if not value.is_meta}, strict=False)
        return own


class BlockAdapter(nn.Module):
    """All that is new in one block."""

    def __init__(self, block: CogVideoXBlock, config: AdapterConfig):
        super().__init__()
        time_embed_dim = block.norm1.linear.in_features
        can = CONDITIONED_NORMS[config.conditioned_norm]
        self.can = can(block.attn1.inner_dim, time_embed_dim, config.id_embed_dim, config.hidden_dim)
        self.face = FaceBranch(block, time_embed_dim, config) if config.face_attention == "decoupled" else None


class MagicMirrorBlock(CogVideoXBlock):
    """CogVideoX's block with a third stream, figure 4; made by `MagicMirrorTransformer3DModel.from_base`."""

    def forward(
        self,
        hidden_states: Tensor,  # (B, S, D)
        encoder_hidden_states: Tensor,  # (B, T, D)
        temb: Tensor,  # (B, E_t)
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        face_hidden_states: Tensor | None = None,  # (B, N, D)
        id_embed: Tensor | None = None,  # (B, c1)
        face_scale: float = 1.0,
    ) -> tuple[Tensor, ...]:
        """Return (hidden_states, encoder_hidden_states), and face_hidden_states third when an identity is given."""
        if face_hidden_states is None and id_embed is None:
            return super().forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)
        attn, attn_enc, ff, ff_enc = self.modulations(temb, id_embed, face_scale)
        streams = (hidden_states, encoder_hidden_states, face_hidden_states)
        if face_hidden_states is None:
            attn_face = ff_face = None
        else:
            attn_face, ff_face = split_modulation(self.adapter.face.modulation(temb), num_streams=2)
        streams = self.attend(streams, (attn, attn_enc, attn_face), image_rotary_emb, attention_kwargs, face_scale)
        return self.feed_forward(streams, (ff, ff_enc, ff_face))

    def modulations(self, temb: Tensor, id_embed: Tensor | None, scale: float) -> list[Modulation]:
        """Equation 7: norm1's video and text factors, then norm2's."""
        temb = self.norm1.silu(temb)
        modulation = torch.cat([self.norm1.linear(temb), self.norm2.linear(temb)], dim=1)  # (B, 12 D)
        if id_embed is not None:
            modulation = self.adapter.can(modulation, temb, id_embed, scale)
        return split_modulation(modulation, num_streams=4)

    def attend(self, streams, factors, image_rotary_emb, attention_kwargs, face_scale) -> tuple[Tensor, ...]:
        hidden_states, encoder_hidden_states, face_hidden_states = streams
        video, text, face = factors
        norm_hidden_states = modulate(hidden_states, self.norm1.norm, video)
        prefix = modulate(encoder_hidden_states, self.norm1.norm, text)
        kwargs = dict(attention_kwargs or {}, image_rotary_emb=image_rotary_emb)
        if face is not None:
            norm_face_hidden_states = modulate(face_hidden_states, self.adapter.face.norm1, face)
            prefix = torch.cat([prefix, norm_face_hidden_states], dim=1)  # (B, T + N, D)
            face_key, face_value = self.adapter.face.key_value(norm_face_hidden_states)
            kwargs |= {"face_key": face_key, "face_value": face_value, "face_scale": face_scale}
        out, prefix = self.attn1(hidden_states=norm_hidden_states, encoder_hidden_states=prefix, **kwargs)
        return self.add_gated(streams, factors, (out, prefix))

    def feed_forward(self, streams, factors) -> tuple[Tensor, ...]:
        hidden_states, encoder_hidden_states, face_hidden_states = streams
        video, text, face = factors
        prefix = [modulate(encoder_hidden_states, self.norm2.norm, text)]
        if face is not None:
            prefix.append(modulate(face_hidden_states, self.adapter.face.norm2, face))
        full = torch.cat([*prefix, modulate(hidden_states, self.norm2.norm, video)], dim=1)  # (B, T + N + S, D)
        num_video_tokens = hidden_states.shape[1]
        out = self.ff(full)
        return self.add_gated(streams, factors, (out[:, -num_video_tokens:], out[:, :-num_video_tokens]))

    @staticmethod
    def add_gated(streams, factors, outputs) -> tuple[Tensor, ...]:
        """x + gamma * out for each stream; outputs are video (B, S, D) and text with face (B, T + N, D)."""
        hidden_states, encoder_hidden_states, face_hidden_states = streams
        video, text, face = factors
        out, prefix = outputs
        num_text_tokens = encoder_hidden_states.shape[1]
        hidden_states = hidden_states + video.gate * out
        encoder_hidden_states = encoder_hidden_states + text.gate * prefix[:, :num_text_tokens]
        if face is not None:
            face_hidden_states = face_hidden_states + face.gate * prefix[:, num_text_tokens:]
        return hidden_states, encoder_hidden_states, face_hidden_states


# diffusers' hooks look up the block's outputs by its exact class
TransformerBlockRegistry.register(MagicMirrorBlock, TransformerBlockMetadata(0, 1))


class MagicMirrorTransformer3DModel(CogVideoXTransformer3DModel):
    """The frozen backbone with adapters; `from_base` makes one, no weight is copied.

    `attention_kwargs={"face_hidden_states": (B, N, D), "id_embed": (B, c1), "face_scale": float}` carries the identity.
    Without these keys, or with `face_scale` 0, it is the base bit for bit, so an unmodified `CogVideoXPipeline` runs
    with it. With classifier-free guidance both tensors have the doubled batch.
    """

    _no_split_modules = ["CogVideoXBlock", "MagicMirrorBlock", "CogVideoXPatchEmbed"]
    _repeated_blocks = ["CogVideoXBlock", "MagicMirrorBlock"]

    @classmethod
    def from_base(cls, base: CogVideoXTransformer3DModel, config: AdapterConfig) -> "MagicMirrorTransformer3DModel":
        """Turn `base` itself into the adapted model and return it.

        The backbone keeps its parameter names; new ones are `transformer_blocks.{0,2,...}.adapter.*`, in the base's
        dtype and on its device.

        Raises:
            ValueError: `base` carries adapters already, or its attention projections are fused.
        """
        if isinstance(base, cls):
            raise ValueError(
                "This transformer carries MagicMirror adapters already; load the base again to start anew."
            )
        if any(block.attn1.fused_projections for block in base.transformer_blocks):
            raise ValueError("The base's QKV projections are fused; call unfuse_qkv_projections() before from_base().")
        base.__class__ = cls
        base.adapter_config = config
        for block in base.transformer_blocks[::2]:
            block.__class__ = MagicMirrorBlock
            weight = block.attn1.to_q.weight
            with torch.device(weight.device):
                block.adapter = BlockAdapter(block, config).to(dtype=weight.dtype)
            block.attn1.set_processor(MagicMirrorAttnProcessor())
        return base

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """Exactly what trains: names in this model -> parameters.

        All that is new but the face stream's norm2 where nothing reads what comes after it: in the last adapted block,
        where the stream ends, and everywhere if its gates are constantly zero.
        """
        constant = self.adapter_config.face_norm == "constant"
        unread = range(0, len(self.transformer_blocks), 2)[0 if constant else -1 :]
        dead = tuple(f"transformer_blocks.{i}.adapter.face.norm2." for i in unread)
        return {n: p for n, p in self.named_parameters() if ".adapter." in n and not n.startswith(dead)}

    def forward(
        self,
        hidden_states: Tensor,  # (B, F', C, h, w)
        encoder_hidden_states: Tensor,  # (B, T, D_txt)
        timestep: int | float | Tensor,  # (B,)
        timestep_cond: Tensor | None = None,
        ofs: int | float | Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor] | Transformer2DModelOutput:
        """Signature of the base; see the class for `attention_kwargs`.

        Raises:
            ValueError: an identity tensor of the wrong batch or width, or one that no component of this adapter reads.
        """
        attention_kwargs = dict(attention_kwargs or {})
        given = {key: attention_kwargs.pop(key) for key in IDENTITY_KEYS if key in attention_kwargs}
        attention_kwargs = attention_kwargs or None
        identity = self._check_identity(hidden_states.shape[0], **given)
        if identity is None:
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                timestep,
                timestep_cond,
                ofs,
                image_rotary_emb,
                attention_kwargs=attention_kwargs,
                return_dict=return_dict,
            )
        sample = self._forward_with_identity(
            hidden_states,
            encoder_hidden_states,
            self._embed_time(timestep, timestep_cond, ofs, hidden_states.dtype),
            image_rotary_emb,
            identity,
            attention_kwargs=attention_kwargs,
        )
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _check_identity(
        self,
        batch_size: int,
        face_hidden_states: Tensor | None = None,
        id_embed: Tensor | None = None,
        face_scale: float = 1.0,
    ) -> Identity | None:
        if face_scale == 0 or (face_hidden_states is None and id_embed is None):
            return None
        dim = self.config.num_attention_heads * self.config.attention_head_dim
        for name, tensor, width in (
            ("face_hidden_states", face_hidden_states, dim),
            ("id_embed", id_embed, self.adapter_config.id_embed_dim),
        ):
            if tensor is not None and (tensor.shape[0] != batch_size or tensor.shape[-1] != width):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; batch {batch_size} and width {width} are wanted "
                    "(guidance doubles the batch: give torch.cat([negative, positive]))."
                )
        if face_hidden_states is not None and self.adapter_config.face_attention == "none":
            raise ValueError(
                "face_hidden_states were given, but this adapter has no face branch (face_attention=none)."
            )
        if id_embed is not None and self.adapter_config.conditioned_norm == "none":
            raise ValueError("id_embed was given, but this adapter has no CAN to read it (conditioned_norm=none).")
        return Identity(face_hidden_states, id_embed, face_scale)

    def _embed_time(self, timestep, timestep_cond, ofs, dtype: torch.dtype) -> Tensor:
        temb = self.time_embedding(self.time_proj(timestep).to(dtype), timestep_cond)  # (B, E_t)
        if self.ofs_embedding is not None:
            temb = temb + self.ofs_embedding(self.ofs_proj(ofs).to(dtype))
        return temb

    @apply_lora_scale("attention_kwargs")
    def _forward_with_identity(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None,
        identity: Identity,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        full = self.embedding_dropout(self.patch_embed(prompt_embeds, latents))  # (B, T + S, D)
        num_text_tokens = prompt_embeds.shape[1]
        encoder_hidden_states, hidden_states = full[:, :num_text_tokens], full[:, num_text_tokens:]
        face_hidden_states, id_embed = (None if x is None else x.to(full.dtype) for x in identity[:2])
        for block in self.transformer_blocks:
            arguments = (hidden_states, encoder_hidden_states, temb, image_rotary_emb, attention_kwargs)
            if isinstance(block, MagicMirrorBlock):
                arguments = (*arguments, face_hidden_states, id_embed, identity.face_scale)
                hidden_states, encoder_hidden_states, face_hidden_states = self._run_block(block, *arguments)
            else:
                hidden_states, encoder_hidden_states = self._run_block(block, *arguments)
        hidden_states = self.proj_out(self.norm_out(self.norm_final(hidden_states), temb=temb))
        return self._unpatchify(hidden_states, latents.shape)

    def _run_block(self, block: CogVideoXBlock, *arguments) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *arguments)
        return block(*arguments)

    def _unpatchify(self, hidden_states: Tensor, shape: torch.Size) -> Tensor:
        """(B, S, p_t p p C) -> (B, F', C, h, w)."""
        batch_size, num_frames, _, height, width = shape
        p, p_t = self.config.patch_size, self.config.patch_size_t
        if p_t is None:
            patches = hidden_states.reshape(batch_size, num_frames, height // p, width // p, -1, p, p)
            return patches.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
        num_groups = (num_frames + p_t - 1) // p_t
        patches = hidden_states.reshape(batch_size, num_groups, height // p, width // p, -1, p_t, p, p)
        return patches.permute(0, 1, 5, 4, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2)

    def fuse_qkv_projections(self):
        raise ValueError(
            "fuse_qkv_projections() would replace MagicMirrorAttnProcessor and drop the face stream; leave it unfused."
        )

    def set_attn_processor(self, processor: CogVideoXAttnProcessor2_0 | dict[str, CogVideoXAttnProcessor2_0]):
        adapted = {f"transformer_blocks.{i}.attn1.processor" for i in range(0, len(self.transformer_blocks), 2)}
        given = processor if isinstance(processor, dict) else dict.fromkeys(self.attn_processors, processor)
        wrong = sorted(n for n in adapted & given.keys() if not isinstance(given[n], MagicMirrorAttnProcessor))
        if wrong:
            raise ValueError(
                f"{wrong[0]} (and {len(wrong) - 1} more) would drop the face stream: adapted blocks need a "
                f"MagicMirrorAttnProcessor or a subclass of it, not {type(given[wrong[0]]).__name__}."
            )
        super().set_attn_processor(processor)

    def enable_cache(self, config) -> None:
        if not isinstance(config, PyramidAttentionBroadcastConfig):
            raise ValueError(
                f"{type(config).__name__} replays blocks by two of their outputs and would drop the face stream; "
                "PyramidAttentionBroadcastConfig works."
            )
        super().enable_cache(config)
