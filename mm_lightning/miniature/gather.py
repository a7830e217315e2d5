"""The ablations of the miniature, gathered: a table with mean and spread over seeds, and a plot.

    python -m mm_lightning.miniature.gather outputs/miniature_ablation

looks for finished runs below the folders given, computes for each what `mm_lightning.miniature.table` prints (once; it
is kept beside the run), and names the rows as the paper's Table 3 does, by what each run trained.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mm_lightning.files import write_bytes, write_json
from mm_lightning.miniature import table as one_table

logger = logging.getLogger(__name__)

# (text branch, face tokens, equation 6, equation 7, pre-trained) -> row of the paper's Table 3
PAPER_ROWS = {
    (True, False, False, False, False): "A identity branch",
    (False, True, False, False, False): "B structure branch",
    (True, True, False, False, False): "C both branches",
    (False, True, True, False, False): "D face modulation",
    (True, False, False, True, False): "E CAN",
    (True, True, False, False, True): "F without CAN",
    (True, True, True, True, False): "G without pre-training, videos alone",
    (True, True, True, True, True): "full",
}
PICTURES = "pictures alone"  # stage 1 by itself
FIGURES = {
    "top1": "identified, top-1",
    "margin": "similarity, own - others",
    "fm_inter": "FM_inter",
    "text": "text alignment",
    "colour_drift": "colour drift",
}
CONVERGENCE = ("full", "F without CAN")
CURVE_TAG = "val/loss/velocity"


class Run(NamedTuple):
    """One finished training."""

    folder: Path
    row: str
    seed: int
    figures: dict[str, float]  # of FIGURES; NaN where unknown


class Cell(NamedTuple):
    """A figure over seeds."""

    mean: float
    spread: float  # standard deviation over seeds, NaN for one
    count: int

    def __str__(self) -> str:
        if self.count == 0:
            return "-"
        return f"{self.mean:.3f}" if self.count == 1 else f"{self.mean:.3f} ± {self.spread:.3f}"


# Runs -----------------------------------------------------------------------------------------------------------------


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Folders with an adapter and the hyper-parameters that it was trained with.

    Raises:
        FileNotFoundError: there is none below one of `folders`.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        runs = [file.parents[1] for file in sorted(folder.glob("**/tensorboard/hparams.yaml"))]
        runs = [run.resolve() for run in runs if (run / "adapter/config.json").is_file()]
        if not runs:
            raise FileNotFoundError(
                f"No finished run below {folder}: `python train.py --multirun experiment=miniature_ablation ...` makes "
                "some, see the head of conf/experiment/miniature_ablation.yaml."
            )
        found |= dict.fromkeys(runs)
    return list(found)


def read_settings(run: Path) -> dict[str, Any]:
    """{"model.adapter.face_norm": "adaptive", ...}"""
    return yaml.safe_load((run / "tensorboard/hparams.yaml").read_text())


def row_name(settings: dict[str, Any]) -> str | None:
    """Row of the table by what was trained; None for a stage 1 that is only a row's beginning."""
    face = settings["model.adapter.face_attention"] != "none"
    parts = (
        not settings["model.fusion._target_"].endswith("NullFusion"),
        face,
        face and settings["model.adapter.face_norm"] == "adaptive",
        settings["model.adapter.conditioned_norm"] != "none",
        str(settings["model.init_adapter"]) != "None",
    )
    losses = missing_losses(settings)
    if "image" in settings["data._target_"]:
        return PICTURES if all(parts[:4]) and not losses else None
    return ", ".join([PAPER_ROWS.get(parts, "another"), *losses])


def missing_losses(settings: dict[str, Any]) -> list[str]:
    missing = []
    if settings["model.loss.identity._target_"].endswith("NullIdentityLoss"):
        missing.append("no identity loss")
    if settings["model.loss.diffusion.region._target_"].endswith("WholeFrame"):
        missing.append("no face-region loss")
    return missing


def gather(runs: Sequence[Path], judge: Callable[[Path], dict[str, Any]]) -> list[Run]:
    """Every run with its row, seed and figures; `judge` gives what results.json holds."""
    gathered = []
    for folder in runs:
        settings = read_settings(folder)
        row = row_name(settings)
        if row is None:
            continue
        file = folder / "table/results.json"
        results = json.loads(file.read_text()) if is_current(folder, file) else judge(folder)
        found = results["rows"][one_table.FULL]
        values = {name: math.nan if found.get(name) is None else found[name] for name in FIGURES}
        gathered.append(Run(folder, row, int(settings["seed"]), values))
    return gathered


def is_current(run: Path, results: Path) -> bool:
    adapter = run / "adapter/adapter.safetensors"
    return results.is_file() and results.stat().st_mtime >= adapter.stat().st_mtime


# Table ----------------------------------------------------------------------------------------------------------------


