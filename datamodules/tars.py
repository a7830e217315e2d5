"""Reading one sample of a tar without reading the others.

Beside `x.tar` lies `x.tar.index`, text: a line of JSON with `version`, `num_samples`, `num_bytes`, `sha256` (or null)
and `sizes`, runs of samples of one size `[[number, frames, height, width], ...]`; then a line of JSON for each sample,
`[key, {field: [offset, size, crc32 or null]}]`. `mm_lightning.prepare` writes it; where it is missing, the headers of
the tar are walked once and it is left beside the tar, if that folder can be written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import socket
import tarfile
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".index"
INDEX_VERSION = 1
UNKNOWN_SIZE = (0, 0, 0)
CHUNK = 1 << 20
RETRY_SECONDS = 300.0  # until a shard that could not be opened is tried again
SKIPPED = re.compile(r"__[^/]*__($|/)")
MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # WebDataset's rule: a key ends at the first dot
TAR_ERRORS = (tarfile.TarError, EOFError, OSError, ValueError)


class DamagedSample(Exception):  # noqa: N818, an event that is counted rather than an error of the program
    """A sample that cannot be used; the message is the reason."""


class DamagedShard(DamagedSample):
    """A sample that cannot be used because its shard cannot; the message is the reason."""


class Shard(NamedTuple):
    """A tar, and what an index says of it."""

    url: str
    num_samples: int | None = None
    num_bytes: int | None = None
    sha256: str | None = None


class Field(NamedTuple):
    """Where the bytes of a file of the tar lie."""

    offset: int
    size: int
    crc32: int | None


class TarIndex:
    """What lies where in a tar. Lines of samples are parsed when they are asked for.

    Raises:
        ValueError: `text` is no index.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        head, *self.lines = text.removesuffix("\n").split("\n")  # a key may hold what splitlines() takes for an end
        self.header = json.loads(head)
        if self.header.get("version") != INDEX_VERSION or self.header["num_samples"] != len(self.lines):
            raise ValueError(f"no tar index of version {INDEX_VERSION} with all of its lines: {head[:80]}")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> tuple[str, dict[str, Field]]:
        """-> key and fields of sample i."""
        key, fields = json.loads(self.lines[i])
        return key, {name: Field(*place) for name, place in fields.items()}

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """(frames, height, width) of every sample, zeros where the json does not say."""
        return [tuple(size) for number, *size in self.header["sizes"] for _ in range(number)]


def index_text(
    entries: list[tuple[str, dict[str, Field]]],
    sizes: list[tuple[int, int, int]],
    num_bytes: int,
    sha256: str | None,
) -> str:
    """The content of an index file."""
    runs = [[len(list(run)), *size] for size, run in groupby(sizes)]
    header = {"version": INDEX_VERSION, "num_samples": len(entries), "num_bytes": num_bytes, "sha256": sha256}
    lines = [header | {"sizes": runs}, *entries]
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)


# Walking a tar that has no index yet


