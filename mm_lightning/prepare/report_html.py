"""The report as one HTML page: charts are inline SVG and CSS, pictures are data URIs, nothing is loaded."""

from __future__ import annotations

import json
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #fff; --ink: #1f2328; --soft: #646a73; --line: #e3e0da;
  --pass: #3b7d6b; --lost: #d9773f; --added: #6a7fc1; --fail: #c0392b; --track: #efece6; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --card: #1d2024; --ink: #e6e4df; --soft: #9aa0a8;
  --line: #31353b; --pass: #5fb39b; --lost: #e0905f; --added: #8fa2dd; --fail: #ef6a5b; --track: #2a2e33; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 44px 0 14px; }
h3 { font-size: 15px; margin: 0; font-weight: 600; } p { margin: 0 0 8px; }
.soft { color: var(--soft); } .small { font-size: 13px; } .number { font-variant-numeric: tabular-nums; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px; }
.note { border-left: 4px solid var(--lost); margin-top: 16px; } .note.bad { border-color: var(--fail); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 22px; }
.tile b { display: block; font-size: 26px; line-height: 1.2; font-weight: 600; }
table { width: 100%; border-collapse: collapse; } th { text-align: left; font-weight: 500; color: var(--soft); }
th, td { padding: 6px 10px 6px 0; border-bottom: 1px solid var(--line); vertical-align: middle; font-size: 14px; }
tr:last-child td { border-bottom: 0; }
td.right, th.right { text-align: right; padding-right: 14px; white-space: nowrap; }
.some { margin-top: 14px; } .under { margin-top: 10px; }
td:first-child { white-space: nowrap; } td.chart { width: 36%; }
.wide { overflow-x: auto; } .bar { display: flex; height: 16px; background: var(--track); border-radius: 3px; }
.bar i { display: block; height: 100%; } .bar i:first-child { border-radius: 3px 0 0 3px; }
.pass { background: var(--pass); } .lost { background: var(--lost); } .fail { background: var(--fail); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 5px 0 14px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 14px; }
svg { display: block; width: 100%; height: auto; margin-top: 10px; } svg rect { fill: var(--pass); }
svg text { fill: var(--soft); font-size: 11px; } svg line { stroke: var(--line); }
.reason { margin-top: 10px; padding: 0; }
.reason summary { cursor: pointer; padding: 11px 18px; display: flex; gap: 12px;
  align-items: baseline; list-style-position: inside; } .reason summary::before { content: "+"; color: var(--soft);
  width: 10px; } .reason[open] summary::before { content: "–"; }
.reason summary::-webkit-details-marker { display: none; }
.reason summary .grow { flex: 1; } .reason .in { padding: 2px 18px 16px; }
.pictures { display: flex; flex-wrap: wrap; gap: 12px; } figure { margin: 0; width: 112px; }
figure img, figure .none { width: 112px; height: 112px; object-fit: contain;
  background: var(--track); border-radius: 6px;
  display: grid; place-items: center; color: var(--soft); font-size: 12px; }
figcaption { font-size: 11px; line-height: 1.35; color: var(--soft); margin-top: 4px; overflow-wrap: anywhere;
  display: -webkit-box; -webkit-line-clamp: 6; -webkit-box-orient: vertical; overflow: hidden; }
figcaption b { color: var(--ink); font-weight: 500; }
pre { overflow: auto; max-height: 460px; font: 12px/1.45 ui-monospace, monospace; margin: 10px 0 0; }
details.plain { margin-top: 10px; } details.plain summary { cursor: pointer; }
@media (max-width: 640px) { td.chart, th.chart { display: none; } }
"""
NAMES = {"read": "read", "finish": "complete"}  # of what the engine does itself
CHART_WIDTH, CHART_BASE = 320, 112  # of an SVG, in its own units
FAILURES = ("error", "worker_crashed", "timed_out")


def render(report: dict[str, Any]) -> str:
    """What `report.json` holds, with thumbnails -> the page."""
    title = f"{'Dry run of' if report['dry_run'] else 'Preparing'} {report['source']}"
    body = "\n".join(
        [
            f"<h1>{escape(title)}</h1>",
            header(report),
            tiles(report),
            notes(report),
            "<h2>What each stage let pass</h2>",
            funnel(report),
            *accepted(report),
            *reasons(report),
            "<h2>How it was made</h2>",
            plain("Versions", report["versions"]),
            plain("Configuration", report["config"]),
        ]
    )
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    page = f"<head>{head}<style>{STYLE}</style></head>\n<body><main>{body}</main></body>"
    return f'<!doctype html>\n<html lang="en">{page}</html>\n'


def number(value: float) -> str:
    """1234567 -> 1,234,567; fractions with three significant digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def share(part: float, whole: float) -> str:
    """Of zero, none; what is little is not shown as nothing."""
    percent = 100 * part / whole if whole else 0.0
    return "< 0.1 %" if 0 < percent < 0.1 else "> 99.9 %" if 99.9 < percent < 100 else f"{percent:.1f} %"


