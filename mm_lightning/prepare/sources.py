"""Where raw material comes from: folders of pictures or videos, and img2dataset's tars.

A source lists its items in one canonical order, by relative path, and cuts the list into chunks; what is in a chunk
depends on nothing but the files and `chunk_size`. A chunk is small and goes to a worker, which reads the bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
import posixpath
import re
import signal
import stat
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple, Protocol

import fsspec
from braceexpand import braceexpand

from mm_lightning.prepare.sample import Rejected, Sample

EXTENSIONS = {
    "image": ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"),
    "video": ("mp4", "m4v", "mov", "mkv", "webm", "avi"),
}
MAX_BYTES = 2 << 30  # of one file; it is held in memory
MAX_KEY_LENGTH = 120
PIPE = "pipe:"
REASONS = ("unreadable", "too_large", "caption_not_utf8", "no_picture_or_video", "broken_archive")


class Item(NamedTuple):
    """One thing to prepare. `load` raises `Rejected` with one of `REASONS`."""

    key: str
    source: str  # printable, for the report
    load: Callable[[], Sample]


class Chunk(Protocol):
    """A run of items, small enough to be sent to a worker; the unit that an interrupted run repeats."""

    name: str
    num_items: int | None
    """None where only reading tells."""
    digest: str
    """Changes when what is in it changes."""

    def items(self, start: int = 0) -> Iterator[Item]:
        """From the item at position `start` on."""
        ...


class Source(Protocol):
    name: str
    kind: str
    """`image` or `video`."""

    def chunks(self, chunk_size: int, limit: int | None = None) -> Iterator[Chunk]:
        """In canonical order; of the first `limit` items where it is given.

        Raises:
            ValueError, FileNotFoundError: nothing to read, or no permission to.
        """
        ...

    def reads_from(self, folder: Path) -> bool:
        """Whether files that are written into a folder would be raw ones of the next run."""
        ...


# Keys -----------------------------------------------------------------------------------------------------------------


class Keys:
    """Relative paths in canonical order -> keys, unique also where letter case does not count.

    `people/0001.png` becomes `people--0001`. A path with other characters than letters (of any script), digits, `_` and
    `-`, or a second file of the same name, gets a hash of the whole path behind it.
    """

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, path: str, url: str | None = None) -> str:
        """`url` tells two of the same path apart."""
        key = path_key(path)
        if key.casefold() in self.seen:
            key = hashed(key, url or path)
        self.seen.add(key.casefold())
        return key


def path_key(path: str) -> str:
    stem = unicodedata.normalize("NFC", posixpath.splitext(path)[0])
    parts = [re.sub(r"[\W-]+", "-", part).strip("-") for part in stem.split("/")]
    key = "--".join(parts)
    plain = all(parts) and key == stem.replace("/", "--") and len(key) <= MAX_KEY_LENGTH
    return key if plain else hashed(key, path)


def hashed(key: str, path: str) -> str:
    return f"{key[: MAX_KEY_LENGTH - 11]}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:10]}".lstrip("-")


def printable(path: str) -> str:
    """A path as text that can be written: bytes that are no UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def digest_of(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).hexdigest()[:16]


# Folders --------------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A file below a folder."""

    path: str  # relative, with slashes
    size: int  # -1 where it is no regular file
    stamp: str  # changes when the file is written anew


@dataclass(frozen=True)
class FileItem:
    """A file of a folder and its caption."""

    key: str
    entry: Entry
    caption: str | None = None
    sidecar: Entry | None = None

    def load(self, root: str, kind: str, source: str, max_bytes: int) -> Sample:
        if self.entry.size < 0:
            raise Rejected("unreadable", "no regular file")
        if self.entry.size > max_bytes:
            raise Rejected("too_large", f"{self.entry.size} bytes, at most {max_bytes} are read")
        data = read_bytes(root, self.entry.path)
        caption = self.caption
        if self.sidecar is not None:
            caption = decode_text(read_bytes(root, self.sidecar.path))
        return Sample(self.key, kind, source, data, extension_of(self.entry.path), caption)


@dataclass(frozen=True)
class FileChunk:
    """Consecutive files of a folder."""

    root: str
    kind: str
    source: str
    files: tuple[FileItem, ...]
    max_bytes: int = MAX_BYTES

    @property
    def name(self) -> str:
        return self.files[0].key

    @property
    def num_items(self) -> int:
        return len(self.files)

    @property
    def digest(self) -> str:
        return digest_of("files", self.kind, self.source, self.files, self.max_bytes)

    def items(self, start: int = 0) -> Iterator[Item]:
        for file in self.files[start:]:
            source = f"{self.source}:{printable(file.entry.path)}"
            yield Item(file.key, source, partial(file.load, self.root, self.kind, source, self.max_bytes))


