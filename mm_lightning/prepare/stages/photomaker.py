"""PhotoMaker-V2 on diffusers' SDXL: another picture of the person on a photograph.

Letters: K identity tokens, T text tokens, D width of SDXL's text (2048), D_vit width of the vision encoder.
Names of the parameters and the arithmetic of the fusion are those of the published weights.
"""

from __future__ import annotations

import importlib.util
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from mm_lightning.devices import find_device
from mm_lightning.encoders.face import FaceFeatureEncoder, load_vision
from mm_lightning.encoders.packs import DEFAULT_ROOT
from mm_lightning.encoders.perceiver import WHERE_TO_GET_PHOTOMAKER as WHERE_TO_GET
from mm_lightning.encoders.perceiver import IdentityPerceiver, load_strict, load_tensors
from mm_lightning.encoders.recognizer import check_recognizer, load_recognizer
from mm_lightning.encoders.text import whole_words
from mm_lightning.files import fingerprint
from mm_lightning.prepare.stages.identity import one_thread

NEGATIVE_PROMPT = "nsfw, lowres, bad anatomy, bad hands, text, watermark, cartoon, drawing, painting, blurry"


class Prompt(NamedTuple):
    """SDXL's view of a prompt."""

    embeds: Tensor  # (1, T, D)
    pooled: Tensor  # (1, D_pooled)


