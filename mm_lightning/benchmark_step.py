"""What one optimisation step takes at full size: seconds, memory, FLOPs, with and without the identity loss.

    python -m mm_lightning.benchmark step --device cuda
    python -m mm_lightning.benchmark step --preset tiny --base data/tiny --frames 9 --height 64 --width 64

The training module itself, its weights random and made on the device, its batch random as well: latents and what T5
and CLIP say are given, as from shards with cached tensors. By default the batch is what one of eight devices gets.

Letters: B batch, F frames, F' latent frames, C latent channels, h w latent pixels, R references per sample, S side of a
reference, T text tokens, L tokens of the vision encoder, E width of the face embedding; D_txt, D_vit widths.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from hydra.utils import instantiate
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from mm_lightning.adapters.size import (
    CLIP_L14,
    COGVIDEOX_5B,
    FACE_SIZE,
    IRESNET_50,
    BaseConfigs,
    read_configs,
    read_preset,
    without_weights,
)
from mm_lightning.backbone import Backbone, read_json
from mm_lightning.benchmark import TABLE_WIDTH, Sizes, count_flops, make_faces, synchronize
from mm_lightning.encoders.face import FaceFeatureEncoder
from mm_lightning.encoders.identity import IdentityEncoder
from mm_lightning.encoders.iresnet import IResNet
from mm_lightning.encoders.recognizer import ARCFACE_TEMPLATE, FaceRecognizer
from mm_lightning.losses import IdentityLoss, NullIdentityLoss
from mm_lightning.module import MagicMirrorModule, sample_generators
from mm_lightning.tiny import build_scheduler
from mm_lightning.types import Batch, FaceFeatures, LossOutput, TextFeatures

PRESETS = ("paper", "base", "light", "tiny")
CLIP_NORM = 1.0  # conf/trainer
REFERENCE_SIZE = 512  # conf/data
ADAM_BYTES = 12  # per trained parameter: gradient and two moments, fp32
GIB = 2**30
logger = logging.getLogger(__name__)


class Stage(NamedTuple):
    """What conf/experiment and conf/data give one of eight devices."""

    num_frames: int | None  # None: as asked for
    batch_size: int
    num_references: int


STAGES = {"image": Stage(1, batch_size=8, num_references=1), "video": Stage(None, batch_size=1, num_references=4)}


class Case(NamedTuple):
    """A row to be measured."""

    stage: str
    sizes: Sizes  # of the batch; its transformer's are not used
    identity_loss: bool


class Row(NamedTuple):
    """Losses are those of the last step, averaged over its batch; without identity loss that term is NaN."""

    case: Case
    num_tokens: tuple[int, int, int]  # video, text and face, of one sample
    seconds: list[float]
    peak_bytes: int
    flops: int
    loss: float
    velocity: float
    identity: float

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, [self.loss, *([self.identity] if self.case.identity_loss else [])]))


# Building -----------------------------------------------------------------------------------------------------------


class RandomRecognizer(FaceRecognizer):
    """buffalo_l's IResNet-50 without its weights."""

    def __init__(self) -> None:
        super().__init__("IResNet-50", IRESNET_50["embed_dim"], FACE_SIZE, torch.tensor(ARCFACE_TEMPLATE))
        self.network = IResNet(**IRESNET_50, image_size=FACE_SIZE)
        self.requires_grad_(False).eval()

    def compute_embedding(self, faces: Tensor) -> Tensor:
        return self.network(faces)


