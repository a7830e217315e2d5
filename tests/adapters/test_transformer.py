"""The adapted transformer against diffusers' own, and one block against a float64 computation from the equations."""

import copy
import math

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

from mm_lightning.adapters.attention import MagicMirrorAttnProcessor
from mm_lightning.adapters.transformer import AdapterConfig, MagicMirrorBlock, MagicMirrorTransformer3DModel
from tests.adapters.conftest import CONFIG, make_adapted, make_base, make_identity, make_inputs, randomize

FACE_NAMES = [
    "face.modulation.phi_face.1.weight",
    "face.modulation.phi_face.1.bias",
    "face.norm1.weight",
    "face.norm1.bias",
    "face.norm2.weight",
    "face.norm2.bias",
    "face.key_value.to_k.weight",
    "face.key_value.to_k.bias",
    "face.key_value.to_v.weight",
    "face.key_value.to_v.bias",
    "face.key_value.norm_k.weight",
    "face.key_value.norm_k.bias",
]
UNREAD = {f"transformer_blocks.2.adapter.face.norm2.{kind}" for kind in ("weight", "bias")}  # the face stream ends here
CAN_NAMES = [f"can.phi_cond.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_frames", [1, 3])
def test_without_identity_it_is_the_base_bit_for_bit(family, dtype, num_frames):
    base = make_base(family).to(dtype)
    model = randomize(make_adapted(base))
    num_frames = num_frames * (base.config.patch_size_t or 1)
    inputs = make_inputs(base, num_frames=num_frames, dtype=dtype)
    with torch.no_grad():
        expected = base(**inputs).sample
        assert torch.equal(model(**inputs).sample, expected)
        silent = make_identity(model, dtype=dtype, face_scale=0.0)
        assert torch.equal(model(**inputs, attention_kwargs=silent).sample, expected)


@pytest.mark.parametrize(("height", "width", "batch_size"), [(8, 8, 2), (4, 12, 3)])
def test_an_identity_changes_the_output_in_every_family(family, height, width, batch_size):
    model = randomize(make_adapted(make_base(family, sample_height=height, sample_width=width)))
    num_frames = 2 if family == "1.5-5b" else 3
    inputs = make_inputs(model, num_frames, height, width, batch_size)
    with torch.no_grad():
        plain = model(**inputs).sample
        conditioned = model(**inputs, attention_kwargs=make_identity(model, batch_size)).sample
    assert conditioned.shape == plain.shape == inputs["hidden_states"].shape
    assert (conditioned - plain).abs().max() > 1e-3


def test_every_new_path_is_zero_before_training(family):
    base = make_base(family)
    model = make_adapted(base)
    inputs = make_inputs(base, num_frames=2)
    with torch.no_grad():
        expected = base(**inputs).sample
        only_can = {"id_embed": make_identity(model)["id_embed"]}
        torch.testing.assert_close(model(**inputs, attention_kwargs=only_can).sample, expected, rtol=0, atol=1e-6)
        for block in model.transformer_blocks[::2]:
            face = make_identity(model)["face_hidden_states"]
            assert not block.adapter.face.modulation(torch.randn(2, 8)).any()
            assert not block.adapter.face.key_value(face)[1].any()


def test_face_tokens_are_unchanged_by_an_untrained_block():
    model = make_adapted(make_base())
    inputs, identity = make_inputs(model), make_identity(model)
    seen = []
    model.transformer_blocks[2].register_forward_pre_hook(lambda _, args: seen.append(args[5]))
    model(**inputs, attention_kwargs=identity)
    assert torch.equal(seen[0], identity["face_hidden_states"])


