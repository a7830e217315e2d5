"""The frozen base: the library's own numbers, and errors that come before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from mm_lightning.backbone import Backbone, check_base, config_sha256, read_base_id


@pytest.fixture(scope="module")
def backbone(tiny_folder) -> Backbone:
    return Backbone.from_pretrained(tiny_folder, torch_dtype=torch.float32)


@pytest.fixture
def copied_folder(tiny_folder, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def random_pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


# What is loaded


def test_everything_is_frozen_and_stays_in_eval(backbone):
    backbone.train()
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not any(module.training for module in backbone.modules())


def test_dtypes_are_those_asked_for(tiny_folder):
    loaded = Backbone.from_pretrained(tiny_folder, torch_dtype="bfloat16")
    dtypes = {name: {p.dtype for p in getattr(loaded, name).parameters()} for name in ("transformer", "text_encoder")}
    assert dtypes == {"transformer": {torch.bfloat16}, "text_encoder": {torch.bfloat16}}
    assert {parameter.dtype for parameter in loaded.vae.parameters()} == {torch.float32}


def test_weights_are_those_on_disk(tiny_folder, backbone):
    for component, file in (("transformer", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        expected = load_file(tiny_folder / component / f"{file}.safetensors")
        state = getattr(backbone, component).state_dict()
        assert set(state) == set(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_parts_not_asked_for_are_not_even_looked_for(copied_folder):
    for component in ("vae", "text_encoder"):
        for file in (copied_folder / component).glob("*.safetensors"):
            file.unlink()
    loaded = Backbone.from_pretrained(copied_folder, components=("transformer",))
    assert loaded.vae is None
    assert loaded.text_encoder is None
    assert loaded.scaling_factor == 0.7
    assert (loaded.vae_scale_factor_spatial, loaded.vae_scale_factor_temporal) == (8, 4)
    with pytest.raises(RuntimeError, match="needs the VAE"):
        loaded.encode_video(random_pixels(1, 1, 3, 32, 32))


def test_scheduler_is_of_the_class_its_config_names(copied_folder):
    edit_json(copied_folder / "scheduler/scheduler_config.json", _class_name="CogVideoXDDIMScheduler")
    scheduler = Backbone.from_pretrained(copied_folder, components=()).scheduler
    assert type(scheduler).__name__ == "CogVideoXDDIMScheduler"
    assert scheduler.config.snr_shift_scale == 1.0


def test_numbers_come_from_the_loaded_config(copied_folder):
    edit_json(copied_folder / "vae/config.json", scaling_factor=1.15258426)
    assert Backbone.from_pretrained(copied_folder, components=()).scaling_factor == 1.15258426


def test_sharded_weights_load_and_a_lost_shard_is_named(copied_folder):
    whole = copied_folder / "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(whole)
    half = sorted(state)[: len(state) // 2]
    shards = {
        "diffusion_pytorch_model-00001-of-00002.safetensors": {name: state[name] for name in half},
        "diffusion_pytorch_model-00002-of-00002.safetensors": {name: state[name] for name in state if name not in half},
    }
    whole.unlink()
    for name, tensors in shards.items():
        save_file(tensors, whole.parent / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: name for name, tensors in shards.items() for key in tensors}}
    Path(f"{whole}.index.json").write_text(json.dumps(index))

    loaded = Backbone.from_pretrained(copied_folder, torch_dtype="float32", components=["transformer"]).transformer
    assert all(torch.equal(loaded.state_dict()[name], state[name]) for name in state)
    (whole.parent / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing: transformer/diffusion_pytorch_model-00002-of-00002"):
        check_base(copied_folder)


# Identity of the base


def test_base_id_tells_architectures_apart_and_nothing_else(backbone, copied_folder, tiny_2b_folder):
    assert backbone.base_id["name"] == "cogvideox"
    config = copied_folder / "transformer/config.json"
    older = {key: value for key, value in json.loads(config.read_text()).items() if key != "ofs_embed_dim"}
    config.write_text(json.dumps(older | {"_diffusers_version": "0.30.0"}))
    assert Backbone.from_pretrained(copied_folder, components=()).base_id == {
        "name": "copy",
        "config_sha256": backbone.base_id["config_sha256"],
    }
    others = [Backbone.from_pretrained(tiny_2b_folder, components=())]
    edit_json(config, norm_eps=1e-6)
    others.append(Backbone.from_pretrained(copied_folder, components=()))
    assert backbone.base_id["config_sha256"] not in [other.base_id["config_sha256"] for other in others]


def test_base_id_can_be_read_without_any_weight(backbone, copied_folder):
    for file in copied_folder.rglob("*.safetensors"):
        file.unlink()
    assert read_base_id(copied_folder) == backbone.base_id | {"name": "copy"}


def test_config_hash_of_the_real_5b_does_not_move():
    """Adapters in the world carry this figure: a change of the recipe would refuse them all."""
    expected = hashlib.sha256(
        b'{"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": true}'
    ).hexdigest()
    config = {"use_rotary_positional_embeddings": True, "num_layers": 42, "num_attention_heads": 48}
    assert config_sha256(CogVideoXTransformer3DModel, config | {"_diffusers_version": "0.30.0.dev0"}) == expected
    assert config_sha256(CogVideoXTransformer3DModel, config | {"in_channels": 16, "patch_size": 2}) == expected


# Encoding


@pytest.mark.parametrize(("num_frames", "num_latent_frames"), [(1, 1), (5, 2), (9, 3), (17, 5)])
def test_encode_video_shapes_and_values(backbone, num_frames, num_latent_frames):
    pixels = random_pixels(2, num_frames, 3, 32, 48)
    moments = backbone.encode_video(pixels)
    assert moments.shape == (2, num_latent_frames, 32, 4, 6)
    with torch.no_grad():
        posterior = backbone.vae.encode(pixels.permute(0, 2, 1, 3, 4)).latent_dist
    mean, logvar = moments.chunk(2, dim=2)
    assert torch.equal(mean, posterior.mean.permute(0, 2, 1, 3, 4))
    assert torch.equal(logvar, posterior.logvar.permute(0, 2, 1, 3, 4))
    assert not moments.requires_grad


def test_encode_video_is_fp32_whatever_autocast_and_input_say(backbone):
    pixels = random_pixels(1, 5, 3, 32, 32).bfloat16()
    expected = backbone.encode_video(pixels.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(backbone.encode_video(pixels), expected)


def test_encode_video_in_a_bf16_vae(tiny_folder, backbone):
    pixels = random_pixels(1, 1, 3, 32, 32)
    moments = Backbone.from_pretrained(tiny_folder, vae_dtype="bfloat16", components=["vae"]).encode_video(pixels)
    assert moments.dtype == torch.float32
    torch.testing.assert_close(moments, backbone.encode_video(pixels), rtol=0.1, atol=0.3)


@pytest.mark.parametrize(("num_frames", "nearest"), [(8, "5 and 9"), (48, "45 and 49"), (2, "1 and 5"), (0, "1 and 5")])
def test_wrong_frame_count(backbone, num_frames, nearest):
    with pytest.raises(ValueError, match=rf"{num_frames} frames.*4k\+1.*{nearest}"):
        backbone.encode_video(torch.zeros(1, num_frames, 3, 32, 32))


@pytest.mark.parametrize(
    ("height", "width", "message"), [(40, 32, "height=40.*16.*32"), (32, 100, "width=100.*16.*96"), (8, 32, "height=8")]
)
def test_wrong_size(backbone, height, width, message):
    with pytest.raises(ValueError, match=message):
        backbone.encode_video(torch.zeros(1, 1, 3, height, width))


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 3, 5, 32, 32)])
def test_wrong_order_of_axes(backbone, shape):
    with pytest.raises(ValueError, match=r"wanted is \(B, F, 3, H, W\)"):
        backbone.encode_video(torch.zeros(shape))


# Positions


@pytest.mark.parametrize(
    ("fixture", "num_latent_frames", "height", "width"),
    [
        ("tiny_folder", 1, 32, 32),
        ("tiny_folder", 3, 48, 32),
        ("tiny_folder", 2, 32, 80),
        ("tiny_folder", 13, 16, 64),
        ("tiny_1_5_folder", 1, 32, 32),
        ("tiny_1_5_folder", 3, 16, 32),
        ("tiny_1_5_folder", 4, 32, 16),
    ],
)
def test_rotary_embeddings_equal_the_pipelines(fixture, num_latent_frames, height, width, request):
    folder = request.getfixturevalue(fixture)
    pipeline = CogVideoXPipeline.from_pretrained(folder)
    expected = pipeline._prepare_rotary_positional_embeddings(height, width, num_latent_frames, torch.device("cpu"))
    actual = Backbone.from_pretrained(folder, components=()).rotary_embeddings(num_latent_frames, height, width, "cpu")
    assert torch.equal(actual.cos, expected[0])
    assert torch.equal(actual.sin, expected[1])


def test_1_5_has_no_positions_beyond_its_size(tiny_1_5_folder):
    with pytest.raises(ValueError, match=r"48x32 pixels \(height x width\) is beyond the 32x32"):
        Backbone.from_pretrained(tiny_1_5_folder, components=()).rotary_embeddings(4, 48, 32)


def test_rotary_embeddings_at_the_real_5b_size(tiny_folder):
    backbone = Backbone.from_pretrained(tiny_folder, components=())
    backbone.transformer_config = type(backbone.transformer_config)(
        backbone.transformer_config | {"sample_height": 60, "sample_width": 90, "attention_head_dim": 64}
    )
    video, image = backbone.rotary_embeddings(13, 480, 720), backbone.rotary_embeddings(1, 480, 720)
    assert video.cos.shape == (13 * 30 * 45, 64)
    assert torch.equal(image.sin, video.sin[: 30 * 45])


def test_2b_has_no_rotary_embeddings(tiny_2b_folder):
    assert Backbone.from_pretrained(tiny_2b_folder, components=()).rotary_embeddings(3, 32, 32) is None


# What a user gets wrong


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*hf download THUDM/CogVideoX-5b"):
        check_base(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        check_base("CogVideoX-5b")


def test_a_file_instead_of_a_folder(tiny_folder):
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is a file"):
        check_base(tiny_folder / "model_index.json")


def test_empty_folder_names_everything_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        check_base(tmp_path)
    for name in ("model_index.json", "transformer/config.json", "vae/", "text_encoder/", "tokenizer/", "scheduler/"):
        assert name in str(error.value)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_subfolder(copied_folder, component):
    shutil.rmtree(copied_folder / component)
    with pytest.raises(FileNotFoundError, match=rf"missing: .*{component}/.*hf download") as error:
        Backbone.from_pretrained(copied_folder)
    absent = str(error.value).split("missing: ")[1].split(". Get")[0]
    assert all(name.startswith(component) for name in absent.replace(" or ", ", ").split(", "))


def test_git_lfs_pointer(copied_folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 11\n"
    (copied_folder / "vae/diffusion_pytorch_model.safetensors").write_text(pointer)
    with pytest.raises(FileNotFoundError, match=r"vae/diffusion_pytorch_model\.safetensors \(only a Git LFS pointer\)"):
        check_base(copied_folder)


def test_image_to_video_base(copied_folder):
    edit_json(copied_folder / "transformer/config.json", in_channels=32)
    with pytest.raises(ValueError, match=r"takes 32 channels.*gives 16.*image-to-video.*THUDM/CogVideoX-5b"):
        check_base(copied_folder)


def test_another_transformer(copied_folder):
    edit_json(copied_folder / "transformer/config.json", _class_name="WanTransformer3DModel")
    with pytest.raises(ValueError, match="is a WanTransformer3DModel, wanted is a CogVideoXTransformer3DModel"):
        check_base(copied_folder)


def test_text_encoder_of_another_model(copied_folder):
    edit_json(copied_folder / "text_encoder/config.json", d_model=4096)
    with pytest.raises(ValueError, match=r"text of width 32.*gives 4096"):
        check_base(copied_folder)


def test_another_scheduler(copied_folder):
    edit_json(copied_folder / "scheduler/scheduler_config.json", _class_name="DDPMScheduler")
    with pytest.raises(ValueError, match="is a DDPMScheduler, wanted is one of CogVideoXDDIMScheduler"):
        check_base(copied_folder)


def test_truncated_config(copied_folder):
    (copied_folder / "vae/config.json").write_text('{"latent_ch')
    with pytest.raises(ValueError, match=r"vae/config\.json is no JSON"):
        check_base(copied_folder)


def test_misspelt_component_and_dtype(tiny_folder):
    with pytest.raises(ValueError, match=r"\['t5'\]; there are \['transformer', 'vae', 'text_encoder'\]"):
        Backbone.from_pretrained(tiny_folder, components=("transformer", "t5"))
    with pytest.raises(ValueError, match="torch_dtype='bf16' is no dtype"):
        Backbone.from_pretrained(tiny_folder, torch_dtype="bf16")


HUB_SCRIPT = """
import sys
from mm_lightning.backbone import Backbone, check_base
loaded = Backbone.from_pretrained("somebody/cogvideox-small", torch_dtype="float32", components=["transformer"])
print(loaded.base_id["name"], loaded.transformer.num_parameters())
try:
    check_base("THUDM/CogVideoX-5b")
except FileNotFoundError as error:
    print(error)
"""


def test_hub_ids_offline(tiny_folder, tmp_path, backbone):
    """In a process of its own: the hub's client reads its settings when it is imported."""
    cached = tmp_path / "hub/models--somebody--cogvideox-small"
    shutil.copytree(tiny_folder, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0" * 40)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", HUB_SCRIPT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()
    assert first == f"somebody/cogvideox-small {backbone.transformer.num_parameters()}"
    assert second.startswith("The base model 'THUDM/CogVideoX-5b' is neither a local folder nor complete in the hub's")
    assert "hf download THUDM/CogVideoX-5b --local-dir" in second
