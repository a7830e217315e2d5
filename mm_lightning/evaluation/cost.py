"""What generating costs: what `mm_lightning.benchmark generate --out` measured, for the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from mm_lightning.files import write_json


class CostRow(NamedTuple):
    """One line of the table."""

    name: str
    seconds: float  # a video, median
    spread: float  # largest minus smallest
    parameters: int
    peak_bytes: int  # of the GPU, or of the process where there is none


class Cost(NamedTuple):
    """Rows of one run; the first is what the others are compared with."""

    machine: str
    settings: dict[str, Any]  # num_frames, height, width, num_inference_steps, dtype, ...
    rows: tuple[CostRow, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"machine": self.machine, "settings": self.settings, "rows": [row._asdict() for row in self.rows]}


def write_cost(file: Path, cost: Cost) -> None:
    """As `read_cost` reads it."""
    write_json(file, cost.as_dict(), sort_keys=False)


def read_cost(file: Path) -> Cost:
    """
    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file.
    """
    command = f"`python -m mm_lightning.benchmark generate --photos her.jpg --out {file}`"
    if not file.is_file():
        raise FileNotFoundError(f"cost={file} is not there: {command} writes it.")
    try:
        read = json.loads(file.read_text())
        cost = Cost(str(read["machine"]), dict(read["settings"]), tuple(CostRow(**row) for row in read["rows"]))
        usable = bool(cost.rows) and all(math.isfinite(row.seconds) and row.seconds > 0 for row in cost.rows)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"cost={file} is not what {command} writes ({type(error).__name__}: {error}).") from error
    if not usable:
        raise ValueError(f"cost={file} has no rows, or one that took no time: {command} writes it anew.")
    return cost
