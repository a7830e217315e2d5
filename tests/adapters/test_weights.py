import json

import pytest
import torch

from mm_lightning.adapters.weights import AdapterWeights, check_same, read_adapter_config


def test_round_trip_and_replacement(tmp_path):
    state = {"a.weight": torch.randn(2, 3), "b": torch.randn(4).expand(2, 4)}
    AdapterWeights({"base": {"name": "x"}}, {"old": torch.zeros(1)}).save_pretrained(tmp_path / "adapter")
    folder = AdapterWeights({"base": {"name": "y"}}, state).save_pretrained(tmp_path / "adapter")
    assert read_adapter_config(folder)["base"] == {"name": "y"}
    loaded = AdapterWeights.from_pretrained(folder, set(state)).state
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not an adapter folder"):
        read_adapter_config(tmp_path / "nowhere")
    folder = AdapterWeights({"base": {}}, {"w": torch.zeros(1)}).save_pretrained(tmp_path / "a")
    (folder / "config.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match=r"says .'format': 'other'"):
        read_adapter_config(folder)


def test_other_names_and_other_bases_are_named(tmp_path):
    folder = AdapterWeights({"base": {}}, {"w": torch.zeros(1), "x": torch.zeros(1)}).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=r"1 names missing \(v\), 1 unknown \(x\)"):
        AdapterWeights.from_pretrained(folder, {"w", "v"})
    with pytest.raises(ValueError, match=r"another base model \(config_sha256: 'a' there, 'b' here\)"):
        check_same(folder, {"name": "n", "config_sha256": "a"}, {"name": "n", "config_sha256": "b"}, "base model")
