"""What every test may use: the smallest CogVideoX, made once per run, nothing downloaded."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from mm_lightning.prepare.samples import main as prepare_samples
from mm_lightning.tiny import make_tiny

ROOT = Path(__file__).resolve().parent.parent

# Small enough for a forward pass in milliseconds: 32x32 pictures, two blocks with an adapter and two without.
SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "time_embed_dim": 16,
    "text_embed_dim": 32,
    "max_text_seq_length": 32,
    "sample_height": 4,
    "sample_width": 4,
    "sample_frames": 9,
    "vae_channels": 8,
    "image_encoder_dim": 16,
}

# Ports that no process is given by chance (Linux gives those from 32768), a range for each pytest-xdist worker: a free
# port that Lightning finds for itself may be taken by another worker before it is used.
PORTS = itertools.count(20000 + 1000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")))

# What Lightning writes into the environment of a process that trains under DDP or FSDP, or is seeded, and Hydra's own.
# A process that inherits LOCAL_RANK takes itself for one of several that were started for it, and waits for the others.
INHERITED = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "PL_", "HYDRA_")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Each test's processes, also those of its fixtures, meet at a port of its own and know of no earlier training."""
    for name in [name for name in os.environ if name.startswith(INHERITED)]:
        del os.environ[name]
    os.environ["MASTER_PORT"] = str(next(PORTS))


@pytest.fixture(scope="session")
def small_settings() -> dict[str, int]:
    """Arguments of `make_tiny` for the folders below."""
    return dict(SMALL)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CogVideoX-5B in miniature (RoPE, patch 2) in diffusers' layout; never write into it."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "cogvideox", **SMALL)


@pytest.fixture(scope="session")
def tiny_2b_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CogVideoX-2B in miniature: sin-cos positions, no RoPE."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "cogvideox_2b", **SMALL, use_rotary_positional_embeddings=False)


@pytest.fixture(scope="session")
def tiny_1_5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CogVideoX-1.5 in miniature: patches of two latent frames."""
    return make_tiny(tmp_path_factory.mktemp("tiny") / "cogvideox_1_5", **SMALL, patch_size_t=2)


@pytest.fixture(scope="session")
def sample_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the real pictures and the real clip that packages ship; never write into it."""
    folder = tmp_path_factory.mktemp("samples")
    prepare_samples(["--out", str(folder)])
    return folder
