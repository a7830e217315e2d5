"""Samples per second over all processes, seconds per optimizer step, and peak device memory."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class ThroughputMonitor(Callback):
    """Logs `throughput/*` averaged over the last `every_n_steps` optimizer steps.

    Wall-clock time, with waiting for data, previews and checkpoints, but without validation. The batch's first field
    must have one entry per sample.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}, but must be at least 1.")
        self.every_n_steps = every_n_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and hasattr(self, "_started_at"):
            self._started_at += time.perf_counter() - self._paused_at

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._num_samples += len(batch[0])
        num_steps = trainer.global_step - self._first_step
        if num_steps < self.every_n_steps:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        seconds = time.perf_counter() - self._started_at
        figures = {
            "throughput/samples_per_second": trainer.world_size * self._num_samples / seconds,
            "throughput/seconds_per_step": seconds / num_steps,
        }
        if pl_module.device.type == "cuda":
            figures["throughput/peak_memory_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        for trainer_logger in trainer.loggers:
            trainer_logger.log_metrics(figures, step=trainer.global_step)
        self._restart(trainer)

    def _restart(self, trainer: Trainer) -> None:
        self._started_at = time.perf_counter()
        self._first_step = trainer.global_step
        self._num_samples = 0
