"""Photos of one person and a prompt -> a video of that person: a diffusers pipeline.

    pipe = MagicMirrorPipeline.from_pretrained("THUDM/CogVideoX-5b", adapter="run/adapter", torch_dtype=torch.bfloat16)
    video = pipe("A woman smiles in the rain", reference_images=["her.jpg"]).frames[0]

Letters: B videos, F frames, F' latent frames, C latent channels, h w latent pixels, R reference photos, T text tokens,
D_txt width of T5.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from diffusers.pipelines.cogvideo.pipeline_output import CogVideoXPipelineOutput
from torch import Tensor, nn
from transformers import T5EncoderModel, T5Tokenizer

from mm_lightning.adapters.transformer import AdapterConfig, MagicMirrorTransformer3DModel
from mm_lightning.adapters.weights import CONFIG_NAME, WEIGHTS_NAME, AdapterWeights, check_same, read_adapter_config
from mm_lightning.backbone import Backbone, check_base, check_frames, check_size, fetch, local_folder, read_base_id
from mm_lightning.encoders.detector import check_detector, load_detector
from mm_lightning.encoders.face import FaceFeatureEncoder, check_vision, load_vision
from mm_lightning.encoders.identity import IdentityEncoder
from mm_lightning.encoders.packs import DEFAULT_ROOT
from mm_lightning.encoders.photos import Photo, read_references
from mm_lightning.encoders.recognizer import check_recognizer, load_recognizer
from mm_lightning.encoders.text import IdentityTokenizer
from mm_lightning.types import FaceFeatures, IdentityCondition, TextFeatures

PARTS = "mm_lightning.encoders."  # an adapter's config may name classes below this and no others
PRETRAINED = "from_photomaker"  # a part that brings its own weights, beside those of the adapter
ADAPTER_FOLDER, VISION_FOLDER = "adapter", "image_encoder"


class MagicMirrorPipeline(CogVideoXPipeline):
    """CogVideoX's pipeline that also takes photos of a face. Everything that diffusers' pipelines offer works here too:
    schedulers, offloading, VAE tiling and slicing, callbacks, progress bar.

    Args:
        tokenizer, text_encoder, vae, transformer, scheduler: CogVideoX's, the transformer with adapters.
        face_encoder: F_feat and F_id.
        front_end: perceivers, fusion, projection.
        record: what the adapter's config.json says.
        detector: see `load_detector`; None looks for no faces, `identity` is then given as features.
        extra_identity_words: class words beside the built-in ones.
    """

    model_cpu_offload_seq = "face_encoder->text_encoder->front_end->transformer->vae"
    # They are small, and called by more than their forward.
    _exclude_from_cpu_offload = ["face_encoder", "front_end"]

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKLCogVideoX,
        transformer: MagicMirrorTransformer3DModel,
        scheduler: CogVideoXDDIMScheduler | CogVideoXDPMScheduler,
        face_encoder: FaceFeatureEncoder,
        front_end: IdentityEncoder,
        record: Mapping[str, Any] | None = None,
        detector: Callable[..., Any] | None = None,
        extra_identity_words: Sequence[str] = (),
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)
        self.register_modules(face_encoder=face_encoder, front_end=front_end)
        self.record, self.detector = dict(record or {}), detector
        self.adapter_folder: Path | None = None  # where the adapter was read
        self.identity_tokenizer = IdentityTokenizer(
            tokenizer,
            max_length=transformer.config.max_text_seq_length,
            extra_identity_words=extra_identity_words,
        )

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        adapter: str | Path | None = None,
        torch_dtype: torch.dtype | str = torch.float32,
        vision: str | Path | None = None,
        recognizer: str | None = None,
        detector: str = "auto",
        root: str = DEFAULT_ROOT,
        extra_identity_words: Sequence[str] = (),
    ) -> MagicMirrorPipeline:
        """Load base, adapter and face networks; what is missing or does not fit is told before anything large is read.

        Args:
            base: CogVideoX in diffusers' layout, or a folder that `save_pretrained` wrote; a folder or a hub id.
            adapter: folder or hub id; None takes `adapter/` inside the base.
            torch_dtype: of base and adapter; the front-end stays in float32. CogVideoX-5B gives NaN in float16.
            vision: CLIP vision tower, a folder or PhotoMaker-V2's file; None takes `image_encoder/` inside the base.
            recognizer: as it was in training; None takes the one that the adapter names.
            detector: finds faces; see `load_detector`.
            root: insightface's folder.

        Raises:
            FileNotFoundError: something is not there.
            ValueError: the adapter is another base's, or a part is of another kind.
        """
        parts = find_parts(base, adapter, vision, recognizer, root)
        check_detector(detector, root)
        record, factories = parts.record, front_end_factories(parts.record["front_end"], parts.vision)
        backbone = Backbone.from_pretrained(base, torch_dtype, vae_dtype=torch_dtype)
        face_encoder = FaceFeatureEncoder(load_vision(parts.vision), load_recognizer(parts.recognizer, root))
        transformer = MagicMirrorTransformer3DModel.from_base(
            backbone.transformer, AdapterConfig(**record[ADAPTER_FOLDER])
        )
        front_end = build_front_end(factories, transformer, face_encoder)
        load_adapter(parts.adapter_folder, transformer, front_end, pretrained_prefixes(record["front_end"]))
        pipeline = cls(
            backbone.tokenizer, backbone.text_encoder, backbone.vae, transformer.eval(), backbone.scheduler,
            face_encoder, front_end.eval(), record, load_detector(detector, root), extra_identity_words,
        )  # fmt: skip
        pipeline.adapter_folder = parts.adapter_folder
        return pipeline

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write a folder that `from_pretrained` loads, and plain `CogVideoXPipeline.from_pretrained` too.

        The base in diffusers' layout, `image_encoder/` and `adapter/`. The recogniser is recorded by its name.

        Args:
            **kwargs: of diffusers' `save_pretrained`, for the base, such as `max_shard_size`.

        Raises:
            ValueError: files that `from_pretrained` would not read.
        """
        if kwargs.get("variant") is not None or not kwargs.get("safe_serialization", True):
            raise ValueError("Weights are read from safetensors without a variant: leave these two arguments out.")
        folder = Path(save_directory)
        parts = (self.tokenizer, self.text_encoder, self.vae, plain_transformer(self.transformer), self.scheduler)
        CogVideoXPipeline(*parts).save_pretrained(folder, **kwargs)
        self.face_encoder.vision.save_pretrained(folder / VISION_FOLDER)
        state = adapter_state(self.transformer, self.front_end)
        AdapterWeights(self.record, state).save_pretrained(folder / ADAPTER_FOLDER)

    # The person -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_references(
        self, reference_images: Photo | Sequence[Photo], face_index: int | None = None
    ) -> FaceFeatures:
        """Photos of one person -> what the frozen face networks say of them, for `identity=`; once for many videos.

        Args:
            reference_images: files, PIL pictures or RGB uint8 arrays (H, W, 3).
            face_index: which face of a photo with several, from the left; None takes the largest, with a warning.

        Raises:
            FileNotFoundError, ValueError: an unreadable photo, no face in it, no such face, or one too small.
        """
        if self.detector is None:
            raise ValueError("This pipeline has no face detector: load it with detector='auto', or give `identity`.")
        single = not isinstance(reference_images, Sequence) or isinstance(reference_images, str)
        references = read_references([reference_images] if single else reference_images, self.detector, face_index)
        device = self._execution_device
        return self.face_encoder(*(tensor.to(device) for tensor in references))

    def encode_identity(
        self, prompts: Sequence[str], identity: FaceFeatures, face_scale: float, drop_identity: bool = False
    ) -> IdentityCondition:
        """What the transformer is told: prompts with the identity fused in (equation 5), face tokens, identity vector.

        Args:
            identity: of one person, batch 1.
            face_scale: also of the fusion, from 0 (T5's own states) to 1.
            drop_identity: the null identity, as training had it for guidance.
        """
        device, dtype, count = self._execution_device, self.transformer.dtype, len(prompts)
        tokens = self.identity_tokenizer(list(prompts))
        prompt_embeds = self.text_encoder(tokens.input_ids.to(device))[0]
        text = TextFeatures(prompt_embeds, tokens.id_token_mask.to(prompt_embeds.device))
        features = FaceFeatures(*(tensor.to(device).expand(count, *tensor.shape[1:]) for tensor in identity))
        drop = torch.full((count,), drop_identity, device=device)
        condition = self.front_end(features, text, drop)
        fused = torch.lerp(prompt_embeds.float(), condition.prompt_embeds.float(), face_scale)
        condition = condition._replace(prompt_embeds=fused)
        return IdentityCondition(*(tensor if tensor is None else tensor.to(dtype) for tensor in condition))

    # Generating -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        reference_images: Photo | Sequence[Photo] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        face_scale: float = 1.0,
        identity_guidance_scale: float = 1.0,
        num_videos_per_prompt: int = 1,
        face_index: int | None = None,
        identity: FaceFeatures | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> CogVideoXPipelineOutput | tuple:
        """Videos of one person, one or several for each prompt.

        Args:
            prompt: with a word for the person; `img` after it marks the word, otherwise the first one is taken.
            reference_images: photos of the person, see `encode_references`; several are averaged.
            negative_prompt: one, or one for each prompt; the empty one by default.
            height, width: pixels, multiples of 16; by default what the base was trained on.
            num_frames: 4k+1, at 8 per second; 1 gives a picture; by default what the base was trained on.
            guidance_scale: of the text, constant over the steps unless `use_dynamic_cfg` is set; up to 1, none.
            face_scale: strength of the adapter; 0 is the plain CogVideoX, bit for bit.
            identity_guidance_scale: contrasts the person with nobody; 1 does not, and costs nothing; other values
                take half as long again with text guidance, and twice as long without it.
            num_videos_per_prompt: videos of one prompt follow one another.
            face_index: of photos with several faces, from the left.
            identity: what `encode_references` gave, in place of photos.
            generator: one, or one for each video.
            attention_kwargs: passed along, beside the identity.
            **kwargs: those of `CogVideoXPipeline`: `timesteps`, `eta`, `latents`, `output_type`, `return_dict`,
                `use_dynamic_cfg`, `callback_on_step_end`, ...

        Raises:
            FileNotFoundError, ValueError: what `encode_references` raises; a prompt without a word for a person, frames
                other than 4k+1, a size that is no multiple of a patch.
        """
        height, width, num_frames = self.check_shape(height, width, num_frames)
        prompts = self.repeat_prompts(prompt, num_videos_per_prompt)
        negative = self.repeat_negative(negative_prompt, len(prompts), num_videos_per_prompt)
        kwargs |= {"height": height, "width": width, "num_frames": num_frames, "guidance_scale": guidance_scale}
        kwargs |= {"num_inference_steps": num_inference_steps, "generator": generator}
        kwargs = {"max_sequence_length": self.transformer.config.max_text_seq_length} | kwargs
        if face_scale == 0:
            plain = [self.without_trigger(text) for text in prompts]
            negative = [negative] * len(plain) if isinstance(negative, str) else negative
            return super().__call__(plain, negative, attention_kwargs=attention_kwargs, **kwargs)
        for text in prompts:
            self.identity_tokenizer.find_class_word(text)
        if identity is None:
            if reference_images is None:
                raise ValueError("reference_images is missing: give at least one photo, or face_scale=0 for none.")
            identity = self.encode_references(reference_images, face_index)
        return self.generate(prompts, negative, identity, face_scale, identity_guidance_scale, attention_kwargs, kwargs)

    def generate(
        self,
        prompts: list[str],
        negative: str | list[str],
        identity: FaceFeatures,
        face_scale: float,
        identity_guidance_scale: float,
        attention_kwargs: dict[str, Any] | None,
        kwargs: dict[str, Any],
    ) -> CogVideoXPipelineOutput | tuple:
        """The stock loop, told about the person; the same face stands in both halves of its guidance."""
        with_text_guidance = kwargs["guidance_scale"] > 1
        condition = self.encode_identity(prompts, identity, face_scale)
        embeds = {"prompt_embeds": condition.prompt_embeds}
        if with_text_guidance:
            embeds["negative_prompt_embeds"] = self.encode_negative(negative, len(prompts))
        told = condition.attention_kwargs(num_copies=2 if with_text_guidance else 1)
        told |= {**(attention_kwargs or {}), "face_scale": face_scale}
        nobody = None
        if identity_guidance_scale != 1:
            nobody = self.encode_identity(prompts, identity, face_scale, drop_identity=True)
            if with_text_guidance:
                nobody = nobody._replace(prompt_embeds=embeds["negative_prompt_embeds"])
        with identity_guidance(self.transformer, nobody, identity_guidance_scale, face_scale):
            return super().__call__(None, None, **embeds, attention_kwargs=told, **kwargs)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, F', C, h, w) -> pixels (B, 3, F, H, W), F = 4 (F' - 1) + 1.

        diffusers' VAE turns an even number of latent frames into three more: it takes the first, which stands for one
        frame, for one of the others. These leading ones are left out.

        Raises:
            ValueError: the VAE decodes in tiles that do not fit together.
        """
        num_frames = (latents.shape[1] - 1) * self.vae_scale_factor_temporal + 1
        pixels = super().decode_latents(latents)[:, :, -num_frames:]
        found, wanted = (tuple(pixels.shape[-2:]), tuple(n * self.vae_scale_factor_spatial for n in latents.shape[-2:]))
        if found != wanted:
            raise ValueError(
                f"The VAE's tiles make {found} pixels of {wanted}: give `vae.enable_tiling` overlaps of whole latents, "
                "as `mm_lightning.generate.enable_tiling` does."
            )
        return pixels

    def check_shape(self, height: int | None, width: int | None, num_frames: int | None) -> tuple[int, int, int]:
        """With the base's defaults filled in; raises ValueError as `__call__`."""
        config = self.transformer.config
        height = height or config.sample_height * self.vae_scale_factor_spatial
        width = width or config.sample_width * self.vae_scale_factor_spatial
        num_frames = config.sample_frames if num_frames is None else num_frames
        check_frames(num_frames, self.vae_scale_factor_temporal)
        check_size(height, width, self.vae_scale_factor_spatial * config.patch_size)
        return height, width, num_frames

    def repeat_prompts(self, prompt: str | list[str], num_videos: int) -> list[str]:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or num_videos < 1:
            raise ValueError(f"{len(prompts)} prompts, num_videos_per_prompt={num_videos}: at least one of each.")
        return [text for text in prompts for _ in range(num_videos)]

    def repeat_negative(self, negative: str | list[str] | None, count: int, num_videos: int) -> str | list[str] | None:
        """As many as there are videos, where one was given for each prompt."""
        if negative is None or isinstance(negative, str):
            return negative
        repeated = [text for text in negative for _ in range(num_videos)]
        if len(repeated) != count:
            raise ValueError(
                f"{len(negative)} negative prompts for {count // num_videos} prompts: give one, or as many."
            )
        return repeated

    def encode_negative(self, negative: str | list[str] | None, count: int) -> Tensor:
        """(B, T, D_txt)."""
        texts = [negative or ""] if negative is None or isinstance(negative, str) else negative
        tokens = self.identity_tokenizer.plain(list(texts))
        embeds = self.text_encoder(tokens.input_ids.to(self._execution_device))[0].to(self.transformer.dtype)
        return embeds.expand(count, -1, -1)

    def without_trigger(self, prompt: str) -> str:
        """The prompt as plain CogVideoX should read it; also one that names no person."""
        try:
            return self.identity_tokenizer.find_class_word(prompt).prompt
        except ValueError:
            return prompt


