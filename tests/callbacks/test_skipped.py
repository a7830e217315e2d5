"""The loader's losses reach the log: counted while training, named at the end."""

import logging

import torch
from lightning import LightningDataModule, LightningModule, Trainer

from callbacks.skipped import SkippedSamples
from datamodules.shards import SkippedSample


class Toy(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ToyData(LightningDataModule):
    def __init__(self, skipped):
        super().__init__()
        self.skipped = skipped

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.zeros(4, 1))


def run(tmp_path, skipped, caplog):
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_steps=2,
        log_every_n_steps=1,
        callbacks=[SkippedSamples()],
        default_root_dir=tmp_path,
        enable_model_summary=False,
        **options,
    )
    with caplog.at_level(logging.INFO):
        trainer.fit(Toy(), ToyData(skipped))
    return trainer, caplog.text


def test_skipped_samples_are_counted_and_named(tmp_path, caplog):
    skipped = [SkippedSample("a.tar", "one", "no face"), SkippedSample("b.tar", "", "cut off")]
    trainer, text = run(tmp_path, skipped, caplog)
    assert trainer.callback_metrics["data/skipped_samples"] == 2
    assert "2 damaged samples were skipped, among them one: no face; b.tar: cut off" in text


def test_healthy_data_is_not_mentioned(tmp_path, caplog):
    trainer, text = run(tmp_path, [], caplog)
    assert trainer.callback_metrics["data/skipped_samples"] == 0
    assert "damaged" not in text
