import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mm_lightning.encoders.identity import (
    FusionMLP,
    IdentityEncoder,
    IdentityProjection,
    NullFacePerceiver,
    NullFusion,
    NullIdentityPerceiver,
    NullIdentityProjection,
    TwoStageFusion,
    fuse_identity,
    sample_drops,
)
from mm_lightning.encoders.perceiver import FacePerceiver, IdentityPerceiver
from mm_lightning.types import FaceFeatures, TextFeatures

TEXT_DIM, ID_DIM, VISION_DIM = 12, 16, 10
RESAMPLER = {"vision_dim": VISION_DIM, "hidden_dim": ID_DIM, "depth": 1, "num_heads": 2, "head_dim": 4}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randomize(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def build_encoder(**parts: nn.Module) -> IdentityEncoder:
    default = {
        "id_perceiver": IdentityPerceiver(id_embed_dim=6, **RESAMPLER),
        "face_perceiver": FacePerceiver(num_tokens=3, out_dim=8, **RESAMPLER),
        "fusion": FusionMLP(TEXT_DIM, ID_DIM, hidden_dim=16),
        "id_projection": IdentityProjection(num_tokens=2, id_dim=ID_DIM, id_embed_dim=5),
    }
    return IdentityEncoder(**default | parts)


def build_features(batch_size: int = 3, num_references: int = 2) -> FaceFeatures:
    return FaceFeatures(
        last_hidden_state=torch.randn(batch_size, num_references, 4, VISION_DIM),
        penultimate_hidden_state=torch.randn(batch_size, num_references, 4, VISION_DIM),
        id_query=20 * torch.randn(batch_size, num_references, 6),
        reference_mask=torch.ones(batch_size, num_references, dtype=torch.bool),
    )


def build_text(batch_size: int = 3) -> TextFeatures:
    mask = torch.zeros(batch_size, 7, dtype=torch.bool)
    for row in range(batch_size):
        mask[row, row + 1 : row + 3] = True
    return TextFeatures(0.2 * torch.randn(batch_size, 7, TEXT_DIM), mask)


@pytest.fixture(params=["residual", "two_stage"])
def fusion(request) -> nn.Module:
    residual = request.param == "residual"
    return FusionMLP(TEXT_DIM, ID_DIM, hidden_dim=16) if residual else TwoStageFusion(TEXT_DIM, ID_DIM, hidden_dim=16)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: FusionMLP(hidden_dim=1024), 10_503_168),
        (lambda: FusionMLP(hidden_dim=2048), 20_989_952),
        (TwoStageFusion, 92_327_936),
        (IdentityProjection, 2_097_664),
    ],
)
def test_sizes(build, expected):
    with torch.device("meta"):
        module = build()
    assert sum(parameter.numel() for parameter in module.parameters()) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_untrained_fusion_leaves_the_text_untouched(fusion, dtype, autocast):
    text = build_text()
    prompt_embeds = text.prompt_embeds.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fused = fuse_identity(fusion, prompt_embeds, text.id_token_mask, torch.randn(3, 2, ID_DIM))
    assert fused.dtype == dtype
    assert torch.equal(fused, prompt_embeds)


def layer_norm(x: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    return x * norm.weight + norm.bias


def two_layers(x: torch.Tensor, mlp: nn.Sequential) -> torch.Tensor:
    x = layer_norm(x, mlp[0]) @ mlp[1].weight.T + mlp[1].bias
    return x * torch.special.ndtr(x) @ mlp[3].weight.T + mlp[3].bias


def test_residual_fusion_equals_its_equation():
    fusion = randomize(FusionMLP(TEXT_DIM, ID_DIM, hidden_dim=16)).double()
    text, tokens = torch.randn(3, 2, TEXT_DIM).double(), torch.randn(3, 2, ID_DIM).double()
    expected = text + two_layers(torch.cat([text, tokens], -1), fusion.mlp)
    torch.testing.assert_close(fusion(text, tokens), expected, rtol=1e-10, atol=1e-10)


def test_two_stage_fusion_equals_its_equations():
    fusion = randomize(TwoStageFusion(TEXT_DIM, ID_DIM, hidden_dim=16)).double()
    text, tokens = torch.randn(3, 2, TEXT_DIM).double(), torch.randn(3, 2, ID_DIM).double()
    linear, norm = fusion.id_proj
    identity = layer_norm(tokens @ linear.weight.T + linear.bias, norm)
    mixed = text + two_layers(torch.cat([text, identity], -1), fusion.stage1)
    torch.testing.assert_close(fusion(text, tokens), text + two_layers(mixed, fusion.stage2), rtol=1e-10, atol=1e-10)


def test_equation_5_touches_the_class_word_alone_token_by_token(fusion):
    fusion = randomize(fusion)
    text, id_tokens = build_text(), torch.randn(3, 2, ID_DIM)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, [1, 2]] = mask[1, [0, 6]] = True  # apart in the second, none in the third
    fused = fuse_identity(fusion, text.prompt_embeds, mask, id_tokens)
    assert torch.equal(fused[~mask], text.prompt_embeds[~mask])
    for row, (first, second) in {0: (1, 2), 1: (0, 6)}.items():
        for token, position in enumerate((first, second)):
            word = text.prompt_embeds[row, position].expand(1, 1, -1)
            expected = fusion(word, id_tokens[row, token].expand(1, 1, -1))[0, 0]
            torch.testing.assert_close(fused[row, position], expected)
            assert (fused[row, position] - text.prompt_embeds[row, position]).abs().max() > 1e-3