def duration(seconds: float) -> str:
    if seconds < 60:
        return "< 0.1 s" if 0 < seconds < 0.05 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(num_bytes: int) -> str:
    value, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{number(value)} {unit}"


def words(name: str) -> str:
    return escape(name.replace("_", " ").replace(":", ": "))


# Parts of the page ----------------------------------------------------------------------------------------------------


def header(report: dict[str, Any]) -> str:
    what = {"image": "pictures", "video": "videos"}.get(report["kind"], report["kind"])
    rate = report["num_items"] / report["seconds"] if report["seconds"] else 0.0
    parts = [what, f"{number(report['num_items'])} items in {duration(report['seconds'])}"]
    if report["num_done_before"]:
        parts.append(f"{number(report['num_done_before'])} of them by an earlier run")
    else:
        parts.append(f"{number(rate)} per second")
    if report["dry_run"]:
        parts.insert(0, f"the first {number(report['dry_run'])} at most, no shards written")
    return f'<p class="soft">{escape(" · ".join(parts))}</p>'


def tiles(report: dict[str, Any]) -> str:
    index = report["index"] or {"shards": []}
    num_bytes = sum(shard["num_bytes"] for shard in index["shards"])
    entries = [
        (number(report["num_items"]), "items"),
        (number(report["num_accepted"]), "samples accepted"),
        (number(report["num_rejected"]), "rejected"),
        (number(report["num_failed"]), "items that failed"),
    ]
    if index["shards"]:
        entries.append((number(len(index["shards"])), f"shards, {size(num_bytes)}"))
    cells = (f'<div class="card tile"><b class="number">{a}</b><span class="soft">{b}</span></div>' for a, b in entries)
    return f'<div class="tiles">{"".join(cells)}</div>'


def notes(report: dict[str, Any]) -> str:
    found = []
    if report.get("stopped"):
        found.append(("note bad", f"The run was stopped. {report['stopped']}"))
    if not report["num_accepted"]:
        found.append(("note bad", "No sample was accepted: the stage where the last are lost shows why."))
    elif report["num_failed"] and not report.get("stopped"):
        text = (
            f"{number(report['num_failed'])} items failed in a way that no stage foresees. What happened stands below."
        )
        found.append(("note", text))
    return "".join(f'<div class="card {kind}">{escape(text)}</div>' for kind, text in found)


def funnel(report: dict[str, Any]) -> str:
    widest = max((max(row["in"], row["out"]) for row in report["funnel"]), default=0) or 1
    rows = "".join(funnel_row(row, widest) for row in report["funnel"])
    legend = '<span class="key pass" style="margin-left:0"></span>passed<span class="key lost"></span>rejected'
    if report["num_failed"]:
        legend += '<span class="key fail"></span>failed'
    columns = ("in", None, "out", "rejected", "split", "time", "each")
    head = "".join(
        f'<th class="chart small">{legend}</th>' if name is None else f'<th class="right">{name}</th>'
        for name in columns
    )
    text = "A stage that makes several samples of one adds them under “split”. Times are summed over all workers."
    table = f'<div class="card wide"><table class="number"><tr><th>stage</th>{head}</tr>{rows}</table></div>'
    return f'{table}<p class="small soft under">{text}</p>'


def funnel_row(row: dict[str, Any], widest: int) -> str:
    failed = sum(number for reason, number in row["reasons"].items() if reason.split(":")[0] in FAILURES)
    parts = (("pass", row["out"]), ("lost", row["rejected"] - failed), ("fail", failed))
    total = sum(width for _, width in parts)
    scale = 100 / max(widest, total)
    bars = "".join(f'<i class="{kind}" style="width:{scale * width:.2f}%"></i>' for kind, width in parts if width)
    lost = f"{number(row['rejected'])} <span class=soft>({share(row['rejected'], row['in'])})</span>"
    each = f"{1000 * row['seconds'] / row['in']:,.1f} ms" if row["in"] else ""
    cells = [
        number(row["in"]),
        None,
        number(row["out"]),
        lost if row["rejected"] else "",
        f"+{number(row['added'])}" if row["added"] else "",
    ]
    cells += [duration(row["seconds"]), each]
    marked = (
        f'<td class="chart"><div class="bar">{bars}</div></td>' if cell is None else f'<td class="right">{cell}</td>'
        for cell in cells
    )
    return f"<tr><td>{words(NAMES.get(row['stage'], row['stage']))}</td>{''.join(marked)}</tr>"


