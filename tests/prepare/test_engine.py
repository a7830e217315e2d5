"""The same bytes whatever runs them, whatever happens on the way; every sample that is lost is counted."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import ray

from mm_lightning.prepare import engine, worker
from mm_lightning.prepare.engine import Preparation
from mm_lightning.prepare.sample import Sample
from mm_lightning.prepare.shards import ShardWriter, damaged_shards
from mm_lightning.prepare.sources import ImageFolder, Img2datasetTars
from mm_lightning.prepare.watch import TooManyErrorsError, Watch
from mm_lightning.prepare.work import WorkFolder
from tests.prepare.small_stages import HERE, SET_STAGES, STAGES, Unreadable, draw_pictures
from tests.prepare.stages.onnx_detector import write_detector

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"chunk_size": 4, "samples_per_shard": 10, "max_error_share": 1.0}


@pytest.fixture(scope="module")
def ray_session():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Thirty, one of which raises and one of which vanishes."""
    return draw_pictures(tmp_path_factory.mktemp("raw"), 30, {12: "raise", 20: "vanish"})


def prepared(source, out, stages=STAGES, **options):
    source = source if not isinstance(source, Path) else ImageFolder(str(source), "pictures")
    return Preparation(source, stages, out, **{"set_stages": SET_STAGES, "workers": 0} | SIZES | options)


def shards(folder):
    """Everything that a reader of the set sees."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".tar" or path.stem == "index"}


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    """Shards and report of a run in one process."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    report = prepared(pictures, out).run()
    return shards(out), report


def rows(report):
    return {row["stage"]: row for row in report["funnel"]}


def reasons(report):
    return {(row["stage"], row["reason"]): row["count"] for row in report["reasons"]}


# The same bytes


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_bytes(workers, pictures, undisturbed, tmp_path, ray_session):
    report = prepared(pictures, tmp_path / "out", workers=workers).run()
    assert shards(tmp_path / "out") == undisturbed[0]
    assert reasons(report) == reasons(undisturbed[1])
    assert len(undisturbed[0]) > 3


def test_relative_paths_mean_the_same_to_workers(pictures, undisturbed, tmp_path, monkeypatch, ray_session):
    monkeypatch.chdir(pictures.parent)
    prepared(ImageFolder(pictures.name, "pictures"), os.path.relpath(tmp_path / "out"), workers=1).run()
    assert shards(tmp_path / "out") == undisturbed[0]


def test_chunks_of_another_size_give_the_same_bytes(pictures, undisturbed, tmp_path):
    prepared(pictures, tmp_path / "out", chunk_size=7).run()
    assert shards(tmp_path / "out") == undisturbed[0]


def test_shards_hold_the_samples_in_order_and_whole(pictures, undisturbed, tmp_path):
    prepared(pictures, tmp_path / "out").run()
    assert damaged_shards(tmp_path / "out") == []
    keys = []
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            keys += [name.split(".")[0] for name in names if name.endswith(".json")]
            assert len(names) == 4 * sum(name.endswith(".json") for name in names)
    assert keys == sorted(keys)
    assert len(keys) == undisturbed[1]["num_accepted"] == len(set(keys))


def test_what_a_stage_draws_depends_on_seed_and_key_alone(pictures, undisturbed, tmp_path):
    prepared(pictures, tmp_path / "out", seed=1).run()
    assert shards(tmp_path / "out") != undisturbed[0]


# Interrupted

KILLED = """
import sys
from mm_lightning.prepare.engine import Preparation
from mm_lightning.prepare.sources import ImageFolder
from tests.prepare.small_stages import SET_STAGES, STAGES
Preparation(ImageFolder(sys.argv[1], "pictures"), STAGES, sys.argv[2], SET_STAGES, workers=int(sys.argv[3]),
            chunk_size=4, samples_per_shard=10, max_error_share=1.0).run()
"""


def start(pictures, out, workers):
    command = [sys.executable, "-c", KILLED, str(pictures), str(out), str(workers)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)


def kill_when(process, condition, delay=0.0):
    """SIGKILL `delay` seconds after `condition` holds."""
    deadline = time.monotonic() + 60
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.wait()


