"""Every metric on two processes against the same videos in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.metrics.drawn import every_metric, random_inputs, update
from tests.metrics.processes_worker import NUM_VIDEOS, SHARES, results_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.metrics.processes_worker", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", list(every_metric()))
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_equal_one(name: str, share: str, runs: dict[str, dict[str, Any]]) -> None:
    metric = every_metric()[name]
    update(metric, random_inputs(NUM_VIDEOS))
    expected = results_of(metric)
    assert expected.keys() == runs[f"{share}/{name}"].keys()
    for key, value in expected.items():
        torch.testing.assert_close(runs[f"{share}/{name}"][key], value, rtol=0, atol=1e-6, equal_nan=True, msg=key)
