"""Raw material through a chain of stages into shards, on a laptop or a Ray cluster, with the same bytes as result.

    source's chunks --ItemWorker on Ray Data--> {work}/{hash}/{chunk}.tar, .jsonl --SetStages, ShardWriter--> out

A chunk's files appear whole or not at all and hold all that is known about it: an interrupted run does the chunks that
are missing. Their folder's name is a hash of what decides about them (the stages' configs, models, versions, the seed),
theirs one of the files they were made from, so that results of other settings or other files are never taken for these.

Ray Data schedules the chunks, and starts again what is lost with a node. It does not isolate what crashes: it would
hand the same chunk to the next actor until all have died of it. So each actor runs the stages in a process below it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mm_lightning.files import write_json
from mm_lightning.prepare.report import PAGE_NAME, Report, without_picture, write_report
from mm_lightning.prepare.sample import Rejected, models_of
from mm_lightning.prepare.shards import INDEX_NAME, ShardWriter, own_files
from mm_lightning.prepare.sources import Chunk, Source
from mm_lightning.prepare.watch import TooManyErrorsError, Watch, progress_bar
from mm_lightning.prepare.work import WorkFolder, library_versions, locked
from mm_lightning.prepare.worker import FINISH, READ, InProcess, ItemWorker, StageCount, build_stages, unpack_summary

logger = logging.getLogger(__name__)

FORMAT = 1  # of the files in the work folder; part of the hash
PACKED_NAME = "packed.json"  # in the work folder: of what the shards were made
CONNECT_TIMEOUT = 10.0  # seconds
OBJECT_STORE = 256 << 20  # bytes, of a local Ray; chunks are small


class SetStage(Protocol):
    """One job over the whole set, between the stages and the packing. Arguments of the constructor are its config."""

    name: str
    reasons: tuple[str, ...]

    def __call__(self, summaries: list[dict[str, Any]]) -> dict[str, Rejected]:
        """Summaries of all samples in canonical order (`worker.summarise`: "key", "source", "kind", "meta",
        "embedding" (E,) float32 or None, "measures") -> the samples to leave out, by key."""
        ...


# Running chunks -------------------------------------------------------------------------------------------------------


class ChunkActor:
    """What Ray Data calls with a row per chunk; it writes the chunk's outcome and gives back its status."""

    def __init__(self, folder: str, configs: dict, seed: int, item_timeout: float, directory: str) -> None:
        self.work = WorkFolder(Path(folder))
        self.worker = ItemWorker(configs, seed, item_timeout, directory)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        name = str(row["name"])
        if not self.work.is_done(name):  # Ray repeats what it believes to be lost
            self.work.write(name, self.worker(pickle.loads(row["chunk"])))
        return {"name": name}


def run_here(work: WorkFolder, pending: list[tuple[str, Chunk]], configs: dict, seed: int) -> Iterator[str]:
    worker = InProcess(configs, seed)
    for name, chunk in pending:
        work.write(name, worker(chunk))
        yield name


@contextmanager
def ray_running(num_cpus: int, address: str | None) -> Iterator[Any]:
    """Ray as it is, or joined at `address`, or started here and ended afterwards.

    Raises:
        ValueError: not installed, or nothing answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of Ray Data's own doings
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "workers >= 1 need Ray: pip install 'magicmirror-lightning[prepare]'; or workers=0."
        ) from error
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        options |= {"num_cpus": num_cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    else:
        check_address(address)
    try:
        ray.init(address=address or "local", **options)
    except ConnectionError as error:
        raise ValueError(f"ray_address={address}: no cluster answers there ({str(error).splitlines()[0]}).") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Ray itself goes on trying for minutes.

    Raises:
        ValueError: nothing listens at the host and port.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isdigit()):
        return  # such as `auto`
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT).close()
    except OSError as error:
        raise ValueError(f"ray_address={address}: no cluster answers there ({error}).") from error


def run_on_ray(ray: Any, pending: list[tuple[str, Chunk]], workers: int, resources: dict, arguments: dict) -> Iterator:
    """Names of chunks as they get done."""
    import ray.data as ray_data

    context = ray_data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    rows = [{"name": name, "chunk": pickle.dumps(chunk)} for name, chunk in pending]
    pool = ray_data.ActorPoolStrategy(size=min(workers, len(rows)), max_tasks_in_flight_per_actor=2)
    done = ray_data.from_items(rows, override_num_blocks=len(rows)).map(
        ChunkActor, fn_constructor_kwargs=arguments, compute=pool, **resources
    )
    for row in done.iter_rows():
        yield str(row["name"])


# The whole ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepResult:
    """What a set-wide step leaves out."""

    name: str
    count: StageCount
    left_out: dict[str, Rejected]

    def record(self, summary: dict[str, Any]) -> dict[str, Any]:
        """As a stage's rejection is recorded."""
        rejection = self.left_out[summary["key"]]
        found = {name: summary[name] for name in ("key", "source", "thumbnail") if name in summary}
        return found | {"stage": self.name, "reason": rejection.reason, "detail": rejection.detail[:300]}


