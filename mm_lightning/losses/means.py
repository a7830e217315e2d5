"""Means of per-sample losses over the samples that count.

Letters: B batch. Sums are name -> (2,): what was added up, and of how many.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mm_lightning.types import LossOutput

TIMESTEP_BINS = 4
COUNT = "count/"  # names that are added up and not averaged


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """(B,) with (B,) weights, None for all 1 -> scalar; 0, with its graph, where all weights are 0."""
    if weights is None:
        return values.mean()
    return (values * weights).sum() / weights.sum().clamp_min(1)


def loss_sums(
    loss: LossOutput, timestep: Tensor, num_train_timesteps: int, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Sums of what is logged: `loss`, `loss/TERM`, the velocity error by timestep, counts. Always the same names.

    Args:
        timestep: (B,) int64.
        weights: (B,), 0 for stand-ins of damaged samples, which are left out; None for all 1.
    """
    is_real = torch.ones_like(timestep, dtype=torch.bool) if weights is None else weights > 0
    sums = {"loss": sum_where(loss.total.detach(), is_real)}
    sums |= {f"loss/{name}": sum_where(term, is_real & ~term.isnan()) for name, term in loss.terms.items()}
    sums |= timestep_sums(loss.terms["velocity"], timestep, num_train_timesteps, is_real)
    one = torch.ones((), device=timestep.device)
    return sums | {f"{COUNT}{name}": torch.stack([count.float(), one]) for name, count in loss.counts.items()}


def timestep_sums(
    velocity_loss: Tensor, timestep: Tensor, num_train_timesteps: int, chosen: Tensor
) -> dict[str, Tensor]:
    """Of the velocity's error (B,), a name for each quarter of the timesteps.

    Args:
        timestep: (B,) int64.
        chosen: (B,) bool.
    """
    width, bins = num_train_timesteps // TIMESTEP_BINS, timestep * TIMESTEP_BINS // num_train_timesteps
    names = [f"velocity_at/{i * width}-{(i + 1) * width - 1}" for i in range(TIMESTEP_BINS)]
    return {name: sum_where(velocity_loss, chosen & (bins == i)) for i, name in enumerate(names)}


def sum_where(values: Tensor, chosen: Tensor) -> Tensor:
    """(B,) with (B,) bool -> (2,)."""
    return torch.stack([torch.where(chosen, values, 0.0).float().sum(), chosen.sum().float()])


def means_of(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name -> scalar: means, and counts as they are; what applies to no sample is left out."""
    counts = torch.stack([pair[1] for pair in sums.values()]).tolist()  # the one wait for the device
    known = {name: pair for (name, pair), count in zip(sums.items(), counts, strict=True) if count > 0}
    return {name: pair[0] if name.startswith(COUNT) else pair[0] / pair[1] for name, pair in known.items()}


class EpochSums:
    """Sums over the batches of all ranks: means do not depend on how samples fall into batches and onto ranks.

    Lightning's own `sync_dist` wants the same names on every rank, and what applies to no sample has no mean.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, sums: dict[str, Tensor]) -> None:
        """Of one batch; every batch of every rank has the same names in the same order."""
        for name, pair in sums.items():
            self.sums[name] = self.sums.get(name, 0) + pair

    def means(self, reduce: Callable[..., Tensor]) -> dict[str, Tensor]:
        """As `means_of`, the same on every rank; {} where nothing was added, on no rank then. All ranks call it.

        Args:
            reduce: adds tensors of all ranks, such as that of a strategy of Lightning.
        """
        if not self.sums:
            return {}
        pairs = reduce(torch.stack(list(self.sums.values())), reduce_op="sum")
        return means_of(dict(zip(self.sums, pairs, strict=True)))
