"""The whole miniature, from people to table: every command that it takes, in order.

    python -m mm_lightning.miniature.build --scale 0.1

Each stage runs the commands that a user would type, and leaves a receipt with what it was made from and how long it
took. A build that was cut goes on with the stage that was cut, and a training with its last checkpoint; what a change
of settings concerns is made anew, everything else is kept. `--commit` puts model, adapter and model card among the
package's assets; `--dry` runs everything on a few people, a step or two each.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import logging
import multiprocessing
import os
import platform
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mm_lightning.config import register_resolvers
from mm_lightning.files import write_json
from mm_lightning.miniature.layout import SETTINGS_NAME, SPLITS, WorldSettings, read_samples
from mm_lightning.miniature.packing import ASSETS as PEOPLE_ASSETS
from mm_lightning.miniature.packing import is_finished, read_settings, require_people
from mm_lightning.miniature.sampling import CONF
from mm_lightning.prepare.shards import ShardWriter

logger = logging.getLogger(__name__)

ROOT = CONF.parent
STAGES = ("people", "vae", "decoder", "clip", "backbone", "motion", "quality", "cache", "stage1", "stage2", "table")
# What a stage reads of what others make.
READS = {
    "people": (),
    "vae": ("people",),
    "decoder": ("vae",),
    "clip": ("people",),
    "backbone": ("decoder", "clip"),
    "motion": ("backbone",),
    "quality": ("motion",),
    "cache": ("motion",),
    "stage1": ("cache",),
    "stage2": ("stage1",),
    "table": ("stage2",),
}
# Packages beyond those that training takes, and what for.
NEEDS = {
    "decoder": {"face_recognition_models": "tells people apart"},
    "quality": {"dlib": "finds faces"},
    "cache": {"face_recognition_models": "its record"},
    "stage1": {"face_recognition_models": "the identity loss"},
    "stage2": {"face_recognition_models": "the identity loss"},
    "table": {"dlib": "finds faces", "face_recognition_models": "tells people apart"},
}
# Trainings that write a part of the model, here with every checkpoint: one that was cut after its last step is done.
EXPORTING = ("vae", "decoder", "clip", "backbone", "motion")
ADAPTERS = ("stage1", "stage2")
# A status that is no failure: the judgement ran, and some figure is below its bar.
JUDGED = {"quality": 1}
NUM_REFERENCES = 2  # kept in the cache: what an experiment's data.num_references shows
DRY_PEOPLE = {"train": 6, "validation": 2, "test": 3}
DRY_SCALE = 2e-4


@dataclass(frozen=True)
class Settings:
    """What is built, and where.

    Args:
        out: folder of the build: model, adapter, runs, receipts.
        people: folder of the people; they are unpacked or rendered there if it holds none.
        scale: of all trainings' lengths; 1 is the long recipe.
        device: cpu or cuda.
        dry: everything on the smallest scale.
        overrides: more of them, for every training.
    """

    out: Path
    people: Path
    scale: float = 1.0
    device: str = "cpu"
    dry: bool = False
    overrides: tuple[str, ...] = ()

    @property
    def model(self) -> Path:
        return self.out / "miniature_model"

    @property
    def adapter(self) -> Path:
        return self.run_dir("stage2") / "adapter"

    def run_dir(self, stage: str) -> Path:
        return self.out / f"miniature_{stage}" / "run"


class Stage(NamedTuple):
    """One stage's command, without the interpreter, and what it is made from."""

    name: str
    command: tuple[str, ...]
    made_from: str  # digest of settings and of the stages it reads


class MissingPackageError(ValueError):
    """A stage needs what is not installed."""


# What is run ----------------------------------------------------------------------------------------------------------


def plan(settings: Settings) -> list[Stage]:
    """All stages in order; the digest of each follows from its own settings and from those that it reads."""
    digests: dict[str, str] = {}
    stages = []
    for name in STAGES:
        command = commands(settings)[name]
        own = training_config(command) if command[0] == "train.py" else shlex.join(command)
        digests[name] = digest(name, own, *(digests[read] for read in READS[name]))
        stages.append(Stage(name, command, digests[name]))
    return stages