@dataclass
class Outcome:
    """What the report says of a run as a whole."""

    start: float
    num_done_before: int = 0
    stopped: str | None = None
    steps: list[StepResult] = field(default_factory=list)
    index: dict[str, Any] | None = None


@dataclass
class Preparation:
    """A run from source to shards.

    Args:
        source: what is prepared.
        stages: `_target_` and arguments of each stage, by name and in order; None leaves one out.
        set_stages: the same for steps over the whole set.
        out: folder of the shards, `index.json` and the report.
        work: folder of what is done so far; `{out}.work` by default. It may go when the shards are there. On a
            cluster, all nodes must see it.
        samples_per_shard: at most.
        chunk_size: items in a chunk. Another size starts anew.
        workers: processes; 0 runs all in this one, None takes as many as there are CPUs.
        ray_address: of a running cluster, such as `auto` or `ray://head:10001`; None starts Ray here.
        cpus_per_worker, gpus_per_worker: what Ray reserves for each.
        limit: a dry run: only the first items, only a report.
        seed: of every random choice, with the sample's key.
        max_error_share: of the items may fail unexpectedly (an exception of a stage, a crash, no end); with more, the
            run stops. Fewer than `MIN_FAILURES` never stop it.
        item_timeout: seconds that a stage may take for a sample.
        retry_failed: do chunks again in which something failed unexpectedly.
        record: whatever is to be kept in the report besides, such as the command's configuration.

    Raises:
        ValueError, FileNotFoundError: an argument that cannot be, nothing to prepare, another run at work.
        TooManyErrorsError: see `max_error_share`.
    """

    source: Source
    stages: dict[str, dict[str, Any] | None]
    out: str | Path
    set_stages: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    work: str | Path | None = None
    samples_per_shard: int = 512
    chunk_size: int = 16
    workers: int | None = None
    ray_address: str | None = None
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    limit: int | None = None
    seed: int = 0
    max_error_share: float = 0.05
    item_timeout: float = 3600.0
    retry_failed: bool = False
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check()
        self.out = Path(self.out).expanduser()
        self.base = Path(self.work or f"{self.out}.work").expanduser()
        self.stages = {name: config for name, config in self.stages.items() if config is not None}
        self.set_stages = {name: config for name, config in self.set_stages.items() if config is not None}
        self.check_place()
        built = build_stages(self.stages)  # so that a wrong argument is told before anything starts
        self.set_steps: dict[str, SetStage] = build_stages(self.set_stages)
        self.settings = {
            "format": FORMAT,
            "stages": self.stages,
            "stage_versions": {name: getattr(stage, "version", 1) for name, stage in built.items()},
            "seed": self.seed,
            "versions": library_versions(),
        }
        if models := {name: found for name, stage in built.items() if (found := models_of(stage))}:
            self.settings["models"] = models
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=False, default=str).encode()).hexdigest()[:12]
        self.folder = self.base / digest
        self.done = WorkFolder(self.folder)
        self.report_folder = self.folder / "dry_run" if self.limit else self.out

    def check(self) -> None:
        for name, least in (("samples_per_shard", 1), ("chunk_size", 1), ("workers", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: give at least {least}.")
        if not 0 <= self.max_error_share <= 1:
            raise ValueError(f"max_error_share={self.max_error_share}: give a share from 0 to 1.")
        if self.item_timeout <= 0:
            raise ValueError(f"item_timeout={self.item_timeout}: give seconds above 0.")
        if not any(self.stages.values()):
            raise ValueError("no stages: nothing would decode the items.")

    def check_place(self) -> None:
        """Shards among the raw files would be raw files of the next run.

        Raises:
            ValueError: they would be, or files of the shards' names are there that no run wrote.
        """
        for name, folder in (("out", self.out), ("work", self.base)):
            if self.source.reads_from(folder):
                raise ValueError(f"{name}={folder} lies in source.path={self.source.path}; give one outside of it.")
        own_files(self.out)

    def run(self) -> dict[str, Any]:
        """Does what is missing, packs, reports.

        Returns:
            What `report.json` holds.
        """
        with locked(self.base):
            self.begin()
            chunks = self.list_chunks()
            names = [name for name, _ in chunks]
            outcome = Outcome(time.monotonic())
            try:
                outcome.num_done_before = self.run_chunks(chunks)
            except TooManyErrorsError as error:
                outcome.stopped = str(error)
                self.report([name for name in names if self.done.is_done(name)], outcome)
                raise TooManyErrorsError(f"{error} The report: {self.report_folder / PAGE_NAME}") from error
            outcome.steps = self.run_set_steps(names)
            left_out = {key for step in outcome.steps for key in step.left_out}
            accepted = any(summary["key"] not in left_out for summary in self.summaries(names))
            if accepted and self.limit is None:
                outcome.index = self.pack(names, left_out)
            report = self.report(names, outcome)
        if not accepted:  # an earlier set in `out` is left as it is
            raise ValueError(f"no sample was accepted; {self.report_folder / PAGE_NAME} says why.")
        return report

    def begin(self) -> None:
        self.folder.mkdir(exist_ok=True)
        write_json(self.folder / "manifest.json", {**self.settings, "record": self.record})
        for stale in self.folder.glob("*.tmp"):
            stale.unlink(missing_ok=True)
        others = [path for path in self.base.iterdir() if path.is_dir() and path != self.folder]
        if others:
            logger.info("%s: work of %d other settings is kept there and not used", self.base, len(others))

    # Chunks

    def list_chunks(self) -> list[tuple[str, Chunk]]:
        chunks = enumerate(self.source.chunks(self.chunk_size, self.limit))
        return [(self.done.name(index, chunk), chunk) for index, chunk in chunks]

    def run_chunks(self, chunks: list[tuple[str, Chunk]]) -> int:
        """
        Returns:
            Items that an earlier run has done.
        """
        done = {name: self.done.status(name) for name, _ in chunks if self.done.is_done(name)}
        if self.retry_failed:
            done = {name: status for name, status in done.items() if not status["num_failed"]}
        pending = [(name, chunk) for name, chunk in chunks if name not in done]
        num_items = sum(status["num_items"] for status in done.values())
        if done:
            logger.info("%d items in %d of %d chunks are done already", num_items, len(done), len(chunks))
        for name, _ in pending:
            self.done.lines(name).unlink(missing_ok=True)
        watch = Watch(chunks, self.max_error_share)
        for status in done.values():
            watch.add(status)
        if pending:
            with self.running(pending) as names, watch:
                for name in names:
                    watch.advance(self.done.status(name))
        return num_items

    @contextmanager
    def running(self, pending: list[tuple[str, Chunk]]) -> Iterator[Iterator[str]]:
        if self.workers == 0:
            yield run_here(self.done, pending, self.stages, self.seed)
            return
        local = self.workers or max(int((os.cpu_count() or 1) // self.cpus_per_worker), 1)
        with ray_running(max(int(local * self.cpus_per_worker), 1), self.ray_address) as ray:
            available = int(ray.cluster_resources().get("CPU", 1) // self.cpus_per_worker)
            workers = self.workers or max(available, 1)
            if workers > available:
                raise ValueError(f"workers={workers}: the cluster has CPUs for {available}.")
            resources = {"num_cpus": self.cpus_per_worker}
            if self.gpus_per_worker:
                resources["num_gpus"] = self.gpus_per_worker
            arguments = {"folder": str(self.folder.resolve()), "configs": self.stages, "seed": self.seed}
            arguments |= {"item_timeout": self.item_timeout, "directory": os.getcwd()}
            yield run_on_ray(ray, pending, workers, resources, arguments)

    # The set

    def summaries(self, names: list[str]) -> Iterator[dict[str, Any]]:
        """Of the accepted samples; of several with one key, the first."""
        seen: set[str] = set()
        for name in names:
            for record in self.done.records(name):
                summary = record.get("accepted")
                if summary is not None and summary["key"] not in seen:
                    seen.add(summary["key"])
                    yield unpack_summary(without_picture(summary))

    def run_set_steps(self, names: list[str]) -> list[StepResult]:
        results: list[StepResult] = []
        summaries = list(self.summaries(names)) if self.set_steps else []
        for name, step in self.set_steps.items():
            start = time.perf_counter()
            found = step(summaries)
            left_out = {summary["key"]: found[summary["key"]] for summary in summaries if summary["key"] in found}
            count = StageCount(len(summaries), len(summaries) - len(left_out), time.perf_counter() - start)
            count.reasons.update(rejection.reason for rejection in left_out.values())
            results.append(StepResult(name, count, left_out))
            summaries = [summary for summary in summaries if summary["key"] not in left_out]
        return results

    # Shards

    def pack(self, names: list[str], left_out: set[str]) -> dict[str, Any]:
        """Shards and `index.json`, unless those that are there were made of the same chunks.

        Returns:
            The index.
        """
        made_of = {"chunks": names, "left_out": sorted(left_out), "samples_per_shard": self.samples_per_shard}
        digest = hashlib.sha256(json.dumps([self.folder.name, made_of]).encode()).hexdigest()
        if (index := self.packed(digest)) is not None:
            logger.info("%s: the shards are there already", self.out)
            return index
        (self.base / PACKED_NAME).unlink(missing_ok=True)
        with ShardWriter(self.out, self.source.kind, self.samples_per_shard) as writer, progress_bar() as progress:
            task = progress.add_task("packing", total=len(names), text="chunks")
            for name in names:
                for key, fields in self.done.samples(name):
                    if key not in left_out and key not in writer.keys:
                        writer.write(key, fields)
                progress.advance(task)
        write_json(self.base / PACKED_NAME, {"made_of": digest, "index_sha256": self.index_sha256()})
        return writer.index()

    def index_sha256(self) -> str:
        """Of the index that lies in `out`; OSError where none does."""
        return hashlib.sha256((self.out / INDEX_NAME).read_bytes()).hexdigest()

    def packed(self, digest: str) -> dict[str, Any] | None:
        try:
            record = json.loads((self.base / PACKED_NAME).read_text())
            if record != {"made_of": digest, "index_sha256": self.index_sha256()}:
                return None
            index = json.loads((self.out / INDEX_NAME).read_text())
            sizes = [(self.out / shard["name"]).stat().st_size for shard in index["shards"]]
        except (OSError, ValueError, KeyError):
            return None
        return index if sizes == [shard["num_bytes"] for shard in index["shards"]] else None

    # The report

    def report(self, names: list[str], outcome: Outcome) -> dict[str, Any]:
        report = Report([READ, *self.stages, FINISH, *(step.name for step in outcome.steps)])
        steps = {key: step for step in outcome.steps for key in step.left_out}
        seen: set[str] = set()
        for name in names:
            report.add_status(self.done.status(name))
            for record in self.done.records(name):
                if "rejected" in record:
                    report.add_rejected(record["rejected"])
                elif (key := record["accepted"]["key"]) in seen:
                    report.add_double(record["accepted"])
                elif key in steps:
                    report.add_rejected(steps[key].record(record["accepted"]))
                else:
                    report.add_accepted(record["accepted"])
                if "accepted" in record:
                    seen.add(record["accepted"]["key"])
        report.add_counts({step.name: step.count for step in outcome.steps})
        self.report_folder.mkdir(parents=True, exist_ok=True)
        return write_report(self.report_folder, report, self.facts(names, outcome))

    def facts(self, names: list[str], outcome: Outcome) -> dict[str, Any]:
        return {
            "kind": self.source.kind,
            "source": self.source.name,
            "dry_run": self.limit,
            "seconds": round(time.monotonic() - outcome.start, 1),
            "num_chunks": len(names),
            "num_done_before": outcome.num_done_before,
            "stopped": outcome.stopped,
            "index": outcome.index,
            "work": str(self.folder),
            "versions": self.settings["versions"],
            "config": self.record or {"stages": self.stages, "set_stages": self.set_stages},
        }
