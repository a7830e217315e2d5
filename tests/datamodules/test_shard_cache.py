"""Shards that lie elsewhere: fetched once, whole, within bounds, by many processes at once."""

import fcntl
import json
import multiprocessing
import os
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from datamodules.resolve import resolve_shards
from datamodules.shard_cache import ShardCache, default_folder, is_remote
from datamodules.tars import OpenTar, ShardReader


@pytest.fixture
def far(tmp_path):
    folder = tmp_path / "far"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.tar").write_bytes(bytes([i]) * 1000)
    return folder


def fetch(cache, *shard):
    with cache.hold(*shard) as path:
        return path


def url(far, i, scheme="file"):
    return f"file://{far}/{i}.tar" if scheme == "file" else f"pipe:cat {far}/{i}.tar"


def used(folder):
    return sum(path.stat().st_size for path in folder.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize("scheme", ["file", "pipe"])
def test_a_shard_is_fetched_once(far, tmp_path, scheme):
    cache = ShardCache(tmp_path / "cache", 10_000)
    path = fetch(cache, url(far, 3, scheme), 1000)
    assert path.read_bytes() == bytes([3]) * 1000
    (far / "3.tar").unlink()
    assert fetch(cache, url(far, 3, scheme), 1000) == path


def test_it_keeps_what_was_used_last_and_stays_within_bounds(far, tmp_path):
    cache = ShardCache(tmp_path / "cache", 3500)
    for i in (0, 1, 2, 0, 3):
        fetch(cache, url(far, i))
        assert used(cache.folder) <= 3500
    kept = {i for i in range(6) if cache.path(url(far, i)).exists()}
    assert kept == {0, 2, 3}


def test_an_open_file_is_read_on_after_it_made_room(far, tmp_path):
    cache = ShardCache(tmp_path / "cache", 1500)
    with open(fetch(cache, url(far, 0)), "rb") as file:
        fetch(cache, url(far, 1))
        assert not cache.path(url(far, 0)).exists()
        assert file.read() == bytes(1000)


@pytest.mark.parametrize("known", [1000, None])
def test_a_shard_larger_than_the_cache_ends_the_run(far, tmp_path, known):
    cache = ShardCache(tmp_path / "cache", 900)
    with pytest.raises(ValueError, match=r"1e-06 GB does not fit .*9e-07 GB; raise cache_gb"):
        fetch(cache, url(far, 0), known)
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
        fetch(cache, address)
    assert used(cache.folder) == 0


def test_a_short_transfer_is_tried_again(far, tmp_path):
    marker = tmp_path / "tried"
    command = f"pipe:if [ -e {marker} ]; then cat {far}/2.tar; else touch {marker}; head -c 10 {far}/2.tar; fi"
    assert fetch(ShardCache(tmp_path / "cache", 9000), command, 1000).stat().st_size == 1000


@pytest.mark.parametrize("size", [500, 1500])
def test_what_has_another_size_than_told_is_not_kept(far, tmp_path, size):
    cache = ShardCache(tmp_path / "cache", 9000)
    (far / "2.tar").write_bytes(bytes(size))
    with pytest.raises(OSError, match=rf"2\.tar: {size} bytes came in, index\.json records 1000"):
        fetch(cache, url(far, 2), 1000)
    assert used(cache.folder) == 0
    (far / "2.tar").write_bytes(bytes(1000))
    assert fetch(cache, url(far, 2), 1000).stat().st_size == 1000


def test_what_was_cut_short_in_the_cache_is_fetched_again(far, tmp_path):
    cache = ShardCache(tmp_path / "cache", 9000)
    os.truncate(fetch(cache, url(far, 2), 1000), 500)
    assert fetch(cache, url(far, 2), 1000).stat().st_size == 1000


# Checksums


@pytest.fixture
def shard_at(make_shards, tmp_path):
    """Another set at one address each time -> its only shard's address, size and checksum."""

    def make(first):
        change = lambda i, fields: fields | {"txt": f"A man img, number {first + i}"}  # noqa: E731
        folder = make_shards(3, 3, name="set", change=change)
        shard = json.loads((folder / "index.json").read_text())["shards"][0]
        return f"file://{folder}/{shard['name']}", shard["num_bytes"], shard["sha256"]

    return make


def texts(cache, address, num_bytes, sha256):
    with cache.hold(address, num_bytes, sha256) as path:
        tar = OpenTar(address, path, sha256)
    return [tar.sample(i)["txt"].decode().split()[-1] for i in range(3)]


def test_a_set_that_was_prepared_again_takes_the_place_of_the_old(shard_at, tmp_path):
    cache = ShardCache(tmp_path / "cache", 10**6)
    old = shard_at(0)
    assert texts(cache, *old) == ["0", "1", "2"]
    new = shard_at(5)
    assert (new[:2], new[2] != old[2]) == (old[:2], True)
    assert texts(cache, *new) == ["5", "6", "7"]
    assert cache.path(old[0]).exists()


def test_a_checksum_is_taken_once(shard_at, tmp_path, monkeypatch):
    cache, shard = ShardCache(tmp_path / "cache", 10**6), shard_at(0)
    fetch(cache, *shard)
    monkeypatch.setattr("datamodules.tars.scan_tar", None)
    monkeypatch.setattr("datamodules.shard_cache.scan_tar", None)
    assert texts(cache, *shard) == texts(cache, *shard) == ["0", "1", "2"]


def test_other_bytes_than_told_are_not_kept(shard_at, tmp_path):
    cache, shard = ShardCache(tmp_path / "cache", 10**6), shard_at(0)
    shard_at(5)
    with pytest.raises(OSError, match=r"000000\.tar: its sha256 is not [0-9a-f]{64}, which index\.json records"):
        fetch(cache, *shard)
    assert used(cache.folder) == 0


def test_an_index_without_checksum_stays_in_use_and_goes_with_its_tar(shard_at, tmp_path, monkeypatch):
    address, num_bytes, _ = shard_at(0)
    cache = ShardCache(tmp_path / "cache", num_bytes + 1000)
    assert texts(cache, address, None, None) == ["0", "1", "2"]
    beside = Path(f"{cache.path(address)}.index")
    for path in (cache.path(address), beside):
        os.utime(path, (1e9, 1e9))
    with monkeypatch.context() as patch:
        patch.setattr("datamodules.tars.scan_tar", None)
        assert texts(cache, address, None, None) == ["0", "1", "2"]
    (tmp_path / "b.tar").write_bytes(bytes(2000))
    fetch(cache, f"file://{tmp_path}/b.tar")
    assert not beside.exists()


# Servers


@pytest.fixture
def serve():
    """Answers to GET, one after the other, the last of them again and again -> address, list of those given.

    An answer is the status and how many of 1000 bytes are sent.
    """
    servers = []

    def start(*answers):
        given = []

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()

            def do_GET(self):
                status, sent = answers[min(len(given), len(answers) - 1)]
                given.append(status)
                self.send_response(status)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(bytes(sent))

            def log_message(self, *args):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/a.tar", given

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_that_fails_for_a_while_is_asked_again(serve, tmp_path):
    address, given = serve((503, 1000), (200, 500), (200, 1000))
    assert fetch(ShardCache(tmp_path / "cache", 9000), address).read_bytes() == bytes(1000)
    assert given == [503, 200, 200]


@pytest.mark.parametrize(("answer", "words"), [((503, 1000), "ClientResponseError: 503"), ((200, 500), "Payload")])
def test_a_server_that_fails_for_good_leaves_nothing(serve, tmp_path, answer, words):
    cache = ShardCache(tmp_path / "cache", 9000)
    address, given = serve(answer)
    with pytest.raises(OSError, match=words):
        fetch(cache, address)
    assert len(given) == 3
    assert used(cache.folder) == 0


def test_leftovers_of_a_killed_process_make_room(far, tmp_path):
    cache = ShardCache(tmp_path / "cache", 2500)
    cache.folder.mkdir()
    stale = cache.path(url(far, 5)).with_suffix(".part")
    stale.write_bytes(bytes(2000))
    fetch(cache, url(far, 0))
    assert not stale.exists()
    stale.write_bytes(bytes(2000))
    with open(cache.folder / f".{stale.stem}.tar.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fetch(cache, url(far, 1))
        assert stale.exists()


def read(cache, folder, far, counter, seed):
    for i in range(30):
        number = (i * 7 + seed * 3) % 6
        data = fetch(cache, f"pipe:echo x >> {counter}/{number}; cat {far}/{number}.tar").read_bytes()
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


def open_in_turn(cache, folder, shards, seed):
    reader = ShardReader(shards, lambda shard: cache.hold(shard.url, shard.num_bytes, shard.sha256), max_open=1)
    for i in range(100):
        reader.sample((i + seed) % 2, 0)
    Path(folder, f"done{seed}").touch()


def test_what_is_being_opened_makes_no_room(make_shards, tmp_path):
    """A cache of one shard, two processes that want another one each time."""
    shards = resolve_shards(f"file://{make_shards(2, 1)}/index.json").shards
    cache, context = (
        ShardCache(tmp_path / "cache", round(1.5 * shards[0].num_bytes)),
        multiprocessing.get_context("fork"),
    )
    arguments = [(cache, tmp_path, shards, seed) for seed in range(2)]
    processes = [context.Process(target=open_in_turn, args=values) for values in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(list(tmp_path.glob("done*"))) == 2


def test_what_counts_as_remote():
    assert all(map(is_remote, ("pipe:cat a", "s3://a/b", "https://a", "memory://x")))
    assert not any(map(is_remote, ("/a/b.tar", "a.tar", "C:/a.tar")))


def test_the_default_folder_is_the_users_own(far, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert str(os.getuid()) in default_folder().name
    fetch(ShardCache(default_folder(), 9000), url(far, 0))
    assert default_folder().stat().st_mode & 0o777 == 0o700


def test_a_default_folder_that_another_user_made_is_refused(far, tmp_path, monkeypatch):
    owner = os.getuid()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    default_folder().mkdir()
    with pytest.raises(ValueError, match=rf"belongs to user {owner}, not to user {owner + 1}.*give cache_dir"):
        fetch(ShardCache(default_folder(), 9000), url(far, 0))
    assert not used(default_folder())
