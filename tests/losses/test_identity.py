"""The identity term against a float64 recomputation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mm_lightning.losses import IdentityLoss, NullIdentityLoss, average_reference_embedding
from mm_lightning.types import NoisySample


def noisy_sample(timestep: list[int]) -> NoisySample:
    empty = torch.zeros(len(timestep), 1, 1, 1, 1)
    alpha_bar = 1 - torch.tensor(timestep) / 1000
    return NoisySample(empty, empty, empty, empty, torch.tensor(timestep), alpha_bar)


def generators(batch: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(batch)]


def test_equals_numpy_in_float64():
    pred, ref = torch.randn(2, 4, 16, dtype=torch.float64) * 20
    sample = noisy_sample([0, 100, 350, 599])
    loss = IdentityLoss()(pred, ref, sample, torch.ones(4, dtype=torch.bool))
    p, r = pred.numpy(), ref.numpy()
    cosine = (p * r).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(r, axis=1)
    np.testing.assert_allclose(loss.numpy(), np.array([1, 0.9, 0.65, 0.401]) * (1 - cosine), rtol=1e-5)


def test_does_not_apply_above_the_limit_or_without_a_face():
    embed = torch.randn(4, 8)
    valid = torch.tensor([True, False, True, True])
    loss = IdentityLoss(max_timestep=600)(embed, -embed, noisy_sample([599, 10, 600, 999]), valid)
    assert loss.isnan().tolist() == [False, True, True, True]
    assert IdentityLoss(600).wanted(noisy_sample([0, 599, 600]), generators(3)).tolist() == [True, True, False]


def test_does_not_apply_below_the_lower_limit():
    embed, valid = torch.randn(3, 8), torch.ones(3, dtype=torch.bool)
    limited = IdentityLoss(max_timestep=800, min_timestep=150)
    sample = noisy_sample([149, 150, 799])
    assert limited(embed, -embed, sample, valid).isnan().tolist() == [True, False, False]
    assert limited.wanted(sample, generators(3)).tolist() == [False, True, True]


@pytest.mark.parametrize("min_timestep", [-1, 800, 900])
def test_a_lower_limit_that_leaves_nothing_is_refused(min_timestep):
    with pytest.raises(ValueError, match=rf"min_timestep={min_timestep}: give 0 or more, less than max_timestep=800"):
        IdentityLoss(max_timestep=800, min_timestep=min_timestep)


def test_a_share_of_the_samples_below_the_limit_is_wanted():
    """Each by its own generator, whatever stands beside it."""
    sample = noisy_sample([10] * 2000 + [700] * 200)
    wanted = IdentityLoss(600, prob=0.25).wanted(sample, generators(2200))
    assert not wanted[2000:].any()
    assert wanted.sum().item() == pytest.approx(500, abs=80)  # four standard deviations
    alone = [IdentityLoss(600, prob=0.25).wanted(noisy_sample([10]), generators(8)[i : i + 1]).item() for i in range(8)]
    assert alone == wanted[:8].tolist()


def test_all_samples_draw_nothing():
    """So that a run without `prob` is the one it was before."""
    (generator,) = generators(1)
    before = generator.get_state()
    assert IdentityLoss(600).wanted(noisy_sample([10]), [generator]).all()
    assert torch.equal(generator.get_state(), before)


def test_zero_embeddings_of_undecoded_faces_leave_no_nan_in_the_gradient():
    pred = torch.cat([torch.randn(1, 8), torch.zeros(1, 8)]).requires_grad_()
    valid = torch.tensor([True, False])
    loss = IdentityLoss()(pred, torch.randn(2, 8), noisy_sample([10, 10]), valid)
    torch.where(valid, loss, 0.0).sum().backward()
    assert pred.grad.isfinite().all()
    assert pred.grad[0].abs().sum() > 0
    assert pred.grad[1].abs().sum() == 0


def test_cosine_stays_fp32_under_autocast():
    ref = torch.randn(64, 32)
    pred = (ref + 0.02 * torch.randn(64, 32)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = IdentityLoss()(pred, ref, noisy_sample([0] * 64), torch.ones(64, dtype=torch.bool))
    expected = 1 - torch.cosine_similarity(pred.double(), ref.double())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=5e-7)  # bf16 would be off by 4e-3


def test_null_object_never_applies():
    sample = noisy_sample([0, 10])
    loss = NullIdentityLoss(max_timestep=600)  # its counterpart's argument, as a configuration that swaps the class has
    assert not loss.wanted(sample, generators(2)).any()
    embed = torch.randn(2, 8)
    assert loss(embed, embed, sample, torch.ones(2, dtype=torch.bool)).isnan().all()


@pytest.mark.parametrize("max_timestep", [0, -1])
def test_a_limit_that_excludes_everything_is_refused(max_timestep):
    with pytest.raises(ValueError, match="NullIdentityLoss"):
        IdentityLoss(max_timestep=max_timestep)


@pytest.mark.parametrize("prob", [0, -0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(prob):
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\], not .*NullIdentityLoss"):
        IdentityLoss(prob=prob)


def test_every_reference_has_the_same_say():
    embeddings = torch.tensor([[[3.0, 0.0], [0.0, 100.0], [5.0, 5.0]], [[0.0, 2.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    average = average_reference_embedding(embeddings, mask)
    torch.testing.assert_close(average, torch.tensor([[0.5, 0.5], [0.0, 1.0]]))


def test_no_reference_gives_zeros():
    average = average_reference_embedding(torch.randn(1, 2, 4), torch.zeros(1, 2, dtype=torch.bool))
    assert torch.equal(average, torch.zeros(1, 4))
