"""Videos of a person from photos and prompts.

    python -m mm_lightning.generate --photos her.jpg --prompt "A woman img laughs in the rain"
    python -m mm_lightning.generate --jobs jobs.csv --base weights/CogVideoX-5b --adapter RUN/adapter
    python -m mm_lightning.generate --jobs jobs.csv --part 0/4   # a quarter of them, beside three others
    python -m mm_lightning.generate verify outputs/generated/*.mp4

Each video comes with a contact sheet and a JSON file that says how it was made, and can be made again from it
(`--jobs video.json`). What is there already, made in the same way, is kept: an interrupted run goes on. Files carry a
comment and signed content credentials (C2PA) that say that they are generated; `verify` reads them back.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, DiffusionPipeline
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from mm_lightning.backbone import COMPONENTS, Backbone, check_base
from mm_lightning.credentials import Mark, Signing, read_mark, read_signing, sign_file
from mm_lightning.devices import find_device
from mm_lightning.encoders.photos import load_photo
from mm_lightning.encoders.text import IdentityTokenizer
from mm_lightning.files import check_writable, temporary_path, write_json
from mm_lightning.jobs import Job, check_jobs, check_prompts, check_shapes, name_jobs, part_of, read_jobs, read_record
from mm_lightning.media import DISCLOSURE, SheetRow, contact_sheet, sample_frames, write_jpeg, write_mp4
from mm_lightning.pipeline import MagicMirrorPipeline, find_vision
from mm_lightning.provenance import describe_component, describe_vision

logger = logging.getLogger(__name__)

MINIATURE = Path(__file__).parent / "miniature/assets"
SCHEDULERS = {"dpm": CogVideoXDPMScheduler, "ddim": CogVideoXDDIMScheduler}
DTYPES = ["auto", "float32", "bfloat16", "float16"]
OFFLOADS = {"none": None, "model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}
PACKAGES = ("magicmirror-lightning", "torch", "diffusers", "transformers")
FRAMES_SHOWN, SHEET_HEIGHT = 6, 192
MANIFEST = "manifest.json"
OPTIONAL = ("tiling", "signed")  # of a record
FPS, SLOWEST, FASTEST = 8.0, 0.1, 240.0


class Guidance(NamedTuple):
    """How strongly a clip is guided where the user does not say."""

    guidance_scale: float  # by the prompt; up to 1, none
    identity_guidance_scale: float  # by the person; 1, none


BASE_GUIDANCE = Guidance(Job.guidance_scale, Job.identity_guidance_scale)
# Chosen on its validation people, see its model card.
MINIATURE_GUIDANCE = Guidance(guidance_scale=2.0, identity_guidance_scale=1.5)


class Generator:
    """Makes the files of jobs.

    Args:
        pipeline: loaded, on its device.
        out: folder of the files.
        made_with: what the weights are, for the record.
        signing: None leaves the files unsigned.
        fps: of the videos.
        callback_on_step_end: of `CogVideoXPipeline`, called after each denoising step.
    """

    def __init__(
        self,
        pipeline: MagicMirrorPipeline,
        out: Path,
        made_with: dict[str, Any],
        signing: Signing | None,
        fps: float,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
    ) -> None:
        self.pipeline, self.out, self.made_with = pipeline, out, made_with
        self.signing, self.fps, self.callback_on_step_end = signing, fps, callback_on_step_end

    def run(self, jobs: Sequence[Job]) -> list[Path]:
        """The videos' paths, in order; a manifest of all of them for `mm_lightning.evaluate`.

        Raises:
            ValueError: a job's photo or prompt cannot be used; the others are made first.
        """
        made, entries, failures = [], [], []
        for job in tqdm(jobs, desc="videos", unit="video", disable=len(jobs) == 1):
            try:
                path = self.make(job)
            except ValueError as error:
                if len(jobs) == 1:
                    raise
                failures.append(f"{job.name}: {error}")
                continue
            made.append(path)
            entries.append(manifest_entry(path, job))
            add_to_manifest(self.out / MANIFEST, entries)
        if failures:
            raise ValueError(f"not made: {'; '.join(failures)}")
        return made

    def make(self, job: Job) -> Path:
        """The video of a job, kept if it is there and was made in the same way."""
        record = self.describe(job)
        path = self.out / f"{job.name}{'.png' if self.num_frames(job) == 1 else '.mp4'}"
        file = path.with_suffix(".json")
        if path.is_file() and same_making(file, record):
            logger.info("%s is there, made in the same way: kept", path)
            return path
        start = time.monotonic()
        frames = self.frames(job)
        file.unlink(missing_ok=True)  # of a former video: interrupted here, it would vouch for this one
        self.write(path, frames)
        self.write_sheet(path.with_suffix(".sheet.jpg"), job, frames)
        record |= {
            "seconds": round(time.monotonic() - start, 2),
            "device": describe_device(self.pipeline._execution_device),
        }
        write_json(file, record, sort_keys=False)
        logger.info("%s", path)
        return path

    def num_frames(self, job: Job) -> int:
        return job.num_frames or self.pipeline.transformer.config.sample_frames

    def frames(self, job: Job) -> NDArray[np.uint8]:
        """(F, H, W, 3)."""
        options = {"generator": torch.Generator().manual_seed(job.seed), "reference_images": list(job.photos) or None}
        options |= {"output_type": "np", "callback_on_step_end": self.callback_on_step_end}
        [frames] = self.pipeline(**job.call(), **options).frames
        return (frames * 255).round().astype(np.uint8)

    def write(self, path: Path, frames: NDArray[np.uint8]) -> None:
        if path.suffix == ".png":
            write_png(path, frames[0])
        else:
            write_mp4(path, frames, self.fps)
        if self.signing is not None:
            sign_file(path, self.signing, path.name)

    def write_sheet(self, path: Path, job: Job, frames: NDArray[np.uint8]) -> None:
        """The first photo and some frames."""
        shown = sample_frames(len(frames), FRAMES_SHOWN)
        reference = square(load_photo(job.photos[0])) if job.photos else np.full((64, 64, 3), 255, np.uint8)
        sheet = contact_sheet([SheetRow(job.prompt, reference, (frames,))], ["generated"], shown, SHEET_HEIGHT)
        write_jpeg(path, sheet)

    def describe(self, job: Job) -> dict[str, Any]:
        """All that the video follows from."""
        photos = [{"file": path, "sha256": sha256(Path(path))} for path in absolute(job.photos)]
        settings = asdict(job) | {"photos": photos}
        if not job.face_enhanced:
            del settings["face_enhanced"]  # so that records without it still say the same
        record = {"job": settings, "fps": self.fps, "scheduler": type(self.pipeline.scheduler).__name__}
        # Written only where they differ from the default, so that records without them still say the same.
        record |= {"tiling": True} if self.pipeline.vae.use_tiling else {}
        record |= {"signed": False} if self.signing is None else {}
        return record | {"generated": DISCLOSURE, **self.made_with}


# Files ----------------------------------------------------------------------------------------------------------------


def write_png(path: Path, picture: NDArray[np.uint8]) -> None:
    info, partial = PngInfo(), temporary_path(path)
    info.add_text("Comment", DISCLOSURE)
    partial.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(partial, "PNG", pnginfo=info)
    partial.replace(path)


def manifest_entry(video: Path, job: Job) -> dict[str, Any]:
    """As `mm_lightning.evaluate` reads it."""
    entry = {"video": video.name, "prompt": job.prompt, "references": absolute(job.photos)}
    told = {name: value for name in ("identity", "group", "face_enhanced") if (value := getattr(job, name))}
    return entry | told


def add_to_manifest(file: Path, entries: list[dict[str, Any]]) -> None:
    """Also where other processes add theirs at the same time."""
    with FileLock(file.with_name(f".{file.name}.lock")):
        write_json(file, merge_entries(file, entries), sort_keys=False)


def merge_entries(file: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the manifest holds already, with these in place of entries of the same video."""
    stored, fresh = read_stored(file), {entry["video"] for entry in entries}
    return [entry for entry in stored if entry["video"] not in fresh] + entries


