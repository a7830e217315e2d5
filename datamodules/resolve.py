"""Patterns -> shards."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import braceexpand

from datamodules.shard_cache import PIPE, is_remote, read_text
from datamodules.tars import Shard

logger = logging.getLogger(__name__)

INDEX_NAME = "index.json"
SHARD_NAME = re.compile(r"(?!-)[\w.-]+(/[\w.-]+)*")  # nothing that a shell takes for more than a name


class ShardSet(NamedTuple):
    """The shards that a pattern stands for."""

    shards: list[Shard]
    kind: str | None = None  # "image", "video", or None where no index says
    missing: tuple[str, ...] = ()  # urls that an index lists and that are not there

    @property
    def urls(self) -> list[str]:
        return [shard.url for shard in self.shards]

    @property
    def num_samples(self) -> int | None:
        """None where no index says."""
        counts = [shard.num_samples for shard in self.shards]
        return None if None in counts else sum(counts)


def resolve_sources(
    shards: str | Path | Iterable[str | Path] | Mapping[str, Any], weights: Mapping[str, float] | None
) -> tuple[dict[str, ShardSet], dict[str, float]]:
    """Finds the tars of one source or of several with names, without opening them.

    Raises:
        FileNotFoundError: a pattern matches nothing.
        ValueError: weights without sources or the other way round, and see `resolve_shards`.
    """
    named = isinstance(shards, Mapping)
    if named and weights is not None:
        weights = {name: weight for name, weight in weights.items() if name not in shards or shards[name] is not None}
    sources = {name: resolve_shards(s) for name, s in (shards.items() if named else [("", shards)]) if s is not None}
    if not sources:
        raise FileNotFoundError("no shards: the mixture has no source.")
    if weights is not None and (not named or set(weights) != set(sources)):
        there = sorted(sources) if named else "one source without a name"
        raise ValueError(f"weights are given for {sorted(weights)}, but shards has {there}; name the same sources.")
    _single_kind({name: found.kind for name, found in sources.items()})
    return sources, dict(weights) if weights is not None else dict.fromkeys(sources, 1)


def resolve_shards(shards: str | Path | Iterable[str | Path]) -> ShardSet:
    """Finds the tars that `shards` means, without opening them.

    Args:
        shards: a folder (its `index.json` lists the tars, else every `*.tar` in it), a tar, a glob, a brace pattern
            (`train-{000000..000007}.tar`), a URL of fsspec or `pipe:command`, or a list of these. An address that names
            an `index.json` (`s3://set/index.json`, `pipe:ssh host cat set/index.json`) stands for what that lists.

    Raises:
        FileNotFoundError: a pattern matches nothing, or all shards of an index are missing.
        ValueError: an index that is not one, or sets of different kinds.
    """
    patterns = [shards] if isinstance(shards, str | Path) else list(shards)
    if not patterns:
        raise FileNotFoundError("no shards: the list of shard patterns is empty.")
    parts = {str(pattern): _resolve_one(str(pattern)) for pattern in patterns}
    kind = _single_kind({pattern: part.kind for pattern, part in parts.items()})
    missing = tuple(url for part in parts.values() for url in part.missing)
    return ShardSet([shard for part in parts.values() for shard in part.shards], kind, missing)


def _single_kind(kinds: dict[str, str | None]) -> str | None:
    found = set(kinds.values()) - {None}
    if len(found) > 1:
        raise ValueError(f"shards: sets of different kinds {kinds}; give one kind per data module.")
    return next(iter(found), None)


def _resolve_one(pattern: str) -> ShardSet:
    if is_remote(pattern):
        return _from_address(pattern)
    path = Path(pattern).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.name == INDEX_NAME and path.is_file():
        return _from_folder(path.parent)
    if path.is_file():
        return ShardSet([Shard(str(path))])
    return _from_pattern(str(path))


def _from_address(address: str) -> ShardSet:
    if INDEX_NAME in address:
        try:
            text = read_text(address)
        except OSError as error:
            raise FileNotFoundError(f"no shards: {address} cannot be read ({error}).") from error
        return _listed(text, address, lambda name: address.replace(INDEX_NAME, name))
    urls = [address] if address.startswith(PIPE) else braceexpand.braceexpand(address)
    return ShardSet([Shard(url) for url in urls])


def _from_folder(folder: Path) -> ShardSet:
    if (folder / INDEX_NAME).is_file():
        return _from_index(folder)
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    if not urls:
        raise FileNotFoundError(f"no shards: {folder} holds neither {INDEX_NAME} nor *.tar. {_content(folder)}{_HINT}")
    return ShardSet([Shard(url) for url in urls])


def _from_index(folder: Path) -> ShardSet:
    """What is missing is noted; a folder is listed once, which costs the same for ten shards and for ten thousand."""
    path = folder / INDEX_NAME
    found = _listed(path.read_text(encoding="utf-8"), str(path), lambda name: str(folder / name))
    present = {entry.path for entry in os.scandir(folder)}
    missing = tuple(url for url in found.urls if url not in present and not os.path.isfile(url))
    if len(missing) == len(found.shards):
        names = [os.path.relpath(url, folder) for url in missing[:5]]
        raise FileNotFoundError(f"{path} lists shards that are missing, all of them: {names}. {_content(folder)}")
    return found._replace(missing=missing)


def _listed(text: str, name: str, url_of: Any) -> ShardSet:
    try:
        index = json.loads(text)
        shards = [
            Shard(url_of(_checked(s["name"])), int(s["num_samples"]), s.get("num_bytes"), s.get("sha256"))
            for s in index["shards"]
        ]
        kind = index.get("kind")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: not an index of shards ({error!r}); write the set again with prepare.") from error
    if not sum(shard.num_samples for shard in shards):
        raise FileNotFoundError(f"no shards: {name} lists none.{_HINT}")
    return ShardSet([shard for shard in shards if shard.num_samples], kind)


def _checked(name: str) -> str:
    """
    Raises:
        ValueError: a name that leads out of the folder of the index, or that a shell would not take for one word.
    """
    if not SHARD_NAME.fullmatch(name) or ".." in name.split("/"):
        raise ValueError(f"the shard name {name!r} is no path below the index of letters, digits, '_', '.' and '-'")
    return name


def _from_pattern(pattern: str) -> ShardSet:
    urls = []
    for part in braceexpand.braceexpand(pattern):
        found = sorted(glob.glob(part))
        if not found:
            folder = Path(part).parent
            raise FileNotFoundError(f"no shards matched {part!r} (pattern {pattern!r}). {_content(folder)}{_HINT}")
        urls += found
    return ShardSet([Shard(url) for url in urls])


_HINT = (
    " `python -m mm_lightning.prepare` makes shards, `python -m mm_lightning.prepare.samples --out data/samples` a "
    "small set, `python -m mm_lightning.miniature.cache` those of the miniature."
)


def _content(folder: Path) -> str:
    if not folder.is_dir():
        return f"The folder {folder} does not exist."
    names = sorted(path.name for path in folder.iterdir())
    listed = ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
    return f"{folder} holds: {listed or 'nothing'}."
