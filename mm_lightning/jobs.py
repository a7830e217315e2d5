"""Jobs of `mm_lightning.generate`: one video each, read from a CSV or JSON, named, shared out, and checked."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mm_lightning.backbone import Backbone
from mm_lightning.encoders.photos import load_photo
from mm_lightning.encoders.text import IdentityTokenizer

NOT_ARGUMENTS = ("photos", "name", "seed", "identity", "group", "face_enhanced")
NAME = re.compile(r"[\w][\w.-]{0,99}")


@dataclass(frozen=True)
class Job:
    """One video. What is None is the base model's own."""

    prompt: str
    photos: tuple[str, ...]
    name: str = ""
    seed: int = 0
    negative_prompt: str | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    use_dynamic_cfg: bool = False
    face_scale: float = 1.0
    identity_guidance_scale: float = 1.0
    face_index: int | None = None
    identity: str | None = None  # for evaluation: whose photos these are, and of which group
    group: str | None = None
    face_enhanced: bool = False  # the prompt asks for the face

    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline, but for the person."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NOT_ARGUMENTS}


def whole(value: Any) -> int:
    """Raises ValueError for 1.5."""
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def finite(value: Any) -> float:
    """Raises ValueError for NaN and infinities."""
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError(f"{value!r} is no number")
    return float(value)


def text(value: Any) -> str:
    """Raises ValueError for what JSON does not quote."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def truth(value: Any) -> bool:
    """Raises ValueError unless it says true or false."""
    if str(value).lower() not in ("true", "false"):
        raise ValueError(f"{value!r} is neither true nor false")
    return str(value).lower() == "true"


def photo_files(value: Any) -> tuple[str, ...]:
    """Paths separated by semicolons, a list of them, or as the record of a video has them; raises ValueError."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(";") if part.strip())
    files = [photo.get("file") if isinstance(photo, dict) else photo for photo in value or ()]
    if not all(isinstance(file, str) for file in files):
        raise ValueError(f"photos are paths, not {value!r}")
    return tuple(files)


READERS = {"int": whole, "float": finite, "str": text, "bool": truth, "tuple[str, ...]": photo_files}


def read_jobs(file: Path, default: Job) -> list[Job]:
    """Jobs of a CSV with a head line (photos separated by semicolons), of a JSON list of objects, or of what a former
    run left beside a video; paths count from the file's folder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is neither, or an entry has an unknown or a missing field.
    """
    if not file.is_file():
        raise FileNotFoundError(f"No file of jobs at {file}.")
    try:
        rows = read_rows(file)
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} can be read neither as JSON nor as CSV: {error}") from error
    if not rows:
        raise ValueError(f"{file} holds no jobs.")
    return [make_job(row, default, f"{file}, entry {i + 1}", file.parent) for i, row in enumerate(rows)]


def read_record(file: Path) -> dict[str, Any] | None:
    """What a former run left beside a video; None of another file."""
    try:
        read = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return read if isinstance(read, dict) and isinstance(read.get("job"), dict) else None


def read_rows(file: Path) -> list[dict[str, Any]]:
    if file.suffix.lower() == ".csv":
        with file.open(newline="", encoding="utf-8-sig") as stream:
            return [filled(row) for row in csv.DictReader(stream)]
    read = json.loads(file.read_text())
    if isinstance(read, dict):
        read = [read.get("job", read)]
    return read if isinstance(read, list) else []


def filled(row: dict[str | None, Any]) -> dict[str, str]:
    """Without empty fields.

    Raises:
        csv.Error: more fields than the head line has.
    """
    if None in row:
        raise csv.Error(f"{row[None]} stands beyond the fields of the head line; put text with commas into quotes")
    return {name: value for name, value in row.items() if value}


def make_job(row: Any, default: Job, where: str, folder: Path) -> Job:
    kinds = {field.name: str(field.type).split(" | ")[0] for field in fields(Job)}
    if not isinstance(row, dict) or not row.keys() <= kinds.keys():
        unknown = ", ".join(sorted(row.keys() - kinds.keys(), key=str)) if isinstance(row, dict) else repr(row)
        raise ValueError(f"{where}: unknown {unknown}; a job has {', '.join(kinds)}.")
    values = {}
    for name, value in row.items():
        try:
            values |= {} if value is None else {name: READERS[kinds[name]](value)}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {name}={value!r}: {error}.") from error
    if "photos" in values:
        values["photos"] = tuple(str(folder / photo) for photo in values["photos"])
    return replace(default, **values)


