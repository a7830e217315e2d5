"""Writes WebDataset tars in the project's layout, with an index that is written last.

The same samples give the same bytes: no time, user or order of insertion is recorded.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from itertools import groupby
from pathlib import Path
from types import TracebackType

from mm_lightning.files import temporary_path, write_bytes, write_json

INDEX_NAME = "index.json"
KINDS = ("image", "video")
OFFSETS_SUFFIX = ".index"
OFFSETS_VERSION = 1
UNKNOWN_SIZE = (0, 0, 0)


class TarWriter:
    """One uncompressed tar, sample by sample: what was written lies on disk, not in memory.

    The file has a temporary name until `close` renames it, so that a reader sees a whole tar or none. Beside it stands
    `{name}.tar.index`, by which a reader enters the tar: see `offsets_text`.
    """

    def __init__(self, path: Path) -> None:
        self.offsets: list[tuple[str, dict[str, tuple[int, int, int]]]] = []
        self.sizes: list[tuple[int, int, int]] = []
        self.path, self.temporary = path, temporary_path(path)
        self.num_samples, self.num_bytes, self.digest = 0, 0, hashlib.sha256()
        self.file = self.temporary.open("wb")
        self.tar = tarfile.TarFile(fileobj=self, mode="w", format=tarfile.PAX_FORMAT)

    def add(self, key: str, fields: dict[str, bytes]) -> None:
        """One sample; its files are sorted by name."""
        places = {}
        for name in sorted(fields):
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size, info.mode = len(fields[name]), 0o644
            self.tar.addfile(info, io.BytesIO(fields[name]))
            padded = -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            places[name] = (self.num_bytes - padded, info.size, zlib.crc32(fields[name]))
        self.offsets.append((key, places))
        self.sizes.append(stored_size(fields.get("json", b"")))
        self.num_samples += 1
        self.tar.members.clear()  # tarfile keeps a record of each, which only reading needs

    def close(self) -> dict:
        """Gives the file its name.

        Returns:
            "name", "num_samples", "num_bytes", "sha256".
        """
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        digest = self.digest.hexdigest()
        offsets = offsets_text(self.offsets, self.sizes, self.num_bytes, digest)
        write_bytes(self.path.with_name(self.path.name + OFFSETS_SUFFIX), offsets.encode())
        os.replace(self.temporary, self.path)
        sizes = {"num_samples": self.num_samples, "num_bytes": self.num_bytes}
        return {"name": self.path.name, **sizes, "sha256": digest}

    def abort(self) -> None:
        """Leaves nothing behind."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)

    # What tarfile asks of a file

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.num_bytes


class ShardWriter:
    """Context manager: samples -> `{prefix}-000000.tar`, ... and `index.json`. No more than one sample is in memory.

    A tar is written under a temporary name and renamed when full; `index.json` appears when all are there, so a folder
    without it is not a finished set. What an earlier run left under the same prefix is removed, nothing else.

    Args:
        folder: where the tars go; created.
        kind: "image" or "video".
        samples_per_shard: samples in a tar, at most.

    Raises:
        ValueError: unknown kind, no samples per shard, a key with a dot or slash, or one used twice; or as `own_files`.
    """

    def __init__(self, folder: str | Path, kind: str, samples_per_shard: int = 512, prefix: str = "train") -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}.")
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}.")
        self.folder, self.kind, self.prefix = Path(folder), kind, prefix
        self.samples_per_shard = samples_per_shard
        self.shards: list[dict] = []
        self.tar: TarWriter | None = None
        self.keys: set[str] = set()

    def __enter__(self) -> ShardWriter:
        stale = own_files(self.folder, self.prefix)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / INDEX_NAME).unlink(missing_ok=True)
        for path in stale:
            path.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is None:
            self._close_shard()
            write_json(self.folder / INDEX_NAME, self.index())
        elif self.tar is not None:
            self.tar.abort()

    def write(self, key: str, fields: dict[str, bytes | str | dict]) -> None:
        """Adds a sample: `fields` maps an extension ("jpg", "txt", "ref0.jpg", ...) to bytes, text or a JSON object."""
        check_key(key)
        if key in self.keys:
            raise ValueError(f"key {key!r}: written twice.")
        self.keys.add(key)
        if self.tar is None:
            self.tar = TarWriter(self.folder / f"{self.prefix}-{len(self.shards):06d}.tar")
        self.tar.add(key, {name: to_bytes(value) for name, value in fields.items()})
        if self.tar.num_samples == self.samples_per_shard:
            self._close_shard()

    def index(self) -> dict:
        """What `index.json` holds."""
        return {
            "kind": self.kind,
            "num_samples": sum(shard["num_samples"] for shard in self.shards),
            "shards": self.shards,
        }

    def _close_shard(self) -> None:
        if self.tar is not None:
            self.shards.append(self.tar.close())
            self.tar = None


