"""Which device a name means."""

from argparse import Namespace

import pytest
import torch

from mm_lightning.devices import find_device
from mm_lightning.generate import dtype_of


def test_auto_is_the_gpu_where_there_is_one():
    assert find_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cudo", "", "cuda:99", "hpu"])
def test_what_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"device={name}: torch has none here. Give auto, or one of cpu"):
        find_device(name)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [("cpu", "auto", torch.float32), ("meta:1", "auto", torch.bfloat16), ("meta:1", "float16", torch.float16)],
)
def test_only_the_cpu_generates_in_single_precision(device, dtype, expected):
    """`cuda:1` is a GPU as well as `cuda`; `meta:1` stands for it where there is none."""
    assert dtype_of(Namespace(device=device, dtype=dtype)) == expected