@dataclass
class Folder:
    """Every picture or video below a folder, local or at an fsspec url, in the order of the relative paths.

    A caption comes from `captions`, a table of file names and texts, or else from a text file of the same name
    (`0001.txt` beside `0001.png`); without either it is None. Hidden files are left out.

    Args:
        path: the folder.
        name: of the source; it stands before the path in a sample's `source`.
        captions: a .csv, .tsv, .json (a list of objects, or an object by file name) or .jsonl file.
        file_field: the column or key in `captions` that names the file: a relative path, the end of one or a bare name,
            with or without its extension.
        caption_field: the column or key of the text; of a list of texts the first is taken.
        extensions: of the files that are read; None takes the usual ones.
        max_bytes: a larger file is rejected.
    """

    kind: ClassVar[str]
    path: str
    name: str = "files"
    captions: str | None = None
    file_field: str = "file"
    caption_field: str = "caption"
    extensions: list[str] | None = None
    max_bytes: int = MAX_BYTES

    def chunks(self, chunk_size: int, limit: int | None = None) -> Iterator[FileChunk]:
        files = itertools.islice(self.files(), limit)
        while batch := tuple(itertools.islice(files, chunk_size)):
            yield FileChunk(absolute(self.path), self.kind, self.name, batch, self.max_bytes)

    def reads_from(self, folder: Path) -> bool:
        return is_below(folder, self.path)

    def files(self) -> Iterator[FileItem]:
        entries = list_folder(self.path)
        wanted = {extension.lower().lstrip(".") for extension in self.extensions or EXTENSIONS[self.kind]}
        media = [entry for entry in entries if suffix(entry.path) in wanted]
        if not media:
            raise FileNotFoundError(nothing_found(self.path, wanted, entries))
        captions = self.read_captions(media)
        sidecars = {} if captions else {posixpath.splitext(e.path)[0]: e for e in entries if suffix(e.path) == "txt"}
        keys = Keys()
        for entry in media:
            caption, sidecar = captions.get(entry.path), sidecars.get(posixpath.splitext(entry.path)[0])
            yield FileItem(keys(entry.path), entry, caption, sidecar)

    def read_captions(self, media: list[Entry]) -> dict[str, str]:
        """Captions by relative path.

        Raises:
            ValueError: the table names none of the files.
        """
        if self.captions is None:
            return {}
        table = CaptionTable(read_table(self.captions, self.file_field, self.caption_field))
        found = table.captions([entry.path for entry in media])
        if not found:
            raise ValueError(
                f"{self.captions}: names none of the {len(media)} files in {self.path}; its first name is "
                f"{next(iter(table.by_path), '(none)')!r}, the first file {printable(media[0].path)!r}."
            )
        return found


class ImageFolder(Folder):
    """Pictures."""

    kind = "image"


class VideoFolder(Folder):
    """Videos."""

    kind = "video"


def list_folder(path: str) -> list[Entry]:
    """Every file below a folder, by relative path.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is a file, or cannot be read.
    """
    return sorted(list_remote(path) if is_remote(path) else list_local(path))


def list_local(path: str) -> Iterator[Entry]:
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"source.path={path} is not there; give a folder, such as source.path=data/raw.")
    if not root.is_dir():
        raise ValueError(f"source.path={path} is a file; give the folder that holds it.")

    def refuse(error: OSError) -> None:
        raise ValueError(f"source.path={path}: {error.filename} cannot be read: {error.strerror}.")

    visited = set()
    for folder, subfolders, names in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:  # a link that leads back
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        below = Path(folder).relative_to(root).as_posix()
        yield from (local_entry(folder, below, name) for name in names if not name.startswith("."))


def local_entry(folder: str, below: str, name: str) -> Entry:
    path = name if below == "." else f"{below}/{name}"
    try:
        status = os.stat(os.path.join(folder, name))
    except OSError:  # a dangling link: reading it will say so
        return Entry(path, 0, "")
    size = status.st_size if stat.S_ISREG(status.st_mode) else -1
    return Entry(path, size, str(status.st_mtime_ns))


