"""What is logged of per-sample losses, against sums by hand."""

import math

import pytest
import torch

from mm_lightning.losses.means import EpochSums, loss_sums, means_of, weighted_mean
from mm_lightning.types import LossOutput

NAN = math.nan


def batch(totals, velocity, identity, timestep, weights=None):
    terms = {"velocity": torch.tensor(velocity), "identity": torch.tensor(identity)}
    count = (~terms["identity"].isnan()).sum()
    loss = LossOutput(torch.tensor(totals), terms, {"identity": count})
    weights = None if weights is None else torch.tensor(weights)
    return loss_sums(loss, torch.tensor(timestep), 1000, weights)


def test_stand_ins_do_not_count():
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    assert weighted_mean(values, None) == 3
    weighted_mean(values, torch.tensor([1.0, 0.0, 1.0])).backward()
    assert values.grad.tolist() == [0.5, 0, 0.5]
    nothing = weighted_mean(values, torch.zeros(3))
    assert nothing == 0
    nothing.backward()  # other processes wait for this one's gradients


def test_nothing_added_is_nothing_said():
    assert EpochSums().means(lambda tensor, reduce_op: tensor) == {}


def test_all_real_is_the_plain_mean_to_the_last_bit():
    values = torch.rand(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(weighted_mean(values, torch.ones(64)), values.mean())


def test_means_of_a_batch():
    sums = batch([1.0, 2.0, 9.0], [4.0, 6.0, 100.0], [NAN, 0.5, NAN], [10, 249, 999], [1.0, 1.0, 0.0])
    assert {name: float(value) for name, value in means_of(sums).items()} == {
        "loss": 1.5,
        "loss/velocity": 5,
        "loss/identity": 0.5,
        "velocity_at/0-249": 5,
        "count/identity": 1,
    }
    assert {"velocity_at/250-499", "velocity_at/500-749", "velocity_at/750-999"} < sums.keys()


def test_a_loss_that_is_not_finite_is_shown():
    assert means_of(batch([NAN, 1.0], [NAN, 1.0], [NAN, NAN], [0, 1]))["loss"].isnan()


@pytest.mark.parametrize("parts", [[4], [1, 3], [1, 1, 1, 1], [3, 1]])
def test_means_do_not_depend_on_how_samples_fall_into_batches(parts):
    totals, velocity, identity = [1.0, 2.0, 3.0, 6.0], [1.0, 2.0, 4.0, 8.0], [0.1, NAN, NAN, 0.4]
    timestep = [0, 300, 310, 900]
    epoch, start = EpochSums(), 0
    for size in parts:
        rows = slice(start, start + size)
        epoch.add(batch(totals[rows], velocity[rows], identity[rows], timestep[rows]))
        start += size
    assert {
        name: float(value) for name, value in epoch.means(lambda tensor, reduce_op: tensor).items()
    } == pytest.approx(
        {
            "loss": 3,
            "loss/velocity": 3.75,
            "loss/identity": 0.25,
            "velocity_at/0-249": 1,
            "velocity_at/250-499": 3,
            "velocity_at/750-999": 8,
            "count/identity": 2,
        }
    )
