"""The report as one HTML page: charts are inline SVG, pictures data URIs, nothing is loaded and no server is needed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mm_lightning.evaluation.published import COST, SOURCE, SUCCESS_RATES, published_rows
from mm_lightning.evaluation.summary import Estimate

COLOURS = ("#3b7d6b", "#d9773f", "#6a7fc1", "#b0569a", "#8a7a2f", "#4a90a4")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 460, 280, 60, 34, 10, 12
STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #fff; --ink: #1f2328; --soft: #646a73; --line: #e3e0da; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --card: #1d2024; --ink: #e6e4df; --soft: #9aa0a8; --line: #31353b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 36px 24px 80px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 40px 0 12px; } p { margin: 0 0 8px; }
.soft { color: var(--soft); font-size: 13px; } .wide { overflow-x: auto; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 500; color: var(--soft); } th:first-child, td:first-child { text-align: left; }
td small { display: block; color: var(--soft); font-size: 11px; } tr.published td { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 14px; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 11px; }
svg .axis { stroke: var(--line); } .key { display: inline-block; width: 10px; height: 10px; border-radius: 2px;
  margin: 0 5px 0 12px; }
.tools { display: flex; gap: 10px; flex-wrap: wrap; margin-bottom: 12px; }
select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 3px 8px; }
.clip { margin-bottom: 10px; } .clip .strip { display: flex; gap: 6px; overflow-x: auto; margin: 8px 0; }
.clip img { height: 112px; border-radius: 6px; flex: none; } .clip img.reference { outline: 2px solid #d9773f; }
.clip .figures { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; }
"""
SCRIPT = """
const find = id => document.getElementById(id), list = find('clips'), by = find('by'), only = find('only');
function arrange() {
  const [name, sign] = by.value.split('|');
  const cards = [...list.children];
  const value = card => { const v = card.dataset[name]; return v === '' ? -Infinity : Number(v) * Number(sign); };
  cards.sort((a, b) => value(a) - value(b)).forEach(card => list.append(card));
  cards.forEach(card => { card.hidden = only.value !== '' && card.dataset.method !== only.value; });
}
by.onchange = only.onchange = arrange; arrange();
"""


class Figure(NamedTuple):
    """A column of the table."""

    name: str  # as in results.json
    title: str
    better: int  # 1 higher, -1 lower, 0 neither
    digits: int = 3


FIGURES = (
    Figure("similarity", "ID similarity", 1),
    Figure("distance", "ID distance", -1),
    Figure("decay", "decay", -1),
    Figure("face_found", "face found", 1),
    Figure("top1", "top-1", 1),
    Figure("top5", "top-5", 1),
    Figure("fm_ref", "FM_ref", 1),
    Figure("fm_inter", "FM_inter", 1),
    Figure("dynamic_degree", "dynamic degree", 1),
    Figure("smoothness", "smoothness", -1),
    Figure("colour_drift", "colour drift", -1),
    Figure("text", "text", 1),
    Figure("inception_score", "inception score", 1, 2),
)
ARROWS = {1: " ↑", -1: " ↓", 0: ""}


def render(results: dict[str, Any], estimates: dict[str, dict[str, Estimate]], figures: Sequence[Figure]) -> str:
    """The page.

    Args:
        results: as results.json; every clip may carry `pictures`, data URIs of its reference and of frames.
        estimates: method -> figure -> estimate.
        figures: the columns.
    """
    methods = list(estimates)
    colours = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(methods)}
    keys = "".join(f'<span><i class="key" style="background:{colours[m]}"></i>{escape(m)}</span>' for m in methods)
    charts = [
        ("Similarity over the clip", similarity_chart(results["clips"], colours)),
        ("Motion against similarity", scatter(results["clips"], colours)),
    ]
    cards = "".join(f'<div class="card"><b>{title}</b>{svg}</div>' for title, svg in charts)
    parts = [
        f"<h1>{len(results['clips'])} videos judged</h1>",
        f'<p class="soft">{escape(results["description"])}</p>',
        f'<h2>Figures</h2><div class="card wide">{main_table(estimates, figures)}</div>',
        '<p class="soft">Means over videos; small, 95 % intervals by resampling people. A figure that is unknown for a '
        f"video (no face) is left out of its mean and counted. Grey rows: {escape(SOURCE)}.</p>",
        enhanced_note(results["clips"]),
        f'<h2>Success rates</h2><div class="card wide">{success_table(results["success_rates"])}</div>',
        cost_section(results["cost"]) if "cost" in results else "",
        f"<h2>Charts</h2><p>{keys}</p><div class='charts'>{cards}</div>",
        '<p class="soft">Right: a clip at the top left is as like its reference as can be and does not move: the '
        "photo was copied. Every dot is a video.</p>",
        f"<h2>Videos</h2>{gallery(results['clips'], figures, methods)}",
    ]
    return page("".join(parts), "Evaluation", SCRIPT)