def list_remote(url: str) -> Iterator[Entry]:
    system, root = open_file_system(url)
    try:
        found = system.find(root, detail=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"source.path={url} cannot be listed: {error}.") from error
    if not found:
        raise FileNotFoundError(f"source.path={url} is not there, or empty.")
    for path, info in found.items():
        relative = posixpath.relpath(path, root)
        if not any(part.startswith(".") for part in relative.split("/")):
            yield Entry(relative, int(info.get("size") or 0), stamp_in(info))


def stamp_in(info: dict[str, Any]) -> str:
    """What of a file's description by fsspec changes when it is written anew; empty where nothing does."""
    names = ("ETag", "etag", "mtime", "LastModified", "Last-Modified")
    return next((str(info[name]) for name in names if name in info), "")


def nothing_found(path: str, wanted: set[str], entries: list[Entry]) -> str:
    others = sorted({suffix(entry.path) or "(none)" for entry in entries})
    holds = f"its {len(entries)} files end in {', '.join(others[:8])}" if entries else "it holds no file"
    return f"source.path={path}: no file ends in {', '.join(sorted(wanted))}; {holds}."


# Captions -------------------------------------------------------------------------------------------------------------


class CaptionTable:
    """Captions by relative path; a row without folder names every file of its name."""

    def __init__(self, rows: Iterable[tuple[str, str]]) -> None:
        self.by_path: dict[str, str] = {}
        self.by_end: dict[str, str | None] = {}
        for file, caption in rows:
            path = posixpath.normpath(unicodedata.normalize("NFC", file.strip().replace("\\", "/")))
            self.by_path.setdefault(path, caption)
            for end in ends_of(path)[1:]:
                self.by_end[end] = caption if self.by_end.get(end, caption) == caption else None

    def captions(self, files: list[str]) -> dict[str, str]:
        """Of the files that are named; of a table that begins further up than they do, by the ends of its paths."""
        found = {file: text for file in files if (text := self.find(file)) is not None}
        return found or {file: text for file in files if (text := self.find_end(file)) is not None}

    def find(self, file: str) -> str | None:
        """Of the longest row that is the file's path or the end of it."""
        names = [name for end in ends_of(unicodedata.normalize("NFC", file)) for name in (end, without_extension(end))]
        return next((self.by_path[name] for name in names if name in self.by_path), None)

    def find_end(self, file: str) -> str | None:
        """Of the only row that ends in the file's path."""
        file = unicodedata.normalize("NFC", file)
        names = file, without_extension(file)
        return next((self.by_end[name] for name in names if name in self.by_end), None)


def ends_of(path: str) -> list[str]:
    """`a/b/c` -> `a/b/c`, `b/c`, `c`."""
    parts = path.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


def without_extension(path: str) -> str:
    return posixpath.splitext(path)[0]


def read_table(path: str, file_field: str, caption_field: str) -> list[tuple[str, str]]:
    """Rows of file name and caption.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, or a field that is not there.
    """
    text = read_text(path)
    fields = file_field, caption_field
    try:
        if suffix(path) in ("csv", "tsv"):
            rows = read_csv(path, text, "\t" if suffix(path) == "tsv" else ",")
        elif suffix(path) in ("json", "jsonl"):
            rows = read_json(text, lines=suffix(path) == "jsonl", fields=fields)
        else:
            raise ValueError("give a .csv, .tsv, .json or .jsonl file")
        return [(str(row[file_field]), first_text(row[caption_field])) for row in rows]
    except KeyError as error:
        has = ", ".join(map(str, next(iter(rows), {}))) or "nothing"
        hint = "name them by source.file_field= and source.caption_field="
        raise ValueError(f"source.captions={path}: a row has no {error}; the first has {has}; {hint}.") from error
    except (ValueError, TypeError, AttributeError, csv.Error) as error:
        raise ValueError(f"source.captions={path}: {error}.") from error


def read_csv(path: str, text: str, delimiter: str) -> list[dict[str, str]]:
    csv.field_size_limit(1 << 24)
    return list(csv.DictReader(io.StringIO(text), delimiter=delimiter))


def read_json(text: str, lines: bool, fields: tuple[str, str]) -> list[dict]:
    file_field, caption_field = fields
    if lines:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    content = json.loads(text)
    if isinstance(content, list):
        return content
    return [
        {file_field: name, **(value if isinstance(value, dict) else {caption_field: value})}
        for name, value in content.items()
    ]


def first_text(value: object) -> str:
    value = value[0] if isinstance(value, list) and value else value
    return "" if value is None else str(value)


