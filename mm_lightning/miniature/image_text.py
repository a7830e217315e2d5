"""Pictures and captions in one space, people in another: the miniature's CLIP, and its judge of what a clip shows.

The vision tower and the text encoder are those that the MagicMirror of the miniature uses; the two projections, which
only the judge needs, lie in a folder of their own.

Letters: B pictures or texts, K clips, F frames, H W pixels, T text tokens, L tokens of the vision tower, E width of an
embedding.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5EncoderModel, T5Tokenizer

from mm_lightning.checkpoint import replace_path
from mm_lightning.encoders.face import clip_pixel_values, load_vision
from mm_lightning.encoders.text import IdentityTokenizer
from mm_lightning.miniature.tokenizer import build_tokenizer

PROJECTIONS = "projections.safetensors"
CONFIG = "config.json"


class ImageFeatures(NamedTuple):
    """What the vision tower says of pictures, before any projection."""

    class_state: Tensor  # (B, D_vit), CLIP's pooled token
    patch_mean: Tensor  # (B, D_vit), mean of the dense features over the patches


def build_text_encoder(
    vocab_size: int, d_model: int = 96, num_layers: int = 2, num_heads: int = 4, d_ff: int = 192
) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=d_model // num_heads,
        d_ff=d_ff,
        num_layers=num_layers,
        num_heads=num_heads,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=24,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def build_image_encoder(
    image_size: int = 64, patch_size: int = 8, hidden_size: int = 96, num_layers: int = 4, num_heads: int = 4
) -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=hidden_size,
        hidden_act="gelu",
    )
    return CLIPVisionModel(config)


class ImageTextModel(nn.Module):
    """A vision tower and a text encoder, with projections into the space that both share and into that of people.

    Args:
        vision: as `mm_lightning.encoders.face` runs it; references of `image_size` pixels go in as they are.
        text_encoder: called without attention mask on all T positions, as CogVideoXPipeline does.
        tokenizer: of the text encoder; the trigger is left out and the class word doubled, as in MagicMirror.
        embed_dim: E.
    """

    def __init__(
        self, vision: CLIPVisionModel, text_encoder: T5EncoderModel, tokenizer: T5Tokenizer, embed_dim: int = 64
    ) -> None:
        super().__init__()
        self.vision, self.text_encoder, self.tokenizer = vision, text_encoder, tokenizer
        self.prompt_tokenizer = IdentityTokenizer(tokenizer, max_length=tokenizer.model_max_length)
        self.image_projection = nn.Linear(vision.config.hidden_size, embed_dim, bias=False)
        self.text_projection = nn.Linear(text_encoder.config.d_model, embed_dim, bias=False)
        self.identity_projection = nn.Linear(vision.config.hidden_size, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # CLIP's

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Prompts with a class word -> (B, T) int64 on the model's device; raises what IdentityTokenizer raises."""
        return self.prompt_tokenizer(prompts).input_ids.to(self.device)

    def image_features(self, pixels: Tensor) -> ImageFeatures:
        """(B, 3, H, W) RGB in [-1, 1], square, of any size."""
        pixel_values = clip_pixel_values(pixels, self.vision.config.image_size).to(self.vision.dtype)
        states = self.vision(pixel_values)
        return ImageFeatures(states.pooler_output, states.last_hidden_state[:, 1:].mean(1))

    def embed_images(self, features: ImageFeatures) -> Tensor:
        """(B, E), of unit length, in the space of texts."""
        return F.normalize(self.image_projection(features.class_state), dim=-1)

    def embed_people(self, features: ImageFeatures) -> Tensor:
        """(B, E), of unit length, alike for pictures of one person."""
        patch_mean = F.layer_norm(features.patch_mean, features.patch_mean.shape[-1:])
        return F.normalize(self.identity_projection(patch_mean), dim=-1)

    def text_states(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D_txt), padding included."""
        return self.text_encoder(input_ids).last_hidden_state

    def embed_texts(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, E), of unit length: the mean state of what is no padding."""
        present = (input_ids != self.tokenizer.pad_token_id).unsqueeze(-1)
        states = (self.text_states(input_ids) * present).sum(1) / present.sum(1)
        return F.normalize(self.text_projection(states), dim=-1)

    def save_pretrained(
        self, model_folder: str | Path, judge_folder: str | Path, text_dtype: torch.dtype = torch.float32
    ) -> None:
        """Write text_encoder/, tokenizer/ and image_encoder/ into `model_folder`, the projections to `judge_folder`.

        Each folder is replaced in one rename. The vision tower stays in single precision, in which it is then used.
        """
        save_part(copy.deepcopy(self.text_encoder).to(text_dtype), Path(model_folder) / "text_encoder")
        save_part(self.tokenizer, Path(model_folder) / "tokenizer")
        save_part(self.vision, Path(model_folder) / "image_encoder")
        save_part(self.projections(), Path(judge_folder))

    def projections(self) -> Projections:
        tensors = {name: tensor for name, tensor in self.state_dict().items() if is_projection(name)}
        return Projections(tensors, self.image_projection.out_features)

    @classmethod
    def from_pretrained(cls, model_folder: str | Path, judge_folder: str | Path) -> ImageTextModel:
        """Load, in fp32 and evaluation mode.

        Raises:
            FileNotFoundError: a part is missing.
            ValueError: the projections belong to networks of other widths.
        """
        model_folder, projections = Path(model_folder), Projections.from_pretrained(judge_folder)
        for name in ("text_encoder", "tokenizer"):
            if not (model_folder / name).is_dir():
                raise FileNotFoundError(f"{model_folder} has no {name}/: name a folder in diffusers' layout.")
        vision = load_vision(model_folder / "image_encoder").float()
        text_encoder = T5EncoderModel.from_pretrained(model_folder / "text_encoder", dtype=torch.float32)
        tokenizer = T5Tokenizer.from_pretrained(model_folder / "tokenizer")
        model = cls(vision, text_encoder, tokenizer, projections.embed_dim)
        projections.load_into(model, judge_folder)
        return model.eval()


