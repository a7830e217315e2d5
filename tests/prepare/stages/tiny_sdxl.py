"""The smallest SDXL and the smallest photomaker-v2.bin, random, in the layouts of the real ones."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from mm_lightning.encoders.perceiver import IdentityPerceiver
from mm_lightning.prepare.stages.photomaker import Fusion

TEXT_DIM = 32
PERCEIVER = {
    "id_embed_dim": 128,
    "vision_dim": 64,
    "hidden_dim": 2 * TEXT_DIM,
    "depth": 1,
    "num_heads": 2,
    "head_dim": 32,
}


def make_tokenizer() -> CLIPTokenizer:
    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "ma", "man</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[("m", "a"), ("ma", "n</w>")], model_max_length=77)


def make_sdxl(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        projection_dim=TEXT_DIM,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + TEXT_DIM,
        cross_attention_dim=2 * TEXT_DIM,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=make_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    ).save_pretrained(folder)
    return folder


def make_photomaker(file: Path, lora: dict[str, torch.Tensor] | None = None) -> Path:
    torch.manual_seed(1)
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=1,
            image_size=16,
            patch_size=8,
        )
    )
    parts = {
        "vision_model.": {name.removeprefix("vision_model."): t for name, t in vision.state_dict().items()},
        "qformer_perceiver.": IdentityPerceiver(**PERCEIVER).state_dict(),
        "fuse_module.": Fusion(2 * TEXT_DIM).state_dict(),
    }
    id_encoder = {prefix + name: tensor for prefix, state in parts.items() for name, tensor in state.items()}
    torch.save({"id_encoder": id_encoder, "lora_weights": lora or {}}, file)
    return file
