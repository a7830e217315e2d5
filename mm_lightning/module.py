"""One training step of MagicMirror, figure by figure.

Letters: B batch, F frames, F' latent frames, C latent channels, h w latent pixels, T text tokens, N face tokens,
D width of the transformer.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mm_lightning.adapters.transformer import AdapterConfig, MagicMirrorTransformer3DModel
from mm_lightning.adapters.weights import AdapterWeights, check_same, read_adapter_config
from mm_lightning.backbone import Backbone, check_base, read_base_id
from mm_lightning.checkpoint import (
    METADATA_FILE,
    check_checkpoint,
    filter_checkpoint,
    gather_tensors,
    load_trainable,
    require_complete,
    trainable_state_dict,
)
from mm_lightning.diffusion import Diffusion
from mm_lightning.encoders.face import FaceFeatureEncoder, check_vision, load_vision
from mm_lightning.encoders.identity import IdentityEncoder, sample_drops
from mm_lightning.encoders.recognizer import FaceRecognizer, check_recognizer, load_recognizer
from mm_lightning.encoders.text import IdentityTokenizer, TextEncoder, drop_text
from mm_lightning.face_decoder import FaceDecoder
from mm_lightning.losses.identity import NullIdentityLoss, average_reference_embedding
from mm_lightning.losses.means import EpochSums, loss_sums, means_of, weighted_mean
from mm_lightning.pipeline import MagicMirrorPipeline
from mm_lightning.preview import build_pipeline, decode_latents, generate_latents
from mm_lightning.strategy import shard_module
from mm_lightning.types import Batch, FaceFeatures, IdentityCondition, LossOutput, NoisySample, Preview, TextFeatures


def sample_generators(seed: int, step: int, keys: Sequence[str]) -> list[torch.Generator]:
    """One CPU generator per sample, seeded by what it is and when it is seen, not by the rank that sees it."""
    digests = (hashlib.sha256(f"{seed}/{step}/{key}".encode()).digest() for key in keys)
    return [torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")) for digest in digests]


class MagicMirrorModule(LightningModule):
    """The frozen backbone, the trained adapter and front-end, and the two losses.

    Construction checks every path and loads nothing; `configure_model` loads.

    Args:
        base: CogVideoX in diffusers' layout, a folder or a hub id.
        vision: CLIP vision tower (F_feat), a folder or PhotoMaker-V2's file.
        recognizer: F_id of the condition: `dlib`, an insightface pack's name, or its folder.
        loss_recognizer: F_id of the identity loss.
        adapter: sizes and components of the adapter.
        id_perceiver, face_perceiver, fusion, id_projection: factories of the front-end's parts, see
            `IdentityEncoder.build`.
        loss: `CombinedLoss`.
        optimizer: parameters -> optimizer.
        lr_schedule: optimizer -> schedule, stepped once per optimizer step.
        frozen: parts of the front-end that stay as they are, such as a pre-trained `id_perceiver`.
        init_adapter: adapter folder to start from, such as stage 1's; None starts untrained.
        base_dtype: of the frozen transformer and text encoder.
        components: parts of the base to load; cached latents and text need neither VAE nor T5.
        text_drop_rate, identity_drop_rate: share of samples trained with the empty prompt, with the null identity.
        gradient_checkpointing: recompute the activations of transformer and VAE in the backward pass.
        extra_identity_words: class words beside the built-in ones.
        preview_steps: denoising steps of a preview clip.
        preview_guidance: its guidance scale.
        seed: of every random draw in training.

    Raises:
        FileNotFoundError, ValueError: a path is missing or something else than expected, `init_adapter` was made for
            another base or preset.
    """

    strict_loading = False  # checkpoints hold what trains; on_load_checkpoint compares the names

    def __init__(
        self,
        base: str,
        vision: str,
        recognizer: str,
        loss_recognizer: str,
        adapter: AdapterConfig,
        id_perceiver: Callable[..., nn.Module],
        face_perceiver: Callable[..., nn.Module],
        fusion: Callable[..., nn.Module],
        id_projection: Callable[..., nn.Module],
        loss: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        lr_schedule: Callable[..., torch.optim.lr_scheduler.LRScheduler],
        frozen: Sequence[str] = (),
        init_adapter: str | None = None,
        base_dtype: str = "bfloat16",
        components: Sequence[str] = ("transformer", "vae", "text_encoder"),
        text_drop_rate: float = 0.1,
        identity_drop_rate: float = 0.1,
        gradient_checkpointing: bool = True,
        extra_identity_words: Sequence[str] = (),
        preview_steps: int = 25,
        preview_guidance: float = 6.0,
        seed: int = 0,
    ):
        super().__init__()
        self.base, self.base_dtype, self.components = base, base_dtype, tuple(components)
        self.vision, self.recognizer, self.loss_recognizer = vision, recognizer, loss_recognizer
        self.adapter_config = adapter
        self.front_end_parts = {"id_perceiver": id_perceiver, "face_perceiver": face_perceiver}
        self.front_end_parts |= {"fusion": fusion, "id_projection": id_projection}
        self.loss = loss
        self.optimizer_factory, self.lr_schedule_factory = optimizer, lr_schedule
        self.frozen, self.init_adapter = tuple(frozen), init_adapter
        self.text_drop_rate, self.identity_drop_rate = text_drop_rate, identity_drop_rate
        self.gradient_checkpointing, self.seed = gradient_checkpointing, seed
        self.extra_identity_words = tuple(extra_identity_words)
        self.preview_steps, self.preview_guidance = preview_steps, preview_guidance
        self.transformer: MagicMirrorTransformer3DModel | None = None
        self.check_values()
        self.check_paths()

    def check_values(self) -> None:
        rates = {"text_drop_rate": self.text_drop_rate, "identity_drop_rate": self.identity_drop_rate}
        for name, rate in rates.items():
            if not 0 <= rate <= 1:
                raise ValueError(f"model.{name}={rate} is no share of the samples; give a number from 0 to 1.")
        if self.preview_steps < 1:
            raise ValueError(f"model.preview_steps={self.preview_steps}: give a number from 1.")
        if self.text_drop_rate > 0 and "text_encoder" not in self.components:
            raise ValueError(
                f"model.text_drop_rate={self.text_drop_rate} needs what T5 says of the empty prompt: add text_encoder "
                "to model.components, or give model.text_drop_rate=0."
            )
        if needs_faces(self.loss) and "vae" not in self.components:
            raise ValueError(
                "The identity loss decodes faces: add vae to model.components, or give model.loss.identity_weight=0."
            )
        unknown = sorted(set(self.frozen) - set(self.front_end_parts))
        if unknown:
            raise ValueError(f"model.frozen names {unknown}; the front-end's parts are {list(self.front_end_parts)}.")

    def check_paths(self) -> None:
        """All that can be wrong is told here, before anything large is read."""
        check_base(self.base, self.components)
        check_vision(self.vision)
        check_recognizer(self.recognizer)
        check_recognizer(self.loss_recognizer)
        if self.init_adapter is not None:
            self.check_record(self.init_adapter, read_adapter_config(self.init_adapter))

    def check_record(self, path: str | Path, saved: dict[str, Any]) -> None:
        """Raise ValueError unless what lies at `path` was made with this base, preset, front-end and recogniser."""
        base = {"config_sha256": read_base_id(self.base)["config_sha256"]}
        check_same(path, {"config_sha256": saved["base"]["config_sha256"]}, base, "base model")
        check_same(path, saved["adapter"], asdict(self.adapter_config), "adapter preset")
        check_same(path, saved["front_end"], self.describe_front_end(), "front-end")
        recognizer = {"recognizer": Path(self.recognizer).name}
        check_same(path, {"recognizer": saved.get("recognizer")}, recognizer, "recogniser of the condition")

    # Building -------------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the frozen networks, attach what trains, shard where the strategy has a mesh."""
        if self.transformer is not None:
            return
        backbone = self.load_backbone()
        self.base_id = backbone.base_id
        self.diffusion = Diffusion.from_backbone(backbone.scheduler.config, backbone.vae_config)
        self.transformer = MagicMirrorTransformer3DModel.from_base(backbone.transformer, self.adapter_config)
        backbone.transformer = None
        self.backbone = backbone
        self.features = self.load_features()
        self.text = self.build_text_encoder(backbone)
        self.front_end = self.build_front_end()
        self.face_decoder = None
        if backbone.vae is not None:
            self.face_decoder = FaceDecoder(
                backbone.vae, self.load_loss_recognizer(), checkpointing=self.gradient_checkpointing
            )
        select_trainable(self.transformer, self.front_end, self.frozen)
        if self.init_adapter is not None:
            load_trainable(
                self, AdapterWeights.from_pretrained(self.init_adapter, set(trainable_state_dict(self))).state
            )
        if self.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if self.device_mesh is not None:
            self.shard()

    def load_backbone(self) -> Backbone:
        return Backbone.from_pretrained(self.base, self.base_dtype, components=self.components)

    def load_features(self) -> FaceFeatureEncoder:
        return FaceFeatureEncoder(load_vision(self.vision), load_recognizer(self.recognizer))

    def load_loss_recognizer(self) -> FaceRecognizer:
        return load_recognizer(self.loss_recognizer)

    def build_text_encoder(self, backbone: Backbone) -> TextEncoder | None:
        if backbone.text_encoder is None:
            return None
        return TextEncoder(backbone.text_encoder, self.build_tokenizer(backbone))

    def build_tokenizer(self, backbone: Backbone) -> IdentityTokenizer:
        max_length = backbone.transformer_config.max_text_seq_length
        words = self.extra_identity_words
        return IdentityTokenizer(backbone.tokenizer, max_length=max_length, extra_identity_words=words)

    def build_front_end(self) -> IdentityEncoder:
        config = self.transformer.config
        return IdentityEncoder.build(
            **self.front_end_parts,
            id_query_dim=self.features.recognizer.embed_dim,
            vision_dim=self.features.vision.config.hidden_size,
            text_dim=config.text_embed_dim,
            dim=config.num_attention_heads * config.attention_head_dim,
            id_embed_dim=self.adapter_config.id_embed_dim,
        )

    def shard(self) -> None:
        """FSDP2 over the device mesh: a unit per transformer block and per T5 block, one for the front-end."""
        dtype = torch.bfloat16 if "bf16" in str(self.trainer.precision) else None
        shard_module(self.transformer, self.device_mesh, ("CogVideoXBlock",), param_dtype=dtype)
        shard_module(self.front_end, self.device_mesh, (), param_dtype=dtype)
        if self.text is not None:
            shard_module(self.text.text_encoder, self.device_mesh, ("T5Block",))

    # One step -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, sample = self.compute_loss(batch, sample_generators(self.seed, self.global_step, batch.keys))
        for name, value in means_of(self.loss_sums(batch, loss, sample)).items():
            self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=len(batch.keys))
        return weighted_mean(loss.total, batch.weights)

    def on_validation_epoch_start(self) -> None:
        self.validation = EpochSums()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same loss with noise that depends on the sample alone, so that runs and steps can be compared."""
        loss, sample = self.compute_loss(batch, sample_generators(self.seed, -1, batch.keys))
        self.validation.add(self.loss_sums(batch, loss, sample))

    def on_validation_epoch_end(self) -> None:
        for name, value in self.validation.means(self.trainer.strategy.reduce).items():
            self.log(f"val/{name}", value, prog_bar=name == "loss")

    def loss_sums(self, batch: Batch, loss: LossOutput, sample: NoisySample) -> dict[str, Tensor]:
        return loss_sums(loss, sample.timestep, self.diffusion.num_train_timesteps, batch.weights)

    def compute_loss(self, batch: Batch, generators: list[torch.Generator]) -> tuple[LossOutput, NoisySample]:
        latents = self.encode_latents(batch, generators)  # (B, F', C, h, w)
        text, features = self.encode_text(batch), self.encode_features(batch)
        drop_prompt, drop_identity = self.sample_drops(generators)
        identity = self.condition(text, features, drop_prompt, drop_identity)
        sample = self.diffusion.add_noise(latents, generators)  # NoisySample
        velocity = self.predict(sample.noisy_latents, sample.timestep, identity)
        embed_references = partial(self.embed_references, batch, features)
        embed_denoised = partial(self.embed_denoised, batch, ~drop_identity)
        loss = self.loss(velocity, sample, batch.face_boxes, embed_references, embed_denoised, generators)
        return loss, sample

    def encode_latents(self, batch: Batch, generators: list[torch.Generator]) -> Tensor:
        moments = self.backbone.encode_video(batch.pixels) if batch.latent_moments is None else batch.latent_moments
        return self.diffusion.encode_moments(moments, generators)

    def encode_text(self, batch: Batch) -> TextFeatures:
        return self.text(batch.captions) if batch.text is None else batch.text

    def encode_features(self, batch: Batch) -> FaceFeatures:
        if batch.face is not None:
            return batch.face
        return self.features(batch.references, batch.reference_landmarks, batch.reference_mask)

    def sample_drops(self, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Which samples train with the empty prompt and which with the null identity, for guidance: two (B,) bool."""
        drop_text, drop_identity = sample_drops(generators, self.text_drop_rate, self.identity_drop_rate)
        return drop_text.to(self.device), drop_identity.to(self.device)

    def condition(
        self, text: TextFeatures, features: FaceFeatures, drop_prompt: Tensor, drop_identity: Tensor
    ) -> IdentityCondition:
        """Fuse the identity into the text (equation 5) and tokenise it for the transformer."""
        if self.text_drop_rate > 0:
            text = drop_text(text, self.null_prompt_embeds(), drop_prompt)
        return self.front_end(features, text, drop_identity)

    def null_prompt_embeds(self) -> Tensor:
        return self.text.null_prompt_embeds()

    def predict(self, noisy_latents: Tensor, timestep: Tensor, identity: IdentityCondition) -> Tensor:
        """Velocity (B, F', C, h, w); latents come in fp32 and are cast to the base's dtype here, not before.

        CogVideoX-1.5 takes frames in pairs: the first is repeated where one is missing, as in its own training.
        """
        num_padding = -noisy_latents.shape[1] % (self.transformer.config.patch_size_t or 1)
        hidden_states = torch.cat([noisy_latents[:, :1]] * num_padding + [noisy_latents], dim=1)
        _, num_frames, _, height, width = hidden_states.shape
        ratio = self.backbone.vae_scale_factor_spatial
        velocity = self.transformer(
            hidden_states=hidden_states.to(self.dtype_of_base),
            encoder_hidden_states=identity.prompt_embeds.to(self.dtype_of_base),
            timestep=timestep,
            image_rotary_emb=self.backbone.rotary_embeddings(num_frames, height * ratio, width * ratio, self.device),
            attention_kwargs=identity.attention_kwargs(),
            return_dict=False,
        )[0]
        return velocity[:, num_padding:]

    @property
    def dtype_of_base(self) -> torch.dtype:
        return self.transformer.patch_embed.proj.weight.dtype

    def embed_references(self, batch: Batch, features: FaceFeatures) -> Tensor:
        """What the loss's recogniser says of the reference photos (B, E), averaged over each person's.

        Where it is the condition's recogniser too, `features` hold that already.
        """
        present = batch.reference_mask
        if self.loss_recognizer == self.recognizer:
            return average_reference_embedding(features.id_query, present)
        recognizer = self.face_decoder.recognizer
        embeddings = torch.zeros(*present.shape, recognizer.embed_dim, device=present.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            embeddings[present] = recognizer.embed(batch.references[present], batch.reference_landmarks[present])
        return average_reference_embedding(embeddings, present)

    def embed_denoised(
        self, batch: Batch, has_identity: Tensor, denoised: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Decode the face of the estimated clean latents and embed it, where the model was told whose it is."""
        wanted = wanted & has_identity & batch.reference_mask.any(dim=1)
        return self.face_decoder(denoised, batch.face_boxes, batch.face_landmarks, wanted)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer_factory([p for p in self.parameters() if p.requires_grad])
        schedule = self.lr_schedule_factory(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def check_generation(
        self, num_frames: int, height: int | None, width: int | None, prompts: Sequence[str] = ()
    ) -> None:
        """Whether clips of that size, None for the base's own, can be generated; before anything is loaded.

        Raises:
            ValueError: the base does not take the frames or the size, or nobody stands in a prompt.
        """
        backbone = Backbone.from_pretrained(self.base, components=())
        backbone.check_clip(num_frames, height, width)
        tokenizer = self.build_tokenizer(backbone)
        for prompt in prompts:
            tokenizer.tokenize(prompt)

    # Looking at it --------------------------------------------------------------------------------------------------

    def build_pipeline(self) -> MagicMirrorPipeline:
        """Generation with the weights as they are now, nothing copied; it finds no faces, give it `identity`."""
        if self.face_decoder is None or self.text is None:
            raise ValueError(
                "Generating needs the VAE and the text encoder: load both, or leave out the callbacks that generate."
            )
        backbone = self.backbone
        pipeline = MagicMirrorPipeline(
            tokenizer=backbone.tokenizer,
            text_encoder=backbone.text_encoder,
            vae=backbone.vae,
            transformer=self.transformer,
            scheduler=type(backbone.scheduler).from_config(backbone.scheduler.config),
            face_encoder=self.features,
            front_end=self.front_end,
            record=self.record(),
            extra_identity_words=self.extra_identity_words,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def generate_preview(self, batch: Batch) -> Preview:
        """A clip of the first sample's person and prompt, and the clean estimate of its noised target."""
        if self.face_decoder is None or self.text is None:
            raise ValueError("Previews need the VAE and the text encoder: load both, or leave out callbacks.preview.")
        generators = sample_generators(self.seed, -1, batch.keys)
        latents = self.encode_latents(batch, generators)
        identity = self.front_end(self.encode_features(batch), self.encode_text(batch))
        generated = generate_latents(
            build_pipeline(self.backbone, self.transformer),
            latents.shape,
            identity,
            self.null_prompt_embeds(),
            self.preview_steps,
            self.preview_guidance,
            generators,
        )
        return Preview(
            prompt=batch.captions[0],
            reference=batch.references[0, 0],
            video=decode_latents(self.backbone.vae, generated)[0],
            denoised=decode_latents(self.backbone.vae, self.denoise_halfway(latents, identity, generators))[0],
        )

    def denoise_halfway(
        self, latents: Tensor, identity: IdentityCondition, generators: list[torch.Generator]
    ) -> Tensor:
        """The clean latents that one prediction from the middle of the schedule stands for."""
        timestep = torch.full((len(latents),), self.diffusion.num_train_timesteps // 2, device=latents.device)
        sample = self.diffusion.add_noise(latents, generators, timestep)
        velocity = self.predict(sample.noisy_latents, sample.timestep, identity)
        return self.diffusion.denoised(sample.noisy_latents, velocity, sample.timestep)

    # Keeping it -----------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What an adapter folder or a checkpoint says of the model that it belongs to; plain JSON values."""
        return {
            "base": self.base_id,
            "adapter": asdict(self.adapter_config),
            "front_end": self.describe_front_end(),
            "vision": Path(self.vision).name,
            "recognizer": Path(self.recognizer).name,
        }

    def describe_front_end(self) -> dict[str, Any]:
        return {name: describe_factory(part) for name, part in self.front_end_parts.items()}

    def save_adapter(self, folder: str | Path) -> None:
        """Write the adapter folder; every rank calls it, sharded weights are gathered, rank zero writes."""
        state = gather_tensors(trainable_state_dict(self))
        if self.global_rank == 0:
            AdapterWeights(self.record(), state).save_pretrained(folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint:
            filter_checkpoint(checkpoint, self)
        checkpoint["magicmirror"] = self.record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_checkpoint(checkpoint, self)

    def check_resume(self, path: str | Path) -> None:
        """Before anything large loads: raise ValueError if a training checkpoint belongs to another model."""
        self.check_record(path, read_record(path))


def needs_faces(loss: nn.Module) -> bool:
    """Whether a `CombinedLoss` looks at decoded faces."""
    return loss.identity_weight > 0 and not isinstance(loss.identity, NullIdentityLoss)


def select_trainable(
    transformer: MagicMirrorTransformer3DModel, front_end: IdentityEncoder, frozen: Sequence[str]
) -> None:
    """Adapter and front-end train, in fp32, but for the front-end's `frozen` parts; the base does not."""
    trainable = set(transformer.adapter_parameters())
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(name in trainable)
        if name in trainable:
            parameter.data = parameter.data.float()
    front_end.requires_grad_(True)
    for part in frozen:
        getattr(front_end, part).requires_grad_(False)


def describe_factory(factory: Callable[..., nn.Module]) -> dict[str, Any]:
    """{"_target_": name, argument: value, ...} of a class or a partial of one, without where its weights lay."""
    function = factory.func if isinstance(factory, partial) else factory
    arguments = factory.keywords if isinstance(factory, partial) else {}
    sizes = {name: value for name, value in arguments.items() if name != "path"}
    return {"_target_": f"{function.__module__}.{function.__qualname__}", **sizes}


def read_record(path: str | Path) -> dict[str, Any]:
    """What a training checkpoint says of the model that it belongs to; its tensors stay on the disk.

    Raises:
        FileNotFoundError, ValueError: no checkpoint, an unfinished one, or one of something else.
    """
    require_complete(path)
    file = Path(path) / METADATA_FILE if Path(path).is_dir() else Path(path)
    try:
        checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as a training checkpoint; those lie in <run>/checkpoints.") from error
    if "magicmirror" not in checkpoint:
        raise ValueError(f"{path} is no training checkpoint of this project; those lie in <run>/checkpoints.")
    return checkpoint["magicmirror"]