@contextmanager
def identity_guidance(
    transformer: nn.Module, nobody: IdentityCondition | None, scale: float, face_scale: float
) -> Iterator[None]:
    """Guidance on the identity, inside the stock loop: v <- v + (scale - 1) * (v_u - v_u(nobody)).

    v_u is the half with the negative prompt, or all where there is no guidance on the text. Then the text's guidance w
    gives v(-, nobody) + scale * (v(-, who) - v(-, nobody)) + w * (v(text, who) - v(-, who)): guidance on two conditions
    as in InstructPix2Pix (arXiv:2211.09800, equation 3), the identity first.

    Args:
        nobody: the null identity, of B videos; None adds nothing.
    """
    if nobody is None:
        yield
        return

    def contrast(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple[Tensor]) -> tuple[Tensor]:
        [velocity] = output  # (B or 2B, F', C, h, w)
        count = len(nobody.prompt_embeds)
        told = kwargs | {
            "hidden_states": kwargs["hidden_states"][:count],
            "timestep": kwargs["timestep"][:count],
            "encoder_hidden_states": nobody.prompt_embeds,
            "attention_kwargs": kwargs["attention_kwargs"] | nobody.attention_kwargs() | {"face_scale": face_scale},
        }
        difference = (scale - 1) * (velocity[:count] - module.forward(*args, **told)[0])
        return (velocity + difference.repeat(len(velocity) // count, 1, 1, 1, 1),)

    handle = transformer.register_forward_hook(contrast, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# Loading and saving ---------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """What a pipeline is made from, found and checked before anything large is read."""

    adapter_folder: Path
    record: dict[str, Any]  # the adapter's config.json
    vision: Path
    recognizer: str


def find_parts(
    base: str | Path, adapter: str | Path | None, vision: str | Path | None, recognizer: str | None, root: str
) -> Parts:
    """
    Raises:
        FileNotFoundError: something is not there.
        ValueError: the adapter is another base's, or a part is of another kind.
    """
    folder = check_base(base)
    adapter_folder = find_adapter(folder, adapter)
    record = read_adapter_config(adapter_folder)
    there, here = ({"config_sha256": base_id["config_sha256"]} for base_id in (record["base"], read_base_id(base)))
    check_same(adapter_folder, there, here, "base model")
    recognizer = recognizer or record["recognizer"]
    check_recognizer(recognizer, root)
    return Parts(adapter_folder, record, check_vision(find_vision(folder, vision, record)), recognizer)


def find_adapter(base_folder: Path, adapter: str | Path | None) -> Path:
    """The adapter's folder, fetched where a hub id is given.

    Raises:
        FileNotFoundError: there is none.
    """
    if adapter is None:
        if not (base_folder / ADAPTER_FOLDER).is_dir():
            raise FileNotFoundError(
                f"{base_folder} has no {ADAPTER_FOLDER}/ of its own: give adapter=, a folder or a hub id."
            )
        return base_folder / ADAPTER_FOLDER
    if Path(adapter).expanduser().is_dir():
        return Path(adapter).expanduser()
    try:
        is_hub_id = local_folder(adapter) is None
    except FileNotFoundError:
        is_hub_id = False
    if not is_hub_id:
        raise FileNotFoundError(f"No adapter folder at {adapter}, and it is no hub id (OWNER/NAME) either.")
    return fetch(str(adapter), (CONFIG_NAME, WEIGHTS_NAME))


def find_vision(base_folder: Path, vision: str | Path | None, record: Mapping[str, Any]) -> Path:
    """
    Raises:
        FileNotFoundError: none was given, and none lies inside the base.
    """
    if vision is not None:
        return Path(vision)
    if (base_folder / VISION_FOLDER).is_dir():
        return base_folder / VISION_FOLDER
    raise FileNotFoundError(
        f"The adapter was trained with the vision tower {record.get('vision')!r}: give its path as vision=."
    )


def front_end_factories(parts: Mapping[str, Mapping[str, Any]], vision: Path) -> dict[str, Callable[..., nn.Module]]:
    """What an adapter's config says of the front-end -> factories for `IdentityEncoder.build`.

    Raises:
        ValueError: a part is no class of this package.
    """
    return {name: part_factory(part, vision) for name, part in parts.items()}


def part_factory(part: Mapping[str, Any], vision: Path) -> Callable[..., nn.Module]:
    target, sizes = part["_target_"], {name: value for name, value in part.items() if name != "_target_"}
    if not target.startswith(PARTS):
        raise ValueError(f"The adapter's config names {target!r}; parts of a front-end lie in {PARTS}*.")
    module, _, name = target.removeprefix(PARTS).partition(".")
    found: Any = importlib.import_module(PARTS + module)
    for attribute in name.split("."):
        found = getattr(found, attribute, None)
    owner = getattr(found, "__self__", found)  # of a class method, the class
    if not (isinstance(owner, type) and issubclass(owner, nn.Module)):
        raise ValueError(f"The adapter's config names {target!r}, which is no module of this version.")
    return partial(found, **({"path": vision} if name.endswith(PRETRAINED) else {}), **sizes)


def build_front_end(
    factories: Mapping[str, Callable[..., nn.Module]],
    transformer: MagicMirrorTransformer3DModel,
    face_encoder: FaceFeatureEncoder,
) -> IdentityEncoder:
    config = transformer.config
    return IdentityEncoder.build(
        **factories,
        id_query_dim=face_encoder.recognizer.embed_dim,
        vision_dim=face_encoder.vision.config.hidden_size,
        text_dim=config.text_embed_dim,
        dim=config.num_attention_heads * config.attention_head_dim,
        id_embed_dim=transformer.adapter_config.id_embed_dim,
    )


def pretrained_prefixes(parts: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of parts that bring weights of their own, which an adapter need not hold."""
    return tuple(f"front_end.{name}." for name, part in parts.items() if part["_target_"].endswith(PRETRAINED))


def adapter_state(transformer: MagicMirrorTransformer3DModel, front_end: IdentityEncoder) -> dict[str, nn.Parameter]:
    """All that an adapter folder may hold, by the names it has there."""
    state = {f"transformer.{name}": parameter for name, parameter in transformer.adapter_parameters().items()}
    return state | {f"front_end.{name}": parameter for name, parameter in front_end.named_parameters()}


@torch.no_grad()
def load_adapter(
    folder: Path, transformer: MagicMirrorTransformer3DModel, front_end: IdentityEncoder, optional: tuple[str, ...] = ()
) -> None:
    """Copy an adapter's weights; `optional` names the beginnings of what it may lack.

    Raises:
        ValueError: names or shapes that do not fit.
    """
    targets = adapter_state(transformer, front_end)
    stored = AdapterWeights.from_pretrained(folder).state
    absent = sorted(name for name in targets.keys() - stored.keys() if not name.startswith(optional or ("\0",)))
    unknown = sorted(stored.keys() - targets.keys())
    shapes = sorted(n for n in targets.keys() & stored.keys() if targets[n].shape != stored[n].shape)
    if absent or unknown or shapes:
        raise ValueError(
            f"{folder} does not fit this model: {len(absent)} names missing ({', '.join(absent[:3])}), {len(unknown)} "
            f"unknown ({', '.join(unknown[:3])}), {len(shapes)} of another shape ({', '.join(shapes[:3])})."
        )
    for name, tensor in stored.items():
        targets[name].copy_(tensor)


def plain_transformer(transformer: MagicMirrorTransformer3DModel) -> CogVideoXTransformer3DModel:
    """The base alone, sharing its weights."""
    with torch.device("meta"):
        plain = CogVideoXTransformer3DModel.from_config(transformer.config)
    state = {name: tensor for name, tensor in transformer.state_dict().items() if ".adapter." not in name}
    plain.load_state_dict(state, assign=True)
    return plain
