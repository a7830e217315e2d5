import copy

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from mm_lightning.adapters.transformer import AdapterConfig, MagicMirrorTransformer3DModel

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 12,
    "num_layers": 4,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 6,
}
FAMILIES = {  # what tells the published CogVideoX models apart
    "2b": {},
    "5b": {"use_rotary_positional_embeddings": True},
    "1.5-5b": {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
}
CONFIG = AdapterConfig(id_embed_dim=6, hidden_dim=10)


def make_base(family: str = "5b", **changes) -> CogVideoXTransformer3DModel:
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(**{**TINY, **FAMILIES[family], **changes}).eval()


def make_adapted(base: CogVideoXTransformer3DModel, config: AdapterConfig = CONFIG) -> MagicMirrorTransformer3DModel:
    """An adapted copy of `base`, which stays as it is."""
    return MagicMirrorTransformer3DModel.from_base(copy.deepcopy(base), config)


def randomize(model: MagicMirrorTransformer3DModel, std: float = 0.2) -> MagicMirrorTransformer3DModel:
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for n, p in model.named_parameters() if ".adapter." in n):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def make_inputs(model, num_frames: int = 3, height: int = 8, width: int = 8, batch_size: int = 2, dtype=torch.float32):
    """Arguments of one forward pass; the rotary table is random but bounded, which is all that a comparison needs."""
    generator = torch.Generator().manual_seed(2)
    config = model.config
    p_t = config.patch_size_t or 1
    num_tokens = -(-num_frames // p_t) * (height // config.patch_size) * (width // config.patch_size)
    angles = torch.rand(num_tokens, config.attention_head_dim, generator=generator) * 6
    rotary = (angles.cos(), angles.sin()) if config.use_rotary_positional_embeddings else None

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "hidden_states": randn(batch_size, num_frames, config.in_channels, height, width),
        "encoder_hidden_states": randn(batch_size, config.max_text_seq_length, config.text_embed_dim),
        "timestep": torch.arange(1, batch_size + 1) * 100,
        "image_rotary_emb": rotary,
    }


def make_identity(model, batch_size: int = 2, num_face_tokens: int = 3, dtype=torch.float32, **more) -> dict:
    generator = torch.Generator().manual_seed(3)
    dim = model.config.num_attention_heads * model.config.attention_head_dim
    return {
        "face_hidden_states": torch.randn(batch_size, num_face_tokens, dim, generator=generator).to(dtype),
        "id_embed": torch.randn(batch_size, CONFIG.id_embed_dim, generator=generator).to(dtype),
        **more,
    }


@pytest.fixture(params=list(FAMILIES))
def family(request) -> str:
    return request.param
