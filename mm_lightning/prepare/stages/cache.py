"""Tensors of the frozen networks, computed once and stored beside the sample.

What a cache was made with is recorded, so that a stale one is refused instead of trained on: in the json under `cache`,
and in the metadata of each safetensors file.

Letters: F frames, F' latent frames, C latent channels, H W pixels, h w latent pixels, R references, T text tokens,
L tokens of the vision encoder, D widths, E face embedding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from mm_lightning.backbone import Backbone, check_base, read_json
from mm_lightning.devices import find_device
from mm_lightning.encoders.face import FaceFeatureEncoder, check_vision, load_vision
from mm_lightning.encoders.packs import DEFAULT_ROOT
from mm_lightning.encoders.recognizer import check_recognizer, load_recognizer
from mm_lightning.encoders.text import IdentityTokenizer, TextEncoder
from mm_lightning.prepare.sample import Rejected, Sample
from mm_lightning.prepare.stages.identity import one_thread
from mm_lightning.provenance import describe_component, describe_recognizer, describe_vision

PARTS = ("latents", "text", "face")


class CacheTensors:
    """Stores the VAE's mean and log-variance, T5's states, CLIP's features and the identity query.

    Args:
        base: the CogVideoX, hub id or folder in diffusers' layout.
        vision: CLIP vision tower or photomaker-v2.bin.
        recognizer, root: see `load_recognizer`; the identity query.
        transform: what the training will look at: a sample as it lies in the tar -> an object with `pixels`
            (F, 3, H, W), `references` (R, 3, S, S), `reference_landmarks`, `reference_mask` and `caption`. Give
            `datamodules.transforms.SampleTransform` at the training's size with `random_window=False`; its
            `num_references` bounds what a sample may have.
        what: of "latents", "text", "face".
        dtype: of T5 and CLIP, the one that the training loads them in.
        extra_identity_words: class words, the training's.

    Raises:
        FileNotFoundError, ValueError: at construction, for models that are not there or parts that are not known.
    """

    name = "cache"
    reasons = ("no_class_word", "unusable_target")

    def __init__(
        self,
        base: str,
        vision: str,
        recognizer: str,
        transform: Callable[[dict], Any],
        what: Iterable[str] = PARTS,
        dtype: str = "bfloat16",
        extra_identity_words: Iterable[str] = (),
        root: str = DEFAULT_ROOT,
    ) -> None:
        self.what = check_parts(what)
        self.base, self.vision, self.recognizer, self.root = base, vision, recognizer, root
        self.transform, self.dtype = transform, dtype
        self.extra_identity_words = tuple(extra_identity_words)
        check_models(base, vision, recognizer, self.what, root)

    def models(self) -> dict[str, dict[str, Any]]:
        return self.records

    def __call__(self, sample: Sample) -> list[Sample]:
        try:
            seen = self.transform(as_stored(sample))
        except ValueError:
            raise
        except Exception as error:  # the loader's own exception for damaged samples, which is not known here
            raise Rejected("unusable_target", f"{type(error).__name__}: {error}") from error
        make = {"latents": self.latents, "text": self.text, "face": self.face}
        with one_thread(), torch.inference_mode():
            for part in self.what:
                record = self.records[part] | shown(seen, part)
                tensors = {name: tensor.cpu().contiguous() for name, tensor in make[part](sample, seen).items()}
                sample.fields[f"{part}.safetensors"] = save(tensors, {"cache": json.dumps(record, sort_keys=True)})
                sample.meta.setdefault("cache", {})[part] = record
        return [sample]

    def latents(self, sample: Sample, seen: Any) -> dict[str, Tensor]:
        """Mean and log-variance, (F', C, h, w) float32."""
        moments = self.backbone.encode_video(seen.pixels[None].to(self.device))[0]  # (F', 2C, h, w)
        mean, logvar = moments.chunk(2, dim=1)
        return {"mean": mean, "logvar": logvar}

    def text(self, sample: Sample, seen: Any) -> dict[str, Tensor]:
        """States (T, D) and the positions of the class word (T,)."""
        try:
            text = self.text_encoder([seen.caption])
        except ValueError as error:
            raise Rejected("no_class_word", str(error)) from error
        return {"prompt_embeds": text.prompt_embeds[0], "id_token_mask": text.id_token_mask[0]}

    def face(self, sample: Sample, seen: Any) -> dict[str, Tensor]:
        """Dense features (R, L, D) and identity query (R, E) of every stored reference."""
        count = len(sample.meta["references"])
        if int(seen.reference_mask.sum()) != count:
            raise ValueError(
                f"{sample.key} has {count} references, the cache's transform shows {len(seen.reference_mask)}: raise "
                "its num_references, and set random_window=False."
            )
        inputs = (seen.references[:count], seen.reference_landmarks[:count])
        last, penultimate, query = self.features.encode(*(tensor.to(self.device) for tensor in inputs))
        return {"last_hidden_state": last, "penultimate_hidden_state": penultimate, "id_query": query}

    # The models, loaded when first used

    @property
    def device(self) -> torch.device:
        return find_device()

    @cached_property
    def records(self) -> dict[str, dict[str, Any]]:
        words = self.extra_identity_words
        return describe_cache(self.base, self.vision, self.recognizer, self.what, self.dtype, words, self.root)

    @cached_property
    def backbone(self) -> Backbone:
        components = [name for part, name in (("latents", "vae"), ("text", "text_encoder")) if part in self.what]
        return Backbone.from_pretrained(self.base, self.dtype, components=components).to(self.device)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        tokenizer = IdentityTokenizer(
            self.backbone.tokenizer,
            max_length=self.backbone.transformer_config.max_text_seq_length,
            extra_identity_words=self.extra_identity_words,
        )
        return TextEncoder(self.backbone.text_encoder, tokenizer)

    @cached_property
    def features(self) -> FaceFeatureEncoder:
        recognizer = load_recognizer(self.recognizer, self.root)
        return FaceFeatureEncoder(load_vision(self.vision), recognizer).to(self.device)


# What a cache was made with


def describe_cache(
    base: str,
    vision: str | None = None,
    recognizer: str | None = None,
    what: Iterable[str] = PARTS,
    dtype: str = "bfloat16",
    extra_identity_words: Iterable[str] = (),
    root: str = DEFAULT_ROOT,
) -> dict[str, dict[str, Any]]:
    """What a cache made with these models records, part by part: JSON values. Reads configs, no weight as a whole.

    `weights` is a fingerprint of the files; it is absent where they are not on this machine.
    """
    records = {}
    for part in check_parts(what):
        if part == "face":
            if vision is None or recognizer is None:
                raise ValueError("The face cache needs to know its networks: give `vision` and `recognizer`.")
            records[part] = describe_vision(vision) | describe_recognizer(recognizer, root)
        else:
            component = {"latents": "vae", "text": "text_encoder"}[part]
            records[part] = describe_component(base, component)
    if "text" in records:
        config = read_json(check_base(base, components=()) / "transformer/config.json")
        records["text"] |= {
            "max_length": config.get("max_text_seq_length", 226),
            "dtype": dtype,
            "extra_identity_words": sorted(extra_identity_words),
        }
    return records


def expected_cache(
    base: str,
    vision: str,
    recognizer: str,
    dtype: str = "bfloat16",
    extra_identity_words: Iterable[str] = (),
    root: str = DEFAULT_ROOT,
) -> dict[str, dict[str, Any]]:
    """`describe_cache` of a training's models, for its data module's `cache_id`.

    Parts whose models are not to be found are left out: the training itself says what it lacks.
    """
    records = {}
    for part in PARTS:
        with suppress(FileNotFoundError, ValueError):
            records |= describe_cache(base, vision, recognizer, [part], dtype, extra_identity_words, root)
    return records


def shown(seen: Any, part: str) -> dict[str, Any]:
    """What of the sample itself a part was made from."""
    if part == "latents":
        num_frames, _, height, width = seen.pixels.shape
        return {"num_frames": num_frames, "height": height, "width": width}
    if part == "text":
        return {"caption_sha256": hashlib.sha256(seen.caption.encode()).hexdigest()}
    return {"reference_size": seen.references.shape[-1]}


def check_cache(meta: dict[str, Any], expected: dict[str, dict[str, Any]], caption: str | None = None) -> None:
    """Refuses cached tensors of other models.

    Args:
        meta: a sample's json.
        expected: what `describe_cache` says of the models at hand, with whatever else must agree (`height`, ...); parts
            that it does not name are not looked at. Names of models are for people and not compared.
        caption: the sample's; None leaves it unchecked.

    Raises:
        ValueError: a part that is expected and not recorded, or recorded differently.
    """
    recorded = meta.get("cache", {})
    if caption is not None and "text" in expected:
        digest = hashlib.sha256(caption.encode()).hexdigest()
        expected = expected | {"text": expected["text"] | {"caption_sha256": digest}}
    for part, wanted in expected.items():
        if part not in recorded:
            raise ValueError(f"No record of what {part}.safetensors was made with: {REMEDY}")
        for name, value in wanted.items():
            found = recorded[part].get(name)
            optional = name == "weights" and found is None
            if name != "model" and not optional and found != value:
                raise ValueError(
                    f"{part}.safetensors is stale: made by {recorded[part].get('model')} with {name} {found!r}, "
                    f"here is {wanted.get('model')} with {value!r}: {REMEDY}"
                )


REMEDY = "cache the tensors again with `python -m mm_lightning.prepare`, or take these out of the shards."


def check_parts(what: Iterable[str]) -> tuple[str, ...]:
    what = tuple(what)
    if not what or set(what) - set(PARTS):
        raise ValueError(f"what={list(what)}: name at least one of {', '.join(PARTS)}, and nothing else.")
    return what


def check_models(base: str, vision: str, recognizer: str, what: tuple[str, ...], root: str) -> None:
    """Everything that can be told before a weight is read."""
    check_base(base, [name for part, name in (("latents", "vae"), ("text", "text_encoder")) if part in what])
    if "face" in what:
        check_vision(vision)
        check_recognizer(recognizer, root)


def as_stored(sample: Sample) -> dict[str, Any]:
    """The sample as a reader of the tar gets it, without what is cached already."""
    stored = {"__key__": sample.key, sample.extension: sample.data, "json": json.dumps(sample.meta).encode()}
    fields = {name: data for name, data in sample.fields.items() if not name.endswith(".safetensors")}
    return stored | {"txt": (sample.caption or "").encode()} | fields
