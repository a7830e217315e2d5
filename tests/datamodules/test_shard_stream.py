"""Order, dealing and damage of the stream, on drawn shards."""

import json
import logging
import tarfile
from itertools import islice

import pytest
import webdataset as wds

from datamodules.shards import (
    DamagedSample,
    ShardSet,
    ShardStream,
    SkipLog,
    SkippedSample,
    positions_of,
    resolve_shards,
)


def key_of(sample, epoch):
    return sample["__key__"], epoch


@pytest.fixture
def skip_log(tmp_path):
    return SkipLog(tmp_path / "skipped.jsonl")


def stream(folder, skip_log, decode=key_of, batch_size=1, **options):
    return ShardStream(resolve_shards(folder), decode, skip_log, batch_size=batch_size, **options)


def take(dataset, number):
    return list(islice(iter(dataset), number))


# Patterns


def test_a_folder_with_an_index_gives_its_tars_counts_and_kind(make_shards):
    folder = make_shards(10, 4)
    found = resolve_shards(folder)
    assert found == ShardSet([str(folder / f"train-{i:06d}.tar") for i in range(3)], 10, "image")


@pytest.mark.parametrize("pattern", ["train-00000{0..2}.tar", "train-*.tar", "train-00000?.tar"])
def test_patterns(make_shards, pattern):
    folder = make_shards(10, 4)
    assert [u.rsplit("/", 1)[1] for u in resolve_shards(f"{folder}/{pattern}").urls] == [
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
    ]


def test_a_list_joins_and_a_folder_without_index_is_globbed(make_shards):
    one, two = make_shards(4, 4, name="one"), make_shards(4, 4, name="two")
    assert resolve_shards([one, str(two)]).num_samples == 8
    (two / "index.json").unlink()
    joined = resolve_shards([one, two])
    assert joined.num_samples is None
    assert len(joined.urls) == 2


def test_pipe_is_passed_on_and_read(make_shards, skip_log):
    folder = make_shards(3, 4)
    url = f"pipe:cat {folder}/train-000000.tar"
    dataset = ShardStream(resolve_shards(url), key_of, skip_log, batch_size=1, seed=None)
    assert take(dataset, 3) == [("s000", 0), ("s001", 0), ("s002", 0)]


def test_nothing_matched_names_the_pattern_and_what_is_there(make_shards):
    folder = make_shards(4, 4)
    with pytest.raises(FileNotFoundError, match=r"valid-\*\.tar.*holds: index\.json, train-000000\.tar"):
        resolve_shards(f"{folder}/valid-*.tar")
    with pytest.raises(FileNotFoundError, match=r"train-000001\.tar.*holds"):
        resolve_shards(f"{folder}/train-00000{{0..1}}.tar")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        resolve_shards(f"{folder}-missing/*.tar")
    with pytest.raises(FileNotFoundError, match="empty"):
        resolve_shards([])


