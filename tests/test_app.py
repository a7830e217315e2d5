"""`python -m mm_lightning.app` on the smallest CogVideoX: what it makes, tells and serves, then in a browser."""

import io
import json
import logging
import shutil
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

gr = pytest.importorskip("gradio")

from mm_lightning import app  # noqa: E402
from mm_lightning.credentials import read_mark  # noqa: E402
from mm_lightning.evaluation.clips import Clip  # noqa: E402
from mm_lightning.generate import main as generate  # noqa: E402
from mm_lightning.media import DISCLOSURE  # noqa: E402
from mm_lightning.prepare.samples import packaged_file  # noqa: E402
from tests.test_pipeline import trained  # noqa: E402, F401

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ENVIRONMENT = ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE")
FAST = {"num_inference_steps": 2, "guidance_scale": 2, "num_frames": 5, "width": 32, "height": 32}
EMPTY = {"photos": None, "prompt": "", "negative_prompt": "", "seed": None, "face_index": ""}
REST = {"face_scale": 1, "identity_guidance_scale": 1}


@pytest.fixture(scope="module")
def weights(tiny_folder, trained):  # noqa: F811
    return ["--base", str(tiny_folder), "--adapter", str(trained.adapter), "--detector", "dlib"]


@pytest.fixture(scope="module")
def studio(weights, tmp_path_factory):
    """With neither the user's own key nor gradio's settings touched."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ENVIRONMENT:
            patch.setenv(name, "")
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        out = tmp_path_factory.mktemp("page") / "out"
        studio = app.load_studio(app.parse([*weights, "--out", str(out)]))
        studio.pipeline.set_progress_bar_config(disable=True)
        yield studio


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    Image.fromarray(skimage.data.astronaut()).save(folder / "her.png")
    Image.open(packaged_file("insightface", "data/images/t1.jpg")).convert("RGB").save(folder / "group.png")
    Image.new("RGB", (256, 256), "grey").save(folder / "grey.png")
    (folder / "text.png").write_text("no picture")
    return {file.stem: str(file) for file in folder.iterdir()}


@pytest.fixture
def make(studio):
    """The fields of the page, as gradio hands them over."""

    def make(*photos, prompt="A woman img smiles", progress=lambda *_, **__: None, **values):
        given = [(photo, None) for photo in photos] or None
        return studio.make({**EMPTY, **FAST, **REST, "photos": given, "prompt": prompt, **values}, progress)

    return make


# What it makes


def test_a_video_as_the_command_makes_it(make, photos, studio, weights, tmp_path):
    seen = []
    made = make(photos["her"], seed=3, progress=lambda share, desc: seen.append((share, desc)))
    mark = read_mark(made.video)
    assert (mark.comment, mark.intact, mark.generated) == (DISCLOSURE, True, True)
    assert Path(made.video).parent == studio.out
    assert Path(made.video).name.endswith("-a-woman-img-smiles.mp4")
    assert (made.file, made.record) == (made.video, made.video.removesuffix("mp4") + "json")
    assert Image.open(made.sheet).info["comment"].decode() == DISCLOSURE
    assert [share for share, _ in seen] == [0, (1, 2), (2, 2), 1.0]
    assert json.loads(Path(made.record).read_text())["job"]["seed"] == 3
    assert json.loads((studio.out / "manifest.json").read_text())[-1]["references"] == [photos["her"]]
    generate(["--jobs", made.record, *weights, "--out", str(tmp_path), "--unsigned"])
    [again] = tmp_path.glob("*.mp4")
    assert np.array_equal(app.read_clip(again).frames, app.read_clip(Path(made.video)).frames)


def test_a_name_for_each_setting_and_the_same_for_the_same(make, photos):
    videos = [make(photos["her"], seed=seed).video for seed in (3, 4, 3)]
    assert videos[0] == videos[2] != videos[1]
    assert make(photos["her"], photos["her"], seed=3).video != videos[0]


def test_a_picture_and_nobody_in_particular(make, photos):
    still = make(photos["her"], num_frames=1)
    assert (still.video, Path(still.file).suffix) == (None, ".png")
    nobody = make(prompt="A dog runs", face_scale=0)
    assert Path(nobody.video).is_file()
    assert nobody.similarity is None


def test_the_curve_is_the_recognisers_cosine_with_gaps_and_their_number(studio, photos, monkeypatch):
    """Frames that are the photo itself, and one that shows nobody."""
    photo = skimage.data.astronaut()
    frames = np.stack([photo, np.full_like(photo, 128), photo])
    monkeypatch.setattr(app, "read_clip", lambda path: Clip(frames, 8.0))
    embeddings = studio.embed_photos(app.Job("A woman", (photos["her"],)))
    figure = studio.draw(Path("unread.mp4"), embeddings)
    [axes] = figure.axes
    values = axes.lines[0].get_ydata()
    assert values[[0, 2]] == pytest.approx(1, abs=0.02)
    assert np.isnan(values[1])
    title = axes.get_title(loc="left")
    assert "mean of 1 photo:" in title
    assert "1 of 3 frames without a face" in title
    assert "judge: dlib, the recogniser that also conditions the video" in title


def test_the_judge_sees_the_face_that_was_chosen(studio, photos):
    """Embedded from the whole picture, as `FaceReader` does, and from the square that the condition sees."""
    reader, photo = studio.reader, app.photo_reading.load_photo(photos["group"])
    faces = app.photo_reading.find_faces(photo, reader.detector)
    pixels = torch.from_numpy(photo).movedim(-1, 0)[None].float() / 127.5 - 1
    expected = torch.cat([reader.recognizer.embed(pixels, torch.from_numpy(f.landmarks).float()[None]) for f in faces])
    for i in range(len(faces)):
        embedding = studio.embed_photos(app.Job("A woman", (photos["group"],), face_index=i))[0, 0]
        assert (expected - embedding).norm(dim=-1).argmin() == i


def test_no_face_at_all_is_no_similarity():
    [axes] = app.draw_similarity([float("nan")] * 2, 3, "dlib", conditions=False).axes
    title = axes.get_title(loc="left")
    assert "mean of 3 photos: unknown\n2 of 2 frames without a face" in title
    assert title.endswith("\njudge: dlib")


def test_several_photos_and_which_face(make, photos, monkeypatch):
    told = []
    monkeypatch.setattr(gr, "Warning", lambda text, duration: told.append(text))
    make(photos["group"], photos["her"])
    assert told == ["group.png shows 6 faces; the largest is taken. face_index=0, 1, ... chooses, from the left."]
    assert not app.photo_reading.logger.handlers
    made = make(photos["group"], face_index="2")
    assert json.loads(Path(made.record).read_text())["job"]["face_index"] == 2
    assert len(told) == 1


# What it tells


@pytest.mark.parametrize(
    ("names", "values", "told"),
    [
        (["grey"], {}, "No face found in grey.png: give a photo that shows it from the front"),
        (["her", "text"], {}, "text.png cannot be read as a picture"),
        ([], {}, "No photo: upload at least one"),
        (["her"], {"prompt": "A <b>dog</b>"}, "No word for a person in the prompt 'A &lt;b&gt;dog&lt;/b&gt;'"),
        (["her"], {"prompt": ""}, "No word for a person in the prompt ''"),
        (["her"], {"num_frames": 6}, "6 frames does not fit"),
        (["her"], {"width": 40}, "width=40 is no multiple of 16"),
        (["group"], {"face_index": "6"}, "face_index=6, but group.png shows 6 faces"),
    ],
)
def test_mistakes_are_one_message_and_the_next_request_works(make, photos, studio, names, values, told):
    before = set(studio.out.glob("*.mp4"))
    with pytest.raises(gr.Error) as error:
        make(*(photos[name] for name in names), **values)
    assert told in error.value.message
    assert str(Path(photos["her"]).parent) not in error.value.message
    assert set(studio.out.glob("*.mp4")) == before
    assert Path(make(photos["her"]).video).is_file()


def test_a_full_device_is_told(make, photos, studio, monkeypatch):
    def full(*args, **kwargs):
        raise app.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(studio.pipeline, "encode_references", full)
    with pytest.raises(gr.Error) as error:
        make(photos["her"], seed=99)
    assert "fewer frames or a smaller size" in error.value.message


def test_examples_are_the_people_held_out(tmp_path):
    assert app.read_examples(tmp_path / "nowhere.tar", tmp_path) == []
    with tarfile.open(tmp_path / "people.tar", "w") as archive:
        for key in ("p90001-s0", "p90000-s0", "p90000-s1"):
            for ending, content in ((".jpg", b"a picture"), (".ref0.jpg", b"another"), (".txt", key.encode())):
                member = tarfile.TarInfo(key + ending)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    examples = app.read_examples(tmp_path / "people.tar", tmp_path / "out")
    assert examples == [(str(tmp_path / f"out/p9000{i}-s0.jpg"), f"p9000{i}-s0") for i in range(2)]
    assert Path(examples[0][0]).read_bytes() == b"a picture"


def test_weights_that_are_missing():
    with pytest.raises(SystemExit, match="error: The base model folder /nowhere does not exist"):
        app.main(["--base", "/nowhere", "--adapter", "/nowhere"])


# What it serves


@pytest.fixture
def page(studio, photos):
    example = studio.out / "examples/her.png"
    example.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(photos["her"], example)
    page = app.build(studio, [(str(example), "A man img runs")])
    app.serve(page, "127.0.0.1", None, block=False)
    yield page
    page.close()


def fetch(page, file):
    try:
        with urllib.request.urlopen(f"{page.local_url}gradio_api/file={urllib.parse.quote(str(file))}") as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_only_this_machine_reaches_it(page):
    addresses = [socket.getsockname() for server in page.server.servers for socket in server.sockets]
    assert addresses == [("127.0.0.1", page.server_port)]
    assert page.local_url == f"http://127.0.0.1:{page.server_port}/"


def test_only_the_output_folder_is_served(page, studio, make, photos, tmp_path):
    video = Path(make(photos["her"]).video)
    assert fetch(page, video) == (200, video.read_bytes())
    near = studio.out.parent / "near.png"
    shutil.copy(photos["her"], near)
    outside = [near, photos["her"], app.__file__, "/etc/passwd", "pyproject.toml", f"{studio.out}/../near.png"]
    assert [fetch(page, file)[0] for file in outside] == [403] * len(outside)


def test_another_host_is_warned_about(studio, monkeypatch, caplog):
    page = app.build(studio)
    monkeypatch.setattr(page, "launch", lambda **options: None)
    with caplog.at_level(logging.WARNING):
        app.serve(page, "127.0.0.1", None)
        app.serve(page, "::1", None)
        assert not caplog.text
        app.serve(page, "0.0.0.0", None)
    assert "Whoever reaches this machine at 0.0.0.0 can use the page" in caplog.text


# In a browser


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def local_tab(browser, page, asked):
    """A tab without internet that notes what else it asks for."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})

    def route(request):
        asked.append(request.request.url)
        request.abort()

    tab.set_default_timeout(180_000)
    tab.route(lambda url: not url.startswith((page.local_url, "data:", "blob:")), route)
    tab.goto(page.local_url)
    return tab


