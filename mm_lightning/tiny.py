"""The smallest complete CogVideoX: every class of the real one, a few hundred thousand random weights.

    python -m mm_lightning.tiny FOLDER [--seed 0]

writes diffusers' layout (model_index.json, transformer/, vae/, text_encoder/, tokenizer/, scheduler/), so that
`CogVideoXPipeline.from_pretrained(FOLDER)` loads it, and a CLIP vision tower beside it in image_encoder/.
The weights are random: what it generates is noise. It is there to run the code, not to judge it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
from collections import Counter
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors import safe_open
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5EncoderModel, T5Tokenizer

# Raise it whenever the same settings would write other bytes.
RECIPE = 1
RECEIPT = "tiny.json"

CAPTIONS = """
a man is speaking to the camera in a bright office
a woman smiles and turns her head slowly to the left
a portrait photo of a man with short dark hair wearing a blue shirt and glasses
a portrait photo of a woman with long brown hair wearing a red dress
a young girl laughs in a green park on a sunny day
a young boy looks up at the sky and waves his hand
a person is walking along a quiet street at night in the rain
an elderly man with a white beard and a black hat sits in a room and reads a book
an elderly woman with grey hair drinks tea near the window in the morning
a child plays with a small dog on the beach under a yellow sun
a baby sleeps in a soft white blanket
the astronaut in an orange suit stands in front of the flag and the model of a shuttle
the man is talking on a car phone while trees pass by behind him
close up of a face with natural light and a plain background in high quality
a group of six people friends from a series posing together against a wall
a squared id photo of a person with pure black on two sides
a video of a lady and a gentleman dancing slowly at a wedding in a garden
the actor wearing a leather jacket opens his eyes nods and then says something
the doctor the teacher the chef the singer and the scientist are looking at each other
he she they it his her their its this that these those one two three four and or not no very
"""
WORD_ENDINGS = ("s", "es", "ed", "ing", "er", "or", "ist", "man", "woman", "ly", "ness", "ful", "'s", "fight", "ment")


def tokenizer_vocabulary() -> list[tuple[str, float]]:
    """Pieces and log-probabilities of a unigram model: words of CAPTIONS, word endings, printable ASCII.

    A word that CAPTIONS lacks falls into endings and letters; what is not ASCII becomes `<unk>`, as in T5.
    Counted rather than trained: the library's trainer does not promise the same vocabulary twice.
    """
    counts = Counter(CAPTIONS.split())
    total = sum(counts.values())
    words = {f"▁{word}": math.log(count / total) for word, count in sorted(counts.items())}
    endings = dict.fromkeys(WORD_ENDINGS, -8.0)
    letters = {chr(code): -10.0 for code in range(33, 127)}
    special = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -6.0}
    return list((special | letters | endings | words).items())


def build_tokenizer(max_length: int) -> T5Tokenizer:
    return T5Tokenizer(vocab=tokenizer_vocabulary(), extra_ids=0, model_max_length=max_length)


def build_scheduler() -> CogVideoXDPMScheduler:
    """The settings of CogVideoX-5B, none of which is the class's default."""
    return CogVideoXDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        snr_shift_scale=1.0,
        set_alpha_to_one=True,
        clip_sample=False,
    )


def build_vae(channels: int, height: int, width: int) -> AutoencoderKLCogVideoX:
    """8 times smaller in space, 4 times in time, 16 latent channels; latents of about unit scale.

    Untrained convolutions shrink what passes through them, so the last one of each half is widened: else every picture
    would have the same latent and every latent the same grey picture.
    """
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(channels,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=16,
        sample_height=8 * height,
        sample_width=8 * width,
        scaling_factor=0.7,
    )
    with torch.no_grad():
        encoder_out, decoder_out = vae.encoder.conv_out.conv, vae.decoder.conv_out.conv
        encoder_out.weight[:16].mul_(4)
        encoder_out.bias[16:].fill_(-6.0)
        decoder_out.weight.mul_(2)
    return vae


def build_text_encoder(vocab_size: int, text_embed_dim: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocab_size,
        d_model=text_embed_dim,
        d_kv=16,
        d_ff=2 * text_embed_dim,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config)


def build_image_encoder(hidden_size: int, image_size: int) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=8,
        projection_dim=hidden_size,
    )
    return CLIPVisionModel(config)


