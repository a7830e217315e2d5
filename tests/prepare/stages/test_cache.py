"""Cached tensors: what the training computes itself, bit for bit, and refused when they are stale."""

import json
import shutil

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors import safe_open
from safetensors.torch import load

from datamodules.transforms import SampleTransform, collate
from mm_lightning.config import register_resolvers
from mm_lightning.module import sample_generators
from mm_lightning.prepare.shards import ShardWriter
from mm_lightning.prepare.stages.cache import (
    CacheTensors,
    as_stored,
    check_cache,
    describe_cache,
    expected_cache,
)
from mm_lightning.prepare.stages.captions import InsertTrigger
from mm_lightning.prepare.stages.encode import EncodeClip, EncodePicture
from mm_lightning.prepare.stages.references import OtherMoments, OwnCrop
from tests.conftest import ROOT
from tests.prepare.stages.conftest import FACES, rejection, through

GEOMETRY = {"height": 32, "width": 32, "reference_size": 48, "random_window": False}


@pytest.fixture
def models(tiny_folder):
    return {"base": str(tiny_folder), "vision": str(tiny_folder / "image_encoder"), "recognizer": "dlib"}


@pytest.fixture
def make_stage(models):
    def make(num_frames: int = 1, **options) -> CacheTensors:
        transform = SampleTransform(**GEOMETRY, num_frames=num_frames, num_references=4)
        return CacheTensors(**models | {"transform": transform, "dtype": "float32"} | options)

    return make


@pytest.fixture
def ready(person):
    return through(person, InsertTrigger(), OwnCrop(), OwnCrop(1.5), EncodePicture())[0]


@pytest.fixture
def ready_clip(window):
    return through(window, InsertTrigger(), OwnCrop(), OtherMoments(**FACES, count=1), EncodeClip())[0]


def test_cached_training_step_equals_the_uncached_one(ready, ready_clip, make_stage, tiny_folder, tmp_path):
    register_resolvers()
    overrides = ["experiment=stage1_image", "debug=tiny", f"paths.run_dir={tmp_path}", f"model.base={tiny_folder}"]
    overrides += [f"model.vision={tiny_folder}/image_encoder", "data.height=32", "data.width=32"]
    overrides += [f"paths.shards_dir={tmp_path}", "model.base_dtype=float32", "model.text_drop_rate=0"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        torch.manual_seed(0)
        module = instantiate(compose("train", overrides=overrides).model)
    module.configure_model()
    for sample, num_frames in ((ready, 1), (ready_clip, 9)):
        look = SampleTransform(**GEOMETRY, num_frames=num_frames, num_references=2)
        fresh = collate([look(as_stored(sample))])
        [cached] = make_stage(num_frames)(sample)
        batch = collate([look(as_stored(cached) | cached.fields)])
        assert fresh.latent_moments is fresh.text is fresh.face is None
        assert batch.pixels is None
        losses = [module.compute_loss(b, sample_generators(0, 3, ["k"]))[0].total for b in (fresh, batch)]
        assert torch.equal(*losses)


def test_what_is_stored(ready, make_stage):
    [sample] = make_stage(dtype="bfloat16")(ready)
    latents, text, face = (load(sample.fields[f"{part}.safetensors"]) for part in ("latents", "text", "face"))
    assert {name: tuple(t.shape) for name, t in latents.items()} == {"mean": (1, 16, 4, 4), "logvar": (1, 16, 4, 4)}
    assert latents["mean"].dtype == torch.float32
    assert (tuple(text["prompt_embeds"].shape), text["prompt_embeds"].dtype) == ((32, 32), torch.bfloat16)
    assert text["id_token_mask"].sum() == 2
    assert face["id_query"].shape == (2, 128)  # two references
    assert face["last_hidden_state"].shape == face["penultimate_hidden_state"].shape
    assert len(sample.meta["references"]) == 2


def test_parts_can_be_chosen(ready, make_stage):
    [sample] = make_stage(what=["face"])(ready)
    assert [name for name in sample.fields if "safetensors" in name] == ["face.safetensors"]
    assert set(sample.meta["cache"]) == {"face"}


def test_record_stands_in_the_json_and_in_each_file(ready, make_stage, models, tmp_path):
    [sample] = make_stage()(ready)
    for part in ("latents", "text", "face"):
        file = tmp_path / part
        file.write_bytes(sample.fields[f"{part}.safetensors"])
        with safe_open(file, "pt") as tensors:
            assert json.loads(tensors.metadata()["cache"]) == sample.meta["cache"][part]
    assert sample.meta["cache"]["latents"]["height"] == 32
    check_cache(sample.meta, describe_cache(**models, dtype="float32"), sample.caption)


def test_same_bytes_whatever_the_number_of_threads(ready, make_stage):
    num_threads, made = torch.get_num_threads(), []
    for count in (1, 4):
        torch.set_num_threads(count)
        made.append(dict(make_stage()(ready)[0].fields))
    torch.set_num_threads(num_threads)
    assert made[0] == made[1]


@pytest.fixture
def stale(ready, make_stage, models, tiny_folder, tmp_path):
    """A cached sample, what is expected of it, and a copy of the models to change."""
    [sample] = make_stage()(ready)
    copy = tmp_path / tiny_folder.name
    shutil.copytree(tiny_folder, copy)
    return sample, copy, {"base": str(copy), "vision": str(copy / "image_encoder"), "recognizer": "dlib"}


def test_copy_of_the_models_is_as_good(stale):
    sample, _, models = stale
    check_cache(sample.meta, describe_cache(**models, dtype="float32"))


@pytest.mark.parametrize(
    ("folder", "name", "value", "message"),
    [
        ("vae", "scaling_factor", 1.15, "latents.safetensors is stale.*config_sha256"),
        ("text_encoder", "num_heads", 2, "text.safetensors is stale.*config_sha256"),
        ("transformer", "max_text_seq_length", 64, "text.safetensors is stale.*max_length 32, here.*64"),
        ("image_encoder", "num_attention_heads", 1, "face.safetensors is stale.*config_sha256"),
    ],
)
def test_another_config_is_refused(stale, folder, name, value, message):
    sample, copy, models = stale
    file = copy / folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=message):
        check_cache(sample.meta, describe_cache(**models, dtype="float32"))


