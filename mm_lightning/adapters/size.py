"""What MagicMirror adds to CogVideoX: parameters, bytes and FLOPs of every part, counted on the `meta` device.

    python -m mm_lightning.adapters.size [--preset paper|base|light|all] [--base FOLDER]

reads the presets from conf/model/ and builds the real classes without allocating a weight. FLOPs are those of matrix
products, convolutions and attention, two per multiply-add, as `torch.utils.flop_counter` counts them.

Letters: B batch, F' latent frames, C latent channels, h w latent pixels, S video tokens, T text tokens, N face tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5EncoderModel

from mm_lightning.adapters.transformer import MagicMirrorTransformer3DModel
from mm_lightning.backbone import check_base, read_json
from mm_lightning.encoders.identity import IdentityEncoder
from mm_lightning.encoders.iresnet import IResNet
from mm_lightning.encoders.perceiver import IdentityPerceiver
from mm_lightning.module import select_trainable
from mm_lightning.types import FaceFeatures, TextFeatures

CONF = Path(__file__).resolve().parents[2] / "conf"
PRESETS = ("paper", "base", "light")
NUM_FRAMES, HEIGHT, WIDTH = 49, 480, 720
EVERY_STEP = "every step"
TABLE_WIDTH = 120

# openai/clip-vit-large-patch14, also in photomaker-v2.bin.
CLIP_L14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
# insightface's buffalo_l (w600k_r50.onnx).
IRESNET_50 = {"stem_dim": 64, "widths": (64, 128, 256, 512), "depths": (3, 4, 14, 3), "embed_dim": 512}
FACE_SIZE = 112


class BaseConfigs(NamedTuple):
    """Constructor arguments of the pipeline's three networks."""

    transformer: dict[str, Any]
    text_encoder: dict[str, Any]
    vae: dict[str, Any]