def reasons(report: dict[str, Any]) -> list[str]:
    if not report["reasons"]:
        return []
    return ["<h2>What was rejected, and why</h2>", *(reason(row, report["num_rejected"]) for row in report["reasons"])]


def reason(row: dict[str, Any], total: int) -> str:
    failed = row["reason"].split(":")[0] in FAILURES
    mark = '<span class="key fail" style="margin:0"></span>' if failed else ""
    stage = words(NAMES.get(row["stage"], row["stage"]))
    head = (
        f'<summary>{mark}<h3>{words(row["reason"])}</h3><span class="soft grow">in {stage}</span>'
        f'<span class="number">{number(row["count"])}</span>'
        f'<span class="soft number">{share(row["count"], total)}</span></summary>'
    )
    traces = [example["trace"] for example in row["examples"] if example.get("trace")]
    trace = f"<pre>{escape(traces[0])}</pre>" if traces else ""
    opened = " open" if any(example.get("thumbnail") for example in row["examples"]) or traces else ""
    return (
        f'<details class="card reason"{opened}>{head}<div class="in">{pictures(row["examples"])}{trace}</div></details>'
    )


def accepted(report: dict[str, Any]) -> list[str]:
    if not report["num_accepted"]:
        return []
    charts = f'<div class="charts">{"".join(map(chart, report["histograms"].values()))}</div>'
    examples = report["accepted_examples"]
    shown = f'<div class="card some">{pictures(examples)}</div>' if examples else ""
    return ["<h2>What was accepted</h2>", charts, shown]


def pictures(examples: list[dict[str, Any]]) -> str:
    return f'<div class="pictures">{"".join(map(picture, examples))}</div>'


def picture(example: dict[str, Any]) -> str:
    shown = '<div class="none">no picture</div>'
    if example.get("thumbnail"):
        shown = f'<img alt="" src="data:image/jpeg;base64,{example["thumbnail"]}">'
    detail = f"<br>{escape(example['detail'])}" if example.get("detail") else ""
    tip = escape("\n".join(filter(None, (example["key"], example["source"], example.get("detail")))), quote=True)
    return f'<figure title="{tip}">{shown}<figcaption><b>{escape(example["key"])}</b>{detail}</figcaption></figure>'


def chart(data: dict[str, Any]) -> str:
    edges, counts = data["edges"], data["counts"]
    tallest, step = max(counts) or 1, CHART_WIDTH / len(counts)
    bars = "".join(
        f'<rect x="{i * step + 0.75:.1f}" y="{CHART_BASE - length:.1f}" width="{step - 1.5:.1f}" height="{length:.1f}">'
        f"<title>{number(edges[i])} to {number(edges[i + 1])}: {number(count)}</title></rect>"
        for i, count in enumerate(counts)
        for length in [(CHART_BASE - 14) * count / tallest]
    )
    ends = "".join(
        f'<text x="{CHART_WIDTH * place}" y="{CHART_BASE + 15}" text-anchor="{anchor}">{number(value)}</text>'
        for place, anchor, value in (
            (0, "start", edges[0]),
            (0.5, "middle", (edges[0] + edges[-1]) / 2),
            (1, "end", edges[-1]),
        )
    )
    facts = f"median {number(data['median'])} · from {number(data['min'])} to {number(data['max'])}"
    head = f'<h3>{escape(data["title"])}</h3><div class="small soft">{escape(data["unit"])} · {facts}</div>'
    line = f'<line x1="0" x2="{CHART_WIDTH}" y1="{CHART_BASE}" y2="{CHART_BASE}"/>'
    top = f'<text x="0" y="9">{number(tallest)}</text>'
    box = f"0 0 {CHART_WIDTH} {CHART_BASE + 18}"
    return f'<div class="card">{head}<svg viewBox="{box}" role="img">{line}{bars}{ends}{top}</svg></div>'


def plain(title: str, content: Any) -> str:
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    return f'<details class="card plain"><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>'
