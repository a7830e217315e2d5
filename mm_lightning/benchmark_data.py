"""How fast the data modules deliver, against decoding the same files and nothing else.

    python -m mm_lightning.benchmark data

writes small sets of pictures and clips into a temporary folder and times, in turn and in the same run:
the whole pipeline (reading by offset, checksums, decoding, boxes, tensors, collating, and the way from the workers)
against the decoder alone on the same bytes, by the clock and in CPU time; cached latents against encoding on the fly,
with the miniature's VAE and with the cost of CogVideoX-5B's; the start with an index of up to ten thousand shards; and
memory over many samples.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import av
import decord
import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from hydra.utils import instantiate
from lightning import Trainer
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from skimage import data as skimage_data
from torch.utils.flop_counter import FlopCounterMode

from mm_lightning.prepare.shards import ShardWriter
from mm_lightning.tiny import make_tiny

DATA_MODULES = {"image": "datamodules.image.ImageDataModule", "video": "datamodules.video.VideoDataModule"}
LANCZOS = Image.Resampling.LANCZOS
LATENT_CHANNELS, SPATIAL, TEMPORAL = 16, 8, 4
TARGET_RATIO, TARGET_CACHED, TARGET_START = 0.9, 20, 2.0
MEGABYTE = 1e6
# glibc's mallopt; the numbers are those of malloc.h, the threshold is the largest that it takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_THRESHOLD = -1, -3, 32 * 1024 * 1024


class Sizes(NamedTuple):
    """Of the stored files and of what is delivered, pixels."""

    source: tuple[int, int]  # width, height
    target: tuple[int, int]
    num_frames: int
    reference: int
    num_samples: int

    @property
    def batch_size(self) -> int:
        """As in `conf/data/`."""
        return 8 if self.num_frames == 1 else 1


class Row(NamedTuple):
    what: str
    measured: str
    against: str
    bar: str
    met: bool | None


# Sets of files --------------------------------------------------------------------------------------------------------


def photo(size: tuple[int, int], number: int) -> Image.Image:
    """A cut of a real photograph, enlarged."""
    whole = Image.fromarray(skimage_data.astronaut())
    rng = np.random.default_rng(number)
    scale = min(whole.width / size[0], whole.height / size[1]) * rng.uniform(0.7, 1.0)
    side = (size[0] * scale, size[1] * scale)
    x, y = (rng.uniform(0, length - part) for length, part in zip(whole.size, side, strict=True))
    return whole.resize(size, LANCZOS, box=(x, y, x + side[0], y + side[1]))


def jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def clip(sizes: Sizes, number: int) -> bytes:
    """The camera moves over a photograph, H.264."""
    width, height = sizes.source
    picture = np.asarray(photo((width + 2 * sizes.num_frames, height), number))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(25), options={"crf": "23", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(sizes.num_frames):
            frame = np.ascontiguousarray(picture[:, 2 * i : 2 * i + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def describe(sizes: Sizes) -> dict[str, Any]:
    """The json of a sample, a face in the middle of every frame."""
    (width, height), side = sizes.source, sizes.source[1] / 4
    x, y = width / 2, height / 2
    points = [[x - 9, y - 9], [x + 9, y - 9], [x, y], [x - 7, y + 9], [x + 7, y + 9]]
    face = {"box": [x - side, y - side, x + side, y + side], "landmarks": points, "score": 1.0}
    half = sizes.reference / 2
    own = {"box": [half / 2, half / 2, 3 * half / 2, 3 * half / 2], "landmarks": [[half, half]] * 5}
    return {
        "width": width,
        "height": height,
        "num_frames": sizes.num_frames,
        "fps": 25.0 if sizes.num_frames > 1 else None,
        "faces": [face] * sizes.num_frames,
        "references": [{"file": "ref0.jpg", "similarity": 1.0, **own}],
    }


def write_set(folder: Path, sizes: Sizes, latents: bool = False) -> Path:
    """Few different files, many samples: what is encoded once is written often."""
    kind = "image" if sizes.num_frames == 1 else "video"
    names = ("jpg", lambda i: jpeg(photo(sizes.source, i))) if kind == "image" else ("mp4", lambda i: clip(sizes, i))
    targets = [names[1](i) for i in range(min(8, sizes.num_samples))]
    reference = jpeg(photo((sizes.reference, sizes.reference), 99))
    extra = {"latents.safetensors": save(random_latents(sizes))} if latents else {}
    with ShardWriter(folder, kind, samples_per_shard=max(1, sizes.num_samples // 4)) as writer:
        for i in range(sizes.num_samples):
            fields = {names[0]: targets[i % len(targets)], "ref0.jpg": reference}
            writer.write(f"s{i:06d}", fields | extra | {"txt": "A woman img", "json": describe(sizes)})
    return folder


def random_latents(sizes: Sizes) -> dict[str, torch.Tensor]:
    width, height = sizes.target
    shape = ((sizes.num_frames - 1) // TEMPORAL + 1, LATENT_CHANNELS, height // SPATIAL, width // SPATIAL)
    return {"mean": torch.randn(shape), "logvar": torch.randn(shape)}


def data_module(folder: Path, sizes: Sizes, **options: Any) -> Any:
    """What a trainer would have, pictures as bytes until they are on the device; reached by name, as in `conf/`."""
    kind = "image" if sizes.num_frames == 1 else "video"
    frames = {} if kind == "image" else {"num_frames": sizes.num_frames}
    width, height = sizes.target
    module = instantiate(
        {"_target_": DATA_MODULES[kind], "height": height, "width": width, "reference_size": sizes.reference},
        shards=str(folder),
        **{"num_lanes": 4, "batch_size": sizes.batch_size, **frames, **options},
    )
    module.trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    return module


# The bound ------------------------------------------------------------------------------------------------------------


def covering(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The smallest size of the same shape that the target can be cut from."""
    scale = max(target[0] / source[0], target[1] / source[1])
    return round(source[0] * scale), round(source[1] * scale)


