"""Trainable-only checkpoints of one process, and the errors of a checkpoint that does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from mm_lightning.checkpoint import (
    check_trainable,
    load_trainable,
    replace_path,
    trainable_state_dict,
)
from tests.toy import TRAINABLE, ToyModule, assert_same, loader, make_trainer, plain_run


def test_trainable_names_are_exact() -> None:
    assert set(trainable_state_dict(ToyModule())) == TRAINABLE


def test_state_dict_shares_memory() -> None:
    model = ToyModule()
    assert trainable_state_dict(model)["head.weight"].data_ptr() == model.head.weight.data_ptr()


def test_single_process_saves_trainable_only_and_resumes(tmp_path: Path) -> None:
    save = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    make_trainer(tmp_path, 4, [save]).fit(ToyModule(), loader())
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == TRAINABLE

    resumed = ToyModule()
    make_trainer(tmp_path, 4).fit(resumed, loader(), ckpt_path=tmp_path / "step=2.ckpt")
    expected = plain_run(range(4))
    assert_same(trainable_state_dict(resumed), expected.weights)
    assert resumed.losses == pytest.approx(expected.losses[2:], abs=1e-6)


def compiled_module() -> ToyModule:
    model = ToyModule()
    model.net = torch.compile(model.net, backend="eager")
    assert any("_orig_mod" in name for name, _ in model.named_parameters())
    return model


def test_compiled_submodule_loads() -> None:
    stored = {name: torch.full_like(tensor, 0.5) for name, tensor in trainable_state_dict(ToyModule()).items()}
    model = compiled_module()
    load_trainable(model, stored)
    assert all((tensor == 0.5).all() for tensor in trainable_state_dict(model).values())


@pytest.mark.parametrize(("writer", "reader"), [(ToyModule, compiled_module), (compiled_module, ToyModule)])
def test_compiled_and_plain_resume_each_other(
    tmp_path: Path, writer: Callable[[], ToyModule], reader: Callable[[], ToyModule]
) -> None:
    save = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2)
    make_trainer(tmp_path, 2, [save]).fit(writer(), loader())
    assert set(torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]) == TRAINABLE
    model = reader()
    make_trainer(tmp_path, 4).fit(model, loader(), ckpt_path=tmp_path / "step=2.ckpt")
    assert_same(trainable_state_dict(model), plain_run(range(4)).weights)


def test_every_difference_is_listed() -> None:
    model = ToyModule()
    stored = trainable_state_dict(model)
    stored["net.extra"] = stored.pop("net.blocks.0.adapter.up.bias")
    stored["head.weight"] = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="preset") as error:
        check_trainable(model, stored)
    text = str(error.value)
    assert "1 missing: net.blocks.0.adapter.up.bias" in text
    assert "1 unexpected: net.extra" in text
    assert "head.weight (2, 8) instead of (1, 8)" in text


def test_failed_load_changes_nothing() -> None:
    model = ToyModule()
    before = {name: tensor.clone() for name, tensor in trainable_state_dict(model).items()}
    with pytest.raises(ValueError, match="9 missing"):
        load_trainable(model, {"head.weight": torch.zeros(1, 8)})
    assert_same(trainable_state_dict(model), before, atol=0)


@pytest.mark.parametrize("old", ["nothing", "file", "folder", "link"])
def test_replace_path_leaves_only_the_new(tmp_path: Path, old: str) -> None:
    partial, final, elsewhere = tmp_path / "partial", tmp_path / "final", tmp_path / "elsewhere"
    for folder in (partial, elsewhere):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    if old == "file":
        final.write_text("old")
    elif old == "folder":
        final.mkdir()
        (final / "stale").write_text("old")
    elif old == "link":
        final.symlink_to(elsewhere)
    replace_path(partial, final)
    assert [p.name for p in final.iterdir()] == ["name"]
    assert (final / "name").read_text() == "partial"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "final"]
    assert (elsewhere / "name").read_text() == "elsewhere"