def scan_tar(path: str | Path, sha256: str | None = None) -> TarIndex:
    """Walks the headers of a tar; where `sha256` is known, reads all of it and notes a checksum for each field.

    What stands behind a break of the tar is not found. Checksums are noted only where `sha256` vouches for the bytes.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        trusted = sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() == sha256
        file.seek(0)
        entries = [
            (key, {name: Field(*place, _crc(file, *place) if trusted else None) for name, place in fields.items()})
            for key, fields in _walk(file)
        ]
        sizes = [_stored_size(file, fields) for _, fields in entries]
        return TarIndex(index_text(entries, sizes, os.path.getsize(path), sha256 if trusted else None))


def _walk(file: BinaryIO) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """Files in a row with one key make a sample, as WebDataset reads them."""
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    for member in _members(file):
        parts = MEMBER.match(member.name)
        if parts is None or not member.isreg() or SKIPPED.match(member.name):
            continue
        key, name = parts.group(1), parts.group(2).lower()
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        samples[-1][1][name] = (member.offset_data, member.size)
    return samples


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield from tar
    except TAR_ERRORS as error:
        logger.debug("the walk ends: %r", error)


def _crc(file: BinaryIO, offset: int, size: int) -> int:
    file.seek(offset)
    value = 0
    while size > 0 and (chunk := file.read(min(CHUNK, size))):
        value, size = zlib.crc32(chunk, value), size - len(chunk)
    return value


def _stored_size(file: BinaryIO, fields: dict[str, Field]) -> tuple[int, int, int]:
    if "json" not in fields:
        return UNKNOWN_SIZE
    file.seek(fields["json"].offset)
    return json_size(file.read(fields["json"].size))


def json_size(data: bytes) -> tuple[int, int, int]:
    """(frames, height, width) that a sample's json gives, zeros where it does not."""
    try:
        meta = json.loads(data)
        return int(meta["num_frames"]), int(meta["height"]), int(meta["width"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return UNKNOWN_SIZE


def load_tar_index(path: str | Path, sha256: str | None = None) -> TarIndex:
    """The index beside a tar, or made now and left there unless the tar is cut short.

    Args:
        sha256: of the whole tar, if known; an index file for other bytes is not used.

    Raises:
        OSError: the tar cannot be read.
    """
    beside = Path(f"{path}{INDEX_SUFFIX}")
    try:
        index = TarIndex(beside.read_text(encoding="utf-8"))
        if _belongs(index.header, path, sha256):
            return index
    except (OSError, ValueError, KeyError, IndexError):
        pass
    index = scan_tar(path, sha256)
    if index.header["sha256"] != sha256:
        logger.warning("%s: its bytes are not those that index.json records; they are read without checks.", path)
    if not cut_short(path):
        leave_index(index, path)
    return index


def leave_index(index: TarIndex, path: str | Path) -> None:
    """Writes the index beside its tar, if that folder can be written."""
    beside = Path(f"{path}{INDEX_SUFFIX}")
    temporary = beside.with_name(f"{beside.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        temporary.write_text(index.text, encoding="utf-8")
        temporary.replace(beside)
    except OSError:
        logger.debug("%s cannot be written", beside)


def _belongs(header: dict, path: str | Path, sha256: str | None) -> bool:
    """Whether the index beside a tar is this tar's: by its checksum where that is known, else by its size and age.

    Raises:
        OSError: the tar or the index is not there.
    """
    if sha256 is not None:
        return header["sha256"] == sha256
    tar, beside = os.stat(path), os.stat(f"{path}{INDEX_SUFFIX}")
    return header["num_bytes"] == tar.st_size and tar.st_mtime_ns <= beside.st_mtime_ns


def stored_header(path: str | Path, sha256: str | None = None) -> dict | None:
    """The first line of the index beside a tar, without the rest; None where no index is there, or another tar's."""
    try:
        with open(f"{path}{INDEX_SUFFIX}", encoding="utf-8") as file:
            header = json.loads(file.readline())
        return header if header["version"] == INDEX_VERSION and _belongs(header, path, sha256) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_header(path: str | Path, sha256: str | None = None) -> dict:
    """The first line of the index beside a tar, which is made and left there where it is missing.

    Raises:
        OSError: the tar cannot be read.
    """
    return stored_header(path, sha256) or load_tar_index(path, sha256).header


def cut_short(path: str | Path) -> bool:
    """Whether a tar lacks its closing 1024 zero bytes; a cut between two files is no error to those who read it."""
    with open(path, "rb") as file:
        file.seek(-min(1024, os.path.getsize(path)), os.SEEK_END)
        return file.read() != bytes(1024)


# Samples


class StoredSample(Mapping):
    """A sample of a tar: field -> bytes, read and checked when asked for; `__key__` and `__url__` beside them.

    Raises:
        DamagedSample: the bytes of a field are cut short, or not those of its checksum.
    """

    def __init__(self, file: OpenTar, key: str, fields: dict[str, Field]) -> None:
        self.file, self.fields = file, fields
        self.names = {"__key__": key, "__url__": file.url}

    def __getitem__(self, name: str) -> bytes | str:
        if name in self.names:
            return self.names[name]
        return self.file.read(name, self.fields[name])

    def __contains__(self, name: object) -> bool:
        return name in self.names or name in self.fields

    def __iter__(self) -> Iterator[str]:
        return iter((*self.names, *self.fields))

    def __len__(self) -> int:
        return len(self.names) + len(self.fields)


class OpenTar:
    """A tar that is open for reading anywhere.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, url: str, path: str | Path, sha256: str | None = None) -> None:
        self.url, self.index = url, load_tar_index(path, sha256)
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def sample(self, i: int) -> StoredSample:
        """
        Raises:
            DamagedShard: the tar ends before sample i.
        """
        if i >= len(self.index):
            raise DamagedShard(f"cut short: only {len(self.index)} samples can be found")
        return StoredSample(self, *self.index[i])

    def read(self, name: str, field: Field) -> bytes:
        """
        Raises:
            DamagedSample: fewer bytes, or others than were written.
        """
        try:
            data = os.pread(self.descriptor, field.size, field.offset)
            while len(data) < field.size and (more := self._read_more(field, len(data))):
                data += more
        except OSError as error:
            raise DamagedSample(f"{name} cannot be read ({error})") from error
        if len(data) < field.size:
            raise DamagedSample(f"{name} is cut short: {len(data)} of {field.size} bytes are in the tar")
        if field.crc32 is not None and zlib.crc32(data) != field.crc32:
            raise DamagedSample(f"{name} was changed: its checksum is not that of the {field.size} bytes written")
        return data

    def _read_more(self, field: Field, read: int) -> bytes:
        """Linux reads 2 GiB at most in one go."""
        return os.pread(self.descriptor, field.size - read, field.offset + read)


class ShardReader:
    """Any sample of any shard of a list; `max_open` tars stay open, the rest are opened again when needed.

    A shard that cannot be opened is tried again after RETRY_SECONDS.

    Args:
        shards: in the order in which the canonical order numbers them.
        hold: shard -> context manager of the path of a local file, which stays until the exit; raises OSError.
    """

    def __init__(
        self, shards: list[Shard], hold: Callable[[Shard], AbstractContextManager[str | Path]], max_open: int = 64
    ) -> None:
        self.shards, self.hold, self.max_open = shards, hold, max_open
        self.tars: OrderedDict[int, OpenTar] = OrderedDict()
        self.unreadable: dict[int, tuple[float, str]] = {}  # number -> when that was found, and why

    def sample(self, shard: int, i: int) -> StoredSample:
        """
        Raises:
            DamagedShard: the tar cannot be opened, or ends before sample i.
        """
        return self._tar(shard).sample(i)

    def sizes(self, shard: int) -> list[tuple[int, int, int]]:
        """(frames, height, width) of its samples.

        Raises:
            OSError: the tar cannot be opened.
        """
        with self.hold(self.shards[shard]) as path:
            header = load_header(path, self.shards[shard].sha256)
        return [tuple(size) for number, *size in header["sizes"] for _ in range(number)]

    def _tar(self, number: int) -> OpenTar:
        if number not in self.tars:
            self.tars[number] = self._open(number)
            if len(self.tars) > self.max_open:
                self.tars.popitem(last=False)
        self.tars.move_to_end(number)
        return self.tars[number]

    def _open(self, number: int) -> OpenTar:
        shard, (found, reason) = self.shards[number], self.unreadable.get(number, (-math.inf, ""))
        if time.monotonic() < found + RETRY_SECONDS:
            raise DamagedShard(reason)
        try:
            with self.hold(shard) as path:
                return OpenTar(shard.url, path, shard.sha256)
        except OSError as error:
            reason = f"cannot be opened ({type(error).__name__}: {error})"
            self.unreadable[number] = time.monotonic(), reason
            raise DamagedShard(reason) from error