def commands(settings: Settings) -> dict[str, tuple[str, ...]]:
    """Stage -> the command, as typed after `python`."""
    people, model, out = (path.as_posix() for path in (settings.people, settings.model, settings.out))
    cached, first = f"{out}/cached", f"{settings.run_dir('stage1').as_posix()}/adapter"
    shards = (f"model.base={model}", f"paths.shards_dir={cached}/train")
    images, videos = (f"data.val_shards={cached}/validation/{kind}" for kind in ("images", "videos"))
    logged = ("--adapter", settings.adapter.as_posix(), "--log-dir", f"{out}/miniature_table/tensorboard")
    return {
        "people": ("-m", "mm_lightning.miniature.world", "queries", "--people", people),
        "vae": training(settings, "vae", f"data.people={people}"),
        "decoder": training(settings, "decoder", f"data.people={people}"),
        "clip": training(settings, "clip", f"data.people={people}"),
        "backbone": training(settings, "backbone", f"data.people={people}", f"data.cache={out}/latents"),
        "motion": training(settings, "motion", f"data.people={people}", f"data.cache={out}/latents"),
        "quality": judging(settings, "quality", "--num-clips"),
        "cache": (
            *("-m", "mm_lightning.miniature.cache", "--people", people, "--model", model, "--out", cached),
            f"--num-references={NUM_REFERENCES}",
        ),
        "stage1": training(settings, "stage1", *shards, images),
        "stage2": training(settings, "stage2", *shards, videos, f"model.init_adapter={first}"),
        "table": judging(settings, "table", "--num-people", *logged),
    }


def judging(settings: Settings, stage: str, size: str, *more: str) -> tuple[str, ...]:
    """The command `mm_lightning.miniature.STAGE`, on the test people."""
    people, model, out = (path.as_posix() for path in (settings.people, settings.model, settings.out))
    few = (f"{size}={DRY_PEOPLE['test']}", "--steps=2", "--batch-size=2") if settings.dry else ()
    places = ("--people", people, "--model", model, "--out", f"{out}/{stage}", "--work", f"{out}/work")
    return ("-m", f"mm_lightning.miniature.{stage}", *places, "--device", settings.device, *more, *few)


def training(settings: Settings, stage: str, *overrides: str) -> tuple[str, ...]:
    """`train.py experiment=miniature_STAGE`, all of it inside the build's folder."""
    common = [f"experiment=miniature_{stage}", f"scale={settings.scale}", f"paths.output_dir={settings.out.as_posix()}"]
    common += [f"hydra.run.dir={settings.run_dir(stage).as_posix()}"]
    if settings.device == "cuda":
        common += ["trainer.accelerator=gpu", "trainer.precision=bf16-mixed"]
        common += ["data.num_workers=8"] if stage in ADAPTERS else []
    else:
        common += ["trainer.accelerator=cpu"]
    if stage in EXPORTING:
        common += ["callbacks.export.every_n_steps=${callbacks.checkpoint.every_n_train_steps}"]
    if settings.dry:
        common += dry_overrides(stage)
    return ("train.py", *common, *overrides, *settings.overrides)


def dry_overrides(stage: str) -> list[str]:
    """Batches that a few people can fill; two steps of everything."""
    shrunk = ["trainer.max_steps=2", "num_threads=1", "trainer.log_every_n_steps=1"]
    if stage in ADAPTERS:
        shrunk += ["global_batch_size=2", "data.num_val_samples=2", "data.num_workers=0", "model.preview_steps=2"]
        generated = {"every_n_steps": 0, "num_people": 1, "num_inference_steps": 2}
        return shrunk + [f"callbacks.generated.{name}={value}" for name, value in generated.items()]
    small = [*shrunk, "global_batch_size=8", "data.batch_size=8"]
    return small if stage == "clip" else [*small, "data.clip_batch_size=2"]


@functools.cache
def training_config(command: tuple[str, ...]) -> str:
    """What a training command composes, as YAML, without where this run lies."""
    register_resolvers()
    overrides = [override for override in command[1:] if not override.startswith("hydra.")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=[*overrides, "paths.run_dir=run"])
    OmegaConf.resolve(cfg)
    return OmegaConf.to_yaml(cfg, sort_keys=True)


def digest(*values: str) -> str:
    return hashlib.sha256("\n".join(values).encode()).hexdigest()[:16]


# Running it -----------------------------------------------------------------------------------------------------------


