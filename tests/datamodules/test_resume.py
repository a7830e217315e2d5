"""Broken off anywhere and resumed, a run sees at each step what an undisturbed one sees."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from datamodules.image import ImageDataModule
from mm_lightning.prepare.shards import ShardWriter
from tests.conftest import ROOT
from tests.datamodules.drawn import picture_fields
from tests.datamodules.resume_run import SIZE, read_steps, run, run_with_forked_workers

STEPS = 12
OPTIONS = {"num_lanes": 2, "shuffle_buffer": 5}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch.utilities.rank_zero"), "disabled", True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """22 samples in shards of four: passes end in the middle of a step."""
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, "image", 4) as writer:
        for i in range(22):
            writer.write(f"s{i:03d}", picture_fields(i))
    return folder


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(shards, folder, max_steps=STEPS, data=OPTIONS)
    steps = read_steps(folder / "keys")
    assert [len(keys) for keys in steps.values()] == [4] * STEPS
    assert len({key for keys in steps.values() for key in keys}) == 22
    return steps


def broken_off(shards, folder, stop_at, **options):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(shards, folder, max_steps=STEPS, stop_at=stop_at, data=OPTIONS, **options)


@pytest.mark.parametrize("seed", range(20))
def test_broken_off_twice_at_random_points(shards, undisturbed, tmp_path, seed):
    """With another number of batches per step each time, as when the number of ranks changes."""
    draw = random.Random(seed)
    for _ in range(2):
        batch_size = draw.choice([1, 2, 4])
        points = 4 // batch_size * (STEPS // 2 - 1)
        broken_off(shards, tmp_path, draw.randrange(points), batch_size=batch_size, save_every=draw.choice([1, 2, 3]))
    run(shards, tmp_path, max_steps=STEPS, batch_size=draw.choice([1, 2, 4]), data=OPTIONS)
    assert read_steps(tmp_path / "keys") == undisturbed


def test_with_another_number_of_workers(shards, undisturbed, tmp_path):
    broken_off(shards, tmp_path, 9, num_workers=3)
    broken_off(shards, tmp_path, 5, num_workers=0)
    run(shards, tmp_path, max_steps=STEPS, num_workers=2, data=OPTIONS)
    assert read_steps(tmp_path / "keys") == undisturbed


@pytest.mark.parametrize("save_every", [1, 3, 5])
@pytest.mark.parametrize("stop_at", [5, 6, 11, 12])
def test_at_the_end_of_an_epoch_of_the_trainer(shards, undisturbed, tmp_path, save_every, stop_at):
    epochs = {"limit_train_batches": 6, "max_epochs": -1, "save_every": save_every}
    broken_off(shards, tmp_path, stop_at, **epochs)
    run(shards, tmp_path, max_steps=STEPS, data=OPTIONS, **epochs)
    assert read_steps(tmp_path / "keys") == undisturbed


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 6}, {"num_workers": 2}])
def test_after_max_steps(shards, undisturbed, tmp_path, options):
    for steps in (3, 8, STEPS):
        trainer = run(shards, tmp_path, max_steps=steps, data=OPTIONS, save_every=100, **options)
        assert trainer.global_step == steps
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert read_steps(tmp_path / "keys") == undisturbed


class RestoresLate(SingleDeviceStrategy):
    """As FSDP2 does: the optimizer is made, and the loader started, before the checkpoint is read."""

    @property
    def restore_checkpoint_after_setup(self):
        return True


@pytest.mark.parametrize("strategy", ["auto", "late"])
def test_with_estimated_stepping_batches(shards, undisturbed, tmp_path, strategy):
    options = {"estimate": True, "limit_train_batches": 6, "max_epochs": 100}

    def chosen():
        return {"strategy": RestoresLate(torch.device("cpu")) if strategy == "late" else "auto"}

    broken_off(shards, tmp_path, 9, **options, **chosen())
    broken_off(shards, tmp_path, 4, **options, **chosen())
    run(shards, tmp_path, max_steps=STEPS, data=OPTIONS, **options, **chosen())
    assert read_steps(tmp_path / "keys") == undisturbed


def test_a_checkpoint_in_the_middle_of_an_accumulation_starts_it_again(shards, undisturbed, tmp_path):
    """`every_n_train_steps` never writes one; an exception or a signal may."""
    trainer = run(shards, tmp_path, max_steps=3, data=OPTIONS)
    datamodule = trainer.datamodule
    counter = trainer.callbacks[0]
    counter.on_train_batch_end(trainer, None, None, None, 0)
    assert datamodule.state_dict()["consumed"] == 12
    progress = trainer.fit_loop.epoch_loop.batch_progress
    for name in ("ready", "started", "processed"):
        setattr(progress.current, name, getattr(progress.current, name) + 1)
        setattr(progress.total, name, getattr(progress.total, name) + 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    run(shards, tmp_path, max_steps=STEPS, data=OPTIONS)
    assert read_steps(tmp_path / "keys") == undisturbed


def test_a_new_fit_starts_at_the_first_sample(shards, tmp_path):
    trainer = run(shards, tmp_path, max_steps=2, data=OPTIONS, save_every=100)
    datamodule = trainer.datamodule
    assert datamodule.state_dict()["consumed"] == 8
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.reset()
    datamodule.setup("fit")
    assert datamodule.state_dict()["consumed"] == 0
    assert len([c for c in trainer.callbacks if type(c).__name__ == "CountConsumed"]) == 1


def test_another_order_is_told(shards, caplog):
    first = ImageDataModule(shards, **SIZE, seed=1)
    second = ImageDataModule(shards, **SIZE, seed=2, shuffle_buffer=9)
    with pytest.warns(UserWarning, match=r"seed: 1 there, 2 here; shuffle_buffer: 256 there, 9 here"):
        second.load_state_dict(first.state_dict())
    buckets = {"buckets": [[8, 8], [8, 16]]}
    first = ImageDataModule(shards, **SIZE, **buckets, batch_size=2)
    second = ImageDataModule(shards, **SIZE, **buckets, batch_size=3)
    with pytest.raises(ValueError, match="buckets of 2 samples per step, this run has 3"):
        second.load_state_dict(first.state_dict())


def test_the_state_is_plain(shards):
    state = ImageDataModule(shards, **SIZE, weights=None).state_dict()
    assert json.loads(json.dumps(state)) == state


# Processes that are killed


def start(shards, folder, **options):
    arguments = json.dumps({"shards": str(shards), "folder": str(folder), "data": OPTIONS, **options})
    command = [sys.executable, "-m", "tests.datamodules.resume_run", arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **silent)


def lines_seen(folder):
    return sum(len(file.read_text().splitlines()) for file in folder.glob("keys.*"))


def kill_after(process, folder, num_lines):
    """kill -9 for it and its ranks, once so many batches were seen."""
    deadline = time.monotonic() + 120
    while lines_seen(folder) < num_lines:
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_killed_twenty_times(shards, tmp_path):
    """kill -9 at twenty random moments, each with its own number of workers and of batches per step."""
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "killed").mkdir()
    folder, options, draw = tmp_path / "killed", {"max_steps": 300, "data": OPTIONS}, random.Random(0)
    run(shards, tmp_path / "undisturbed", **options, save_every=1000)
    undisturbed = read_steps(tmp_path / "undisturbed" / "keys")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.datamodules.resume_run"])
    for attempt in range(20):
        chosen = {"batch_size": draw.choice([1, 2, 4]), "num_workers": draw.choice([0, 0, 1]), "attempt": attempt}
        process = server.Process(target=run_with_forked_workers, args=(shards, folder), kwargs=options | chosen)
        wanted = lines_seen(folder) + draw.randint(1, 16)
        process.start()
        while lines_seen(folder) < wanted:
            assert process.is_alive(), "ended before it could be killed"
            time.sleep(0.002)
        process.kill()
        process.join()
    run(shards, folder, **options, attempt=20)
    assert read_steps(folder / "keys") == undisturbed
    for line in (folder / "keys.0").read_text().splitlines():  # what was done again, was done alike
        step, _, keys = json.loads(line)
        assert set(keys) <= set(undisturbed[step])


def test_killed_and_resumed_on_one_two_and_one_rank(shards, tmp_path):
    steps = 400
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "killed").mkdir()
    run(shards, tmp_path / "undisturbed", max_steps=steps, data=OPTIONS, save_every=1000)
    folder, options = tmp_path / "killed", {"max_steps": steps, "num_workers": 2}
    kill_after(start(shards, folder, **options, attempt=0), folder, 31)
    kill_after(start(shards, folder, **options, attempt=1, devices=2), folder, 31 + 50)
    assert start(shards, folder, **options, attempt=2).wait(120) == 0
    assert read_steps(folder / "keys") == read_steps(tmp_path / "undisturbed" / "keys")
