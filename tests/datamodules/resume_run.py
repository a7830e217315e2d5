"""A small training that writes down which samples each step saw; run as a script, it can be killed at any time."""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.image import ImageDataModule

ATTEMPTS = itertools.count()
SIZE = {"height": 8, "width": 8, "reference_size": 8}


class KeyLogger(L.LightningModule):
    """Appends a line for each batch: the step that it belongs to, and its keys.

    Args:
        stop_at: number of the batch, counted from the start of this process, in whose step it breaks off.
        estimate: ask for `estimated_stepping_batches`, as schedules do.
        attempt: rises from one run into the same log to the next.
    """

    def __init__(self, log: Path, stop_at: int | None, estimate: bool, attempt: int) -> None:
        super().__init__()
        self.log_path, self.stop_at, self.estimate, self.attempt = log, stop_at, estimate, attempt
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.num_batches = 0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        with open(f"{self.log_path}.{self.global_rank}", "a") as file:
            file.write(json.dumps([self.global_step, self.attempt, batch.keys]) + "\n")
        if self.num_batches == self.stop_at:
            raise KeyboardInterrupt
        self.num_batches += 1
        return (self.weight - batch.pixels.mean()).square().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.estimate:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


def read_steps(log: Path) -> dict[int, list[str]]:
    """Step -> keys of all ranks, sorted; where a step was done several times, as the last run did it."""
    attempts: dict[int, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for file in log.parent.glob(f"{log.name}.*"):
        for line in file.read_text().splitlines():
            step, attempt, keys = json.loads(line)
            attempts[step][attempt] += keys
    return {step: sorted(found[max(found)]) for step, found in sorted(attempts.items())}


def run_with_forked_workers(*arguments: Any, **options: Any) -> None:
    """`run` with data workers as in a training: forked, so that they end with it when it is killed."""
    multiprocessing.set_start_method("fork", force=True)
    run(*arguments, **options)


def run(
    shards: str | Path,
    folder: Path,
    *,
    max_steps: int,
    global_batch: int = 4,
    batch_size: int = 2,
    devices: int = 1,
    num_workers: int = 0,
    save_every: int = 2,
    stop_at: int | None = None,
    estimate: bool = False,
    attempt: int | None = None,
    data: dict[str, Any] | None = None,
    **trainer: Any,
) -> L.Trainer:
    """Goes on from the checkpoint in `folder`, if there is one."""
    checkpoint = folder / "last.ckpt"
    datamodule = ImageDataModule(shards, **SIZE, batch_size=batch_size, num_workers=num_workers, seed=3, **(data or {}))
    runner = L.Trainer(
        accelerator="cpu",
        devices=devices,
        max_steps=max_steps,
        accumulate_grad_batches=global_batch // batch_size // devices,
        callbacks=[ModelCheckpoint(folder, save_last=True, every_n_train_steps=save_every, save_top_k=0)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **{"max_epochs": -1, "strategy": "auto" if devices == 1 else "ddp"} | trainer,
    )
    module = KeyLogger(folder / "keys", stop_at, estimate, next(ATTEMPTS) if attempt is None else attempt)
    runner.fit(module, datamodule, ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=True)
    return runner


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("options", type=json.loads)
    options = parser.parse_args().options
    run(options.pop("shards"), Path(options.pop("folder")), **options)