def build(settings: Settings, names: Sequence[str]) -> None:
    """Run the stages of these names that are not done.

    Raises:
        MissingPackageError: before anything runs, naming the stage and the package.
        ValueError: a stage reads what another one was to make and has not; a command fails.
    """
    stages = plan(settings)
    chosen = [stage for stage in stages if stage.name in names]
    check_packages([stage.name for stage in chosen if not is_done(settings, stage)])
    for stage in chosen:
        if is_done(settings, stage):
            logger.info("%-9s done, kept", stage.name)
        else:
            check_inputs(settings, stage, stages)
            run_stage(settings, stage)


def run_stage(settings: Settings, stage: Stage) -> None:
    """Run a stage, from its last checkpoint where it was cut, and leave a receipt.

    Raises:
        ValueError: its command fails.
    """
    seconds = seconds_so_far(settings, stage)
    if stage.name == "people":
        prepare_people(settings)
    command = [*stage.command, *resume_overrides(settings, stage)]
    logger.info("%-9s python %s", stage.name, shlex.join(command))
    write_receipt(settings, stage, seconds, done=False)
    start, code = time.monotonic(), None
    try:
        code = (run_dry if can_copy(settings) else run_python)(command)
    finally:
        seconds += time.monotonic() - start
        done = code in (0, JUDGED.get(stage.name, 0))
        write_receipt(settings, stage, seconds, done)
    if not done:
        raise ValueError(
            f"Stage {stage.name} ended with status {code}, after `python {shlex.join(command)}`. The same build "
            "command goes on from here."
        )
    logger.info("%-9s %.0f s", stage.name, seconds)


def run_python(command: Sequence[str]) -> int:
    """Status of `python COMMAND`."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode


def can_copy(settings: Settings) -> bool:
    """Whether stages may be copies of this process; elsewhere than on Linux that is not safe, nor is it with CUDA."""
    return settings.dry and settings.device == "cpu" and sys.platform == "linux"


def run_dry(command: Sequence[str]) -> int | None:
    """Status of `python COMMAND` in a copy of this process: its imports would take half of a dry build's time."""
    for name in ("diffusers", "lightning", "mm_lightning.module", "mm_lightning.pipeline"):
        importlib.import_module(name)
    process = multiprocessing.get_context("fork").Process(target=run_here, args=(command,))
    process.start()
    try:
        process.join()
    finally:
        process.terminate()
    return process.exitcode


def run_here(command: Sequence[str]) -> None:
    """What `python COMMAND` does; on one thread, as a dry build's arithmetic is too small to be shared."""
    torch.set_num_threads(1)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        runpy.run_path(command[0], run_name="__main__")


def seconds_so_far(settings: Settings, stage: Stage) -> float:
    """Of the same stage, cut; what was begun with other settings is removed."""
    started = read_receipt(settings, stage.name)
    if started is not None and started["made_from"] == stage.made_from:
        return started["seconds"]
    shutil.rmtree(settings.run_dir(stage.name), ignore_errors=True)
    return 0.0


def resume_overrides(settings: Settings, stage: Stage) -> list[str]:
    checkpoint = settings.run_dir(stage.name) / "checkpoints/last.ckpt"
    if stage.command[0] != "train.py" or not checkpoint.is_file():
        return []
    return [f"ckpt_path={checkpoint.as_posix()}"]


def check_packages(names: Sequence[str]) -> None:
    missing = [
        f"{name} needs {package} ({what})"
        for name in names
        for package, what in NEEDS.get(name, {}).items()
        if importlib.util.find_spec(package) is None
    ]
    if missing:
        raise MissingPackageError(
            f"Not installed: {'; '.join(missing)}. Install them, or leave these stages to another machine: "
            f"--stages {' '.join(name for name in names if name not in {text.split()[0] for text in missing})}."
        )


def check_inputs(settings: Settings, stage: Stage, stages: Sequence[Stage]) -> None:
    known = {other.name: other for other in stages}
    absent = [name for name in READS[stage.name] if not is_done(settings, known[name])]
    if absent:
        raise ValueError(
            f"Stage {stage.name} reads what {' and '.join(absent)} make, which is not done with these settings: "
            f"name them too, --stages {' '.join([*absent, stage.name])}."
        )


# Receipts -------------------------------------------------------------------------------------------------------------


def receipt_file(settings: Settings, name: str) -> Path:
    return settings.out / "receipts" / f"{name}.json"


