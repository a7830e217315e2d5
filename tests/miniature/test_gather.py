"""Ablations gathered: rows are told by what was trained, figures are averaged over seeds, pictures show them."""

from __future__ import annotations

import json
import math
import os
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from mm_lightning.config import flatten
from mm_lightning.miniature import gather as command
from mm_lightning.miniature.gather import (
    FIGURES,
    PAPER_ROWS,
    PICTURES,
    Cell,
    Run,
    by_row,
    draw,
    find_runs,
    format_table,
    gather,
    is_current,
    row_name,
    summarize,
)
from tests.runs import CONF, compose_train, header_commands

PAPER = {name: name.split("_")[1].upper() for name in (file.stem for file in CONF.glob("experiment/row_*.yaml"))}


def settings_of(*overrides: str) -> dict:
    return flatten(compose_train(*overrides, "paths.run_dir=outputs/run"))


def figures(**values: float) -> dict[str, float]:
    return {**dict.fromkeys(FIGURES, 0.5), **values}


def write_run(folder: Path, settings: dict, adapter: bool = True, results: dict | None = None) -> Path:
    """A run's folder, as training and table leave it."""
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
    if results is not None:
        (folder / "table").mkdir()
        (folder / "table/results.json").write_text(json.dumps({"rows": {"full model": results}}))
    return folder


# Rows


@pytest.mark.parametrize("experiment", sorted(PAPER))
def test_rows_are_those_of_the_papers_table(experiment):
    """The experiments of the full size say which letter each composition has."""
    letter = "full" if PAPER[experiment] == "FULL" else PAPER[experiment]
    assert row_name(settings_of(f"experiment={experiment}")).split()[0] == letter


def test_the_commands_at_the_head_of_the_ablation_make_every_row():
    commands = header_commands(CONF / "experiment/miniature_ablation.yaml")
    found = []
    for arguments in commands:
        experiment = next(argument for argument in arguments if argument.startswith("experiment="))
        (lists,) = (shlex.split(a)[0].partition("=")[2] for a in arguments if a.startswith("ablation="))
        choices = lists[1:-1].split("],[")
        found += [row_name(settings_of(experiment, f"ablation=[{choice}]")) for choice in choices]
    losses = {"full, no identity loss", "full, no face-region loss"}
    assert {row for row in found if row} == {*PAPER_ROWS.values(), PICTURES, *losses}
    assert found.count(None) == 3  # stage 1 of F and of the two losses
    assert found.count(PICTURES) == 1


def test_an_ablation_starts_from_a_stage_1_of_its_own():
    ablation = compose_train("experiment=miniature_ablation", "ablation=[no_can]", "paths.run_dir=outputs/x")
    assert ablation.model.init_adapter == "outputs/x_stage1/adapter"
    first, second = (
        yaml.safe_load((CONF / f"experiment/{name}.yaml").read_text())["paths"]["run_dir"]
        for name in ("miniature_ablation_stage1", "miniature_ablation")
    )
    assert first == f"{second}_stage1"


def test_what_is_no_row_of_the_paper_has_a_name_too():
    assert row_name(settings_of("experiment=miniature_ablation", "ablation=[no_face_branch]")) == "another"


# Figures


def test_mean_and_spread_over_seeds():
    runs = [Run(Path(), "full", seed, figures(top1=value)) for seed, value in enumerate((0.5, 0.6, 0.7))]
    cell = summarize(runs, "top1")
    assert cell.mean == pytest.approx(0.6)
    assert cell.spread == pytest.approx(0.1)  # of a sample, not of a population
    assert str(cell) == "0.600 ± 0.100"
    assert str(summarize(runs[:1], "top1")) == "0.500"


def test_an_unknown_figure_does_not_count():
    runs = [Run(Path(), "full", seed, figures(text=value)) for seed, value in enumerate((0.2, math.nan))]
    assert summarize(runs, "text") == pytest.approx(Cell(0.2, math.nan, 1), nan_ok=True)
    assert str(summarize(runs[1:], "text")) == "-"


def test_rows_stand_in_the_papers_order():
    rows = by_row([Run(Path(), row, 0, figures()) for row in ("full", "another", "B structure branch", PICTURES)])
    assert list(rows) == ["B structure branch", "full", "another", PICTURES]


# The command


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two seeds of the full model, one without CAN, a stage 1 that is only a beginning, and a run that was cut."""
    root = tmp_path / "miniature_ablation"
    for seed, top1 in ((0, 0.4), (1, 0.6)):
        settings = settings_of("experiment=miniature_ablation", f"seed={seed}")
        write_run(root / f"full-{seed}/stage2", settings, results=figures(top1=top1, text=None))
    no_can = "ablation=[no_can,no_face_modulation]"
    write_run(root / "f/stage2", settings_of("experiment=miniature_ablation", no_can), results=figures(top1=0.3))
    write_run(root / "f/stage1", settings_of("experiment=miniature_ablation_stage1", no_can))
    write_run(root / "cut/stage2", settings_of("experiment=miniature_ablation"), adapter=False)
    return root


def test_the_command_writes_table_plot_and_figures(runs, tmp_path, capsys):
    command.main([str(runs), f"--out={tmp_path / 'out'}"])
    text = (tmp_path / "out/ablations.md").read_text()
    assert text in capsys.readouterr().out
    lines = text.splitlines()
    assert lines[2].startswith("| F without CAN | 0 | 0.300 | 0.500 |")
    assert lines[3].startswith("| full | 0, 1 | 0.500 ± 0.141 |")
    assert len(lines) == 4
    stored = json.loads((tmp_path / "out/ablations.json").read_text())
    assert stored["full"]["text"]["mean"] is None
    assert stored["full"]["top1"]["count"] == 2
    svg = (tmp_path / "out/ablations.svg").read_text()
    ElementTree.fromstring(svg)
    for words in ("FM_inter", "full", "F without CAN", "with CAN", "without CAN", "denoising loss"):
        assert words in svg


def test_a_run_is_judged_once_and_again_when_its_adapter_is_newer(runs, tmp_path):
    folder = runs / "f/stage2"
    results = folder / "table/results.json"
    judged = []

    def judge(run: Path) -> dict:
        judged.append(run)
        return {"rows": {"full model": figures(top1=0.9)}}

    assert is_current(folder, results)
    (run,) = gather([folder], judge)
    assert (run.figures["top1"], judged) == (0.3, [])
    os.utime(folder / "adapter/adapter.safetensors", (2e9, 2e9))
    (run,) = gather([folder], judge)
    assert (run.figures["top1"], judged) == (0.9, [folder])


def test_the_same_runs_give_the_same_picture(runs):
    rows = by_row(gather(find_runs([runs]), pytest.fail))
    assert draw(rows) == draw(rows)
    assert format_table(rows).count("\n") == 4


def test_no_run_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "nothing")])
    assert "No finished run below" in capsys.readouterr().err


def test_runs_are_found_once(runs):
    assert len(find_runs([runs, runs / "f"])) == 4
