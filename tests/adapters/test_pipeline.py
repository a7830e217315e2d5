"""Diffusers' unmodified CogVideoXPipeline runs with the adapted transformer."""

import copy

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

from mm_lightning.adapters.transformer import AdapterConfig, MagicMirrorTransformer3DModel
from tests.adapters.conftest import randomize


def generate(pipe, guidance_scale=3.0, num_frames=5, **more):
    return pipe(
        "a man speaks",
        height=32,
        width=32,
        num_frames=num_frames,
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        max_sequence_length=pipe.transformer.config.max_text_seq_length,
        **more,
    ).frames


@pytest.fixture(params=["tiny_folder", "tiny_2b_folder", "tiny_1_5_folder"])
def pipe(request) -> CogVideoXPipeline:
    pipe = CogVideoXPipeline.from_pretrained(request.getfixturevalue(request.param))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("num_frames", [1, 5])
def test_without_identity_the_latents_are_the_same(pipe, num_frames):
    if pipe.transformer.config.patch_size_t and num_frames == 1:
        num_frames = 9
    expected = generate(pipe, num_frames=num_frames)
    base = copy.deepcopy(pipe.transformer)
    pipe.transformer = randomize(MagicMirrorTransformer3DModel.from_base(base, AdapterConfig(8, 8)))
    assert torch.equal(generate(pipe, num_frames=num_frames), expected)


def test_an_identity_reaches_the_blocks_through_the_stock_pipeline(pipe):
    pipe.transformer = randomize(MagicMirrorTransformer3DModel.from_base(pipe.transformer, AdapterConfig(8, 8)))
    dim = pipe.transformer.transformer_blocks[0].attn1.inner_dim
    torch.manual_seed(0)
    one = {"face_hidden_states": torch.randn(1, 4, dim), "id_embed": torch.randn(1, 8)}
    both = {key: value.repeat(2, *[1] * (value.dim() - 1)) for key, value in one.items()}
    plain = generate(pipe)
    assert (generate(pipe, attention_kwargs=both) - plain).abs().max() > 1e-3
    assert torch.equal(generate(pipe, attention_kwargs={**both, "face_scale": 0.0}), plain)
    assert generate(pipe, guidance_scale=1.0, attention_kwargs=one).shape == plain.shape
    with pytest.raises(ValueError, match="guidance doubles the batch"):
        generate(pipe, attention_kwargs=one)


def test_ddim_too(tiny_folder):
    pipe = CogVideoXPipeline.from_pretrained(tiny_folder)
    pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    expected = generate(pipe)
    pipe.transformer = randomize(MagicMirrorTransformer3DModel.from_base(pipe.transformer, AdapterConfig(8, 8)))
    assert torch.equal(generate(pipe), expected)