def reference_block(block, hidden, text, face, temb, id_embed, rotary):
    """Equations 6, 7 and 8 in float64 with nothing but matrix products; weights are read from the block."""
    weights = {name: value.double() for name, value in block.state_dict().items()}
    heads = block.attn1.heads

    def linear(x, name):
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    def layer_norm(x, name, eps):
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return normed * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def silu(x):
        return x / (1 + torch.exp(-x))

    def split(x):
        return x.reshape(*x.shape[:2], heads, -1).permute(0, 2, 1, 3)

    def attention(q, k, v):
        scores = torch.exp(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]))
        return (scores / scores.sum(-1, keepdim=True)) @ v

    def rotate(x, num_prefix):
        cos, sin = (table.double() for table in rotary)
        video = x[:, :, num_prefix:]
        swapped = torch.stack([-video[..., 1::2], video[..., ::2]], -1).reshape(video.shape)
        return torch.cat([x[:, :, :num_prefix], video * cos + swapped * sin], 2)

    dim = hidden.shape[-1]
    base = torch.cat([linear(silu(temb), "norm1.linear"), linear(silu(temb), "norm2.linear")], 1)
    conditioned = torch.cat([id_embed, silu(temb), base[:, :dim]], 1)
    delta = linear(silu(linear(conditioned, "adapter.can.phi_cond.0")), "adapter.can.phi_cond.2")
    m = [x[:, None] for x in (base + delta).split(dim, 1)]
    f = [x[:, None] for x in linear(silu(temb), "adapter.face.modulation.phi_face.1").split(dim, 1)]

    streams = [text, face, hidden]
    factors = {"norm1": [m[3:6], f[0:3], m[0:3]], "norm2": [m[9:12], f[3:6], m[6:9]]}
    lengths = [x.shape[1] for x in streams]

    def modulated(norm):
        names = [f"{norm}.norm", f"adapter.face.{norm}", f"{norm}.norm"]
        return [
            layer_norm(x, name, 1e-5) * (1 + scale) + shift
            for x, name, (shift, scale, _) in zip(streams, names, factors[norm], strict=True)
        ]

    def gated(norm, out):
        parts = out.split(lengths, 1)
        return [x + gate * part for x, part, (_, _, gate) in zip(streams, parts, factors[norm], strict=True)]

    normed = modulated("norm1")
    full = torch.cat(normed, 1)
    q = layer_norm(split(linear(full, "attn1.to_q")), "attn1.norm_q", 1e-6)
    k = layer_norm(split(linear(full, "attn1.to_k")), "attn1.norm_k", 1e-6)
    v = split(linear(full, "attn1.to_v"))
    face_k = layer_norm(split(linear(normed[1], "adapter.face.key_value.to_k")), "adapter.face.key_value.norm_k", 1e-6)
    face_v = split(linear(normed[1], "adapter.face.key_value.to_v"))
    num_prefix = lengths[0] + lengths[1]
    out = attention(rotate(q, num_prefix), rotate(k, num_prefix), v) + attention(q, face_k, face_v)
    out = linear(out.permute(0, 2, 1, 3).flatten(2), "attn1.to_out.0")
    streams = gated("norm1", out)

    full = linear(torch.cat(modulated("norm2"), 1), "ff.net.0.proj")
    full = 0.5 * full * (1 + torch.tanh(math.sqrt(2 / math.pi) * (full + 0.044715 * full**3)))
    streams = gated("norm2", linear(full, "ff.net.2"))
    return streams[2], streams[0], streams[1]


def test_one_adapted_block_equals_the_equations_in_float64():
    model = randomize(make_adapted(make_base(attention_bias=True)))
    for parameter in model.parameters():  # norms and biases of the base away from their ones and zeros as well
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
    block = model.transformer_blocks[2].double()
    inputs, identity = make_inputs(model), make_identity(model, dtype=torch.float64)
    num_tokens = inputs["image_rotary_emb"][0].shape[0]
    torch.manual_seed(4)
    hidden, text, temb = (torch.randn(*s, dtype=torch.float64) for s in ((2, num_tokens, 32), (2, 6, 32), (2, 8)))
    arguments = (hidden, text, temb, inputs["image_rotary_emb"])
    with torch.no_grad():
        got = block(*arguments, None, identity["face_hidden_states"], identity["id_embed"])
        expected = reference_block(
            block, hidden, text, identity["face_hidden_states"], temb, identity["id_embed"], inputs["image_rotary_emb"]
        )
    # diffusers rotates in float32 whatever comes in
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_block_without_rotary_equals_the_equations_to_float64_precision():
    model = randomize(make_adapted(make_base("2b")))
    block = model.transformer_blocks[0].double()
    identity = make_identity(model, dtype=torch.float64)
    torch.manual_seed(4)
    hidden, text, temb = (torch.randn(*s, dtype=torch.float64) for s in ((2, 10, 32), (2, 6, 32), (2, 8)))
    still = (torch.ones(10, 16), torch.zeros(10, 16))
    with torch.no_grad():
        got = block(hidden, text, temb, None, None, identity["face_hidden_states"], identity["id_embed"])
        expected = reference_block(
            block, hidden, text, identity["face_hidden_states"], temb, identity["id_embed"], still
        )
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_own_loop_equals_the_base_loop(family):
    """Guards against drift of diffusers' forward: an identity that adds nothing takes our loop."""
    base = make_base(family)
    model = make_adapted(base)
    inputs = make_inputs(base, num_frames=2)
    with torch.no_grad():
        ours = model(**inputs, attention_kwargs={"id_embed": make_identity(model)["id_embed"]}, return_dict=False)[0]
        torch.testing.assert_close(ours, base(**inputs).sample, rtol=0, atol=1e-6)


