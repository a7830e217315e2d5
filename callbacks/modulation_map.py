"""A map of the modulation scales, as in the paper's analysis: t-SNE over timesteps and layers.

Letters: B people, M timesteps, N adapted blocks, D width of the transformer, c1 width of the identity embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from callbacks.ema import averaged_weights
from callbacks.every_n_steps import EveryNSteps
from callbacks.tensorboard_media import evaluation, first_sample

MARKERS = {"video": "o", "text": "s", "face": "^", "video + residual": "o", "text + residual": "s"}
COLOURS = {
    "video": "Greens",
    "text": "Blues",
    "face": "Oranges",
    "video + residual": "Purples",
    "text + residual": "Reds",
}
LIGHTEST = 0.35  # of a colour map, for the first block


@torch.no_grad()
def modulation_scales(transformer: Any, id_embed: Tensor | None, num_timesteps: int, total: int) -> dict[str, Tensor]:
    """The scales of norm1 in every adapted block, at equal distances over the schedule.

    They follow from timestep, layer and identity alone, so no video passes through the transformer.

    Args:
        transformer: with adapters.
        id_embed: (1, c1), None where CAN is ablated.
        num_timesteps: M. total: steps of the noise schedule.

    Returns:
        Stream -> (M, N, D); streams with residual and the face's where the adapter has them.
    """
    device = next(transformer.parameters()).device
    dtype, blocks = transformer.patch_embed.proj.weight.dtype, transformer.transformer_blocks[::2]
    scales: dict[str, list[Tensor]] = {}
    with gathered(transformer, *blocks):
        for timestep in torch.linspace(0, total - 1, num_timesteps, device=device).round().long():
            temb = transformer._embed_time(timestep[None], None, None, dtype)
            found = [block_scales(block, temb, id_embed) for block in blocks]
            for name in found[0]:
                scales.setdefault(name, []).append(torch.stack([scale[name] for scale in found]))
    return {name: torch.stack(rows).float().cpu() for name, rows in scales.items()}


@contextmanager
def gathered(*modules: Any) -> Iterator[None]:
    """Whole weights of modules that FSDP2 has sharded, for what is called beside their forward."""
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def block_scales(block: Any, temb: Tensor, id_embed: Tensor | None) -> dict[str, Tensor]:
    """Stream -> (D,) of one block, from `MagicMirrorBlock.modulations` and the face branch's own norm."""
    video, text, *_ = block.modulations(temb, None, 1.0)
    scales = {"video": video.scale, "text": text.scale}
    if id_embed is not None:
        video, text, *_ = block.modulations(temb, id_embed.to(temb.dtype), 1.0)
        scales |= {"video + residual": video.scale, "text + residual": text.scale}
    if block.adapter.face is not None:
        dim = video.scale.shape[-1]
        scales["face"] = block.adapter.face.modulation(temb)[:, dim : 2 * dim]  # shift, scale, gate, ...
    return {name: scale.flatten() for name, scale in scales.items()}


def project(scales: dict[str, Tensor], seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """t-SNE of all points together: stream -> (M, N, 2)."""
    from sklearn.manifold import TSNE

    points = np.concatenate([scale.flatten(0, 1).numpy() for scale in scales.values()])
    perplexity = min(30.0, (len(points) - 1) / 3)
    flat = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)
    ends = np.cumsum([scale.shape[0] * scale.shape[1] for scale in scales.values()])[:-1]
    return {
        name: part.reshape(*scale.shape[:2], 2)
        for (name, scale), part in zip(scales.items(), np.split(flat, ends), strict=True)
    }


def draw_map(places: dict[str, NDArray[np.float32]]) -> Figure:
    """A colour for each stream, darker with the layer, larger with the timestep."""
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, points in places.items():
        num_timesteps, num_blocks, _ = points.shape
        shade = LIGHTEST + (1 - LIGHTEST) * np.tile(np.linspace(0, 1, num_blocks), num_timesteps)
        size = np.repeat(np.linspace(8, 40, num_timesteps), num_blocks)
        x, y = points.reshape(-1, 2).T
        style = {"cmap": COLOURS[name], "vmin": 0, "vmax": 1, "marker": MARKERS[name], "label": name, "alpha": 0.8}
        axes.scatter(x, y, s=size, c=shade, **style)
    axes.set(xticks=[], yticks=[], title="modulation scales: darker with the layer, larger with the timestep")
    legend = axes.legend(fontsize="small")
    for handle in legend.legend_handles:
        handle.set_array(np.array([0.8]))
        handle.set_sizes([30])
    return figure


class ModulationMap(EveryNSteps):
    """Draws the map of modulation scales for the first person seen, every n optimizer steps and at the end, as
    `validation/modulation_scales` in TensorBoard.

    Args:
        every_n_steps: optimizer steps between maps; 0 draws only at the end.
        num_timesteps: M.
    """

    def __init__(self, every_n_steps: int = 0, num_timesteps: int = 20) -> None:
        super().__init__(every_n_steps)
        if num_timesteps < 2:
            raise ValueError(f"num_timesteps={num_timesteps}: give at least 2.")
        self.num_timesteps = num_timesteps
        self._batch: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._batch is None:
            self._batch = move_data_to_device(first_sample(batch), "cpu")

    @torch.no_grad()
    def act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank zero draws."""
        batch = move_data_to_device(self._batch, pl_module.device)
        with averaged_weights(trainer, pl_module), evaluation(pl_module), trainer.precision_plugin.forward_context():
            identity = pl_module.front_end(pl_module.encode_features(batch), pl_module.encode_text(batch))
            total = pl_module.diffusion.num_train_timesteps
            scales = modulation_scales(pl_module.transformer, identity.id_embed, self.num_timesteps, total)
        if not trainer.is_global_zero:
            return
        figure = draw_map(project(scales))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("validation/modulation_scales", figure, trainer.global_step)
                logger.experiment.flush()