class PhotoMakerGenerator:
    """SDXL with PhotoMaker-V2's LoRA and identity encoder; the identity enters after the first steps.

    Args:
        base: folder of an SDXL in diffusers' layout.
        photomaker: path of photomaker-v2.bin.
        recognizer, root: whose embedding the identity encoder takes; PhotoMaker-V2 was trained on buffalo_l's ArcFace.
        num_steps, guidance_scale, negative_prompt: of the diffusion.
        merge_share: share of the steps before the identity enters; PhotoMaker's style strength of 20 % is 0.2.
        size: of the picture, pixels.
        trigger: stands after the class word in prompts.
        perceiver_sizes: arguments of `IdentityPerceiver`; None takes the published ones.

    Raises:
        FileNotFoundError: no such weights, told before anything is loaded.
    """

    def __init__(
        self,
        base: str,
        photomaker: str,
        recognizer: str = "buffalo_l",
        num_steps: int = 50,
        guidance_scale: float = 5.0,
        negative_prompt: str = NEGATIVE_PROMPT,
        merge_share: float = 0.2,
        size: int = 1024,
        trigger: str = "img",
        perceiver_sizes: dict[str, int] | None = None,
        root: str = DEFAULT_ROOT,
    ) -> None:
        self.base, self.photomaker = check_sdxl(base), check_photomaker(photomaker)
        check_recognizer(recognizer, root)
        self.recognizer, self.root = recognizer, root
        self.num_steps, self.guidance_scale, self.negative_prompt = num_steps, guidance_scale, negative_prompt
        self.merge_share, self.size, self.trigger = merge_share, size, trigger
        self.perceiver_sizes = perceiver_sizes or {}
        self.info = {"name": "PhotoMaker-V2", "base": self.base.name, "num_steps": num_steps, "recognizer": recognizer}

    def models(self) -> dict[str, str]:
        recognizer = check_recognizer(self.recognizer, self.root)
        return fingerprint([self.photomaker, recognizer, *sorted(self.base.rglob("*.safetensors"))])

    def generate(
        self, picture: np.ndarray, face: dict[str, Any], prompt: str, generator: torch.Generator
    ) -> np.ndarray:
        """RGB uint8 (H, W, 3), `{"box", "landmarks"}` in it, a prompt with the trigger -> RGB uint8 (S, S, 3)."""
        with one_thread(), torch.inference_mode():
            id_tokens = self.identity_tokens(picture, face)  # (K, D)
            plain, merged = self.prompts(prompt, id_tokens)
            negative = self.encode(self.negative_prompt)
            merge_at = int(self.merge_share * self.num_steps)
            result = self.pipeline(
                prompt_embeds=plain.embeds,
                pooled_prompt_embeds=plain.pooled,
                negative_prompt_embeds=negative.embeds,
                negative_pooled_prompt_embeds=negative.pooled,
                num_inference_steps=self.num_steps,
                guidance_scale=self.guidance_scale,
                height=self.size,
                width=self.size,
                generator=generator,
                output_type="np",
                callback_on_step_end=merge_identity(merged, negative, merge_at, self.guidance_scale > 1),
                callback_on_step_end_tensor_inputs=["prompt_embeds", "add_text_embeds"],
            )
        return np.rint(result.images[0] * 255).astype(np.uint8)

    # The person

    def identity_tokens(self, picture: np.ndarray, face: dict[str, Any]) -> Tensor:
        """-> (K, D), from the face's square."""
        x0, y0, x1, y1 = face["box"]
        side = min(round(2 * max(x1 - x0, y1 - y0)), *picture.shape[:2])
        x, y = (
            int(np.clip(round((a + b - side) / 2), 0, length - side))
            for a, b, length in ((x0, x1, picture.shape[1]), (y0, y1, picture.shape[0]))
        )
        square = np.array(picture[y : y + side, x : x + side])
        pixels = torch.from_numpy(square).permute(2, 0, 1)[None].float() / 127.5 - 1
        landmarks = torch.tensor(face["landmarks"], dtype=torch.float32)[None] - torch.tensor([x, y])
        last_hidden_state, _, id_query = self.features.encode(pixels.to(self.device), landmarks.to(self.device))
        return self.perceiver(id_query, last_hidden_state)[0]

    # The prompt

    def prompts(self, prompt: str, id_tokens: Tensor) -> tuple[Prompt, Prompt]:
        """The prompt without the trigger, and the one with the identity fused into its class word."""
        before, after = self.split_at_trigger(prompt)
        plain = self.encode(f"{before}{after}")
        repeated, position = self.encode_repeated(before, after, len(id_tokens))
        embeds = repeated.embeds.clone()
        word = slice(position, position + len(id_tokens))
        embeds[0, word] = self.fusion(embeds[0, word], id_tokens.to(embeds))
        return plain, Prompt(embeds, repeated.pooled)

    def split_at_trigger(self, prompt: str) -> tuple[str, str]:
        triggers = list(whole_words([self.trigger]).finditer(prompt))
        if len(triggers) != 1 or not prompt[: triggers[0].start()].strip():
            raise ValueError(f"The prompt needs {self.trigger!r} once, after the word for the person: {prompt!r}")
        return prompt[: triggers[0].start()].rstrip(), prompt[triggers[0].end() :]

    def encode(self, text: str) -> Prompt:
        pairs = self.encoders()
        return self.encode_ids([tokenizer(text, add_special_tokens=False).input_ids for tokenizer, _ in pairs])

    def encode_repeated(self, before: str, after: str, count: int) -> tuple[Prompt, int]:
        """With the class word's last piece repeated `count` times, and where the first of these stands."""
        rows, positions = [], []
        for tokenizer, _ in self.encoders():
            left, right = (tokenizer(text, add_special_tokens=False).input_ids for text in (before, after))
            rows.append([*left[:-1], *[left[-1]] * count, *right])
            positions.append(len(left))  # the start token shifts all by one
        return self.encode_ids(rows), positions[0]

    def encode_ids(self, rows: list[list[int]]) -> Prompt:
        """Token ids for each of the two text encoders -> as StableDiffusionXLPipeline.encode_prompt has it."""
        embeds = []
        for (tokenizer, encoder), ids in zip(self.encoders(), rows, strict=True):
            length = tokenizer.model_max_length
            ids = [tokenizer.bos_token_id, *ids[: length - 2], tokenizer.eos_token_id]
            ids += [tokenizer.pad_token_id] * (length - len(ids))
            output = encoder(torch.tensor([ids], device=self.device), output_hidden_states=True)
            embeds.append(output.hidden_states[-2])
            pooled = output[0]
        return Prompt(torch.cat(embeds, dim=-1), pooled)

    def encoders(self) -> list[tuple[Any, nn.Module]]:
        pipeline = self.pipeline
        return [(pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2)]

    # The models, loaded when first used

    @property
    def device(self) -> torch.device:
        return find_device()

    @cached_property
    def checkpoint(self) -> dict[str, dict[str, Tensor]]:
        return load_tensors(self.photomaker)

    @cached_property
    def pipeline(self) -> StableDiffusionXLPipeline:
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        pipeline = StableDiffusionXLPipeline.from_pretrained(self.base, torch_dtype=dtype, use_safetensors=True)
        pipeline.set_progress_bar_config(disable=True)
        if lora := self.checkpoint.get("lora_weights"):
            if importlib.util.find_spec("peft") is None:
                raise ModuleNotFoundError("PhotoMaker's LoRA needs the package peft: pip install peft.")
            pipeline.load_lora_weights(dict(lora), adapter_name="photomaker")
            pipeline.fuse_lora()
        return pipeline.to(self.device)

    @cached_property
    def features(self) -> FaceFeatureEncoder:
        recognizer = load_recognizer(self.recognizer, self.root)
        return FaceFeatureEncoder(load_vision(self.photomaker), recognizer).to(self.device)

    @cached_property
    def perceiver(self) -> IdentityPerceiver:
        return IdentityPerceiver.from_photomaker(self.photomaker, **self.perceiver_sizes).to(self.device).eval()

    @cached_property
    def fusion(self) -> Fusion:
        prefix = "fuse_module."
        id_encoder = self.checkpoint["id_encoder"]
        state = {name.removeprefix(prefix): t.float() for name, t in id_encoder.items() if name.startswith(prefix)}
        if "layer_norm.weight" not in state:
            raise ValueError(f"{self.photomaker} has no '{prefix}*' in its id_encoder. {WHERE_TO_GET}")
        fusion = Fusion(len(state["layer_norm.weight"]))
        load_strict(fusion, state, self.photomaker)
        return fusion.to(self.device).eval()


