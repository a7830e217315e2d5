"""What a user types, on the smallest model and real samples: composing `conf/`, overrides that make it small."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

from mm_lightning.config import flatten, register_resolvers
from tests.conftest import ROOT

CONF = ROOT / "conf"
COMMAND = "# python train.py "


def compose_train(*overrides: str, conf: Path = CONF) -> DictConfig:
    """What `python train.py OVERRIDES` composes, interpolations unresolved."""
    register_resolvers()
    HydraConfig.instance().cfg = None
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def small_overrides(tiny_folder: Path, sample_shards: Path) -> list[str]:
    """`debug=tiny` on the smallest base and 32x32 pixels, for instances of everything and steps in milliseconds."""
    return [
        "debug=tiny",
        f"model.base={tiny_folder}",
        f"model.vision={tiny_folder}/image_encoder",
        f"paths.shards_dir={sample_shards}",
        "data.height=32",
        "data.width=32",
        "data.num_workers=0",
        "model.preview_steps=1",
        "trainer.accelerator=cpu",
    ]


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.optimizer.lr": 1e-5, ...} of nested dicts or a config, interpolations as they are written."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=False)
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= leaves(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def header_commands(file: Path) -> list[list[str]]:
    """The overrides of each command in the comment at a file's head."""
    return [shlex.split(line[len(COMMAND) :]) for line in file.read_text().splitlines() if line.startswith(COMMAND)]


def settings_of(*overrides: str, run_dir: str | Path = "outputs/run") -> dict[str, Any]:
    """The hyper-parameters that a run with these overrides leaves."""
    return flatten(compose_train(*overrides, f"paths.run_dir='{run_dir}'"))


def write_run(folder: Path, settings: dict[str, Any], adapter: bool = True) -> Path:
    """A run's folder, as training leaves it."""
    logger = TensorBoardLogger(folder, name="tensorboard", version="")
    for step in (1, 2, 3):
        logger.log_metrics({"val/loss/velocity": 1 / step}, step)
    logger.log_hyperparams(settings)
    logger.save()
    logger.finalize("success")
    if adapter:
        (folder / "adapter").mkdir()
        for name in ("config.json", "adapter.safetensors"):
            (folder / "adapter" / name).touch()
    return folder
