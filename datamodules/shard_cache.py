"""Shards that lie elsewhere: fetched whole into a folder of bounded size that all processes of a machine share."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

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
    """Keeps the shards that were used last.

    A file appears whole or not at all. Readers that hold a file open keep reading it when it makes room for another,
    so that at most their open tars lie on the disk beyond `max_bytes`.

    Args:
        folder: shared by the workers and ranks of a machine; created when the first shard is fetched.
        max_bytes: of all shards in it together.

    Raises:
        ValueError: no room at all.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"a cache of {max_bytes} bytes holds nothing; give cache_gb > 0.")
        self.folder, self.max_bytes = Path(folder), max_bytes

    def fetch(self, url: str, num_bytes: int | None = None) -> Path:
        """The local file of a shard.

        Args:
            url: `pipe:command` or what fsspec opens.
            num_bytes: of the shard, where an index says so, to make room beforehand and to notice a short transfer.

        Raises:
            OSError: it cannot be fetched, or came in short, after several attempts.
            ValueError: it is larger than the cache.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(url)
        with self._lock(path.name):
            if not path.is_file():
                self._download(url, path, num_bytes)
            os.utime(path)
        return path

    def path(self, url: str) -> Path:
        """Where a shard lies once it is fetched."""
        return self.folder / f"{hashlib.blake2b(url.encode(), digest_size=12).hexdigest()}.tar"

    def _download(self, url: str, path: Path, num_bytes: int | None) -> None:
        partial = path.with_suffix(".part")
        for attempt in range(NUM_ATTEMPTS):
            try:
                self._make_room(num_bytes or 0, partial)
                copy_to(url, partial)
                found = partial.stat().st_size
                if found < (num_bytes or 0) and attempt < NUM_ATTEMPTS - 1:
                    raise OSError(f"{url}: {found} of {num_bytes} bytes came in")
                self._make_room(found, partial)
                partial.replace(path)
                return
            except OSError as error:
                partial.unlink(missing_ok=True)
                if attempt == NUM_ATTEMPTS - 1:
                    raise
                logger.info("fetching again: %s", error)

    def _make_room(self, num_bytes: int, own: Path) -> None:
        """Removes what was used longest ago until `num_bytes` of a file of our own fit in."""
        if num_bytes > self.max_bytes:
            own.unlink(missing_ok=True)
            raise ValueError(
                f"a shard of {num_bytes / 1e9:.3g} GB does not fit into the cache {self.folder} of "
                f"{self.max_bytes / 1e9:.3g} GB; raise cache_gb."
            )
        with self._lock("all"):
            paths = [path for path in self.folder.glob("*.*") if path.suffix in (".tar", ".part") and path != own]
            stats = sorted((path.stat().st_mtime_ns, path.stat().st_size, path) for path in paths if path.exists())
            total = sum(size for _, size, _ in stats)
            for _, size, path in stats:
                if total + num_bytes <= self.max_bytes:
                    break
                if path.suffix == ".tar" or self._abandoned(path):
                    path.unlink(missing_ok=True)
                    total -= size

    def _abandoned(self, partial: Path) -> bool:
        """Whether the process that was fetching this has ended."""
        with open(self.folder / f".{partial.stem}.tar.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
        return True

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Only one process at a time is inside; the system frees the lock of one that is killed."""
        with open(self.folder / f".{name}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


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
    except ImportError as error:
        raise OSError(f"{url}: {error}") from error


def read_text(url: str) -> str:
    """A small file that lies elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        copy_to(url, Path(folder) / "text")
        return (Path(folder) / "text").read_text(encoding="utf-8")
