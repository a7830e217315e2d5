"""The two stages of the miniature: the recipe of the full size, its budget, and that the commands train."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file

from mm_lightning.adapters.transformer import MagicMirrorTransformer3DModel
from mm_lightning.encoders.identity import IdentityEncoder
from mm_lightning.miniature.sampling import load_miniature
from mm_lightning.module import select_trainable
from tests.miniature.real_people import write_people
from tests.runs import compose_train, leaves
from tests.test_configs import CLEAN, CONF, audit
from train import train as run_training

train = run_training.__wrapped__
STAGES = ("miniature_stage1", "miniature_stage2")
MAX_TRAINED = 2_900_000  # 6 MB in half precision
# The small backbone's sizes, as design and model card have them.
TRANSFORMER = {
    "num_attention_heads": 4,
    "attention_head_dim": 48,
    "num_layers": 8,
    "time_embed_dim": 64,
    "text_embed_dim": 96,
    "max_text_seq_length": 24,
    "use_rotary_positional_embeddings": True,
}
WIDTHS = {"id_query_dim": 128, "vision_dim": 96, "text_dim": 96, "dim": 192}


def test_model_changes_what_it_says():
    before = ("model=base", "model/id_perceiver=scratch")
    assert audit(CONF, "model", "miniature", before, ("model=miniature",)) == CLEAN


def test_classes_and_losses_are_those_of_the_full_size():
    """Sizes differ, and tau_id is trained from scratch; everything else is the same class with the same settings."""
    full = leaves(compose_train("model=base", "model/id_perceiver=scratch").model)
    small = leaves(compose_train("model=miniature").model)
    assert {key: value for key, value in full.items() if "_target_" in key} == {
        key: value for key, value in small.items() if "_target_" in key
    }
    assert {key: small[key] for key in small if key.startswith("loss.")} == {
        key: full[key] for key in full if key.startswith("loss.")
    }


@pytest.mark.parametrize("stage", STAGES)
def test_both_stages_have_all_losses_of_the_full_size(stage):
    loss = compose_train(f"experiment={stage}").model.loss
    full = compose_train("experiment=stage1_image").model.loss
    assert 0 < loss.identity.prob < full.identity.prob == 1  # dlib's price on two cores
    assert loss.identity_weight > full.identity_weight > 0
    loss.identity_weight = full.identity_weight
    assert loss.identity.min_timestep > full.identity.min_timestep == 0
    loss.identity = full.identity
    assert loss == full


def test_the_trained_part_fits_into_six_megabytes():
    cfg = compose_train("model=miniature", "paths.run_dir=run").model
    with torch.device("meta"):
        base = CogVideoXTransformer3DModel(in_channels=16, out_channels=16, **TRANSFORMER)
        adapter = instantiate(cfg.adapter)
        transformer = MagicMirrorTransformer3DModel.from_base(base, adapter)
        parts = {name: instantiate(cfg[name]) for name in ("id_perceiver", "face_perceiver", "fusion", "id_projection")}
        front_end = IdentityEncoder.build(**parts, **WIDTHS, id_embed_dim=adapter.id_embed_dim)
    select_trainable(transformer, front_end, cfg.frozen)
    trained = [p.numel() for part in (transformer, front_end) for p in part.parameters() if p.requires_grad]
    assert 0.8 * MAX_TRAINED < sum(trained) <= MAX_TRAINED


@pytest.mark.parametrize(("stage", "steps"), [("miniature_stage1", 6000), ("miniature_stage2", 4000)])
def test_one_number_scales_the_whole_recipe(stage, steps):
    whole, part = (compose_train(f"experiment={stage}", f"scale={scale}", "paths.run_dir=run") for scale in (1.0, 0.05))
    for cfg in (whole, part):
        OmegaConf.resolve(cfg)
    assert whole.trainer.max_steps == whole.model.lr_schedule.num_training_steps == steps
    assert part.trainer.max_steps == part.model.lr_schedule.num_training_steps == steps // 20
    assert part.model.lr_schedule.num_warmup_steps * 20 == whole.model.lr_schedule.num_warmup_steps
    assert part.callbacks.checkpoint.every_n_train_steps < part.trainer.max_steps
    assert part.trainer.val_check_interval * 20 == whole.trainer.val_check_interval


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """The runs of both stages, on real faces and the smallest base, two steps each."""
    root = tmp_path_factory.mktemp("miniature")
    people = write_people(root / "data/miniature/cached/train")
    write_people(people.with_name("validation"))
    small = (
        *("scale=0.0004", "global_batch_size=2", "data.num_val_samples=2", "data.num_workers=0"),
        *("model.preview_steps=1", "model.loss.identity.prob=1", "model.loss.identity.max_timestep=1000"),
        *(f"model.base={tiny_folder}", f"paths.data_dir={root / 'data'}", f"paths.output_dir={root / 'outputs'}"),
    )
    for stage in STAGES:
        run = root / "outputs" / stage / "run"
        train(compose_train(f"experiment={stage}", *small, f"paths.run_dir={run}", "trainer.accelerator=cpu"))
    return root / "outputs"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_with_all_losses_and_validates_on_other_people(trained, stage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / stage / "latest/tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"val/loss/velocity", "val/loss/identity", "val/loss"} <= tags
    assert sum(event.value for event in events.Scalars("val/count/identity")) > 0
    assert (trained / stage / "latest/checkpoints/last.ckpt").is_file()


def test_stage_2_starts_from_stage_1_and_samples(trained, tiny_folder):
    first, second = (trained / stage / "latest/adapter" for stage in STAGES)
    assert json.loads((first / "config.json").read_text()) == json.loads((second / "config.json").read_text())
    before, after = (load_file(folder / "adapter.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    assert all((before[name] - after[name]).abs().max() < 0.01 for name in before)  # two short steps away
    assert any((before[name] != after[name]).any() for name in before)
    module = load_miniature(tiny_folder, second)
    assert torch.equal(module.front_end.face_perceiver.queries, after["front_end.face_perceiver.queries"])