def read_text(path: str) -> str:
    try:
        with fsspec.open(path, "rb") as file:
            return file.read().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"source.captions={path} is not there.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"source.captions={path} cannot be read: {error}.") from error


# Tars -----------------------------------------------------------------------------------------------------------------


class StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged header for the end; this one does not."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the mark at the end
                raise
            raise ValueError(f"no header where one should be: {error}") from error


TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError)


@dataclass(frozen=True)
class TarChunk:
    """Consecutive samples of a tar: files that stand together and share their name up to the first dot.

    Args:
        url: a path, an fsspec url, or `pipe:` and a command that prints the tar.
        key: of the tar; it stands before the samples' own names.
        offset, first: where in the file the first sample begins, in bytes, and its position among the tar's samples.
        num_items: None where it is not known.
        to_end: whatever `num_items` says, go on to the end of the tar or to where it is damaged.
        stamp: changes when the file is written anew.
    """

    url: str
    key: str
    kind: str
    source: str
    offset: int = 0
    first: int = 0
    num_items: int | None = None
    to_end: bool = True
    stamp: str = ""
    max_bytes: int = MAX_BYTES

    @property
    def name(self) -> str:
        return f"{self.key}--{self.first}"

    @property
    def digest(self) -> str:
        return digest_of("tar", self)

    def items(self, start: int = 0) -> Iterator[Item]:
        before = self.first if is_remote(self.url) else 0  # a stream has no offset to begin at
        stop = None if self.to_end else before + self.num_items
        yield from itertools.islice(self.read(), before + start, stop)

    def read(self) -> Iterator[Item]:
        """Damage ends the tar: one last item stands for what is lost and is rejected."""
        try:
            with open_tar(self.url, self.offset) as tar:
                for stem, files in grouped(tar, self.max_bytes):
                    yield self.item(stem, files)
        except TAR_ERRORS as error:
            yield Item(f"{self.key}--broken", f"{self.source}:{self.url}", partial(reject, "broken_archive", error))

    def item(self, stem: str, files: list[MemberFile]) -> Item:
        source = f"{self.source}:{printable(posixpath.basename(self.url))}/{printable(stem)}"
        key = f"{self.key}--{path_key(f'{stem}.')}"
        return Item(key, source, partial(self.load, key, source, {file.extension: file for file in files}))

    def load(self, key: str, source: str, files: dict[str, MemberFile]) -> Sample:
        file = next((files[name] for name in EXTENSIONS[self.kind] if name in files), None)
        if file is None:
            raise Rejected("no_picture_or_video", f"only {', '.join(sorted(files)) or 'nothing'}")
        if file.size > self.max_bytes:
            raise Rejected("too_large", f"{file.size} bytes, at most {self.max_bytes} are read")
        record = read_record(files["json"].data) if "json" in files else {}
        caption = decode_text(files["txt"].data) if "txt" in files else record.get("caption")
        meta = {"url": str(record["url"])} if record.get("url") else {}
        return Sample(key, self.kind, source, file.data, extension_of(file.extension), caption, meta)


