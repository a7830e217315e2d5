"""Non-finite losses and gradients: skipped on all ranks together, counted, and fatal when they persist."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

logger = logging.getLogger(__name__)


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """L2 norm over all gradients of an optimizer, a scalar; every rank must call it where gradients are sharded."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class NonFiniteGuard(Callback):
    """Drops an optimizer step whose loss or gradient norm is not finite, so that it never reaches the weights.

    Automatic optimisation calls this after backward and before clipping, once per optimizer step on every rank; the
    ranks agree by an all-reduce. Dropping sets every gradient to None: the optimizer then touches neither weights,
    moments, step counts nor weight decay. All accumulated micro-batches of that step are lost, and the learning-rate
    schedule moves on. Logs `train/grad_norm` (before clipping) and `train/nonfinite_steps` (total).

    Args:
        max_consecutive: optimizer steps dropped in a row that end the run.

    Raises:
        RuntimeError: on every rank at once, after `max_consecutive` dropped steps in a row.
    """

    def __init__(self, max_consecutive: int = 10) -> None:
        if max_consecutive < 1:
            raise ValueError(f"max_consecutive is {max_consecutive}, but must be at least 1.")
        self.max_consecutive = max_consecutive
        self.num_skipped = 0
        self.num_consecutive = 0
        self._losses: list[Tensor] = []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach() * trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        norm = gradient_norm(optimizer)
        losses = torch.stack([loss.float() for loss in self._losses])
        self._losses.clear()
        bad = ~(losses.isfinite().all() & norm.isfinite().to(losses.device))
        if trainer.strategy.reduce(bad.float(), reduce_op="max").item():
            self._skip(trainer, optimizer, losses, norm)
        else:
            self.num_consecutive = 0
            pl_module.log("train/grad_norm", norm)
        pl_module.log("train/nonfinite_steps", float(self.num_skipped))

    def _skip(self, trainer: Trainer, optimizer: Optimizer, losses: Tensor, norm: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        self.num_skipped += 1
        self.num_consecutive += 1
        what = (
            f"loss or gradient not finite at step {trainer.global_step} "
            f"(loss of rank {trainer.global_rank}: {losses.mean().item():.4g}, gradient norm: {norm.item():.4g})"
        )
        if self.num_consecutive >= self.max_consecutive:
            raise RuntimeError(
                f"{what}, {self.num_consecutive} steps in a row, {self.num_skipped} in all: training cannot recover. "
                "Resume from an earlier checkpoint with a lower learning rate, or look at the samples of these steps."
            )
        logger.warning("%s: step dropped, %d in a row, %d in all", what, self.num_consecutive, self.num_skipped)

    def state_dict(self) -> dict[str, Any]:
        return {"num_skipped": self.num_skipped, "num_consecutive": self.num_consecutive}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_skipped = state_dict["num_skipped"]
        self.num_consecutive = state_dict["num_consecutive"]
