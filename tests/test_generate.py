"""`python -m mm_lightning.generate`, as a user types it, on the smallest CogVideoX."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
import skimage.data
from cryptography.hazmat.primitives import serialization
from PIL import Image
from safetensors.torch import load_file, save_file

from mm_lightning import generate
from mm_lightning.credentials import make_certificates, read_mark, read_signing, try_signing
from mm_lightning.generate import main
from mm_lightning.media import DISCLOSURE
from mm_lightning.miniature.sampling import Sampling
from mm_lightning.prepare.samples import packaged_file
from tests.conftest import ROOT
from tests.test_pipeline import trained  # noqa: F401

FAST = ["--num-inference-steps", "2", "--height", "32", "--width", "32", "--num-frames", "5", "--guidance-scale", "2"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """No test signs with, or writes, the user's own key."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    file = tmp_path_factory.mktemp("photos") / "her.png"
    Image.fromarray(skimage.data.astronaut()).save(file)
    return file


@pytest.fixture
def weights(tiny_folder, trained):  # noqa: F811
    return ["--base", str(tiny_folder), "--adapter", str(trained.adapter), "--detector", "dlib"]


@pytest.fixture
def run(weights, photo, tmp_path):
    def run(*arguments, photos=(str(photo),)):
        given = ["--photos", *photos] if photos else []
        main([*given, *FAST, *weights, "--out", str(tmp_path / "out"), *arguments])
        return tmp_path / "out"

    return run


def decode(file):
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)], stream


@pytest.mark.parametrize(
    ("arguments", "guidance"),
    [
        ((), (2.0, 1.5)),
        (("--base", "weights/CogVideoX-5b"), (6.0, 1.0)),
        (("--guidance-scale", "1"), (1.0, 1.5)),
        (("--identity-guidance-scale", "1"), (2.0, 1.0)),
    ],
)
def test_guidance_is_the_bases_own_unless_one_is_given(photo, arguments, guidance):
    _, options = generate.parse(["--photos", str(photo), "--prompt", "A woman img smiles", *arguments])
    [job] = generate.collect_jobs(options)
    assert (job.guidance_scale, job.identity_guidance_scale) == guidance


def test_the_miniature_is_guided_as_its_table_was_measured():
    measured = Sampling()
    assert (measured.guidance, measured.identity_guidance) == generate.MINIATURE_GUIDANCE


def test_a_video_its_sheet_its_record_and_the_manifest(run, photo):
    out = run("--prompt", "A woman img smiles", "--seed", "7")
    [file] = out.glob("*.mp4")
    frames, stream = decode(file)
    assert (len(frames), frames[0].shape) == (5, (32, 32, 3))
    assert (stream.codec_context.name, float(stream.average_rate)) == ("h264", 8.0)
    assert re.fullmatch("000-a-woman-img-smiles-[0-9a-f]{6}.mp4", file.name)
    sheet = Image.open(file.with_suffix(".sheet.jpg"))
    assert sheet.size[0] > 6 * 192
    assert sheet.info["comment"].decode() == DISCLOSURE
    record = json.loads(file.with_suffix(".json").read_text())
    assert record["job"]["seed"] == 7
    assert record["job"]["photos"][0]["sha256"] == generate.sha256(photo)
    assert len(record["adapter"]["sha256"]) == 64
    assert set(record["versions"]) == {"magicmirror-lightning", "torch", "diffusers", "transformers"}
    [entry] = json.loads((out / "manifest.json").read_text())
    assert entry["video"] == file.name
    assert entry["references"] == [photo.as_posix()]


def test_a_record_makes_the_same_video_again(run, weights, tmp_path):
    out = run("--prompt", "A woman img smiles", "--seed", "7", "--face-scale", "0.7")
    [file] = out.glob("*.mp4")
    main(["--jobs", str(file.with_suffix(".json")), *weights, "--out", str(tmp_path / "again")])
    again = tmp_path / "again" / file.name
    assert np.array_equal(decode(file)[0], decode(again)[0])


def test_what_is_there_is_kept_and_other_settings_make_it_anew(run):
    arguments = ["--prompt", "A woman img smiles", "--name", "she"]
    video = run(*arguments) / "she.mp4"
    made = video.stat().st_mtime_ns
    assert (run(*arguments) / "she.mp4").stat().st_mtime_ns == made
    assert (run(*arguments, "--seed", "1") / "she.mp4").stat().st_mtime_ns > made
    assert len(json.loads((video.parent / "manifest.json").read_text())) == 1


