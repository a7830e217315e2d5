"""The paper's ablation table from finished runs: mean and spread over seeds, the published rows beside.

    python -m mm_lightning.evaluate ablation outputs/row_a_identity_branch outputs/row_full

looks below the folders for runs: `adapter/`, `tensorboard/hparams.yaml`, and `evaluation/results.json` as
`mm_lightning.evaluate` writes it. Rows are named by what each run trained. Runs that have not been judged yet are
listed with the commands that do it. Writes ablation.md, ablation.json and ablation.html.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import yaml

from mm_lightning.evaluation.manifest import MANIFEST
from mm_lightning.evaluation.published import ABLATION_COLUMNS, SOURCE, published_ablation
from mm_lightning.evaluation.report import ARROWS, FIGURES, Figure, number, page
from mm_lightning.files import write_json, write_text

RESULTS = "evaluation/results.json"  # in a run's folder
METHOD = "ours"  # in the commands that are proposed
NEEDED = (  # settings that a row and its commands are made of
    "seed", "paths.run_dir", "data._target_", "model.base", "model.vision", "model.init_adapter",
    "model.fusion._target_", "model.adapter.face_attention", "model.adapter.face_norm",
    "model.adapter.conditioned_norm", "model.loss.identity._target_", "model.loss.diffusion.region._target_",
)  # fmt: skip
OF_ONE_SEED = re.compile(r"(^|\.)(seed|init_adapter)$")  # settings in which seeds of one row may differ


class Trained(NamedTuple):
    """What a run trained: the check marks of the paper's Table 3."""

    text_branch: bool  # equation 5
    face_tokens: bool
    face_modulation: bool  # equation 6
    can: bool  # equation 7
    pretrained: bool  # started from a stage 1


PAPER_ROWS = {
    Trained(True, False, False, False, False): "A identity branch",
    Trained(False, True, False, False, False): "B structure branch",
    Trained(True, True, False, False, False): "C both branches",
    Trained(False, True, True, False, False): "D face modulation",
    Trained(True, False, False, True, False): "E CAN",
    Trained(True, True, False, False, True): "F without CAN",
    Trained(True, True, True, True, False): "G without pre-training, videos alone",
    Trained(True, True, True, True, True): "full",
}
PICTURES = "pictures alone"  # stage 1 by itself


class Run(NamedTuple):
    """One finished training."""

    folder: Path
    row: str
    seed: int
    figures: dict[str, float]  # NaN where unknown; empty where it has not been judged


class HasFigures(Protocol):
    """What a table's row and its cells are made of; a `Run` is one."""

    @property
    def row(self) -> str: ...

    @property
    def figures(self) -> Mapping[str, float]: ...


OneRun = TypeVar("OneRun", bound=HasFigures)


class Cell(NamedTuple):
    """A figure over seeds."""

    mean: float
    spread: float  # standard deviation over seeds, NaN for one
    count: int

    def __str__(self) -> str:
        if self.count == 0:
            return "-"
        return f"{self.mean:.3f}" if self.count == 1 else f"{self.mean:.3f} ± {self.spread:.3f}"


class Line(NamedTuple):
    """A line of the table, ready to be shown."""

    row: str
    marks: tuple[str, ...]  # of Trained
    seeds: str
    cells: tuple[str, ...]
    published: bool


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
                f"No finished run below {folder}: a run's folder holds adapter/ and tensorboard/hparams.yaml, as "
                "`python train.py` leaves them; the README lists the experiments of the ablation."
            )
        found |= dict.fromkeys(runs)
    return list(found)


