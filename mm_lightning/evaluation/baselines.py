"""The paper's baselines that diffusers ships, on the same jobs as ours, for `mm_lightning.evaluate`.

    python -m mm_lightning.evaluation.baselines cogvideox --base weights/CogVideoX-5b --jobs jobs.json --out FOLDER
    python -m mm_lightning.evaluation.baselines cogvideox_i2v --base weights/CogVideoX-5b-I2V ...
    python -m mm_lightning.evaluation.baselines consisid --base weights/ConsisID-preview ...

`cogvideox` knows nobody: it is what a face costs nothing. `cogvideox_i2v` starts from the first photo, cut to the
video's shape. `consisid` needs its own face models in the base's folder, and the packages that diffusers names.
Files, records and manifests are those of `mm_lightning.generate`, and so are `--part`, `--offload` and `--tiling`.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline, ConsisIDPipeline, DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mm_lightning.backbone import Backbone, check_frames, fetch, local_folder, read_json
from mm_lightning.credentials import Signing, read_signing
from mm_lightning.devices import find_device
from mm_lightning.encoders.photos import load_photo
from mm_lightning.generate import Generator, add_running, check_output, dtype_of, package_versions, run_as
from mm_lightning.jobs import Job, check_jobs, check_shapes, name_jobs, part_of, read_jobs
from mm_lightning.provenance import fingerprint

logger = logging.getLogger(__name__)

METHODS: dict[str, type[DiffusionPipeline]] = {
    "cogvideox": CogVideoXPipeline,
    "cogvideox_i2v": CogVideoXImageToVideoPipeline,
    "consisid": ConsisIDPipeline,
}
NOT_TAKEN = ("face_scale", "identity_guidance_scale", "face_index", "prompt")
TRIGGER = re.compile(r"\s+img\b(?!-)", re.IGNORECASE)

Condition = Callable[[Job, int, int], dict[str, Any]]


class Baseline(Generator):
    """Makes the files of jobs by one of diffusers' own pipelines.

    Args:
        pipeline: loaded, on its device.
        out: folder of the files.
        made_with: what the weights are, for the record.
        condition: job, height, width -> what the pipeline is told about the person.
        signing: None leaves the files unsigned.
        fps: of the videos.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        out: Path,
        made_with: dict[str, Any],
        condition: Condition,
        signing: Signing | None = None,
        fps: float = 8.0,
    ) -> None:
        super().__init__(pipeline, out, made_with, signing, fps)
        self.condition = condition

    def frames(self, job: Job) -> NDArray[np.uint8]:
        """(F, H, W, 3); as many frames as asked for, where diffusers' decoding gives three more."""
        config, ratio = self.pipeline.transformer.config, self.pipeline.vae_scale_factor_spatial
        num_frames = self.num_frames(job)
        check_frames(num_frames, self.pipeline.vae_scale_factor_temporal)
        height, width = job.height or config.sample_height * ratio, job.width or config.sample_width * ratio
        options = {name: value for name, value in job.call().items() if name not in NOT_TAKEN}
        options |= {"num_frames": num_frames, "height": height, "width": width}
        options |= {"max_sequence_length": config.max_text_seq_length, "output_type": "np"}
        options |= {"generator": torch.Generator().manual_seed(job.seed), **self.condition(job, height, width)}
        [frames] = self.pipeline(prompt=TRIGGER.sub("", job.prompt), **options).frames
        return (np.asarray(frames)[-num_frames:] * 255).round().astype(np.uint8)


def nobody(job: Job, height: int, width: int) -> dict[str, Any]:
    """Text alone."""
    return {}


def first_frame(job: Job, height: int, width: int) -> dict[str, Any]:
    """The first photo, its middle cut to the video's shape."""
    photo = Image.fromarray(load_photo(job.photos[0]))
    return {"image": ImageOps.fit(photo, (width, height), Image.Resampling.BICUBIC)}