# THUDM/CogVideoX-5b as diffusers' scripts/convert_cogvideox_to_diffusers.py writes it, but for what is the classes'
# default; the text encoder is that of google/t5-v1_1-xxl.
COGVIDEOX_5B = BaseConfigs(
    transformer={
        "num_attention_heads": 48,
        "attention_head_dim": 64,
        "num_layers": 42,
        "use_rotary_positional_embeddings": True,
    },
    text_encoder={
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    vae={"scaling_factor": 0.7},
)


class Networks(NamedTuple):
    """Everything that takes part in generating a video, on the `meta` device; `requires_grad` says what trains."""

    transformer: MagicMirrorTransformer3DModel
    text_encoder: T5EncoderModel
    vae: AutoencoderKLCogVideoX
    vision: CLIPVisionModel
    recognizer: IResNet
    front_end: IdentityEncoder


class Part(NamedTuple):
    """A row of the table."""

    name: str
    num_frozen: int
    num_trained: int
    flops: int
    runs: str

    @property
    def num_parameters(self) -> int:
        return self.num_frozen + self.num_trained


class StepFlops(NamedTuple):
    """One denoising step, batch 1, without guidance."""

    base: int
    adapted: int


class Size(NamedTuple):
    """The table of one preset."""

    preset: str
    pipeline: list[Part]
    added: list[Part]
    video: StepFlops
    image: StepFlops

    @property
    def num_added(self) -> int:
        return sum(part.num_parameters for part in self.added)

    @property
    def num_trained(self) -> int:
        return sum(part.num_trained for part in self.added)


def measure_size(preset: str, configs: BaseConfigs = COGVIDEOX_5B) -> Size:
    """Count everything of a preset on a base model, at 49x480x720 and at one frame of it.

    Raises:
        FileNotFoundError: conf/ is not there.
    """
    with torch.device("meta"):
        networks = build_networks(read_preset(preset), configs)
        by_module, video = measure_step(networks, NUM_FRAMES)
        _, image = measure_step(networks, num_frames=1)
        return Size(
            preset,
            pipeline=pipeline_parts(networks, video.base),
            added=[*front_end_parts(networks), *adapter_parts(networks.transformer, by_module, video)],
            video=video,
            image=image,
        )


# Building -----------------------------------------------------------------------------------------------------------


def read_preset(preset: str, conf: Path = CONF) -> DictConfig:
    """conf/model/{preset}.yaml, composed.

    Raises:
        FileNotFoundError: conf/ is not there.
    """
    if not (conf / "model" / f"{preset}.yaml").is_file():
        raise FileNotFoundError(
            f"There is no preset {conf}/model/{preset}.yaml. The presets are files of the repository, not of the "
            "package: run this from a checkout that was installed with `pip install -e .`."
        )
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("train", overrides=[f"model={preset}"]).model


def read_configs(folder: str | Path) -> BaseConfigs:
    """The configs of a CogVideoX in diffusers' layout, a folder or a hub id; weights are neither needed nor read.

    Raises what `check_base` raises.
    """
    folder = check_base(folder, components=())
    return BaseConfigs(*(read_json(folder / name / "config.json") for name in BaseConfigs._fields))


def build_networks(model: DictConfig, configs: BaseConfigs) -> Networks:
    """Build on the current device, which should be `meta`; `model` is a composed conf/model file."""
    adapter = instantiate(model.adapter)
    base = CogVideoXTransformer3DModel.from_config(configs.transformer)
    text_encoder = T5EncoderModel(T5Config(**configs.text_encoder))
    networks = Networks(
        transformer=MagicMirrorTransformer3DModel.from_base(base, adapter),
        text_encoder=text_encoder,
        vae=AutoencoderKLCogVideoX.from_config(configs.vae),
        vision=CLIPVisionModel(CLIPVisionConfig(**CLIP_L14)),
        recognizer=IResNet(**IRESNET_50, image_size=FACE_SIZE),
        front_end=IdentityEncoder.build(
            id_perceiver=without_weights(instantiate(model.id_perceiver)),
            face_perceiver=instantiate(model.face_perceiver),
            fusion=instantiate(model.fusion),
            id_projection=instantiate(model.id_projection),
            id_query_dim=IRESNET_50["embed_dim"],
            vision_dim=CLIP_L14["hidden_size"],
            text_dim=text_encoder.config.d_model,
            dim=base.config.num_attention_heads * base.config.attention_head_dim,
            id_embed_dim=adapter.id_embed_dim,
        ),
    )
    for network in networks:
        network.requires_grad_(False)
    select_trainable(networks.transformer, networks.front_end, model.frozen)
    return networks


def without_weights(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """tau_id's class in place of the function that reads its file; the file's sizes are the class's defaults."""
    if not isinstance(factory, partial) or factory.func != IdentityPerceiver.from_photomaker:
        return factory
    return partial(IdentityPerceiver, **{name: size for name, size in factory.keywords.items() if name != "path"})


# Counting -----------------------------------------------------------------------------------------------------------


def count_flops(network: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, int]:
    """FLOPs of one call: "Global" -> all, "Class.name.of.module" -> those of one module."""
    with FlopCounterMode(display=False) as counter:
        network(*args, **kwargs)
    return {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}


def measure_step(networks: Networks, num_frames: int) -> tuple[dict[str, int], StepFlops]:
    """FLOPs by module of the adapted transformer, and the step's with and without an identity."""
    inputs = step_inputs(networks.transformer, networks.vae, num_frames)
    identity = networks.front_end(*front_end_inputs(networks))  # IdentityCondition
    base = count_flops(networks.transformer, **inputs)
    adapted = count_flops(networks.transformer, **inputs, attention_kwargs=identity.attention_kwargs())
    return adapted, StepFlops(base["Global"], adapted["Global"])


def step_inputs(
    transformer: CogVideoXTransformer3DModel, vae: AutoencoderKLCogVideoX, num_frames: int
) -> dict[str, Any]:
    """Arguments of one step at 480x720 pixels; CogVideoX-1.5 takes latent frames in pairs."""
    config, latents = transformer.config, latents_shape(vae, num_frames)
    p, p_t = config.patch_size, config.patch_size_t or 1
    _, num_latent_frames, channels, height, width = latents
    num_latent_frames += -num_latent_frames % p_t
    num_tokens = (num_latent_frames // p_t) * (height // p) * (width // p)  # S
    angles = torch.empty(num_tokens, config.attention_head_dim)
    return {
        "hidden_states": torch.empty(1, num_latent_frames, channels, height, width),
        "encoder_hidden_states": torch.empty(1, config.max_text_seq_length, config.text_embed_dim),
        "timestep": torch.empty(1, dtype=torch.long),
        "image_rotary_emb": (angles, angles) if config.use_rotary_positional_embeddings else None,
    }


def latents_shape(vae: AutoencoderKLCogVideoX, num_frames: int) -> tuple[int, ...]:
    """(1, F', C, h, w)."""
    spatial_ratio = 2 ** (len(vae.config.block_out_channels) - 1)
    num_latent_frames = 1 + (num_frames - 1) // int(vae.config.temporal_compression_ratio)
    return 1, num_latent_frames, vae.config.latent_channels, HEIGHT // spatial_ratio, WIDTH // spatial_ratio


def front_end_inputs(networks: Networks) -> tuple[FaceFeatures, TextFeatures]:
    """One reference picture and one prompt."""
    num_patches = (CLIP_L14["image_size"] // CLIP_L14["patch_size"]) ** 2
    features = torch.empty(1, 1, num_patches + 1, CLIP_L14["hidden_size"])
    mask = torch.empty(1, 1, dtype=torch.bool)
    config = networks.transformer.config
    prompt_embeds = torch.empty(1, config.max_text_seq_length, config.text_embed_dim)
    id_token_mask = torch.empty(1, config.max_text_seq_length, dtype=torch.bool)
    id_query = torch.empty(1, 1, IRESNET_50["embed_dim"])
    return FaceFeatures(features, features, id_query, mask), TextFeatures(prompt_embeds, id_token_mask)


# Rows ---------------------------------------------------------------------------------------------------------------


def make_part(name: str, parameters: Iterable[nn.Parameter], flops: int, runs: str = EVERY_STEP) -> Part:
    parameters = list(parameters)
    num_trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    num_all = sum(parameter.numel() for parameter in parameters)
    return Part(name, num_all - num_trained, num_trained, flops, runs)


def pipeline_parts(networks: Networks, step_flops: int) -> list[Part]:
    transformer, text_encoder, vae = networks.transformer, networks.text_encoder, networks.vae
    prompt = torch.empty(1, transformer.config.max_text_seq_length, dtype=torch.long)
    shape = latents_shape(vae, NUM_FRAMES)
    latents = torch.empty(shape).transpose(1, 2)  # (1, C, F', h, w)
    return [
        make_part("transformer", parameters_with(transformer, "", but=".adapter."), step_flops),
        make_part("T5 encoder", text_encoder.parameters(), count_flops(text_encoder, prompt)["Global"], "per prompt"),
        make_part("VAE (decoding)", vae.parameters(), count_flops(vae.decode, latents)["Global"], "per video"),
    ]


def front_end_parts(networks: Networks) -> list[Part]:
    vision, recognizer, front_end = networks.vision, networks.recognizer, networks.front_end
    side = CLIP_L14["image_size"]
    seen = count_flops(vision, torch.empty(1, 3, side, side))["Global"]
    recognized = count_flops(recognizer, torch.empty(1, 3, FACE_SIZE, FACE_SIZE))["Global"]
    flops = count_flops(front_end, *front_end_inputs(networks))

    def part(name: str, attribute: str, runs: str) -> Part:
        module = getattr(front_end, attribute)
        return make_part(name, module.parameters(), flops.get(f"{type(front_end).__name__}.{attribute}", 0), runs)

    return [
        make_part("CLIP ViT-L/14 (F_feat)", vision.parameters(), seen, "per reference"),
        make_part("IResNet-50 (F_id)", recognizer.parameters(), recognized, "per reference"),
        part("identity perceiver (tau_id)", "id_perceiver", "per reference"),
        part("face perceiver (tau_face)", "face_perceiver", "per reference"),
        make_part("null face tokens", [front_end.null_face_tokens], 0, "per video"),
        part("fusion (MLP_fuse)", "fusion", "per video"),
        part("projection of x_id", "id_projection", "per video"),
    ]


def adapter_parts(transformer: MagicMirrorTransformer3DModel, flops: dict[str, int], step: StepFlops) -> list[Part]:
    """The trained modules of the adapted blocks, and what face tokens cost the frozen ones."""

    def part(name: str, place: str) -> Part:
        own = sum(count for module, count in flops.items() if module.endswith(place))
        return make_part(name, parameters_with(transformer, place), own)

    parts = [
        part("face modulation (phi_face)", ".adapter.face.modulation"),
        part("CAN (phi_cond)", ".adapter.can"),
        part("cross-attention K, V", ".adapter.face.key_value"),
        part("face norms", ".adapter.face.norm"),
    ]
    rest = step.adapted - step.base - sum(part.flops for part in parts)
    return [*parts, Part("face tokens: attention, FFN", 0, 0, rest, EVERY_STEP)]


def parameters_with(module: nn.Module, part: str, but: str | None = None) -> list[nn.Parameter]:
    """Parameters whose name contains `part` and not `but`."""
    return [p for name, p in module.named_parameters() if part in name and (but is None or but not in name)]


# Printing -----------------------------------------------------------------------------------------------------------


def make_table(size: Size) -> Table:
    table = Table(title=f"model={size.preset}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("part", no_wrap=True)
    for heading in ("frozen", "trained", "bf16", "FLOPs", "of a step"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("runs", no_wrap=True)
    for name, parts in (("CogVideoX pipeline", size.pipeline), ("added by MagicMirror", size.added)):
        for part in parts:
            table.add_row(*format_part(part, size.video))
        table.add_row(*format_part(total_part(name, parts), size.video), style="bold", end_section=True)
    return table


def total_part(name: str, parts: list[Part]) -> Part:
    """The sum of all parameters, and of the FLOPs that every step takes."""
    step_flops = sum(part.flops for part in parts if part.runs == EVERY_STEP)
    return Part(name, sum(p.num_frozen for p in parts), sum(p.num_trained for p in parts), step_flops, EVERY_STEP)


def format_part(part: Part, step: StepFlops) -> list[str]:
    """Cells of a row; a zero is left empty."""
    cells = [f"{part.num_frozen:,}", f"{part.num_trained:,}", in_units(2 * part.num_parameters) + "B"]
    share = part.flops / step.adapted
    cells += [in_units(part.flops), f"{share:.3%}" if share >= 1e-5 else "< 0.001%"]
    counts = (part.num_frozen, part.num_trained, part.num_parameters, part.flops, part.flops)
    return [part.name, *(cell if count else "" for cell, count in zip(cells, counts, strict=True)), part.runs]


def in_units(number: float) -> str:
    """1234567 -> '1.23 M'."""
    for exponent, unit in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**exponent:
            return f"{number / 10**exponent:.4g} {unit}"
    return f"{number} "


def summarize(size: Size) -> str:
    whole = sum(part.num_parameters for part in size.pipeline)
    lines = [
        f"Adds {size.num_added / 1e9:.3f}B parameters to {whole / 1e9:.3f}B, {size.num_trained / 1e9:.3f}B of them "
        "trained.",
    ]
    for name, num_frames, step in (("Video", NUM_FRAMES, size.video), ("Image", 1, size.image)):
        lines.append(
            f"{name} stage, a step at {num_frames}x{HEIGHT}x{WIDTH}: {in_units(step.base)}FLOPs of the base, "
            f"{in_units(step.adapted)}FLOPs with the adapter (+{step.adapted / step.base - 1:.2%})."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mm_lightning.adapters.size", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=[*PRESETS, "all"], default="all", help="a file of conf/model/")
    parser.add_argument("--base", help="count on this CogVideoX, a folder or hub id, in place of the 5B")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)  # not cut where the output is a file
    try:
        configs = read_configs(arguments.base) if arguments.base else COGVIDEOX_5B
        for preset in PRESETS if arguments.preset == "all" else [arguments.preset]:
            size = measure_size(preset, configs)
            console.print(make_table(size), summarize(size), "", sep="\n")
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
