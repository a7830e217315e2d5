"""Shards that lie elsewhere: fetched whole into a folder of bounded size that all processes of a machine share."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from datamodules.tars import INDEX_SUFFIX, TarIndex, leave_index, scan_tar, stored_header

logger = logging.getLogger(__name__)

PIPE = "pipe:"
CHUNK = 1 << 20
NUM_ATTEMPTS = 3


def default_folder() -> Path:
    """One per user and machine."""
    return Path(tempfile.gettempdir()) / f"magicmirror-shards-{os.getuid()}"


def is_remote(url: str) -> bool:
    return url.startswith(PIPE) or "://" in url


class ShardCache:
    """Keeps the shards that were used last; a file's access time says when that was.

    A file appears whole or not at all. Readers that hold a file open keep reading it when it makes room for another,
    so that at most their open tars lie on the disk beyond `max_bytes`.

    Args:
        folder: shared by the workers and ranks of a machine; created, for its user alone, when the first shard is
            fetched.
        max_bytes: of all shards in it together.

    Raises:
        ValueError: no room at all.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"a cache of {max_bytes} bytes holds nothing; give cache_gb > 0.")
        self.folder, self.max_bytes = Path(folder), max_bytes

    @contextmanager
    def hold(self, url: str, num_bytes: int | None = None, sha256: str | None = None) -> Iterator[Path]:
        """The local file of a shard, fetched unless it is there, and kept while the `with` lasts: open it within.

        Another that was fetched from the same address before is replaced.

        Args:
            url: `pipe:command` or what fsspec opens.
            num_bytes, sha256: of the shard, where an index says so. The checksum is taken once, after the transfer; the
                tar index that is then left beside the file holds it.

        Raises:
            OSError: it cannot be fetched, or other bytes came in, after several attempts.
            ValueError: it is larger than the cache, or the cache is another user's.
        """
        self._make_folder()
        path = self.path(url)
        with self._lock(path.name):
            if not self._holds(path, num_bytes, sha256):
                _remove(path)
                self._download(url, path, num_bytes, sha256)
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
            yield path

    def path(self, url: str) -> Path:
        """Where a shard lies once it is fetched."""
        return self.folder / f"{hashlib.blake2b(url.encode(), digest_size=12).hexdigest()}.tar"

    def _make_folder(self) -> None:
        """
        Raises:
            ValueError: another user made the default folder, whose name anyone can guess.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = self.folder.lstat().st_uid
        if self.folder == default_folder() and owner != os.getuid():
            raise ValueError(
                f"the cache {self.folder} belongs to user {owner}, not to user {os.getuid()} who runs this; give "
                "cache_dir a folder of your own."
            )

    def _holds(self, path: Path, num_bytes: int | None, sha256: str | None) -> bool:
        """Whether a file is there, and is the one that an index tells of."""
        if not path.is_file() or num_bytes not in (None, path.stat().st_size):
            return False
        return sha256 is None or stored_header(path, sha256) is not None

    def _download(self, url: str, path: Path, num_bytes: int | None, sha256: str | None) -> None:
        partial = path.with_suffix(".part")
        for attempt in range(NUM_ATTEMPTS):
            try:
                self._make_room(num_bytes or 0, partial)
                copy_to(url, partial)
                self._make_room(partial.stat().st_size, partial)
                check_size(url, partial, num_bytes)
                if sha256 is not None:
                    leave_index(checked_index(url, partial, sha256), path)
                partial.replace(path)
                return
            except OSError as error:
                if attempt == NUM_ATTEMPTS - 1:
                    raise
                logger.info("fetching again: %s", error)
            finally:
                partial.unlink(missing_ok=True)

    def _make_room(self, num_bytes: int, own: Path) -> None:
        """Removes what was used longest ago until `num_bytes` of a file of our own fit in."""
        if num_bytes > self.max_bytes:
            raise ValueError(
                f"a shard of {num_bytes / 1e9:.3g} GB does not fit into the cache {self.folder} of "
                f"{self.max_bytes / 1e9:.3g} GB; raise cache_gb."
            )
        with self._lock("all"):
            paths = [path for path in self.folder.glob("*.*") if path.suffix in (".tar", ".part") and path != own]
            stats = sorted((path.stat().st_atime_ns, path.stat().st_size, path) for path in paths if path.exists())
            total = sum(size for _, size, _ in stats)
            for _, size, path in stats:
                if total + num_bytes <= self.max_bytes:
                    break
                if self._evict(path):
                    total -= size

    def _evict(self, path: Path) -> bool:
        """Removes a file, unless a process fetches or holds its shard: then False."""
        with open(self.folder / f".{path.stem}.tar.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            _remove(path)
        return True

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Only one process at a time is inside; the system frees the lock of one that is killed."""
        with open(self.folder / f".{name}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _remove(path: Path) -> None:
    """A file, and the tar index beside it."""
    path.unlink(missing_ok=True)
    Path(f"{path}{INDEX_SUFFIX}").unlink(missing_ok=True)


def check_size(url: str, path: Path, num_bytes: int | None) -> None:
    """
    Raises:
        OSError: a file has not the size that an index tells.
    """
    found = path.stat().st_size
    if num_bytes not in (None, found):
        raise OSError(f"{url}: {found} bytes came in, index.json records {num_bytes}; put the whole shard there again")


def checked_index(url: str, path: Path, sha256: str) -> TarIndex:
    """The index of a tar whose bytes are those of its checksum.

    Raises:
        OSError: they are others.
    """
    index = scan_tar(path, sha256)
    if index.header["sha256"] != sha256:
        raise OSError(f"{url}: its sha256 is not {sha256}, which index.json records; put tar and index there again")
    return index


def copy_to(url: str, path: Path) -> None:
    """
    Raises:
        OSError: what fsspec or the command says.
    """
    if url.startswith(PIPE):
        with open(path, "wb") as file:
            done = subprocess.run(url[len(PIPE) :], shell=True, stdout=file, stderr=subprocess.PIPE, check=False)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()[-200:]
            raise OSError(f"{url}: the command ended with {done.returncode}: {said}")
        return
    try:
        with fsspec.open(url, "rb") as source, open(path, "wb") as file:
            shutil.copyfileobj(source, file, CHUNK)
    except Exception as error:  # each file system of fsspec has errors of its own: aiohttp's, botocore's, ...
        raise OSError(f"{url}: {type(error).__name__}: {error}") from error


def read_text(url: str) -> str:
    """A small file that lies elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        copy_to(url, Path(folder) / "text")
        return (Path(folder) / "text").read_text(encoding="utf-8")