def test_names_of_the_base_are_kept_and_the_new_ones_are_exactly_these():
    base = make_base()
    model = make_adapted(base)
    expected = {f"transformer_blocks.{i}.adapter.{name}" for i in (0, 2) for name in FACE_NAMES + CAN_NAMES}
    assert set(model.state_dict()) - set(base.state_dict()) == expected
    assert set(model.adapter_parameters()) == expected - UNREAD
    assert set(base.state_dict()) <= set(model.state_dict())


def test_no_weight_is_copied():
    base = make_base()
    pointers = {name: value.data_ptr() for name, value in base.named_parameters()}
    model = MagicMirrorTransformer3DModel.from_base(base, CONFIG)
    assert model is base
    now = {name: value.data_ptr() for name, value in model.named_parameters()}
    assert {name: now[name] for name in pointers} == pointers


def loss_and_gradients(model, inputs, identity):
    model.zero_grad()
    face = identity["face_hidden_states"].clone().requires_grad_()
    output = model(**inputs, attention_kwargs={**identity, "face_hidden_states": face}).sample
    output.square().mean().backward()
    return output, face.grad, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_nothing_and_every_trainable_parameter_learns():
    model = randomize(make_adapted(make_base()))
    model.requires_grad_(False)
    for parameter in model.adapter_parameters().values():
        parameter.requires_grad_(True)
    inputs, identity = make_inputs(model), make_identity(model)
    output, face_grad, grads = loss_and_gradients(model, inputs, identity)
    assert set(grads) == set(model.adapter_parameters())
    assert [name for name, grad in grads.items() if not grad.any()] == []
    model.enable_gradient_checkpointing()
    output2, face_grad2, grads2 = loss_and_gradients(model, inputs, identity)
    assert torch.equal(output, output2)
    assert torch.equal(face_grad, face_grad2)
    assert set(grads) == set(grads2)
    assert all(torch.equal(grads[name], grads2[name]) for name in grads)


def test_guidance_halves_do_not_touch_each_other():
    model = randomize(make_adapted(make_base()))
    inputs, identity = make_inputs(model), make_identity(model)
    with torch.no_grad():
        both = model(**inputs, attention_kwargs=identity).sample
        for i in range(2):
            half = {k: v[i : i + 1] if k != "image_rotary_emb" else v for k, v in inputs.items()}
            one = model(**half, attention_kwargs={k: v[i : i + 1] for k, v in identity.items()}).sample
            torch.testing.assert_close(one, both[i : i + 1], rtol=0, atol=1e-5)


def test_face_scale_weakens_can_and_cross_attention():
    model = randomize(make_adapted(make_base()))
    inputs = make_inputs(model)

    def distance(scale):
        identity = make_identity(model, face_scale=scale)
        return (model(**inputs, attention_kwargs=identity).sample - model(**inputs).sample).norm()

    with torch.no_grad():
        assert distance(0.1) < distance(1.0)


@pytest.mark.parametrize(
    ("config", "given", "names"),
    [
        (AdapterConfig(6, 10, conditioned_norm="none"), ["face_hidden_states"], FACE_NAMES),
        (AdapterConfig(6, 10, face_attention="none"), ["id_embed"], CAN_NAMES),
        (AdapterConfig(6, 10, conditioned_norm="none", face_attention="none"), [], []),
        (
            AdapterConfig(6, 10, face_norm="constant"),
            ["face_hidden_states", "id_embed"],
            [n for n in FACE_NAMES if "modulation" not in n and "norm2" not in n] + CAN_NAMES,
        ),
    ],
)
def test_ablated_components_leave_exactly_the_others(config, given, names):
    model = randomize(make_adapted(make_base(), config))
    expected = {f"transformer_blocks.{i}.adapter.{n}" for i in (0, 2) for n in names} - UNREAD
    assert set(model.adapter_parameters()) == expected
    identity = {key: value for key, value in make_identity(model).items() if key in given}
    output = model(**make_inputs(model), attention_kwargs=identity).sample
    if not names:
        return
    output.sum().backward()
    assert all(p.grad is not None for p in model.adapter_parameters().values())