def name_jobs(jobs: Sequence[Job], num_videos: int) -> list[Job]:
    """Each with a name of its own, and `num_videos` of each, with seeds that count up.

    Raises:
        ValueError: a name that is no file name, or two the same.
    """
    named = []
    for i, job in enumerate(jobs):
        stem = job.name or f"{i:03d}-{default_name(job)}"
        for j in range(num_videos):
            name = stem if num_videos == 1 else f"{stem}-{job.seed + j}"
            named.append(replace(job, name=name, seed=job.seed + j))
    for job in named:
        if not NAME.fullmatch(job.name):
            raise ValueError(f"name={job.name!r} is no file name: letters, digits, dots, dashes, underscores.")
    if len({job.name for job in named}) < len(named):
        raise ValueError("Two jobs have the same name; leave names out, or give each its own.")
    return named


def default_name(job: Job) -> str:
    """The prompt's first words and a digest of prompt and photos: of other ones, another name."""
    digest = hashlib.sha256(json.dumps([job.prompt, [os.path.abspath(photo) for photo in job.photos]]).encode())
    return "-".join([*first_words(job.prompt), digest.hexdigest()[:6]])


def first_words(prompt: str, count: int = 6) -> list[str]:
    return re.findall("[a-z0-9]+", prompt.lower())[:count]


def part_of(jobs: Sequence[Job], part: str | None) -> list[Job]:
    """Every n-th job from the i-th, of `part` i/n; all for None.

    Raises:
        ValueError: `part` is none.
    """
    if part is None:
        return list(jobs)
    numbers = re.fullmatch(r"(\d+)/(\d+)", part)
    if numbers is None or not int(numbers[1]) < int(numbers[2]):
        raise ValueError(f"--part={part}: give which part, from 0, and how many there are, such as 0/4.")
    return list(jobs)[int(numbers[1]) :: int(numbers[2])]


def check_jobs(jobs: Sequence[Job]) -> None:
    """Before anything is loaded.

    Raises:
        FileNotFoundError: a photo is not there.
        ValueError: a job without prompt or photo, a number out of range, or a photo that is no picture.
    """
    for job in jobs:
        check_numbers(job)
        if not job.prompt.strip():
            raise ValueError(f"{job.name}: the prompt is empty; give --prompt.")
        if not job.photos and job.face_scale:
            raise ValueError(
                f"{job.name}: no photo; give --photos, or --face-scale 0 for a video of nobody in particular."
            )
        for photo in job.photos:
            load_photo(photo)


def check_numbers(job: Job) -> None:
    """
    Raises:
        ValueError: one that no base model takes.
    """
    positive = ("num_inference_steps", "num_frames", "height", "width")
    lowest = dict.fromkeys(positive, 1) | {"seed": 0, "face_index": 0, "face_scale": 0, "guidance_scale": 0}
    for name, low in lowest.items():
        value = getattr(job, name)
        if value is not None and not low <= value < 2**63:  # NaN neither
            raise ValueError(f"{job.name}: {name}={value}: give a number from {low}.")
    if not math.isfinite(job.identity_guidance_scale):
        raise ValueError(f"{job.name}: identity_guidance_scale={job.identity_guidance_scale}: give a number.")


def check_shapes(jobs: Sequence[Job], backbone: Backbone) -> None:
    """By its configs alone: its weights need not be loaded.

    Raises:
        ValueError: frames or a size that the base does not take.
    """
    for job in jobs:
        with named(job):
            backbone.check_clip(job.num_frames, job.height, job.width)


def check_prompts(jobs: Sequence[Job], tokenizer: IdentityTokenizer) -> None:
    """
    Raises:
        ValueError: a prompt in which nobody stands, though photos of somebody were given.
    """
    for job in jobs:
        if job.face_scale:
            with named(job):
                tokenizer.tokenize(job.prompt)


@contextmanager
def named(job: Job) -> Iterator[None]:
    """ValueErrors say which job they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{job.name}: {error}") from error
