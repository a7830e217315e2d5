"""When callbacks act: every n optimizer steps and at the end, once for a step."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from callbacks.every_n_steps import EveryNSteps
from tests.toy import ToyModule, loader, make_trainer


class Noting(EveryNSteps):
    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps)
        self.acted: list[int] = []

    def act(self, trainer, pl_module) -> None:
        self.acted.append(trainer.global_step)


@pytest.mark.parametrize(
    ("every_n_steps", "num_steps", "accumulated", "expected"),
    [
        (2, 5, 1, [2, 4, 5]),
        (2, 4, 1, [2, 4]),
        (1, 3, 3, [1, 2, 3]),
        (2, 3, 2, [2, 3]),
        (0, 4, 2, [4]),
        (9, 4, 1, [4]),
    ],
)
def test_every_n_steps_and_at_the_end(tmp_path: Path, every_n_steps, num_steps, accumulated, expected) -> None:
    callback = Noting(every_n_steps)
    make_trainer(tmp_path, num_steps, [callback], accumulate_grad_batches=accumulated).fit(ToyModule(), loader())
    assert callback.acted == expected


def test_the_sanity_check_is_no_training(tmp_path: Path) -> None:
    callback = Noting(1)

    class Validated(ToyModule):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            seen.append((self.trainer.sanity_checking, list(callback.acted)))

    seen: list[tuple[bool, list[int]]] = []
    trainer = make_trainer(tmp_path, 2, [callback], num_sanity_val_steps=1, limit_val_batches=1, val_check_interval=2)
    trainer.fit(Validated(), loader(), loader())
    assert seen == [(True, []), (False, [1, 2])]
    assert callback.acted == [1, 2]


def test_a_resumed_run_does_not_act_on_the_step_it_starts_at(tmp_path: Path) -> None:
    first = make_trainer(tmp_path, 4, [Noting(2)])
    first.fit(ToyModule(), loader())
    first.save_checkpoint(tmp_path / "four.ckpt")
    callback = Noting(2)
    make_trainer(tmp_path, 7, [callback]).fit(ToyModule(), loader(), ckpt_path=str(tmp_path / "four.ckpt"))
    assert callback.acted == [6, 7]
    again = Noting(2)
    make_trainer(tmp_path, 4, [again]).fit(ToyModule(), loader(), ckpt_path=str(tmp_path / "four.ckpt"))
    assert again.acted == []


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps=-1: give 0"):
        Noting(-1)