def read_stored(file: Path) -> list[dict[str, Any]]:
    """A manifest's entries, none where there is no file.

    Raises:
        ValueError: it is another file.
    """
    if not file.is_file():
        return []
    try:
        stored = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}): move it away, or give another --out.") from error
    if not isinstance(stored, list) or not all(isinstance(entry, dict) and "video" in entry for entry in stored):
        raise ValueError(f"{file} is no list of videos: move it away, or give another --out.")
    return stored


def same_making(file: Path, record: dict[str, Any]) -> bool:
    """Whether the record that lies there, if one can be read, says the same."""
    stored = read_record(file)
    if stored is None:
        return False
    told = json.loads(json.dumps(record))
    return all(stored.get(name) == told.get(name) for name in (*told, *OPTIONAL))


def square(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The middle."""
    side = min(picture.shape[:2])
    top, left = ((length - side) // 2 for length in picture.shape[:2])
    return picture[top : top + side, left : left + side]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def absolute(photos: Sequence[str]) -> list[str]:
    return [Path(photo).absolute().as_posix() for photo in photos]


def describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


# The command ----------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m mm_lightning.generate", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    default = Job("", ())
    add("--photos", nargs="+", default=[], help="of one person")
    add("--prompt", action="append", default=[], help="may be given several times: one video each")
    add("--jobs", type=Path, help="CSV or JSON, fields as these options; they are defaults for it")
    add("--part", help="such as 0/4: only every fourth job, from the first; for several GPUs or machines")
    add("--out", type=Path, default=Path("outputs/generated"))
    add("--name", default="", help="of the files; made from the prompt by default")
    add("--num-videos", type=int, default=1, help="of each prompt, with seeds that count up")
    for name in ("seed", "num_inference_steps"):
        add(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    for name in ("num_frames", "height", "width"):
        add(f"--{name.replace('_', '-')}", type=int, help="the base model's by default")
    for name, miniature in MINIATURE_GUIDANCE._asdict().items():
        help_text = f"{getattr(default, name):g} by default, the miniature's is {miniature:g}"
        add(f"--{name.replace('_', '-')}", type=float, help=help_text)
    add("--face-scale", type=float, default=default.face_scale)
    add("--use-dynamic-cfg", action="store_true", help="diffusers' guidance that changes over the steps")
    add("--negative-prompt")
    add("--face-index", type=int, help="which face of a photo with several, from the left")
    add("--fps", type=float, help=f"{FPS:g} by default")
    add_weights(parser)
    add("--unsigned", action="store_true", help="without content credentials; the comment stays")
    add_signing(parser)
    return parser, parser.parse_args(arguments)


def add_weights(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", help="CogVideoX, a folder or hub id; by default the miniature that comes along")
    add("--adapter", help="a folder or hub id")
    add("--vision", help="CLIP's folder or PhotoMaker-V2's file; image_encoder/ of the base by default")
    add("--recognizer", help="the adapter's own by default")
    add("--detector", default="auto", help="auto, dlib, or an insightface pack")
    add_running(parser)


def add_running(parser: argparse.ArgumentParser) -> None:
    """What `run_as` reads."""
    add = parser.add_argument
    add("--device", default="auto", help="such as cuda:1; by default a GPU where there is one")
    add("--dtype", default="auto", choices=DTYPES)
    add("--offload", default="none", choices=list(OFFLOADS))
    add("--tiling", action="store_true", help="the VAE decodes in tiles: less memory")
    add("--scheduler", choices=list(SCHEDULERS), help="the base model's by default")


def add_signing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--signing-key", type=Path, help="PEM; by default one is made for this machine, which nobody trusts")
    add("--signing-certificates", type=Path, help="PEM chain of the key")


def collect_jobs(options: argparse.Namespace) -> list[Job]:
    """Named jobs from the options, checked; raises what `read_jobs`, `name_jobs`, `part_of`, `check_jobs` raise."""
    if options.num_videos < 1:
        raise ValueError(f"--num-videos={options.num_videos}: give a number from 1.")
    names = {field.name for field in fields(Job)} - {"prompt", "photos", "identity", "group", "face_enhanced"}
    common = {name: getattr(options, name) for name in names}
    common |= {name: v for name, v in default_guidance(options.base)._asdict().items() if common[name] is None}
    default = Job(prompt="", photos=tuple(options.photos), **common)
    if options.jobs is not None:
        jobs = read_jobs(options.jobs, default)
    elif options.prompt:
        jobs = [replace(default, prompt=prompt) for prompt in options.prompt]
    else:
        raise ValueError("Nothing to make: give --prompt, or --jobs.")
    jobs = part_of(name_jobs(jobs, options.num_videos), options.part)
    check_jobs(jobs)
    return jobs


def follow_record(options: argparse.Namespace) -> None:
    """Of a job that a former run recorded, what was not asked for is as it was then.

    Raises:
        ValueError: the record has something else there than a run writes.
    """
    record = (read_record(options.jobs) if options.jobs is not None else None) or {}
    names = {scheduler.__name__: name for name, scheduler in SCHEDULERS.items()}
    told = {"fps": record.get("fps", FPS), "dtype": record.get("dtype", "auto")}
    if not isinstance(told["fps"], int | float) or told["dtype"] not in DTYPES:
        raise ValueError(f"{options.jobs}: fps={told['fps']!r}, dtype={told['dtype']!r} was written by no run.")
    options.fps = told["fps"] if options.fps is None else options.fps
    options.dtype = told["dtype"] if options.dtype == "auto" else options.dtype
    options.scheduler = options.scheduler or names.get(record.get("scheduler"))
    options.tiling = options.tiling or record.get("tiling") is True
    options.unsigned = options.unsigned or record.get("signed") is False


def default_guidance(base: str | None) -> Guidance:
    """`base` None is the miniature."""
    return MINIATURE_GUIDANCE if base is None else BASE_GUIDANCE


def named_weights(options: argparse.Namespace) -> tuple[str | Path, str | Path | None]:
    """Base and adapter."""
    if options.base is None:
        return MINIATURE / "model", options.adapter or MINIATURE / "adapter"
    return options.base, options.adapter


def check_output(out: Path, fps: float) -> None:
    """Whether videos can be written.

    Raises:
        ValueError: no folder that can be written to, a manifest in it that is none, or frames per second out of range.
    """
    if not SLOWEST <= fps <= FASTEST:
        raise ValueError(f"--fps={fps}: give a number from {SLOWEST:g} to {FASTEST:g}.")
    read_stored(out / MANIFEST)
    check_writable(out)


def check_fit(jobs: Sequence[Job], base: str | Path) -> None:
    """Before weights are read; raises what `check_base`, `check_shapes` and `check_prompts` raise."""
    backbone = Backbone.from_pretrained(base, components=())
    check_shapes(jobs, backbone)
    check_prompts(jobs, IdentityTokenizer(backbone.tokenizer, backbone.transformer_config.max_text_seq_length))


def load_pipeline(options: argparse.Namespace) -> MagicMirrorPipeline:
    """The weights named, or the miniature's; raises what `find_device` and `MagicMirrorPipeline.from_pretrained` do."""
    base, adapter = named_weights(options)
    pipeline = MagicMirrorPipeline.from_pretrained(
        base, adapter, dtype_of(options), options.vision, options.recognizer, options.detector
    )
    return run_as(pipeline, options)


def dtype_of(options: argparse.Namespace) -> torch.dtype:
    """Raises what `find_device` raises."""
    automatic = "float32" if find_device(options.device).type == "cpu" else "bfloat16"
    return getattr(torch, automatic if options.dtype == "auto" else options.dtype)


def run_as(pipeline: DiffusionPipeline, options: argparse.Namespace) -> DiffusionPipeline:
    """The pipeline with scheduler, memory and device as the options of `add_running` say."""
    if options.scheduler:
        pipeline.scheduler = SCHEDULERS[options.scheduler].from_config(pipeline.scheduler.config)
    if options.tiling:
        enable_tiling(pipeline.vae)
    device = find_device(options.device)
    if OFFLOADS[options.offload] is None:
        return pipeline.to(device)
    getattr(pipeline, OFFLOADS[options.offload])(device=device)
    return pipeline


def enable_tiling(vae: AutoencoderKLCogVideoX) -> None:
    """Tiles that overlap by whole latents, no less than by default; diffusers' share of a small tile does not fit."""
    overlaps = {}
    for side in ("height", "width"):
        size, name = getattr(vae, f"tile_latent_min_{side}"), f"tile_overlap_factor_{side}"
        overlaps[name] = math.ceil(getattr(vae, name) * size - 1e-6) / size
    vae.enable_tiling(**overlaps)


def describe_weights(pipeline: MagicMirrorPipeline, options: argparse.Namespace) -> dict[str, Any]:
    """For the record: a video is made anew where any of them was trained again."""
    base = check_base(named_weights(options)[0], components=())  # a hub id is looked up once
    vision = find_vision(base, options.vision, pipeline.record)
    parts = {name: describe_component(base, name) for name in COMPONENTS} | {"image_encoder": describe_vision(vision)}
    adapter = Path(pipeline.adapter_folder) / "adapter.safetensors"
    return {
        "base": pipeline.record["base"],
        "weights": {name: part.get("weights") for name, part in parts.items()},
        "adapter": {"sha256": sha256(adapter)},
        "detector": pipeline.detector.info["name"],
        "recognizer": pipeline.face_encoder.recognizer.name,
        "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),  # face networks stay in float32
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}


def verify(files: Sequence[str]) -> int:
    """Prints what each file says of its making; how many cannot be read, or were changed.

    Raises:
        ValueError: no file.
    """
    if not files:
        raise ValueError("verify: give the files to look at.")
    num_bad = 0
    for file in files:
        try:
            mark = read_mark(file)
        except (FileNotFoundError, ValueError) as error:
            print(f"{file}\n  error: {error}")
            num_bad += 1
            continue
        print("\n".join([file, *tell(mark)]))
        num_bad += mark.signed and not mark.intact
    return num_bad


def tell(mark: Mark) -> Iterator[str]:
    """In lines."""
    yield f"  comment: {mark.comment or 'none'}"
    if not mark.signed:
        yield "  content credentials: none"
    else:
        made = "made by a trained model" if mark.generated else "says nothing of a model"
        state = "unchanged since" if mark.intact else f"CHANGED SINCE, or not valid ({', '.join(mark.problems)})"
        trust = "on a trust list" if mark.trusted else "not on a trust list, so anybody may have signed"
        yield f"  content credentials: {made}; {state}\n  signed by: {mark.signer} ({trust})"


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["verify"]:
            if verify(arguments[1:]):
                raise SystemExit(1)
            return
        _, options = parse(arguments)
        jobs = collect_jobs(options)
        follow_record(options)
        if not jobs:
            logger.info("Part %s has no jobs.", options.part)
            return
        check_output(options.out, options.fps)
        signing = None if options.unsigned else read_signing(options.signing_key, options.signing_certificates)
        check_fit(jobs, named_weights(options)[0])
        pipeline = load_pipeline(options)
        Generator(pipeline, options.out, describe_weights(pipeline, options), signing, options.fps).run(jobs)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