def enhanced_note(clips: Sequence[dict[str, Any]]) -> str:
    """Where prompts of some videos ask for the face, which figures come from them."""
    told = []
    for method in dict.fromkeys(clip["method"] for clip in clips):
        kinds = [bool(clip["face_enhanced"]) for clip in clips if clip["method"] == method]
        if len(set(kinds)) == 2:
            told.append(f"{method}: {sum(kinds)} of {len(kinds)} videos")
    if not told:
        return ""
    return (
        '<p class="soft">Similarity, distance, decay, ranks and the identity check are those of videos whose prompt '
        f"asks for the face ({escape('; '.join(told))}); all else is that of the others.</p>"
    )


def page(body: str, title: str, script: str = "") -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f'<meta name="viewport" content="width=device-width"></head><body><main>{body}</main>'
        f"<script>{script}</script></body></html>\n"
    )


# Tables ---------------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def main_table(estimates: dict[str, dict[str, Estimate]], figures: Sequence[Figure]) -> str:
    head = "".join(f"<th>{escape(figure.title)}{ARROWS[figure.better]}</th>" for figure in figures)
    rows = [f"<tr><td>{escape(method)}</td>{cells(found, figures)}</tr>" for method, found in estimates.items()]
    for model, values in published_rows().items():
        told = "".join(f"<td>{number(values.get(figure.name), figure.digits)}</td>" for figure in figures)
        rows.append(f'<tr class="published"><td>{escape(model)} (paper)</td>{told}</tr>')
    return f"<table><tr><th>method</th>{head}</tr>{''.join(rows)}</table>"


def cells(found: dict[str, Estimate], figures: Sequence[Figure]) -> str:
    return "".join(f"<td>{cell(found[figure.name], figure.digits)}</td>" for figure in figures)


def cell(estimate: Estimate, digits: int) -> str:
    small = ""
    if not math.isnan(estimate.low):
        small = f"<small>{number(estimate.low, digits)} to {number(estimate.high, digits)}</small>"
    if estimate.num_unknown:
        small += f"<small>unknown in {estimate.num_unknown}</small>"
    return number(estimate.mean, digits) + small


def success_table(rates: dict[str, dict[str, float | None]]) -> str:
    """Shares of videos that pass, by method."""
    names = list(next(iter(rates.values())))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = [
        f"<tr><td>{escape(method)}</td>{''.join(f'<td>{percent(found[name])}</td>' for name in names)}</tr>"
        for method, found in rates.items()
    ]
    shown = ("motion", "text", "face", "identity")
    for model, shares in SUCCESS_RATES.items():
        known = dict(zip(shown, (share / 100 for share in shares), strict=True)) | {"mean": sum(shares) / 400}
        told = "".join(f"<td>{percent(known.get(name))}</td>" for name in names)
        rows.append(f'<tr class="published"><td>{escape(model)} (paper)</td>{told}</tr>')
    return f"<table><tr><th>method</th>{head}</tr>{''.join(rows)}</table>"


def percent(share: float | None) -> str:
    return "–" if share is None or math.isnan(share) else f"{share:.1%}"


def cost_section(cost: dict[str, Any]) -> str:
    """Seconds, parameters and memory, as `mm_lightning.evaluation.cost` holds them."""
    told = ", ".join(f"{name} {value}" for name, value in cost["settings"].items())
    return (
        f'<h2>Cost of a video</h2><div class="card wide">{cost_table(cost["rows"])}</div>'
        f'<p class="soft">{escape(cost["machine"])}; {escape(told)}. All rows by one run with the same weights in '
        "memory, the face's too; memory is the GPU's, or the whole process's where there is none. Grey rows: "
        f"{escape(SOURCE)}, one A800, 49 frames of 480x720.</p>"
    )


def cost_table(rows: Sequence[dict[str, Any]]) -> str:
    first = rows[0]["seconds"]
    head = "<tr><th></th><th>seconds</th><th>times</th><th>parameters</th><th>peak memory</th></tr>"
    lines = []
    for row in rows:
        small = f"<small>spread {number(row['spread'], 2)}</small>"
        cells = (f"{number(row['seconds'], 2)}{small}", number(row["seconds"] / first), f"{row['parameters']:,}")
        told = "".join(f"<td>{cell}</td>" for cell in (*cells, f"{row['peak_bytes'] / 2**30:.2f} GiB"))
        lines.append(f"<tr><td>{escape(row['name'])}</td>{told}</tr>")
    for model, (memory, parameters, seconds) in COST.items():
        cells = (str(seconds), "", f"{parameters}B", f"{memory} GiB")
        told = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f'<tr class="published"><td>{escape(model)} (paper)</td>{told}</tr>')
    return f"<table>{head}{''.join(lines)}</table>"


# Charts ---------------------------------------------------------------------------------------------------------------