class Projections(NamedTuple):
    """What the judge has beside vision tower and text encoder."""

    tensors: dict[str, Tensor]
    embed_dim: int

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True)
        save_file({name: tensor.float().cpu() for name, tensor in self.tensors.items()}, Path(folder) / PROJECTIONS)
        (Path(folder) / CONFIG).write_text(json.dumps({"embed_dim": self.embed_dim}) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Projections:
        """Raises FileNotFoundError if a file is missing."""
        missing = [name for name in (PROJECTIONS, CONFIG) if not (Path(folder) / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} is no judge of the miniature; missing: {', '.join(missing)}. "
                "`python train.py experiment=miniature_clip` trains one."
            )
        config = json.loads((Path(folder) / CONFIG).read_text())
        return cls(load_file(Path(folder) / PROJECTIONS), config["embed_dim"])

    def load_into(self, model: ImageTextModel, folder: str | Path) -> None:
        wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if is_projection(name)}
        if {name: tensor.shape for name, tensor in self.tensors.items()} != wanted:
            raise ValueError(
                f"The projections in {folder} do not fit the encoders: they are of another training than the model."
            )
        model.load_state_dict(self.tensors, strict=False)


def is_projection(name: str) -> bool:
    return name.split(".")[0] in ("image_projection", "text_projection", "identity_projection", "logit_scale")


def save_part(part: CLIPVisionModel | T5EncoderModel | T5Tokenizer | Projections, folder: Path) -> None:
    """`part.save_pretrained(folder)`; what stood there stays whole until the new one is."""
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    part.save_pretrained(fresh)
    replace_path(fresh, folder)


def build_model(embed_dim: int = 64, **vision_sizes: int) -> ImageTextModel:
    """The untrained model, drawn from torch's global generator."""
    tokenizer = build_tokenizer()
    return ImageTextModel(build_image_encoder(**vision_sizes), build_text_encoder(len(tokenizer)), tokenizer, embed_dim)
