"""DDP, FSDP2 and hybrid sharding on two CPU processes against bare PyTorch in one process, and their checkpoints."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.distributed.checkpoint import FileSystemReader

from callbacks.ema import TrainableEMA
from mm_lightning.checkpoint import require_complete, trainable_state_dict
from mm_lightning.strategy import TrainableModelParallelStrategy, shard_module
from tests.strategy_worker import gathered_videos
from tests.toy import TRAINABLE, PlainRun, ToyModule, assert_same, loader, make_trainer, plain_run

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of two processes come from one start, which is the slow part."""
    folder = tmp_path_factory.mktemp("strategy")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "tests.strategy_worker", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture
def one_process_group() -> Any:
    """One process is a group too; Lightning makes it, and the next test must not find it."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def expected() -> PlainRun:
    return plain_run(range(4))


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp_full", "hybrid"])
def test_equals_one_process(runs: dict[str, dict[str, Any]], expected: PlainRun, name: str) -> None:
    run = runs[name]
    assert run["losses"] == pytest.approx(expected.losses, abs=1e-6)
    assert_same(run["weights"], expected.weights)
    assert_same(run["averages"], expected.averages)
    assert run["num_skipped"] == 0


def test_everything_is_sharded(runs: dict[str, dict[str, Any]]) -> None:
    every_name = sorted(name for name, _ in ToyModule().named_parameters())
    assert runs["fsdp"]["sharded"] == runs["hybrid"]["sharded"] == every_name
    assert runs["ddp"]["sharded"] == []


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp_full", "hybrid"])
def test_resume_under_fsdp_equals_uninterrupted(runs: dict[str, dict[str, Any]], expected: PlainRun, name: str) -> None:
    run = runs[f"fsdp_from_{name}"]
    assert run["losses"] == pytest.approx(expected.losses[2:], abs=1e-6)
    assert_same(run["weights"], expected.weights)
    assert_same(run["averages"], expected.averages)


@pytest.mark.parametrize("name", ["ddp", "fsdp_full"])
def test_file_holds_trainable_only_and_resumes_in_one_process(
    folder: Path, runs: dict[str, dict[str, Any]], expected: PlainRun, name: str
) -> None:
    path = folder / name / "step=2.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == set(checkpoint["ema_state_dict"]) == TRAINABLE
    half_way = plain_run(range(2))
    assert_same(checkpoint["state_dict"], half_way.weights)
    assert_same(checkpoint["ema_state_dict"], half_way.averages)

    model = ToyModule()
    make_trainer(folder, 4).fit(model, loader(), ckpt_path=path)
    assert model.losses == pytest.approx(expected.losses[2:], abs=1e-6)
    assert_same(trainable_state_dict(model), expected.weights)


def test_folder_holds_trainable_only(folder: Path, runs: dict[str, dict[str, Any]]) -> None:
    path = folder / "fsdp" / "step=2.ckpt"
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    for entry in ("state_dict", "ema_state_dict"):
        assert {k.removeprefix(f"{entry}.") for k in stored if k.startswith(f"{entry}.")} == TRAINABLE
    moments = {k for k in stored if k.startswith("optimizer_0.state.")}
    assert moments == {f"optimizer_0.state.{n}.{m}" for n in TRAINABLE for m in ("step", "exp_avg", "exp_avg_sq")}
    assert (path / "complete.json").read_text() == '{"global_step": 2, "world_size": 2}\n'
    assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_nan_on_one_rank_is_skipped_by_all(runs: dict[str, dict[str, Any]], name: str) -> None:
    run = runs[f"{name}_nan"]
    assert run["num_skipped"] == 1
    assert_same(run["weights"], plain_run([0, 2, 3]).weights)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_persisting_nan_ends_all_ranks(runs: dict[str, dict[str, Any]], name: str) -> None:
    run = runs[f"{name}_fatal"]
    assert "at step 2" in run["error"]
    assert "3 steps in a row, 3 in all" in run["error"]
    assert_same(run["weights"], trainable_state_dict(ToyModule()), atol=0)


def test_interrupted_folder_is_refused(folder: Path, runs: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    broken = tmp_path / "step=2.ckpt"
    shutil.copytree(folder / "fsdp" / "step=2.ckpt", broken)
    require_complete(broken)
    (broken / "complete.json").unlink()
    with pytest.raises(ValueError, match=r"step=2\.ckpt is not complete: complete\.json is missing"):
        require_complete(broken)
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        require_complete(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["fsdp", "fsdp_full"])
def test_validation_of_a_checkpoint_sees_averages(
    folder: Path, runs: dict[str, dict[str, Any]], one_process_group: None, name: str
) -> None:
    class Watching(ToyModule):
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self.seen = {name: tensor.full_tensor() for name, tensor in trainable_state_dict(self).items()}

    model = Watching()
    trainer = make_trainer(folder, 4, [TrainableEMA(decay=0.5)], strategy=TrainableModelParallelStrategy())
    trainer.validate(model, [torch.zeros(1)], ckpt_path=folder / name / "step=2.ckpt", verbose=False)
    assert_same(model.seen, plain_run(range(2)).averages)


def test_one_process_resumes_from_two(
    folder: Path, runs: dict[str, dict[str, Any]], expected: PlainRun, one_process_group: None
) -> None:
    model = ToyModule()
    trainer = make_trainer(folder, 4, strategy=TrainableModelParallelStrategy())
    trainer.fit(model, loader(), ckpt_path=folder / "fsdp" / "step=2.ckpt")
    assert model.losses == pytest.approx(expected.losses[2:], abs=1e-6)
    weights = {name: tensor.full_tensor() for name, tensor in trainable_state_dict(model).items()}
    assert_same(weights, expected.weights)


class MissingHead(ToyModule):
    def configure_model(self) -> None:
        shard_module(self.net, self.device_mesh, ["Block"])


class Misnamed(ToyModule):
    def configure_model(self) -> None:
        shard_module(self.net, self.device_mesh, ["Blck"])


class Narrow(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        del self.net.blocks[2]


@pytest.mark.parametrize(
    ("module", "message"),
    [(MissingHead, "1 trainable parameters are not sharded.*head.weight"), (Misnamed, "Net contains no 'Blck'")],
)
def test_sharding_mistakes_are_named(
    tmp_path: Path, one_process_group: None, module: type[ToyModule], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, 1, strategy=TrainableModelParallelStrategy()).fit(module(), loader())


@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_checkpoint_of_another_preset_is_refused(
    folder: Path, runs: dict[str, dict[str, Any]], one_process_group: None, name: str
) -> None:
    trainer = make_trainer(folder, 4, strategy=TrainableModelParallelStrategy())
    with pytest.raises(ValueError, match=r"3 unexpected: net\.blocks\.2\.adapter\.down\.weight"):
        trainer.fit(Narrow(), loader(), ckpt_path=folder / name / "step=2.ckpt")


@pytest.mark.parametrize("sharded", [True, False])
def test_weights_alone_do_not_resume(tmp_path: Path, one_process_group: None, sharded: bool) -> None:
    def trainer(num_steps: int) -> Trainer:
        strategy = TrainableModelParallelStrategy(save_distributed_checkpoint=sharded)
        return make_trainer(tmp_path, num_steps, strategy=strategy)

    writer = trainer(1)
    writer.fit(ToyModule(), loader())
    writer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"weights\.ckpt holds weights only"):
        trainer(2).fit(ToyModule(), loader(), ckpt_path=tmp_path / "weights.ckpt")


@pytest.mark.parametrize(("size", "message"), [(0, "at least 1"), (2, "does not divide the 1 processes")])
def test_wrong_replicate_size(tmp_path: Path, one_process_group: None, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, 1, strategy=TrainableModelParallelStrategy(size)).fit(ToyModule(), loader())


def test_mixed_dtypes_share_a_unit(tmp_path: Path, one_process_group: None) -> None:
    """Frozen bf16 beside trained fp32, gathered in bf16 under autocast: the loss stays near fp32's."""

    class Mixed(ToyModule):
        def configure_model(self) -> None:
            for param in self.net.parameters():
                if not param.requires_grad:
                    param.data = param.data.bfloat16()
            shard_module(self.net, self.device_mesh, ["Block"], param_dtype=torch.bfloat16)
            shard_module(self.head, self.device_mesh, [], param_dtype=torch.bfloat16)

    model = Mixed()
    strategy = TrainableModelParallelStrategy()
    make_trainer(tmp_path, 3, strategy=strategy, precision="bf16-mixed").fit(model, loader())
    assert model.losses == pytest.approx(plain_run(range(3)).losses, rel=2e-2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_rank_zero_shows_all_ranks_videos_in_order(runs: dict[str, Any]) -> None:
    """Reduced to the height at which they are shown; one process shows its own as they are."""
    assert runs["videos"] == [(f"video {i}", [2, 128, 256, 3], 10 * i) for i in range(3)]
    alone = gathered_videos(0, num_videos=1)
    assert alone == [("video 0", [2, 256, 512, 3], 0)]