def test_class_words_must_have_a_position_for_each_token():
    text = build_text()
    with pytest.raises(ValueError, match=r"have \[2\] positions and the identity 3 tokens.*num_id_tokens=3"):
        fuse_identity(NullFusion(), text.prompt_embeds, text.id_token_mask, torch.randn(3, 3, ID_DIM))


def test_condition_is_put_together_from_the_parts():
    encoder, features, text = randomize(build_encoder()), build_features(), build_text()
    condition = encoder(features, text)
    for row in range(3):
        per_reference = [
            encoder.id_perceiver(features.id_query[row, r][None], features.last_hidden_state[row, r][None])
            for r in range(2)
        ]
        id_tokens = (per_reference[0] + per_reference[1]) / 2
        faces = [encoder.face_perceiver(features.penultimate_hidden_state[row, r][None]) for r in range(2)]
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(condition.face_hidden_states[row], ((faces[0] + faces[1]) / 2)[0], **close)
        linear = encoder.id_projection.proj
        expected = torch.cat([id_tokens[0, 0], id_tokens[0, 1]]) @ linear.weight.T + linear.bias
        torch.testing.assert_close(condition.id_embed[row], expected, **close)
        mask = text.id_token_mask[row]
        expected = encoder.fusion(text.prompt_embeds[row, mask][None], id_tokens)[0]
        torch.testing.assert_close(condition.prompt_embeds[row, mask], expected, **close)
        assert torch.equal(condition.prompt_embeds[row, ~mask], text.prompt_embeds[row, ~mask])


def test_untrained_front_end_leaves_the_text_untouched():
    text = build_text()
    assert torch.equal(build_encoder()(build_features(), text).prompt_embeds, text.prompt_embeds)


