"""The README says what is there: its symbols import, its tests, paths and commands exist, its figures are counted."""

import ast
import importlib
import importlib.util
import inspect
import itertools
import json
import re
import runpy
import shlex
import xml.etree.ElementTree as ElementTree
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from datamodules.transforms import read_meta
from mm_lightning.adapters.size import Size, measure_size
from mm_lightning.config import register_resolvers

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
FIRST_SCREEN = 40

BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL))
LINES = [line for language, block in BLOCKS if language == "bash" for line in block.replace("\\\n", " ").splitlines()]
SHELL = [line.partition("  #")[0].strip() for line in LINES]
COMMANDS = list(dict.fromkeys([*SHELL, *(span for span in SPANS if span.startswith(("python ", "make ")))]))
TRAININGS = [command for command in COMMANDS if command.startswith("python train.py")]
# `strategy=fsdp_hybrid trainer.num_nodes=2`; names with nothing after the `=` are told apart below
OVERRIDES = [span for span in SPANS if re.fullmatch(r"[\w./]+=\S+( [\w./]+=\S+)*", span)]
TABLE = re.findall(r"^\| ([^|]+) \| \[`(\w+)`\]\(([\w/.]+)\)<br>\[`(\w+)`\]\(([\w/.]+)\) \|$", README, re.MULTILINE)
# Made by commands, or brought by the user: not in a checkout.
MADE = ("outputs/", "data/", "weights/", "tensorboard/", "adapter/", "checkpoints/", ".hydra/")


def compose_config(overrides: list[str]) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [*overrides, "paths.run_dir=run"])
    OmegaConf.resolve(cfg)
    return cfg


def expand_sweep(arguments: list[str]) -> list[list[str]]:
    """`--multirun a=1,2 b=3` -> [[a=1, b=3], [a=2, b=3]]."""
    if "--multirun" not in arguments:
        return [arguments]
    choices = []
    for name, _, values in (argument.partition("=") for argument in arguments if argument != "--multirun"):
        choices.append([f"{name}={value}" for value in values.split(",")])
    return [list(choice) for choice in itertools.product(*choices)]


@cache
def size_of(preset: str) -> Size:
    return measure_size(preset)


# Paper -> code -> test


def test_table_stands_on_the_first_screen_and_covers_the_equations():
    assert len(TABLE) >= 12
    rows = [i for i, line in enumerate(README.splitlines()) if re.match(r"\| .*\]\(tests/", line)]
    assert len(rows) == len(TABLE)
    assert rows[-1] < FIRST_SCREEN + 2
    papers = " ".join(row[0] for row in TABLE)
    assert all(f"equation {number}" in papers for number in (5, 6, 7, 8))


@pytest.mark.parametrize(("symbol", "file"), [row[1:3] for row in TABLE])
def test_symbol_is_where_the_table_says(symbol, file):
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    found = getattr(module, symbol)
    assert Path(inspect.getsourcefile(found)) == ROOT / file


