"""A run with non-finite steps equals the run in which they were absent; two processes: tests/test_strategy.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from callbacks.nonfinite import NonFiniteGuard, gradient_norm
from mm_lightning.checkpoint import trainable_state_dict
from tests.toy import ToyModule, assert_same, global_batch, loader, make_trainer, plain_run


class InfiniteGradient(ToyModule):
    """At step 1 the loss is finite and its gradient is not: the derivative of sqrt at 0."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + (self.head.weight[0, 0] * 0).sqrt() if batch_idx == 1 else loss


class DetachedNaN(ToyModule):
    """At step 1 the loss is NaN, its gradient would look healthy."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + torch.tensor(float("nan")) if batch_idx == 1 else loss


def nan_at(*steps: int) -> ToyModule:
    return ToyModule(poison=lambda step, rank: step in steps)


@pytest.mark.parametrize("module", [lambda: nan_at(1), InfiniteGradient, DetachedNaN])
def test_equals_the_run_without_that_step(tmp_path: Path, module: Any) -> None:
    model, guard = module(), NonFiniteGuard()
    make_trainer(tmp_path, 4, [guard]).fit(model, loader())
    assert_same(trainable_state_dict(model), plain_run([0, 2, 3]).weights)
    assert (guard.num_skipped, guard.num_consecutive) == (1, 0)


def test_first_step_may_be_the_bad_one(tmp_path: Path) -> None:
    model = nan_at(0)
    make_trainer(tmp_path, 3, [NonFiniteGuard()]).fit(model, loader())
    assert_same(trainable_state_dict(model), plain_run([1, 2]).weights)


def test_one_bad_micro_batch_drops_its_step(tmp_path: Path) -> None:
    model, guard = nan_at(2), NonFiniteGuard()
    make_trainer(tmp_path, 3, [guard], accumulate_grad_batches=2).fit(model, loader())
    without = ToyModule()
    params = [param for param in without.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)
    for step in (0, 2):
        for index in (2 * step, 2 * step + 1):
            inputs = global_batch(index)
            loss = (without.head(without.net(inputs)) - inputs.mean(-1, keepdim=True)).square().mean()
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert guard.num_skipped == 1
    assert_same(trainable_state_dict(model), trainable_state_dict(without))


def test_persisting_is_fatal_and_says_where(tmp_path: Path) -> None:
    model = nan_at(0, 2, 3, 4)
    with pytest.raises(RuntimeError, match=r"at step 4 \(loss of rank 0: nan, .*3 steps in a row, 4 in all") as error:
        make_trainer(tmp_path, 9, [NonFiniteGuard(max_consecutive=3)]).fit(model, loader())
    assert "earlier checkpoint" in str(error.value)
    assert_same(trainable_state_dict(model), plain_run([1]).weights)


def test_counters_survive_a_resume(tmp_path: Path) -> None:
    save = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2)
    make_trainer(tmp_path, 2, [NonFiniteGuard(), save]).fit(nan_at(0, 1), loader())
    guard = NonFiniteGuard(max_consecutive=3)
    with pytest.raises(RuntimeError, match=r"at step 2 .*3 steps in a row, 3 in all"):
        make_trainer(tmp_path, 4, [guard]).fit(nan_at(2), loader(), ckpt_path=tmp_path / "step=2.ckpt")


def test_logs_norm_before_clipping_and_count(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = make_trainer(tmp_path, 2, [NonFiniteGuard()], logger=logger, log_every_n_steps=1)
    trainer.fit(nan_at(1), loader())
    model, inputs = ToyModule(), global_batch(0)
    (model.head(model.net(inputs)) - inputs.mean(-1, keepdim=True)).square().mean().backward()
    squares = [param.grad.double().square().sum() for param in model.parameters() if param.grad is not None]
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    columns = rows[0].split(",")
    first, second = (dict(zip(columns, row.split(","), strict=True)) for row in rows[1:])
    norm = torch.stack(squares).sum().sqrt().item()
    assert norm > 1
    assert float(first["train/grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert (float(first["train/nonfinite_steps"]), float(second["train/nonfinite_steps"])) == (0, 1)


def test_norm_without_gradients_is_zero() -> None:
    assert gradient_norm(torch.optim.AdamW(ToyModule().head.parameters())).item() == 0


def test_wrong_limit() -> None:
    with pytest.raises(ValueError, match="max_consecutive is 0"):
        NonFiniteGuard(max_consecutive=0)