def test_a_base_that_was_trained_again_makes_it_anew(run, tiny_folder, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    arguments = ["--prompt", "A woman img smiles", "--name", "she", "--base", str(base)]
    record = run(*arguments) / "she.json"
    before, made = json.loads(record.read_text())["weights"], record.stat().st_mtime_ns
    assert set(before) == {"transformer", "vae", "text_encoder", "image_encoder"}
    [vae] = (base / "vae").glob("*.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in load_file(vae).items()}, vae, metadata={"format": "pt"})
    run(*arguments)
    after = json.loads(record.read_text())["weights"]
    assert record.stat().st_mtime_ns > made
    assert {name for name in after if after[name] != before[name]} == {"vae"}


def test_several_prompts_and_seeds(run):
    out = run("--prompt", "A woman img smiles", "--prompt", "A man img runs", "--num-videos", "2")
    names = [file.stem.split("-") for file in sorted(out.glob("*.mp4"))]
    assert [(*name[:4], name[-1]) for name in names] == [
        ("000", "a", "woman", "img", "0"), ("000", "a", "woman", "img", "1"),
        ("001", "a", "man", "img", "0"), ("001", "a", "man", "img", "1"),
    ]  # fmt: skip
    assert len({file.read_bytes() for file in out.glob("*.mp4")}) == 4
    assert len(json.loads((out / "manifest.json").read_text())) == 4


def test_one_frame_is_a_png(run):
    out = run("--prompt", "A woman img smiles", "--num-frames", "1", "--name", "still")
    mark = read_mark(out / "still.png")
    assert Image.open(out / "still.png").size == (32, 32)
    assert (mark.comment, mark.intact, mark.generated) == (DISCLOSURE, True, True)


def test_a_record_does_not_outlive_its_video(run, monkeypatch):
    """Interrupted between the new video and its record, then asked for the former one again."""
    first, _ = decode(run("--prompt", "A woman img smiles", "--name", "she") / "she.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(generate.Generator, "write_sheet", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run("--prompt", "A woman img smiles", "--name", "she", "--seed", "1")
    again, _ = decode(run("--prompt", "A woman img smiles", "--name", "she") / "she.mp4")
    assert np.array_equal(again, first)


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_jobs_from_a_file(run, photo, tmp_path, kind):
    other = tmp_path / "other.jpg"
    Image.open(packaged_file("insightface", "data/images/t1.jpg")).save(other)
    rows = [
        {"name": "one", "prompt": "A woman img smiles", "seed": "3"},
        {"name": "two", "prompt": "A man img runs", "photos": f"{photo};other.jpg", "face_index": "0"},
    ]
    file = tmp_path / f"jobs.{kind}"
    if kind == "json":
        rows[1] |= {"photos": [str(photo), "other.jpg"], "face_index": 0}
        file.write_text(json.dumps(rows))
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, ["name", "prompt", "seed", "photos", "face_index"])
        writer.writeheader()
        writer.writerows(rows)
        file.write_text(text.getvalue())
    out = run("--jobs", str(file))
    one, two = (json.loads((out / f"{name}.json").read_text())["job"] for name in ("one", "two"))
    assert (one["seed"], len(one["photos"]), one["num_frames"]) == (3, 1, 5)
    assert ([p["file"] for p in two["photos"]], two["face_index"]) == ([photo.as_posix(), other.as_posix()], 0)


def test_a_job_that_cannot_be_made_does_not_keep_others_from_it(run, photo, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    rows = [{"name": name, "prompt": "A woman img smiles", "photos": [str(file)]}
            for name, file in (("one", photo), ("none", tmp_path / "black.png"), ("two", photo))]  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps(rows))
    with pytest.raises(SystemExit, match=r"not made: none: No face found in .*black\.png"):
        run("--jobs", str(tmp_path / "jobs.json"))
    assert sorted(file.name for file in (tmp_path / "out").glob("*.mp4")) == ["one.mp4", "two.mp4"]


def test_parts_make_all_videos_and_one_manifest(run, photo, tmp_path):
    rows = [{"name": f"n{i}", "prompt": "A woman img smiles", "photos": [str(photo)]} for i in range(3)]
    (tmp_path / "jobs.json").write_text(json.dumps(rows))
    out = run("--jobs", str(tmp_path / "jobs.json"), "--part", "1/2")
    assert [file.name for file in out.glob("*.mp4")] == ["n1.mp4"]
    run("--jobs", str(tmp_path / "jobs.json"), "--part", "0/2")
    assert [entry["video"] for entry in json.loads((out / "manifest.json").read_text())] == [
        "n1.mp4",
        "n0.mp4",
        "n2.mp4",
    ]


def test_entries_that_many_add_at_once_are_all_kept(tmp_path):
    def add(number):
        generate.add_to_manifest(tmp_path / "manifest.json", [{"video": f"{number}.mp4"}])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(40)))
    entries = json.loads((tmp_path / "manifest.json").read_text())
    assert sorted(entry["video"] for entry in entries) == sorted(f"{i}.mp4" for i in range(40))


