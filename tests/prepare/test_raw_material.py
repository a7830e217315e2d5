"""The command on a few hundred files as they come, good and bad: each ends as expected, none ends the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from datamodules.image import ImageDataModule
from datamodules.video import VideoDataModule
from mm_lightning.prepare.sources import printable
from tests.conftest import ROOT
from tests.prepare.bad_inputs import IMAGE_OPTIONS, VIDEO_OPTIONS, Input, make_inputs

OPTIONS = {"images": IMAGE_OPTIONS, "videos": VIDEO_OPTIONS}


def overrides(options: dict[str, dict[str, Any]]) -> list[str]:
    values = [(stage, name, value) for stage, given in options.items() for name, value in given.items()]
    return [f"stages.{stage}.{name}={'null' if value is None else value}" for stage, name, value in values]


def prepare(raw: Path, out: Path, source: str, *more: str) -> str:
    """What the command said."""
    given = [f"source={source}", f"source.path={raw / source}", f"out={out}", "~set_stages.duplicate_identities", *more]
    command = [sys.executable, "-m", "mm_lightning.prepare", *given, *overrides(OPTIONS[source])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"hydra.run.dir={out}.log"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def fates(out: Path) -> dict[str, list[dict[str, Any]]]:
    """What is recorded of each file, by its name: a rejection, or `{"reason": None}` for a sample."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.with_name(f"{out.name}.work").glob("*/*.jsonl")):
        for line in path.read_text().splitlines()[1:]:
            record = json.loads(line)
            summary = record.get("rejected") or {**record["accepted"], "reason": None, "detail": ""}
            found.setdefault(summary["source"].partition(":")[2], []).append(summary)
    return found


def expected(inputs: list[Input], source: str) -> dict[str, str | None]:
    chosen = [item for item in inputs if item.name.startswith(f"{source}/")]
    return {printable(item.name.partition("/")[2]): item.reason for item in chosen}


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> tuple[Path, list[Input]]:
    raw = tmp_path_factory.mktemp("raw")
    return raw, make_inputs(raw, num_good=24, repeats=2)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["images", "videos"])
def test_every_file_ends_as_expected(source, material, tmp_path):
    raw, inputs = material
    out, wanted = tmp_path / "out", expected(inputs, source)
    said = prepare(raw, out, source, "workers=2")
    found = fates(out)
    assert found.keys() == wanted.keys()
    reasons = {name: {fate["reason"] for fate in records} for name, records in found.items()}
    in_stages = {name: {None if reason == "duplicate_picture" else reason} for name, reason in wanted.items()}
    assert reasons == in_stages
    report = json.loads((out / "report.json").read_text())
    assert f"{len(wanted)} items -> {report['num_accepted']} samples" in said
    counted = Counter({row["reason"]: row["count"] for row in report["reasons"]})
    assert counted == Counter(reason for reason in wanted.values() if reason)
    assert report["num_failed"] == 0
    assert "Traceback" not in said


@pytest.mark.slow
def test_the_shards_are_read_by_the_data_modules(material, tmp_path):
    raw, _ = material
    for source, module, options in (("images", ImageDataModule, {}), ("videos", VideoDataModule, {"num_frames": 9})):
        prepare(raw, tmp_path / source, source, "workers=0")
        number = json.loads((tmp_path / source / "index.json").read_text())["num_samples"]
        stream = module(tmp_path / source, 96, 144, **options, batch_size=number)
        batch = next(iter(stream.train_dataloader()))
        assert len(set(batch.keys)) == number
        assert (batch.weights == 1).all()
        assert (batch.face_boxes[..., 2] > batch.face_boxes[..., 0]).all()