def test_an_empty_folder_a_missing_shard_and_a_broken_index(make_shards, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds: nothing"):
        resolve_shards(tmp_path / "empty")
    folder = make_shards(8, 4)
    (folder / "train-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing: \['train-000001\.tar'\]"):
        resolve_shards(folder)
    (folder / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="not an index"):
        resolve_shards(folder)


def test_kinds_do_not_mix(make_shards, make_video_shards):
    with pytest.raises(ValueError, match="different kinds"):
        resolve_shards([make_shards(1), make_video_shards(1)])


# Order


def test_unshuffled_is_what_webdataset_reads(make_shards, skip_log):
    folder = make_shards(10, 4)
    expected = [s["__key__"] for s in wds.WebDataset(resolve_shards(folder).urls, shardshuffle=False)]
    assert [key for key, _ in take(stream(folder, skip_log, seed=None), 10)] == expected


def test_every_pass_holds_each_sample_once_in_its_own_order(make_shards, skip_log):
    samples = take(stream(make_shards(10, 4), skip_log, seed=3), 30)
    passes = [[key for key, epoch in samples if epoch == number] for number in range(3)]
    assert [sorted(keys) for keys in passes] == [[f"s{i:03d}" for i in range(10)]] * 3
    assert len({tuple(keys) for keys in passes}) == 3


def test_the_seed_decides_the_order(make_shards, skip_log):
    folder = make_shards(10, 4)
    first, again, other = (take(stream(folder, skip_log, seed=seed), 20) for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("num_lanes", [1, 2, 3])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_deliver_the_batch_that_one_process_delivers(make_shards, skip_log, num_lanes, world_size):
    folder, batch, steps = make_shards(10, 2), 2, 8
    together = batch * world_size
    alone = take(stream(folder, skip_log, batch_size=together, num_lanes=num_lanes), together * steps)
    ranks = [
        take(
            stream(folder, skip_log, batch_size=batch, rank=rank, world_size=world_size, num_lanes=num_lanes),
            batch * steps,
        )
        for rank in range(world_size)
    ]
    for step in range(steps):
        joined = [sample for rank in ranks for sample in rank[step * batch : (step + 1) * batch]]
        assert sorted(joined) == sorted(alone[step * together : (step + 1) * together])


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_do_not_change_the_order(num_workers):
    batch, first = 2, 6
    alone = list(islice(positions_of(1, 3, 0, 1, batch, first), 24))
    workers = [positions_of(1, 3, worker, num_workers, batch, first) for worker in range(num_workers)]
    batches = [list(islice(workers[i % num_workers], batch)) for i in range(12)]
    assert [position for b in batches for position in b] == alone


def test_going_on_at_a_position_equals_never_having_stopped(make_shards, skip_log):
    folder = make_shards(10, 4)
    assert take(stream(folder, skip_log, first_position=14), 8) == take(stream(folder, skip_log), 22)[14:]


def test_more_readers_than_shards_all_get_samples(make_shards, skip_log):
    folder = make_shards(3, 4)
    ranks = [take(stream(folder, skip_log, rank=rank, world_size=8, num_lanes=8), 3) for rank in range(8)]
    assert all(len(samples) == 3 for samples in ranks)


def test_ranks_read_only_their_lanes(make_shards, skip_log, monkeypatch):
    folder, read = make_shards(8, 2), []
    monkeypatch.setattr("datamodules.shards.raw_samples", lambda urls, log: read.append(urls) or iter([]))
    with pytest.raises(RuntimeError, match="no sample could be read"):
        take(stream(folder, skip_log, rank=1, world_size=4, num_lanes=4), 1)
    assert {len(urls) for urls in read} == {1}


# Damage


def broken_at(*indices):
    def decode(sample, epoch):
        if int(sample["__key__"][1:]) in indices:
            raise DamagedSample("drawn broken")
        return sample["__key__"]

    return decode


def test_a_damaged_sample_gives_its_place_to_the_next(make_shards, skip_log):
    folder = make_shards(6, 6)
    assert take(stream(folder, skip_log, broken_at(2, 3), seed=None), 7) == [
        *("s000", "s001", "s004", "s004", "s004", "s005"),
        "s000",
    ]
    assert {(s.key, s.reason) for s in skip_log.entries()} == {("s002", "drawn broken"), ("s003", "drawn broken")}


def test_damage_shifts_no_rank(make_shards, skip_log):
    folder, decode = make_shards(10, 4), broken_at(1, 2, 5)
    alone = take(stream(folder, skip_log, decode, batch_size=2), 24)
    ranks = [take(stream(folder, skip_log, decode, rank=rank, world_size=2), 12) for rank in (0, 1)]
    assert ranks == [alone[0::2], alone[1::2]]


def test_a_sample_is_counted_once_however_often_it_is_met(make_shards, skip_log, caplog):
    folder = make_shards(3, 3)
    with caplog.at_level(logging.WARNING, "datamodules.shards"):
        take(stream(folder, skip_log, broken_at(1)), 20)
    assert [s.key for s in skip_log.entries()] == ["s001"]
    assert len([r for r in caplog.records if "s001" in r.getMessage()]) == 1


def complete(sample, epoch):
    if not {"png", "txt", "json", "ref0.jpg"} < set(sample):
        raise DamagedSample("incomplete")
    return sample["__key__"]


def offset_of(path, name):
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


@pytest.mark.parametrize(
    ("file", "behind"), [("s001.json", 0), ("s001.json", 100), ("s001.txt", 0), ("s001.txt", 512), ("s001.png", 520)]
)
def test_a_truncated_tar_gives_what_stands_before_the_cut(make_shards, skip_log, file, behind):
    folder = make_shards(8, 4)
    path = folder / "train-000000.tar"
    path.write_bytes(path.read_bytes()[: offset_of(path, file) + behind])
    keys = take(stream(folder, skip_log, complete, seed=None), 7)
    assert list(dict.fromkeys(keys)) == ["s000", "s004", "s005", "s006", "s007"]
    named = {s.key for s in skip_log.entries() if s.url == str(path)}
    assert named == ({""} if file == "s001.json" else {"", "s001"})


@pytest.mark.parametrize("content", [b"", b"not a tar at all" * 100])
def test_an_empty_or_foreign_tar_is_named_and_passed_over(make_shards, skip_log, content):
    folder = make_shards(8, 4)
    (folder / "train-000000.tar").write_bytes(content)
    assert {key for key, _ in take(stream(folder, skip_log), 8)} == {"s004", "s005", "s006", "s007"}
    assert {(s.url, s.key) for s in skip_log.entries()} == {(str(folder / "train-000000.tar"), "")}


def test_nothing_readable_is_an_error_and_no_endless_loop(make_shards, skip_log):
    folder = make_shards(4, 4)
    with pytest.raises(RuntimeError, match=r"could be decoded\. 4 were skipped, the last: .*drawn broken"):
        take(stream(folder, skip_log, broken_at(0, 1, 2, 3)), 1)
    (folder / "train-000000.tar").write_bytes(b"")
    with pytest.raises(RuntimeError, match="could be read"):
        take(stream(folder, skip_log), 1)


def test_the_log_joins_what_several_readers_wrote(tmp_path):
    logs = [SkipLog(tmp_path / "log") for _ in range(2)]
    entry = SkippedSample("a.tar", "k", 'broken "quotes"\nand lines')
    for log in logs:
        log.record(entry)
        log.record(entry)
    assert logs[0].entries() == [entry]
    assert len((tmp_path / "log").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "log").read_text().splitlines()[0])[1] == "k"
