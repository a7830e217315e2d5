"""The miniature's ablations gathered: judged once, averaged over seeds, drawn."""

from __future__ import annotations

import json
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mm_lightning.evaluation.ablation import by_row, find_runs, is_current
from mm_lightning.files import write_json
from mm_lightning.miniature import gather as command
from mm_lightning.miniature.gather import FIGURES, draw, format_table, gather
from tests.runs import settings_of, write_run


def figures(**values: float) -> dict[str, float]:
    return {**dict.fromkeys(FIGURES, 0.5), **values}


def write_table(run: Path, **values: float) -> None:
    """What `mm_lightning.miniature.table` leaves in a run's folder."""
    write_json(run / "table/results.json", {"rows": {"full model": figures(**values)}})


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two seeds of the full model, one without CAN, a stage 1 that is only a beginning, and a run that was cut."""
    root = tmp_path / "miniature_ablation"
    for seed, top1 in ((0, 0.4), (1, 0.6)):
        settings = settings_of("experiment=miniature_ablation", f"seed={seed}")
        write_table(write_run(root / f"full-{seed}/stage2", settings), top1=top1, text=None)
    no_can = "ablation=[no_can,no_face_modulation]"
    write_table(write_run(root / "f/stage2", settings_of("experiment=miniature_ablation", no_can)), top1=0.3)
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
    assert stored["table"]["full"]["text"]["mean"] is None
    assert stored["table"]["full"]["top1"]["count"] == 2
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


def test_an_earlier_table_counts_in(runs, tmp_path):
    """The table of some seeds and the runs of others give what all runs together would."""
    command.main([str(runs), f"--out={tmp_path / 'together'}"])
    command.main([str(runs / "full-0"), str(runs / "f"), f"--out={tmp_path / 'some'}"])
    earlier = tmp_path / "some/ablations.json"
    command.main([str(earlier), str(runs / "full-1"), f"--out={tmp_path / 'added'}"])
    command.main([str(earlier), f"--out={tmp_path / 'again'}"])
    for name in ("ablations.md", "ablations.svg"):
        assert (tmp_path / "added" / name).read_bytes() == (tmp_path / "together" / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "some" / name).read_bytes()


def test_a_run_counts_once_and_instead_of_the_earlier_table(runs, tmp_path, capsys):
    command.main([str(runs / "f"), f"--out={tmp_path / 'out'}"])
    write_table(runs / "f/stage2", top1=0.9)
    command.main([str(runs / "f"), str(tmp_path / "out/ablations.json"), f"--out={tmp_path / 'out'}"])
    assert capsys.readouterr().out.count("| F without CAN | 0 | 0.900 |") == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"runs": [{"row": "full"}]}'])
def test_another_file_is_told(text, tmp_path, capsys):
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(SystemExit):
        command.main([str(file)])
    assert f"{file} is no ablations.json" in capsys.readouterr().err


def test_no_run_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "nothing")])
    assert "No finished run below" in capsys.readouterr().err
