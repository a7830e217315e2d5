"""Clips from latents and from an identity, by diffusers' own pipeline; for a look at a running training.

Letters: B batch, F frames, F' latent frames, C latent channels, h w latent pixels, H W pixels, T text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor

from mm_lightning.backbone import Backbone
from mm_lightning.types import IdentityCondition


def build_pipeline(backbone: Backbone, transformer: CogVideoXTransformer3DModel) -> CogVideoXPipeline:
    """Diffusers' pipeline around networks that are loaded already, with a scheduler of its own."""
    pipeline = CogVideoXPipeline(
        tokenizer=backbone.tokenizer,
        text_encoder=backbone.text_encoder,
        vae=backbone.vae,
        transformer=transformer,
        scheduler=type(backbone.scheduler).from_config(backbone.scheduler.config),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate_latents(
    pipeline: CogVideoXPipeline,
    shape: torch.Size,
    identity: IdentityCondition,
    null_prompt_embeds: Tensor,
    num_inference_steps: int,
    guidance_scale: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Latents of a clip, scaled; guidance contrasts the text, the same face stands in both of its halves.

    Args:
        shape: (B, F', C, h, w) of what is wanted.
        null_prompt_embeds: (1, T, D_txt).
    """
    _, num_latent_frames, _, height, width = shape
    ratio, dtype = pipeline.vae_scale_factor_spatial, null_prompt_embeds.dtype
    return pipeline(
        prompt_embeds=identity.prompt_embeds.to(dtype),
        negative_prompt_embeds=null_prompt_embeds.expand_as(identity.prompt_embeds),
        attention_kwargs=identity.attention_kwargs(num_copies=2 if guidance_scale > 1 else 1),
        num_frames=(num_latent_frames - 1) * pipeline.vae_scale_factor_temporal + 1,
        height=height * ratio,
        width=width * ratio,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=list(generators),
        output_type="latent",
    ).frames


def decode_latents(vae: AutoencoderKLCogVideoX, latents: Tensor) -> Tensor:
    """(B, F', C, h, w), scaled -> pixels (B, F, 3, H, W) in [-1, 1]; in the VAE's own dtype, outside autocast."""
    with torch.autocast(latents.device.type, enabled=False):
        video = (latents / vae.config.scaling_factor).transpose(1, 2).to(vae.dtype)
        pixels = vae.decode(video).sample
    return pixels.transpose(1, 2).float().clamp(-1, 1)