def make_tiny(
    folder: str | Path,
    *,
    seed: int = 0,
    num_layers: int = 4,
    num_attention_heads: int = 2,
    attention_head_dim: int = 32,
    time_embed_dim: int = 64,
    text_embed_dim: int = 64,
    max_text_seq_length: int = 64,
    sample_height: int = 8,
    sample_width: int = 8,
    sample_frames: int = 9,
    patch_size_t: int | None = None,
    use_rotary_positional_embeddings: bool = True,
    vae_channels: int = 8,
    image_encoder_dim: int = 32,
    image_size: int = 32,
) -> Path:
    """Write a tiny random CogVideoX to `folder` and return its path; the same arguments give the same bytes.

    Names and units are those of diffusers' transformer config: `sample_height` and `sample_width` in latent pixels
    (8 picture pixels each), `sample_frames` in frames of the video. `patch_size_t=2` makes a CogVideoX-1.5,
    `use_rotary_positional_embeddings=False` a 2B, the defaults a 5B. `attention_head_dim` is a multiple of 16, as RoPE
    splits it in 1:1.5:1.5, `vae_channels` of 4, `image_size` in pixels of 8.

    A complete folder of the same settings is kept, one of other settings is replaced, in one rename.
    Raises FileExistsError if `folder` holds anything that was not written by this function.
    """
    settings = {name: value for name, value in locals().items() if name != "folder"} | {"recipe": RECIPE}
    folder = Path(folder).absolute()
    if is_complete(folder, settings):
        return folder
    refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        fresh = Path(scratch, "new")
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            write_models(fresh, **{name: value for name, value in settings.items() if name not in ("seed", "recipe")})
        write_receipt(fresh, settings)
        put_in_place(fresh, folder, Path(scratch, "old"), settings)
    return folder


def build_transformer(**config: int | bool | None) -> CogVideoXTransformer3DModel:
    """As drawn by diffusers, with wider modulations: blocks whose gates are near zero would hide mistakes in them."""
    transformer = CogVideoXTransformer3DModel(in_channels=16, out_channels=16, **config)
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.norm1.linear.weight.mul_(8)
            block.norm2.linear.weight.mul_(8)
    return transformer


def write_models(
    folder: Path,
    *,
    text_embed_dim: int,
    max_text_seq_length: int,
    vae_channels: int,
    image_encoder_dim: int,
    image_size: int,
    sample_height: int,
    sample_width: int,
    **transformer_config: int | bool | None,
) -> None:
    tokenizer = build_tokenizer(max_text_seq_length)
    transformer = build_transformer(
        text_embed_dim=text_embed_dim,
        max_text_seq_length=max_text_seq_length,
        sample_height=sample_height,
        sample_width=sample_width,
        patch_bias=transformer_config["patch_size_t"] is None,
        **transformer_config,
    )
    pipeline = CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=build_text_encoder(len(tokenizer), text_embed_dim),
        vae=build_vae(vae_channels, sample_height, sample_width),
        transformer=transformer,
        scheduler=build_scheduler(),
    )
    pipeline.save_pretrained(folder)
    build_image_encoder(image_encoder_dim, image_size).save_pretrained(folder / "image_encoder")


def write_receipt(folder: Path, settings: dict) -> None:
    """What was asked for and every file's size: lets the next call see that the folder is whole."""
    receipt = {"settings": settings, "files": file_sizes(folder)}
    (folder / RECEIPT).write_text(json.dumps(receipt, indent=2, sort_keys=True) + "\n")


def file_sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RECEIPT)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def is_complete(folder: Path, settings: dict) -> bool:
    try:
        receipt = json.loads((folder / RECEIPT).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return receipt == {"settings": settings, "files": file_sizes(folder)}


def refuse_foreign(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and ((folder / RECEIPT).exists() or not any(folder.iterdir()))):
        return
    raise FileExistsError(
        f"{folder} exists and holds something else than a tiny model ({RECEIPT} is missing). "
        "Name another folder, or move this one away first."
    )


def put_in_place(fresh: Path, folder: Path, aside: Path, settings: dict) -> None:
    """Rename `fresh` to `folder`; another process that does the same at the same time does no harm."""
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    try:
        fresh.rename(folder)
    except OSError:
        if not is_complete(folder, settings):
            raise


def describe(folder: Path) -> str:
    """One line per part: its name, its parameters where it has any, its size on disk."""
    lines = [f"{folder}"]
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        num_parameters = sum(count_parameters(file) for file in part.glob("*.safetensors"))
        num_bytes = sum(file_sizes(part).values())
        lines.append(f"  {part.name:<14} {num_parameters:>9,} parameters {num_bytes / 1e6:>7.2f} MB")
    return "\n".join(lines)


def count_parameters(file: Path) -> int:
    with safe_open(file, framework="pt") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mm_lightning.tiny", description="Write a tiny random CogVideoX.")
    parser.add_argument("folder", type=Path, help="where to; an existing one of the same seed is kept")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(describe(make_tiny(arguments.folder, seed=arguments.seed)))


if __name__ == "__main__":
    main()