@dataclass
class Img2datasetTars:
    """Tars that img2dataset (pictures) or video2dataset (videos) wrote: `{key}.jpg`, `{key}.txt`, `{key}.json`.

    A local tar is cut into chunks. One that is streamed (`pipe:`, a url) is one chunk, so that it is fetched once; an
    interruption then costs up to a tar per worker. The caption is the txt, or else the json's `caption`; the json's
    `url` is kept.

    Args:
        path: a folder of tars, a tar, a pattern (`*`), a url, or `pipe:` and a command; `{00000..00099}` stands for
            a hundred of them; or a list of such.
        name: of the source; it stands before the path in a sample's `source`.
        kind: "image" or "video".
    """

    path: str | list[str]
    name: str = "tars"
    kind: str = "image"
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        if self.kind not in EXTENSIONS:
            raise ValueError(f"source.kind={self.kind}: give one of {', '.join(EXTENSIONS)}.")

    def chunks(self, chunk_size: int, limit: int | None = None) -> Iterator[TarChunk]:
        keys, left = Keys(), limit
        for url, label in self.tars():
            whole = TarChunk(url, keys(label, url), self.kind, self.name, stamp=stamp_of(url), max_bytes=self.max_bytes)
            streamed = is_remote(url) and limit is None
            for chunk in [whole] if streamed else cut(whole, chunk_size, left):
                yield chunk
                left = None if left is None else left - chunk.num_items
            if left is not None and left <= 0:
                return

    def reads_from(self, folder: Path) -> bool:
        """Those below a folder of tars would be, and those beside a single tar."""
        given = [path for paths in self.given() if not paths.startswith(PIPE) for path in braceexpand(paths)]
        return any(is_below(folder, path) or is_beside(folder, path) for path in given)

    def given(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else list(self.path)

    def tars(self) -> list[tuple[str, str]]:
        """Urls, and the names that keys are made from.

        Raises:
            FileNotFoundError: no tar.
        """
        found = [tar for path in self.given() for tar in expand_tars(path)]
        if not found:
            raise FileNotFoundError(f"source.path={self.path}: no .tar there.")
        return found


def expand_tars(path: str) -> list[tuple[str, str]]:
    if is_remote(path):
        return [(url, named_in(url)) for url in braceexpand(path)]
    found = []
    for local in map(Path, braceexpand(os.path.expanduser(path))):
        if local.is_dir():
            tars = [entry.path for entry in sorted(list_local(str(local))) if suffix(entry.path) == "tar"]
            found += [(absolute(str(local / tar)), tar) for tar in tars]
        elif "*" in local.name:
            found += [(absolute(str(tar)), tar.name) for tar in sorted(local.parent.glob(local.name))]
        elif local.is_file():
            found.append((absolute(str(local)), local.name))
        else:
            raise FileNotFoundError(f"source.path={local} is not there; give a folder of tars, a tar or a pattern.")
    return found


def named_in(url: str) -> str:
    """The tar that a url or command names: `pipe:aws s3 cp s3://bucket/00001.tar -` -> `00001.tar`."""
    names = re.findall(r"[^\s/'\"=?&]+\.tar\b", url)
    return names[-1] if names else url.removeprefix(PIPE)


def cut(whole: TarChunk, chunk_size: int, limit: int | None) -> Iterator[TarChunk]:
    """Chunks of a tar, found by reading its headers. A tar that is damaged from the start on is one item."""
    starts, damaged = scan(whole.url, limit)
    for first in range(0, len(starts) or 1, chunk_size):
        size, last = min(chunk_size, len(starts) - first), first + chunk_size >= len(starts)
        offset = starts[first] if starts else 0
        yield replace(whole, offset=offset, first=first, num_items=size or 1, to_end=damaged and last)


def scan(url: str, limit: int | None) -> tuple[list[int], bool]:
    """Where the first `limit` samples begin, and whether the tar was found damaged on the way."""
    starts: list[int] = []
    stem = None
    try:
        with open_tar(url) as tar:
            for info in headers(tar):
                if stem_of(info.name) != stem:
                    if len(starts) == limit:
                        return starts, False
                    starts.append(info.offset)
                    stem = stem_of(info.name)
    except TAR_ERRORS:
        return starts, True
    return starts, not starts  # an empty tar is taken for a damaged one


@contextmanager
def open_tar(url: str, offset: int = 0) -> Iterator[tarfile.TarFile]:
    """A local tar from `offset` on; any other from its start, as a stream."""
    with open_stream(url) as file:
        if not is_remote(url):
            file.seek(offset)
        with tarfile.open(fileobj=file, mode="r|" if is_remote(url) else "r:", tarinfo=StrictTarInfo) as tar:
            yield tar


@contextmanager
def open_stream(url: str) -> Iterator[IO[bytes]]:
    if not url.startswith(PIPE):
        with ExitStack() as stack:
            with client_errors(url):
                file = stack.enter_context(fsspec.open(url, "rb"))
            yield RemoteFile(file, url) if is_remote(url) else file
        return
    with tempfile.TemporaryFile() as messages:
        command = url.removeprefix(PIPE)
        process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=messages, start_new_session=True)
        try:
            yield process.stdout
            check_ended(process, messages)
        except (tarfile.TarError, ValueError):
            check_ended(process, messages)
            raise
        finally:
            stop_group(process)


class RemoteFile:
    """What tarfile reads a stream by; whatever fails is an OSError."""

    def __init__(self, file: IO[bytes], url: str) -> None:
        self.file, self.url = file, url

    def read(self, size: int) -> bytes:
        with client_errors(self.url):
            return self.file.read(size)


