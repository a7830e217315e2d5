"""When the adapter folder is written, and with which weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from callbacks.adapter_checkpoint import AdapterCheckpoint
from callbacks.ema import TrainableEMA
from callbacks.nonfinite import NonFiniteGuard
from mm_lightning.adapters.weights import AdapterWeights
from mm_lightning.checkpoint import gather_tensors, trainable_state_dict
from tests.toy import ToyModule, assert_same, loader, make_trainer, plain_run


class Saving(ToyModule):
    """`save_adapter` as the real module has it: gather on every rank, write on rank zero."""

    def __init__(self) -> None:
        super().__init__()
        self.saved_at: list[int] = []

    def save_adapter(self, folder: Path) -> None:
        self.saved_at.append(self.trainer.global_step)
        tensors = gather_tensors(trainable_state_dict(self))
        if self.global_rank == 0:
            AdapterWeights({"base": {"id": "toy"}}, tensors).save_pretrained(folder)


@pytest.mark.parametrize("ema_first", [True, False])
def test_folder_holds_the_averages_of_the_last_step(tmp_path: Path, ema_first: bool) -> None:
    callbacks = [TrainableEMA(decay=0.5), AdapterCheckpoint(str(tmp_path / "a/adapter"), every_n_steps=2)]
    model = Saving()
    make_trainer(tmp_path, 5, callbacks if ema_first else callbacks[::-1]).fit(model, loader())
    assert model.saved_at == [2, 4, 5]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["adapter"]
    assert_same(load_file(tmp_path / "a/adapter/adapter.safetensors"), plain_run(range(5)).averages)


def test_killed_run_leaves_the_newest_adapter(tmp_path: Path) -> None:
    guard = NonFiniteGuard(max_consecutive=1)
    model = Saving()
    model.poison = lambda step, rank: step == 5
    with pytest.raises(RuntimeError, match="step 5"):
        make_trainer(tmp_path, 9, [guard, AdapterCheckpoint(str(tmp_path / "adapter"), 2)]).fit(model, loader())
    assert model.saved_at == [2, 4]
    assert_same(load_file(tmp_path / "adapter/adapter.safetensors"), plain_run(range(4)).weights)


def test_accumulation_writes_once_per_step(tmp_path: Path) -> None:
    model = Saving()
    callback = AdapterCheckpoint(str(tmp_path / "adapter"), every_n_steps=2)
    make_trainer(tmp_path, 5, [callback], accumulate_grad_batches=3).fit(model, loader())
    assert model.saved_at == [2, 4, 5]


def test_end_only_by_default(tmp_path: Path) -> None:
    model = Saving()
    make_trainer(tmp_path, 3, [AdapterCheckpoint(str(tmp_path / "adapter"))]).fit(model, loader())
    assert model.saved_at == [3]
    assert_same(load_file(tmp_path / "adapter/adapter.safetensors"), plain_run(range(3)).weights)


def test_wrong_interval() -> None:
    with pytest.raises(ValueError, match="every_n_steps=-1: give 0"):
        AdapterCheckpoint("adapter", every_n_steps=-1)
