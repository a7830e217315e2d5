"""Every file of conf/ composes, instantiates, and changes what it says and nothing else."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cache
from inspect import Signature, signature
from itertools import combinations
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf

from mm_lightning.adapters.transformer import AdapterConfig
from mm_lightning.adapters.weights import AdapterWeights
from mm_lightning.backbone import read_base_id
from mm_lightning.config import accumulation, check_config
from mm_lightning.encoders.identity import IdentityEncoder
from mm_lightning.losses.combined import CombinedLoss
from mm_lightning.module import MagicMirrorModule
from tests.runs import CONF, compose_train, header_commands, leaves, small_overrides

BASELINE = ("experiment=stage2_video",)
FRONT_END = ("id_perceiver", "face_perceiver", "fusion", "id_projection")


def names(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


EXPERIMENTS, ABLATIONS = names("experiment"), names("ablation")
OTHER_COMMANDS = ("prepare/", "evaluate/")  # composed by commands of their own, tested with those
ALL_FILES = sorted(file.relative_to(CONF).with_suffix("").as_posix() for file in CONF.glob("*/**/*.yaml"))
ALL_FILES = [name for name in ALL_FILES if not name.startswith(OTHER_COMMANDS)]
ALL_FILES = [file for file in ALL_FILES if not file.startswith("local/")]
# Files that fit one experiment and no other are composed with that one.
COMPOSED_WITH = {
    "callbacks/pretraining": "miniature_vae",
    "data/miniature": "miniature_vae",
    "data/miniature_latents": "miniature_backbone",
    "data/miniature_people": "miniature_clip",
    "model/miniature_backbone": "miniature_backbone",
    "model/miniature_clip": "miniature_clip",
    "model/miniature_vae": "miniature_vae",
}
# Their data and models are other ones than the samples and the tiny model: tests/miniature runs them.
ON_SAMPLES = [name for name in EXPERIMENTS if not name.startswith("miniature_")]


# What a file says


@dataclass(frozen=True)
class Said:
    """What a file and those that it is built on set."""

    own: dict[str, Any]  # leaves in the file itself
    all: dict[str, Any]  # with those of the files that it includes
    included: tuple[str, ...]  # overrides that compose what it is built on


def read_said(conf: Path, group: str, name: str) -> Said:
    content = yaml.safe_load((conf / group / f"{name}.yaml").read_text())
    below: dict[str, Any] = {}
    included: dict[str, list[str]] = {}
    for entry in content.pop("defaults", []):
        if isinstance(entry, dict):  # `override /data: image` chooses a file, it does not set a key
            ((key, option),) = entry.items()
            included[key.removeprefix("override /")] = [option]
        elif entry != "_self_":
            other, _, option = entry.removeprefix("/").rpartition("/")
            included.setdefault(other or group, []).append(option)
            below |= read_said(conf, other or group, option).all
    own = leaves(content, "model" if group == "model" else "") if content else {}
    return Said(own, below | own, tuple(f"{key}=[{','.join(options)}]" for key, options in included.items()))


@dataclass(frozen=True)
class Audit:
    """What is wrong with a file: empty sets where nothing is."""

    unknown: set[str]  # keys that nothing reads
    idle: set[str]  # keys that are set to what they are anyway
    lost: set[str]  # keys that have another value in the end
    unsaid: set[str]  # keys that change though the file does not name them


CLEAN = Audit(set(), set(), set(), set())


@cache
def composed_leaves(conf: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    return leaves(compose_train(*overrides, conf=conf))


def audit(conf: Path, group: str, name: str, before: tuple[str, ...], after: tuple[str, ...]) -> Audit:
    """Compare what `group/name` says with the compositions `before` and `after` it is added."""
    old, new = composed_leaves(conf, before), composed_leaves(conf, after)
    # A preset of the model is compared with the one that it is built on.
    said = read_said(conf, group, name).own if group == "model" else read_said(conf, group, name).all
    changed = {key for key in new if key not in old or new[key] != old[key]}
    return Audit(
        unknown=said.keys() - old.keys(),
        idle=said.keys() - changed,
        lost={key for key in said if new.get(key) != said[key]},
        unsaid=changed - said.keys(),
    )


def audit_ablation(conf: Path, name: str) -> Audit:
    return audit(conf, "ablation", name, BASELINE, (*BASELINE, f"ablation={name}"))


def audit_experiment(conf: Path, name: str) -> Audit:
    """Against the defaults with the same groups chosen, and where it is built on another one, against that one."""
    said = read_said(conf, "experiment", name)
    built_on_another = any(override.startswith("experiment=") for override in said.included)
    found = audit(conf, "experiment", name, tuple(root_groups(conf, name)), (f"experiment={name}",))
    if not built_on_another:  # the two stages say their whole recipe, also where it equals a default
        return Audit(found.unknown, set(), found.lost, found.unsaid)
    parent, child = (composed_leaves(conf, overrides) for overrides in (said.included, (f"experiment={name}",)))
    idle = {key for key in said.own if parent.get(key) == child[key]}
    return Audit(found.unknown, idle, found.lost, found.unsaid)


def root_groups(conf: Path, name: str) -> list[str]:
    """The choices of groups, such as data=video, that an experiment or what it is built on makes."""
    chosen = []
    for override in read_said(conf, "experiment", name).included:
        group, _, option = override.partition("=")
        if group == "experiment":
            chosen += root_groups(conf, option.strip("[]"))
        elif group != "ablation":
            chosen.append(override)
    return chosen


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_changes_what_it_says(name):
    assert audit_ablation(CONF, name) == CLEAN
    assert read_said(CONF, "ablation", name).all


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_changes_what_it_says(name):
    assert audit_experiment(CONF, name) == CLEAN


@pytest.mark.parametrize("preset", ["light", "paper"])
def test_preset_changes_what_it_says(preset):
    assert audit(CONF, "model", preset, ("model=base",), (f"model={preset}",)) == CLEAN


def test_tiny_model_changes_what_it_says():
    before = ("model=base", "model/id_perceiver=scratch")
    assert audit(CONF, "model", "tiny", before, ("model=tiny",)) == CLEAN


def test_tiny_run_changes_what_it_says():
    """Every key is known everywhere and changes something in one of the two stages at least."""
    stages = [f"experiment={name}" for name in ("stage1_image", "stage2_video")]
    audits = [audit(CONF, "debug", "tiny", (stage, "model=tiny"), (stage, "debug=tiny")) for stage in stages]
    assert set.intersection(*(found.idle for found in audits)) == set()
    assert [replace(found, idle=set()) for found in audits] == [CLEAN, CLEAN]


def test_default_debugging_changes_what_it_says():
    tiny, default = (composed_leaves(CONF, (*BASELINE, f"debug={name}")) for name in ("tiny", "default"))
    assert {key: default[key] for key in default if tiny[key] != default[key]} == {
        "task": "debug",
        "trainer.max_steps": 2,
    }


@pytest.fixture
def conf_copy(tmp_path):
    return Path(shutil.copytree(CONF, tmp_path / "conf"))


def rewrite(conf: Path, file: str, old: str, new: str) -> None:
    path = conf / file
    assert path.read_text().count(old) == 1, f"{old!r} is not in {file} once"
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "field", "keys"),
    [
        ("ablation/no_can", "conditioned_norm:", "condition_norm:", "unknown", {"model.adapter.condition_norm"}),
        ("ablation/no_can", "norm: none", "norm: can", "idle", {"model.adapter.conditioned_norm"}),
        ("ablation/no_drops", "model:", "models:", "unknown", {"models.text_drop_rate", "models.identity_drop_rate"}),
        ("ablation/id_branch_only", "defaults:", "seed: 0\ndefaults:", "idle", {"seed"}),
        ("experiment/row_full", "max_steps:", "max_step:", "unknown", {"trainer.max_step"}),
        ("experiment/row_full", "max_steps: 2500", "max_steps: 5000", "idle", {"trainer.max_steps"}),
        ("experiment/stage1_image", "global_batch_size:", "batch_size:", "unknown", {"batch_size"}),
        ("experiment/row_a_identity_branch", "trainer:", "train:", "unknown", {"train.max_steps"}),
        ("model/light", "face_kv_rank:", "kv_rank:", "unknown", {"model.adapter.kv_rank"}),
    ],
)
def test_a_mistyped_or_idle_key_is_found(conf_copy, file, old, new, field, keys):
    group, name = file.split("/")
    check = {
        "ablation": audit_ablation,
        "experiment": audit_experiment,
        "model": lambda conf, name: audit(conf, "model", name, ("model=base",), (f"model={name}",)),
    }[group]
    rewrite(conf_copy, f"{file}.yaml", old, new)
    assert getattr(check(conf_copy, name), field) == keys


def test_ablations_stack():
    baseline = composed_leaves(CONF, BASELINE)
    stacked = composed_leaves(CONF, (*BASELINE, "ablation=[no_can,no_identity_loss]"))
    said = read_said(CONF, "ablation", "no_can").all | read_said(CONF, "ablation", "no_identity_loss").all
    assert {key: stacked[key] for key in stacked if stacked[key] != baseline[key]} == said


def test_no_two_ablations_want_different_things():
    """So that the order in which they are stacked does not matter."""
    said = {name: read_said(CONF, "ablation", name).all for name in ABLATIONS}
    for one, other in combinations(ABLATIONS, 2):
        shared = said[one].keys() & said[other].keys()
        assert {key: said[one][key] for key in shared} == {key: said[other][key] for key in shared}, (one, other)


# Targets and arguments


@cache
def signature_of(target: str) -> Signature:
    return signature(get_object(target))


def nodes_with_targets(node: Any, path: str = "") -> list[tuple[str, dict[str, Any]]]:
    found = []
    if isinstance(node, dict):
        found += [(path, node)] if "_target_" in node else []
        for key, value in node.items():
            found += nodes_with_targets(value, f"{path}.{key}".lstrip("."))
    return found


def bad_arguments(cfg: Any) -> list[str]:
    """What `_target_`s would refuse; also of `_partial_` ones, which Hydra leaves unchecked until they are called."""
    complaints = []
    for path, node in nodes_with_targets(OmegaConf.to_container(cfg, resolve=False)):
        arguments = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
        try:
            signature_of(node["_target_"]).bind_partial(**arguments)
        except Exception as error:
            complaints.append(f"{path}: {node['_target_']}: {error}")
    return complaints


def choice(file: str) -> str:
    group, _, option = file.rpartition("/")
    return f"{group}={option}"


@pytest.mark.parametrize("file", ALL_FILES)
def test_file_composes_and_its_targets_take_its_arguments(file, tmp_path):
    chosen = [f"experiment={COMPOSED_WITH[file]}"] if file in COMPOSED_WITH else [choice(file), "global_batch_size=64"]
    cfg = compose_train(*chosen, f"paths.run_dir={tmp_path}")
    assert bad_arguments(cfg) == []
    OmegaConf.resolve(cfg)
    assert not OmegaConf.missing_keys(cfg)


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        ("model/base.yaml", "encoders.identity.FusionMLP", "encoders.identity.FusionMPL", "FusionMPL"),
        ("model/base.yaml", "num_warmup_steps:", "num_warm_up_steps:", "unexpected keyword argument 'num_warm_up"),
        ("callbacks/ema.yaml", "decay:", "dekay:", "unexpected keyword argument 'dekay'"),
    ],
)
def test_a_mistyped_target_or_argument_is_found(conf_copy, file, old, new, complaint):
    rewrite(conf_copy, file, old, new)
    (found,) = bad_arguments(compose_train(conf=conf_copy))
    assert complaint in found


def test_no_file_lies_unused():
    """Callbacks and loggers are all in what `python train.py` composes, as it is or for a part that is pre-trained."""
    composed = [compose_train(), compose_train("callbacks=pretraining")]
    for group in ("callbacks", "logger"):
        files = {name for name in names(group) if name not in ("default", "pretraining")}
        assert files == {name for cfg in composed for name in cfg[group]}, group


# Instances


def run_overrides(small: list[str], output_dir: Path, run: str = "run") -> list[str]:
    return [*small, f"paths.output_dir={output_dir}", f"paths.run_dir={output_dir / run}"]


def instantiate_all(cfg: Any) -> tuple[L.Trainer, MagicMirrorModule, L.LightningDataModule]:
    """As train.py does, up to `fit`."""
    check_config(cfg)
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    loggers = [instantiate(logger) for logger in cfg.logger.values()]
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    return trainer, instantiate(cfg.model), instantiate(cfg.data)


def leave_adapter(module: MagicMirrorModule, output_dir: Path, task: str) -> None:
    """The record of a finished run, where the next stage looks for it; no weights are compared before they load."""
    module.base_id = read_base_id(module.base)
    weights = AdapterWeights(module.record(), {"weight": torch.zeros(1)})
    weights.save_pretrained(output_dir / task / "latest" / "adapter")


@pytest.fixture(scope="module")
def small(tiny_folder, sample_shards):
    return small_overrides(tiny_folder, sample_shards)


@pytest.fixture(scope="module")
def output_dir(small, tmp_path_factory):
    """Where stage 1 has left its adapter."""
    folder = tmp_path_factory.mktemp("outputs")
    cfg = compose_train("experiment=stage1_image", *run_overrides(small, folder))
    leave_adapter(instantiate_all(cfg)[1], folder, cfg.task)
    return folder


@pytest.mark.parametrize("name", ON_SAMPLES)
def test_commands_at_the_head_of_an_experiment_instantiate_in_turn(name, small, output_dir):
    commands = header_commands(CONF / "experiment" / f"{name}.yaml")
    assert commands[-1][0] == f"experiment={name}"
    for overrides in commands:
        overrides = [override for override in overrides if not override.startswith(("strategy=", "trainer.devices="))]
        cfg = compose_train(*overrides, *run_overrides(small, output_dir))
        trainer, module, datamodule = instantiate_all(cfg)
        assert trainer.max_steps == cfg.trainer.max_steps
        assert datamodule.kind == ("image" if "image" in cfg.data._target_ else "video")
        assert isinstance(trainer.logger, TensorBoardLogger)
        leave_adapter(module, output_dir, cfg.task)


@pytest.mark.parametrize("ablations", [*ABLATIONS, ",".join(ABLATIONS)], ids=[*ABLATIONS, "all"])
def test_ablation_instantiates(ablations, small, output_dir, tmp_path):
    cfg = compose_train("experiment=stage1_image", f"ablation=[{ablations}]", *run_overrides(small, tmp_path))
    _, module, _ = instantiate_all(cfg)
    assert isinstance(module, MagicMirrorModule)


def test_stage_2_refuses_an_adapter_of_another_ablation(small, output_dir):
    cfg = compose_train(*BASELINE, "ablation=no_can", *run_overrides(small, output_dir))
    with pytest.raises(InstantiationException, match="conditioned_norm: 'can' there, 'none' here"):
        instantiate_all(cfg)


@pytest.mark.parametrize("preset", ["base", "light", "paper"])
def test_preset_builds_at_the_size_of_cogvideox_5b(preset):
    """On the meta device, with an untrained tau_id in place of the pre-trained one, whose file is not here."""
    cfg = compose_train(f"model={preset}", "model/id_perceiver=scratch", "paths.run_dir=run")
    OmegaConf.resolve(cfg)
    adapter = instantiate(cfg.model.adapter)
    assert isinstance(adapter, AdapterConfig)
    assert isinstance(instantiate(cfg.model.loss), CombinedLoss)
    parts = {
        part: instantiate(cfg.model[part]) for part in ("id_perceiver", "face_perceiver", "fusion", "id_projection")
    }
    widths = {"id_query_dim": 512, "vision_dim": 1024, "text_dim": 4096, "dim": 3072}
    with torch.device("meta"):
        front_end = IdentityEncoder.build(**parts, **widths, id_embed_dim=adapter.id_embed_dim)
    optimizer = instantiate(cfg.model.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    schedule = instantiate(cfg.model.lr_schedule)(optimizer)
    assert schedule.get_last_lr() == [0.0]
    assert tuple(optimizer.defaults["betas"]) == (0.9, 0.95)
    assert set(cfg.model.frozen) <= {name for name, _ in front_end.named_children()}


@pytest.mark.parametrize("strategy", names("strategy"))
def test_strategy_makes_a_trainer(strategy, small, tmp_path):
    cfg = compose_train(f"strategy={strategy}", *run_overrides(small, tmp_path))
    trainer, _, _ = instantiate_all(cfg)
    wanted = {
        "single": "SingleDeviceStrategy",
        "ddp": "DDPStrategy",
        "fsdp": "TrainableModelParallelStrategy",
        "fsdp_hybrid": "TrainableModelParallelStrategy",
    }
    assert type(trainer.strategy).__name__ == wanted[strategy]
    assert trainer.num_nodes == (2 if strategy == "fsdp_hybrid" else 1)


@pytest.mark.parametrize(("name", "num_frames", "num_references"), [("image", 1, 1), ("video", 9, 4)])
def test_data_module_delivers_the_sizes_that_are_asked_for(name, num_frames, num_references, small, tmp_path):
    cfg = compose_train(f"data={name}", *run_overrides(small, tmp_path))
    batch = next(iter(instantiate(cfg.data).train_dataloader()))
    assert batch.pixels.shape == (4, num_frames, 3, 32, 32)
    assert batch.references.shape == (4, num_references, 3, 192, 192)


@pytest.mark.parametrize("debug", ["", "debug=tiny"])
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize(("experiment", "batch"), [("stage1_image", 64), ("stage2_video", 8)])
def test_global_batch_is_the_same_on_any_number_of_devices(experiment, batch, devices, debug):
    overrides = [f"experiment={experiment}", f"trainer.devices={devices}", "paths.run_dir=run", *filter(None, [debug])]
    cfg = compose_train(*overrides)
    per_device = cfg.data.batch_size * cfg.trainer.accumulate_grad_batches
    assert per_device * devices == (8 if debug else batch)
    assert cfg.trainer.accumulate_grad_batches == accumulation(cfg.global_batch_size, cfg.data.batch_size, devices)
    # Lightning counts micro-batches between validations, and steps everywhere else.
    assert cfg.trainer.val_check_interval == (25 if debug else 500) * cfg.trainer.accumulate_grad_batches