def by_row(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Rows in the paper's order, then the others."""
    others = sorted({run.row for run in runs} - set(PAPER_ROWS.values()))
    names = [row for row in PAPER_ROWS.values() if any(run.row == row for run in runs)] + others
    return {name: [run for run in runs if run.row == name] for name in names}


def summarize(runs: Sequence[Run], name: str) -> Cell:
    """Mean and standard deviation over the runs in which the figure is known."""
    values = [run.figures[name] for run in runs if not math.isnan(run.figures[name])]
    if not values:
        return Cell(math.nan, math.nan, 0)
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return Cell(statistics.fmean(values), spread, len(values))


def format_table(rows: dict[str, list[Run]]) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    lines = ["| row | seeds | " + " | ".join(FIGURES.values()) + " |", "|---" * (len(FIGURES) + 2) + "|"]
    for row, runs in rows.items():
        seeds = ", ".join(str(run.seed) for run in sorted(runs, key=lambda run: run.seed))
        lines.append(f"| {row} | {seeds} | " + " | ".join(str(summarize(runs, name)) for name in FIGURES) + " |")
    return "\n".join([*lines, ""])


# Plot -----------------------------------------------------------------------------------------------------------------


def read_curve(run: Path) -> tuple[list[int], list[float]]:
    """Steps and values of the validation's denoising loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    scalars = events.Scalars(CURVE_TAG) if CURVE_TAG in events.Tags()["scalars"] else []
    return [scalar.step for scalar in scalars], [scalar.value for scalar in scalars]


def draw(rows: dict[str, list[Run]]) -> bytes:
    """A panel for each figure, bars with the spread, and the convergence with and without CAN; SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "miniature", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(13, 2 + 0.25 * len(rows)), layout="constrained")
        panels = figure.subplots(1, len(FIGURES) + 1)
        for axes, (name, title) in zip(panels, FIGURES.items(), strict=False):
            draw_bars(axes, {row: summarize(runs, name) for row, runs in rows.items()})
            axes.set_title(title)
        for axes in panels[1:-1]:
            axes.set_yticklabels([])
        draw_convergence(panels[-1], rows)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def draw_bars(axes: Any, cells: dict[str, Cell]) -> None:
    spreads = [0.0 if math.isnan(cell.spread) else cell.spread for cell in cells.values()]
    means = [0.0 if math.isnan(cell.mean) else cell.mean for cell in cells.values()]
    axes.barh(range(len(cells)), means, xerr=spreads, color="#7a9cc6", error_kw={"linewidth": 1})
    axes.set_yticks(range(len(cells)), list(cells))
    axes.invert_yaxis()


def draw_convergence(axes: Any, rows: dict[str, list[Run]]) -> None:
    for row, colour in zip(CONVERGENCE, ("#2b6cb0", "#c05621"), strict=True):
        for i, run in enumerate(rows.get(row, [])):
            steps, values = read_curve(run.folder)
            axes.plot(steps, values, color=colour, linewidth=1, label="with CAN" if i == 0 and row == "full" else None)
            if i == 0 and row != "full":
                axes.lines[-1].set_label("without CAN")
    axes.set_title("denoising loss, validation")
    axes.set_xlabel("step of stage 2")
    if axes.lines:
        axes.legend(frameon=False)


# The command ----------------------------------------------------------------------------------------------------------


def judge_with(options: argparse.Namespace) -> Callable[[Path], dict[str, Any]]:
    """Computes a run's table with the table's own command, and reads what it wrote."""

    def judge(run: Path) -> dict[str, Any]:
        given = {"people": options.people, "model": options.model, "adapter": run / "adapter", "out": run / "table"}
        given |= {"num-people": options.num_people, "steps": options.steps, "guidance": options.guidance}
        given |= {"work": options.work, "device": options.device, "workers": options.workers}
        one_table.main([f"--{name}={value}" for name, value in given.items()])
        return json.loads((run / "table/results.json").read_text())

    return judge


def parse(arguments: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    table_parser, defaults = one_table.parse([])
    parser = argparse.ArgumentParser(prog="python -m mm_lightning.miniature.gather", description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="where to look for runs")
    parser.add_argument("--out", type=Path, default=Path("outputs/miniature_ablation_table"))
    for name in ("people", "model", "num_people", "steps", "guidance", "work", "device", "workers"):
        default = getattr(defaults, name)
        help_text = f"as for {table_parser.prog.removeprefix('python -m ')}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=help_text)
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser, options = parse(arguments)
    try:
        rows = by_row(gather(find_runs(options.folders), judge_with(options)))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    text = format_table(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    write_bytes(options.out / "ablations.md", text.encode())
    write_bytes(options.out / "ablations.svg", draw(rows))
    cells = {row: {name: summarize(runs, name)._asdict() for name in FIGURES} for row, runs in rows.items()}
    write_json(options.out / "ablations.json", without_nan(cells))
    print(text)
    print(f"Table, plot and figures: {options.out}")


def without_nan(value: Any) -> Any:
    """NaN, which JSON does not know, becomes null."""
    if isinstance(value, dict):
        return {name: without_nan(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    main()
