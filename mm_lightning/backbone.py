"""The frozen CogVideoX: transformer, VAE, T5, tokenizer and scheduler, from a local folder or a hub id.

Every number that differs between 2B, 5B and 1.5 (scaling factor, patch sizes, RoPE, noise schedule) is read from the
loaded configs; the defaults of diffusers' classes are those of 2B and are used for nothing but keys a config lacks.

Letters: B batch, F frames, F' latent frames, C latent channels, H W pixels, h w latent pixels,
S video tokens, K dimension of one attention head.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import T5EncoderModel, T5Tokenizer

# The parts that hold weights, with the stem of their weight files.
COMPONENTS = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
CONFIG_PATTERNS = ("model_index.json", "*/config.json", "scheduler/*", "tokenizer/*")
CONFIG_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    *(f"{component}/config.json" for component in COMPONENTS),
)
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
SCHEDULERS = {cls.__name__: cls for cls in (CogVideoXDDIMScheduler, CogVideoXDPMScheduler)}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
LFS_HEADER = b"version https://git-lfs"
REMEDY = (
    "Get one with `hf download THUDM/CogVideoX-5b --local-dir FOLDER`, "
    "or write a tiny random one with `python -m mm_lightning.tiny FOLDER`."
)


class RotaryEmbeddings(NamedTuple):
    """Angles of the 3-D rotary position embedding, fp32."""

    cos: Tensor  # (S, K)
    sin: Tensor  # (S, K)


def check_base(name_or_folder: str | Path, components: Sequence[str] = tuple(COMPONENTS)) -> Path:
    """Whether `name_or_folder` is a text-to-video CogVideoX in diffusers' layout, told before a weight is read.

    A folder must hold every config, and the weight files of `components`. A hub id is looked up in the local cache and,
    unless `HF_HUB_OFFLINE` is set, on the hub, from where this takes configs and tokenizer only.
    Returns the folder in which the configs lie.
    Raises FileNotFoundError naming what was looked for; ValueError if the model is no text-to-video CogVideoX.
    """
    unknown = sorted(set(components) - set(COMPONENTS))
    if unknown:
        raise ValueError(f"components={list(components)} names {unknown}; there are {list(COMPONENTS)}.")
    folder = local_folder(name_or_folder)
    if folder is None:
        folder = fetch(str(name_or_folder), CONFIG_PATTERNS)
        require_files(folder, components=())
    else:
        require_files(folder, components)
    check_configs(folder)
    return folder


def local_folder(name_or_folder: str | Path) -> Path | None:
    """The folder meant, or None where a hub id is meant."""
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"The base model {folder} is a file, wanted is a folder in diffusers' layout. {REMEDY}")
    if isinstance(name_or_folder, str) and HUB_ID.fullmatch(name_or_folder):
        return None
    raise FileNotFoundError(
        f"The base model folder {folder} does not exist, and is no hub id (OWNER/NAME) either. {REMEDY}"
    )


def fetch(hub_id: str, patterns: Sequence[str]) -> Path:
    """The cached snapshot of `hub_id` with the files that match `patterns`, downloaded where allowed and needed."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client and its HTTP library raise a dozen unrelated types
        raise FileNotFoundError(
            f"The base model {hub_id!r} is neither a local folder nor complete in the hub's cache, "
            f"and the hub did not give it ({type(error).__name__}: {error}). {REMEDY}"
        ) from error


def require_files(folder: Path, components: Iterable[str]) -> None:
    missing = [name for name in CONFIG_FILES if not (folder / name).is_file()]
    if not any((folder / "tokenizer" / name).is_file() for name in TOKENIZER_FILES):
        missing.append(" or ".join(f"tokenizer/{name}" for name in TOKENIZER_FILES))
    for component in components:
        missing += missing_weights(folder, component)
    if missing:
        raise FileNotFoundError(
            f"{folder} is no complete CogVideoX in diffusers' layout; missing: {', '.join(missing)}. {REMEDY}"
        )