def test_killed_at_random_moments_and_started_again(pictures, undisturbed, tmp_path):
    """Each attempt is killed when it has got one step further than the last: within chunks, between, while packing."""
    random, out, kills = np.random.default_rng(0), tmp_path / "out", 0
    for step in (1, 3, 5, 7, 8):
        process = start(pictures, out, 0)

        def far_enough(step=step):
            chunks = len(list(tmp_path.glob("out.work/*/*.jsonl")))
            return chunks >= step or (step == 8 and len(list(out.glob("*.tar"))) > 1)

        kill_when(process, far_enough, random.uniform(0, 0.01))
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 3
    assert start(pictures, out, 0).wait() == 0
    assert shards(out) == undisturbed[0]
    assert not list(tmp_path.rglob("*.tmp"))


def test_killed_with_workers_and_started_again(pictures, undisturbed, tmp_path, ray_session):
    out = tmp_path / "out"
    kill_when(start(pictures, out, 2), lambda: len(list(tmp_path.glob("out.work/*/*.jsonl"))) >= 2)
    report = prepared(pictures, out, workers=2).run()
    assert shards(out) == undisturbed[0]
    assert 8 <= report["num_done_before"] < 30


@pytest.mark.parametrize("moment", ["chunk tar", "chunk record", "shard", "index"])
def test_ended_at_every_kind_of_moment(moment, pictures, undisturbed, tmp_path, monkeypatch):
    """The process ends right before a file gets its name; each kind of file, and not the first of it."""
    out, replace = tmp_path / "out", os.replace
    pattern = {"chunk tar": "*-*.tar", "chunk record": "*.jsonl", "shard": "train-*.tar", "index": "index.json"}[moment]
    seen = []

    def ending(source, target):
        if Path(target).match(pattern) and (moment != "chunk tar" or "train" not in str(target)):
            seen.append(target)
            if len(seen) == (1 if moment == "index" else 3):
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", ending)
    with pytest.raises(KeyboardInterrupt):
        prepared(pictures, out).run()
    monkeypatch.undo()
    assert not (out / "index.json").exists()
    for path in tmp_path.rglob("*.tar"):
        with tarfile.open(path) as tar:  # whole
            assert len(tar.getmembers()) % 4 == 0
    prepared(pictures, out).run()
    assert shards(out) == undisturbed[0]


def test_only_what_is_missing_is_done(pictures, tmp_path, monkeypatch):
    prepared(pictures, tmp_path / "out").run()
    lines = sorted(tmp_path.glob("out.work/*/*.jsonl"))
    lines[2].unlink()
    loaded = []
    monkeypatch.setattr(worker.Chain, "__call__", lambda self, item: loaded.append(item.key) or worker.ItemResult())
    prepared(pictures, tmp_path / "out").run()
    assert len(lines) == 8
    assert len(loaded) == 4


def test_a_finished_set_is_left_alone(pictures, tmp_path, monkeypatch):
    report = prepared(pictures, tmp_path / "out").run()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    again = prepared(pictures, tmp_path / "out").run()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")} == before
    assert (again["num_accepted"], again["num_done_before"]) == (report["num_accepted"], 30)


def test_a_lost_shard_is_packed_again(pictures, undisturbed, tmp_path):
    prepared(pictures, tmp_path / "out").run()
    (tmp_path / "out" / "train-000001.tar").unlink()
    prepared(pictures, tmp_path / "out").run()
    assert shards(tmp_path / "out") == undisturbed[0]


def test_packing_holds_no_more_than_a_sample(tmp_path):
    megabytes = 30
    result = worker.ItemResult([worker.Accepted(f"k{i}", {"mp4": bytes(1 << 20)}, {}) for i in range(megabytes)])
    summary = {"embedding": None}
    result.accepted = [accepted._replace(summary=summary) for accepted in result.accepted]
    work = WorkFolder(tmp_path)
    work.write("chunk", [result])
    del result
    tracemalloc.start()
    with ShardWriter(tmp_path / "out", "video", megabytes) as writer:
        for key, fields in work.samples("chunk"):
            writer.write(key, fields)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert writer.index()["num_samples"] == megabytes
    assert peak < 5 << 20


# Other settings, other files


