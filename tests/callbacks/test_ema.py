"""Averages against their definition, frozen parameters never copied, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks.ema import TrainableEMA, averaged_weights
from mm_lightning.checkpoint import trainable_state_dict
from tests.toy import TRAINABLE, ToyModule, assert_same, loader, make_trainer, plain_run


class Watching(ToyModule):
    """Records the weights that validation sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Tensor]] = []

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(snapshot(self))

    def val_dataloader(self) -> DataLoader:
        return DataLoader([0])


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainable_state_dict(model).items()}


def fit(folder: Path, num_steps: int, model: ToyModule | None = None, **kwargs: Any) -> tuple[ToyModule, TrainableEMA]:
    model = model or ToyModule()
    ema = TrainableEMA(decay=0.5, **kwargs.pop("ema", {}))
    save = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    ckpt_path = kwargs.pop("ckpt_path", None)
    make_trainer(folder, num_steps, [ema, save], **kwargs).fit(model, loader(), ckpt_path=ckpt_path)
    return model, ema


def test_averages_follow_their_definition(tmp_path: Path) -> None:
    model, ema = fit(tmp_path, 5)
    expected = plain_run(range(5), decay=0.5)
    assert_same(trainable_state_dict(model), expected.averages)
    assert_same(ema._average_model.tensors(), expected.weights)


def test_only_trainable_parameters_are_copied(tmp_path: Path) -> None:
    model = ToyModule()
    frozen = {name: param.data_ptr() for name, param in model.named_parameters() if not param.requires_grad}
    _, ema = fit(tmp_path, 2, model)
    assert set(ema._average_model.tensors()) == TRAINABLE
    assert len([*ema._average_model.parameters()]) == len(TRAINABLE)
    assert [name for name, _ in ema._average_model.named_buffers()] == ["n_averaged"]
    assert {name: param.data_ptr() for name, param in model.named_parameters() if name in frozen} == frozen
    own = {param.data_ptr() for param in model.parameters()}
    assert not own & {param.data_ptr() for param in ema._average_model.parameters()}


def test_resume_equals_uninterrupted(tmp_path: Path) -> None:
    fit(tmp_path / "first", 2)
    model, ema = fit(tmp_path / "second", 5, ckpt_path=tmp_path / "first/step=2.ckpt")
    uninterrupted, other = fit(tmp_path / "third", 5)
    assert_same(trainable_state_dict(model), trainable_state_dict(uninterrupted), atol=0)
    assert_same(ema._average_model.tensors(), other._average_model.tensors(), atol=0)
    assert int(ema._average_model.n_averaged) == 5


def test_checkpoint_after_training_still_holds_both(tmp_path: Path) -> None:
    model, ema = ToyModule(), TrainableEMA(decay=0.5)
    trainer = make_trainer(tmp_path, 3, [ema])
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    checkpoint = torch.load(tmp_path / "late.ckpt", weights_only=True)
    expected = plain_run(range(3))
    assert_same(checkpoint["state_dict"], expected.weights)
    assert_same(checkpoint["ema_state_dict"], expected.averages)


def test_resume_without_the_callback_continues_the_weights(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    model = ToyModule()
    make_trainer(tmp_path, 4).fit(model, loader(), ckpt_path=tmp_path / "step=2.ckpt")
    assert_same(trainable_state_dict(model), plain_run(range(4)).weights)


def test_validation_sees_averages(tmp_path: Path) -> None:
    model = Watching()
    fit(tmp_path, 4, model, val_check_interval=2, num_sanity_val_steps=1)
    sanity, first, second = model.seen
    assert_same(sanity, snapshot(ToyModule()), atol=0)
    assert_same(first, plain_run(range(2)).averages)
    assert_same(second, plain_run(range(4)).averages)
    assert_same(trainable_state_dict(model), plain_run(range(4)).averages)


@pytest.mark.parametrize("ckpt_path", [None, "step=2.ckpt"])
def test_evaluation_outside_of_fit_sees_averages(tmp_path: Path, ckpt_path: str | None) -> None:
    model, ema = Watching(), TrainableEMA(decay=0.5)
    save = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = make_trainer(tmp_path, 4, [ema, save], limit_val_batches=1, num_sanity_val_steps=0)
    trainer.fit(model, loader())
    trainer.validate(model, ckpt_path=ckpt_path and tmp_path / ckpt_path, verbose=False)
    assert_same(model.seen[-1], plain_run(range(2 if ckpt_path else 4)).averages)


def test_block_of_averaged_weights(tmp_path: Path) -> None:
    class Peek(TrainableEMA):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            before = snapshot(pl_module)
            with averaged_weights(trainer, pl_module), averaged_weights(trainer, pl_module):
                self.inside = snapshot(pl_module)
            assert_same(trainable_state_dict(pl_module), before, atol=0)

    peek = Peek(decay=0.5)
    make_trainer(tmp_path, 3, [peek]).fit(ToyModule(), loader())
    assert_same(peek.inside, plain_run(range(3)).averages)


def test_late_start_never_shows_the_untrained(tmp_path: Path) -> None:
    model, _ = fit(tmp_path / "never", 2, ema={"update_starting_at_step": 10})
    assert_same(trainable_state_dict(model), plain_run(range(2)).weights)
    assert "ema_state_dict" not in torch.load(tmp_path / "never/step=2.ckpt", weights_only=True)

    model, _ = fit(tmp_path / "last", 3, ema={"update_starting_at_step": 2})
    assert_same(trainable_state_dict(model), plain_run(range(3)).weights)


@pytest.mark.parametrize("decay", [-0.1, 1.5])
def test_wrong_decay(decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        TrainableEMA(decay=decay)
