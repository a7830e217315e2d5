"""Diffusers' own pipelines on our jobs: the smallest random ones."""

import json
import shutil

import numpy as np
import pytest
import skimage.data
import torch
from diffusers import (
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    ConsisIDPipeline,
    ConsisIDTransformer3DModel,
)
from PIL import Image

from mm_lightning.evaluation.baselines import TRIGGER, Baseline, first_frame, main
from mm_lightning.evaluation.clips import read_clip
from mm_lightning.evaluation.manifest import read_manifest
from mm_lightning.jobs import Job
from mm_lightning.provenance import fingerprint

FAST = ["--num-inference-steps", "2", "--height", "32", "--width", "32", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def jobs(tmp_path):
    Image.fromarray(skimage.data.astronaut()[:, :400]).save(tmp_path / "her.png")
    rows = [{"name": "she", "prompt": "A woman img smiles", "photos": ["her.png"], "identity": "her", "num_frames": 5}]
    (tmp_path / "jobs.json").write_text(json.dumps(rows))
    return tmp_path / "jobs.json"


@pytest.fixture(scope="module")
def i2v_folder(tiny_folder, tmp_path_factory):
    """The tiny model with a transformer that is also given the first frame's latents."""
    pipe = CogVideoXPipeline.from_pretrained(tiny_folder)
    config = {**pipe.transformer.config, "in_channels": 2 * pipe.transformer.config.in_channels}
    torch.manual_seed(0)
    pipe.transformer = CogVideoXTransformer3DModel.from_config(config)
    folder = tmp_path_factory.mktemp("i2v") / "cogvideox-i2v"
    CogVideoXImageToVideoPipeline(**pipe.components).save_pretrained(folder)
    return folder


def run(method, base, jobs, out, *more):
    main([method, "--base", str(base), "--jobs", str(jobs), "--out", str(out), *FAST, *more])
    return read_manifest(out)


def test_text_to_video_is_diffusers_own(tiny_folder, jobs, tmp_path):
    [entry] = run("cogvideox", tiny_folder, jobs, tmp_path / "out", "--guidance-scale", "3")
    pipe = CogVideoXPipeline.from_pretrained(tiny_folder)
    expected = pipe(
        "A woman smiles", height=32, width=32, num_frames=5, num_inference_steps=2, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0), output_type="np", max_sequence_length=32,
    ).frames[0]  # fmt: skip
    frames = read_clip(entry.video).frames
    assert frames.shape == (5, 32, 32, 3)
    assert np.abs(frames.mean((1, 2)) - 255 * expected[-5:].mean((1, 2))).max() < 8  # of 255, through H.264
    assert (entry.identity, entry.prompt) == ("her", "A woman img smiles")
    record = json.loads(entry.video.with_suffix(".json").read_text())
    assert record["weights"] == fingerprint(sorted(tiny_folder.rglob("*.safetensors")))["weights"]
    assert (record["dtype"], record["versions"]["torch"]) == ("float32", torch.__version__)


