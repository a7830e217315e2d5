"""The people of the miniature: rendered, captioned and written as shards, in splits that share nobody.

    python -m mm_lightning.miniature.world render  --out data/miniature/people  # renders, with the extra [miniature]
    python -m mm_lightning.miniature.world queries --people data/miniature/people  # dlib's embedding of every still
    python -m mm_lightning.miniature.world statistics --people data/miniature/people  # their mean and spread
    python -m mm_lightning.miniature.world pack    --people data/miniature/people  # shards -> what the package ships
    python -m mm_lightning.miniature.world unpack  --out data/miniature/people     # what the package ships -> shards

The same settings give the same bytes, whatever the number of workers; a run that was cut goes on where it was. Where
things lie: `mm_lightning.miniature.layout`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import multiprocessing
import os
import shutil
import tarfile
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from mm_lightning.encoders.recognizer import DLIB_STATISTICS
from mm_lightning.files import write_bytes, write_json
from mm_lightning.miniature.filming import person_samples
from mm_lightning.miniature.layout import KINDS, SETTINGS_NAME, WorldSettings, read_tar
from mm_lightning.miniature.packing import ASSETS, pack, require_people, unpack
from mm_lightning.miniature.people import sample_person
from mm_lightning.miniature.queries import embed_people, write_statistics
from mm_lightning.prepare.shards import ShardWriter

if TYPE_CHECKING:
    from mm_lightning.miniature.render import Renderer

__all__ = ["main", "pack", "render", "require_people", "unpack"]

logger = logging.getLogger(__name__)

PEOPLE = Path("data/miniature/people")
SOURCES = ("anatomy", "captions", "figure", "filming", "hair", "motion", "people", "render", "skin", "stage")
PART_SETTINGS = (
    "stills",
    "clips",
    "size",
    "num_frames",
    "fps",
    "references",
    "seed",
)  # what a person's files follow from


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse(arguments)
    try:
        run(options)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def run(options: argparse.Namespace) -> None:
    if options.command == "render":
        settings = WorldSettings(**{field.name: getattr(options, field.name) for field in fields(WorldSettings)})
        render(options.out, settings, options.workers)
    elif options.command == "queries":
        embed_people(options.people)
    elif options.command == "statistics":
        write_statistics(options.people, options.out)
    elif options.command == "pack":
        pack(options.people, options.out)
    else:
        unpack(options.out, options.assets)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mm_lightning.miniature.world", description="Renders, packs and unpacks the miniature's people."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    rendering = commands.add_parser("render", help="render people into shards")
    rendering.add_argument("--out", type=Path, default=PEOPLE, help="folder of the shards")
    for field in fields(WorldSettings):
        rendering.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    rendering.add_argument("--workers", type=int, default=2, help="processes")
    queries = commands.add_parser("queries", help="embed every still with dlib's face recogniser")
    queries.add_argument("--people", type=Path, default=PEOPLE, help="folder of the shards")
    statistics = commands.add_parser("statistics", help="mean and spread of the train people's embeddings")
    statistics.add_argument("--people", type=Path, default=PEOPLE, help="folder of the shards, with queries")
    statistics.add_argument("--out", type=Path, default=DLIB_STATISTICS, help="file that `dlib_standardized` reads")
    packing = commands.add_parser("pack", help="compress the shards into the form that is committed")
    packing.add_argument("--people", type=Path, default=PEOPLE, help="folder of the shards")
    packing.add_argument("--out", type=Path, default=ASSETS, help="folder of the archives")
    unpacking = commands.add_parser("unpack", help="write the shards that the archives hold")
    unpacking.add_argument("--out", type=Path, default=PEOPLE, help="folder of the shards")
    unpacking.add_argument("--assets", type=Path, default=ASSETS, help="folder of the archives")
    return parser.parse_args(arguments)


# Rendering a whole set ------------------------------------------------------------------------------------------------


def render(out: Path, settings: WorldSettings, num_workers: int = 2) -> None:
    """Renders everybody, in `num_workers` processes (0: in this one), and writes the shards.

    Raises:
        ValueError: `out` holds people of other settings.
        ModuleNotFoundError: the extra [miniature] is not installed.
    """
    if num_workers < 0:
        raise ValueError(f"--workers {num_workers}: give the number of processes, or 0 for none beside this one.")
    record = {"settings": asdict(settings), "made_with": made_with()}
    if is_current(out, record):
        logger.info("%s: up to date, kept.", out)
        return
    parts = out / f".parts-{digest_of({name: getattr(settings, name) for name in PART_SETTINGS}, record['made_with'])}"
    parts.mkdir(parents=True, exist_ok=True)
    render_parts(parts, settings, num_workers)
    for split, indices in settings.splits.items():
        write_split(out / split, split, [part_file(parts, index) for index in indices], settings)
    write_json(out / SETTINGS_NAME, record)
    for leftover in out.glob(".parts-*"):
        shutil.rmtree(leftover)


def made_with() -> dict[str, str]:
    """What else than settings the pictures follow from.

    Raises:
        ModuleNotFoundError: the extra [miniature] is not installed.
    """
    folder = Path(__file__).parent
    sources = {name: (folder / f"{name}.py").read_text() for name in SOURCES}
    try:
        versions = {name: importlib.metadata.version(name) for name in ("anny", "vtk")}
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"Rendering needs the package {error.name}: pip install -e '.[miniature]'. The people that come with this "
            "package need no rendering: `python -m mm_lightning.miniature.world unpack`."
        ) from error
    return versions | {"sources": digest_of(sources)}


def digest_of(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def is_current(out: Path, record: dict[str, Any]) -> bool:
    """Whether the folder holds finished people of this very record.

    Raises:
        ValueError: it holds others.
    """
    file = out / SETTINGS_NAME
    if not file.is_file():
        return False
    found = json.loads(file.read_text())
    if found != record:
        flat = {**record["settings"], **record["made_with"]}, {**found["settings"], **found["made_with"]}
        changed = [
            f"{name} {flat[1].get(name)} (wanted: {flat[0][name]})"
            for name in flat[0]
            if flat[0][name] != flat[1].get(name)
        ]
        raise ValueError(f"{out} holds people of {', '.join(changed)}: name another folder, or remove this one first.")
    return True


def render_parts(parts: Path, settings: WorldSettings, num_workers: int) -> None:
    """One file for each person that has none yet."""
    everybody = [index for indices in settings.splits.values() for index in indices]
    missing = [index for index in everybody if not part_file(parts, index).is_file()]
    with tqdm(total=len(everybody), initial=len(everybody) - len(missing), desc="people", unit="person") as bar:
        if num_workers == 0:
            for index in missing:
                write_part(parts, index, settings)
                bar.update()
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(num_workers, context, initializer=start_worker) as pool:
            for future in as_completed([pool.submit(write_part, parts, index, settings) for index in missing]):
                future.result()
                bar.update()


def start_worker() -> None:
    """One thread each; and a worker ends with the process that started it, even if that was killed."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def part_file(parts: Path, index: int) -> Path:
    return parts / f"{index:05d}.tar"


def write_part(parts: Path, index: int, settings: WorldSettings) -> None:
    samples = person_samples(load_renderer(settings.size), sample_person(index, settings.seed), settings)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for sample in samples:
            for extension, data in sample.fields.items():
                member = tarfile.TarInfo(f"{sample.folder}/{sample.key}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    write_bytes(part_file(parts, index), buffer.getvalue())


@functools.cache
def load_renderer(size: int) -> Renderer:
    from mm_lightning.miniature.render import Renderer

    return Renderer(size)


def write_split(folder: Path, split: str, parts: list[Path], settings: WorldSettings) -> None:
    """The people's files -> shards."""
    per_person = {"images": settings.stills, "videos": settings.clips}
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(ShardWriter(folder / name, KINDS[name], settings.people_per_shard * count, split))
            for name, count in per_person.items()
            if count
        }
        for part in tqdm(parts, desc=f"{split} shards", unit="person"):
            for sample in read_tar(part.read_bytes()):
                name, _, key = sample.key.partition("/")
                writers[name].write(key, sample.fields)


if __name__ == "__main__":
    main()
