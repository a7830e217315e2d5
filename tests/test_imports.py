"""Imports run one way; this walks every import statement of the tree, those inside functions included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("mm_lightning", "callbacks", "datamodules")
FRAMEWORKS = {"lightning", "lightning_fabric", "pytorch_lightning", "hydra", "omegaconf", "webdataset"}

# What each part may import of the project. A part is a module or package right below mm_lightning;
# those not listed (module, prepare, the commands) may import all of mm_lightning.
MAY_IMPORT = {
    "types": set(),
    "checkpoint": set(),
    "files": set(),
    "pictures": set(),
    "media": {"files"},
    "adapters": {"types"},
    "encoders": {"types", "pictures"},
    "losses": {"types"},
    "diffusion": {"types"},
    "metrics": {"types"},
    "backbone": {"types"},
    "tiny": set(),
    "pipeline": {"types", "adapters", "encoders", "backbone"},
}
CALLBACKS_MAY_IMPORT = {"types", "metrics", "pipeline", "checkpoint", "media"}
DATAMODULES_MAY_IMPORT = {"types", "pictures"}
# Commands that live in a part but look at all of them; in return nothing may import them but another command.
COMMANDS = {"mm_lightning.adapters.size"}
OTHER_COMMANDS = {"mm_lightning.benchmark_step"}
# A world to try the method in: it stands on everything, and nothing stands on it.
MINIATURE = "mm_lightning.miniature"


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(source: str, package: str) -> set[str]:
    """Every dotted name that `source`, a module of `package`, imports: `from a.b import c` gives `a.b.c`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{stem}.{alias.name}" for alias in node.names}
    return names


def imports_of(file: Path) -> set[str]:
    name = module_name(file)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    return imported_names(file.read_text(), package)


def tops(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def parts_of_mm_lightning(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("mm_lightning.")}


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def files_of_part(part: str) -> list[Path]:
    return [file for file in files_of("mm_lightning") if module_name(file).split(".")[1:2] == [part]]


ALL_FILES = [file for package in PACKAGES for file in files_of(package)]


def test_walker_sees_every_kind_of_import():
    source = (
        "import torch.nn as nn\n"
        "from mm_lightning.types import Batch\n"
        "def late():\n    from lightning import Trainer\n"
        "if True:\n    from . import can\n    from ..losses.identity import IdentityLoss\n"
    )
    assert imported_names(source, "mm_lightning.adapters") == {
        "torch.nn",
        "mm_lightning.types.Batch",
        "lightning.Trainer",
        "mm_lightning.adapters.can",
        "mm_lightning.losses.identity.IdentityLoss",
    }


def test_tree_is_found():
    assert {"mm_lightning.types", "mm_lightning.backbone", "mm_lightning.adapters.can"} <= set(
        map(module_name, ALL_FILES)
    )


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_parts_import_only_what_stands_below_them(part):
    for file in files_of_part(part):
        if module_name(file) in COMMANDS:
            continue
        names = imports_of(file)
        assert parts_of_mm_lightning(names) <= MAY_IMPORT[part] | {part}, module_name(file)
        assert tops(names).isdisjoint(FRAMEWORKS), module_name(file)


@pytest.mark.parametrize("file", files_of("mm_lightning"), ids=module_name)
def test_mm_lightning_knows_neither_callbacks_nor_datamodules(file):
    assert tops(imports_of(file)).isdisjoint({"callbacks", "datamodules", "train", "tests"})


@pytest.mark.parametrize("file", files_of("datamodules"), ids=module_name)
def test_datamodules_know_only_types_and_pictures(file):
    names = imports_of(file)
    assert parts_of_mm_lightning(names) <= DATAMODULES_MAY_IMPORT
    assert tops(names).isdisjoint({"callbacks", "train", "tests", "hydra", "omegaconf"})


@pytest.mark.parametrize("file", files_of("callbacks"), ids=module_name)
def test_callbacks_know_pipeline_metrics_and_types(file):
    names = imports_of(file)
    assert parts_of_mm_lightning(names) <= CALLBACKS_MAY_IMPORT
    assert tops(names).isdisjoint({"datamodules", "train", "tests", "hydra", "omegaconf"})


def test_train_imports_no_class_of_the_project():
    """Models, data and callbacks reach it through conf's `_target_` strings only."""
    names = {name for name in imports_of(ROOT / "train.py") if name.split(".")[0] in PACKAGES}
    assert {name for name in names if name.rpartition(".")[2][:1].isupper()} == set()
    assert tops(names) <= {"mm_lightning"}
    assert not {name for name in names if name.endswith(".*")}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_nothing_imports_a_command(command):
    guilty = {
        module_name(file) for file in ALL_FILES for name in imports_of(file) if f"{name}.".startswith(f"{command}.")
    }
    assert guilty <= OTHER_COMMANDS


def test_nothing_outside_imports_the_miniature():
    outside = [file for file in ALL_FILES if not f"{module_name(file)}.".startswith(f"{MINIATURE}.")]
    guilty = {
        module_name(file) for file in outside for name in imports_of(file) if f"{name}.".startswith(f"{MINIATURE}.")
    }
    assert guilty == set()
