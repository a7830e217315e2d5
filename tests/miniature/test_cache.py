"""Cached people: what training would compute itself, made anew when anything else was used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from datamodules.image import ImageDataModule
from datamodules.video import VideoDataModule
from mm_lightning.backbone import Backbone
from mm_lightning.encoders.face import FaceFeatureEncoder, load_vision
from mm_lightning.encoders.recognizer import load_recognizer
from mm_lightning.encoders.text import IdentityTokenizer, TextEncoder
from mm_lightning.miniature import cache
from mm_lightning.miniature.layout import read_samples
from mm_lightning.prepare.shards import damaged_shards
from mm_lightning.prepare.stages.cache import check_cache, describe_cache
from mm_lightning.tiny import make_tiny

GEOMETRY = {"height": 64, "width": 64, "reference_size": 64}
KINDS = {"images": (ImageDataModule, {}, 2), "videos": (VideoDataModule, {"num_frames": 5}, 2)}


@pytest.fixture(scope="module")
def model(tmp_path_factory, small_settings) -> Path:
    return make_tiny(
        tmp_path_factory.mktemp("model") / "tiny", **small_settings | {"sample_height": 8, "sample_width": 8}
    )


def command(people: Path, model: Path, out: Path, *more: str) -> None:
    cache.main(["--people", str(people), "--model", str(model), "--out", str(out), *more])


@pytest.fixture(scope="module")
def cached(few_people, model, tmp_path_factory) -> Path:
    """Train people with two references each; never write into it."""
    out = tmp_path_factory.mktemp("cached") / "people"
    command(few_people, model, out, "--splits", "train", "--num-references", "2")
    return out


def models_record(model: Path) -> dict:
    return describe_cache(str(model), str(model / "image_encoder"), "dlib_standardized", dtype="float32")


def batches(folder: Path, kind: str, **options):
    module_class, frames, num_references = KINDS[kind]
    module = module_class(str(folder), **GEOMETRY, **frames, num_references=num_references, batch_size=4, **options)
    return next(iter(module.val_dataloader()))


@pytest.mark.parametrize("kind", KINDS)
def test_cached_tensors_are_what_training_computes(kind, few_people, cached, model):
    fresh, stored = batches(few_people / "train" / kind, kind), batches(cached / "train" / kind, kind)
    assert stored.pixels is None
    assert stored.keys == fresh.keys
    assert torch.equal(stored.references, fresh.references)
    backbone = Backbone.from_pretrained(model, "float32", components=("vae", "text_encoder"))
    moments = backbone.encode_video(fresh.pixels)
    assert torch.allclose(stored.latent_moments, moments, atol=1e-4)
    text = TextEncoder(backbone.text_encoder, IdentityTokenizer(backbone.tokenizer, 32))(fresh.captions)
    assert torch.allclose(stored.text.prompt_embeds, text.prompt_embeds, atol=1e-5)
    assert torch.equal(stored.text.id_token_mask, text.id_token_mask)
    encoder = FaceFeatureEncoder(load_vision(model / "image_encoder"), load_recognizer("dlib_standardized"))
    face = encoder(fresh.references, fresh.reference_landmarks, fresh.reference_mask)
    assert torch.allclose(stored.face.last_hidden_state, face.last_hidden_state, atol=1e-4)
    assert torch.allclose(stored.face.penultimate_hidden_state, face.penultimate_hidden_state, atol=1e-4)
    assert torch.allclose(stored.face.id_query, face.id_query, atol=1e-2)  # stored in half precision
    assert stored.face.id_query.dtype == torch.float32
    assert (moments[0] - moments[1]).abs().max() > 0.1  # a mix-up would be seen


@pytest.mark.parametrize("kind", KINDS)
def test_record_of_what_it_was_made_with(kind, few_people, cached, model):
    for sample in read_samples(cached / "train" / kind):
        check_cache(sample.meta, models_record(model), sample.fields["txt"].decode())
        assert [reference["file"] for reference in sample.meta["references"]] == ["ref0.jpg", "ref1.jpg"]
        assert "ref2.jpg" not in sample.fields
    assert batches(cached / "train" / kind, kind, cache_id=models_record(model)).latent_moments is not None
    other = {"latents": models_record(model)["latents"] | {"config_sha256": "x"}}
    with pytest.raises(ValueError, match=r"latents\.safetensors is stale"):
        batches(cached / "train" / kind, kind, cache_id=other)
    assert not damaged_shards(cached / "train" / kind)


@pytest.fixture
def mine(cached, model, tmp_path):
    """A cache and a model to write into, and the times of the cache's shards."""
    shutil.copytree(cached, tmp_path / "cached")
    shutil.copytree(model, tmp_path / "tiny")
    return tmp_path / "cached", tmp_path / "tiny"


