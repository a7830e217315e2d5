"""One process, two under DDP and two under FSDP2 train the same adapter, through the command that users type."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT

TOLERANCE = 1e-6  # fp32 sums in another order


def train(*overrides: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "train.py", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tiny_folder, sample_shards, tmp_path_factory):
    """Three steps of plain gradient descent, global batch 4: Adam would blow up differences in the last digit."""
    output = tmp_path_factory.mktemp("runs")
    common = (
        "experiment=stage1_image",
        "debug=tiny",
        f"paths.shards_dir={sample_shards}",
        f"paths.output_dir={output}",
        f"model.base={tiny_folder}",
        f"model.vision={tiny_folder}/image_encoder",
        "data.height=32",
        "data.width=32",
        "data.num_workers=0",
        "global_batch_size=4",
        "trainer.max_steps=3",
        "data.num_val_samples=6",
        "model.optimizer._target_=torch.optim.SGD",
        "~model.optimizer.betas",
        "model.optimizer.lr=0.1",
        "model.lr_schedule.num_warmup_steps=0",
        "callbacks.ema.decay=0.5",
        "~callbacks.preview",
        "~callbacks.progress",
    )
    train(*common, "task=single", "trainer.val_check_interval=3")
    train(*common, "task=accumulated", "data.batch_size=1", "trainer.val_check_interval=12")
    train(*common, "task=ddp", "strategy=ddp", "trainer.devices=2", "trainer.val_check_interval=3")
    train(*common, "task=fsdp", "strategy=fsdp", "trainer.devices=2", "trainer.val_check_interval=3")
    return {path.name: path / "latest" for path in output.iterdir()}


@pytest.mark.parametrize("strategy", ["accumulated", "ddp", "fsdp"])
def test_adapters_are_the_same(runs, strategy):
    expected, found = (load_file(runs[name] / "adapter/adapter.safetensors") for name in ("single", strategy))
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=TOLERANCE, msg=name)
    assert any(tensor.any() for name, tensor in found.items() if "to_v" in name)  # it did train


@pytest.mark.parametrize("strategy", ["accumulated", "ddp", "fsdp"])
def test_validation_says_the_same(runs, strategy):
    """However the six samples fall into batches and onto processes; some quarter of the timesteps is met by few."""
    expected, found = (validation_figures(runs[name]) for name in ("single", strategy))
    assert {"val/loss", "val/loss/velocity", "val/loss/identity", "val/count/identity"} < expected.keys()
    assert found == pytest.approx(expected, rel=1e-5)


def validation_figures(run: Path) -> dict[str, float]:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("val/")]
    return {tag: events.Scalars(tag)[-1].value for tag in tags}


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp"])
def test_checkpoints_hold_trainable_parameters_only(runs, strategy):
    adapter = load_file(runs[strategy] / "adapter/adapter.safetensors")
    checkpoint = torch.load(runs[strategy] / "checkpoints/last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(adapter)
    assert checkpoint["magicmirror"] == json.loads(json.dumps(checkpoint["magicmirror"]))
