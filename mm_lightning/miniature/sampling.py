"""Clips of people whom the model has never seen: the trained adapter, the people's photos and prompts, the sampling.

Letters: B batch, F frames, F' latent frames, C latent channels, H W pixels, h w latent pixels, R references.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from mm_lightning.adapters.weights import read_adapter_config
from mm_lightning.backbone import check_base
from mm_lightning.config import register_resolvers
from mm_lightning.media import to_uint8
from mm_lightning.miniature.layout import read_samples
from mm_lightning.module import MagicMirrorModule, sample_generators
from mm_lightning.pipeline import identity_guidance
from mm_lightning.preview import build_pipeline, decode_latents, generate_latents
from mm_lightning.types import Batch, IdentityCondition

CONF = Path(__file__).resolve().parents[2] / "conf"
FRONT_END = ("id_perceiver", "face_perceiver", "fusion", "id_projection")


class Subject(NamedTuple):
    """A person of the split, with one clip and its prompt."""

    key: str  # of the sample
    person: str  # identity
    batch: Batch  # of one sample: the real clip, its caption, all reference stills


class Sampling(NamedTuple):
    """How a clip is drawn. The model card says how the validation people chose both guidances and the steps."""

    steps: int = 25
    guidance: float = 2.0
    seed: int = 0
    num_references: int = 2  # stills that the model is shown, the first ones
    identity_guidance: float = 1.5  # contrasts the person with nobody; 1 does not


# What is there --------------------------------------------------------------------------------------------------------


def compose_miniature(*overrides: str) -> DictConfig:
    """`python train.py experiment=miniature_stage2 OVERRIDES`, as a configuration.

    Raises:
        FileNotFoundError: conf/ is not there.
    """
    if not CONF.is_dir():
        raise FileNotFoundError(f"{CONF} is not there: run this from a checkout, installed with `pip install -e .`.")
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=["experiment=miniature_stage2", "paths.run_dir=outputs", *overrides])


def load_miniature(model: str | Path, adapter: str | Path | None, device: str | torch.device = "cpu") -> Any:
    """The miniature with a trained adapter, built from what the adapter's folder records, ready to sample.

    Args:
        model: folder of the backbone, with `image_encoder`.
        adapter: adapter folder, also of an ablation; None for an untrained one.

    Raises:
        FileNotFoundError, ValueError: a folder is missing or something else, or the adapter is another model's.
    """
    check_base(str(model))
    cfg = compose_miniature(f"model.base={Path(model).as_posix()}", "model.init_adapter=null").model
    if adapter is not None:
        recorded = read_adapter_config(adapter)
        cfg = OmegaConf.merge(cfg, {"init_adapter": str(adapter), "adapter": recorded["adapter"]})
        with open_dict(cfg):
            for part in FRONT_END:
                cfg[part] = {**recorded["front_end"][part], "_partial_": True}
    module = instantiate(cfg)
    assert isinstance(module, MagicMirrorModule)
    module.configure_model()
    return module.to(device).eval()


def read_subjects(folder: str | Path, num_people: int, clips_per_person: int = 1) -> list[Subject]:
    """The first people of a set of clips, with every reference still that is stored.

    Raises:
        FileNotFoundError: there is no such set.
        ValueError: it holds fewer people.
    """
    metas = {sample.key: sample.meta for sample in read_samples(Path(folder))}
    overrides = (f"data.shards={Path(folder).as_posix()}", "data.val_shards=null", "data.num_workers=0")
    options = {"data.batch_size": 1, "global_batch_size": 1, "data.num_val_samples": len(metas)}
    options["data.num_references"] = max(len(meta["references"]) for meta in metas.values())
    cfg = compose_miniature(*overrides, *(f"{name}={value}" for name, value in options.items()))
    chosen: dict[str, list[Subject]] = {}
    for batch in instantiate(cfg.data).val_dataloader():
        person = metas[batch.keys[0]]["identity"]
        if person in chosen or len(chosen) < num_people:
            chosen.setdefault(person, []).append(Subject(batch.keys[0], person, batch))
    if len(chosen) < num_people:
        raise ValueError(f"{folder} holds {len(chosen)} people, --num-people asks for {num_people}.")
    return [subjects[i % len(subjects)] for subjects in chosen.values() for i in range(clips_per_person)]


def split_references(batch: Batch, num_shown: int) -> tuple[Tensor, Tensor]:
    """Which stills the model is shown, the first `num_shown`, and which it is compared with: two (R,) bool.

    Raises:
        ValueError: none is left to compare with.
    """
    present = batch.reference_mask[0]
    shown = present & (torch.arange(len(present)) < num_shown)
    if num_shown < 1 or not (present & ~shown).any():
        raise ValueError(
            f"Sample {batch.keys[0]} has {int(present.sum())} reference stills; of these --references={num_shown} are "
            "shown to the model and at least one other is wanted to compare with."
        )
    return shown, present & ~shown


# Sampling -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate_clips(
    module: MagicMirrorModule, batch: Batch, names: Sequence[str], sampling: Sampling, with_identity: bool
) -> NDArray[np.uint8]:
    """Clips of the batch's people by its prompts: (B, F, H, W, 3), as many frames as its boxes have.

    The same names give the same noise, with and without identity.

    Args:
        names: one for each clip, from which its noise follows.
        with_identity: False takes the backbone alone, without adapter and fusion.
    """
    identity = condition(module, batch, sampling.num_references, with_identity)
    nobody = None
    if with_identity and sampling.identity_guidance != 1:
        nobody = condition(module, batch, num_references=0, with_identity=True)
        if sampling.guidance > 1:
            nobody = nobody._replace(prompt_embeds=module.null_prompt_embeds().expand_as(nobody.prompt_embeds))
    with identity_guidance(module.transformer, nobody, sampling.identity_guidance, face_scale=1.0):
        latents = generate_latents(
            build_pipeline(module.backbone, module.transformer),
            latents_shape(module, batch),
            identity,
            module.null_prompt_embeds(),
            sampling.steps,
            sampling.guidance,
            sample_generators(sampling.seed, -1, names),
        )
    return to_uint8(decode_latents(module.backbone.vae, latents))


def condition(module: MagicMirrorModule, batch: Batch, num_references: int, with_identity: bool) -> IdentityCondition:
    """What the transformer is told; without a reference, the null identity."""
    text = module.text(batch.captions)
    if not with_identity:
        return IdentityCondition(text.prompt_embeds, face_hidden_states=None, id_embed=None)
    shown = batch.reference_mask & (torch.arange(batch.reference_mask.shape[1]) < num_references)
    device = module.device
    features = module.features(batch.references.to(device), batch.reference_landmarks.to(device), shown.to(device))
    return module.front_end(features, text)


def latents_shape(module: MagicMirrorModule, batch: Batch) -> torch.Size:
    """(B, F', C, h, w) of the batch's clips."""
    backbone = module.backbone
    num_frames, (height, width) = batch.face_boxes.shape[1], batch.references.shape[-2:]
    ratio, config = backbone.vae_scale_factor_spatial, backbone.vae_config
    num_latent_frames = 1 + (num_frames - 1) // backbone.vae_scale_factor_temporal
    return torch.Size((len(batch.keys), num_latent_frames, config.latent_channels, height // ratio, width // ratio))


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Batches of one -> a batch; cached tensors are left behind."""
    lists = {name: [entry for b in batches for entry in getattr(b, name)] for name in ("keys", "captions")}
    names = ("face_boxes", "face_landmarks", "references", "reference_landmarks", "reference_mask")
    tensors = {name: torch.cat([getattr(b, name) for b in batches]) for name in names}
    return Batch(**lists, **tensors, pixels=None, latent_moments=None, text=None, face=None)


def fingerprint(*parts: Any) -> str:
    """12 hexadecimal digits that follow from plain values and from the contents of files and folders (`Path`s)."""
    digest = hashlib.sha256()
    for part in parts:
        files = sorted(file for file in part.rglob("*") if file.is_file()) if isinstance(part, Path) else []
        files = [part] if isinstance(part, Path) and part.is_file() else files
        digest.update(repr([file.name for file in files] or part).encode())
        for file in files:
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]
