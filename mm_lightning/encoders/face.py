"""What the frozen networks say of the reference pictures: dense features `f` (CLIP) and the identity query `q_id`.

Letters: B batch, R references per sample, n present references of the batch, S side of a reference picture in pixels,
s side of the vision encoder's input, L tokens and D_vit width of the vision encoder, E width of the face embedding.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mm_lightning.encoders.perceiver import load_photomaker_v2, load_strict
from mm_lightning.types import FaceFeatures

CLIP_HEAD_DIM = 64  # of every OpenAI CLIP; a state dict does not tell
WHERE_TO_GET_CLIP = (
    "Get one with `hf download openai/clip-vit-large-patch14 --local-dir FOLDER`, or name the file photomaker-v2.bin, "
    "which holds the vision tower that PhotoMaker-V2's identity perceiver was trained on."
)


class FaceFeatureEncoder(nn.Module):
    """The frozen F_feat and F_id. Both stay in evaluation mode and run in the precision they were loaded in, outside of
    autocast, so that features cached in shards and features computed on the fly are the same.

    Args:
        vision: a CLIP vision tower, see `load_vision`.
        recognizer: has `embed(pixels (n, 3, S, S), landmarks (n, 5, 2)) -> (n, E)` and `embed_dim`, the E.
    """

    def __init__(self, vision: CLIPVisionModel, recognizer: nn.Module):
        super().__init__()
        self.vision, self.recognizer = vision, recognizer
        self.requires_grad_(False)
        self.train(False)

    @property
    def device(self) -> torch.device:
        """Of the vision tower; a pipeline asks its parts."""
        return self.vision.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vision.dtype

    def train(self, mode: bool = True) -> FaceFeatureEncoder:
        """Frozen: evaluation mode whatever is asked for (a recogniser has batch norms)."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, references: Tensor, reference_landmarks: Tensor, reference_mask: Tensor) -> FaceFeatures:
        """Encode the present references once; what stands for absent ones is zero.

        Args:
            references: (B, R, 3, S, S) RGB in [-1, 1], the whole picture.
            reference_landmarks: (B, R, 5, 2) in pixels of the picture, (0, 0) the centre of the first.
            reference_mask: (B, R) bool.

        Raises ValueError for pictures that are not square.
        """
        present = references[reference_mask], reference_landmarks[reference_mask]  # (n, 3, S, S), (n, 5, 2)
        with torch.autocast(references.device.type, enabled=False):
            last, penultimate, id_query = self.encode(*present)
        return FaceFeatures(
            last_hidden_state=scatter_present(last, reference_mask),
            penultimate_hidden_state=scatter_present(penultimate, reference_mask),
            id_query=scatter_present(id_query, reference_mask),
            reference_mask=reference_mask,
        )

    def encode(self, pictures: Tensor, landmarks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, 3, S, S), (n, 5, 2) -> last and penultimate states (n, L, D_vit), identity query (n, E)."""
        config, dtype = self.vision.config, self.vision.dtype
        if len(pictures) == 0:  # transformers' attention does not take an empty batch
            num_tokens = (config.image_size // config.patch_size) ** 2 + 1
            empty = pictures.new_zeros(0, num_tokens, config.hidden_size, dtype=dtype)
            return empty, empty, pictures.new_zeros(0, self.recognizer.embed_dim)
        pixel_values = clip_pixel_values(pictures, config.image_size).to(dtype)
        # PhotoMaker-V2 reads the last states as they are, without the layer norm that CLIP has for pooling.
        hidden_states = self.vision(pixel_values, output_hidden_states=True).hidden_states
        return hidden_states[-1], hidden_states[-2], self.recognizer.embed(pictures, landmarks)


def clip_pixel_values(pictures: Tensor, image_size: int) -> Tensor:
    """CLIPImageProcessor for square pictures in tensors: antialiased bicubic, then CLIP's mean and deviation.

    (n, 3, S, S) in [-1, 1] -> (n, 3, s, s) float32. The library differs in that it rounds and clips after each axis.
    Raises ValueError for pictures that are not square.
    """
    if pictures.shape[-1] != pictures.shape[-2]:
        raise ValueError(
            f"Reference pictures must be square, these are {pictures.shape[-1]}x{pictures.shape[-2]} (width x height): "
            "crop or pad them, the landmarks with them."
        )
    pictures = F.interpolate(pictures.float(), size=(image_size, image_size), mode="bicubic", antialias=True)
    mean, std = (pictures.new_tensor(v)[:, None, None] for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pictures.clamp(-1, 1) * 0.5 + 0.5 - mean) / std  # bicubic overshoots at edges


def scatter_present(values: Tensor, mask: Tensor) -> Tensor:
    """values (n, ...) of the True places of mask (B, R) -> (B, R, ...), zero elsewhere."""
    scattered = values.new_zeros(*mask.shape, *values.shape[1:])
    scattered[mask] = values
    return scattered


def check_vision(path: str | Path) -> Path:
    """What `load_vision` can tell before it reads weights; raises the same."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No CLIP vision encoder at {path}. {WHERE_TO_GET_CLIP}")
    if path.is_dir():
        check_vision_folder(path)
    return path


def load_vision(path: str | Path) -> CLIPVisionModel:
    """A CLIP vision tower from a folder in transformers' layout or from the file photomaker-v2.bin.

    Raises FileNotFoundError if there is neither, ValueError if it holds something else, before weights are read
    where the config tells.
    """
    path = check_vision(path)
    if path.is_dir():
        return load_vision_folder(path)
    state, _ = load_photomaker_v2(path)
    state.pop("embeddings.position_ids", None)  # a constant that older transformers saved
    vision = CLIPVisionModel(vision_config(state, path))
    load_strict(vision, state, path)
    return vision.eval()


def check_vision_folder(folder: Path) -> None:
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is no CLIP folder. {WHERE_TO_GET_CLIP}")
    model_type = json.loads(config_file.read_text()).get("model_type")
    if model_type not in ("clip", "clip_vision_model"):
        raise ValueError(f"{config_file} describes a {model_type!r}, not a CLIP. {WHERE_TO_GET_CLIP}")


def load_vision_folder(folder: Path) -> CLIPVisionModel:
    try:
        vision, info = CLIPVisionModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except OSError as error:
        raise FileNotFoundError(f"{folder} has a config.json but no weights. {WHERE_TO_GET_CLIP}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"The weights in {folder} lack {len(missing)} tensors of the vision tower, such as {missing[0]}."
        )
    return vision.eval()


def vision_config(state: dict[str, Tensor], path: Path) -> CLIPVisionConfig:
    """The sizes of a CLIP vision tower, told by the shapes of its tensors."""
    try:
        hidden_size, _, patch_size, _ = state["embeddings.patch_embedding.weight"].shape
        num_patches = len(state["embeddings.position_embedding.weight"]) - 1
        intermediate_size = len(state["encoder.layers.0.mlp.fc1.weight"])
    except KeyError as error:
        raise ValueError(f"{path} lacks the vision tower's tensor {error}: the file is incomplete.") from None
    return CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=len({name.split(".")[2] for name in state if name.startswith("encoder.layers.")}),
        num_attention_heads=hidden_size // CLIP_HEAD_DIM,
        image_size=patch_size * round(num_patches**0.5),
        patch_size=patch_size,
    )
