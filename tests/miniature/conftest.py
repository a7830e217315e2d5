"""A few people, rendered once per run."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_lightning.miniature import world

FEW_PEOPLE = {
    "train": 4,
    "validation": 0,
    "test": 3,
    "stills": 3,
    "num-frames": 5,
    "people-per-shard": 2,
}


def arguments_for(settings: dict[str, int]) -> list[str]:
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="session")
def few_people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven people with three stills and a short clip each, and their queries; never write into it."""
    pytest.importorskip("anny", reason="rendering needs the extra [miniature]")
    folder = tmp_path_factory.mktemp("miniature") / "people"
    world.main(["render", "--out", str(folder), "--workers", "0", *arguments_for(FEW_PEOPLE)])
    world.main(["queries", "--people", str(folder)])
    return folder
