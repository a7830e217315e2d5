"""Items through the stages, in a process of their own: what crashes there costs one item.

`ItemWorker` starts that process, hands it chunks and reads results item by item. When it dies, the item it was at is
tried once more, alone in a fresh process; if that dies too the item is rejected, and the rest goes on. Where both died
before they had read an item from a chunk of unknown length, the chunk ends there.
"""

from __future__ import annotations

import base64
import io
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

import numpy as np
from hydra.utils import instantiate
from PIL import Image

from mm_lightning.prepare.sample import Rejected, Sample, Stage
from mm_lightning.prepare.shards import check_key, to_bytes
from mm_lightning.prepare.sources import Chunk, Item

READ, FINISH = "read", "finish"  # what the engine itself does before and behind the stages
CRASHED, TIMED_OUT, ERROR = "worker_crashed", "timed_out", "error"
THUMBNAIL_SIZE = 112
START_TIMEOUT = 600.0  # seconds in which a process must have built its stages
MAX_GROWTH = 4 << 30  # bytes by which a process may grow over its first chunk before it is replaced; decoders leak
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


# One item -------------------------------------------------------------------------------------------------------------


class Accepted(NamedTuple):
    """A finished sample: the files that go into the shard, and what is known about it as a whole."""

    key: str
    fields: dict[str, bytes]
    summary: dict[str, Any]


@dataclass
class StageCount:
    """What one stage did: how many samples came in and went out, how long it took, and why some did not pass."""

    num_in: int = 0
    num_out: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: StageCount) -> StageCount:
        return StageCount(
            self.num_in + other.num_in,
            self.num_out + other.num_out,
            self.seconds + other.seconds,
            self.reasons + other.reasons,
        )

    def as_dict(self) -> dict[str, Any]:
        counts = {"in": self.num_in, "out": self.num_out, "rejected": self.reasons.total()}
        return {**counts, "reasons": dict(self.reasons), "seconds": round(self.seconds, 3)}

    @classmethod
    def from_dict(cls, counts: dict[str, Any]) -> StageCount:
        return cls(counts["in"], counts["out"], counts["seconds"], Counter(counts["reasons"]))


@dataclass
class ItemResult:
    """What became of one item."""

    accepted: list[Accepted] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, StageCount] = field(default_factory=dict)

    def count(self, stage: str) -> StageCount:
        return self.counts.setdefault(stage, StageCount())

    @property
    def failed(self) -> bool:
        return any(record["reason"].split(":")[0] in (ERROR, CRASHED, TIMED_OUT) for record in self.rejected)


class Chain:
    """Stages in a row.

    Args:
        stages: by name, in their order.
        seed: with a sample's key, of the global random generators, should a stage use them.
        watch: told the name of each stage before it is entered.
    """

    def __init__(self, stages: dict[str, Stage], seed: int = 0, watch: Callable[[str], None] = lambda name: None):
        self.stages, self.seed, self.watch = list(stages.items()), seed, watch

    def __call__(self, item: Item) -> ItemResult:
        result = ItemResult()
        blank = Sample(item.key, "", item.source)
        for sample in self.attempt(result, READ, blank, lambda _: [item.load()]):
            self.descend(result, sample, 0)
        return result

    def descend(self, result: ItemResult, sample: Sample, position: int) -> None:
        """A sample through the stages from `position` on; of several that a stage gives, one after the other."""
        if position == len(self.stages):
            for accepted in self.attempt(result, FINISH, sample, lambda sample: [finish(sample)]):
                result.accepted.append(accepted)
            return
        name, stage = self.stages[position]
        for following in self.attempt(result, name, sample, stage):
            self.descend(result, following, position + 1)

    def attempt(self, result: ItemResult, name: str, sample: Sample, stage: Callable) -> Iterator:
        """What `stage` makes of the sample; a rejection or an unexpected error is recorded."""
        count = result.count(name)
        count.num_in += 1
        seed_everything(self.seed, sample.key)
        self.watch(name)
        passed = 0
        try:
            for following in timed(lambda: stage(sample), count):
                passed += 1
                count.num_out += 1
                yield following
                self.watch(name)
            if not passed:
                raise Rejected("nothing_left", "the stage gave no sample and no reason")
        except Rejected as rejection:
            record(result, name, sample, rejection.reason, rejection.detail)
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
            record(result, name, sample, f"{ERROR}:{type(error).__name__}", detail, last_lines(error))


