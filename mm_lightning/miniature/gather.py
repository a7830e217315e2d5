"""The ablations of the miniature, gathered: a table with mean and spread over seeds, and a plot.

    python -m mm_lightning.miniature.gather outputs/miniature_ablation

looks for finished runs below the folders given, computes for each what `mm_lightning.miniature.table` prints (once; it
is kept beside the run), and names the rows as the paper's Table 3 does, by what each run trained. An `ablations.json`
that it wrote before, here or on another machine, may stand among the folders: its runs are counted in.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mm_lightning.evaluation.ablation import (
    Cell,
    by_row,
    find_runs,
    is_current,
    read_settings,
    row_name,
    summarize,
    without_nan,
)
from mm_lightning.files import write_bytes, write_json
from mm_lightning.miniature import table as one_table

logger = logging.getLogger(__name__)

FIGURES = {
    "top1": "identified, top-1",
    "margin": "similarity, own - others",
    "fm_inter": "FM_inter",
    "text": "text alignment",
    "colour_drift": "colour drift",
}
CONVERGENCE = ("full", "F without CAN")
CURVE_TAG = "val/loss/velocity"


class Judged(NamedTuple):
    """A finished run."""

    row: str
    seed: int
    figures: dict[str, float]  # NaN where unknown
    curve: list[list[float]]  # [step, denoising loss of the validation]


# Runs -----------------------------------------------------------------------------------------------------------------


def gather(runs: Sequence[Path], judge: Callable[[Path], dict[str, Any]]) -> list[Judged]:
    """Every run with its row, seed and figures; `judge` gives what results.json holds."""
    gathered = []
    for folder in runs:
        settings = read_settings(folder)
        row = row_name(settings)
        if row is None:
            continue
        file = folder / "table/results.json"
        results = json.loads(file.read_text()) if is_current(folder, file) else judge(folder)
        figures = known(results["rows"][one_table.FULL])
        gathered.append(Judged(row, int(settings["seed"]), figures, read_curve(folder)))
    return gathered


def known(figures: Mapping[str, float | None]) -> dict[str, float]:
    """Those of this table; what JSON calls null is NaN."""
    return {name: math.nan if figures.get(name) is None else figures[name] for name in FIGURES}


def read_table(file: Path) -> list[Judged]:
    """The runs of a table that was written before.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        runs = json.loads(file.read_text())["runs"]
        return [Judged(run["row"], run["seed"], known(run["figures"]), run["curve"]) for run in runs]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is no ablations.json of `python -m mm_lightning.miniature.gather` ({error!r})."
        ) from error


def one_of_seed(runs: Sequence[Judged]) -> list[Judged]:
    """One run of each row and seed, the last."""
    return list({(run.row, run.seed): run for run in runs}.values())


def read_curve(run: Path) -> list[list[float]]:
    """Steps and values of the validation's denoising loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    scalars = events.Scalars(CURVE_TAG) if CURVE_TAG in events.Tags()["scalars"] else []
    return [[scalar.step, scalar.value] for scalar in scalars]


# Table ----------------------------------------------------------------------------------------------------------------


def format_table(rows: dict[str, list[Judged]]) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    lines = ["| row | seeds | " + " | ".join(FIGURES.values()) + " |", "|---" * (len(FIGURES) + 2) + "|"]
    for row, runs in rows.items():
        seeds = ", ".join(str(run.seed) for run in sorted(runs, key=lambda run: run.seed))
        lines.append(f"| {row} | {seeds} | " + " | ".join(str(summarize(runs, name)) for name in FIGURES) + " |")
    return "\n".join([*lines, ""])


# Plot -----------------------------------------------------------------------------------------------------------------


def draw(rows: dict[str, list[Judged]]) -> bytes:
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


def draw_convergence(axes: Any, rows: dict[str, list[Judged]]) -> None:
    for row, colour in zip(CONVERGENCE, ("#2b6cb0", "#c05621"), strict=True):
        for i, run in enumerate(rows.get(row, [])):
            steps, values = [step for step, _ in run.curve], [value for _, value in run.curve]
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
    parser.add_argument("folders", nargs="+", type=Path, help="where to look for runs, or earlier ablations.json")
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
        told = [run for given in options.folders if given.is_file() for run in read_table(given)]
        folders = [given for given in options.folders if not given.is_file()]
        runs = one_of_seed([*told, *gather(find_runs(folders), judge_with(options))])
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    rows = by_row(runs)
    text = format_table(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    write_bytes(options.out / "ablations.md", text.encode())
    write_bytes(options.out / "ablations.svg", draw(rows))
    cells = {row: {name: summarize(runs, name)._asdict() for name in FIGURES} for row, runs in rows.items()}
    write_json(options.out / "ablations.json", without_nan({"table": cells, "runs": [run._asdict() for run in runs]}))
    print(text)
    print(f"Table, plot and figures: {options.out}")


if __name__ == "__main__":
    main()
