"""Writes the adapter folder, which generation and the second stage read, during and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.ema import averaged_weights


class AdapterCheckpoint(Callback):
    """Calls `pl_module.save_adapter(folder)` every n optimizer steps and at the end, on averaged weights if there are.

    The folder always holds the newest adapter. `save_adapter` runs on every rank, because sharded weights have to be
    gathered; it writes on rank zero, and replaces an older folder only when the new one is whole.

    Args:
        folder: where the adapter goes; an older one is replaced.
        every_n_steps: optimizer steps between writes; 0 writes only when training ends.
    """

    def __init__(self, folder: str, every_n_steps: int = 0) -> None:
        if every_n_steps < 0:
            raise ValueError(f"every_n_steps is {every_n_steps}, but must be 0 (only at the end) or more.")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if due and trainer.global_step > self._last_step:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, pl_module)

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        with averaged_weights(trainer, pl_module):
            pl_module.save_adapter(self.folder)