class FusionBlock(nn.Module):
    """Layer norm, linear, GELU, linear."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(in_dim)
        self.fc1, self.fc2 = nn.Linear(in_dim, dim), nn.Linear(dim, dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.layernorm(hidden_states))))


class Fusion(nn.Module):
    """PhotoMaker's FuseModule: what stands for the class word, out of its text and the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp1, self.mlp2 = FusionBlock(2 * dim, dim), FusionBlock(dim, dim)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, text: Tensor, id_tokens: Tensor) -> Tensor:
        """(K, D), (K, D) -> (K, D) in the dtype of `text`."""
        dtype, text, id_tokens = text.dtype, text.float(), id_tokens.float()
        fused = text + self.mlp1(torch.cat([text, id_tokens], dim=-1))
        fused = fused + self.mlp2(fused)
        return self.layer_norm(fused).to(dtype)


def merge_identity(merged: Prompt, negative: Prompt, merge_at: int, guided: bool):
    """A callback for diffusers that puts the prompt with the identity in place after step `merge_at`."""

    def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step + 1 < merge_at:
            return {}
        rows = [negative, merged] if guided else [merged]
        embeds, pooled = (torch.cat(parts) for parts in zip(*rows, strict=True))
        return {"prompt_embeds": embeds, "add_text_embeds": pooled}

    return on_step_end


def check_sdxl(folder: str) -> Path:
    path = Path(folder).expanduser()
    if not (path / "model_index.json").is_file():
        raise FileNotFoundError(
            f"No SDXL in diffusers' layout at {path}: model_index.json is missing. Get one with "
            "`hf download SG161222/RealVisXL_V4.0 --local-dir FOLDER`, or leave out synthesised references."
        )
    return path


def check_photomaker(file: str) -> Path:
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"No PhotoMaker-V2 weights at {path}. {WHERE_TO_GET}")
    return path