class RandomModule(MagicMirrorModule):
    """The training module with random weights, made where they will be used; no file is read.

    Args:
        configs: sizes of the base.
        vision_config: of the CLIP vision tower.
        vae_dtype: of the VAE.
        place: device of the networks; on `meta` they can be counted.
        settings: of `MagicMirrorModule`.
    """

    def __init__(
        self, configs: BaseConfigs, vision_config: dict[str, Any], vae_dtype: torch.dtype, place: str, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self.configs, self.vision_config = configs, vision_config
        self.vae_dtype, self.place = vae_dtype, place

    def check_paths(self) -> None:
        """There are none."""

    def load_backbone(self) -> Backbone:
        transformer, vae = self.configs.transformer, self.configs.vae
        with torch.device(self.place):
            with default_dtype(getattr(torch, self.base_dtype)):
                transformer = CogVideoXTransformer3DModel.from_config(transformer)
            with default_dtype(self.vae_dtype):
                vae = AutoencoderKLCogVideoX.from_config(vae)
        backbone = describe_base(self.configs)
        backbone.transformer, backbone.vae = transformer, vae
        return backbone.requires_grad_(False).eval()

    def load_features(self) -> FaceFeatureEncoder:
        with torch.device(self.place):
            return FaceFeatureEncoder(CLIPVisionModel(CLIPVisionConfig(**self.vision_config)), RandomRecognizer())

    def load_loss_recognizer(self) -> FaceRecognizer:
        with torch.device(self.place):
            return RandomRecognizer()

    def build_front_end(self) -> IdentityEncoder:
        with torch.device(self.place):
            return super().build_front_end()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Weights are made in `dtype`: made in fp32 and cast, a 5B would need three times its memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def describe_base(configs: BaseConfigs) -> Backbone:
    """A backbone without weights. Its schedule is the 5B's, whatever the base: no cost depends on it."""
    return Backbone("random", None, build_scheduler(), configs.transformer, configs.vae)


def build_module(
    preset: str,
    base: str | None = None,
    device: str = "cpu",
    vae_dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = True,
) -> RandomModule:
    """conf/model/{preset}.yaml on a base of the 5B's sizes, or of those in the folder `base`; frozen base in bf16.

    T5 is not there, so no sample loses its text; nor does any lose its identity, so that the identity loss applies.

    Raises:
        FileNotFoundError, ValueError: no such preset or base.
    """
    model = read_preset(preset)
    fixed = {"base_dtype": "bfloat16", "components": ["transformer", "vae"], "init_adapter": None}
    fixed |= {"text_drop_rate": 0.0, "identity_drop_rate": 0.0, "gradient_checkpointing": gradient_checkpointing}
    settings = instantiate(model, _partial_=True).keywords | fixed
    settings["id_perceiver"] = without_weights(settings["id_perceiver"])
    configs = read_configs(base) if base else COGVIDEOX_5B
    module = RandomModule(configs, read_vision(base), vae_dtype, device, **settings)
    module.configure_model()
    return module.to(device).train()


def read_vision(base: str | None) -> dict[str, Any]:
    """CLIP's sizes: ViT-L/14's, or those of the small one that `mm_lightning.tiny` writes beside its base."""
    file = Path(base or "", "image_encoder", "config.json")
    return read_json(file) if base and file.is_file() else CLIP_L14


def trained_parameters(module: MagicMirrorModule) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def count_bytes(module: MagicMirrorModule) -> int:
    """Weights, gradients and AdamW's moments: what a step holds beside activations."""
    weights = sum(parameter.nbytes for parameter in module.parameters())
    return weights + ADAM_BYTES * sum(parameter.numel() for parameter in trained_parameters(module))


def check_memory(needed: int, device: str) -> None:
    """Raise ValueError where the weights alone do not fit."""
    if device == "cuda":
        there, what = torch.cuda.mem_get_info()[0], "free on the GPU"
    else:
        there, what = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "memory in this machine"
    if needed > there:
        raise ValueError(
            f"Weights, gradients and AdamW's moments take {needed / GIB:.1f} GiB, there are {there / GIB:.1f} GiB "
            f"{what}. Give a smaller --preset, or a smaller base: `python -m mm_lightning.tiny FOLDER`, then "
            "--preset tiny --base FOLDER."
        )


# The batch ----------------------------------------------------------------------------------------------------------


def make_batch(module: MagicMirrorModule, sizes: Sizes, num_references: int) -> Batch:
    """Random tensors as shards with cached latents, text and features give them; every picture shows a face."""
    device, batch_size = module.device, sizes.batch_size
    backbone = module.backbone
    ratio, num_channels = backbone.vae_scale_factor_spatial, backbone.vae_config.latent_channels
    num_latent_frames = 1 + (sizes.num_frames - 1) // backbone.vae_scale_factor_temporal
    moments = (num_latent_frames, 2 * num_channels, sizes.height // ratio, sizes.width // ratio)
    boxes, landmarks = make_faces(sizes, device)
    pictures = Sizes(num_frames=num_references, height=REFERENCE_SIZE, width=REFERENCE_SIZE, batch_size=batch_size)
    return Batch(
        keys=[f"sample{i}" for i in range(batch_size)],
        captions=[""] * batch_size,
        pixels=None,
        latent_moments=torch.randn(batch_size, *moments, device=device),
        face_boxes=boxes,
        face_landmarks=landmarks,
        references=2 * torch.rand(batch_size, num_references, 3, REFERENCE_SIZE, REFERENCE_SIZE, device=device) - 1,
        reference_landmarks=make_faces(pictures, device)[1],
        reference_mask=torch.ones(batch_size, num_references, dtype=torch.bool, device=device),
        text=make_text(module, batch_size),
        face=make_features(module, batch_size, num_references),
    )


def make_text(module: MagicMirrorModule, batch_size: int) -> TextFeatures:
    """prompt_embeds (B, T, D_txt); the class word comes first."""
    config = module.transformer.config
    shape = (batch_size, config.max_text_seq_length, config.text_embed_dim)
    id_token_mask = torch.zeros(shape[:2], dtype=torch.bool, device=module.device)
    id_token_mask[:, : module.front_end.id_perceiver.num_tokens] = True
    return TextFeatures(torch.randn(shape, device=module.device, dtype=module.dtype_of_base), id_token_mask)


def make_features(module: MagicMirrorModule, batch_size: int, num_references: int) -> FaceFeatures:
    """States (B, R, L, D_vit) and queries (B, R, E)."""
    vision, device = module.features.vision.config, module.device
    num_tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    shape = (batch_size, num_references, num_tokens, vision.hidden_size)
    return FaceFeatures(
        last_hidden_state=torch.randn(shape, device=device),
        penultimate_hidden_state=torch.randn(shape, device=device),
        id_query=torch.randn(*shape[:2], module.features.recognizer.embed_dim, device=device),
        reference_mask=torch.ones(shape[:2], dtype=torch.bool, device=device),
    )


# The step -----------------------------------------------------------------------------------------------------------


def run_cases(module: MagicMirrorModule, cases: Sequence[Case], num_steps: int) -> Iterator[Row]:
    """Measure one row after the other; they share weights and optimiser, so the later ones start somewhat trained."""
    optimizer = module.optimizer_factory(trained_parameters(module))
    for case in cases:
        row = measure(module, optimizer, case, num_steps)
        name = f"{case.stage}, identity loss {'on' if case.identity_loss else 'off'}"
        logger.info("%s: %.3g s a step, peak %.1f GiB", name, row.step_seconds, row.peak_bytes / GIB)
        yield row


def measure(module: MagicMirrorModule, optimizer: torch.optim.Optimizer, case: Case, num_steps: int) -> Row:
    """One step to count FLOPs, which takes longer, one to warm up, then `num_steps` that are timed."""
    limit = module.diffusion.num_train_timesteps
    module.loss.identity = IdentityLoss(max_timestep=limit) if case.identity_loss else NullIdentityLoss()
    batch = make_batch(module, case.sizes, STAGES[case.stage].num_references)
    flops = count_flops(lambda: train_step(module, optimizer, batch, step=0))
    train_step(module, optimizer, batch, step=1)
    reset_peak(module.device)
    seconds = []
    for step in range(2, num_steps + 2):
        synchronize(module.device)
        start = time.perf_counter()
        loss = train_step(module, optimizer, batch, step)
        synchronize(module.device)
        seconds.append(time.perf_counter() - start)
    return Row(
        case,
        num_tokens=count_tokens(module, batch),
        seconds=seconds,
        peak_bytes=read_peak(module.device),
        flops=flops,
        loss=loss.total.mean().item(),
        velocity=loss.terms["velocity"].mean().item(),
        identity=loss.terms["identity"].mean().item(),
    )


def train_step(module: MagicMirrorModule, optimizer: torch.optim.Optimizer, batch: Batch, step: int) -> LossOutput:
    """In the trainer's order: the last step's gradients are still there in the forward pass."""
    with torch.autocast(module.device.type, torch.bfloat16):
        loss, _ = module.compute_loss(batch, sample_generators(module.seed, step, batch.keys))
    optimizer.zero_grad()
    loss.total.mean().backward()
    torch.nn.utils.clip_grad_norm_(trained_parameters(module), CLIP_NORM)
    optimizer.step()
    return LossOutput(loss.total.detach(), loss.terms, loss.counts)


def count_tokens(module: MagicMirrorModule, batch: Batch) -> tuple[int, int, int]:
    config = module.transformer.config
    _, num_frames, _, height, width = batch.latent_moments.shape
    num_frames = -(-num_frames // (config.patch_size_t or 1))
    num_video_tokens = num_frames * (height // config.patch_size) * (width // config.patch_size)
    return num_video_tokens, config.max_text_seq_length, module.front_end.face_perceiver.num_tokens


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def read_peak(device: torch.device) -> int:
    """Bytes: what tensors held at most since `reset_peak`; on the CPU what the process held at most since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Printing -----------------------------------------------------------------------------------------------------------


def make_table(rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("stage", no_wrap=True)
    headings = ("batch", "clip", "tokens", "identity", "s/step", "range", "peak GiB", "TFLOPs", "TFLOP/s")
    for heading in (*headings, "L_noise", "L_id"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        sizes = row.case.sizes
        table.add_row(
            row.case.stage,
            str(sizes.batch_size),
            f"{sizes.num_frames}x{sizes.height}x{sizes.width}",
            "+".join(map(str, row.num_tokens)),
            "on" if row.case.identity_loss else "off",
            f"{row.step_seconds:.3g}",
            f"{min(row.seconds):.3g}-{max(row.seconds):.3g}",
            f"{row.peak_bytes / GIB:.2f}",
            f"{row.flops / 1e12:.4g}",
            f"{row.flops / 1e12 / row.step_seconds:.3g}",
            f"{row.velocity:.3f}",
            f"{row.identity:.3g}" if row.case.identity_loss else "",
        )
    return table


def describe(module: MagicMirrorModule, preset: str, base: str | None, device: str) -> str:
    """The lines above the table."""
    place = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    num_base = sum(p.numel() for name, p in module.transformer.named_parameters() if ".adapter." not in name)
    num_trained = sum(parameter.numel() for parameter in trained_parameters(module))
    checkpointing = "with" if module.gradient_checkpointing else "without"
    return (
        f"{place}: model={preset} on {base or 'CogVideoX-5B'}, transformer {num_base:,} frozen in bf16, "
        f"{num_trained:,} trained in fp32, VAE in {str(module.vae_dtype).removeprefix('torch.')}, "
        f"{checkpointing} gradient checkpointing; weights, gradients and AdamW's moments "
        f"{count_bytes(module) / GIB:.2f} GiB"
    )


def explain(module: MagicMirrorModule, device: str) -> str:
    """The lines below the table."""
    peak = "of tensors on the GPU" if device == "cuda" else "of the process so far"
    limit = module.diffusion.num_train_timesteps
    return (
        f"tokens: video, text, face. peak: most memory {peak}. TFLOPs: as executed, what checkpointing computes anew "
        f"included. identity on: at every timestep (max_timestep={limit}), so that each sample's face is decoded; "
        "training leaves out the noisy ones. Latents and what T5 and CLIP say are given: T5 is not in memory, CLIP is "
        "but does not run."
    )


def parse_arguments(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m mm_lightning.benchmark step", description=__doc__.split("\n")[0])
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=found, help="cuda where there is a GPU")
    parser.add_argument("--preset", choices=PRESETS, default="base", help="a file of conf/model/")
    parser.add_argument("--base", help="folder or hub id of the CogVideoX whose sizes are taken, in place of the 5B")
    parser.add_argument("--stage", choices=[*STAGES, "both"], default="both")
    default = ", ".join(f"{stage.batch_size} for {name}" for name, stage in STAGES.items())
    parser.add_argument("--batch-size", type=int, help=f"by default {default}")
    parser.add_argument("--steps", type=int, default=3, help="timed, after one to warm up")
    parser.add_argument("--frames", type=int, default=49, help="of the video stage, 4k+1")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=720)
    parser.add_argument("--identity-loss", choices=["on", "off", "both"], default="both")
    parser.add_argument("--vae-dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    return parser, parser.parse_args(arguments)


def check_arguments(a: argparse.Namespace) -> None:
    """All that can be wrong is told before anything large is made.

    Raises:
        FileNotFoundError, ValueError: no GPU, no such base, or a batch that it does not take.
    """
    if a.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no GPU; leave the option away to run on the CPU.")
    for option, value in (("--steps", a.steps), ("--batch-size", a.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{option} {value} is not positive.")
    backbone = describe_base(read_configs(a.base) if a.base else COGVIDEOX_5B)
    backbone.check_frames(a.frames)
    backbone.rotary_embeddings(1, a.height, a.width)  # 1.5 has positions up to a size
    backbone.check_size(a.height, a.width)


def make_cases(a: argparse.Namespace) -> list[Case]:
    cases = []
    for name in STAGES if a.stage == "both" else [a.stage]:
        stage = STAGES[name]
        sizes = Sizes(
            num_frames=stage.num_frames or a.frames,
            height=a.height,
            width=a.width,
            batch_size=a.batch_size or stage.batch_size,
        )
        switches = {"off": [False], "on": [True], "both": [False, True]}[a.identity_loss]
        cases += [Case(name, sizes, switch) for switch in switches]
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser, a = parse_arguments(arguments)
    torch.manual_seed(0)
    options = (getattr(torch, a.vae_dtype), a.gradient_checkpointing)
    try:
        check_arguments(a)
        check_memory(count_bytes(build_module(a.preset, a.base, "meta", *options)), a.device)
        module = build_module(a.preset, a.base, a.device, *options)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    rows, failure = [], None
    try:
        for row in run_cases(module, make_cases(a), a.steps):
            rows.append(row)
    except torch.OutOfMemoryError as error:
        failure = f"The GPU's memory does not hold the next row: {str(error).splitlines()[0]}"
    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)  # not cut where the output is a file
    console.print(describe(module, a.preset, a.base, a.device), make_table(rows), explain(module, a.device), sep="\n")
    if failure is None and not all(row.is_finite for row in rows):
        failure = "A loss is not finite: see the table."
    if failure:
        sys.exit(failure)
