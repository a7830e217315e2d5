"""The sum of the terms, what is skipped, and where the gradient goes."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXDPMScheduler
from torch import Tensor, nn

from mm_lightning.diffusion import Diffusion
from mm_lightning.losses import CombinedLoss, DiffusionLoss, FaceRegion, IdentityLoss, NullIdentityLoss, WholeFrame
from mm_lightning.types import NoisySample

SHAPE = (2, 3, 4, 4)  # F', C, h, w
BOXES = torch.tensor([8.0, 8.0, 15.0, 15.0])


class EmbedByProjection(nn.Module):
    """A differentiable stand-in for decode, alignment and recogniser that records what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(5)
        self.weight = torch.randn(3 * 4 * 4, 6, generator=rng)
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.faceless: list[int] = []

    def forward(self, denoised: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append((denoised, wanted))
        valid = wanted.clone()
        valid[self.faceless] = False
        embeddings = denoised[:, 0].flatten(1) @ self.weight
        return embeddings * valid[:, None], valid


@pytest.fixture
def embed_face() -> EmbedByProjection:
    return EmbedByProjection()


def diffusion() -> Diffusion:
    scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0)
    return Diffusion.from_backbone(scheduler.config, {"scaling_factor": 0.7})


def generators(batch: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(batch)]


def noisy_sample(*timestep: int) -> NoisySample:
    latents = torch.randn(len(timestep), *SHAPE, generator=torch.Generator().manual_seed(1))
    return diffusion().add_noise(latents, generators(len(timestep)), torch.tensor(timestep))


def run(loss: CombinedLoss, sample: NoisySample, embed_face, velocity_pred: Tensor | None = None, ref_embed=None):
    batch = len(sample.timestep)
    rng = torch.Generator().manual_seed(2)
    if velocity_pred is None:
        velocity_pred = sample.velocity + torch.randn(sample.velocity.shape, generator=rng)
    if ref_embed is None:
        ref_embed = torch.randn(batch, 6, generator=rng)
    return loss(velocity_pred, sample, BOXES.expand(batch, 5, 4), ref_embed, embed_face, generators(batch))


def test_total_is_the_weighted_sum_of_the_terms_that_apply(embed_face):
    embed_face.faceless = [2]
    output = run(
        CombinedLoss(DiffusionLoss(WholeFrame()), IdentityLoss(600), 0.25), noisy_sample(10, 700, 20, 599), embed_face
    )
    velocity, identity = output.terms["velocity"], output.terms["identity"]
    assert identity.isnan().tolist() == [False, True, True, False]
    assert output.total.shape == (4,)
    torch.testing.assert_close(output.total, velocity + 0.25 * identity.nan_to_num(0.0))
    assert output.counts["identity"] == 2


def test_only_samples_below_the_limit_are_decoded_in_one_call(embed_face):
    sample = noisy_sample(10, 700, 599, 600)
    run(CombinedLoss(DiffusionLoss(WholeFrame()), IdentityLoss(600)), sample, embed_face, sample.velocity)
    assert len(embed_face.calls) == 1
    denoised, wanted = embed_face.calls[0]
    assert wanted.tolist() == [True, False, True, False]
    torch.testing.assert_close(denoised, sample.latents, rtol=0, atol=1e-5)  # the true velocity gives the clean latents


def test_the_estimate_is_the_diffusions_own(embed_face):
    sample = noisy_sample(10, 400)
    velocity_pred = torch.randn(2, *SHAPE)
    run(CombinedLoss(DiffusionLoss(WholeFrame()), IdentityLoss()), sample, embed_face, velocity_pred)
    expected = diffusion().denoised(sample.noisy_latents, velocity_pred, sample.timestep)
    torch.testing.assert_close(embed_face.calls[0][0], expected, rtol=1e-4, atol=1e-5)


def test_a_share_of_the_samples_is_decoded(embed_face):
    loss = CombinedLoss(DiffusionLoss(WholeFrame()), IdentityLoss(600, prob=0.3), 1.0)
    output = run(loss, noisy_sample(*[10] * 40), embed_face)
    _, wanted = embed_face.calls[0]
    assert 0 < wanted.sum() < 40
    assert torch.equal(~output.terms["identity"].isnan(), wanted)
    assert output.counts["identity"] == wanted.sum()
    rest = output.terms["velocity"][~wanted]
    torch.testing.assert_close(output.total[~wanted], rest, rtol=0, atol=0)


def must_not_be_called(*_: Tensor) -> Tensor:
    raise AssertionError("the face was decoded or the reference embedded although no term needs it")