def test_low_rank_keys_and_values_are_smaller_and_start_at_zero():
    model = make_adapted(make_base(), AdapterConfig(6, 10, face_kv_rank=2, face_norm_hidden_dim=3))
    key_value = model.transformer_blocks[0].adapter.face.key_value
    assert sum(p.numel() for p in key_value.to_k.parameters()) == 2 * 32 * 2 + 32
    assert not key_value(make_identity(model)["face_hidden_states"])[1].any()


def test_one_block_compiles_without_a_graph_break():
    model = randomize(make_adapted(make_base()))
    inputs, identity = make_inputs(model), make_identity(model)
    with torch.no_grad():
        expected = model(**inputs, attention_kwargs=identity).sample
        torch._dynamo.reset()
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        compiled = model(**inputs, attention_kwargs=identity).sample
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_repeated_blocks_compile_with_inductor():
    model = randomize(make_adapted(make_base()))
    inputs, identity = make_inputs(model), make_identity(model)
    with torch.no_grad():
        expected = model(**inputs, attention_kwargs=identity).sample
        torch._dynamo.reset()
        model.compile_repeated_blocks(fullgraph=True)
        compiled = model(**inputs, attention_kwargs=identity).sample
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)


def test_whatever_would_drop_the_face_stream_is_refused():
    model = make_adapted(make_base())
    with pytest.raises(ValueError, match="drop the face stream"):
        model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="drop the face stream"):
        model.set_attn_processor(CogVideoXAttnProcessor2_0())
    for config in (FirstBlockCacheConfig(), FasterCacheConfig()):
        with pytest.raises(ValueError, match="drop the face stream"):
            model.enable_cache(config)
    model.set_attn_processor(MagicMirrorAttnProcessor())


def test_pyramid_attention_broadcast_still_runs():
    model = randomize(make_adapted(make_base()))
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    with torch.no_grad():
        expected = model(**make_inputs(model), attention_kwargs=make_identity(model)).sample
        model.enable_cache(config)
        assert torch.equal(model(**make_inputs(model), attention_kwargs=make_identity(model)).sample, expected)


def test_wrong_identities_are_named():
    model = make_adapted(make_base())
    inputs, identity = make_inputs(model), make_identity(model)
    with pytest.raises(ValueError, match=r"face_hidden_states has shape \(1, 3, 32\).*batch 2"):
        model(**inputs, attention_kwargs={**identity, "face_hidden_states": identity["face_hidden_states"][:1]})
    with pytest.raises(ValueError, match=r"id_embed has shape \(2, 5\).*width 6"):
        model(**inputs, attention_kwargs={**identity, "id_embed": identity["id_embed"][:, :5]})
    bare = make_adapted(make_base(), AdapterConfig(6, 10, conditioned_norm="none", face_attention="none"))
    with pytest.raises(ValueError, match="no face branch"):
        bare(**inputs, attention_kwargs={"face_hidden_states": identity["face_hidden_states"]})
    with pytest.raises(ValueError, match="no CAN"):
        bare(**inputs, attention_kwargs={"id_embed": identity["id_embed"]})


def test_from_base_refuses_what_it_cannot_adapt():
    base = make_base()
    with pytest.raises(ValueError, match="carries MagicMirror adapters already"):
        MagicMirrorTransformer3DModel.from_base(make_adapted(base), CONFIG)
    fused = copy.deepcopy(base)
    fused.fuse_qkv_projections()
    with pytest.raises(ValueError, match="fused"):
        MagicMirrorTransformer3DModel.from_base(fused, CONFIG)
    with pytest.raises(ValueError, match="conditioned_norm is 'cna'"):
        AdapterConfig(conditioned_norm="cna")


def test_only_even_blocks_are_adapted():
    model = make_adapted(make_base())
    assert [isinstance(block, MagicMirrorBlock) for block in model.transformer_blocks] == [True, False] * 2