def timed(produce: Callable, count: StageCount) -> Iterator:
    """Iterates over what `produce` returns, a generator included, and adds the time that it takes."""
    start = time.perf_counter()
    try:
        for product in produce():
            count.seconds += time.perf_counter() - start
            yield product
            start = time.perf_counter()
    finally:
        count.seconds += max(time.perf_counter() - start, 0.0)


def record(
    result: ItemResult, stage: str, sample: Sample, reason: str, detail: str = "", trace: str | None = None
) -> None:
    result.count(stage).reasons[reason] += 1
    entry = {"key": sample.key, "source": sample.source, "stage": stage, "reason": reason, "detail": detail[:300]}
    picture = thumbnail(sample)
    result.rejected.append(
        entry | ({"trace": trace} if trace else {}) | ({"thumbnail": picture} if picture else {}),
    )


def last_lines(error: Exception) -> str:
    return "".join(traceback.format_exception(error))[-1500:]


def finish(sample: Sample) -> Accepted:
    """The files of a sample and its summary.

    Raises:
        Rejected: no target, no caption, or a key that no tar can hold.
    """
    if not sample.data or not sample.extension:
        raise Rejected("no_target", "no stage left an encoded target")
    if sample.caption is None:
        raise Rejected("no_caption")
    try:
        check_key(sample.key)
    except ValueError as error:
        raise Rejected("unusable_key", str(error)) from error
    own = {sample.extension: sample.data, "txt": sample.caption, "json": sample.meta}
    fields = {name: to_bytes(value) for name, value in (own | sample.fields).items()}
    return Accepted(sample.key, fields, summarise(sample))


# Summaries ------------------------------------------------------------------------------------------------------------


