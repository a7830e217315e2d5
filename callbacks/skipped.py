"""Samples that the loaders had to leave out: counted in the log, named at the end."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

NUM_NAMED = 10


class SkippedSamples(Callback):
    """Logs `data/skipped_samples` (of all ranks, so far) and names the first few when training ends.

    The data module must have `skipped`, a list of named tuples: what was left out (`key` and `url`), the `reason` and
    perhaps `num_samples`. What several ranks met counts once.
    """

    def __init__(self) -> None:
        self.known: dict[NamedTuple, None] = {}
        self.num_own = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0:
            self.gather(trainer)
            pl_module.log("data/skipped_samples", float(self.count()))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.gather(trainer)
        if self.known:
            names = "; ".join(f"{s.key or s.url}: {s.reason}" for s in list(self.known)[:NUM_NAMED])
            rank_zero_info(f"{self.count()} damaged samples were skipped, among them {names}")

    def count(self) -> int:
        return sum(getattr(entry, "num_samples", 1) for entry in self.known)

    def gather(self, trainer: Trainer) -> None:
        """Joins what the ranks have skipped; costs one number per rank where there is nothing new."""
        own = trainer.datamodule.skipped
        news = torch.tensor(float(len(own) - self.num_own), device=trainer.strategy.root_device)
        self.num_own = len(own)
        if trainer.strategy.reduce(news, reduce_op="sum") <= 0:
            return
        parts = [own]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            dist.all_gather_object(parts, own)
        self.known |= dict.fromkeys(entry for part in parts for entry in part)
