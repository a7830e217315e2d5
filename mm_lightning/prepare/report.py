"""What became of everything: `report.json`, and `report.html` to look at, a single file without scripts."""

from __future__ import annotations

import json
from array import array
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mm_lightning.files import write_bytes
from mm_lightning.prepare.report_html import render
from mm_lightning.prepare.worker import FINISH, StageCount

REPORT_NAME = "report.json"
PAGE_NAME = "report.html"
NUM_EXAMPLES = 8  # of a reason, and of what was accepted
NUM_BINS = 24
TAIL = 0.5  # percent of the values at either end that share the outermost bin


class Measure(NamedTuple):
    """What a histogram shows."""

    title: str
    unit: str


MEASURES = {
    "face_size": Measure("Face size", "pixels, side of the square of the box's area"),
    "similarity": Measure("Similarity of the best reference, own crops aside", "cosine"),
    "motion": Measure("Motion", "score"),
    "clip_seconds": Measure("Clip length", "seconds"),
    "caption_words": Measure("Caption length", "words"),
}


class Report:
    """Takes counts and samples one after the other and keeps few of them.

    Args:
        stages: names in their order.
    """

    def __init__(self, stages: list[str]) -> None:
        self.counts = {stage: StageCount() for stage in stages}
        self.num_items = self.num_failed = self.num_accepted = 0
        self.examples: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        self.accepted: list[dict[str, Any]] = []
        self.measures: dict[str, array] = defaultdict(lambda: array("d"))

    def add_counts(self, counts: dict[str, StageCount]) -> None:
        for stage, count in counts.items():
            self.counts[stage] = self.counts[stage] + count

    def add_status(self, status: dict[str, Any]) -> None:
        """What is said of a chunk as a whole."""
        self.num_items += status["num_items"]
        self.num_failed += status["num_failed"]
        self.add_counts({stage: StageCount.from_dict(count) for stage, count in status["counts"].items()})

    def add_double(self, summary: dict[str, Any]) -> None:
        """A sample whose key another one has: it was counted as finished and is not."""
        self.add_counts({FINISH: StageCount(num_out=-1, reasons=Counter(duplicate_key=1))})
        self.add_rejected(summary | {"stage": FINISH, "reason": "duplicate_key", "detail": ""})

    def add_rejected(self, record: dict[str, Any]) -> None:
        """An example, where there are not enough; one with a picture replaces one without."""
        examples = self.examples[record["stage"], record["reason"]]
        if len(examples) < NUM_EXAMPLES:
            examples.append(record)
        elif record.get("thumbnail"):
            bare = next((i for i, example in enumerate(examples) if not example.get("thumbnail")), None)
            if bare is not None:
                examples[bare] = record

    def add_accepted(self, summary: dict[str, Any]) -> None:
        self.num_accepted += 1
        for name, value in summary["measures"].items():
            self.measures[name].append(value)
        if summary.get("thumbnail") and len(self.accepted) < NUM_EXAMPLES:
            self.accepted.append({name: summary[name] for name in ("key", "source", "thumbnail")})

    def as_dict(self) -> dict[str, Any]:
        return {
            "num_items": self.num_items,
            "num_accepted": self.num_accepted,
            "num_rejected": sum(count.reasons.total() for count in self.counts.values()),
            "num_failed": self.num_failed,
            "funnel": [{"stage": stage, **funnel_row(count)} for stage, count in self.counts.items()],
            "reasons": self.reasons(),
            "accepted_examples": self.accepted,
            "histograms": {name: histogram(name, self.measures[name]) for name in MEASURES if self.measures.get(name)},
        }

    def reasons(self) -> list[dict[str, Any]]:
        """In the order of the stages, the most frequent reason of each first."""
        return [
            {"stage": stage, "reason": reason, "count": number, "examples": self.examples[stage, reason]}
            for stage, count in self.counts.items()
            for reason, number in sorted(count.reasons.items(), key=lambda item: (-item[1], item[0]))
        ]


def funnel_row(count: StageCount) -> dict[str, Any]:
    """`out = in - rejected + added`, where a stage that makes several samples of one adds."""
    row = count.as_dict()
    return row | {"added": row["out"] - row["in"] + row["rejected"], "reasons": dict(sorted(row["reasons"].items()))}


def histogram(name: str, values: array) -> dict[str, Any]:
    """Counts in bins of equal width, the tails in the outermost."""
    numbers = np.frombuffer(values, float)
    low, high = np.percentile(numbers, [TAIL, 100 - TAIL])
    whole = name == "caption_words"
    if whole:
        low, high = np.floor(low), np.ceil(high) + 1
        edges = np.arange(low, high + 1, max(1, -(-(high - low) // NUM_BINS)))
        edges = edges if edges[-1] >= high else np.append(edges, edges[-1] + edges[1] - edges[0])
    else:
        low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
        edges = np.linspace(low, high, NUM_BINS + 1)
    counts, _ = np.histogram(np.clip(numbers, edges[0], edges[-1] - (0.5 if whole else 0)), edges)
    found = {"min": numbers.min(), "median": np.median(numbers), "mean": numbers.mean(), "max": numbers.max()}
    return {
        **MEASURES[name]._asdict(),
        "num_samples": len(numbers),
        "edges": [round(float(edge), 6) for edge in edges],
        "counts": counts.tolist(),
        **{statistic: round(float(value), 4) for statistic, value in found.items()},
    }


def write_report(folder: Path, report: Report, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes both files.

    Args:
        facts: about the run: "source", "kind", "dry_run", "seconds", "index", "versions", "config", ...

    Returns:
        What `report.json` holds.
    """
    content = facts | report.as_dict()
    write_bytes(folder / PAGE_NAME, render(content).encode())
    bare = content | {
        "reasons": [{**row, "examples": list(map(without_picture, row["examples"]))} for row in content["reasons"]],
        "accepted_examples": list(map(without_picture, content["accepted_examples"])),
    }
    write_bytes(folder / REPORT_NAME, (json.dumps(bare, indent=2, default=str) + "\n").encode())
    return bare


def without_picture(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "thumbnail"}


def summary_line(report: dict[str, Any]) -> str:
    """The run in one line, for the terminal."""
    top = Counter({f"{row['stage']}: {row['reason']}": row["count"] for row in report["reasons"]}).most_common(3)
    because = "; ".join(f"{number} {name}" for name, number in top)
    left = f"{report['num_rejected']} rejected ({because})" if top else "none rejected"
    return f"{report['num_items']} items -> {report['num_accepted']} samples, {left}"