def test_a_part_without_jobs_loads_nothing(run, nothing_loads, caplog):
    caplog.set_level("INFO")
    run("--prompt", "A woman img smiles", "--part", "3/4")
    assert "Part 3/4 has no jobs." in caplog.text


def test_other_prompts_and_people_have_names_of_their_own(run, photo, tmp_path):
    """However alike they begin, and in letters that no file name takes."""
    shutil.copy(photo, tmp_path / "other.png")
    prompts = [f"A woman img laughs in the {place}" for place in ("rain", "snow")]
    out = run("--prompt", prompts[0])
    run("--prompt", prompts[1])
    run("--prompt", prompts[0], photos=(str(tmp_path / "other.png"),))
    run("--prompt", "女 img")
    run("--prompt", "男 img")
    assert len(list(out.glob("*.mp4"))) == len(json.loads((out / "manifest.json").read_text())) == 5
    run("--prompt", prompts[0])
    assert len(list(out.glob("*.mp4"))) == 5


def test_a_record_brings_back_what_is_no_field_of_a_job(run, tmp_path):
    """Frames per second, scheduler, precision, tiling."""
    options = ["--fps", "16", "--scheduler", "dpm", "--dtype", "bfloat16", "--tiling"]
    out = run("--prompt", "A woman img smiles", "--name", "she", *options)
    record, made = out / "she.json", (out / "she.mp4").stat().st_mtime_ns
    told = json.loads(record.read_text())
    assert (told["fps"], told["scheduler"], told["dtype"]) == (16, "CogVideoXDPMScheduler", "bfloat16")
    run("--jobs", str(record), photos=())
    assert (out / "she.mp4").stat().st_mtime_ns == made  # made in the same way: kept
    unsigned = run("--prompt", "A woman img smiles", "--name", "unsigned", "--unsigned") / "unsigned.mp4"
    made = unsigned.stat().st_mtime_ns
    run("--jobs", str(out / "unsigned.json"), photos=())
    assert unsigned.stat().st_mtime_ns == made
    run("--jobs", str(record), "--fps", "8", photos=())
    assert (json.loads(record.read_text())["fps"], json.loads(record.read_text())["dtype"]) == (8, "bfloat16")


@pytest.mark.parametrize("change", [["--dtype", "bfloat16"], ["--tiling"], ["--unsigned"]])
def test_other_precision_tiles_or_marks_make_it_anew(run, change):
    first = ["--prompt", "A woman img smiles", "--name", "she"]
    made = (run(*first) / "she.mp4").stat().st_mtime_ns
    assert (run(*first, *change) / "she.mp4").stat().st_mtime_ns > made


def test_tiles_fit_together(run):
    """The default overlap of a tile of few latents is no whole number of them."""
    frames, _ = decode(run("--prompt", "A woman img smiles", "--name", "she", "--tiling", "--width", "64") / "she.mp4")
    assert {frame.shape for frame in frames} == {(32, 64, 3)}