@pytest.mark.parametrize("folder", ["vae", "text_encoder", "image_encoder"])
def test_retrained_weights_are_another_stage(folder, stale, make_stage):
    _, copy, models = stale
    before = make_stage(**models).models()
    assert make_stage(**models).models() == before
    file = next((copy / folder).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert make_stage(**models).models() != before


def test_retrained_weights_of_the_same_config_are_refused(stale):
    sample, copy, models = stale
    file = next((copy / "vae").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"latents.safetensors is stale.*weights"):
        check_cache(sample.meta, describe_cache(**models, dtype="float32"))
    file.unlink()  # training on cached latents does without the VAE's weights
    check_cache(sample.meta, describe_cache(**models, dtype="float32"))


def test_other_precision_words_caption_or_size_are_refused(stale):
    sample, _, models = stale
    with pytest.raises(ValueError, match=r"text.*dtype 'float32', here.*'bfloat16'"):
        check_cache(sample.meta, describe_cache(**models))
    with pytest.raises(ValueError, match="extra_identity_words"):
        check_cache(sample.meta, describe_cache(**models, dtype="float32", extra_identity_words=["chef"]))
    with pytest.raises(ValueError, match="caption_sha256"):
        check_cache(sample.meta, describe_cache(**models, dtype="float32"), "a man img")
    with pytest.raises(ValueError, match=r"latents.*height 32, here .*480"):
        check_cache(sample.meta, {"latents": {"height": 480}})


@pytest.mark.parametrize("kind", ["image", "video"])
def test_training_refuses_a_stale_cache_by_itself(kind, ready, ready_clip, make_stage, tiny_folder, tmp_path):
    """As the configuration has it, nothing set: its own models against those that the shards record."""
    register_resolvers()
    sample, num_frames = (ready, 1) if kind == "image" else (ready_clip, 9)
    [sample] = make_stage(num_frames)(sample)
    with ShardWriter(tmp_path / f"{kind}s", kind) as writer:
        stored = {name: data for name, data in as_stored(sample).items() if name != "__key__"}
        writer.write(sample.key, stored | sample.fields)
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    small = ["data.height=32", "data.width=32", "data.reference_size=48", "data.num_references=2", "data.num_workers=0"]
    small += [] if kind == "image" else ["num_frames=9"]
    paths = [f"paths.run_dir={tmp_path}", f"paths.shards_dir={tmp_path}"]
    models = [f"model.base={copy}", f"model.vision={copy}/image_encoder", "model.recognizer=dlib"]

    def first_batch():
        experiment = {"image": "stage1_image", "video": "stage2_video"}[kind]
        overrides = [
            f"experiment={experiment}",
            *paths,
            *small,
            *models,
            "model.base_dtype=float32",
            "data.batch_size=1",
        ]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return next(iter(instantiate(compose("train", overrides=overrides).data).train_dataloader()))

    assert first_batch().latent_moments is not None
    file = copy / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 1.15}))
    with pytest.raises(ValueError, match=r"latents\.safetensors is stale: config_sha256"):
        first_batch()


def test_models_that_are_not_here_are_not_compared(models, tmp_path):
    assert set(expected_cache(**models)) == {"latents", "text", "face"}
    assert set(expected_cache(**models | {"vision": str(tmp_path / "nowhere")})) == {"latents", "text"}
    assert expected_cache(str(tmp_path / "nowhere"), str(tmp_path / "nowhere"), "dlib") == {}


def test_sample_without_record_is_refused(ready):
    with pytest.raises(ValueError, match=r"No record.*latents\.safetensors"):
        check_cache(ready.meta, {"latents": {}})


# Wrong use


def test_more_references_than_the_transform_shows(ready, models):
    transform = SampleTransform(**GEOMETRY, num_references=1)
    with pytest.raises(ValueError, match=r"has 2 references.*raise its num_references"):
        CacheTensors(**models, transform=transform)(ready)


def test_caption_without_class_word(ready, make_stage):
    ready.caption = "a tree"
    assert rejection(make_stage(what=["text"]), ready) == "no_class_word"


def test_clip_of_another_length(ready_clip, make_stage):
    assert rejection(make_stage(num_frames=13), ready_clip) == "unusable_target"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base": "/no/such/folder"}, FileNotFoundError, "/no/such/folder"),
        ({"vision": "/no/clip"}, FileNotFoundError, "/no/clip"),
        ({"what": ["latents", "audio"]}, ValueError, "audio"),
        ({"what": []}, ValueError, "at least one"),
    ],
)
def test_mistakes_are_told_at_construction(make_stage, options, error, message):
    with pytest.raises(error, match=message):
        make_stage(**options)