class Axes(NamedTuple):
    """Values -> places in an SVG."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - BOTTOM - TOP)

    def draw(self, inside: Sequence[str], x_title: str, y_title: str) -> str:
        ticks = []
        x_digits, y_digits = tick_digits(self.x_range), tick_digits(self.y_range)
        for share in (0, 0.25, 0.5, 0.75, 1):
            x, y = (low + share * (high - low) for low, high in (self.x_range, self.y_range))
            below = f'x="{self.x(x):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle"'
            ticks.append(f"<text {below}>{x:.{x_digits}f}</text>")
            ticks.append(f'<text x="{LEFT - 6}" y="{self.y(y) + 4:.1f}" text-anchor="end">{y:.{y_digits}f}</text>')
            ticks.append(
                f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(y):.1f}" y2="{self.y(y):.1f}"/>'
            )
        titles = (
            f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_title)}</text>'
            f'<text x="12" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 12 {HEIGHT / 2})">'
            f"{escape(y_title)}</text>"
        )
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(ticks)}{"".join(inside)}{titles}</svg>'


def tick_digits(limits: tuple[float, float]) -> int:
    """After the point, so that five ticks from one limit to the other differ; at least 2."""
    step = (limits[1] - limits[0]) / 4
    return max(2, math.ceil(-math.log10(step))) if step > 0 else 2


def spread(values: Sequence[float]) -> tuple[float, float]:
    """A range with some room."""
    if not values:
        return 0.0, 1.0
    room = 0.06 * ((max(values) - min(values)) or 0.1)
    return min(values) - room, max(values) + room


def similarity_chart(clips: Sequence[dict[str, Any]], colours: dict[str, str]) -> str:
    """Each method's mean similarity at its sampled frames; a point needs a face in some video."""
    curves = {method: mean_curve([c["similarities"] for c in clips if c["method"] == method]) for method in colours}
    known = [value for curve in curves.values() for value in curve if value is not None]
    axes, lines = Axes((0, 1), spread(known)), []
    for method, curve in curves.items():
        steps = max(len(curve) - 1, 1)
        points = [f"{axes.x(i / steps):.1f},{axes.y(v):.1f}" for i, v in enumerate(curve) if v is not None]
        lines.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colours[method]}" stroke-width="2"/>')
    return axes.draw(lines, "place in the clip", "similarity to the references")


def mean_curve(series: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Mean at the places of the longest series, each of which spans its clip; None where all are unknown."""
    length = max((len(values) for values in series), default=0)
    placed = [at_places(values, length) for values in series if values]
    columns = [[value for value in column if not math.isnan(value)] for column in zip(*placed, strict=True)]
    return [float(np.mean(column)) if column else None for column in columns]


def at_places(values: Sequence[float | None], length: int) -> NDArray[np.float64]:
    """A series at `length` places of the clip, between two frames in proportion; NaN beside an unknown frame."""
    # Whole numbers, so that a frame meets its place exactly
    wanted, given = np.arange(length) * (len(values) - 1), np.arange(len(values)) * (length - 1)
    return np.interp(wanted, given, np.array(values, np.float64))


def scatter(clips: Sequence[dict[str, Any]], colours: dict[str, str]) -> str:
    known = [c for c in clips if c["figures"]["fm_inter"] is not None and c["figures"]["similarity"] is not None]
    motion = [c["figures"]["fm_inter"] for c in known]
    alike = [c["figures"]["similarity"] for c in known]
    axes = Axes(spread(motion), spread(alike))
    dots = [
        f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="4" fill="{colours[c["method"]]}" fill-opacity=".7">'
        f"<title>{escape(c['video'])}</title></circle>"
        for x, y, c in zip(motion, alike, known, strict=True)
    ]
    return axes.draw(dots, "FM_inter", "similarity")


# Videos ---------------------------------------------------------------------------------------------------------------


def gallery(clips: Sequence[dict[str, Any]], figures: Sequence[Figure], methods: Sequence[str]) -> str:
    options = "".join(
        f'<option value="{figure.name}|{figure.better or 1}">{escape(figure.title)}, '
        f"{'worst' if figure.better else 'lowest'} first</option>"
        for figure in figures
        if any(figure.name in clip["figures"] for clip in clips)
    )
    only = "".join(f"<option>{escape(method)}</option>" for method in methods)
    tools = f'<select id="by">{options}</select><select id="only"><option value="">all methods</option>{only}</select>'
    return f'<div class="tools">{tools}</div><div id="clips">{"".join(card(clip, figures) for clip in clips)}</div>'


def card(clip: dict[str, Any], figures: Sequence[Figure]) -> str:
    values = clip["figures"]
    data = "".join(f' data-{name}="{"" if value is None else value}"' for name, value in values.items())
    told = "".join(
        f"<span>{escape(f.title)} <b>{number(values.get(f.name), f.digits)}</b></span>"
        for f in figures
        if f.name in values
    )
    reference, *frames = clip.get("pictures") or [""]
    strip = "".join(f'<img src="{uri}" alt="">' for uri in frames)
    strip = (f'<img class="reference" src="{reference}" alt="reference">' if reference else "") + strip
    return (
        f'<div class="card clip" data-method="{escape(clip["method"])}"{data}><b>{escape(clip["method"])}</b> '
        f'<span class="soft">{escape(clip["video"])}</span><div>{escape(clip["prompt"])}</div>'
        f'<div class="strip">{strip}</div><div class="figures">{told}</div></div>'
    )


def to_json(results: dict[str, Any]) -> str:
    """results.json: no pictures, NaN as null."""
    clips = [{name: value for name, value in clip.items() if name != "pictures"} for clip in results["clips"]]
    return json.dumps(results | {"clips": clips}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