def read_receipt(settings: Settings, name: str) -> dict[str, Any] | None:
    file = receipt_file(settings, name)
    return json.loads(file.read_text()) if file.is_file() else None


def write_receipt(settings: Settings, stage: Stage, seconds: float, done: bool) -> None:
    receipt = {"stage": stage.name, "command": ["python", *stage.command], "made_from": stage.made_from}
    receipt |= {"seconds": round(seconds, 1), "done": done, "hardware": describe_hardware(settings.device)}
    file = receipt_file(settings, stage.name)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, receipt)


def is_done(settings: Settings, stage: Stage) -> bool:
    receipt = read_receipt(settings, stage.name)
    return receipt is not None and receipt["done"] and receipt["made_from"] == stage.made_from


def describe_hardware(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    return f"{name}, {platform.machine()}, torch {torch.__version__}"


# People ---------------------------------------------------------------------------------------------------------------


def prepare_people(settings: Settings) -> None:
    """The people at `settings.people`: those that are there, else those of the package, else rendered ones.

    Raises:
        MissingPackageError: there are none, and what renders them is not installed.
    """
    if is_finished(settings.people):
        return
    if (PEOPLE_ASSETS / "manifest.json").is_file():
        require_people(settings.people)
        return
    missing = [name for name in ("anny", "pyvista") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"{settings.people} holds no people, the package comes without, and {' and '.join(missing)} to render some "
            "are not installed: pip install 'magicmirror-lightning[miniature]'."
        )
    counts = [f"--{split}={count}" for split, count in DRY_PEOPLE.items()] if settings.dry else []
    command = ["-m", "mm_lightning.miniature.world", "render", "--out", settings.people.as_posix(), *counts]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def take_few(source: Path, out: Path, counts: dict[str, int]) -> Path:
    """The first people of each split, as a set of their own."""
    if is_finished(out):
        return out
    for split in SPLITS:
        for kind in ("images", "videos"):
            kept: dict[str, None] = {}
            with ShardWriter(out / split / kind, kind.removesuffix("s"), prefix=split) as writer:
                for sample in read_samples(source / split / kind):
                    kept.setdefault(sample.meta["identity"])
                    if len(kept) > counts[split]:
                        break
                    writer.write(sample.key, sample.fields)
    record = read_settings(source)
    known = asdict(WorldSettings(**(record["settings"] | counts)))
    write_json(out / SETTINGS_NAME, record | {"settings": known})
    return out


# The command ----------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mm_lightning.miniature.build", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/miniature/build"), help="model, runs, receipts")
    parser.add_argument("--people", type=Path, default=Path("data/miniature/people"))
    parser.add_argument("--scale", type=float, default=1.0, help="of all trainings; two CPU cores take 0.1")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--dry", action="store_true", help="everything on a few people, two steps each")
    parser.add_argument("--commit", action="store_true", help="afterwards, put the result among the package's assets")
    parser.add_argument("overrides", nargs="*", help="more overrides for every training, after --")
    return parser.parse_args(arguments)


def make_settings(options: argparse.Namespace) -> Settings:
    """
    Raises:
        ValueError: a scale that cannot be, or CUDA where there is none.
    """
    if options.scale <= 0:
        raise ValueError(f"--scale={options.scale}: give a positive number; 1 is the long recipe.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device=cuda: torch sees no CUDA device here; --device=cpu takes the CPU.")
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    settings = Settings(options.out, options.people, options.scale, device, options.dry, tuple(options.overrides))
    if not options.dry:
        return settings
    few = options.out / "people"
    if is_finished(options.people) or (PEOPLE_ASSETS / "manifest.json").is_file():
        take_few(require_people(options.people), few, DRY_PEOPLE)
    return Settings(options.out, few, DRY_SCALE, device, True, tuple(options.overrides))


def end_with_children(signum: int, frame: FrameType | None) -> None:
    """A build that is told to end does not leave its training behind: `subprocess.run` ends it on any exception."""
    raise SystemExit(f"error: ended by signal {signum}; the same build command goes on from here.")


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, end_with_children)
    options = parse(arguments)
    try:
        settings = make_settings(options)
        build(settings, options.stages)
        if options.commit:
            from mm_lightning.miniature.card import commit

            commit(settings)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