def test_a_hub_id_is_its_snapshot(tiny_folder, jobs, tmp_path, monkeypatch):
    cached = tmp_path / "hub/models--somebody--cogvideox-small"
    shutil.copytree(tiny_folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    [entry] = run("cogvideox", "somebody/cogvideox-small", jobs, tmp_path / "out")
    record = json.loads(entry.video.with_suffix(".json").read_text())
    assert record["base"] == "somebody/cogvideox-small"
    assert record["weights"] == fingerprint(sorted(tiny_folder.rglob("*.safetensors")))["weights"]


def test_parts_scheduler_and_memory_as_of_generate(tiny_folder, jobs, tmp_path, monkeypatch):
    [row] = json.loads(jobs.read_text())
    jobs.write_text(json.dumps([row, row | {"name": "again", "seed": 1}]))
    saving = ["--offload", "model", "--tiling", "--scheduler", "ddim"]
    [entry] = run("cogvideox", tiny_folder, jobs, tmp_path / "out", "--part", "1/2", *saving)
    assert entry.video.name == "again.mp4"
    assert json.loads(entry.video.with_suffix(".json").read_text())["scheduler"] == "CogVideoXDDIMScheduler"
    assert len(run("cogvideox", tiny_folder, jobs, tmp_path / "out", "--part", "0/2")) == 2
    monkeypatch.setattr(CogVideoXPipeline, "from_pretrained", pytest.fail)
    run("cogvideox", tiny_folder, jobs, tmp_path / "out", "--part", "2/3")  # has no jobs


def test_image_to_video_starts_from_the_photo(i2v_folder, jobs, tmp_path):
    [entry] = run("cogvideox_i2v", i2v_folder, jobs, tmp_path / "out")
    assert read_clip(entry.video).frames.shape == (5, 32, 32, 3)
    record = json.loads(entry.video.with_suffix(".json").read_text())
    assert record["method"] == "cogvideox_i2v"


@pytest.mark.parametrize(
    ("prompt", "plain"),
    [("A woman IMG smiles", "A woman smiles"), ("A man img in an imgur office", "A man in an imgur office")],
)
def test_the_trigger_alone_is_left_out(prompt, plain):
    assert TRIGGER.sub("", prompt) == plain


def test_the_first_frame_is_the_middle_of_the_photo(tmp_path):
    photo = np.zeros((100, 60, 3), np.uint8)
    photo[45:55] = 255
    Image.fromarray(photo).save(tmp_path / "p.png")
    image = first_frame(Job("", (str(tmp_path / "p.png"),)), height=20, width=60)["image"]
    assert image.size == (60, 20)
    assert np.asarray(image)[10].mean() == 255


def test_consisid_runs_with_what_its_helpers_give(tiny_folder, jobs, tmp_path):
    base = CogVideoXPipeline.from_pretrained(tiny_folder)
    config = base.transformer.config
    sizes = {n: config[n] for n in ("num_attention_heads", "attention_head_dim", "time_embed_dim", "text_embed_dim")}
    torch.manual_seed(0)
    transformer = ConsisIDTransformer3DModel(
        **sizes, in_channels=2 * config.in_channels, out_channels=config.in_channels, num_layers=1, sample_width=4,
        sample_height=4, sample_frames=9, max_text_seq_length=32, use_rotary_positional_embeddings=True,
        is_train_face=True, cross_attn_interval=1, cross_attn_dim_head=4, cross_attn_num_heads=1, LFE_id_dim=2,
        LFE_vit_dim=2, LFE_depth=5, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=1,
        LFE_output_dim=21, LFE_ff_mult=1, LFE_num_scale=1,
    )  # fmt: skip
    pipe = ConsisIDPipeline(**{**base.components, "transformer": transformer})

    def condition(job, height, width):
        face = {"id_vit_hidden": [torch.ones(1, 2, 2)], "id_cond": torch.ones(1, 2)}
        return first_frame(job, height, width) | face

    job = Job("A woman img smiles", (str(jobs.parent / "her.png"),), name="she", num_frames=5, height=32, width=32,
              num_inference_steps=2, guidance_scale=1.0)  # fmt: skip
    [video] = Baseline(pipe, tmp_path / "out", {"method": "consisid"}, condition).run([job])
    assert read_clip(video).frames.shape == (5, 32, 32, 3)


def test_consisid_says_which_packages_it_wants(tiny_folder, jobs, tmp_path):
    base = tmp_path / "consisid"
    shutil.copytree(tiny_folder, base)
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"_class_name": "ConsisIDPipeline"}))
    with pytest.raises(SystemExit, match="error: "):
        run("consisid", base, jobs, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cogvideox", "--base", "/nowhere/at/all"], "/nowhere/at/all does not exist"),
        (["cogvideox", "--base", "."], "has no model_index.json"),
        (["cogvideox_i2v"], "is a CogVideoXPipeline, cogvideox_i2v is a CogVideoXImageToVideoPipeline"),
        (["cogvideox", "--jobs", "/nowhere.json"], "No file of jobs"),
        (["cogvideox", "--device", "cudo"], "device=cudo: torch has none here. Give auto, or one of cpu"),
        (["cogvideox", "--height", "40"], "she: height=40 is no multiple of 16"),
        (["cogvideox", "--part", "2/2"], "--part=2/2"),
    ],
)
def test_mistakes(tiny_folder, jobs, tmp_path, monkeypatch, arguments, message):
    for pipeline in (CogVideoXPipeline, CogVideoXImageToVideoPipeline):
        monkeypatch.setattr(pipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    given = ["--base", str(tiny_folder), "--jobs", str(jobs), "--out", str(tmp_path / "out"), *FAST]
    with pytest.raises(SystemExit, match=message):
        main([arguments[0], *given, *arguments[1:]])


def test_a_picture_is_needed_where_a_method_starts_from_one(i2v_folder, jobs, tmp_path):
    jobs.write_text(json.dumps([{"name": "none", "prompt": "A woman smiles", "face_scale": 0}]))
    with pytest.raises(SystemExit, match="cogvideox_i2v starts from a photo, and these jobs have none: none"):
        run("cogvideox_i2v", i2v_folder, jobs, tmp_path / "out")
