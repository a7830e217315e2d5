"""Adapter folders: `config.json` and `adapter.safetensors`, all that training made and nothing frozen."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "adapter.safetensors"
FORMAT = {"format": "magicmirror-adapter", "format_version": 1}


class AdapterWeights(NamedTuple):
    """What training made: tensors by their names in the training module, and what it takes to rebuild the modules."""

    config: Mapping[str, Any]  # JSON values; must hold `base`, as from `Backbone.base_id`
    state: Mapping[str, Tensor]

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write an adapter folder; an older one of the same name is replaced only once the new one is whole."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in self.state.items()}, fresh / WEIGHTS_NAME
        )
        (fresh / CONFIG_NAME).write_text(json.dumps({**FORMAT, **self.config}, indent=2, sort_keys=True) + "\n")
        fresh.chmod(0o755)
        if folder.exists():
            stale = fresh.with_name(fresh.name + ".old")
            folder.rename(stale)
            fresh.rename(folder)
            shutil.rmtree(stale)
        else:
            fresh.rename(folder)
        return folder

    @classmethod
    def from_pretrained(cls, folder: str | Path, names: set[str] | None = None) -> "AdapterWeights":
        """Read an adapter folder; `names` is what the model trains, and what the file holds must be exactly that.

        Raises:
            FileNotFoundError, ValueError: as `read_adapter_config`; or names are missing or left over.
        """
        config = read_adapter_config(folder)
        state = load_file(Path(folder) / WEIGHTS_NAME)
        missing, extra = (sorted(names - state.keys()), sorted(state.keys() - names)) if names else ([], [])
        if missing or extra:
            raise ValueError(
                f"{Path(folder) / WEIGHTS_NAME} does not fit this model: {len(missing)} names missing "
                f"({', '.join(missing[:3])}), {len(extra)} unknown ({', '.join(extra[:3])}). "
                "Was it trained with another preset or ablation?"
            )
        return cls(config, state)


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The config of an adapter folder.

    Raises:
        FileNotFoundError: the folder, or one of its two files, is not there.
        ValueError: its config.json is not one of ours, or of a newer format.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not an adapter folder: {' and '.join(missing)} not found there. Training writes one to "
            "<run>/adapter; give that path."
        )
    config = json.loads((folder / CONFIG_NAME).read_text())
    if any(config.get(key) != value for key, value in FORMAT.items()):
        found = {key: config.get(key) for key in FORMAT}
        raise ValueError(f"{folder / CONFIG_NAME} says {found}; this version reads {FORMAT}.")
    return config


def check_same(path: str | Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Raise ValueError naming each entry in which an adapter's or a checkpoint's record differs from what is here."""
    keys = sorted({key for key in {**saved, **wanted} if saved.get(key) != wanted.get(key)})
    if keys:
        differences = "; ".join(f"{key}: {saved.get(key)!r} there, {wanted.get(key)!r} here" for key in keys)
        raise ValueError(
            f"What lies at {path} was made with another {what} ({differences}). Give one that was made with these "
            "settings, or start without it."
        )
