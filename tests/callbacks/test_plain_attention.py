"""The kernel that runs is the one that torch's profiler names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import profile

from callbacks.plain_attention import PlainAttention
from tests.toy import ToyModule, loader, make_trainer

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


def operations() -> set[str]:
    query = torch.randn(2, 2, 8, 16, dtype=torch.bfloat16, requires_grad=True)
    with profile() as profiler:
        F.scaled_dot_product_attention(query, query, query)
    return {event.key for event in profiler.key_averages()}


class Attending(ToyModule):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen = operations()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("callbacks", [[], [PlainAttention()]])
def test_fused_kernel_runs_before_and_after_but_not_in_training(tmp_path: Path, callbacks: list) -> None:
    assert FUSED in operations()
    module = Attending()
    make_trainer(tmp_path, 1, callbacks).fit(module, loader())
    assert (FUSED in module.seen) == (not callbacks)
    assert FUSED in operations()


def test_given_back_when_training_fails(tmp_path: Path) -> None:
    class Failing(ToyModule):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise RuntimeError("as a step may")

    with pytest.raises(RuntimeError, match="as a step may"):
        make_trainer(tmp_path, 1, [PlainAttention()]).fit(Failing(), loader())
    assert FUSED in operations()
