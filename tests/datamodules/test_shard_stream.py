"""Order, dealing and damage of the stream, on drawn shards."""

import json
import logging
import os
import tarfile
from collections import Counter
from itertools import islice

import pytest
import webdataset as wds

from datamodules.order import ShuffledOrder
from datamodules.resolve import resolve_shards
from datamodules.shard_cache import ShardCache
from datamodules.shards import (
    Bucket,
    BucketChooser,
    Catalog,
    DamagedSample,
    Position,
    ShardStream,
    SkipLog,
    SkippedSample,
    batch_places,
    choose_bucket,
)

STAND_IN = "-"


def key_of(sample, epoch, bucket):
    return sample["__key__"], epoch


def complete(sample, epoch, bucket):
    if not {"png", "txt", "json", "ref0.jpg"} < set(sample):
        raise DamagedSample("incomplete")
    return dict(sample)["__key__"], epoch


@pytest.fixture
def skip_log(tmp_path):
    return SkipLog(tmp_path / "skipped.jsonl")


@pytest.fixture
def stream(tmp_path, skip_log):
    """(shards, decode, ...) -> stream of batches, lists of what `decode` gave."""

    def make(shards, decode=key_of, batch_size=1, seed=0, shuffle_buffer=256, num_lanes=1, **options):
        catalog = Catalog({"": resolve_shards(shards)}, ShardCache(tmp_path / "cache", 10**8))
        order = catalog.order(seed, shuffle_buffer, num_lanes)
        make_stand_in = lambda item: (STAND_IN, item[1])  # noqa: E731
        return ShardStream(catalog, order, decode, list, make_stand_in, skip_log, batch_size=batch_size, **options)

    return make


def take(dataset, number):
    """Samples of the first batches."""
    return [item for batch in islice(iter(dataset), number) for item in batch]


def keys(dataset, number):
    return [key for key, _ in take(dataset, number)]


# Order


def test_unshuffled_is_what_webdataset_reads(make_shards, stream):
    folder = make_shards(10, 4)
    expected = [s["__key__"] for s in wds.WebDataset(resolve_shards(folder).urls, shardshuffle=False)]
    assert keys(stream(folder, seed=None), 10) == expected


@pytest.mark.parametrize(
    "form", ["{}", "file://{}/index.json", "pipe:cat {}/index.json", "pipe:cat {}/all.tar", "{}/*.tar"]
)
def test_wherever_the_shards_lie(make_shards, stream, form):
    folder = make_shards(9, 4 if "all" not in form else 9)
    if "all" in form:
        os.rename(folder / "train-000000.tar", folder / "all.tar")
    assert keys(stream(form.format(folder), seed=None), 10) == [*(f"s{i:03d}" for i in range(9)), "s000"]


def test_every_pass_holds_each_sample_once_in_its_own_order(make_shards, stream):
    samples = take(stream(make_shards(10, 4), seed=3), 30)
    passes = [[key for key, epoch in samples if epoch == number] for number in range(3)]
    assert [sorted(found) for found in passes] == [[f"s{i:03d}" for i in range(10)]] * 3
    assert len({tuple(found) for found in passes}) == 3


def test_the_seed_decides_the_order(make_shards, stream):
    folder = make_shards(10, 4)
    first, again, other = (take(stream(folder, seed=seed), 20) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("num_lanes", [1, 2, 3])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_together_deliver_the_batch_that_one_process_delivers(make_shards, stream, num_lanes, world_size):
    """More ranks than shards too."""
    folder, batch, steps = make_shards(10, 2), 2, 8
    options = {"num_lanes": num_lanes, "world_size": world_size, "batch_size": batch}
    alone = take(stream(folder, batch_size=batch * world_size, num_lanes=num_lanes), steps)
    ranks = [take(stream(folder, rank=rank, **options), steps) for rank in range(world_size)]
    for step in range(steps):
        joined = [sample for rank in ranks for sample in rank[step * batch : (step + 1) * batch]]
        whole = alone[step * batch * world_size : (step + 1) * batch * world_size]
        assert sorted(joined) == sorted(whole)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 7])
