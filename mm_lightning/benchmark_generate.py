"""What a video of somebody costs beside one of nobody: seconds, parameters, memory.

    python -m mm_lightning.benchmark generate --photos her.jpg
    python -m mm_lightning.benchmark generate --photos her.jpg --base weights/CogVideoX-5b --adapter RUN/adapter
    python -m mm_lightning.benchmark generate --photos her.jpg --out cost.json   # for the evaluation's cost=cost.json

The same pipeline, weights, noise and prompt, with `face_scale` 0 and 1 in turn; "ours" includes finding and embedding
the face, which has a row of its own too. The face's weights lie in memory for every row.
The paper has 204 s for CogVideoX-5B and 209 s for MagicMirror on one A800.
"""

from __future__ import annotations

import argparse
import logging
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from mm_lightning.benchmark import TABLE_WIDTH, synchronize
from mm_lightning.evaluation.cost import Cost, CostRow, write_cost
from mm_lightning.generate import add_weights, load_pipeline
from mm_lightning.pipeline import MagicMirrorPipeline

Calls = dict[str, Callable[[], Any]]
ALONE, OURS, FACE, GUIDED = "backbone alone", "ours", "of which photos -> face", "ours, identity guidance 2"


class Row(NamedTuple):
    """One line of the table."""

    name: str
    seconds: float  # median
    spread: float  # largest minus smallest
    peak_bytes: int  # of the GPU, or of the process where there is none


def measure(calls: Calls, device: torch.device, repetitions: int) -> list[Row]:
    """Each once to warm up, then all in turn, so that whatever else the machine does meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    peaks = dict.fromkeys(calls, 0)
    for round_number in range(repetitions + 1):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            call()
            synchronize(device)
            if round_number:
                seconds[name].append(time.perf_counter() - start)
            peaks[name] = max(peaks[name], peak_bytes(device))
    return [Row(n, statistics.median(s), max(s) - min(s), peaks[n]) for n, s in seconds.items()]


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_calls(pipeline: MagicMirrorPipeline, photos: list[str], options: dict[str, Any]) -> Calls:
    """Row -> what is timed."""

    def generate(**more: Any) -> Any:
        return pipeline(reference_images=photos, generator=torch.Generator().manual_seed(0), **options, **more)

    return {
        ALONE: lambda: generate(face_scale=0),
        OURS: generate,
        FACE: lambda: pipeline.encode_references(photos),
        GUIDED: lambda: generate(identity_guidance_scale=2.0),
    }


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def parameters(pipeline: MagicMirrorPipeline) -> dict[str, int]:
    """Of all that takes part: the paper counts the whole pipeline."""
    adapters = sum(p.numel() for n, p in pipeline.transformer.named_parameters() if ".adapter." in n)
    alone = count(pipeline.transformer, pipeline.vae, pipeline.text_encoder) - adapters
    ours = alone + adapters + count(pipeline.face_encoder, pipeline.front_end)
    return {ALONE: alone, OURS: ours, FACE: count(pipeline.face_encoder), GUIDED: ours}


def describe(pipeline: MagicMirrorPipeline, options: argparse.Namespace) -> dict[str, Any]:
    """What the costs follow from, with the base model's own sizes where none were given."""
    config, ratio = pipeline.transformer.config, pipeline.vae_scale_factor_spatial
    return {
        "num_frames": options.num_frames or config.sample_frames,
        "height": options.height or config.sample_height * ratio,
        "width": options.width or config.sample_width * ratio,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "repetitions": options.repetitions,
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
        "base": pipeline.record["base"]["name"],
    }


def make_table(rows: Sequence[CostRow], title: str) -> Table:
    table = Table("", "seconds", "times", "spread", "parameters", "peak memory", title=title, box=box.SIMPLE)
    for row in rows:
        cells = (f"{row.seconds:.3f}", f"{row.seconds / rows[0].seconds:.3f}", f"{row.spread:.3f}")
        table.add_row(row.name, *cells, f"{row.parameters:,}", f"{row.peak_bytes / 2**30:.2f} GiB")
    return table


def parse(arguments: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    raw, name = argparse.RawDescriptionHelpFormatter, "python -m mm_lightning.benchmark generate"
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--photos", nargs="+", required=True)
    add("--prompt", default="A person img talks to the camera")
    add("--num-inference-steps", type=int, default=50)
    for option in ("--num-frames", "--height", "--width"):
        add(option, type=int, help="the base model's by default")
    add("--guidance-scale", type=float, default=6.0)
    add("--repetitions", type=int, default=3)
    add("--out", type=Path, help="the table as JSON too, for cost= of mm_lightning.evaluate")
    add_weights(parser)
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser, a = parse(sys.argv[1:] if arguments is None else arguments)
    if a.repetitions < 1:
        parser.error(f"--repetitions {a.repetitions} is not positive.")
    if a.num_inference_steps < 1:
        parser.error(f"--num-inference-steps {a.num_inference_steps} is not positive.")
    try:
        pipeline = load_pipeline(a)
        pipeline.set_progress_bar_config(disable=True)
        names = ("prompt", "num_inference_steps", "num_frames", "height", "width", "guidance_scale")
        calls = make_calls(pipeline, a.photos, {name: getattr(a, name) for name in names})
        device = pipeline._execution_device  # also where the weights wait on the CPU
        rows = measure(calls, device, a.repetitions)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)  # not cut where the output is a file
    sizes = parameters(pipeline)
    lines = tuple(CostRow(row.name, row.seconds, row.spread, sizes[row.name], row.peak_bytes) for row in rows)
    cost = Cost(place, describe(pipeline, a), lines)
    console.print(make_table(cost.rows, f"{place}, {a.num_inference_steps} steps"))
    if a.out is not None:
        write_cost(a.out, cost)


if __name__ == "__main__":
    main()