def test_absent_references_have_no_influence():
    encoder, features, text = randomize(build_encoder()), build_features(), build_text()
    features.reference_mask[:, 1] = False
    expected = encoder(FaceFeatures(*(feature[:, :1] for feature in features)), text)
    for feature in features[:3]:
        feature[:, 1] = float("nan")
    for ours, theirs in zip(encoder(features, text), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_dropped_identity_is_the_null_identity():
    encoder, features, text = randomize(build_encoder()), build_features(), build_text()
    kept = encoder(features, text)
    dropped = encoder(features, text, torch.tensor([True, False, True]))
    for row in (0, 2):
        assert torch.equal(dropped.prompt_embeds[row], text.prompt_embeds[row])
        assert torch.equal(dropped.face_hidden_states[row], encoder.null_face_tokens)
        assert not dropped.id_embed[row].any()
    for ours, theirs in zip(dropped, kept, strict=True):
        assert torch.equal(ours[1], theirs[1])


def test_a_sample_without_references_gets_the_null_identity():
    encoder, features, text = randomize(build_encoder()), build_features(), build_text()
    expected = encoder(features, text, torch.tensor([False, True, False]))
    features.reference_mask[1] = False
    for drop in (None, torch.zeros(3, dtype=torch.bool)):
        for ours, theirs in zip(encoder(features, text, drop), expected, strict=True):
            assert torch.equal(ours, theirs)


def gradients(encoder: IdentityEncoder, drop: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    encoder.zero_grad()
    outputs = [output for output in encoder(build_features(), build_text(), drop) if output is not None]
    sum((output * torch.randn_like(output)).sum() for output in outputs if output.requires_grad).backward()
    return {name: parameter.grad for name, parameter in encoder.named_parameters()}


def test_every_parameter_learns_once_the_zeros_are_left(fusion):
    encoder = build_encoder(fusion=randomize(fusion))
    grads = gradients(encoder, torch.tensor([True, False, False]))
    assert "null_face_tokens" in grads
    assert {name for name, grad in grads.items() if grad.abs().sum() > 0} == set(grads)


def test_at_initialisation_only_the_fusions_inner_layers_wait():
    grads = gradients(build_encoder(), torch.tensor([True, False, False]))
    still = {name for name, grad in grads.items() if grad.abs().sum() == 0}
    assert still == {f"fusion.mlp.{layer}.{kind}" for layer in (0, 1) for kind in ("weight", "bias")}


@pytest.mark.parametrize("drop", [None, [True, True, True], [False, False, False]])
def test_no_parameter_is_ever_unused(drop):
    """Data-parallel training waits for the gradient of every parameter, be it zero."""
    grads = gradients(build_encoder(), None if drop is None else torch.tensor(drop))
    assert all(grad is not None for grad in grads.values())


def test_a_frozen_id_perceiver_is_left_out_of_training():
    encoder = build_encoder()
    encoder.id_perceiver.requires_grad_(False)
    grads = gradients(encoder, torch.tensor([True, False, False]))
    assert {name for name, grad in grads.items() if grad is None} == {
        f"id_perceiver.{name}" for name, _ in encoder.id_perceiver.named_parameters()
    }


@pytest.mark.parametrize(
    ("parts", "expected_none", "gone"),
    [
        ({"face_perceiver": NullFacePerceiver()}, "face_hidden_states", ("face_perceiver", "null_face_tokens")),
        ({"id_projection": NullIdentityProjection()}, "id_embed", ("id_projection",)),
        ({"fusion": NullFusion()}, None, ("fusion",)),
    ],
)
def test_null_objects_ablate_one_branch_alone(parts, expected_none, gone):
    full = randomize(build_encoder())
    ablated = build_encoder(**parts)
    missing, unexpected = ablated.load_state_dict(full.state_dict(), strict=False)
    assert not missing
    assert {name.split(".")[0] for name in unexpected} == set(gone)
    features, text, drop = build_features(), build_text(), torch.tensor([True, False, False])
    condition, reference = ablated(features, text, drop), full(features, text, drop)
    for name, value in condition._asdict().items():
        if name == expected_none:
            assert value is None
        elif name == "prompt_embeds" and "fusion" in parts:
            assert torch.equal(value, text.prompt_embeds)
            assert not torch.equal(value, reference.prompt_embeds)
        else:
            assert torch.equal(value, getattr(reference, name))


def test_structure_branch_alone():
    encoder = build_encoder(
        id_perceiver=NullIdentityPerceiver(2, ID_DIM), fusion=NullFusion(), id_projection=NullIdentityProjection()
    )
    assert {name.split(".")[0] for name, _ in encoder.named_parameters()} == {"face_perceiver", "null_face_tokens"}
    text = build_text()
    condition = encoder(build_features(), text)
    assert torch.equal(condition.prompt_embeds, text.prompt_embeds)
    assert condition.id_embed is None
    assert condition.face_hidden_states.shape == (3, 3, 8)


def test_bf16_autocast_and_bf16_inputs_stay_close_to_fp32():
    encoder, features, text = randomize(build_encoder()), build_features(), build_text()
    drop = torch.tensor([False, True, False])
    expected = encoder(features, text, drop)
    half = FaceFeatures(*(f.bfloat16() for f in features[:3]), features.reference_mask)
    half_text = TextFeatures(text.prompt_embeds.bfloat16(), text.id_token_mask)
    with torch.autocast("cpu", torch.bfloat16):
        condition = encoder(features, text, drop)
        sum(output.float().square().sum() for output in condition).backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in encoder.parameters())
    for outputs in (condition, encoder(half, half_text, drop)):
        for ours, theirs in zip(outputs, expected, strict=True):
            assert F.cosine_similarity(ours.float().flatten(), theirs.flatten(), dim=0) > 0.999


def test_meta_device_gives_the_shapes_at_full_size():
    with torch.device("meta"):
        encoder = IdentityEncoder(IdentityPerceiver(), FacePerceiver(), FusionMLP(), IdentityProjection())
        features = FaceFeatures(
            torch.empty(2, 3, 257, 1024),
            torch.empty(2, 3, 257, 1024),
            torch.empty(2, 3, 512),
            torch.empty(2, 3).bool(),
        )
        text = TextFeatures(torch.empty(2, 226, 4096), torch.empty(2, 226).bool())
        condition = encoder(features, text, torch.empty(2).bool())
    assert [tuple(output.shape) for output in condition] == [(2, 226, 4096), (2, 32, 3072), (2, 512)]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_drops_are_drawn_per_sample():
    together = sample_drops(generators(*range(50)), 0.5, 0.5)
    apart = [sample_drops(generators(seed), 0.5, 0.5) for seed in range(50)]
    for drops, kind in zip(together, zip(*apart, strict=True), strict=True):
        assert drops.dtype == torch.bool
        assert torch.equal(drops, torch.cat(kind))


def test_drop_rates_are_met_and_independent():
    [generator] = generators(0)
    text, identity = sample_drops([generator] * 20_000, 0.1, 0.3)
    # Five standard deviations of the share of 20,000 draws.
    assert text.float().mean() == pytest.approx(0.1, abs=0.011)
    assert identity.float().mean() == pytest.approx(0.3, abs=0.017)
    assert (text & identity).float().mean() == pytest.approx(0.03, abs=0.007)


def test_extreme_and_impossible_drop_rates():
    text, identity = sample_drops(generators(*range(100)), 0.0, 1.0)
    assert not text.any()
    assert identity.all()
    with pytest.raises(ValueError, match=r"text_rate=1\.5"):
        sample_drops(generators(0), 1.5, 0.1)
    with pytest.raises(ValueError, match=r"identity_rate=-0\.1"):
        sample_drops(generators(0), 0.1, -0.1)
