import math
import os
import re
from collections import OrderedDict

import pytest
import torch
from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection
from torch import nn

from mm_lightning.encoders.perceiver import (
    FacePerceiver,
    FacePerceiverResampler,
    IdentityPerceiver,
    average_references,
    load_photomaker_v2,
)

TINY = {"id_embed_dim": 6, "vision_dim": 10, "hidden_dim": 16, "depth": 2, "num_heads": 2, "head_dim": 4}


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def randomize(module: nn.Module) -> nn.Module:
    """Norms, too, leave their initial ones and zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_identity_perceiver_has_photomaker_v2s_size_and_names():
    with torch.device("meta"):
        perceiver = IdentityPerceiver()
    linear = {"weight", "bias"}
    expected = {f"{name}.{kind}" for name in ("token_proj.0", "token_proj.2", "token_norm") for kind in linear}
    resampler = "perceiver_resampler"
    expected |= {f"{resampler}.{name}.{kind}" for name in ("proj_in", "proj_out", "norm_out") for kind in linear}
    for layer in (f"{resampler}.layers.{i}" for i in range(4)):
        expected |= {f"{layer}.0.{name}.{kind}" for name in ("norm1", "norm2") for kind in linear}
        expected |= {f"{layer}.0.{name}.weight" for name in ("to_q", "to_kv", "to_out")}
        expected |= {f"{layer}.1.0.weight", f"{layer}.1.0.bias", f"{layer}.1.1.weight", f"{layer}.1.3.weight"}
    state = perceiver.state_dict()
    assert set(state) == expected
    assert num_parameters(perceiver) == 217_122_816
    assert state[f"{resampler}.layers.3.0.to_kv.weight"].shape == (4096, 2048)
    assert state[f"{resampler}.layers.0.1.1.weight"].shape == (8192, 2048)


@pytest.mark.parametrize(
    ("hidden_dim", "depth", "num_heads", "head_dim", "expected"),
    [
        (768, 4, 12, 64, 32_096_256),
        (1024, 4, 16, 64, 55_639_040),
        (1024, 8, 16, 64, 105_995_264),
        (2048, 4, 16, 128, 214_035_456),
        (3072, 4, 24, 128, 465_752_064),
    ],
)
def test_face_perceiver_sizes(hidden_dim, depth, num_heads, head_dim, expected):
    with torch.device("meta"):
        perceiver = FacePerceiver(hidden_dim=hidden_dim, depth=depth, num_heads=num_heads, head_dim=head_dim)
    assert num_parameters(perceiver) == expected
    assert perceiver(torch.empty(2, 257, 1024, device="meta")).shape == (2, 32, 3072)


def as_diffusers(perceiver: IdentityPerceiver) -> IPAdapterFaceIDPlusImageProjection:
    """diffusers' own FaceID-Plus resampler with the weights of `perceiver`."""
    library = IPAdapterFaceIDPlusImageProjection(
        embed_dims=16, output_dims=16, hidden_dims=10, id_embeddings_dim=6, depth=2, dim_head=4, heads=2, num_tokens=2,
        ffproj_ratio=4,
    )  # fmt: skip
    names = {"token_proj.0": "proj.net.0.proj", "token_proj.2": "proj.net.2", "token_norm": "norm"}
    state = {}
    for name, tensor in perceiver.state_dict().items():
        name = name.removeprefix("perceiver_resampler.")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        name = name.replace(".0.norm1", ".ln0").replace(".0.norm2", ".ln1").replace(".0.to_", ".attn.to_")
        name = name.replace("attn.to_out", "attn.to_out.0")
        for ours, theirs in {"0": "0", "1": "1.net.0.proj", "3": "1.net.2"}.items():
            name = re.sub(rf"(layers\.\d+)\.1\.{ours}\.", rf"\1.ff.{theirs}.", name)
        if "to_kv" in name:
            state[name.replace("to_kv", "to_k")], state[name.replace("to_kv", "to_v")] = tensor.chunk(2)
        else:
            state[name] = tensor
    library.load_state_dict(state)
    library.shortcut = True
    return library


def test_identity_perceiver_equals_diffusers_face_id_plus():
    perceiver = randomize(IdentityPerceiver(**TINY)).double()
    library = as_diffusers(perceiver).double()
    id_query, hidden_states = torch.randn(3, 6).double(), torch.randn(3, 5, 10).double()
    library.clip_embeds = hidden_states[:, None]
    torch.testing.assert_close(perceiver(id_query, hidden_states), library(id_query), rtol=1e-10, atol=1e-10)