@pytest.mark.parametrize(
    ("identity", "weight", "timestep"),
    [(IdentityLoss(), 0.0, 10), (NullIdentityLoss(), 0.1, 10), (IdentityLoss(600), 0.1, 600)],
    ids=["weight 0", "null object", "no sample below the limit"],
)
def test_decode_and_reference_are_skipped(identity, weight, timestep):
    loss = CombinedLoss(DiffusionLoss(WholeFrame()), identity, weight)
    output = run(loss, noisy_sample(timestep, 900), must_not_be_called, ref_embed=must_not_be_called)
    assert output.terms["identity"].isnan().all()
    assert torch.equal(output.total, output.terms["velocity"])
    assert output.counts["identity"] == 0


def test_reference_may_be_a_function(embed_face):
    ref_embed = torch.randn(2, 6)
    loss = CombinedLoss(DiffusionLoss(WholeFrame()), IdentityLoss())
    given = run(loss, noisy_sample(10, 20), embed_face, ref_embed=ref_embed)
    computed = run(loss, noisy_sample(10, 20), embed_face, ref_embed=lambda: ref_embed)
    assert torch.equal(given.total, computed.total)


def test_gradient_of_both_terms_reaches_the_prediction(embed_face):
    sample = noisy_sample(300, 300)
    embed_face.faceless = [1]
    gradients = []
    for weight in (0.0, 1.0):
        velocity_pred = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3)).requires_grad_()
        loss = CombinedLoss(DiffusionLoss(WholeFrame()), IdentityLoss(), weight)
        run(loss, sample, embed_face, velocity_pred).total.sum().backward()
        gradients.append(velocity_pred.grad)
    difference = (gradients[1] - gradients[0]).abs().flatten(2).amax(2)  # (B, F')
    assert (gradients[0] != 0).all()
    assert (difference > 0).tolist() == [[True, False], [False, False]], (
        "identity acts on latent frame 0 of a valid face"
    )


def test_identity_gradient_equals_a_finite_difference(embed_face):
    sample = noisy_sample(300)
    loss = CombinedLoss(DiffusionLoss(WholeFrame()), IdentityLoss(), 1.0)
    velocity_pred = torch.randn(1, *SHAPE, requires_grad=True)
    ref_embed = torch.randn(1, 6)
    run(loss, sample, embed_face, velocity_pred, ref_embed).total.sum().backward()
    direction = velocity_pred.grad / velocity_pred.grad.norm()
    with torch.no_grad():
        ahead, behind = (run(loss, sample, embed_face, velocity_pred + s * direction, ref_embed) for s in (0.01, -0.01))
        slope = (ahead.total - behind.total).item() / 0.02
    assert slope == pytest.approx(velocity_pred.grad.norm().item(), rel=5e-3)


def test_terms_hold_no_graph(embed_face):
    velocity_pred = torch.randn(2, *SHAPE, requires_grad=True)
    output = run(
        CombinedLoss(DiffusionLoss(WholeFrame()), IdentityLoss()), noisy_sample(10, 20), embed_face, velocity_pred
    )
    assert output.total.requires_grad
    assert not any(term.requires_grad for term in output.terms.values())


def test_a_broken_prediction_is_not_hidden(embed_face):
    """NaN means "does not apply" in the terms, so a real NaN must still show in the total."""
    velocity_pred = torch.full((1, *SHAPE), torch.nan)
    output = run(CombinedLoss(DiffusionLoss(WholeFrame()), IdentityLoss()), noisy_sample(10), embed_face, velocity_pred)
    assert output.total.isnan().all()


def test_a_non_finite_identity_is_not_hidden():
    def embed_nan(denoised: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(denoised), 6), torch.nan), wanted

    output = run(CombinedLoss(DiffusionLoss(WholeFrame()), IdentityLoss()), noisy_sample(10), embed_nan)
    assert output.total.isnan().all()


def test_empty_face_masks_are_counted(embed_face):
    loss = CombinedLoss(DiffusionLoss(FaceRegion(prob=1.0)), NullIdentityLoss())
    sample = noisy_sample(10, 20)
    face_boxes = torch.stack([BOXES.expand(5, 4), torch.zeros(5, 4)])
    output = loss(sample.velocity, sample, face_boxes, torch.zeros(2, 6), embed_face, generators(2))
    assert output.counts["empty_face_mask"] == 1


def test_everything_is_fp32_in_a_bf16_mixed_step(embed_face):
    sample = noisy_sample(10, 300)
    velocity_pred = torch.randn(2, *SHAPE).bfloat16()
    ref_embed = torch.randn(2, 6)
    loss = CombinedLoss(DiffusionLoss(WholeFrame()), IdentityLoss(), 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = run(loss, sample, embed_face, velocity_pred, ref_embed)
    assert output.total.dtype == torch.float32
    assert embed_face.calls[0][0].dtype == torch.float32
    expected = (velocity_pred.double() - sample.velocity.double()).square().flatten(1).mean(1)
    torch.testing.assert_close(output.terms["velocity"].double(), expected, rtol=1e-6, atol=0)


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="identity_weight must be 0"):
        CombinedLoss(DiffusionLoss(WholeFrame()), IdentityLoss(), -0.1)