def summarise(sample: Sample) -> dict[str, Any]:
    """A sample in about a kilobyte, for set-wide stages and the report: the meta data with one face for all frames."""
    boxes = [face["box"] for face in sample.meta.get("faces") or [] if face]
    meta = dict(sample.meta)
    if "faces" in meta:
        meta["faces"] = [{"box": sorted(boxes, key=face_size)[len(boxes) // 2]}] if boxes else []
    if "references" in meta:
        meta["references"] = [{"similarity": reference.get("similarity")} for reference in meta["references"]]
    summary = {"key": sample.key, "source": sample.source, "kind": sample.kind, "meta": meta}
    summary |= {"embedding": sample.embedding, "measures": measure(sample, boxes), "thumbnail": thumbnail(sample)}
    return summary


def measure(sample: Sample, boxes: list[list[float]]) -> dict[str, float]:
    """What the report draws histograms of."""
    meta = sample.meta
    others = [r for r in meta.get("references") or [] if r.get("kind") != "own"]  # the own crop is the target itself
    similarities = [r["similarity"] for r in others if r.get("similarity") is not None]
    measures: dict[str, float] = {"caption_words": len((sample.caption or "").split())}
    if boxes:
        measures["face_size"] = statistics.median(map(face_size, boxes))
    if similarities:
        measures["similarity"] = max(similarities)
    if meta.get("motion") is not None:
        measures["motion"] = meta["motion"]
    if meta.get("fps"):
        measures["clip_seconds"] = meta.get("num_frames", 0) / meta["fps"]
    return {name: round(float(value), 4) for name, value in measures.items()}


def face_size(box: list[float]) -> float:
    """Side of the square of the same area, pixels."""
    return max((box[2] - box[0]) * (box[3] - box[1]), 0.0) ** 0.5


def pack_summary(summary: dict[str, Any]) -> dict[str, Any]:
    """As JSON can hold it."""
    embedding = summary["embedding"]
    if embedding is not None:
        embedding = base64.b64encode(np.ascontiguousarray(embedding, "<f4").tobytes()).decode()
    return summary | {"embedding": embedding}


def unpack_summary(summary: dict[str, Any]) -> dict[str, Any]:
    """The inverse; the embedding (E,) float32."""
    if summary["embedding"] is None:
        return summary
    return summary | {"embedding": np.frombuffer(base64.b64decode(summary["embedding"]), "<f4")}


def thumbnail(sample: Sample) -> str | None:
    """The middle frame as a small JPEG in base64, where one is decoded."""
    with suppress(Exception):  # a picture for the report must not cost the sample
        if len(sample.frames):
            picture = Image.fromarray(sample.frames[len(sample.frames) // 2])
            picture.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), reducing_gap=2.0)
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=72)
            return base64.b64encode(buffer.getvalue()).decode()
    return None


# The process that runs them -------------------------------------------------------------------------------------------


def build_stages(configs: dict[str, dict[str, Any]]) -> dict[str, Stage]:
    """Stages out of `_target_` and arguments, by name."""
    return {name: instantiate(config) for name, config in configs.items()}


def serve(connection: Connection) -> None:
    """Takes chunks, sends back each item's result. Ends when the other side does."""
    configs, seed = connection.recv()
    chain = Chain(build_stages(configs), seed, watch=lambda name: connection.send(("stage", name)))
    connection.send(("ready", None))
    while True:
        chunk, start, stop = connection.recv()
        items = chunk.items(start)
        for position in range(start, stop or sys.maxsize):
            connection.send(("next", position))
            item = next(items, None)
            if item is None:
                break
            connection.send(("item", (item.key, item.source)))
            connection.send(("result", chain(item)))
        connection.send(("end", resident_bytes()))


class Died(Exception):  # noqa: N818, an event that is recovered from
    """The process ended; `detail` says how, `arrived` whether the item had been read from its chunk."""

    def __init__(self, arrived: bool, key: str, source: str, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.arrived, self.key, self.source, self.reason, self.detail = arrived, key, source, reason, detail

    def result(self) -> ItemResult:
        """The item as rejected."""
        result = ItemResult()
        result.count(READ).num_in += 1
        record(result, READ, Sample(self.key, "", self.source), self.reason, self.detail)
        return result


class ItemWorker:
    """Runs chunks through stages in a process that may crash.

    Args:
        configs: `_target_` and arguments of each stage, by name.
        seed: of the set.
        item_timeout: seconds that a stage may take for a sample; then the item is given up.
        directory: where the process works, so that relative paths mean what they did for the user; left alone where
            there is no such directory.
    """

    def __init__(
        self,
        configs: dict[str, dict[str, Any]],
        seed: int = 0,
        item_timeout: float = 3600.0,
        directory: str | None = None,
    ) -> None:
        self.configs, self.seed, self.item_timeout = configs, seed, item_timeout
        self.directory = directory if directory and os.path.isdir(directory) else None
        self.process: subprocess.Popen | None = None
        self.connection: Connection | None = None
        self.first_bytes: int | None = None

    def __call__(self, chunk: Chunk) -> Iterator[ItemResult]:
        """Results in the order of the items."""
        start = 0
        while True:
            try:
                for result in self.run(chunk, start):
                    start += 1
                    yield result
                return
            except Died as first:
                try:
                    yield self.run_alone(chunk, start)
                except Died as second:
                    yield second.result()
                    if not (first.arrived or second.arrived) and chunk.num_items is None:  # there may be no end
                        return
                start += 1

    def run_alone(self, chunk: Chunk, position: int) -> ItemResult:
        """Once more in a fresh process, so that nothing which came before has a part in it; raises as `run`."""
        self.close()
        try:
            return next(self.run(chunk, position, position + 1), ItemResult())
        finally:
            self.close()

    def run(self, chunk: Chunk, start: int, stop: int | None = None) -> Iterator[ItemResult]:
        """
        Raises:
            Died: the process ended, or was ended because an item took too long.
        """
        self.open()
        arrived, key, source, stage = False, f"{chunk.name}-{start}", chunk.name, READ
        try:
            self.connection.send((chunk, start, stop))
            while (message := self.receive(self.item_timeout))[0] != "end":
                kind, content = message
                if kind == "next":
                    arrived, key, source, stage = False, f"{chunk.name}-{content}", chunk.name, READ
                elif kind == "item":
                    arrived, (key, source) = True, content
                elif kind == "stage":
                    stage = content
                else:
                    yield content
        except (EOFError, OSError) as error:
            timed_out = isinstance(error, TimeoutError)
            how = f"after {self.item_timeout:.0f} s" if timed_out else self.ending()
            self.close()
            raise Died(arrived, key, source, TIMED_OUT if timed_out else CRASHED, f"in {stage}, {how}") from error
        self.recycle(message[1])

    def receive(self, timeout: float) -> tuple[str, Any]:
        """
        Raises:
            TimeoutError, EOFError, OSError: nothing came, the process is gone.
        """
        if not self.connection.poll(timeout):
            raise TimeoutError
        return self.connection.recv()

    def open(self) -> None:
        """Starts the process, where none runs.

        Raises:
            RuntimeError: it could not build the stages.
        """
        if self.process is not None:
            return
        self.connection, other = Pipe()
        environment = os.environ | dict.fromkeys(THREAD_VARIABLES, "1")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-m", __name__, str(other.fileno()), str(os.getpid())]
        self.process = subprocess.Popen(
            command, env=environment, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL, cwd=self.directory
        )
        other.close()
        try:
            self.connection.send((self.configs, self.seed))
            self.receive(START_TIMEOUT)
        except (EOFError, OSError) as error:
            how = self.ending()
            self.close()
            raise RuntimeError(f"a worker process could not build the stages: it ended {how}.") from error

    def recycle(self, size: int) -> None:
        self.first_bytes = self.first_bytes or size
        if size > self.first_bytes + MAX_GROWTH:
            self.close()

    def ending(self) -> str:
        """How the process ended, in words."""
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(10)
            return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return "without a word"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.connection.close()
        self.process = self.connection = self.first_bytes = None

    def __del__(self) -> None:
        with suppress(Exception):
            self.close()


class InProcess:
    """The same without a process of its own, for a debugger; a crash ends the run."""

    def __init__(self, configs: dict[str, dict[str, Any]], seed: int = 0) -> None:
        one_thread()
        self.chain = Chain(build_stages(configs), seed)

    def __call__(self, chunk: Chunk) -> Iterator[ItemResult]:
        yield from map(self.chain, chunk.items())

    def close(self) -> None:
        pass


def seed_everything(seed: int, key: str) -> None:
    """The global generators, whichever are loaded: what a stage draws depends on nothing but seed and key."""
    number = int.from_bytes(f"{seed}/{key}".encode("utf-8", "backslashreplace"), "little") % (2**32 - 5)
    random.seed(number)
    np.random.seed(number)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(number)


def one_thread() -> None:
    """Sums depend on how many threads share them."""
    for name in THREAD_VARIABLES:
        os.environ.setdefault(name, "1")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def resident_bytes() -> int:
    """Of this process; 0 where the system does not tell."""
    with suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def end_with(parent: int) -> None:
    """Ends this process when its parent is gone, also in the middle of an item."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


if __name__ == "__main__":
    descriptor, parent = map(int, sys.argv[1:3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's affair
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    # Under its importable name, so that what is sent is of the classes that the other side knows.
    from mm_lightning.prepare import worker

    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        worker.serve(Connection(descriptor))