def decode_picture(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Decoded and resized to cover `size`: nothing is cut, and no tensor made."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB").resize(covering(picture.size, size), LANCZOS))


def decode_clip(data: bytes, size: tuple[int, int], num_frames: int) -> np.ndarray:
    """Decoded straight to `size`."""
    reader = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), width=size[0], height=size[1], num_threads=1)
    return reader.get_batch(list(range(num_frames))).asnumpy()


def decode_only(files: Sequence[tuple[bytes, bytes]], sizes: Sizes) -> Iterator[None]:
    """Without end: target and reference of one sample after the other, from memory."""
    while True:
        for target, reference in files:
            if sizes.num_frames == 1:
                decode_picture(target, sizes.target)
            else:
                decode_clip(target, covering(sizes.source, sizes.target), sizes.num_frames)
            decode_picture(reference, (sizes.reference, sizes.reference))
            yield


def load_files(folder: Path, sizes: Sizes) -> list[tuple[bytes, bytes]]:
    import webdataset as wds

    suffix = "jpg" if sizes.num_frames == 1 else "mp4"
    stored = wds.WebDataset([str(path) for path in sorted(folder.glob("*.tar"))], shardshuffle=False)
    return [(sample[suffix], sample["ref0.jpg"]) for sample in islice(stored, 16)]


# Rates ----------------------------------------------------------------------------------------------------------------


class Rate(NamedTuple):
    """Samples per second."""

    clock: float
    cpu: float  # of CPU time, of all processes together