def test_a_changed_config_is_not_mixed_with_old_work(pictures, tmp_path):
    wide = STAGES | {"width": {"_target_": f"{HERE}.MinimumWidth", "least": 30}}
    prepared(pictures, tmp_path / "out").run()
    changed = prepared(pictures, tmp_path / "out", wide).run()
    alone = prepared(pictures, tmp_path / "alone", wide).run()
    assert shards(tmp_path / "out") == shards(tmp_path / "alone")
    assert reasons(changed) == reasons(alone)
    assert changed["num_done_before"] == 0
    assert len([path for path in (tmp_path / "out.work").iterdir() if path.is_dir()]) == 2


def test_a_changed_step_over_the_set_needs_no_new_work(pictures, tmp_path):
    prepared(pictures, tmp_path / "out").run()
    report = prepared(pictures, tmp_path / "out", set_stages={}).run()
    assert report["num_done_before"] == 30
    alone = prepared(pictures, tmp_path / "alone", set_stages={}).run()
    assert shards(tmp_path / "out") == shards(tmp_path / "alone")
    assert report["num_accepted"] == alone["num_accepted"] == rows(report)["finish"]["out"]


def test_a_changed_file_is_read_anew(tmp_path):
    raw = draw_pictures(tmp_path / "raw", 10)
    prepared(raw, tmp_path / "out").run()
    changed = next(raw.rglob("*000.txt"))
    changed.write_text("a man, changed")
    report = prepared(raw, tmp_path / "out").run()
    assert report["num_done_before"] == 6  # of three chunks, all but that which holds the file
    assert "a man, changed" in b"".join(shards(tmp_path / "out").values()).decode("latin1")


def test_a_stage_of_another_version_is_another_stage(pictures, tmp_path, monkeypatch):
    from tests.prepare.small_stages import Fate

    first = prepared(pictures, tmp_path / "out").folder
    monkeypatch.setattr(Fate, "version", 2, raising=False)
    assert prepared(pictures, tmp_path / "out").folder != first


STAGES_WITH_MODELS = [
    ("faces.DetectFaces", ["detector"]),
    ("faces.SplitPeople", ["detector"]),
    ("identity.EmbedIdentity", ["recognizer"]),
    ("video.TrackFace", ["detector", "recognizer"]),
    ("references.OtherMoments", ["detector", "recognizer"]),
]


@pytest.mark.parametrize(("stage", "models"), STAGES_WITH_MODELS)
def test_other_weights_under_the_same_name_are_other_work(stage, models, pictures, tmp_path):
    files = {name: tmp_path / f"{name}.onnx" for name in models}
    stages = {"one": {"_target_": f"mm_lightning.prepare.stages.{stage}", **{n: str(f) for n, f in files.items()}}}
    for file in files.values():
        file.write_bytes(b"one")
    folders = [prepared(pictures, tmp_path / "out", stages).folder]
    assert prepared(pictures, tmp_path / "out", stages).folder == folders[0]
    for file in files.values():
        file.write_bytes(b"two")
        folders.append(prepared(pictures, tmp_path / "out", stages).folder)
    assert len(set(folders)) == len(folders)


def test_a_detector_that_appears_is_another_one(pictures, tmp_path):
    faces = {"_target_": "mm_lightning.prepare.stages.faces.DetectFaces", "detector": "auto", "root": str(tmp_path)}
    before = prepared(pictures, tmp_path / "out", {"faces": faces}).folder
    write_detector(tmp_path / "models/buffalo_l/det_10g.onnx")
    assert prepared(pictures, tmp_path / "out", {"faces": faces}).folder != before


def test_a_set_that_another_run_wrote_is_written_anew(pictures, undisturbed, tmp_path):
    """With the same work folder, that of the first run, still there."""
    prepared(pictures, tmp_path / "out").run()
    other = draw_pictures(tmp_path / "raw", 5)
    prepared(other, tmp_path / "out", work=tmp_path / "other.work").run()
    assert shards(tmp_path / "out") != undisturbed[0]
    prepared(pictures, tmp_path / "out").run()
    assert shards(tmp_path / "out") == undisturbed[0]


def test_two_runs_do_not_share_a_folder(pictures, tmp_path):
    with (
        engine.locked(tmp_path / "out.work"),
        pytest.raises(ValueError, match=r"out\.work: another run is at work here"),
    ):
        prepared(pictures, tmp_path / "out").run()