@pytest.mark.slow
def test_upload_generate_play_and_an_error(browser, page, photos, monkeypatch, tmp_path):
    report_steps = app.report_steps

    def slow_steps(progress):
        """So that the bar can be seen."""
        report = report_steps(progress)
        return lambda *arguments: time.sleep(0.05) or report(*arguments)

    monkeypatch.setattr(app, "report_steps", slow_steps)
    asked = []
    tab = local_tab(browser, page, asked)
    tab.get_by_text("nothing in it was ever filmed").wait_for()
    tab.get_by_text("Use photos only of people who consent to it").wait_for()
    tab.set_input_files("input[type=file]", photos["her"])
    tab.get_by_placeholder("A woman img").fill("A woman img smiles")
    tab.get_by_role("button", name="Generate").click()
    tab.get_by_text("denoising").wait_for()
    tab.wait_for_selector("video")
    tab.wait_for_function("() => document.querySelector('video').currentTime > 0")
    assert tab.evaluate("() => document.querySelector('video').duration") == pytest.approx(9 / 8, abs=0.2)
    tab.get_by_alt_text("plot").wait_for()
    with tab.expect_download() as download:
        tab.locator("a[download$='.mp4']").click()
    download.value.save_as(tmp_path / "downloaded.mp4")
    assert read_mark(tmp_path / "downloaded.mp4").intact
    tab.get_by_role("button", name="Clear").click()
    tab.set_input_files("input[type=file]", photos["grey"])
    tab.get_by_role("button", name="Generate").click()
    tab.get_by_text("No face found in grey.png").wait_for()
    assert tab.locator("video, a[download]").count() == 0
    tab.get_by_text("A man img runs").click()  # the example, with its photo
    tab.wait_for_selector("[aria-label='Thumbnail 1 of 1'] img[src$='her.png']")
    tab.get_by_role("button", name="Generate").click()
    tab.wait_for_selector("video")
    assert asked == []
