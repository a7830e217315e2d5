"""mm_lightning/config.py: batches over devices, checks across values, short errors, records of a run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from mm_lightning.config import (
    UserError,
    accumulation,
    check_config,
    check_devices,
    chosen,
    count_devices,
    device_batch,
    flatten,
    folder_name,
    list_results,
    log_hyperparameters,
    mark_latest,
    native_precision,
    register_resolvers,
    short_errors,
)
from tests.conftest import ROOT

# Devices and batches


@pytest.mark.parametrize(
    ("devices", "expected"),
    [(1, 1), (8, 8), ("4", 4), ([0], 1), ([1, 3, 5], 3), ("0,", 1), ("0,1", 2), ("0, 1, 2", 3)],
)
def test_devices_are_counted_as_lightning_counts_them(devices, expected):
    assert count_devices(devices) == expected
    assert count_devices(devices, num_nodes=3) == 3 * expected


@pytest.mark.parametrize("devices", [1, 3, "2", "auto"])
def test_lightning_counts_the_same_on_the_cpu(devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert Trainer(accelerator="cpu", devices=devices, logger=False).num_devices == count_devices(devices)


@pytest.mark.parametrize("devices", ["auto", -1, "-1"])
@pytest.mark.parametrize(("num_gpus", "expected"), [(0, 1), (1, 1), (8, 8)])
def test_auto_is_every_gpu_or_one_cpu(devices, num_gpus, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    assert count_devices(devices) == expected


@pytest.mark.parametrize("devices", [0, -2, [], "", "many", ","])
def test_no_device_is_named(devices):
    with pytest.raises(ValueError, match=r"trainer\.devices=.*is no device: give a number"):
        count_devices(devices)
    with pytest.raises(ValueError, match=r"trainer\.num_nodes=0 is no device"):
        count_devices(1, num_nodes=0)


@pytest.mark.parametrize(
    ("global_batch_size", "batch_size", "devices", "num_nodes", "expected"),
    [
        (64, 8, 1, 1, 8),
        (64, 8, 8, 1, 1),
        (64, 8, 4, 2, 1),
        (8, 1, [0, 1], 1, 4),
        (8, 1, "0,1,2,3", 2, 1),
        (12, 4, 3, 1, 1),
    ],
)
def test_accumulation_makes_the_global_batch(global_batch_size, batch_size, devices, num_nodes, expected):
    assert accumulation(global_batch_size, batch_size, devices, num_nodes) == expected
    assert expected * batch_size * count_devices(devices, num_nodes) == global_batch_size


@pytest.mark.parametrize(("global_batch_size", "batch_size", "devices"), [(8, 3, 1), (8, 1, 3), (4, 8, 1), (8, 8, 2)])
def test_a_batch_that_cannot_be_made_is_told(global_batch_size, batch_size, devices):
    with pytest.raises(ValueError, match="is no multiple of") as caught:
        accumulation(global_batch_size, batch_size, devices)
    assert str(caught.value) == (
        f"global_batch_size={global_batch_size} is no multiple of data.batch_size={batch_size} x {devices} devices = "
        f"{batch_size * devices}; change data.batch_size, trainer.devices or global_batch_size."
    )


@pytest.mark.parametrize("devices", range(1, 13))
@pytest.mark.parametrize("global_batch_size", [1, 2, 6, 8, 12])
def test_micro_batch_is_the_largest_that_fits(global_batch_size, devices):
    size = device_batch(global_batch_size, devices, 1, at_most=4)
    fitting = [s for s in range(1, 5) if global_batch_size % (s * devices) == 0]
    if fitting:
        assert size == max(fitting)
    else:  # accumulation says what is wrong
        with pytest.raises(ValueError, match="is no multiple of"):
            accumulation(global_batch_size, size, devices)


def test_resolvers_stand_for_the_functions():
    register_resolvers()
    cfg = OmegaConf.create(
        {
            "steps": "${accumulation:64,4,[0,1],2}",
            "size": "${device_batch:8,2,1,4}",
            "validation": "${micro_batches:25,${steps}}",
            "folder": "${folder_name:${text}}",
            "text": "ablation=[no_can,no_drops],paths.output_dir=/some/where",
        }
    )
    assert cfg.steps == accumulation(64, 4, [0, 1], 2) == 4
    assert cfg.size == device_batch(8, 2, 1, 4) == 4
    assert cfg.validation == 100
    assert cfg.folder == "ablation=-no_can,no_drops-,paths.output_dir=-some-where"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["seed=1", "ablation=[no_can,no_drops]"], "no_can,no_drops"),
        (["ablation=no_can", "model.init_adapter=x"], "no_can"),
        (["ablation=['no_can', no_drops]"], "no_can,no_drops"),
        (["ablation=[]"], "full"),
        (["ablation=null"], "full"),
        (["seed=1", "model.ablation=x"], "full"),
    ],
)
def test_what_was_chosen_names_a_folder(overrides, name):
    assert chosen("ablation", overrides) == name
    cfg = OmegaConf.create({"given": overrides, "folder": "${chosen:ablation,${given}}-seed0"})
    assert cfg.folder == f"{name}-seed0"


def test_folder_names_are_one_folder():
    assert folder_name("model.optimizer.lr=1e-4,seed=3") == "model.optimizer.lr=1e-4,seed=3"
    assert folder_name("") == ""
    name = folder_name("a/b\\c d:" * 100)
    assert len(name) <= 100
    assert not set(name) & set("/\\: ")


# Precision


@pytest.mark.parametrize(
    ("accelerator", "cuda", "native", "expected"),
    [
        ("cpu", False, True, "bf16-mixed"),
        ("cpu", False, False, "32-true"),
        ("cpu", True, False, "32-true"),
        ("auto", False, False, "32-true"),
        ("auto", True, False, "bf16-mixed"),
        ("gpu", True, False, "bf16-mixed"),
    ],
)
def test_bfloat16_is_taken_where_it_is_not_emulated(accelerator, cuda, native, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert native_precision(accelerator) == expected


def test_the_processor_says_whether_it_knows_bfloat16():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    assert (native_precision("cpu") == "bf16-mixed") == ("avx512_bf16" in flags)


# Checks


def run_config(**changes):
    cfg = OmegaConf.create(
        {
            "global_batch_size": 8,
            "model": {"base_dtype": "bfloat16"},
            "trainer": {"precision": "bf16-mixed", "accelerator": "cpu", "devices": 1, "num_nodes": 1},
            "ckpt_path": None,
        }
    )
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


@pytest.mark.parametrize(
    ("base_dtype", "precision"),
    [
        ("bfloat16", "bf16-mixed"),
        ("float16", "16-mixed"),
        ("float32", "32-true"),
        ("float32", "bf16-mixed"),
        ("float32", 32),
    ],
)
def test_precisions_that_fit_the_base(base_dtype, precision):
    check_config(run_config(model__base_dtype=base_dtype, trainer__precision=precision))


@pytest.mark.parametrize(
    ("base_dtype", "precision", "expected"),
    [
        ("bfloat16", "32-true", "bf16-mixed"),
        ("bfloat16", "bf16-true", "bf16-mixed"),
        ("bfloat16", 16, "bf16-mixed"),
        ("float16", "bf16-mixed", "16-mixed"),
    ],
)
def test_precisions_that_do_not(base_dtype, precision, expected):
    with pytest.raises(
        ValueError, match=f"base_dtype={base_dtype} needs trainer.precision={expected} .* not {precision};"
    ):
        check_config(run_config(model__base_dtype=base_dtype, trainer__precision=precision))


def test_unknown_type_of_the_base():
    with pytest.raises(ValueError, match=r"model\.base_dtype=bf16: give one of float32, bfloat16, float16\."):
        check_config(run_config(model__base_dtype="bf16"))


def test_checkpoint_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ckpt_path=.*nothing\.ckpt is not there; .*last\.ckpt"):
        check_config(run_config(ckpt_path=str(tmp_path / "nothing.ckpt")))
    check_config(run_config(ckpt_path=str(tmp_path)))  # a sharded one is a folder


def test_check_resolves_everything():
    cfg = run_config(ckpt_path="${nowhere}")
    with pytest.raises(InterpolationResolutionError, match="nowhere"):
        check_config(cfg)


def test_devices_that_the_trainer_does_not_have(monkeypatch):
    cfg = run_config(trainer__devices="auto")
    trainer = Trainer(accelerator="cpu", devices="auto", logger=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check_devices(trainer, cfg)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(
        ValueError, match=r"devices=auto was taken for 8, but with trainer\.accelerator=cpu .* has 1: .* not 8"
    ):
        check_devices(trainer, cfg)


# Short errors


class Picky:
    def __init__(self, size, error=ValueError):
        raise error(f"size={size}: too large.")


def build(**arguments):
    return instantiate({"part": {"_target_": f"{__name__}.Picky", **arguments}})


@pytest.mark.parametrize("error", ["ValueError", "FileNotFoundError"])
def test_a_check_s_message_comes_through_alone(error):
    with pytest.raises(UserError) as caught, short_errors():
        build(size=3, error={"_target_": "hydra.utils.get_class", "path": f"builtins.{error}"})
    assert str(caught.value) == "size=3: too large."
    assert type(caught.value.__cause__).__name__ == error


def test_a_resolver_s_message_comes_through_alone():
    register_resolvers()
    with pytest.raises(UserError, match=r"^global_batch_size=8 is no multiple of") as caught, short_errors():
        OmegaConf.resolve(OmegaConf.create({"steps": "${accumulation:8,3,1,1}"}))
    assert type(caught.value.__cause__) is ValueError


def test_other_mistakes_keep_their_traceback():
    with pytest.raises(InstantiationException, match="unexpected keyword argument 'sise'"), short_errors():
        build(sise=3)
    with pytest.raises(ZeroDivisionError), short_errors():
        _ = 1 / 0


# Records


def test_flatten_gives_leaves_that_a_log_takes():
    cfg = OmegaConf.create(
        {"a": {"b": {"c": 1, "d": None}, "e": [1, 2]}, "f": "${a.b.c}", "g": True, "h": 0.5, "i": {}, "j": "text"}
    )
    assert flatten(cfg) == {
        "a.b.c": 1,
        "a.b.d": "None",
        "a.e": "[1, 2]",
        "f": 1,
        "g": True,
        "h": 0.5,
        "j": "text",
    }


def test_hyperparameters_reach_every_logger(tmp_path):
    loggers = [CSVLogger(tmp_path, name=name, version="") for name in ("one", "two")]
    log_hyperparameters(Trainer(accelerator="cpu", logger=loggers), OmegaConf.create({"optimizer": {"lr": 0.25}}))
    assert [logger.experiment.hparams for logger in loggers] == [{"optimizer.lr": 0.25}] * 2


def test_latest_points_to_the_run_that_finished_last(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        mark_latest(tmp_path / name)
        assert (tmp_path / "latest").resolve() == (tmp_path / name).resolve()
    assert (tmp_path / "latest").readlink().parts == ("second",)  # the tree can be moved
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "latest"}


def test_latest_replaces_a_dangling_link_and_spares_a_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "latest").symlink_to("removed")
    mark_latest(tmp_path / "run")
    assert (tmp_path / "latest").resolve() == (tmp_path / "run").resolve()
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").mkdir()
    mark_latest(tmp_path / "run")
    assert not (tmp_path / "latest").is_symlink()


def test_results_are_listed_for_every_task(tmp_path):
    run = tmp_path / "stage1_image" / "2030-01-01_00-00-00"
    for name in ("step-0000002.mp4", "step-0000010.mp4"):
        path = run / "tensorboard" / "previews" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (run / "adapter").mkdir()
    (tmp_path / "unfinished" / "run").mkdir(parents=True)
    mark_latest(run)
    latest = tmp_path / "stage1_image" / "latest"
    adapter, clip, board = list_results(tmp_path)
    assert adapter.split() == ["stage1_image", "adapter", str(latest / "adapter")]
    assert clip.split() == ["stage1_image", "clip", str(latest / "tensorboard" / "previews" / "step-0000010.mp4")]
    assert board.endswith(f"tensorboard --logdir {tmp_path}")
    command = [sys.executable, "-m", "mm_lightning.config", str(tmp_path)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [adapter, clip, board]