# Crashes and errors


@pytest.fixture(scope="module")
def dangerous(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("dangerous"), 12, {1: "crash", 6: "crash", 8: "raise"})


def test_a_crash_costs_one_sample(dangerous, tmp_path, ray_session):
    report = prepared(dangerous, tmp_path / "out", workers=2).run()
    found = {(row["stage"], row["reason"]): row for row in report["reasons"]}
    assert {key: row["count"] for key, row in found.items()} == {
        ("read", "worker_crashed"): 2,
        ("width", "narrow"): 2,
        ("fate", "error:KeyError"): 1,
        **({("even", "byte"): rows(report)["even"]["rejected"]} if rows(report)["even"]["rejected"] else {}),
    }
    crashed = found["read", "worker_crashed"]["examples"]
    assert {example["source"] for example in crashed} == {"pictures:a/Zoë 001.png", "pictures:b/Zoë 006.png"}
    assert {example["detail"] for example in crashed} == {"in fate, by SIGSEGV"}
    assert report["num_failed"] == 3
    healthy = prepared(draw_pictures(tmp_path / "raw", 12, {8: "raise"}), tmp_path / "healthy", set_stages={}).run()
    assert rows(healthy)["fate"]["in"] == rows(report)["fate"]["in"] + 2


def test_a_process_that_dies_of_what_came_before_costs_nothing(pictures, monkeypatch):
    """The item at which it died passes when it is alone."""
    chunk = next(iter(ImageFolder(str(pictures)).chunks(6)))
    items = worker.ItemWorker(STAGES)
    results = []
    for result in items(chunk):
        results.append(result)
        if len(results) == 2:
            items.process.kill()
            items.process.wait()
    items.close()
    expected = list(worker.InProcess(STAGES)(chunk))
    assert [[a.key for a in r.accepted] for r in results] == [[a.key for a in r.accepted] for r in expected]
    assert [r.rejected for r in results] == [r.rejected for r in expected]


def test_a_chunk_that_cannot_be_read_ends():
    items = worker.ItemWorker(STAGES)
    results = list(islice(items(Unreadable()), 3))
    items.close()
    [[record]] = [result.rejected for result in results]
    assert (record["key"], record["reason"]) == ("unreadable-0", "worker_crashed")
    assert record["detail"] == "in read, by SIGSEGV"


def test_an_item_without_end_is_given_up(tmp_path):
    raw = draw_pictures(tmp_path / "raw", 3, {0: "sleep"})
    items = worker.ItemWorker(STAGES, item_timeout=0.7)
    results = list(items(next(iter(ImageFolder(str(raw)).chunks(3)))))
    items.close()
    assert [[record["reason"] for record in result.rejected] for result in results] == [[], ["timed_out"], []]
    assert results[1].rejected[0]["detail"] == "in fate, after 1 s"


def test_an_unexpected_error_is_counted_with_stage_and_type(undisturbed):
    row = next(row for row in undisturbed[1]["reasons"] if row["reason"].startswith("error"))
    assert (row["stage"], row["reason"], row["count"]) == ("fate", "error:KeyError", 1)
    assert "raise KeyError(sample.key)" in row["examples"][0]["trace"]
    assert undisturbed[1]["num_failed"] == 1


def test_too_many_errors_stop_the_run(tmp_path):
    raw = draw_pictures(tmp_path / "raw", 24, dict.fromkeys(range(0, 24, 3), "raise"))
    with pytest.raises(
        TooManyErrorsError, match=r"of \d+ items failed unexpectedly, .*0\.25 allows: 1x fate: KeyError"
    ) as e:
        prepared(raw, tmp_path / "out", max_error_share=0.25).run()
    assert "retry_failed=true" in str(e.value)
    assert not (tmp_path / "out" / "index.json").exists()
    assert "The run was stopped" in (tmp_path / "out" / "report.html").read_text()
    assert prepared(raw, tmp_path / "out", max_error_share=0.5).run()["num_failed"] == 7  # one is too narrow


def test_few_errors_do_not_stop_a_small_run():
    watch = Watch([], 0.0)
    watch.add({"num_items": 4, "num_accepted": 0, "num_failed": 4, "errors": {}})
    watch.check()


