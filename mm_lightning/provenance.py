"""Which weights something was made with: for the records of caches and of generated videos."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mm_lightning.backbone import COMPONENTS, base_name, check_base, read_json
from mm_lightning.encoders.face import check_vision
from mm_lightning.encoders.recognizer import check_recognizer
from mm_lightning.files import fingerprint


def describe_component(base: str | Path, component: str) -> dict[str, Any]:
    """Its name, its config's digest and, where its files are on this machine, `weights`; raises as `check_base`."""
    folder = check_base(base, components=()) / component
    record = {"model": f"{base_name(base)}/{component}", "config_sha256": config_sha256(folder / "config.json")}
    return record | fingerprint(sorted(folder.glob(f"{COMPONENTS[component]}*.safetensors")))


def describe_vision(vision: str | Path) -> dict[str, Any]:
    """As `describe_component`, of a folder or of PhotoMaker-V2's file; raises as `check_vision`."""
    path = check_vision(vision)
    if path.is_file():
        return {"model": path.name, "config_sha256": None, **fingerprint([path])}
    record = {"model": path.resolve().name, "config_sha256": config_sha256(path / "config.json")}
    return record | fingerprint(sorted(path.glob("model*.safetensors")))


def describe_recognizer(recognizer: str, root: str) -> dict[str, str]:
    """`recognizer` and `recognizer_weights`; raises as `check_recognizer`."""
    path = check_recognizer(recognizer, root)
    return {"recognizer": path.stem, "recognizer_weights": fingerprint([path])["weights"]}


def config_sha256(file: Path) -> str:
    """Of what the config says, without the release that wrote it and where it lay."""
    config = {name: value for name, value in read_json(file).items() if not name.startswith(("_", "transformers_"))}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