@pytest.mark.parametrize(("name", "file"), [row[3:5] for row in TABLE])
def test_test_is_where_the_table_says(name, file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


# Paths, commands, names


def test_links_and_pictures_exist():
    targets = [*re.findall(r"\]\(([^)]+)\)", README), *re.findall(r'(?:src|srcset)="([^"]+)"', README)]
    local = [target for target in targets if not target.startswith("https://")]
    assert len(local) > 2 * len(TABLE)
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_paths_in_the_text_exist():
    paths = [span for span in SPANS if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?|[\w-]+\.(py|txt|toml|md)", span)]
    assert "constraints.txt" in paths
    assert [path for path in paths if not path.startswith(MADE) and not (ROOT / path).exists()] == []


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", MAKEFILE, re.MULTILINE))
    used = {command.split()[1] for command in COMMANDS if command.startswith("make ")}
    assert {"train", "test"} <= used <= targets


def test_modules_that_are_run_exist():
    modules = re.findall(r"python -m ([\w.]+)", README)
    assert "mm_lightning.adapters.size" in modules
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def test_what_make_train_runs_is_what_the_readme_shows():
    recipes = re.findall(r"^\t@?\$\(RUN\) (.*?)(?: \$\(ARGS\))?$", MAKEFILE, re.MULTILINE)
    shown = {command.removeprefix("python ") for command in COMMANDS}
    assert len(recipes) >= 5
    assert set(recipes) <= shown


@pytest.mark.parametrize("command", TRAININGS)
def test_training_command_composes(command):
    for overrides in expand_sweep(shlex.split(command)[2:]):
        compose_config(overrides)


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_override_composes(overrides):
    fits_any_machine = ["experiment=stage1_image", "trainer.devices=1", "data.batch_size=1"]
    compose_config([*fits_any_machine, *shlex.split(overrides)])


def test_settings_named_without_a_value_exist():
    cfg = compose_config([])
    names = [match[1] for match in (re.fullmatch(r"([\w.]+\.\w+)=", span) for span in SPANS) if match]
    assert len(names) >= 4
    parents = {name: OmegaConf.select(cfg, name.rpartition(".")[0]) for name in names}
    assert [name for name, parent in parents.items() if name.rpartition(".")[2] not in parent] == []


@pytest.mark.parametrize("group", ["experiment", "ablation"])
def test_every_experiment_and_ablation_is_shown(group):
    known = {file.stem for file in (ROOT / "conf" / group).glob("*.yaml")}
    shown = {
        name for names in re.findall(rf"\b{group}=\[?([\w,]+)", README) for name in names.split(",") if name != "null"
    }
    assert shown == known


# Figures


@pytest.mark.parametrize("preset", ["paper", "base", "light"])
def test_costs_of_the_presets_are_what_is_counted(preset):
    size = size_of(preset)
    more = [f"+{step.adapted / step.base - 1:.2%}" for step in (size.video, size.image)]
    cells = [
        f"`model={preset}`",
        f"{size.num_added / 1e9:.3f}B",
        f"{size.num_trained / 1e9:.3f}B",
        f"{2 * size.num_added / 1e9:.2f} GB",
        f"{16 * size.num_trained / 1e9:.1f} GB",
        *more,
    ]
    assert f"| {' | '.join(cells)} |" in README


def test_costs_of_the_pipeline_are_what_is_counted():
    size = size_of("base")
    whole = sum(part.num_parameters for part in size.pipeline)
    for text in (
        f"{whole / 1e9:.3f}B parameters",
        f"{2 * whole / 1e9:.1f} GB in bf16",
        f"{size.video.base / 1e12:.1f} TFLOPs",
        f"{size.image.base / 1e12:.2f} TFLOPs",
    ):
        assert text in README


def test_lengths_of_the_stages_are_those_of_the_experiments():
    for name, unit in (("stage1_image", "pictures"), ("stage2_video", "clips")):
        cfg = compose_config([f"experiment={name}"])
        assert f"{cfg.trainer.max_steps:,} steps of {cfg.global_batch_size} {unit}" in README


def test_settings_quoted_are_the_defaults():
    cfg = compose_config([])
    loss = cfg.model.loss
    assert f"weight ({loss.identity_weight})" in README
    assert f"timesteps (below {loss.identity.max_timestep})" in README
    assert loss.diffusion.region.prob == 0.5  # "half of the samples"
    assert cfg.model.text_drop_rate == cfg.model.identity_drop_rate == 0.1  # "a tenth"
    assert cfg.callbacks.nonfinite.max_consecutive == 10  # "ten in a row"


def test_example_json_is_read_by_the_data_modules():
    (example,) = [block for language, block in BLOCKS if language == "json"]
    meta = read_meta({"json": example.encode()})
    assert len(meta["references"]) == 1
    assert json.loads(example)["identity"]


# Picture


def test_pictures_are_what_the_script_draws():
    drawn = runpy.run_path(str(ROOT / "docs/figure.py"))["draw_all"]()
    assert {f"docs/{name}" for name in drawn} == set(re.findall(r'(?:src|srcset)="([^"]+\.svg)"', README))
    for name, drawing in drawn.items():
        found = (ROOT / "docs" / name).read_bytes()
        assert drawing.encode() == found, f"docs/{name} is not what docs/figure.py draws: run it"
        assert ElementTree.fromstring(found).tag.endswith("svg")
        assert len(found) < 100_000