def test_resampler_layer_equals_its_equations_in_float64():
    resampler = randomize(FacePerceiverResampler(vision_dim=10, hidden_dim=16, depth=1, num_heads=2, head_dim=4))
    weights = {name: tensor.double() for name, tensor in resampler.state_dict().items()}
    latents, pictures = torch.randn(2, 3, 16), torch.randn(2, 5, 10)

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x, z = pictures.double() @ weights["proj_in.weight"].T + weights["proj_in.bias"], latents.double()
    zn = norm(z, "layers.0.0.norm2")
    context = torch.cat([norm(x, "layers.0.0.norm1"), zn], dim=1)
    kv = context @ weights["layers.0.0.to_kv.weight"].T
    q, k, v = zn @ weights["layers.0.0.to_q.weight"].T, kv[..., :8], kv[..., 8:]
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        scores = torch.einsum("bic,bjc->bij", q[..., h], k[..., h]) / math.sqrt(4)
        scores = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(scores @ v[..., h])
    z = z + torch.cat(heads, dim=-1) @ weights["layers.0.0.to_out.weight"].T
    hidden = norm(z, "layers.0.1.0") @ weights["layers.0.1.1.weight"].T
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    z = z + hidden @ weights["layers.0.1.3.weight"].T
    expected = norm(z @ weights["proj_out.weight"].T + weights["proj_out.bias"], "norm_out")

    torch.testing.assert_close(resampler(latents, pictures).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(resampler.double()(latents.double(), pictures.double()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("out_dim", [16, 24])
def test_every_parameter_of_the_face_perceiver_gets_a_gradient(out_dim):
    perceiver = FacePerceiver(
        vision_dim=10, hidden_dim=16, depth=2, num_heads=2, head_dim=4, num_tokens=3, out_dim=out_dim
    )
    tokens = perceiver(torch.randn(2, 5, 10))
    assert tokens.shape == (2, 3, out_dim)
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in perceiver.parameters())


def test_face_tokens_depend_on_the_picture_and_on_the_query():
    perceiver = FacePerceiver(vision_dim=10, hidden_dim=16, depth=1, num_heads=2, head_dim=4, num_tokens=3, out_dim=24)
    tokens = perceiver(torch.randn(2, 5, 10))
    assert (tokens[0] - tokens[1]).abs().max() > 1e-3
    assert (tokens[:, 0] - tokens[:, 1]).abs().max() > 1e-3


def test_average_of_references():
    tokens = torch.randn(3, 2, 4, 5)
    mask = torch.tensor([[True, True], [False, True], [False, False]])
    tokens[1, 0] = tokens[2] = float("nan")
    averaged = average_references(tokens, mask)
    torch.testing.assert_close(averaged[0], (tokens[0, 0] + tokens[0, 1]) / 2)
    assert torch.equal(averaged[1], tokens[1, 1])
    assert torch.equal(averaged[2], torch.zeros(4, 5))


def test_wrong_widths_are_named():
    perceiver = IdentityPerceiver(**TINY)
    with pytest.raises(ValueError, match=r"embedding is 7 wide .* id_embed_dim=6"):
        perceiver(torch.randn(1, 7), torch.randn(1, 5, 10))
    with pytest.raises(ValueError, match=r"states are 11 wide .* vision_dim=10"):
        perceiver(torch.randn(1, 6), torch.randn(1, 5, 11))


@pytest.fixture
def photomaker(tmp_path):
    """A file of PhotoMaker-V2's layout, with a tau_id of TINY size in half precision."""
    perceiver = randomize(IdentityPerceiver(**TINY)).half()
    id_encoder = OrderedDict({f"qformer_perceiver.{k}": v for k, v in perceiver.state_dict().items()})
    id_encoder["vision_model.embeddings.class_embedding"] = torch.randn(4)
    id_encoder["visual_projection.weight"] = torch.randn(2, 2)
    id_encoder["fuse_module.layer_norm.weight"] = torch.randn(2)
    checkpoint = {"id_encoder": id_encoder, "lora_weights": {"unet.to_q.lora.down.weight": torch.randn(2, 2)}}
    torch.save(checkpoint, tmp_path / "photomaker-v2.bin")
    return tmp_path / "photomaker-v2.bin", checkpoint


def test_photomaker_file_gives_its_two_wanted_parts_only(photomaker):
    path, checkpoint = photomaker
    vision, perceiver = load_photomaker_v2(path)
    assert set(vision) == {"embeddings.class_embedding"}
    assert set(perceiver) == set(IdentityPerceiver(**TINY).state_dict())
    loaded = IdentityPerceiver.from_photomaker(path, **TINY)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, checkpoint["id_encoder"][f"qformer_perceiver.{name}"].float())


def test_photomaker_file_of_the_old_torch_format(photomaker):
    path, checkpoint = photomaker
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    assert torch.equal(
        load_photomaker_v2(path)[0]["embeddings.class_embedding"],
        checkpoint["id_encoder"]["vision_model.embeddings.class_embedding"],
    )


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>", "is no PyTorch file of tensors alone"),
        (b"", "is no PyTorch file of tensors alone"),
        ({"id_encoder": Malicious()}, "is no PyTorch file of tensors alone"),
        ([torch.zeros(1)], "has no 'id_encoder' but list"),
        ({"state_dict": {}}, r"has no 'id_encoder' but \['state_dict'\]"),
        ({"id_encoder": {"vision_model.x": torch.zeros(1)}, "lora_weights": {}}, r"has no 'qformer_perceiver\.\*'"),
    ],
)
def test_other_files_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "photomaker-v2.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as caught:
        load_photomaker_v2(path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "unpickled").exists()


def test_missing_photomaker_file_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.bin.*hf download TencentARC/PhotoMaker-V2"):
        load_photomaker_v2(tmp_path / "nowhere.bin")


def test_photomaker_tensors_must_fit_exactly(photomaker):
    path, checkpoint = photomaker
    with pytest.raises(ValueError, match=r"token_proj\.0\.weight is \(24, 6\), not \(28, 7\)"):
        IdentityPerceiver.from_photomaker(path, **TINY | {"id_embed_dim": 7})
    with pytest.raises(ValueError, match=r"missing \['perceiver_resampler\.layers\.2"):
        IdentityPerceiver.from_photomaker(path, **TINY | {"depth": 3})
    checkpoint["id_encoder"]["qformer_perceiver.extra"] = torch.zeros(1)
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"left over \['extra'\]"):
        IdentityPerceiver.from_photomaker(path, **TINY)