@pytest.mark.parametrize(("content", "message"), [("{", "cannot be read"), ('{"a": 1}', "is no list of videos")])
def test_a_manifest_that_is_none_is_told_before_anything_is_made(run, nothing_loads, tmp_path, content, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/manifest.json").write_text(content)
    with pytest.raises(SystemExit, match=f"manifest.json {message}.*move it away"):
        run("--prompt", "A woman img smiles")


@pytest.mark.parametrize("content", ["[]", "{", '{"job": 3}'])
def test_a_record_that_cannot_be_read_vouches_for_nothing(run, content):
    out = run("--prompt", "A woman img smiles", "--name", "she")
    (out / "she.json").write_text(content)
    made = (out / "she.mp4").stat().st_mtime_ns
    run("--prompt", "A woman img smiles", "--name", "she")
    assert (out / "she.mp4").stat().st_mtime_ns > made


@pytest.mark.parametrize("change", [{"fps": "8"}, {"dtype": "bf16"}])
def test_a_record_that_no_run_wrote(run, nothing_loads, photo, tmp_path, change):
    record = {"job": {"prompt": "A woman img smiles", "photos": [str(photo)]}}
    (tmp_path / "she.json").write_text(json.dumps(record | change))
    with pytest.raises(SystemExit, match="was written by no run"):
        run("--jobs", str(tmp_path / "she.json"), photos=())


def test_two_runs_at_once_lose_nothing(weights, photo, tmp_path):
    """Into the same folder, under the same names."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mm_lightning.generate", "--photos", str(photo), *FAST, *weights]
    command += ["--prompt", "A woman img smiles", "--num-videos", "12", "--out", str(out)]
    runs = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        ended = [(run.communicate(timeout=300)[1], run.returncode) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [code for _, code in ended] == [0, 0], ended
    assert [read_mark(file).intact for file in out.glob("*.mp4")] == [True] * 12
    assert {file.suffix for file in out.iterdir()} == {".mp4", ".json", ".jpg", ".lock"}


def test_nobody_in_particular(run):
    out = run("--prompt", "A dog runs", "--face-scale", "0", "--name", "dog", photos=())
    assert (out / "dog.mp4").is_file()


# Marks


def test_verify_reads_the_marks_back(run, capsys, tmp_path):
    out = run("--prompt", "A woman img smiles", "--name", "she")
    capsys.readouterr()
    main(["verify", str(out / "she.mp4")])
    said = capsys.readouterr().out
    assert DISCLOSURE in said
    assert "made by a trained model; unchanged since" in said
    assert "test certificate of this machine (not on a trust list" in said
    damaged = tmp_path / "damaged.mp4"
    data = bytearray((out / "she.mp4").read_bytes())
    data[len(data) // 2] ^= 255
    damaged.write_bytes(data)
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(SystemExit) as ended:
        main(["verify", str(damaged), str(tmp_path / "text.jpg"), "/nowhere.mp4", str(out / "she.mp4")])
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "CHANGED SINCE" in said
    assert "text.jpg\n  error: " in said
    assert "error: No such file: /nowhere.mp4" in said
    assert "unchanged since" in said  # of the last, after those


def test_unsigned_files_keep_their_comment(run, capsys):
    out = run("--prompt", "A woman img smiles", "--name", "she", "--unsigned")
    capsys.readouterr()
    main(["verify", str(out / "she.mp4")])
    said = capsys.readouterr().out
    assert DISCLOSURE in said
    assert "content credentials: none" in said


def test_a_signer_of_ones_own(run, tmp_path):
    signing = make_certificates()
    (tmp_path / "key.pem").write_bytes(signing.key)
    (tmp_path / "chain.pem").write_bytes(signing.certificates)
    signer = ["--signing-key", str(tmp_path / "key.pem"), "--signing-certificates", str(tmp_path / "chain.pem")]
    out = run("--prompt", "A woman img smiles", "--name", "she", *signer)
    assert read_mark(out / "she.mp4").intact
    with pytest.raises(SystemExit, match="go together"):
        run("--prompt", "A woman img smiles", "--signing-key", str(tmp_path / "key.pem"))


def encrypted(pem):
    key = serialization.load_pem_private_key(pem, None)
    hidden = serialization.BestAvailableEncryption(b"secret")
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda signing: signing._replace(key=make_certificates().key), "the signature does not match"),
        (lambda signing: signing._replace(key=b"no key"), "Unable to load PEM file"),
        (lambda signing: signing._replace(key=encrypted(signing.key)), "The signing key is encrypted"),
        (lambda signing: signing._replace(certificates=b"no certificate"), "does not contain signing certificate"),
    ],
    ids=["of another", "no key", "encrypted", "no certificate"],
)
def test_what_cannot_sign_is_told_before_anything_is_made(run, nothing_loads, tmp_path, change, message):
    signing = change(make_certificates())
    (tmp_path / "key.pem").write_bytes(signing.key)
    (tmp_path / "chain.pem").write_bytes(signing.certificates)
    signer = ["--signing-key", str(tmp_path / "key.pem"), "--signing-certificates", str(tmp_path / "chain.pem")]
    with pytest.raises(SystemExit, match=message):
        run("--prompt", "A woman img smiles", *signer)


def test_parts_that_start_together_share_one_key(tmp_path, monkeypatch):
    """Each sees no key at first, and makes one slowly."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def slow():
        time.sleep(0.1)
        return make_certificates()

    monkeypatch.setattr("mm_lightning.credentials.make_certificates", slow)
    with ThreadPoolExecutor(4) as pool:
        signings = set(pool.map(lambda _: read_signing(), range(4)))
    assert len(signings) == 1
    try_signing(signings.pop())


def test_the_machines_key_is_for_its_owner_alone(run, tmp_path_factory):
    run("--prompt", "A woman img smiles")
    key = tmp_path_factory.getbasetemp() / "cache/magicmirror-lightning/signing/key.pem"
    assert key.stat().st_mode & 0o777 == 0o600


# Mistakes, told before anything is loaded


@pytest.fixture
def nothing_loads(monkeypatch):
    monkeypatch.setattr(generate, "load_pipeline", lambda options: pytest.fail("the weights were loaded"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing to make"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "A man", "--num-videos", "0"], "--num-videos=0"),
        (["--prompt", "A man", "--part", "4/4"], "--part=4/4: give which part, from 0"),
        (["--prompt", "A man", "--part", "half"], "--part=half: give which part, from 0"),
        (["--prompt", "A man", "--seed", "-1"], "000-a-man-.*: seed=-1: give a number from 0"),
        (["--prompt", "A man", "--num-inference-steps", "0"], "num_inference_steps=0: give a number from 1"),
        (["--prompt", "A man", "--face-scale", "nan"], "face_scale=nan: give a number from 0"),
        (["--prompt", "A man", "--identity-guidance-scale", "inf"], "identity_guidance_scale=inf: give a number"),
        (["--prompt", "A man", "--num-frames", "6"], "000-a-man-.*: A clip of 6 frames .* the nearest are 5 and 9"),
        (["--prompt", "A man", "--height", "40"], "000-a-man-.*: height=40 is no multiple of 16"),
        (["--prompt", "A man", "--fps", "0"], "--fps=0.0: give a number from 0.1 to 240"),
        (["--prompt", "A man", "--out", __file__], "Nothing can be written to .*: .*test_generate.py is a file"),
        (["--prompt", "A man", "--out", f"{__file__}/out"], "test_generate.py is a file"),
        (["--prompt", "A dog"], "000-a-dog-.*: No word for a person"),
        (["--prompt", "A man", "--name", "a/b"], "name='a/b' is no file name"),
        (["--prompt", "A man", "--prompt", "A boy", "--name", "he"], "Two jobs have the same name"),
        (["--prompt", "A man", "--photos", "/nowhere.jpg"], "No photo at /nowhere.jpg"),
        (["--prompt", "A man", "--photos", __file__], "cannot be read as a picture"),
        (["--jobs", "/nowhere.csv"], "No file of jobs at /nowhere.csv"),
    ],
)
def test_mistakes(run, nothing_loads, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(*arguments)


def test_no_such_device(run, monkeypatch):
    monkeypatch.setattr("mm_lightning.backbone.load_component", lambda *args: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match="device=cudo: torch has none here"):
        run("--prompt", "A man", "--device", "cudo")


def test_a_photo_is_needed(run, nothing_loads):
    with pytest.raises(SystemExit, match="no photo; give --photos"):
        run("--prompt", "A man", photos=())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds no jobs"),
        ("{", "neither as JSON nor as CSV"),
        ('[{"promt": "A man"}]', "entry 1: unknown promt; a job has prompt, photos"),
        ('[{"prompt": "A man", "seed": "many"}]', "entry 1: seed='many': invalid literal for int"),
        ('[{"prompt": "A man", "seed": 1.5}]', "entry 1: seed=1.5: 1.5 is no whole number"),
        ('[{"prompt": "A man", "guidance_scale": NaN}]', "entry 1: guidance_scale=nan: nan is no number"),
        ('[{"prompt": "A man", "use_dynamic_cfg": 2}]', "use_dynamic_cfg=2: 2 is neither true nor false"),
        ('[{"prompt": 3}]', "entry 1: prompt=3: 3 is no text"),
        ('[{"prompt": "A man", "photos": [3]}]', r"photos=\[3\]: photos are paths"),
        ('[{"prompt": "A man", "photos": 3}]', "entry 1: photos=3"),
        ("[3]", "entry 1: unknown 3"),
        ("prompt,photos\nA woman img laughs, in the rain,her.png\n", "beyond the fields of the head line"),
    ],
)
def test_mistakes_in_a_file_of_jobs(run, nothing_loads, tmp_path, content, message):
    file = tmp_path / ("jobs.csv" if content.startswith("prompt") else "jobs.json")
    file.write_text(content)
    with pytest.raises(SystemExit, match=message):
        run("--jobs", str(file))


def test_weights_that_are_missing_and_prompts_without_a_person(run, weights, photo, tmp_path):
    with pytest.raises(SystemExit, match="base model folder /nowhere does not exist"):
        run("--prompt", "A man", "--base", "/nowhere")
    with pytest.raises(SystemExit, match="No word for a person"):
        run("--prompt", "A dog")
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_as_a_command():
    command = [sys.executable, "-m", "mm_lightning.generate", "verify", "/nowhere.mp4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "/nowhere.mp4\n  error: No such file: /nowhere.mp4.\n")
    command.pop()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: verify: give the files to look at.\n")