@pytest.mark.parametrize("first", [0, 6, 4098])
def test_workers_take_turns(num_workers, first):
    """In the order in which DataLoader asks them, from wherever a run goes on."""
    order = ShuffledOrder([50] * 9, 1, 16, 2)
    options = {"batch_size": 2, "rank": 1, "world_size": 3}
    alone = list(islice(batch_places(order, first, None, **options), 1200))
    workers = [
        batch_places(order, first, None, worker=worker, num_workers=num_workers, **options)
        for worker in range(num_workers)
    ]
    for i, (places, position) in enumerate(alone):
        found, where = next(workers[i % num_workers])
        assert where == position == first + 6 * i
        assert [v.tolist() for v in found] == [v.tolist() for v in places]
        expected = order.places(position, position + 6)
        assert [v.tolist() for v in places] == [v[1::3].tolist() for v in expected]


def test_the_end_of_a_finite_stream(make_shards, stream):
    folder = make_shards(10, 4)
    whole = take(stream(folder, num_samples=7), 100)
    assert whole == take(stream(folder), 7)
    ranks = [list(stream(folder, batch_size=2, num_samples=7, rank=r, world_size=2)) for r in (0, 1)]
    assert [[len(batch) for batch in rank] for rank in ranks] == [[2, 2], [2, 1]]
    assert sorted(item for rank in ranks for batch in rank for item in batch) == sorted(whole)


def test_going_on_at_a_position_equals_never_having_stopped(make_shards, stream):
    folder = make_shards(10, 4)
    whole = take(stream(folder), 40)
    for first in range(0, 32, 3):
        assert take(stream(folder, start=Position(first)), 8) == whole[first : first + 8]


def test_a_reader_touches_only_its_own_samples(make_shards, stream, monkeypatch):
    """No passing over: a run that goes on late, or one of many ranks, reads what it delivers and nothing else."""
    folder = make_shards(40, 8)
    read = Counter()
    monkeypatch.setattr("datamodules.tars.OpenTar.read", lambda self, name, field: read.update([field]) or b"")
    decode = lambda sample, epoch, bucket: (sample["txt"], epoch)  # noqa: E731
    take(stream(folder, decode, rank=3, world_size=4, start=Position(400)), 5)
    assert sum(read.values()) == 5


def test_lanes_keep_ranks_out_of_each_others_tars(make_shards, stream):
    folder = make_shards(32, 4)
    url_of = lambda sample, epoch, bucket: (sample["__url__"], epoch)  # noqa: E731
    options = {"num_lanes": 4, "world_size": 2}
    ranks = [set(keys(stream(folder, url_of, rank=rank, **options), 16)) for rank in (0, 1)]
    assert [len(urls) for urls in ranks] == [4, 4]
    assert ranks[0].isdisjoint(ranks[1])


# Damage


