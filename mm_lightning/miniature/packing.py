"""The people as they are committed, one compressed archive for each split, and the way back to shards, byte for byte.

A still lies in the shards several times, as a target and as other samples' reference; compression leaves one of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import lzma
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mm_lightning.files import temporary_path, write_bytes, write_json
from mm_lightning.miniature.layout import KINDS, SETTINGS_NAME, SPLITS, read_index
from mm_lightning.miniature.queries import QUERIES_NAME, load_queries
from mm_lightning.prepare.shards import INDEX_NAME, OFFSETS_SUFFIX, damaged_shards, offsets_text, stored_size

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets" / "people"
MANIFEST_NAME = "manifest.json"
# The window holds a whole split, so that every repetition is found; unpacking takes as much memory.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 27}]
REMEDY = "Render people instead: `python -m mm_lightning.miniature.world render`."


def pack(people: Path, out: Path = ASSETS) -> int:
    """Shards -> `{split}.tar.xz` and `manifest.json`; the same shards give the same bytes. Returns the size in bytes.

    Raises:
        FileNotFoundError: the people are not finished, or their queries are missing.
        ValueError: a shard is damaged, or the queries are those of other stills.
    """
    settings = read_settings(people)
    splits = finished_splits(people)
    for split in splits:
        check_whole(people / split)
        load_queries(people / split)
    out.mkdir(parents=True, exist_ok=True)
    archives = {split: pack_split(people / split, out / f"{split}.tar.xz") for split in splits}
    write_json(out / MANIFEST_NAME, {"people": settings, "archives": archives})
    for stale in set(out.glob("*.tar.xz")) - {out / f"{split}.tar.xz" for split in splits}:
        stale.unlink()
    num_bytes = sum(archive["num_bytes"] for archive in archives.values())
    logger.info(
        "%s: %.2f MB (%s)", out, num_bytes / 1e6, ", ".join(f"{s} {a['num_bytes']}" for s, a in archives.items())
    )
    return num_bytes


def unpack(out: Path, assets: Path = ASSETS) -> Path:
    """Archives -> shards, unless they are there; returns `out`. A split appears whole or not at all.

    Raises:
        FileNotFoundError: the archives are not there.
        ValueError: an archive is damaged, or `out` holds other people.
    """
    manifest = read_manifest(assets)
    if (out / SETTINGS_NAME).is_file():
        if read_settings(out) != manifest["people"]:
            raise ValueError(f"{out} holds other people than {assets}: name another folder, or remove this one first.")
        if all(is_whole(out / split) for split in manifest["archives"]):
            logger.info("%s: up to date, kept.", out)
            return out
    out.mkdir(parents=True, exist_ok=True)
    for split, archive in tqdm(manifest["archives"].items(), desc="unpacking", unit="split"):
        unpack_split(assets / f"{split}.tar.xz", archive["sha256"], out / split)
    write_json(out / SETTINGS_NAME, manifest["people"])
    return out


def require_people(folder: str | Path) -> Path:
    """The folder with people in it: those that are there, else those that come with the package.

    Raises:
        FileNotFoundError, ValueError: as `unpack`.
    """
    folder = Path(folder)
    return folder if is_finished(folder) else unpack(folder)


# What is there --------------------------------------------------------------------------------------------------------


def is_finished(people: Path) -> bool:
    if not (people / SETTINGS_NAME).is_file():
        return False
    counts = read_settings(people)["settings"]
    wanted = [
        people / s / k
        for s in SPLITS
        for k, n in (("images", "stills"), ("videos", "clips"))
        if counts[s] and counts[n]
    ]
    return all((folder / INDEX_NAME).is_file() for folder in wanted)


def check_people(folder: str | Path) -> None:
    """Raise what `require_people` would, as far as that can be told without unpacking."""
    if not is_finished(Path(folder)):
        read_manifest(ASSETS)


def finished_splits(people: Path) -> list[str]:
    if not is_finished(people):
        raise FileNotFoundError(f"{people} holds no finished people: run `world render` to the end.")
    return [split for split in SPLITS if (people / split).is_dir()]


def read_settings(people: Path) -> dict[str, Any]:
    """What the people were made with.

    Raises:
        FileNotFoundError: nobody was finished there.
    """
    file = people / SETTINGS_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{people} holds no finished people ({SETTINGS_NAME} is missing). {REMEDY}")
    return json.loads(file.read_text())


def read_manifest(assets: Path) -> dict[str, Any]:
    file = assets / MANIFEST_NAME
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: this installation comes without people. {REMEDY}")
    return json.loads(file.read_text())


def kinds_of(split: Path) -> list[Path]:
    return [split / name for name in KINDS if (split / name).is_dir()]


def is_whole(split: Path) -> bool:
    with contextlib.suppress(FileNotFoundError, ValueError):
        check_whole(split)
        return bool(kinds_of(split))
    return False


def check_whole(split: Path) -> None:
    """
    Raises:
        ValueError: a shard is not what the index says.
    """
    for folder in kinds_of(split):
        if damaged := damaged_shards(folder):
            raise ValueError(f"{folder}: {', '.join(damaged)} damaged; remove {split} and unpack or render it again.")


# One split ------------------------------------------------------------------------------------------------------------


def pack_split(split: Path, file: Path) -> dict[str, Any]:
    """Returns "num_bytes" and "sha256" of the archive."""
    temporary = temporary_path(file)
    with lzma.open(temporary, "wb", filters=FILTERS) as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
        for path in tqdm(list(packed_files(split)), desc=f"packing {split.name}", unit="file"):
            member = tarfile.TarInfo(path.relative_to(split).as_posix())
            member.size, member.mode = path.stat().st_size, 0o644
            with path.open("rb") as source:
                tar.addfile(member, source)
    temporary.replace(file)
    return {"num_bytes": file.stat().st_size, "sha256": file_sha256(file)}


def packed_files(split: Path) -> Iterator[Path]:
    """All but the offsets beside the tars, which follow from these."""
    yield split / QUERIES_NAME
    for folder in kinds_of(split):
        yield folder / INDEX_NAME
        yield from (folder / shard["name"] for shard in read_index(folder)["shards"])


def unpack_split(archive: Path, sha256: str, split: Path) -> None:
    """
    Raises:
        FileNotFoundError, ValueError: the archive is missing or damaged.
    """
    if not archive.is_file():
        raise FileNotFoundError(
            f"{archive} is missing, though its manifest names it: fetch the package again. {REMEDY}"
        )
    if file_sha256(archive) != sha256:
        raise ValueError(f"{archive} is damaged, its checksum is not the manifest's: fetch it again. {REMEDY}")
    with tempfile.TemporaryDirectory(dir=split.parent, prefix=f".{split.name}.") as scratch:
        fresh = Path(scratch, split.name)
        with lzma.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            tar.extractall(fresh, filter="data")
        for folder in kinds_of(fresh):
            for shard in read_index(folder)["shards"]:
                write_offsets(folder / shard["name"], shard["sha256"])
        check_whole(fresh)
        put_in_place(fresh, split)


def put_in_place(fresh: Path, split: Path) -> None:
    """Another process that does the same at the same time does no harm."""
    if is_whole(split):
        return
    try:
        fresh.rename(split)
    except OSError as error:
        if not is_whole(split):
            raise ValueError(f"{split} holds something else, or damaged shards: remove it first.") from error


def write_offsets(shard: Path, sha256: str) -> None:
    """The file beside a tar by which readers enter it, as `mm_lightning.prepare.shards.TarWriter` leaves it."""
    data = shard.read_bytes()
    places: dict[str, dict[str, tuple[int, int, int]]] = {}
    sizes = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            key, _, name = member.name.partition(".")
            content = data[member.offset_data : member.offset_data + member.size]
            places.setdefault(key, {})[name] = (member.offset_data, member.size, zlib.crc32(content))
            if name == "json":
                sizes[key] = stored_size(content)
    text = offsets_text(list(places.items()), [sizes[key] for key in places], len(data), sha256)
    write_bytes(shard.with_name(shard.name + OFFSETS_SUFFIX), text.encode())


def file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
