"""Figures against a run of known pace."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.throughput import ThroughputMonitor
from tests.toy import ToyModule, make_trainer

PACE = 0.02


class Slow(ToyModule):
    def training_step(self, batch: list[Any], batch_idx: int) -> Tensor:
        time.sleep(PACE)
        return super().training_step(batch[0], batch_idx)

    def validation_step(self, batch: list[Any], batch_idx: int) -> None:
        time.sleep(20 * PACE)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([0])


def test_pace_without_validation(tmp_path: Path) -> None:
    keys = torch.utils.data.TensorDataset(torch.arange(30))
    logger = TensorBoardLogger(tmp_path)
    callbacks = [ThroughputMonitor(every_n_steps=3), LearningRateMonitor("step")]
    trainer = make_trainer(
        tmp_path, 6, callbacks, logger=logger, accumulate_grad_batches=2, val_check_interval=2, log_every_n_steps=1
    )
    trainer.fit(Slow(), DataLoader(keys, batch_size=2))
    events = EventAccumulator(logger.log_dir).Reload()
    rates, seconds = (events.Scalars(f"throughput/{n}") for n in ("samples_per_second", "seconds_per_step"))
    assert [event.step for event in rates] == [3, 6]
    for rate, second in zip(rates, seconds, strict=True):
        assert 2 * PACE <= second.value < 15 * PACE
        assert rate.value * second.value == pytest.approx(4, rel=1e-3)
    assert events.Scalars("lr-AdamW")[0].value == pytest.approx(0.01)


def test_wrong_interval() -> None:
    with pytest.raises(ValueError, match="every_n_steps is 0"):
        ThroughputMonitor(every_n_steps=0)