def broken_at(*indices):
    def decode(sample, epoch, bucket):
        if int(sample["__key__"][1:]) in indices:
            raise DamagedSample("drawn broken")
        return sample["__key__"], epoch

    return decode


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_a_stand_in_takes_the_place_of_a_damaged_sample(make_shards, stream, skip_log, batch_size):
    folder = make_shards(6, 6)
    found = keys(stream(folder, broken_at(2, 3), batch_size, seed=None), 6 // batch_size)
    assert found == ["s000", "s001", STAND_IN, STAND_IN, "s004", "s005"]
    assert {(s.key, s.reason) for s in skip_log.entries()} == {("s002", "drawn broken"), ("s003", "drawn broken")}


@pytest.mark.parametrize("num_lanes", [1, 3])
def test_every_healthy_sample_is_met_once_in_a_pass(make_shards, stream, num_lanes):
    folder = make_shards(11, 3)
    options = {"batch_size": 2, "num_lanes": num_lanes, "max_bad_share": 0.5, "world_size": 2}
    ranks = [take(stream(folder, broken_at(1, 2, 5), rank=rank, **options), 33) for rank in (0, 1)]
    met = Counter(item for rank in ranks for item in rank if item[0] != STAND_IN)
    healthy = {f"s{i:03d}" for i in range(11)} - {"s001", "s002", "s005"}
    assert met == Counter((key, epoch) for key in healthy for epoch in range(12))


def test_damage_shifts_no_rank(make_shards, stream):
    folder, decode = make_shards(10, 4), broken_at(1, 2, 5)
    alone = keys(stream(folder, decode, batch_size=2), 12)
    ranks = [keys(stream(folder, decode, rank=rank, world_size=2), 12) for rank in (0, 1)]
    assert ranks == [alone[0::2], alone[1::2]]


def test_a_sample_is_named_once_however_often_it_is_met(make_shards, stream, skip_log, caplog):
    folder = make_shards(3, 3)
    with caplog.at_level(logging.WARNING, "datamodules.shards"):
        take(stream(folder, broken_at(1)), 20)
        take(stream(folder, broken_at(1)), 20)
    assert [s.key for s in skip_log.entries()] == ["s001"]
    assert len([r for r in caplog.records if "s001" in r.getMessage()]) == 1


def place_of(path, name):
    with tarfile.open(path) as tar:
        member = tar.getmember(name)
        return member.offset, member.offset_data


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize(
    ("file", "behind"), [("s001.json", 0), ("s001.json", 100), ("s001.txt", 0), ("s001.txt", 512), ("s001.png", 520)]
)
def test_a_truncated_tar_gives_what_stands_before_the_cut(make_shards, stream, skip_log, file, behind, with_index):
    folder = make_shards(8, 4)
    path = folder / "train-000000.tar"
    os.truncate(path, place_of(path, file)[0] + behind)
    if not with_index:
        (folder / "train-000000.tar.index").unlink()
    found = keys(stream(folder, complete, seed=None), 8)
    assert found == ["s000", *[STAND_IN] * 3, "s004", "s005", "s006", "s007"]
    entries = skip_log.entries()
    assert {s.url for s in entries} == {str(path)}
    assert {s.key for s in entries if s.key} >= ({"s001", "s002", "s003"} if with_index else set())
    assert sum(s.num_samples for s in entries) == 3
    assert all("cut short" in s.reason or s.reason == "incomplete" for s in entries)


@pytest.mark.parametrize("name", ["s001.png", "s001.txt", "s001.json", "s001.ref0.jpg"])
def test_a_flipped_bit_costs_one_sample(make_shards, stream, skip_log, name):
    folder = make_shards(8, 4)
    path = folder / "train-000000.tar"
    data = bytearray(path.read_bytes())
    data[place_of(path, name)[1] + 5] ^= 8
    path.write_bytes(data)
    found = keys(stream(folder, complete, seed=None), 8)
    assert found == ["s000", STAND_IN, *(f"s{i:03d}" for i in range(2, 8))]
    assert [(s.key, s.reason.split(":")[0]) for s in skip_log.entries()] == [("s001", f"{name[5:]} was changed")]


@pytest.mark.parametrize("content", [b"", b"not a tar at all" * 100, None])
def test_an_empty_a_foreign_and_a_lost_tar(make_shards, stream, skip_log, content):
    folder = make_shards(8, 4)
    dataset = stream(folder, complete)
    path = folder / "train-000000.tar"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    else:
        (folder / "train-000000.tar.index").unlink()
    found = Counter(take(dataset, 16))
    assert {key for key, _ in found} == {"s004", "s005", "s006", "s007", STAND_IN}
    assert {key: n for key, n in found.items() if key[0] != STAND_IN} == {
        (f"s{i:03d}", epoch): 1 for i in range(4, 8) for epoch in (0, 1)
    }
    assert {s.url for s in skip_log.entries()} == {str(path)}
    assert sum(s.num_samples for s in skip_log.entries()) == 4


def test_too_much_damage_ends_the_run(make_shards, stream):
    folder = make_shards(20, 4)
    assert len(take(stream(folder, broken_at(3), max_bad_share=0.06), 1000)) == 1000
    with pytest.raises(
        RuntimeError, match=r"(?s)11 of the \d+ samples .*max_bad_share=0\.05: .*2 were skipped, the last: .*s00"
    ):
        take(stream(folder, broken_at(3, 4)), 1000)
    assert len(take(stream(folder, broken_at(3, 4)), 100)) == 100  # too few to judge


def test_a_lost_stretch_of_a_large_set_does_not_end_the_run(make_shards, stream):
    """20 of 400 are lost, but they are among the first 40."""
    folder = make_shards(400, 20)
    os.truncate(folder / "train-000000.tar", 1024)
    assert Counter(keys(stream(folder, complete, seed=None, num_lanes=2), 400))[STAND_IN] == 20
    with pytest.raises(RuntimeError, match="are damaged"):
        keys(stream(folder, complete, seed=None, max_bad_share=0.04), 400)


def test_nothing_readable_is_an_error_and_no_endless_loop(make_shards, stream):
    folder = make_shards(4, 4)
    with pytest.raises(RuntimeError, match=r"could be decoded\. 4 were skipped, the last: .*drawn broken"):
        take(stream(folder, broken_at(0, 1, 2, 3)), 1)
    (folder / "train-000000.tar").write_bytes(b"")
    (folder / "index.json").unlink()
    (folder / "train-000000.tar.index").unlink()
    with pytest.raises(RuntimeError, match="could be read"):
        take(stream(folder), 1)


def test_a_stand_in_is_found_beyond_a_long_gap(make_shards, stream):
    folder = make_shards(300, 100)
    dataset = stream(folder, seed=None, max_bad_share=1)
    for path in folder.glob("train-000000.tar*"):
        path.unlink()
    assert keys(dataset, 101)[-2:] == [STAND_IN, "s100"]


def test_shards_without_index_that_break_off_are_noted(make_shards, tmp_path):
    folder = make_shards(8, 4)
    os.truncate(folder / "train-000000.tar", place_of(folder / "train-000000.tar", "s001.json")[0])
    for path in (folder / "index.json", folder / "train-000000.tar.index"):
        path.unlink()
    (folder / "train-000002.tar").write_bytes(b"")
    catalog = Catalog({"": resolve_shards(folder)}, ShardCache(tmp_path / "cache", 10**8))
    assert catalog.counts("") == [1, 4, 0]
    assert [reason.split(":")[0] for reason in catalog.unreadable.values()] == ["cut short", "holds no sample"]


@pytest.mark.parametrize("address", ["{}/train-000001.tar", "file://{}/train-000001.tar"])
def test_what_cannot_be_counted_ends_the_run(make_shards, tmp_path, address):
    """Counted as empty, it would give this rank another order than those that can open it."""
    folder = make_shards(8, 4)
    shards = [str(folder / "train-000000.tar"), address.format(folder)]
    catalog = Catalog({"": resolve_shards(shards)}, ShardCache(tmp_path / "cache", 10**8))
    assert catalog.counts("") == [4, 4]
    (folder / "train-000001.tar").unlink()
    catalog.cache.folder = tmp_path / "empty"
    with pytest.raises(RuntimeError, match=r"000001\.tar: its samples cannot be counted \(.*No such file"):
        catalog.order(0, 16, 2)


@pytest.mark.parametrize("address", ["{}", "file://{}/index.json"])
def test_what_has_no_bucket_ends_the_run(make_shards, tmp_path, address):
    folder = make_shards(8, 4)
    catalog = Catalog({"": resolve_shards(address.format(folder))}, ShardCache(tmp_path / "cache", 10**8))
    chooser = BucketChooser(catalog.reader(), [Bucket(1, 56, 80), Bucket(1, 80, 56)])
    for path in folder.glob("train-000001.tar*"):
        path.unlink()
    order = catalog.order(None, 16, 1)
    assert chooser(order.places(0, 4)).tolist() == [0] * 4
    with pytest.raises(RuntimeError, match=r"000001\.tar: what its samples measure cannot be read \(.*No such file"):
        chooser(order.places(0, 8))


def test_the_log_joins_what_several_readers_wrote(tmp_path):
    logs = [SkipLog(tmp_path / "log") for _ in range(2)]
    entry, other = SkippedSample("a.tar", "k", 'broken "quotes"\nand lines'), SkippedSample("b.tar", "", "gone", 7)
    for log in logs:
        log.record(entry)
        log.record(entry)
    logs[1].record(other)
    logs[0].record(entry._replace(reason="broken in another way"))
    assert logs[0].entries() == logs[1].entries() == [entry, other]
    assert len((tmp_path / "log").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "log").read_text().splitlines()[0])[1] == "k"


# Buckets

BUCKETS = [Bucket(1, 480, 720), Bucket(1, 720, 480), Bucket(49, 480, 720), Bucket(49, 240, 360)]


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((1, 480, 720), 0),
        ((1, 1000, 1500), 0),
        ((1, 512, 512), 0),
        ((1, 900, 600), 1),
        ((60, 480, 720), 2),
        ((49, 1080, 1920), 2),
        ((49, 240, 360), 3),
        ((48, 700, 500), 1),
        ((0, 0, 0), 0),
        ((49, 480, 0), 0),
        ((49, -480, 720), 0),
    ],
)
def test_the_bucket_of_a_sample(size, bucket):
    assert choose_bucket(size, BUCKETS) == bucket