def compare(folder: Path, sizes: Sizes, workers: int, num_samples: int, repetitions: int) -> tuple[Rate, Rate, float]:
    """The pipeline and as many decoding processes take turns.

    Returns:
        Rates of the pipeline and of the decoder, and the median of their ratios in CPU time, which neighbours on the
        machine change little. What the receiving process does counts for the pipeline.
    """
    files = load_files(folder, sizes)
    batches = iter(data_module(folder, sizes, num_workers=workers).train_dataloader())
    consume(batches, 4 * max(workers, 1))
    pairs = [
        (
            rate_of_loader(batches, sizes.batch_size, workers, num_samples // sizes.batch_size),
            rate_of_decoders(files, sizes, workers, num_samples) if workers else rate_here(files, sizes, num_samples),
        )
        for _ in range(repetitions)
    ]
    pipeline, decoder = (Rate(*map(statistics.median, zip(*rates, strict=True))) for rates in zip(*pairs, strict=True))
    return pipeline, decoder, statistics.median(one.cpu / other.cpu for one, other in pairs)


def fix_allocator() -> None:
    """Here and in all processes that are forked: pictures come from the heap, and it is kept.

    By itself glibc raises its thresholds with what a process frees, so that either side of a comparison asks the
    kernel for its pictures or not by chance. Without glibc nothing is changed.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(parameter, LARGEST_THRESHOLD)


def consume(source: Iterator[Any], number: int) -> None:
    for _ in islice(source, number):
        pass


def rate_of_loader(batches: Iterator[Any], batch_size: int, workers: int, num_batches: int) -> Rate:
    """By the clock once the queues that filled meanwhile are empty; by CPU time from full queues to full queues."""
    processes, warming = [process.pid for process in multiprocessing.active_children()], 4 * workers
    before = settled_cpu_seconds(processes)
    consume(batches, warming)
    started = time.perf_counter()
    consume(batches, num_batches)
    seconds = time.perf_counter() - started
    cpu_seconds = settled_cpu_seconds(processes) - before
    return Rate(batch_size * num_batches / seconds, batch_size * (warming + num_batches) / cpu_seconds)


def rate_here(files: Sequence[tuple[bytes, bytes]], sizes: Sizes, num_samples: int) -> Rate:
    """Of decoding in this process."""
    decoder = decode_only(files, sizes)
    consume(decoder, 4)
    started, before = time.perf_counter(), time.process_time()
    consume(decoder, num_samples)
    return Rate(num_samples / (time.perf_counter() - started), num_samples / (time.process_time() - before))


def rate_of_decoders(files: Sequence[tuple[bytes, bytes]], sizes: Sizes, workers: int, num_samples: int) -> Rate:
    context = multiprocessing.get_context("fork")
    ready, spent, each = context.Barrier(workers + 1), context.SimpleQueue(), -(-num_samples // workers)

    def work() -> None:
        decoder = decode_only(files, sizes)
        consume(decoder, 4)
        ready.wait()
        before = time.process_time()
        consume(decoder, each)
        spent.put(time.process_time() - before)

    processes = [context.Process(target=work) for _ in range(workers)]
    for process in processes:
        process.start()
    ready.wait()
    started = time.perf_counter()
    for process in processes:
        process.join()
    seconds, cpu_seconds = time.perf_counter() - started, sum(spent.get() for _ in processes)
    return Rate(each * workers / seconds, each * workers / cpu_seconds)


def settled_cpu_seconds(processes: Sequence[int]) -> float:
    """Of this process and of these, as soon as they have nothing to do."""
    quiet = 0
    while quiet < 4:
        quiet = 0 if any(map(runs, processes)) else quiet + 1
        time.sleep(0.02)
    ticks = sum(int(value) for process in processes for value in process_stat(process)[11:13])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def runs(process: int) -> bool:
    """Whether any thread of a process does or waits for a core: decord decodes in threads of its own."""
    for task in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            if stat_fields(task)[0] == "R":
                return True
    return False


def process_stat(process: int) -> list[str]:
    return stat_fields(Path(f"/proc/{process}"))


def stat_fields(folder: Path) -> list[str]:
    """Of a process or thread, from the state on: the 3rd field of `stat` as man proc counts them."""
    return (folder / "stat").read_text().rpartition(")")[2].split()


def rate_rows(folder: Path, name: str, sizes: Sizes, workers: Sequence[int], repetitions: int) -> Iterator[Row]:
    number = max(4, sizes.num_samples // 8 * 8)
    for count in workers:
        pipeline, decoder, ratio = compare(folder, sizes, count, number, repetitions)
        yield Row(
            f"{name}, {count} workers" if count else f"{name}, in the process",
            f"{pipeline.clock:.1f} samples/s, {pipeline.cpu:.1f} per CPU second",
            f"decoding alone {decoder.clock:.1f}, {decoder.cpu:.1f}",
            f"{ratio:.2f} >= {TARGET_RATIO}",
            ratio >= TARGET_RATIO,
        )


# Cached tensors -------------------------------------------------------------------------------------------------------


def cached_rows(work: Path, sizes: Sizes, teraflops: float, repetitions: int) -> Iterator[Row]:
    """Latents from the shard against decoding and encoding, samples per CPU second each."""
    fields = sizes._replace(num_samples=16)
    cached = data_module(write_set(work / "cached", fields, latents=True), fields).train_dataloader()
    plain = data_module(write_set(work / "plain", fields), fields).train_dataloader()
    cached_seconds, plain_seconds = (cpu_seconds_per_sample(loader, repetitions) for loader in (cached, plain))
    flops = encoder_flops(AutoencoderKLCogVideoX(sample_height=480, sample_width=720), sizes)
    encode = flops / (teraflops * 1e12)
    ratio = (plain_seconds + encode) / cached_seconds
    yield Row(
        "cached latents, CogVideoX-5B's VAE by its cost",
        f"{1 / cached_seconds:.1f} samples/s per worker",
        f"decoding and {flops / 1e12:.1f} TFLOP at {teraflops:g} TFLOP/s {1 / (plain_seconds + encode):.2f}",
        f"{ratio:.0f} >= {TARGET_CACHED}",
        ratio >= TARGET_CACHED,
    )
    yield miniature_row(work, repetitions)


def miniature_row(work: Path, repetitions: int) -> Row:
    """The whole of it measured, at the size of the miniature: 9 frames of 96x96 pixels, its own VAE on this CPU."""
    sizes = Sizes(source=(128, 128), target=(96, 96), num_frames=9, reference=64, num_samples=16)
    cached = data_module(write_set(work / "small_cached", sizes, latents=True), sizes).train_dataloader()
    module = data_module(write_set(work / "small_plain", sizes), sizes)
    plain = module.train_dataloader()
    vae = AutoencoderKLCogVideoX.from_pretrained(make_tiny(work / "tiny"), subfolder="vae").eval()

    @torch.inference_mode()
    def encode(batch: Any) -> None:
        vae.encode(module.on_after_batch_transfer(batch, 0).pixels.transpose(1, 2))

    cached_seconds = cpu_seconds_per_sample(cached, repetitions)
    plain_seconds = cpu_seconds_per_sample(plain, repetitions, encode)
    ratio = plain_seconds / cached_seconds
    return Row(
        "cached latents, the miniature measured",
        f"{1 / cached_seconds:.1f} samples per CPU second",
        f"decoding and encoding {1 / plain_seconds:.1f}",
        f"{ratio:.1f}",
        None,
    )


def cpu_seconds_per_sample(loader: Any, repetitions: int, then: Callable[[Any], None] | None = None) -> float:
    seconds = []
    batches = iter(loader)
    for _ in range(3 * repetitions + 1):
        started = time.process_time()
        batch = next(batches)
        if then is not None:
            then(batch)
        seconds.append(time.process_time() - started)
    return statistics.median(seconds[1:])


def encoder_flops(vae: AutoencoderKLCogVideoX, sizes: Sizes) -> int:
    """Counted on a batch of nothing: no number is computed."""
    width, height = sizes.target
    pixels = torch.empty(1, 3, sizes.num_frames, height, width, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.to("meta").encode(pixels)
    return counter.get_total_flops()


# Starting -------------------------------------------------------------------------------------------------------------


def start_rows(work: Path, counts: Sequence[int]) -> Iterator[Row]:
    """Data module, loader and first batch; every entry of the index is a link to the same tar."""
    sizes = Sizes(source=(64, 64), target=(64, 64), num_frames=1, reference=32, num_samples=64)
    one = write_set(work / "one", sizes._replace(num_samples=64))
    for count in counts:
        folder = simulate_index(one, work / f"index_{count}", count)
        seconds = [time_to_first_batch(folder, sizes, position) for position in (0, 37 * count)]
        yield Row(
            f"{count} shards, first batch",
            f"{seconds[0]:.3f} s",
            f"resumed in the middle {seconds[1]:.3f} s",
            f"< {TARGET_START:g} s",
            max(seconds) < TARGET_START,
        )


def simulate_index(one: Path, folder: Path, count: int) -> Path:
    folder.mkdir()
    index = json.loads((one / "index.json").read_text())
    entry = index["shards"][0]
    for i in range(count):
        name = f"train-{i:06d}.tar"
        for suffix in ("", ".index"):
            os.symlink(one / f"{entry['name']}{suffix}", folder / f"{name}{suffix}")
    shards = [entry | {"name": f"train-{i:06d}.tar"} for i in range(count)]
    total = count * entry["num_samples"]
    (folder / "index.json").write_text(json.dumps(index | {"shards": shards, "num_samples": total}))
    return folder


def time_to_first_batch(folder: Path, sizes: Sizes, position: int) -> float:
    started = time.perf_counter()
    module = data_module(folder, sizes, batch_size=8, num_lanes=8, shuffle_buffer=4096, num_workers=0)
    module.position.consumed = position
    next(iter(module.train_dataloader()))
    return time.perf_counter() - started


# Memory ---------------------------------------------------------------------------------------------------------------


def memory_row(folder: Path, name: str, sizes: Sizes, num_samples: int) -> Row:
    """Of this process, which reads; a tenth of the way is for warming up."""
    batches = iter(data_module(folder, sizes, batch_size=1, num_workers=0).train_dataloader())
    consume(batches, max(8, num_samples // 10))
    before, peak = resident(), 0.0
    started = time.perf_counter()
    for _ in range(10):
        consume(batches, num_samples // 10)
        peak = max(peak, resident())
    seconds = time.perf_counter() - started
    return Row(
        f"{name}, memory over {num_samples} samples",
        f"{before:.0f} -> {resident():.0f} MB, peak {peak:.0f}",
        f"in {seconds:.0f} s",
        "flat: < 5 % and 20 MB more",
        resident() - before < max(20, 0.05 * before),
    )


def resident() -> float:
    """MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MEGABYTE


# Command --------------------------------------------------------------------------------------------------------------


def run(a: argparse.Namespace, work: Path) -> Iterator[Row]:
    image = Sizes((900, 600), (720, 480), 1, 512, a.pictures)
    video = Sizes((1280, 720), (720, 480), a.frames, 512, a.clips)
    small = Sizes((160, 120), (96, 72), 9, 64, 64)
    if "start" in a.parts:
        yield from start_rows(work, a.shards)
    if "rate" in a.parts:
        yield from rate_rows(write_set(work / "image", image), "jpeg", image, a.workers, a.repetitions)
        yield from rate_rows(write_set(work / "video", video), "mp4", video, a.workers, a.repetitions)
    if "cached" in a.parts:
        yield from cached_rows(work, video, a.teraflops, a.repetitions)
    if "memory" in a.parts:
        tiny = Sizes((120, 80), (96, 64), 1, 64, 64)
        yield memory_row(write_set(work / "memory_image", tiny), "jpeg", tiny, a.samples)
        yield memory_row(write_set(work / "memory_video", small), "mp4", small, a.samples)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mm_lightning.benchmark data", description=__doc__.split("\n")[0])
    parts = ["start", "rate", "cached", "memory"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2, 4], help="0 is the process itself")
    parser.add_argument("--pictures", type=int, default=320, help="in the set of jpegs")
    parser.add_argument("--clips", type=int, default=16, help="in the set of mp4s")
    parser.add_argument("--frames", type=int, default=49, help="of a clip, 4k+1")
    parser.add_argument("--shards", nargs="+", type=int, default=[10, 100, 1000, 10_000], help="of a simulated index")
    parser.add_argument("--samples", type=int, default=10_000, help="over which memory is watched")
    parser.add_argument("--teraflops", type=float, default=300.0, help="per second, of the GPU that would encode")
    parser.add_argument("--repetitions", type=int, default=3)
    a = parser.parse_args(argv)
    for name in ("pictures", "clips", "samples", "repetitions", "teraflops"):
        if getattr(a, name) <= 0:
            parser.error(f"--{name} {getattr(a, name)} is not positive.")
    if a.frames % TEMPORAL != 1:
        parser.error(f"--frames {a.frames} is not 4k+1 (1, 5, 9, ... 49), as the VAE takes them.")
    return a


def main(argv: Sequence[str] | None = None) -> None:
    a = parse_arguments(argv)
    fix_allocator()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    table = Table(title=f"{os.cpu_count()} cores", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("what", "measured", "against", "bar", ""):
        table.add_column(name)
    with tempfile.TemporaryDirectory(prefix="magicmirror-benchmark-") as work:
        for row in run(a, Path(work)):
            print(
                f"{row.what}: {row.measured}, {row.against}, {row.bar}", file=sys.stderr, flush=True
            )  # it takes minutes
            table.add_row(*row[:-1], {True: "met", False: "MISSED", None: ""}[row.met])
    console = Console(highlight=False)
    console.width = max(console.width, 150)  # not cut where the output is a file
    console.print(table)


if __name__ == "__main__":
    main()