def test_failures_are_tried_again_when_asked(tmp_path, monkeypatch):
    raw = draw_pictures(tmp_path / "raw", 12, {1: "raise"})
    assert prepared(raw, tmp_path / "out").run()["num_failed"] == 1
    monkeypatch.setattr("tests.prepare.small_stages.Fate.__call__", lambda self, sample: [sample])
    assert prepared(raw, tmp_path / "out").run()["num_failed"] == 1
    report = prepared(raw, tmp_path / "out", retry_failed=True).run()
    assert (report["num_failed"], report["num_done_before"]) == (0, 8)


def test_stages_that_only_a_worker_cannot_build(pictures, tmp_path, monkeypatch):
    items = worker.ItemWorker({"decode": {"_target_": f"{HERE}.Nothing"}})
    with pytest.raises(RuntimeError, match="could not build the stages: it ended with exit code 1"):
        list(items(next(iter(ImageFolder(str(pictures)).chunks(2)))))


# What is reported


def check_sums(report):
    funnel = report["funnel"]
    for row in funnel:
        assert row["out"] == row["in"] - row["rejected"] + row["added"]
        assert row["rejected"] == sum(row["reasons"].values())
    for one, other in pairwise(funnel):
        assert one["out"] == other["in"]
    assert funnel[0]["in"] == report["num_items"]
    assert funnel[-1]["out"] == report["num_accepted"]
    assert sum(row["count"] for row in report["reasons"]) == report["num_rejected"]


def test_the_funnel_adds_up(undisturbed):
    report = undisturbed[1]
    check_sums(report)
    assert report["num_accepted"] == report["index"]["num_samples"]
    assert rows(report)["split"]["added"] > 0
    assert reasons(report)["width", "narrow"] == 6
    assert reasons(report)["fate", "nothing_left"] == reasons(report)["fate", "error:KeyError"] == 1


def test_two_samples_with_one_key(tmp_path):
    """Only the first is kept; the second is counted."""
    pack = tmp_path / "tars"
    pack.mkdir()
    picture = next(draw_pictures(tmp_path / "raw", 1).rglob("*.png")).read_bytes()
    with tarfile.open(pack / "0.tar", "w") as tar:
        for name in ("same.png", "other.png", "same.png"):
            for member, data in ((name, picture), (name.replace("png", "txt"), b"a man, well")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    report = prepared(Img2datasetTars(str(pack)), tmp_path / "out", set_stages={}).run()
    check_sums(report)
    assert reasons(report) == {("finish", "duplicate_key"): 1}
    assert report["index"]["num_samples"] == 2


def test_a_dry_run_reports_and_writes_no_shards(pictures, tmp_path):
    preparation = prepared(pictures, tmp_path / "out", limit=10)
    report = preparation.run()
    check_sums(report)
    assert (report["num_items"], report["dry_run"], report["index"]) == (10, 10, None)
    assert not (tmp_path / "out").exists()
    assert (preparation.report_folder / "report.html").is_file()
    full = prepared(pictures, tmp_path / "out").run()
    assert full["num_done_before"] == 8  # two whole chunks of the dry run


def test_nothing_accepted_is_said(tmp_path):
    raw = draw_pictures(tmp_path / "raw", 3, dict.fromkeys(range(3), "vanish"))
    with pytest.raises(ValueError, match=r"no sample was accepted; .*report\.html says why"):
        prepared(raw, tmp_path / "out").run()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["num_items"] == 3


def test_where_nothing_is_accepted_an_earlier_set_stays(pictures, undisturbed, tmp_path):
    prepared(pictures, tmp_path / "out").run()
    none = STAGES | {"width": {"_target_": f"{HERE}.MinimumWidth", "least": 3000}}
    with pytest.raises(ValueError, match="no sample was accepted"):
        prepared(pictures, tmp_path / "out", none).run()
    assert shards(tmp_path / "out") == undisturbed[0]


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        ([], None),
        ([{"kind": "own", "similarity": 1.0}], None),
        ([{"kind": "own", "similarity": 1.0}, {"kind": "moment", "similarity": 0.94}, {"similarity": 0.9}], 0.94),
    ],
)
def test_the_own_crop_does_not_count_as_similar(references, expected):
    sample = Sample("k", "image", "test", meta={"references": references})
    assert worker.summarise(sample)["measures"].get("similarity") == expected


