"""Items in one order with keys that never change, from folders, urls and tars; one clear error where there are none."""

from __future__ import annotations

import io
import json
import os
import tarfile
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mm_lightning.prepare.sample import Rejected
from mm_lightning.prepare.shards import check_key
from mm_lightning.prepare.sources import ImageFolder, Img2datasetTars, Keys, VideoFolder


def fill(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def items(source, chunk_size=100, limit=None):
    return [item for chunk in source.chunks(chunk_size, limit) for item in chunk.items()]


def loaded(source, **options):
    """Samples by key; of what is rejected, the reason."""
    found = {}
    for item in items(source, **options):
        try:
            found[item.key] = item.load()
        except Rejected as rejection:
            found[item.key] = rejection.reason
    return found


# Keys


def test_keys_come_from_paths():
    keys = Keys()
    assert keys("b/0001.png") == "b--0001"
    assert keys("Zoë/人.jpg") == "Zoë--人"
    assert keys("0001.png") == "0001"


def test_no_two_paths_share_a_key():
    paths = [
        "a.b.jpg", "a b.jpg", "a-b.jpg", "a/b.jpg", "a--b.jpg", "x.jpg", "x.png", "X.png", "é.jpg",
        "e\u0301.jpg", ".jpg", "...", "-", "/-.jpg", "0" * 300 + ".jpg", "0" * 300 + ".png",
        "a\udcff.jpg", "a\udcfe.jpg", "क्षि.mp4", "🙂.mp4",
    ]  # fmt: skip
    keys = Keys()
    made = [keys(path) for path in paths]
    assert len({key.casefold() for key in made}) == len(paths)
    for key in made:
        check_key(key)
        assert len(key.encode()) < 200
    again = Keys()
    assert [again(path) for path in paths] == made


def test_a_key_does_not_depend_on_what_comes_later():
    assert [Keys()("x.jpg"), Keys()("x.png")] == ["x", "x"]
    keys = Keys()
    assert (keys("x.jpg"), keys("x.png").startswith("x-")) == ("x", True)


# Folders


def test_files_in_the_order_of_their_paths(tmp_path):
    names = ["b/2.jpg", "b/10.JPG", "a.png", "ü.webp", "Z.jpeg", "note.md", ".hidden.jpg", ".git/x.jpg", "b/._2.jpg"]
    fill(tmp_path, dict.fromkeys(names, b"x"))
    expected = ["Z.jpeg", "a.png", "b/10.JPG", "b/2.jpg", "ü.webp"]
    found = items(ImageFolder(str(tmp_path), "set"))
    assert [item.source for item in found] == [f"set:{name}" for name in expected]
    assert [item.load().extension for item in found] == ["jpg", "png", "jpg", "jpg", "webp"]


def test_chunks_are_runs_of_the_order_and_change_with_their_files(tmp_path):
    fill(tmp_path, {f"{i:02d}.png": str(i) for i in range(10)})
    folder = ImageFolder(str(tmp_path))
    whole, cut = items(folder), list(folder.chunks(4))
    assert [item.key for chunk in cut for item in chunk.items()] == [item.key for item in whole]
    assert [chunk.num_items for chunk in cut] == [4, 4, 2]
    assert [item.key for item in cut[1].items(start=2)] == ["06", "07"]
    (tmp_path / "05.png").write_text("another")
    changed = [one.digest != other.digest for one, other in zip(cut, folder.chunks(4), strict=True)]
    assert changed == [False, True, False]
    assert [item.key for item in items(folder, 4, limit=6)] == [item.key for item in whole][:6]


def test_a_folder_that_was_moved_is_the_same(tmp_path):
    fill(tmp_path / "old", {"a.png": "1", "b.png": "2"})
    before = [chunk.digest for chunk in ImageFolder(str(tmp_path / "old")).chunks(1)]
    (tmp_path / "old").rename(tmp_path / "new")
    assert [chunk.digest for chunk in ImageFolder(str(tmp_path / "new")).chunks(1)] == before


def test_captions_from_files_beside(tmp_path):
    fill(tmp_path, {"a.png": "", "a.txt": "\ufeffZoë\n", "b.png": "", "c.png": "", "c.txt": "", "d.png": ""})
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\xfa")
    found = loaded(ImageFolder(str(tmp_path)))
    assert [found[key].caption for key in "abc"] == ["Zoë\n", None, ""]
    assert found["d"] == "caption_not_utf8"


TABLES = {
    "t.csv": "file,caption\r\nsub/a.mp4,\"one, two\"\r\nb,three\r\nc.mp4,four\r\n",
    "t.tsv": "file\tcaption\nsub/a.mp4\tone, two\nb\tthree\nc.mp4\tfour\n",
    "t.jsonl": '{"file": "sub/a", "caption": ["one, two", "x"]}\n\n{"file": "b.mp4", "caption": "three"}\n'
    '{"file": "c", "caption": "four"}',
    "absolute.csv": "file,caption\n/far/away/sub/a.mp4,\"one, two\"\n/far/away/b.mp4,three\n/far/away/c,four\n",
    "t.json": '[{"file": ".\\\\sub\\\\a.mp4", "caption": "one, two"}, {"file": "b.mp4", "caption": "three"}, '
    '{"file": "c.mp4", "caption": "four"}]',
    "u.json": '{"sub/a.mp4": "one, two", "b": {"caption": "three"}, "c.mp4": ["four"]}',
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_captions_from_a_table(name, tmp_path):
    fill(tmp_path / "raw", {"sub/a.mp4": "", "b.mp4": "", "c.mp4": "", "d.mov": "", "d.txt": "not read"})
    fill(tmp_path, {name: TABLES[name]})
    found = loaded(VideoFolder(str(tmp_path / "raw"), captions=str(tmp_path / name)))
    captions = {key: sample.caption for key, sample in found.items()}
    assert captions == {"sub--a": "one, two", "b": "three", "c": "four", "d": None}
    assert {sample.kind for sample in found.values()} == {"video"}


@pytest.mark.parametrize("rows", ["people/1.png,one", "people\\1,one", "1.png,no\npeople/1.png,one\nanimals/1.png,no"])
def test_a_row_with_a_folder_names_no_file_of_another(rows, tmp_path):
    fill(tmp_path / "raw", {"people/1.png": "", "deep/people/1.png": "", "animals/1.png": "", "1.png": ""})
    fill(tmp_path, {"t.csv": f"file,caption\n{rows}\n"})
    found = loaded(ImageFolder(str(tmp_path / "raw"), captions=str(tmp_path / "t.csv")))
    others = "no" if "no" in rows else None
    assert {key: sample.caption for key, sample in found.items()} == {
        "people--1": "one", "deep--people--1": "one", "animals--1": others, "1": others
    }  # fmt: skip


def test_an_end_that_two_rows_share_says_nothing(tmp_path):
    fill(tmp_path / "raw", {"a.mp4": "", "b.mp4": ""})
    fill(tmp_path, {"t.csv": "file,caption\nx/a.mp4,one\ny/a.mp4,two\ny/b.mp4,three\n"})
    found = loaded(VideoFolder(str(tmp_path / "raw"), captions=str(tmp_path / "t.csv")))
    assert [found[key].caption for key in "ab"] == [None, "three"]


def test_a_line_separator_inside_a_caption(tmp_path):
    captions = ["one\u2028two", "three\u2029\x85four"]
    fill(tmp_path / "raw", {"0.png": "", "1.png": ""})
    rows = [json.dumps({"file": f"{i}.png", "caption": text}, ensure_ascii=False) for i, text in enumerate(captions)]
    fill(tmp_path, {"t.jsonl": "\r\n".join(rows)})
    found = loaded(ImageFolder(str(tmp_path / "raw"), captions=str(tmp_path / "t.jsonl")))
    assert [found[key].caption for key in "01"] == captions


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.csv",
            "path,text\na.mp4,x\n",
            r"a row has no 'file'; the first has path, text; .*source\.file_field=",
        ),
        ("t.json", "{oops", r"t\.json: Expecting property name"),
        ("t.json", "[1, 2]", r"t\.json: 'int' object"),
        ("t.parquet", "x", r"t\.parquet: give a \.csv, \.tsv, \.json or \.jsonl file"),
        ("t.csv", "file,caption\nzzz.mp4,x\n", r"names none of the 1 files in .*'zzz\.mp4', the first file 'a\.mp4'"),
        ("missing.csv", None, r"missing\.csv is not there"),
    ],
)
def test_unusable_tables(name, content, message, tmp_path):
    fill(tmp_path / "raw", {"a.mp4": ""})
    if content is not None:
        fill(tmp_path, {name: content})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        items(VideoFolder(str(tmp_path / "raw"), captions=str(tmp_path / name)))