def times(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*.tar")}


def test_up_to_date_shards_are_kept(few_people, mine, caplog):
    out, model = mine
    before = times(out)
    with caplog.at_level("INFO"):
        command(few_people, model, out, "--splits", "train", "--num-references", "2")
    assert caplog.text.count("up to date, kept") == 2
    assert times(out) == before


def test_cut_run_makes_the_missing_shards_only(few_people, cached, mine):
    out, model = mine
    folder = out / "train" / "images"
    (folder / "index.json").unlink()
    (folder / "train-000001.tar").unlink()
    (folder / "train-000001.tar.host-1.tmp").write_bytes(b"half")
    before = times(out)
    command(few_people, model, out, "--splits", "train", "--num-references", "2")
    assert {name: times(out)[name] for name in before} == before
    assert (folder / "train-000001.tar").is_file()
    assert not list(folder.glob("*.tmp"))
    wanted = json.loads((cached / "train" / "images" / "index.json").read_text())
    assert json.loads((folder / "index.json").read_text()) == wanted


def test_other_weights_make_everything_anew(few_people, mine):
    out, model = mine
    file = next((model / "vae").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-4000:] = bytes(4000)
    file.write_bytes(data)
    before = times(out)
    command(few_people, model, out, "--splits", "train", "--num-references", "2")
    assert all(times(out)[name] != time for name, time in before.items())
    for sample in read_samples(out / "train" / "videos"):
        check_cache(sample.meta, models_record(model))


def test_other_number_of_references_is_made_anew(few_people, mine):
    out, model = mine
    command(few_people, model, out, "--splits", "train")
    assert all(len(sample.meta["references"]) == 1 for sample in read_samples(out / "train" / "images"))
    assert all("ref1.jpg" not in sample.fields for sample in read_samples(out / "train" / "videos"))


# Wrong input


def test_people_are_never_overwritten(few_people, model, tmp_path):
    people = tmp_path / "people"
    shutil.copytree(few_people, people)
    before = times(people)
    with pytest.raises(SystemExit, match=r"holds shards that are no cache \(cache\.json is missing\): name another"):
        command(people, model, people, "--splits", "train")
    assert times(people) == before


def test_missing_queries_or_models_are_named(few_people, mine, tmp_path):
    out, model = mine
    people = tmp_path / "people"
    shutil.copytree(few_people, people)
    (people / "train" / "queries.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"queries\.safetensors is missing: run .*world queries"):
        command(people, model, out, "--splits", "train")
    with pytest.raises(SystemExit, match=r"validation.*missing"):
        command(few_people, model, out, "--splits", "validation")
    shutil.rmtree(model / "image_encoder")
    with pytest.raises(SystemExit, match="No CLIP vision encoder"):
        command(few_people, model, out, "--splits", "train")
    shutil.rmtree(model / "vae")
    with pytest.raises(SystemExit, match=r"missing: .*vae"):
        command(few_people, model, out, "--splits", "train")
    with pytest.raises(SystemExit, match="num_references must be at least 1, got 0"):
        command(few_people, model, out, "--num-references", "0")


def test_queries_of_another_recogniser_are_refused(few_people):
    queries = cache.load_queries(few_people / "train")
    other = queries._replace(record=queries.record | {"recognizer_weights": "sha256:0"})
    with pytest.raises(ValueError, match=r"stored queries are of .*sha256:0.*run `world queries` again"):
        cache.standardize(other)