@contextmanager
def client_errors(url: str) -> Iterator[None]:
    """What a file system's client raises as OSErrors, which aiohttp's refusals and broken connections are not.

    Raises:
        OSError: anything failed.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{url} cannot be read: {type(error).__name__}: {error}") from error


def check_ended(process: subprocess.Popen, messages: IO[bytes]) -> None:
    """
    Raises:
        OSError: the command failed; with the end of what it said.
    """
    while process.stdout.read(1 << 20):
        pass
    if code := process.wait():
        messages.seek(0)
        said = messages.read().decode("utf-8", "replace").strip()[-200:]
        raise OSError(f"the command ended with {code}: {said}")


def stop_group(process: subprocess.Popen) -> None:
    """The shell and what it started."""
    process.stdout.close()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Files in the order of the tar, without keeping a record of each."""
    while (info := tar.next()) is not None:
        tar.members.clear()
        if info.isfile():
            yield info


class MemberFile(NamedTuple):
    """A file of a tar."""

    extension: str  # all behind the first dot
    size: int
    data: bytes  # empty where there are more than the source takes


def grouped(tar: tarfile.TarFile, max_bytes: int) -> Iterator[tuple[str, list[MemberFile]]]:
    """Samples of a tar: what their files' names begin with, and the files."""
    for stem, infos in itertools.groupby(headers(tar), lambda info: stem_of(info.name)):
        yield stem, [read_member(tar, info, stem, max_bytes) for info in infos]


def read_member(tar: tarfile.TarFile, info: tarfile.TarInfo, stem: str, max_bytes: int) -> MemberFile:
    data = tar.extractfile(info).read() if info.size <= max_bytes else b""
    if info.size <= max_bytes and len(data) != info.size:
        raise EOFError(f"{info.name} ends after {len(data)} of {info.size} bytes")
    return MemberFile(info.name.removeprefix(f"{stem}.").lower(), info.size, data)


def stem_of(name: str) -> str:
    """`a/b.c.d` -> `a/b`, as WebDataset reads it."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.split(".", 1)[0])


def read_record(data: bytes | None) -> dict:
    """img2dataset's json; damage there does not cost the picture."""
    try:
        record = json.loads(data or b"{}")
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def stamp_of(url: str) -> str:
    """Size and time or tag of a tar; empty for a command, and where a server does not tell.

    Raises:
        ValueError: a protocol that is not known, or needs another package.
    """
    if url.startswith(PIPE):
        return ""
    if is_remote(url):
        return remote_stamp(url)
    status = os.stat(url)
    return f"{status.st_size}-{status.st_mtime_ns}"


def remote_stamp(url: str) -> str:
    system, path = open_file_system(url)
    try:
        with client_errors(url):
            info = system.info(path)
    except OSError:  # reading it will say so
        return ""
    return f"{info.get('size')}-{stamp_in(info)}"


# Reading --------------------------------------------------------------------------------------------------------------


def is_remote(path: str) -> bool:
    return path.startswith(PIPE) or "://" in path


def absolute(path: str) -> str:
    """A worker may stand in another folder."""
    return path if is_remote(path) else os.path.abspath(os.path.expanduser(path))


def local_path(path: str) -> Path:
    """`file://` and `~` are understood; any other url gives a path at which nothing is."""
    return Path(absolute(path.removeprefix("file://")))


def is_below(folder: Path, path: str) -> bool:
    """Whether a folder is the one at `path` or lies in it."""
    raw = local_path(path)
    return raw.is_dir() and folder.resolve().is_relative_to(raw.resolve())


def is_beside(folder: Path, path: str) -> bool:
    """Whether a folder is where the file or pattern at `path` lies."""
    raw = local_path(path)
    return not raw.is_dir() and folder.resolve() == raw.parent.resolve()


def open_file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"source.path={url}: {error}.") from error


def read_bytes(root: str, path: str) -> bytes:
    """What a network fails to deliver is an error rather than a rejection: it may be there when tried again."""
    try:
        if not is_remote(root):
            return (Path(root) / path).read_bytes()
        system, base = open_file_system(root)
        return system.cat_file(posixpath.join(base, path))
    except OSError as error:
        if is_remote(root) and not isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise Rejected("unreadable", f"{type(error).__name__}: {error.strerror or error}") from error


def decode_text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected("caption_not_utf8", str(error)) from error


def suffix(path: str) -> str:
    return posixpath.splitext(path)[1].lower().lstrip(".")


def extension_of(path: str) -> str:
    extension = suffix(path) or path
    return {"jpeg": "jpg"}.get(extension, extension)


def reject(reason: str, error: Exception) -> Sample:
    raise Rejected(reason, f"{type(error).__name__}: {error}")
