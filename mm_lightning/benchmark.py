"""What MagicMirror costs beside what it is added to: ratios of times, measured in one run on one machine.

    python -m mm_lightning.benchmark
    python -m mm_lightning.benchmark --device cuda --dtype bfloat16 --dim 3072 --layers 42 --gradient-checkpointing
        --frames 49 --height 480 --width 720

Further measurements are modules of their own, `benchmark_NAME.py`: `python -m mm_lightning.benchmark NAME --help`.

Networks have random weights, and their widths are CogVideoX-5B's in proportion to `--dim`; 3072 is the 5B itself.
Baseline and measured run in turn, so that whatever else the machine does meets both.

Letters: B batch, F frames, F' latent frames, C latent channels, h w latent pixels, S video tokens, T text tokens,
N face tokens, D width, E width of the face embedding.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from mm_lightning.adapters.transformer import AdapterConfig, MagicMirrorTransformer3DModel
from mm_lightning.diffusion import Diffusion
from mm_lightning.encoders.recognizer import load_recognizer
from mm_lightning.face_decoder import FaceDecoder
from mm_lightning.losses.diffusion import DiffusionLoss, FaceRegion
from mm_lightning.tiny import build_scheduler

HEAD_DIM, NUM_TEXT_TOKENS, NUM_FACE_TOKENS, LATENT_CHANNELS = 64, 226, 32, 16
SPATIAL_RATIO, TEMPORAL_RATIO, PATCH_SIZE = 8, 4, 2
SCALING_FACTOR = 0.7
# Eyes, nose tip, mouth corners in a face box of side 1.
LANDMARKS = ((0.3, 0.4), (0.7, 0.4), (0.5, 0.6), (0.35, 0.8), (0.65, 0.8))
MIN_SECONDS = 0.1  # of one timing: what is faster is called often
TABLE_WIDTH = 120
# Imported when asked for: each brings parts of the project that the others do without.
SUBCOMMANDS = {
    file.stem.removeprefix("benchmark_"): f"mm_lightning.{file.stem}"
    for file in sorted(Path(__file__).parent.glob("benchmark_*.py"))
}
logger = logging.getLogger(__name__)


class Sizes(NamedTuple):
    """Of the transformer and of the video; the defaults take under a minute on two CPU cores."""

    dim: int = 384
    num_layers: int = 4
    num_frames: int = 9
    height: int = 160
    width: int = 240
    batch_size: int = 1

    @property
    def latents_shape(self) -> tuple[int, ...]:
        """(B, F', C, h, w)."""
        num_latent_frames = 1 + self.num_frames // TEMPORAL_RATIO
        height, width = self.height // SPATIAL_RATIO, self.width // SPATIAL_RATIO
        return self.batch_size, num_latent_frames, LATENT_CHANNELS, height, width

    @property
    def num_video_tokens(self) -> int:
        """S."""
        _, num_latent_frames, _, height, width = self.latents_shape
        return num_latent_frames * (height // PATCH_SIZE) * (width // PATCH_SIZE)


# Where loss and noise are measured whatever the transformer's size, as they do not depend on it.
VIDEO_5B = Sizes(num_frames=49, height=480, width=720)


class Comparison(NamedTuple):
    """What a row compares: two functions without arguments."""

    what: str
    against: str
    measured: Callable[[], Any]
    baseline: Callable[[], Any]


class Row(NamedTuple):
    """Medians over the repetitions; `ratios` are those of each repetition."""

    comparison: Comparison
    baseline_ms: float
    measured_ms: float
    ratios: list[float]
    baseline_flops: int
    measured_flops: int

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def run_benchmark(
    sizes: Sizes,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    repetitions: int = 5,
) -> list[Row]:
    """Measure everything. In half precision as training does: frozen base in it, adapter in fp32, autocast over both.

    Raises:
        ValueError: sizes that CogVideoX cannot have.
    """
    check_sizes(sizes)
    torch.manual_seed(0)
    device = torch.device(device)
    rows = []
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        model = build_transformer(sizes, device, dtype, gradient_checkpointing)
        comparisons = (
            *block_comparisons(model, sizes),
            *transformer_comparisons(model, sizes),
            face_region_comparison(sizes.batch_size, device, dtype),
            noise_comparison(sizes.batch_size, device),
        )
        for comparison in comparisons:
            logger.info("%s / %s", comparison.what, comparison.against)
            rows.append(compare(comparison, repetitions, device))
    return rows


def check_sizes(sizes: Sizes) -> None:
    """Raise ValueError for what CogVideoX cannot have."""
    step = SPATIAL_RATIO * PATCH_SIZE
    if sizes.dim < HEAD_DIM or sizes.dim % HEAD_DIM:
        raise ValueError(f"--dim {sizes.dim} is no multiple of {HEAD_DIM}, the width of an attention head.")
    if sizes.num_layers < 2:
        raise ValueError(f"--layers {sizes.num_layers}: at least 2, one with an adapter and one without.")
    if sizes.num_frames % TEMPORAL_RATIO != 1:
        raise ValueError(f"--frames {sizes.num_frames} is not 4k+1 (1, 5, 9, ... 49), as the VAE takes them.")
    for name in ("height", "width"):
        if (side := getattr(sizes, name)) < step or side % step:
            raise ValueError(f"--{name} {side} is no multiple of {step} pixels, the side of a patch.")
    if sizes.batch_size < 1:
        raise ValueError(f"--batch-size {sizes.batch_size} is not positive.")


# Measuring ----------------------------------------------------------------------------------------------------------


def compare(comparison: Comparison, repetitions: int, device: torch.device) -> Row:
    """Warm both up, counting their FLOPs, then time them in turn, now the one first and now the other."""
    pair = (comparison.baseline, comparison.measured)
    flops = [count_flops(function) for function in pair]
    fastest = min(time_calls(function, 1, device) for function in pair)
    num_calls = max(round(MIN_SECONDS / fastest), 1)
    times = []
    for i in range(repetitions):
        order = (0, 1) if i % 2 else (1, 0)
        seconds = {j: time_calls(pair[j], num_calls, device) for j in order}
        times.append((seconds[0], seconds[1]))
    medians = [1e3 * statistics.median(column) for column in zip(*times, strict=True)]
    return Row(comparison, *medians, [measured / baseline for baseline, measured in times], *flops)


def attention_flops(query: torch.Size, key: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Two products, of query (B, heads, S, K) and key (B, heads, N, K), and of the probabilities and the values."""
    return 4 * query.numel() * key[2]


def attention_backward_flops(grad: torch.Size, query: torch.Size, key: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Five products: the scores once more, and the gradients of probabilities, query, key and value."""
    return 10 * query.numel() * key[2]


# The one kind of attention that FlopCounterMode does not know by itself.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def count_flops(function: Callable[[], Any]) -> int:
    """Of matrix products, convolutions and attention, two per multiply-add."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        function()
    return counter.get_total_flops()


def time_calls(function: Callable[[], Any], num_calls: int, device: torch.device) -> float:
    """Mean seconds of a call."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(num_calls):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / num_calls


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def backward(outputs: Tensor | Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Gradients of the outputs' sum; nothing accumulates in the leaves from one repetition to the next."""
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    sum(output.float().sum() for output in outputs).backward()
    for leaf in leaves:
        leaf.grad = None


# What is measured ---------------------------------------------------------------------------------------------------


def build_transformer(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool
) -> MagicMirrorTransformer3DModel:
    """A frozen base in `dtype` with adapters in fp32, of the `base` preset's proportions."""
    with device:
        base = CogVideoXTransformer3DModel(
            num_attention_heads=sizes.dim // HEAD_DIM,
            attention_head_dim=HEAD_DIM,
            time_embed_dim=sizes.dim // 6,
            text_embed_dim=sizes.dim * 4 // 3,
            num_layers=sizes.num_layers,
            use_rotary_positional_embeddings=True,
        )
    config = AdapterConfig(id_embed_dim=sizes.dim // 6, hidden_dim=sizes.dim // 6)
    model = MagicMirrorTransformer3DModel.from_base(base, config)
    trained = model.adapter_parameters()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        parameter.data = parameter.data.to(torch.float32 if name in trained else dtype)
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def make_inputs(model: MagicMirrorTransformer3DModel, sizes: Sizes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of the transformer and the identity, those with gradient that get one in training."""
    weight = model.patch_embed.proj.weight
    like = {"device": weight.device, "dtype": weight.dtype}
    batch_size, id_embed_dim = sizes.batch_size, model.adapter_config.id_embed_dim
    angles = 6 * torch.rand(sizes.num_video_tokens, HEAD_DIM, device=weight.device)
    inputs = {
        "hidden_states": torch.randn(sizes.latents_shape, **like),
        "encoder_hidden_states": torch.randn(batch_size, NUM_TEXT_TOKENS, model.config.text_embed_dim, **like),
        "timestep": torch.full((batch_size,), 500, device=weight.device),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }
    identity = {
        "face_hidden_states": torch.randn(batch_size, NUM_FACE_TOKENS, sizes.dim, **like),
        "id_embed": torch.randn(batch_size, id_embed_dim, **like),
    }
    for tensor in (inputs["encoder_hidden_states"], *identity.values()):
        tensor.requires_grad_()
    return inputs, identity


def block_comparisons(model: MagicMirrorTransformer3DModel, sizes: Sizes) -> Iterator[Comparison]:
    """One adapted block with identity; gradients reach its inputs and the adapter, no frozen weight."""
    adapted, stock = model.transformer_blocks[:2]
    inputs, identity = make_inputs(model, sizes)
    face = identity["face_hidden_states"]  # (B, N, D)
    shapes = ((sizes.num_video_tokens, sizes.dim), (NUM_TEXT_TOKENS, sizes.dim), (sizes.dim // 6,))
    streams = [torch.randn(len(face), *shape).to(face).requires_grad_() for shape in shapes]
    trained = [parameter for parameter in adapted.adapter.parameters() if parameter.requires_grad]

    def run_stock() -> tuple[Tensor, ...]:
        return stock(*streams, inputs["image_rotary_emb"])

    def run_adapted() -> tuple[Tensor, ...]:
        return adapted(*streams, inputs["image_rotary_emb"], **identity)

    yield Comparison(
        "adapted block, fwd",
        against="stock block",
        measured=torch.no_grad()(run_adapted),
        baseline=torch.no_grad()(run_stock),
    )
    yield Comparison(
        "adapted block, fwd + bwd",
        against="stock block",
        measured=lambda: backward(run_adapted(), [*streams, *identity.values(), *trained]),
        baseline=lambda: backward(run_stock(), streams),
    )


def transformer_comparisons(model: MagicMirrorTransformer3DModel, sizes: Sizes) -> Iterator[Comparison]:
    """The whole model with identity, and the identity loss beside it; the backward pass reaches the front-end."""
    inputs, identity = make_inputs(model, sizes)
    prompt_embeds = inputs["encoder_hidden_states"]

    def predict(attention_kwargs: dict[str, Tensor] | None = None) -> Tensor:
        return model(**inputs, attention_kwargs=attention_kwargs, return_dict=False)[0]

    def train() -> None:
        leaves = [prompt_embeds, *identity.values(), *model.adapter_parameters().values()]
        backward(predict(identity), leaves)

    yield Comparison(
        "transformer + identity, fwd",
        against="without identity",
        measured=torch.no_grad()(lambda: predict(identity)),
        baseline=torch.no_grad()(predict),
    )
    yield Comparison(
        "transformer + identity, fwd + bwd",
        against="without identity",
        measured=train,
        baseline=lambda: backward(predict(), [prompt_embeds]),
    )
    yield Comparison(
        "identity loss, fwd + bwd",
        against="transformer, fwd + bwd",
        measured=make_identity_loss(sizes, prompt_embeds.device),
        baseline=train,
    )


def make_identity_loss(sizes: Sizes, device: torch.device) -> Callable[[], None]:
    """Decode a crop around a face a third as high as the picture, align it, embed it with dlib, and back."""
    channels = max(sizes.dim // 192 * 8, 8)  # 128 for 5B's width
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(channels, 2 * channels, 2 * channels, 4 * channels),
        norm_num_groups=min(channels, 32),
        scaling_factor=SCALING_FACTOR,
    )
    decoder = FaceDecoder(vae, load_recognizer("dlib")).to(device)
    denoised = torch.randn(sizes.latents_shape, device=device).requires_grad_()
    boxes, landmarks = make_faces(sizes, device)
    wanted = torch.ones(sizes.batch_size, dtype=torch.bool, device=device)
    reference = torch.randn(sizes.batch_size, decoder.recognizer.embed_dim, device=device)

    def train() -> None:
        embeddings, _ = decoder(denoised, boxes, landmarks, wanted)  # (B, E)
        backward(1 - F.cosine_similarity(embeddings, reference), [denoised])

    return train


def make_faces(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """A face in the middle of every frame: boxes (B, F, 4) and landmarks (B, F, 5, 2), in pixels."""
    side = sizes.height / 3
    x0, y0 = (sizes.width - side) / 2, side
    box_ = torch.tensor([x0, y0, x0 + side, y0 + side], device=device)
    landmarks = box_[:2] + side * torch.tensor(LANDMARKS, device=device)
    frames = sizes.batch_size, sizes.num_frames
    return box_.expand(*frames, 4), landmarks.expand(*frames, 5, 2)


def face_region_comparison(batch_size: int, device: torch.device, dtype: torch.dtype) -> Comparison:
    sizes = VIDEO_5B._replace(batch_size=batch_size)
    loss = DiffusionLoss(FaceRegion(prob=1.0))
    generators = [torch.Generator() for _ in range(batch_size)]
    velocity = torch.randn(sizes.latents_shape, device=device)
    velocity_pred = torch.randn_like(velocity, dtype=dtype).requires_grad_()
    boxes, _ = make_faces(sizes, device)
    return Comparison(
        f"face-region loss, fwd + bwd, {velocity.nbytes / 1e6:.1f} MB",
        against="plain MSE",
        measured=lambda: backward(loss(velocity_pred, velocity, boxes, generators).loss, [velocity_pred]),
        baseline=lambda: backward(F.mse_loss(velocity_pred.float(), velocity), [velocity_pred]),
    )


def noise_comparison(batch_size: int, device: torch.device) -> Comparison:
    """A step's noise, noisy latents and velocity: drawn sample by sample on the CPU, against the library's own way."""
    scheduler = build_scheduler()
    diffusion = Diffusion.from_backbone(scheduler.config, {"scaling_factor": SCALING_FACTOR})
    latents = torch.randn(VIDEO_5B._replace(batch_size=batch_size).latents_shape, device=device)
    timestep = torch.full((batch_size,), 500, device=device)
    generators = [torch.Generator() for _ in range(batch_size)]

    def add_noise_on_device() -> tuple[Tensor, Tensor]:
        noise = torch.randn_like(latents)
        return scheduler.add_noise(latents, noise, timestep), scheduler.get_velocity(latents, noise, timestep)

    return Comparison(
        f"noise per sample on the CPU, {latents.nbytes / 1e6:.1f} MB",
        against=f"randn on the {device.type}",
        measured=lambda: diffusion.add_noise(latents, generators, timestep),
        baseline=add_noise_on_device,
    )


# Printing -----------------------------------------------------------------------------------------------------------


def make_table(rows: list[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("what", "against"):
        table.add_column(name, no_wrap=True)
        table.add_column("ms", justify="right", no_wrap=True)
        table.add_column("GFLOPs", justify="right", no_wrap=True)
    for heading in ("ratio", "range"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.comparison.what,
            f"{row.measured_ms:.4g}",
            format_gflops(row.measured_flops),
            row.comparison.against,
            f"{row.baseline_ms:.4g}",
            format_gflops(row.baseline_flops),
            f"{row.ratio:.2f}",
            f"{min(row.ratios):.2f}-{max(row.ratios):.2f}",
        )
    return table


def format_gflops(flops: int) -> str:
    return f"{flops / 1e9:.4g}" if flops else ""


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m mm_lightning.benchmark",
        description=__doc__.split("\n")[0],
        epilog=f"Further measurements, each with options of its own: {', '.join(SUBCOMMANDS)}.",
    )
    default = Sizes()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen base")
    parser.add_argument("--dim", type=int, default=default.dim, help="width D, 3072 for CogVideoX-5B")
    parser.add_argument("--layers", type=int, default=default.num_layers, help="42 for CogVideoX-5B")
    parser.add_argument("--frames", type=int, default=default.num_frames, help="4k+1")
    parser.add_argument("--height", type=int, default=default.height)
    parser.add_argument("--width", type=int, default=default.width)
    parser.add_argument("--batch-size", type=int, default=default.batch_size)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="as in training on large models")
    parser.add_argument("--repetitions", type=int, default=5, help="of every comparison")
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in SUBCOMMANDS:
        importlib.import_module(SUBCOMMANDS[arguments[0]]).main(arguments[1:])
    else:
        run_ratios(arguments)


def run_ratios(arguments: Sequence[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser, a = parse_arguments(arguments)
    sizes = Sizes(a.dim, a.layers, a.frames, a.height, a.width, a.batch_size)
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no GPU; leave the option away to run on the CPU.")
    if a.repetitions < 1:
        parser.error(f"--repetitions {a.repetitions} is not positive.")
    try:
        rows = run_benchmark(sizes, a.device, getattr(torch, a.dtype), a.gradient_checkpointing, a.repetitions)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    place = torch.cuda.get_device_name() if a.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{place}, {a.dtype}: D {a.dim}, {a.layers} layers, {a.frames}x{a.height}x{a.width}, batch {a.batch_size}"
    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)  # not cut where the output is a file
    console.print(make_table(rows, title))


if __name__ == "__main__":
    main()
