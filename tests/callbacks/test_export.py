"""When the parts of a model are exported, and with which weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from callbacks.ema import TrainableEMA
from callbacks.export import ModelExport
from mm_lightning.checkpoint import trainable_state_dict
from tests.toy import ToyModule, assert_same, loader, make_trainer, plain_run


class Exporting(ToyModule):
    """Writes into a folder that must be there."""

    def __init__(self) -> None:
        super().__init__()
        self.exported_at: list[int] = []

    def export(self, folder: Path) -> None:
        self.exported_at.append(self.trainer.global_step)
        tensors = {name: tensor.clone() for name, tensor in trainable_state_dict(self).items()}
        save_file(tensors, folder / "part.safetensors")


@pytest.mark.parametrize("ema_first", [True, False])
def test_exports_are_of_the_averages(tmp_path: Path, ema_first: bool) -> None:
    folder = tmp_path / "outputs/model"
    callbacks = [TrainableEMA(decay=0.5), ModelExport(str(folder), every_n_steps=2)]
    model = Exporting()
    make_trainer(tmp_path, 5, callbacks if ema_first else callbacks[::-1]).fit(model, loader())
    assert model.exported_at == [2, 4, 5]
    assert_same(load_file(folder / "part.safetensors"), plain_run(range(5)).averages)


def test_other_parts_stay(tmp_path: Path) -> None:
    (tmp_path / "model/other").mkdir(parents=True)
    make_trainer(tmp_path, 2, [ModelExport(str(tmp_path / "model"))]).fit(Exporting(), loader())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["other", "part.safetensors"]
    assert_same(load_file(tmp_path / "model/part.safetensors"), plain_run(range(2)).weights)


def test_wrong_interval() -> None:
    with pytest.raises(ValueError, match="every_n_steps=-1: give 0"):
        ModelExport("model", every_n_steps=-1)