def read_settings(run: Path) -> dict[str, Any]:
    """{"model.adapter.face_norm": "adaptive", ...}

    Raises:
        ValueError: the run's file is no YAML, or lacks settings that are needed.
    """
    mend = "It was cut short or is of another version: train the run again, or take its folder away."
    try:
        settings = yaml.safe_load((run / "tensorboard/hparams.yaml").read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{run}: tensorboard/hparams.yaml cannot be read ({told}). {mend}") from error
    found = settings if isinstance(settings, dict) else {}
    missing = [name for name in NEEDED if found.get(name) is None]
    if missing:
        raise ValueError(f"{run}: tensorboard/hparams.yaml has no {', '.join(missing)}. {mend}")
    return found


def trained_parts(settings: Mapping[str, Any]) -> Trained:
    face = settings["model.adapter.face_attention"] != "none"
    return Trained(
        text_branch=not settings["model.fusion._target_"].endswith("NullFusion"),
        face_tokens=face,
        face_modulation=face and settings["model.adapter.face_norm"] == "adaptive",
        can=settings["model.adapter.conditioned_norm"] != "none",
        pretrained=str(settings["model.init_adapter"]) != "None",
    )


def row_name(settings: Mapping[str, Any]) -> str | None:
    """Row of the table by what was trained; None for a stage 1 that is only a row's beginning."""
    parts, losses = trained_parts(settings), missing_losses(settings)
    if "image" in settings["data._target_"]:
        return PICTURES if all(parts[:4]) and not losses else None
    return ", ".join([PAPER_ROWS.get(parts, "another"), *losses])


def missing_losses(settings: Mapping[str, Any]) -> list[str]:
    missing = []
    if settings["model.loss.identity._target_"].endswith("NullIdentityLoss"):
        missing.append("no identity loss")
    if settings["model.loss.diffusion.region._target_"].endswith("WholeFrame"):
        missing.append("no face-region loss")
    return missing


def is_current(run: Path, results: Path) -> bool:
    """Whether `results` are there and not older than the run's adapter."""
    adapter = run / "adapter/adapter.safetensors"
    return results.is_file() and results.stat().st_mtime >= adapter.stat().st_mtime


def by_row(runs: Sequence[OneRun]) -> dict[str, list[OneRun]]:
    """Rows in the paper's order, then the others."""
    others = sorted({run.row for run in runs} - set(PAPER_ROWS.values()))
    names = [row for row in PAPER_ROWS.values() if any(run.row == row for run in runs)] + others
    return {name: [run for run in runs if run.row == name] for name in names}


def summarize(runs: Sequence[HasFigures], name: str) -> Cell:
    """Mean and standard deviation over the runs in which the figure is known."""
    values = [value for run in runs if not math.isnan(value := run.figures.get(name, math.nan))]
    if not values:
        return Cell(math.nan, math.nan, 0)
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return Cell(statistics.fmean(values), spread, len(values))


def without_nan(value: Any) -> Any:
    """NaN, which JSON does not know, becomes null."""
    if isinstance(value, dict):
        return {name: without_nan(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# What `mm_lightning.evaluate` said of a run ---------------------------------------------------------------------------


def read_run(folder: Path, row: str, seed: int, results: str = RESULTS, method: str | None = None) -> Run:
    """With its figures, if it has been judged since its adapter was written.

    Raises:
        ValueError: as `read_figures`.
    """
    file = folder / results
    return Run(folder, row, seed, read_figures(file, method) if is_current(folder, file) else {})


def read_figures(file: Path, method: str | None = None) -> dict[str, float]:
    """Figure -> mean over videos, NaN where unknown.

    Args:
        method: in the file; None takes the only one.

    Raises:
        ValueError: another kind of file, or no such method in it, or several and none is chosen.
    """
    try:
        methods = json.loads(file.read_text())["methods"]
        means = {name: {key: found["mean"] for key, found in figures.items()} for name, figures in methods.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is not what `python -m mm_lightning.evaluate` writes ({type(error).__name__}: {error})."
        ) from error
    if method is None and len(means) == 1:
        [method] = means
    if method not in means:
        asked = "judges several methods" if method is None else f"has no method {method}"
        raise ValueError(f"{file} {asked}: choose with --method one of {', '.join(means)}.")
    return {name: math.nan if mean is None else float(mean) for name, mean in means[method].items()}


def newest_of_seed(runs: Sequence[Run]) -> list[Run]:
    """One run of each row and seed, the one whose adapter was written last."""
    order = sorted(runs, key=lambda run: (run.folder / "adapter/adapter.safetensors").stat().st_mtime)
    chosen = {(run.row, run.seed): run for run in order}
    return [run for run in runs if chosen[run.row, run.seed] is run]


def differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings in which runs of one row differ, but for seeds and the folders of their own."""
    cleaned = [
        {name: str(value).replace(str(one["paths.run_dir"]), "RUN") for name, value in one.items()} for one in settings
    ]
    names = sorted({name for one in cleaned for name in one if not OF_ONE_SEED.search(name)})
    return [name for name in names if len({one.get(name) for one in cleaned}) > 1]


def remarks(found: Sequence[Run], chosen: Sequence[Run], results: str) -> list[str]:
    """What a reader of the table should know."""
    said = [f"{shown(run.folder)} is left out: a newer run has its row and seed." for run in found if run not in chosen]
    for row, runs in by_row(chosen).items():
        if names := differences([read_settings(run.folder) for run in runs]):
            said.append(f"The runs of row {row} differ in more than the seed: {', '.join(names)}.")
    files = [run.folder / results for run in chosen if run.figures]
    if len({json.dumps(json.loads(file.read_text()).get("judged_with"), sort_keys=True) for file in files}) > 1:
        said.append("Runs were judged with different settings (judged_with in their results.json): judge them alike.")
    return said


def commands(run: Run, results: str = RESULTS) -> list[str]:
    """That generate a run's videos, unless they are there, and judge them."""
    settings, videos = read_settings(run.folder), shown(run.folder / "generated")
    asked = []
    if not is_current(run.folder, videos / MANIFEST):
        options = {"base": settings["model.base"], "vision": settings["model.vision"]}
        options |= {"adapter": shown(run.folder / "adapter"), "out": videos}
        told = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in options.items())
        asked.append(f"python -m mm_lightning.generate --jobs jobs.json {told}")
    given = [override(f"+videos.{METHOD}", videos), override("out", shown(run.folder / results).parent)]
    return [*asked, f"python -m mm_lightning.evaluate {' '.join(given)}"]


def override(name: str, value: Path) -> str:
    """For a shell, quoted for Hydra where it would read a list or a number out of a path."""
    plain = re.fullmatch(r"[\w.-]*/[\w./-]+", str(value))
    return f"{name}={value}" if plain else shlex.quote(f"{name}={json.dumps(str(value), ensure_ascii=False)}")


def shown(path: Path) -> Path:
    """From here, where that is shorter."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# Table ----------------------------------------------------------------------------------------------------------------


def columns(runs: Sequence[Run]) -> list[Figure]:
    """The paper's three, then what else some run has."""
    paper = [next(figure for figure in FIGURES if figure.name == name) for name in ABLATION_COLUMNS]
    return paper + [f for f in FIGURES if f not in paper and summarize(runs, f.name).count]


def table_lines(rows: Mapping[str, Sequence[Run]], figures: Sequence[Figure]) -> list[Line]:
    """Ours, then the paper's of the same row; the paper's rows first."""
    lines, published = [], published_ablation()
    names = [*PAPER_ROWS.values(), *(row for row in rows if row not in PAPER_ROWS.values())]
    for row in names:
        if row in rows:
            cells = tuple(str(summarize(rows[row], figure.name)) for figure in figures)
            lines.append(Line(row, marks(row), describe_seeds(rows[row]), cells, False))
        if told := published.get(row.split()[0] if row in PAPER_ROWS.values() else ""):
            cells = tuple("-" if f.name not in told else number(told[f.name]) for f in figures)
            lines.append(Line(f"{row} (published)", marks(row), "", cells, True))
    return lines


def marks(row: str) -> tuple[str, ...]:
    parts = {name: parts for parts, name in PAPER_ROWS.items()}.get(row)
    return ("",) * len(Trained._fields) if parts is None else tuple("x" if part else "" for part in parts)


def describe_seeds(runs: Sequence[Run]) -> str:
    """0, 1, 2 (1 not judged)"""
    waiting = sum(not run.figures for run in runs)
    seeds = ", ".join(str(seed) for seed in sorted(run.seed for run in runs))
    return f"{seeds} ({waiting} not judged)" if waiting else seeds


def head(figures: Sequence[Figure]) -> list[str]:
    parts = ["text branch", "face tokens", "face modulation", "CAN", "pre-trained"]
    return ["row", *parts, "seeds", *(figure.title + ARROWS[figure.better] for figure in figures)]


def legend() -> str:
    return (
        "Means over videos, then mean ± standard deviation over seeds. Rows marked “published”: "
        f"{SOURCE}, with other people, prompts and seeds."
    )


def to_markdown(lines: Sequence[Line], figures: Sequence[Figure], notes: Sequence[str]) -> str:
    titles = head(figures)
    text = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    text += ["| " + " | ".join([line.row, *line.marks, line.seeds, *line.cells]) + " |" for line in lines]
    return "\n".join([*text, "", legend(), *(f"\n- {note}" for note in notes), ""])


def to_html(lines: Sequence[Line], figures: Sequence[Figure], notes: Sequence[str]) -> str:
    """A page of its own, as the report of `mm_lightning.evaluate`."""
    titles = "".join(f"<th>{escape(title)}</th>" for title in head(figures))
    body = []
    for line in lines:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in (line.row, *line.marks, line.seeds, *line.cells))
        body.append(f"<tr class='{'published' if line.published else 'ours'}'>{cells}</tr>")
    said = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return page(
        f'<h1>Ablation</h1><div class="card wide"><table><tr>{titles}</tr>{"".join(body)}</table></div>'
        f'<p class="soft">{escape(legend())}</p><ul class="soft">{said}</ul>',
        "Ablation",
    )


def to_json(rows: Mapping[str, Sequence[Run]], figures: Sequence[Figure], notes: Sequence[str]) -> dict[str, Any]:
    ours = {
        row: {
            "runs": [{"folder": str(run.folder), "seed": run.seed, "figures": run.figures} for run in runs],
            "figures": {figure.name: summarize(runs, figure.name)._asdict() for figure in figures},
        }
        for row, runs in rows.items()
    }
    return {"rows": ours, "published": published_ablation(), "published_source": SOURCE, "notes": list(notes)}


# The command ----------------------------------------------------------------------------------------------------------


def gather(folders: Sequence[Path], results: str, method: str | None) -> list[Run]:
    """Every run that is a row.

    Raises:
        FileNotFoundError, ValueError: as `find_runs`, `read_settings` and `read_figures`; no run is a row.
    """
    runs = []
    for folder in find_runs(folders):
        settings = read_settings(folder)
        row = row_name(settings)
        if row is not None:
            runs.append(read_run(folder, row, int(settings["seed"]), results, method))
    if not runs:
        raise ValueError(f"Only first stages below {', '.join(map(str, folders))}: they are the beginnings of rows.")
    return runs


def to_do(runs: Iterable[Run], results: str) -> list[str]:
    """The commands that are missing, under a heading each."""
    waiting = [run for run in runs if not run.figures]
    lines = [f"Not judged yet, or before their adapter was written: {len(waiting)}."] if waiting else []
    for run in waiting:
        lines += [f"# {run.row}, seed {run.seed}", *commands(run, results)]
    if any("--jobs jobs.json" in line for line in lines):
        lines.append("# jobs.json: python -m mm_lightning.evaluation.protocol people=FOLDER out=jobs.json")
    return lines


def parse(arguments: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    raw, name = argparse.RawDescriptionHelpFormatter, "python -m mm_lightning.evaluate ablation"
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="where to look for runs")
    add("--out", type=Path, default=Path("outputs/ablation"))
    add("--results", default=RESULTS, help="what judged a run, from its folder (default: %(default)s)")
    add("--method", help="in results that judge several")
    return parser, parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    parser, options = parse(arguments)
    try:
        found = gather(options.folders, options.results, options.method)
        runs = newest_of_seed(found)
        notes = remarks(found, runs, options.results)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    rows, figures = by_row(runs), columns(runs)
    lines = table_lines(rows, figures)
    text = to_markdown(lines, figures, notes)
    write_text(options.out / "ablation.md", text)
    write_json(options.out / "ablation.json", without_nan(to_json(rows, figures, notes)), sort_keys=False)
    write_text(options.out / "ablation.html", to_html(lines, figures, notes))
    print("\n".join([text, *to_do(runs, options.results), f"Table: {options.out / 'ablation.html'}"]))
