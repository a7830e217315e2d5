"""Writes WebDataset tars in the project's layout, with an index that is written last.

The same samples give the same bytes: no time, user or order of insertion is recorded.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from types import TracebackType

INDEX_NAME = "index.json"
KINDS = ("image", "video")


class ShardWriter:
    """Context manager: samples -> `{prefix}-000000.tar`, ... and `index.json`.

    A tar is written under a temporary name and renamed when full; `index.json` appears when all are there, so a folder
    without it is not a finished set. What an earlier run left under the same prefix is removed.

    Args:
        folder: where the tars go; created.
        kind: "image" or "video".
        samples_per_shard: samples in a tar, at most.

    Raises:
        ValueError: unknown kind, no samples per shard, a key with a dot or slash, or one used twice.
    """

    def __init__(self, folder: str | Path, kind: str, samples_per_shard: int = 512, prefix: str = "train") -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}.")
        self.folder, self.kind, self.prefix = Path(folder), kind, prefix
        self.samples_per_shard = samples_per_shard
        self.shards: list[dict] = []
        self.pending: list[tuple[str, dict[str, bytes]]] = []
        self.keys: set[str] = set()

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / INDEX_NAME).unlink(missing_ok=True)
        for stale in self.folder.glob(f"{self.prefix}-*.tar*"):
            stale.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is None:
            self._flush()
            write_json(self.folder / INDEX_NAME, self.index())

    def write(self, key: str, fields: dict[str, bytes | str | dict]) -> None:
        """Adds a sample: `fields` maps an extension ("jpg", "txt", "ref0.jpg", ...) to bytes, text or a JSON object."""
        if not key or "." in key or "/" in key:
            raise ValueError(f"key {key!r}: must be non-empty, without dot or slash (keys end at the first dot).")
        if key in self.keys:
            raise ValueError(f"key {key!r}: written twice.")
        self.keys.add(key)
        self.pending.append((key, {name: to_bytes(value) for name, value in fields.items()}))
        if len(self.pending) == self.samples_per_shard:
            self._flush()

    def index(self) -> dict:
        """What `index.json` holds."""
        return {
            "kind": self.kind,
            "num_samples": sum(shard["num_samples"] for shard in self.shards),
            "shards": self.shards,
        }

    def _flush(self) -> None:
        if not self.pending:
            return
        name, data = f"{self.prefix}-{len(self.shards):06d}.tar", tar_bytes(self.pending)
        write_bytes(self.folder / name, data)
        digest = hashlib.sha256(data).hexdigest()
        self.shards.append(
            {"name": name, "num_samples": len(self.pending), "num_bytes": len(data), "sha256": digest},
        )
        self.pending = []


def damaged_shards(folder: str | Path) -> list[str]:
    """Names of the shards whose bytes are not those that `index.json` records.

    Raises:
        FileNotFoundError: no `index.json`: the set was never finished.
    """
    folder = Path(folder)
    index = json.loads((folder / INDEX_NAME).read_text())
    return [shard["name"] for shard in index["shards"] if _digest(folder / shard["name"]) != shard["sha256"]]


def tar_bytes(samples: list[tuple[str, dict[str, bytes]]]) -> bytes:
    """Samples in the given order, their files by name -> an uncompressed tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, fields in samples:
            for name in sorted(fields):
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size, info.mode = len(fields[name]), 0o644
                tar.addfile(info, io.BytesIO(fields[name]))
    return buffer.getvalue()


def to_bytes(value: bytes | str | dict) -> bytes:
    """A field as it is stored: JSON with sorted keys, text as UTF-8."""
    if isinstance(value, dict):
        value = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return value.encode() if isinstance(value, str) else value


def write_json(path: Path, value: dict) -> None:
    """Writes indented JSON, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes beside the target, then renames: a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
