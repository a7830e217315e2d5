"""The map of modulation scales, against the blocks' own linear layers."""

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.metrics import silhouette_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from callbacks.modulation_map import ModulationMap, draw_map, modulation_scales, project
from mm_lightning.adapters.transformer import AdapterConfig, MagicMirrorTransformer3DModel
from mm_lightning.backbone import Backbone
from tests.adapters.conftest import randomize
from tests.runs import compose_train, small_overrides

STREAMS = {"video", "text", "face", "video + residual", "text + residual"}


def adapted(folder, **config):
    base = Backbone.from_pretrained(folder, torch.float32, components=("transformer",)).transformer
    return randomize(MagicMirrorTransformer3DModel.from_base(base, AdapterConfig(8, 8, **config)))


def test_scales_are_what_the_blocks_linear_layers_give(tiny_folder):
    transformer, id_embed = adapted(tiny_folder), torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    scales = modulation_scales(transformer, id_embed, num_timesteps=3, total=1000)
    assert set(scales) == STREAMS
    blocks = transformer.transformer_blocks[::2]
    dim = blocks[0].attn1.inner_dim
    assert {tuple(scale.shape) for scale in scales.values()} == {(3, len(blocks), dim)}
    with torch.no_grad():
        temb = F.silu(transformer.time_embedding(transformer.time_proj(torch.tensor([999])).float()))
        both = torch.cat([blocks[1].norm1.linear(temb), blocks[1].norm2.linear(temb)], dim=1)
        video, text = both[0, dim : 2 * dim], both[0, 4 * dim : 5 * dim]
        residual = blocks[1].adapter.can.phi_cond(torch.cat([id_embed, temb, both[:, :dim]], dim=1))[0]
    torch.testing.assert_close(scales["video"][2, 1], video)
    torch.testing.assert_close(scales["text"][2, 1], text)
    torch.testing.assert_close(scales["video + residual"][2, 1], video + residual[dim : 2 * dim])
    torch.testing.assert_close(scales["text + residual"][2, 1], text + residual[4 * dim : 5 * dim])


def test_what_is_ablated_is_not_drawn(tiny_folder):
    without_can = adapted(tiny_folder, conditioned_norm="none")
    assert set(modulation_scales(without_can, None, 2, 1000)) == {"video", "text", "face"}
    without_face = adapted(tiny_folder, face_attention="none")
    assert set(modulation_scales(without_face, torch.ones(1, 8), 2, 1000)) == STREAMS - {"face"}


def test_streams_that_differ_lie_apart():
    generator = torch.Generator().manual_seed(0)
    scales = {
        "video": torch.randn(8, 4, 16, generator=generator),
        "face": 20 + torch.randn(8, 4, 16, generator=generator),
    }
    places = project(scales)
    points = np.concatenate([part.reshape(-1, 2) for part in places.values()])
    assert silhouette_score(points, np.repeat([0, 1], 32)) > 0.5
    axes = draw_map(places).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["video", "face"]


def test_it_is_drawn_at_the_end_of_a_training(tiny_folder, sample_shards, tmp_path):
    overrides = [*small_overrides(tiny_folder, sample_shards), f"paths.run_dir={tmp_path}"]
    cfg = compose_train("experiment=stage1_image", *overrides, "data.batch_size=2", "global_batch_size=2")
    logger = TensorBoardLogger(tmp_path)
    options = {"max_steps": 2, "logger": logger, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[ModulationMap(num_timesteps=4)], limit_val_batches=0, **options)
    trainer.fit(instantiate(cfg.model), instantiate(cfg.data))
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("validation/modulation_scales")] == [2]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="num_timesteps=1"):
        ModulationMap(num_timesteps=1)