def consisid_condition(folder: Path, device: str, dtype: torch.dtype) -> Condition:
    """What ConsisID's own helpers make of the first photo: its picture, face features, key points.

    Raises:
        ValueError: packages are missing, which diffusers names.
    """
    try:
        from diffusers.pipelines.consisid.consisid_utils import prepare_face_models, process_face_embeddings_infer
    except ImportError as error:
        raise ValueError(f"consisid: {error}") from error
    models = prepare_face_models(str(folder), device=device, dtype=dtype)

    def condition(job: Job, height: int, width: int) -> dict[str, Any]:
        helper, clip, handler, mean, std, main_model = models
        id_cond, id_vit_hidden, image, key_points = process_face_embeddings_infer(
            helper, clip, handler, mean, std, main_model, device, dtype, job.photos[0], is_align_face=True
        )
        return {"image": image, "id_vit_hidden": id_vit_hidden, "id_cond": id_cond, "kps_cond": key_points}

    return condition


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m mm_lightning.evaluation.baselines", description=__doc__, formatter_class=raw
    )
    add, default = parser.add_argument, Job("", ())
    add("method", choices=list(METHODS))
    add("--base", required=True, help="the model, diffusers' layout, a folder or hub id")
    add("--jobs", type=Path, required=True, help="as of mm_lightning.generate")
    add("--out", type=Path, required=True)
    for option in ("--num-frames", "--height", "--width"):
        add(option, type=int)
    add("--num-inference-steps", type=int, default=default.num_inference_steps)
    add("--guidance-scale", type=float, default=default.guidance_scale)
    add("--part", help="such as 0/4: only every fourth job, from the first; for several GPUs or machines")
    add_running(parser)
    add("--fps", type=float, default=8.0)
    add("--unsigned", action="store_true")
    return parser.parse_args(arguments)


def find_folder(method: str, base: str) -> Path:
    """The model's folder, all of it fetched where a hub id is given: ConsisID's face models lie beside the pipeline.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is another pipeline's.
    """
    folder = local_folder(base) or fetch(base, ("*",))
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"{folder} is no model in diffusers' layout: it has no model_index.json.")
    found, wanted = read_json(index).get("_class_name"), METHODS[method].__name__
    if found != wanted:
        raise ValueError(f"{folder} is a {found}, {method} is a {wanted}: give --base the weights of that.")
    return folder


def make_jobs(options: argparse.Namespace) -> list[Job]:
    """
    Raises:
        FileNotFoundError, ValueError: as `read_jobs`, `name_jobs`, `part_of` and `check_jobs`; no photo to start from.
    """
    names = ("num_frames", "height", "width", "num_inference_steps", "guidance_scale")
    default = Job("", (), **{name: getattr(options, name) for name in names})
    jobs = part_of(name_jobs(read_jobs(options.jobs, default), 1), options.part)
    check_jobs(jobs)
    without = [job.name for job in jobs if not job.photos]
    if without and options.method != "cogvideox":
        raise ValueError(f"{options.method} starts from a photo, and these jobs have none: {', '.join(without)}.")
    return jobs


def run(options: argparse.Namespace) -> list[Path]:
    """The videos' paths.

    Raises:
        FileNotFoundError, ValueError: as `make_jobs`, `check_output`, `find_folder`, `check_shapes` and `run_as`; a
            part of the base is not there.
    """
    jobs = make_jobs(options)
    if not jobs:
        logger.info("Part %s has no jobs.", options.part)
        return []
    check_output(options.out, options.fps)
    folder, dtype, device = find_folder(options.method, options.base), dtype_of(options), find_device(options.device)
    configs = (read_json(folder / part / "config.json") for part in ("transformer", "vae"))
    check_shapes(jobs, Backbone(folder.name, None, None, *configs))
    try:
        pipeline = METHODS[options.method].from_pretrained(folder, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"No {options.method} at {options.base}: {error}") from error
    conditions = {"cogvideox": lambda: nobody, "cogvideox_i2v": lambda: first_frame}
    conditions["consisid"] = lambda: consisid_condition(folder, str(device), dtype)
    made_with = {"method": options.method, "base": str(options.base), "dtype": str(dtype).removeprefix("torch.")}
    made_with |= fingerprint(sorted(folder.rglob("*.safetensors"))) | {"versions": package_versions()}
    signing = None if options.unsigned else read_signing()
    condition = conditions[options.method]()
    return Baseline(run_as(pipeline, options), options.out, made_with, condition, signing, options.fps).run(jobs)


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run(parse(sys.argv[1:] if arguments is None else arguments))
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
