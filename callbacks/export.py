"""Writes the trained model in its libraries' own layout, during and after training."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from callbacks.adapter_checkpoint import AdapterCheckpoint
from callbacks.ema import averaged_weights


class ModelExport(AdapterCheckpoint):
    """Calls `pl_module.export(folder)` every n optimizer steps and at the end, on averaged weights if there are.

    `folder` may hold other parts of the same model; `export` replaces its own ones only, each when the new one is
    whole. It is called on rank zero.

    Args:
        folder: diffusers' layout: `transformer/`, `vae/`, `text_encoder/` and so on.
        every_n_steps: optimizer steps between writes; 0 writes only when training ends.
    """

    @override
    def act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with averaged_weights(trainer, pl_module):
            if trainer.is_global_zero:
                self.folder.mkdir(parents=True, exist_ok=True)
                pl_module.export(self.folder)