def missing_weights(folder: Path, component: str) -> list[str]:
    """Weight files of `component` that are not there, or only as the pointer a clone without Git LFS leaves."""
    whole = f"{component}/{COMPONENTS[component]}.safetensors"
    index = folder / f"{whole}.index.json"
    names = [whole]
    if index.is_file():
        names = [f"{component}/{name}" for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    absent = [name for name in names if not (folder / name).is_file()]
    pointers = [f"{name} (only a Git LFS pointer)" for name in names if is_lfs_pointer(folder / name)]
    return absent + pointers


def is_lfs_pointer(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(len(LFS_HEADER)) == LFS_HEADER


def check_configs(folder: Path) -> None:
    """ValueError unless the configs are those of a text-to-video CogVideoX whose parts fit each other."""
    transformer = read_json(folder / "transformer/config.json")
    class_name = transformer.get("_class_name")
    if class_name != CogVideoXTransformer3DModel.__name__:
        raise ValueError(f"{folder}/transformer is a {class_name}, wanted is a {CogVideoXTransformer3DModel.__name__}.")
    config = with_defaults(CogVideoXTransformer3DModel, transformer)
    vae = with_defaults(AutoencoderKLCogVideoX, read_json(folder / "vae/config.json"))
    if config.in_channels != vae.latent_channels:
        raise ValueError(
            f"{folder}/transformer takes {config.in_channels} channels, its VAE gives {vae.latent_channels}: "
            "this looks like an image-to-video model (CogVideoX-5b-I2V). Take text-to-video: THUDM/CogVideoX-5b."
        )
    text_embed_dim = read_json(folder / "text_encoder/config.json").get("d_model")
    if config.text_embed_dim != text_embed_dim:
        raise ValueError(
            f"{folder}/transformer wants text of width {config.text_embed_dim}, "
            f"its text encoder gives {text_embed_dim}: these parts come from different models."
        )
    scheduler_name(folder)


def scheduler_name(folder: Path) -> str:
    name = read_json(folder / "scheduler/scheduler_config.json").get("_class_name")
    if name not in SCHEDULERS:
        raise ValueError(f"{folder}/scheduler is a {name}, wanted is one of {', '.join(SCHEDULERS)}.")
    return name


def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON ({error}); fetch it again.") from error


def with_defaults(cls: type, config: dict) -> FrozenDict:
    """The constructor arguments of `cls` as `config` gives them; configs of older releases lack the newer ones."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return FrozenDict({parameter.name: config.get(parameter.name, parameter.default) for parameter in parameters})


def config_sha256(cls: type, config: dict) -> str:
    """Of the arguments that differ from the class's defaults: a new release with new arguments changes nothing."""
    parameters = inspect.signature(cls.__init__).parameters
    told = {name: value for name, value in config.items() if name in parameters and value != parameters[name].default}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def base_name(name_or_folder: str | Path) -> str:
    """The hub id, or the folder's own name without the path that leads to it."""
    folder = local_folder(name_or_folder)
    return str(name_or_folder) if folder is None else folder.resolve().name


def make_base_id(name: str, transformer_config: dict) -> dict[str, str]:
    return {"name": name, "config_sha256": config_sha256(CogVideoXTransformer3DModel, transformer_config)}


def read_base_id(name_or_folder: str | Path) -> dict[str, str]:
    """`Backbone.base_id` of a model of which nothing but its configs is read; raises what `check_base` raises."""
    folder = check_base(name_or_folder, components=())
    return make_base_id(base_name(name_or_folder), read_json(folder / "transformer/config.json"))


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"torch_dtype={dtype!r} is no dtype of torch; say bfloat16, float16 or float32.")
    return found


def check_frames(num_frames: int, ratio: int) -> None:
    """ValueError unless a causal VAE of temporal compression `ratio` takes `num_frames` whole: 1, 5, 9, ... at 4."""
    if num_frames < 1 or num_frames % ratio != 1:
        below = max(num_frames - 1, 0) // ratio * ratio + 1
        raise ValueError(
            f"A clip of {num_frames} frames does not fit the VAE, which takes {ratio}k+1 frames; "
            f"the nearest are {below} and {below + ratio}."
        )


def check_size(height: int, width: int, step: int) -> None:
    """ValueError unless both are multiples of `step`, a patch of the transformer in pixels."""
    for side, length in (("height", height), ("width", width)):
        if length < step or length % step:
            nearest = max(round(length / step), 1) * step
            raise ValueError(f"{side}={length} is no multiple of {step} pixels; the nearest is {nearest}.")


class Backbone(nn.Module):
    """The frozen base model. `.to(...)` moves what is loaded; `.train()` leaves it in eval mode (T5 has dropout).

    Attributes: `transformer`, `vae`, `text_encoder` (None where not loaded), `tokenizer`, `scheduler`,
    `transformer_config`, `vae_config` (always there).
    """

    def __init__(
        self,
        name: str,
        tokenizer: T5Tokenizer,
        scheduler: CogVideoXDDIMScheduler | CogVideoXDPMScheduler,
        transformer_config: dict,
        vae_config: dict,
        transformer: CogVideoXTransformer3DModel | None = None,
        vae: AutoencoderKLCogVideoX | None = None,
        text_encoder: T5EncoderModel | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.tokenizer = tokenizer
        self.scheduler = scheduler
        self.transformer_config = with_defaults(CogVideoXTransformer3DModel, transformer_config)
        self.vae_config = with_defaults(AutoencoderKLCogVideoX, vae_config)
        self.transformer = transformer
        self.vae = vae
        self.text_encoder = text_encoder
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        torch_dtype: torch.dtype | str = torch.bfloat16,
        vae_dtype: torch.dtype | str = torch.float32,
        components: Sequence[str] = tuple(COMPONENTS),
    ) -> Backbone:
        """Load a folder in diffusers' layout or a hub id.

        `components` names the parts whose weights are wanted: with cached latents the VAE, with cached text states the
        T5 (9.5 GB) may stay away. `torch_dtype` is that of transformer and T5; 5B gives NaN in float16.
        Raises what `check_base` raises, and ValueError for an unknown component or dtype, before a weight is read.
        """
        dtypes = dict.fromkeys(COMPONENTS, as_dtype(torch_dtype)) | {"vae": as_dtype(vae_dtype)}
        folder = check_base(name_or_folder, components)
        if local_folder(name_or_folder) is None:
            folder = fetch(str(name_or_folder), [*CONFIG_PATTERNS, *(f"{component}/*" for component in components)])
            require_files(folder, components)
        return cls(
            name=base_name(name_or_folder),
            tokenizer=T5Tokenizer.from_pretrained(folder / "tokenizer"),
            scheduler=SCHEDULERS[scheduler_name(folder)].from_pretrained(folder, subfolder="scheduler"),
            transformer_config=read_json(folder / "transformer/config.json"),
            vae_config=read_json(folder / "vae/config.json"),
            **{component: load_component(folder, component, dtypes[component]) for component in components},
        )

    def train(self, mode: bool = True) -> Backbone:
        return super().train(False)

    @property
    def base_id(self) -> dict[str, str]:
        """Which model an adapter belongs to: its name, and what its transformer is built from.

        Compare `config_sha256`; the name is for people, as a local folder may be called anything.
        """
        return make_base_id(self.name, self.transformer_config)

    @property
    def scaling_factor(self) -> float:
        """Latents of the transformer = latents of the VAE times this."""
        return self.vae_config.scaling_factor

    @property
    def vae_scale_factor_spatial(self) -> int:
        return 2 ** (len(self.vae_config.block_out_channels) - 1)

    @property
    def vae_scale_factor_temporal(self) -> int:
        return int(self.vae_config.temporal_compression_ratio)

    def check_frames(self, num_frames: int) -> None:
        """ValueError unless the causal VAE takes `num_frames` whole: 1, 5, 9, ... at a compression of 4."""
        check_frames(num_frames, self.vae_scale_factor_temporal)

    def check_size(self, height: int, width: int) -> None:
        """ValueError unless both are multiples of a patch of the transformer, in pixels."""
        check_size(height, width, self.vae_scale_factor_spatial * self.transformer_config.patch_size)

    def check_clip(self, num_frames: int | None, height: int | None, width: int | None) -> None:
        """ValueError unless a clip of that size can be generated; None is the base's own."""
        config, ratio = self.transformer_config, self.vae_scale_factor_spatial
        if num_frames is not None:
            self.check_frames(num_frames)
        self.check_size(height or config.sample_height * ratio, width or config.sample_width * ratio)

    @torch.no_grad()
    def encode_video(self, pixels: Tensor) -> Tensor:
        """Mean and log-variance of the VAE's posterior, unscaled, in fp32: (B, F, 3, H, W) -> (B, F', 2C, h, w).

        Pixels are RGB in [-1, 1]. Runs in the VAE's own dtype, whatever autocast says.
        Raises ValueError for a frame count or a size that the VAE or the transformer does not take.
        """
        if self.vae is None:
            raise RuntimeError("Encoding pixels needs the VAE; load it with components=(..., 'vae').")
        if pixels.ndim != 5 or pixels.shape[2] != 3:
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}, wanted is (B, F, 3, H, W).")
        _, num_frames, _, height, width = pixels.shape
        self.check_frames(num_frames)
        self.check_size(height, width)
        with torch.autocast(pixels.device.type, enabled=False):
            posterior = self.vae.encode(pixels.transpose(1, 2).to(self.vae.dtype)).latent_dist
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1)  # (B, 2C, F', h, w)
        return moments.transpose(1, 2).float().contiguous()

    def rotary_embeddings(
        self, num_latent_frames: int, height: int, width: int, device: torch.device | str | None = None
    ) -> RotaryEmbeddings | None:
        """What the transformer takes as `image_rotary_emb` for a picture of `height` x `width` pixels; None for 2B.

        1.0 crops and stretches to the grid it was trained on, 1.5 counts positions from the corner.
        Raises ValueError for a size that is no multiple of a patch or, with 1.5, beyond the size it was trained on.
        """
        config = self.transformer_config
        if not config.use_rotary_positional_embeddings:
            return None
        self.check_size(height, width)
        step = self.vae_scale_factor_spatial * config.patch_size
        grid = (height // step, width // step)
        base_height, base_width = config.sample_height // config.patch_size, config.sample_width // config.patch_size
        if config.patch_size_t is None:
            crops = get_resize_crop_region_for_grid(grid, base_width, base_height)
            placing = {"crops_coords": crops, "temporal_size": num_latent_frames}
        else:
            if grid[0] > base_height or grid[1] > base_width:
                raise ValueError(
                    f"{height}x{width} pixels (height x width) is beyond the {base_height * step}x{base_width * step} "
                    f"for which {self.name} has positions."
                )
            num_patches = -(-num_latent_frames // config.patch_size_t)
            placing = {"crops_coords": None, "temporal_size": num_patches, "grid_type": "slice"}
            placing["max_size"] = (base_height, base_width)
        return RotaryEmbeddings(
            *get_3d_rotary_pos_embed(config.attention_head_dim, grid_size=grid, device=device, **placing)
        )


def load_component(folder: Path, component: str, dtype: torch.dtype) -> nn.Module:
    classes = {
        "transformer": CogVideoXTransformer3DModel,
        "vae": AutoencoderKLCogVideoX,
        "text_encoder": T5EncoderModel,
    }
    return classes[component].from_pretrained(folder, subfolder=component, dtype=dtype, use_safetensors=True)
