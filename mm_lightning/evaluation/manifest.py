"""What is to be judged: videos, each with its prompt and photos of the person it should show.

A manifest is a JSON list or a CSV (photos separated by semicolons), as `mm_lightning.generate` writes it; paths count
from its folder.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
VIDEO_ENDINGS = (".mp4", ".webm", ".gif", ".mov", ".mkv", ".avi", ".png", ".jpg", ".jpeg")
EXAMPLE = '[{"video": "her.mp4", "prompt": "A woman smiles", "references": ["her.jpg"]}]'


class Entry(NamedTuple):
    """One video."""

    video: Path
    prompt: str
    references: tuple[Path, ...]
    identity: str  # whose photos these are; the first photo's path where nobody says
    group: str  # such as elderly woman; empty where nobody says
    face_enhanced: bool = False  # the prompt asks for the face: similarity is judged on these


def read_manifest(path: str | Path) -> list[Entry]:
    """The entries of a manifest, or of the one inside a folder.

    Raises:
        FileNotFoundError: it, a video or a photo is not there.
        ValueError: it is neither JSON nor CSV, empty, lacks a field, or names one video twice.
    """
    file = Path(path) / MANIFEST if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"No manifest at {file}: it says which photos and which prompt a video goes with, such as {EXAMPLE}."
        )
    rows = read_rows(file)
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file} holds no entries, such as {EXAMPLE}.")
    entries = [make_entry(row, file, i + 1) for i, row in enumerate(rows)]
    twice = sorted({entry.video.name for entry in entries if [e.video for e in entries].count(entry.video) > 1})
    if twice:
        raise ValueError(f"{file} names {', '.join(twice)} twice.")
    return entries


def read_rows(file: Path) -> Any:
    try:
        if file.suffix.lower() == ".csv":
            with file.open(newline="", encoding="utf-8-sig") as stream:
                return [split_references(row) for row in csv.DictReader(stream)]
        return json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} can be read neither as JSON nor as CSV: {error}") from error


def split_references(row: dict[str, Any]) -> dict[str, Any]:
    parts = [part.strip() for part in (row.get("references") or "").split(";")]
    return {name: value for name, value in row.items() if value} | {"references": [part for part in parts if part]}


def make_entry(row: Any, file: Path, number: int) -> Entry:
    where = f"{file}, entry {number}"
    if not isinstance(row, dict) or not {"video", "prompt", "references"} <= row.keys():
        raise ValueError(f"{where}: video, prompt and references are needed, such as {EXAMPLE}; it has {row!r}.")
    photos = listed(row["references"])
    if not all(isinstance(value, str) for value in (row["video"], row["prompt"], *photos)):
        raise ValueError(f"{where}: video, prompt and references are text, such as {EXAMPLE}; it has {row!r}.")
    video, references = file.parent / row["video"], tuple(file.parent / photo for photo in photos)
    if video.suffix.lower() not in VIDEO_ENDINGS:
        raise ValueError(f"{where}: {video.name} ends in none of {', '.join(VIDEO_ENDINGS)}.")
    if not references:
        raise ValueError(f"{where}: references is empty; give photos of the person.")
    missing = [path for path in (video, *references) if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{where}: no file at {missing[0]}.")
    identity = row.get("identity") or references[0].as_posix()
    enhanced = str(row.get("face_enhanced") or False).lower()
    if enhanced not in ("true", "false"):
        raise ValueError(f"{where}: face_enhanced is {row['face_enhanced']!r}, neither true nor false.")
    group = str(row.get("group") or "")
    return Entry(video, row["prompt"], references, str(identity), group, enhanced == "true")


def listed(references: Any) -> list[Any]:
    return references if isinstance(references, list) else [references]