def test_summaries_reach_the_steps_as_they_were(tmp_path):
    sample = worker.Sample("k", "image", "s", b"x", "png", "two words", {"faces": [None, {"box": [0, 0, 4, 9]}]})
    sample.embedding = np.array([0.1, -2.5, 3e-7], np.float32)
    summary = worker.summarise(sample)
    again = worker.unpack_summary(json.loads(json.dumps(worker.pack_summary(summary))))
    np.testing.assert_array_equal(again["embedding"], sample.embedding)
    assert again["meta"]["faces"] == [{"box": [0, 0, 4, 9]}]
    assert again["measures"] == {"caption_words": 2, "face_size": 6}


# Wrong use


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "workers=-1: give at least 0"),
        ({"chunk_size": 0}, "chunk_size=0: give at least 1"),
        ({"limit": 0}, "limit=0: give at least 1"),
        ({"max_error_share": 5}, "max_error_share=5: give a share from 0 to 1"),
        ({"item_timeout": 0}, "item_timeout=0: give seconds above 0"),
        ({"stages": {"decode": None}}, "no stages"),
    ],
)
def test_wrong_options(options, message, pictures, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepared(pictures, tmp_path / "out", **options)


def test_output_among_the_raw_files(pictures):
    with pytest.raises(ValueError, match=r"out=.* lies in source\.path="):
        prepared(pictures, pictures / "shards")


@pytest.fixture
def raw_tars(tmp_path, monkeypatch):
    """A folder of two tars that are called as shards are, in the user's home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "raw"
    folder.mkdir()
    for i in range(2):
        with tarfile.open(folder / f"train-00000{i}.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo(f"{i}.png"))
    return folder


@pytest.mark.parametrize(
    "path",
    ["~/raw", "{}", "{}/*.tar", "{}/train-{{000000..000001}}.tar", "{}/train-000001.tar", "file://{}/train-000000.tar"],
)
@pytest.mark.parametrize("in_list", [False, True])
def test_output_among_raw_tars(path, in_list, raw_tars):
    path = path.replace("{{", "{").replace("}}", "}").replace("{}", str(raw_tars))
    with pytest.raises(ValueError, match=r"out=.* lies in source\.path="):
        prepared(Img2datasetTars([path] if in_list else path), raw_tars)
    with pytest.raises(ValueError, match=r"work=.* lies in source\.path="):
        prepared(Img2datasetTars([path] if in_list else path), raw_tars.parent / "out", work=raw_tars)
    assert sorted(os.listdir(raw_tars)) == ["train-000000.tar", "train-000001.tar"]


def test_output_beside_a_raw_folder(raw_tars):
    prepared(Img2datasetTars(str(raw_tars)), raw_tars.parent)
    prepared(Img2datasetTars(f"{raw_tars}/*.tar"), raw_tars / "below")


def test_tars_that_no_run_wrote_are_told_before_the_work(pictures, raw_tars):
    with pytest.raises(ValueError, match=r"train-000000\.tar is not a shard that was written here"):
        prepared(pictures, raw_tars)
    assert not (raw_tars.parent / "raw.work").exists()


def test_places_in_the_home_folder(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    prepared(pictures, "~/out", work="~/work").run()
    assert (tmp_path / "out" / "index.json").is_file()
    assert (tmp_path / "work" / "packed.json").is_file()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_no_cluster_at_the_address(address, pictures, tmp_path):
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(ValueError, match=f"ray_address={address}: no cluster answers there"):
        prepared(pictures, tmp_path / "out", workers=1, ray_address=address).run()


@pytest.mark.slow
def test_a_cluster_that_is_there_already(pictures, undisturbed, tmp_path):
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    if ray.is_initialized():
        ray.shutdown()
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        prepared(pictures, tmp_path / "out", workers=None, ray_address=cluster.address).run()
        with pytest.raises(ValueError, match="workers=3: the cluster has CPUs for 2"):
            prepared(pictures, tmp_path / "other", workers=3, ray_address=cluster.address).run()
    finally:
        cluster.shutdown()
    assert shards(tmp_path / "out") == undisturbed[0]