def own_files(folder: Path, prefix: str = "train") -> list[Path]:
    """What an earlier `ShardWriter` left under a prefix: shards, the indices beside them, temporary files.

    Raises:
        ValueError: a tar of such a name that `index.json` does not list and that has no index beside it.
    """
    tars, listed = list(folder.glob(f"{prefix}-*.tar")), listed_shards(folder)
    for tar in sorted(tars):
        if tar.name not in listed and not tar.with_name(tar.name + OFFSETS_SUFFIX).exists():
            raise ValueError(f"{tar} is not a shard that was written here; move it away, or give another folder.")
    return [*tars, *folder.glob(f"{prefix}-*.tar{OFFSETS_SUFFIX}"), *folder.glob(f"{prefix}-*.tar.*.tmp")]


def listed_shards(folder: Path) -> set[str]:
    """Names in `index.json`; none where it is missing or another program's."""
    try:
        return {shard["name"] for shard in json.loads((folder / INDEX_NAME).read_text())["shards"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def offsets_text(
    offsets: list[tuple[str, dict[str, tuple[int, int, int]]]],
    sizes: list[tuple[int, int, int]],
    num_bytes: int,
    sha256: str,
) -> str:
    """What stands beside a tar, lines of JSON.

    The first holds `version`, `num_samples`, `num_bytes`, `sha256` and `sizes`, runs of samples of one size
    `[[number, frames, height, width], ...]`; then comes `[key, {field: [offset, size, crc32]}]` for each sample.
    """
    runs = [[len(list(run)), *size] for size, run in groupby(sizes)]
    header = {"version": OFFSETS_VERSION, "num_samples": len(offsets), "num_bytes": num_bytes, "sha256": sha256}
    lines = [header | {"sizes": runs}, *offsets]
    return "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)


def stored_size(data: bytes) -> tuple[int, int, int]:
    """(frames, height, width) that a sample's json gives, zeros where it does not."""
    try:
        meta = json.loads(data)
        return int(meta["num_frames"]), int(meta["height"]), int(meta["width"])
    except (ValueError, KeyError, TypeError):
        return UNKNOWN_SIZE


def check_key(key: str) -> None:
    """
    Raises:
        ValueError: the key is empty or has a dot or slash.
    """
    if not key or "." in key or "/" in key:
        raise ValueError(f"key {key!r}: must be non-empty, without dot or slash (keys end at the first dot).")


def damaged_shards(folder: str | Path) -> list[str]:
    """Names of the shards whose bytes are not those that `index.json` records.

    Raises:
        FileNotFoundError: no `index.json`: the set was never finished.
    """
    folder = Path(folder)
    index = json.loads((folder / INDEX_NAME).read_text())
    return [shard["name"] for shard in index["shards"] if _digest(folder / shard["name"]) != shard["sha256"]]


def to_bytes(value: bytes | str | dict) -> bytes:
    """A field as it is stored: JSON with sorted keys, text as UTF-8."""
    if isinstance(value, dict):
        value = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return value.encode() if isinstance(value, str) else value


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
