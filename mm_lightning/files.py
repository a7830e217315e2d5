"""Small files written whole or not at all; large ones told apart."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROBES, PROBE_BYTES = 16, 65536  # of a weight file


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


def fingerprint(files: Sequence[Path]) -> dict[str, str]:
    """{"weights": digest} of the files' sizes and of blocks spread over them; {} where there is none.

    Retraining changes every tensor, so samples of the bytes tell; reading all of T5 would take a minute.
    """
    if not files:
        return {}
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size}".encode())
        with file.open("rb") as stream:
            for i in range(PROBES):
                stream.seek(i * max(0, size - PROBE_BYTES) // max(1, PROBES - 1))
                digest.update(stream.read(PROBE_BYTES))
    return {"weights": f"sha256:{digest.hexdigest()[:32]}"}
