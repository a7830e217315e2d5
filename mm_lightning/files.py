"""Small files written whole or not at all."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any, sort_keys: bool = True) -> None:
    """Indented JSON, UTF-8."""
    write_text(path, json.dumps(value, indent=2, sort_keys=sort_keys, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes beside the target, then renames: a reader sees the old file or the whole new one. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def check_writable(folder: Path) -> None:
    """Whether a folder can be made and written to; makes nothing.

    Raises:
        ValueError: a file stands in its way, or there is no permission.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"Nothing can be written to {folder}: {there} is a file.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"Nothing can be written to {folder}: no permission in {there}.")


def temporary_path(path: Path) -> Path:
    """Beside `path`, and another one for each process that writes."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
