"""Shards that lie elsewhere: fetched once, whole, within bounds, by many processes at once."""

import fcntl
import multiprocessing
import os
from pathlib import Path

import pytest

from datamodules.shard_cache import ShardCache, is_remote


@pytest.fixture
def far(tmp_path):
    folder = tmp_path / "far"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.tar").write_bytes(bytes([i]) * 1000)
    return folder


def url(far, i, scheme="file"):
    return f"file://{far}/{i}.tar" if scheme == "file" else f"pipe:cat {far}/{i}.tar"


def used(folder):
    return sum(path.stat().st_size for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("scheme", ["file", "pipe"])
def test_a_shard_is_fetched_once(far, tmp_path, scheme):
    cache = ShardCache(tmp_path / "cache", 10_000)
    path = cache.fetch(url(far, 3, scheme), 1000)
    assert path.read_bytes() == bytes([3]) * 1000
    (far / "3.tar").unlink()
    assert cache.fetch(url(far, 3, scheme), 1000) == path


def test_it_keeps_what_was_used_last_and_stays_within_bounds(far, tmp_path):
    cache = ShardCache(tmp_path / "cache", 3500)
    for i in (0, 1, 2, 0, 3):
        cache.fetch(url(far, i))
        assert used(cache.folder) <= 3500
    kept = {i for i in range(6) if cache.path(url(far, i)).exists()}
    assert kept == {0, 2, 3}


def test_an_open_file_is_read_on_after_it_made_room(far, tmp_path):
    cache = ShardCache(tmp_path / "cache", 1500)
    with open(cache.fetch(url(far, 0)), "rb") as file:
        cache.fetch(url(far, 1))
        assert not cache.path(url(far, 0)).exists()
        assert file.read() == bytes(1000)


@pytest.mark.parametrize("known", [1000, None])
def test_a_shard_larger_than_the_cache_ends_the_run(far, tmp_path, known):
    cache = ShardCache(tmp_path / "cache", 900)
    with pytest.raises(ValueError, match=r"1e-06 GB does not fit .*9e-07 GB; raise cache_gb"):
        cache.fetch(url(far, 0), known)
    assert used(cache.folder) == 0
    with pytest.raises(ValueError, match="cache_gb > 0"):
        ShardCache(tmp_path, 0)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("file:///nowhere/a.tar", "nowhere"),
        ("pipe:echo sorry >&2; exit 3", "ended with 3: sorry"),
        ("nosuch://a.tar", "nosuch"),
    ],
)
def test_what_cannot_be_fetched_leaves_nothing(tmp_path, address, words):
    cache = ShardCache(tmp_path / "cache", 900)
    with pytest.raises((OSError, ValueError), match=words):
        cache.fetch(address)
    assert used(cache.folder) == 0


def test_a_short_transfer_is_tried_again(far, tmp_path):
    marker = tmp_path / "tried"
    command = f"pipe:if [ -e {marker} ]; then cat {far}/2.tar; else touch {marker}; head -c 10 {far}/2.tar; fi"
    assert ShardCache(tmp_path / "cache", 9000).fetch(command, 1000).stat().st_size == 1000


def test_what_stays_short_is_kept_for_the_reader_to_judge(far, tmp_path):
    """A tar that is truncated where it lies: what stands before the cut is of use."""
    assert ShardCache(tmp_path / "cache", 9000).fetch(url(far, 2), 2000).stat().st_size == 1000


def test_leftovers_of_a_killed_process_make_room(far, tmp_path):
    cache = ShardCache(tmp_path / "cache", 2500)
    cache.folder.mkdir()
    stale = cache.path(url(far, 5)).with_suffix(".part")
    stale.write_bytes(bytes(2000))
    cache.fetch(url(far, 0))
    assert not stale.exists()
    stale.write_bytes(bytes(2000))
    with open(cache.folder / f".{stale.stem}.tar.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache.fetch(url(far, 1))
        assert stale.exists()


def read(cache, folder, far, counter, seed):
    for i in range(30):
        number = (i * 7 + seed * 3) % 6
        data = cache.fetch(f"pipe:echo x >> {counter}/{number}; cat {far}/{number}.tar").read_bytes()
        assert data == bytes([number]) * 1000
    Path(folder, f"done{seed}").touch()


def test_processes_share_it(far, tmp_path):
    counter = tmp_path / "counter"
    counter.mkdir()
    cache = ShardCache(tmp_path / "cache", 10_000)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read, args=(cache, tmp_path, far, counter, seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(list(tmp_path.glob("done*"))) == 4
    assert {path.name: path.read_text() for path in counter.iterdir()} == {str(i): "x\n" for i in range(6)}
    assert used(cache.folder) == 6000


def test_what_counts_as_remote():
    assert all(map(is_remote, ("pipe:cat a", "s3://a/b", "https://a", "memory://x")))
    assert not any(map(is_remote, ("/a/b.tar", "a.tar", "C:/a.tar")))


def test_the_default_folder_is_the_users_own():
    from datamodules.shard_cache import default_folder

    assert str(os.getuid()) in default_folder().name