def test_a_folder_at_a_url_is_the_same_as_a_local_one(tmp_path):
    fill(tmp_path, {"b/2.jpg": "two", "a.png": "one", "a.txt": "a man", ".x/y.png": ""})
    local, remote = loaded(ImageFolder(str(tmp_path))), loaded(ImageFolder(f"file://{tmp_path}"))
    assert remote == local
    assert remote["a"].caption == "a man"


def test_files_that_cannot_be_read_are_rejected(tmp_path):
    fill(tmp_path, {"gone.png": "x", "large.png": "12345", "good.png": "1"})
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = items(ImageFolder(str(tmp_path), max_bytes=4))
    (tmp_path / "gone.png").unlink()
    outcome = {}
    for item in found:
        try:
            outcome[item.key] = item.load().data
        except Rejected as rejection:
            outcome[item.key] = rejection.reason
    assert outcome == {
        "dangling": "unreadable", "gone": "unreadable", "good": b"1", "large": "too_large", "pipe": "unreadable",
    }  # fmt: skip


def test_names_that_are_not_utf8(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    (item,) = items(ImageFolder(str(tmp_path)))
    assert item.load().data == b"x"
    assert item.source.encode().endswith(b"caf\\xe9.png")
    check_key(item.key)


@pytest.mark.parametrize(
    ("path", "files", "message"),
    [
        ("missing", {}, r"source\.path=.*missing is not there"),
        ("a.png", {"a.png": ""}, r"a\.png is a file; give the folder"),
        ("raw", {"raw/a.md": "", "raw/b.mp4": ""}, r"no file ends in .*png.*; its 2 files end in md, mp4"),
        ("raw", {"raw/.keep": ""}, r"it holds no file"),
        ("file://nowhere", {}, "is not there"),
        ("zzz://bucket/x", {}, "zzz"),
    ],
)
def test_nothing_to_read(path, files, message, tmp_path):
    fill(tmp_path, files)
    path = path if "://" in path else str(tmp_path / path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        items(ImageFolder(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_without_permission(tmp_path):
    fill(tmp_path, {"raw/a.png": ""})
    (tmp_path / "raw").chmod(0)
    with pytest.raises(ValueError, match="cannot be read: Permission denied"):
        items(ImageFolder(str(tmp_path / "raw")))


def test_a_folder_that_fails_to_list(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"source\.path=.* cannot be read: Permission denied"):
        items(ImageFolder(str(tmp_path)))


# Tars


def pack(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def laion(path, start, count):
    files = {}
    for i in range(start, start + count):
        record = {"url": f"https://example.org/{i}.jpg", "caption": f"record {i}", "status": "success"}
        files |= {f"{i:09d}.jpg": b"picture %d" % i * 99, f"{i:09d}.json": json.dumps(record).encode()}
        if i % 2:
            files[f"{i:09d}.txt"] = f"text {i}".encode()
    return pack(path, files)


@pytest.fixture
def tars(tmp_path):
    """Two tars of seven and five samples."""
    laion(tmp_path / "tars" / "00000.tar", 0, 7)
    laion(tmp_path / "tars" / "00001.tar", 7, 5)
    return tmp_path / "tars"


def test_img2dataset_tars(tars):
    found = loaded(Img2datasetTars(str(tars), "laion"))
    assert list(found) == [f"{int(i >= 7):05d}--{i:09d}" for i in range(12)]
    sample = found["00001--000000007"]
    assert (sample.data, sample.extension, sample.caption) == (b"picture 7" * 99, "jpg", "text 7")
    assert sample.source == "laion:00001.tar/000000007"
    assert sample.meta == {"url": "https://example.org/7.jpg"}
    assert found["00000--000000002"].caption == "record 2"


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
def test_a_tar_in_chunks_is_the_tar(chunk_size, tars):
    whole = loaded(Img2datasetTars(str(tars)))
    assert loaded(Img2datasetTars(str(tars)), chunk_size=chunk_size) == whole
    chunks = list(Img2datasetTars(str(tars)).chunks(chunk_size))
    assert sum(chunk.num_items for chunk in chunks) == 12
    assert len({chunk.digest for chunk in chunks}) == len(chunks) == -(-7 // chunk_size) + -(-5 // chunk_size)
    last = list(chunks[0].items())[-1]
    assert [item.key for item in chunks[0].items(start=chunks[0].num_items - 1)] == [last.key]


@pytest.mark.parametrize(
    "path", ["pipe:cat {}/00000.tar {}/00001.tar", "file://{}/{{00000..00001}}.tar", "pipe:cat {}/{{00000..00001}}.tar"]
)
def test_streams_give_the_same_samples(path, tars):
    local = loaded(Img2datasetTars(str(tars)))
    source = Img2datasetTars(path.replace("{}", str(tars)).replace("{{", "{").replace("}}", "}"))
    if path.count("{}") == 2:
        source.path = f"pipe:cat {tars}/00000.tar"
        local = {key: sample for key, sample in local.items() if key.startswith("00000")}
    streamed = loaded(source)
    assert {key: (s.data, s.caption, s.meta) for key, s in streamed.items()} == {
        key: (s.data, s.caption, s.meta) for key, s in local.items()
    }
    assert [chunk.num_items for chunk in source.chunks(2)] == [None] * len(source.tars())
    for limit in (3, 7):
        assert list(loaded(source, chunk_size=2, limit=limit)) == list(local)[:limit]
    chunk = next(source.chunks(2))
    assert [item.key for item in chunk.items(start=5)] == list(local)[5:7]


def test_patterns_lists_and_one_tar(tars):
    whole = list(loaded(Img2datasetTars(str(tars))))
    assert list(loaded(Img2datasetTars(f"{tars}/*.tar"))) == whole
    assert list(loaded(Img2datasetTars(f"{tars}/{{00000..00001}}.tar"))) == whole
    assert list(loaded(Img2datasetTars([f"{tars}/00000.tar", f"{tars}/00001.tar"]))) == whole
    assert list(loaded(Img2datasetTars(f"{tars}/00001.tar"))) == whole[7:]


def test_tars_of_one_name_in_two_folders(tmp_path):
    for folder in ("a", "b"):
        laion(tmp_path / folder / "0.tar", 0, 2)
    assert list(loaded(Img2datasetTars(str(tmp_path)))) == [f"{f}--0--00000000{i}" for f in "ab" for i in range(2)]
    assert len(loaded(Img2datasetTars([str(tmp_path / "a"), str(tmp_path / "b")]))) == 4


def broken(path, at):
    """Flips a header's bytes, or ends the file there."""
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    if at == "cut in a picture":
        data = data[: members[9].offset_data + 100]
    elif at == "cut between":
        data = data[: members[8].offset]
    elif at == "header":
        data[members[8].offset : members[8].offset + 400] = b"\x55" * 400
    else:
        data = {"garbage": b"\x13" * 5000, "empty": b""}[at]
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("at", "healthy"), [("cut in a picture", 3), ("cut between", 3), ("header", 3), ("garbage", 0), ("empty", 0)]
)
@pytest.mark.parametrize("chunk_size", [2, 100])
@pytest.mark.parametrize("prefix", ["", "pipe:cat "])
def test_a_damaged_tar_gives_what_is_there_and_says_so_once(at, healthy, chunk_size, prefix, tars):
    """Samples 0 to 2 have 8 files; damage is at the 9th or 10th."""
    broken(tars / "00000.tar", at)
    source = Img2datasetTars([f"{prefix}{tars}/00000.tar", f"{prefix}{tars}/00001.tar"])
    outcome = loaded(source, chunk_size=chunk_size)
    first = {key: value for key, value in outcome.items() if key.startswith("00000")}
    assert first.pop("00000--broken") == "broken_archive"
    samples = [value for value in first.values() if not isinstance(value, str)]
    assert healthy <= len(samples) <= healthy + 1
    assert [sample.data for sample in samples] == [b"picture %d" % i * 99 for i in range(len(samples))]
    assert len(outcome) == len(samples) + 1 + 5
    assert len(items(source, chunk_size)) == len(outcome)


def test_a_command_that_fails(tmp_path):
    (item,) = items(Img2datasetTars(f"pipe:cat {tmp_path}/none.tar"))
    with pytest.raises(Rejected, match=r"broken_archive: OSError: the command ended with 1: cat: .*none\.tar"):
        item.load()


@pytest.fixture
def served(tmp_path):
    """The url of a folder."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with serving(partial(Quiet, directory=str(tmp_path))) as url:
        yield url


@contextmanager
def serving(handler):
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("scheme", ["file", "http"])
def test_a_tar_at_a_url_that_is_written_anew_is_another(scheme, tmp_path, served):
    pytest.importorskip("aiohttp")
    tar = laion(tmp_path / "00000.tar", 0, 2)
    source = Img2datasetTars({"file": f"file://{tar}", "http": f"{served}/00000.tar"}[scheme])
    digests = [next(source.chunks(2)).digest for _ in range(2)]
    assert digests[0] == digests[1]
    os.utime(tar, (1, 1))  # of the same size
    assert next(source.chunks(2)).digest != digests[0]


def test_a_url_that_nothing_can_open():
    with pytest.raises(ValueError, match=r"source\.path=zzz://bucket/0\.tar: Protocol not known"):
        items(Img2datasetTars("zzz://bucket/0.tar"))


class Failing(BaseHTTPRequestHandler):
    """A server that refuses what is called `forbidden.tar` or `busy.tar`, and ends anything else in its middle."""

    body = bytes(200_000)

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()

    def do_GET(self):
        status = {"/forbidden.tar": 403, "/busy.tar": 503}.get(self.path)
        if status is not None:
            self.send_error(status)
            return
        self.do_HEAD()
        self.wfile.write(self.body[: len(self.body) // 2])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def failing_server():
    with serving(Failing) as url:
        yield url


@pytest.mark.parametrize(
    ("name", "message"),
    [("forbidden", "ClientResponseError: 403"), ("busy", "ClientResponseError: 503"), ("cut", "ClientPayloadError")],
)
def test_a_server_that_fails_is_told_once(name, message, failing_server):
    pytest.importorskip("aiohttp")
    (item,) = items(Img2datasetTars(f"{failing_server}/{name}.tar"))
    with pytest.raises(Rejected, match=rf"broken_archive: OSError: http.*{name}\.tar cannot be read: {message}"):
        item.load()


def test_what_is_in_tars_beside_pictures(tmp_path):
    pack(
        tmp_path / "0.tar",
        {
            "a.txt": b"no picture",
            "b.jpg": b"x",
            "b.json": b"{broken",
            "c.jpg": b"12345",
            "d.PNG": b"y",
            "d.txt": b"\xff",
            "sub dir/é.jpg": b"z",
            "sub dir/é.txt": b"",
        },
    )
    found = loaded(Img2datasetTars(str(tmp_path), max_bytes=4000))
    assert (found["0--a"], found["0--d"]) == ("no_picture_or_video", "caption_not_utf8")
    assert (found["0--b"].data, found["0--b"].caption) == (b"x", None)
    assert list(found.values())[-1].caption == ""
    assert loaded(Img2datasetTars(str(tmp_path), max_bytes=4))["0--c"] == "too_large"


def test_videos_in_tars(tmp_path):
    pack(tmp_path / "0.tar", {"a.mp4": b"clip", "a.txt": b"a man walks", "b.jpg": b"no"})
    found = loaded(Img2datasetTars(str(tmp_path), kind="video"))
    assert (found["0--a"].kind, found["0--a"].extension) == ("video", "mp4")
    assert found["0--b"] == "no_picture_or_video"


@pytest.mark.parametrize("path", ["{}/none", "{}/*.tar", "{}"])
def test_no_tars(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source\.path=.*(is not there|no \.tar there)"):
        items(Img2datasetTars(path.replace("{}", str(tmp_path))))


def test_an_unknown_kind():
    with pytest.raises(ValueError, match=r"source\.kind=audio: give one of image, video"):
        Img2datasetTars("x", kind="audio")
