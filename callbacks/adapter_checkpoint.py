"""Writes the adapter folder, which generation and the second stage read, during and after training."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from callbacks.ema import averaged_weights
from callbacks.every_n_steps import EveryNSteps


class AdapterCheckpoint(EveryNSteps):
    """Calls `pl_module.save_adapter(folder)` every n optimizer steps and at the end, on averaged weights if there are.

    The folder always holds the newest adapter. `save_adapter` runs on every rank, because sharded weights have to be
    gathered; it writes on rank zero, and replaces an older folder only when the new one is whole.

    Args:
        folder: where the adapter goes; an older one is replaced.
        every_n_steps: optimizer steps between writes; 0 writes only when training ends.
    """

    def __init__(self, folder: str, every_n_steps: int = 0) -> None:
        super().__init__(every_n_steps)
        self.folder = Path(folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Also after no step: a run that is resumed at its end leaves an adapter too."""
        self.act_now(trainer, pl_module)

    def act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with averaged_weights(trainer, pl_module):
            pl_module.save_adapter(self.folder)
