"""Samples that the loader had to leave out: counted in the log, named at the end."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

NUM_NAMED = 10


class SkippedSamples(Callback):
    """Logs `data/skipped_samples` (this rank's, so far) and names the first few when training ends.

    The data module must have `skipped`, a list of what was left out and why.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log("data/skipped_samples", float(len(trainer.datamodule.skipped)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        skipped = trainer.datamodule.skipped
        if skipped:
            names = "; ".join(f"{s.key or s.url}: {s.reason}" for s in skipped[:NUM_NAMED])
            rank_zero_info(f"{len(skipped)} damaged samples were skipped, among them {names}")
