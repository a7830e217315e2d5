"""People with what the frozen networks say of them, so that training reads tensors instead of running VAE, T5 and ViT.

    python -m mm_lightning.miniature.cache --people data/miniature/people --model mm_lightning/miniature/assets/model \
        --out data/miniature/cached --splits train validation

Writes the shards again, with `{key}.latents.safetensors`, `{key}.text.safetensors` and `{key}.face.safetensors` beside
each sample, in the form of `mm_lightning.prepare.stages.cache`; the identity query is the stored one, standardised.
Shards that are up to date stay; those of another model, or of other people, are made anew; a run that was cut goes on
with the next.

Letters: B batch, F frames, F' latent frames, C latent channels, H W pixels, h w latent pixels, R references, S side of
a reference, L tokens of the vision encoder, D its width.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPVisionModel

from mm_lightning.backbone import Backbone, check_base
from mm_lightning.devices import find_device
from mm_lightning.encoders.face import check_vision, clip_pixel_values, load_vision
from mm_lightning.encoders.packs import DEFAULT_ROOT
from mm_lightning.encoders.recognizer import load_recognizer
from mm_lightning.encoders.text import IdentityTokenizer, TextEncoder
from mm_lightning.files import write_json
from mm_lightning.miniature.layout import KINDS, SPLITS, StoredSample, read_index, read_tar, set_digest
from mm_lightning.miniature.queries import RECOGNIZER, Queries, load_queries
from mm_lightning.prepare.shards import INDEX_NAME, OFFSETS_SUFFIX, TarWriter, to_bytes
from mm_lightning.prepare.stages.cache import PARTS, describe_cache, shown
from mm_lightning.provenance import describe_recognizer

logger = logging.getLogger(__name__)

RECORD_NAME = "cache.json"
CONDITION = "dlib_standardized"  # F_id of conf/model/miniature.yaml
TRANSFORM = (
    "datamodules.transforms.SampleTransform"  # what training looks at; not imported, as data modules stand apart
)
BATCH = {"images": 64, "videos": 8}


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse(arguments)
    try:
        cache_people(options.people, options.model, options.out, options.splits, options.num_references, options.dtype)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mm_lightning.miniature.cache", description="Caches what the frozen networks say of the people."
    )
    parser.add_argument("--people", type=Path, default=Path("data/miniature/people"), help="folder of the shards")
    shipped = Path("mm_lightning/miniature/assets/model")
    parser.add_argument("--model", type=Path, default=shipped, help="diffusers' layout, with image_encoder/")
    parser.add_argument("--out", type=Path, default=Path("data/miniature/cached"))
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=["train", "validation"])
    parser.add_argument("--num-references", type=int, default=1, help="reference stills kept of each sample, at most")
    parser.add_argument("--dtype", default="float32", help="of T5, the one that training loads it in")
    return parser.parse_args(arguments)


def cache_people(
    people: Path,
    model: Path,
    out: Path,
    splits: Sequence[str] = ("train", "validation"),
    num_references: int = 1,
    dtype: str = "float32",
) -> None:
    """Writes `{out}/{split}/{images,videos}`.

    Args:
        num_references: kept of each sample, the first ones.
        dtype: of T5.

    Raises:
        FileNotFoundError: people, their queries or a part of the model are missing.
        ValueError: `num_references` below 1, or queries of another recogniser or other stills.
    """
    if num_references < 1:
        raise ValueError(f"num_references must be at least 1, got {num_references}.")
    check_base(model, ("vae", "text_encoder"))
    check_vision(model / "image_encoder")
    made_with = describe_cache(str(model), str(model / "image_encoder"), CONDITION, PARTS, dtype)
    queries = {split: standardize(load_queries(people / split)) for split in splits}
    models = FrozenModels(model, dtype)
    for split, kind in itertools.product(splits, KINDS):
        source = people / split / kind
        if source.is_dir():
            record = {"models": made_with, "people": set_digest(source), "num_references": num_references}
            cache_folder(source, out / split / kind, record, queries[split], models)


def standardize(queries: Queries) -> Queries:
    """Stored raw embeddings -> what the condition's recogniser gives.

    Raises:
        ValueError: the raw ones are of another recogniser.
    """
    wanted = describe_recognizer(RECOGNIZER, DEFAULT_ROOT)
    if wanted != queries.record:
        raise ValueError(f"The stored queries are of {queries.record}, here is {wanted}: run `world queries` again.")
    return queries._replace(values=load_recognizer(CONDITION).standardize(queries.values))


def cache_folder(source: Path, out: Path, record: dict[str, Any], queries: Queries, models: FrozenModels) -> None:
    """One set of shards, each as a shard of the same name."""
    prepare_folder(out, record)
    if (out / INDEX_NAME).is_file():
        logger.info("%s: up to date, kept.", out)
        return
    index = read_index(source)
    encode = SampleEncoder(models, record["models"], record["num_references"], queries)
    shards = []
    with tqdm(total=index["num_samples"], desc=f"{source.parent.name} {source.name}", unit="sample") as bar:
        for shard in index["shards"]:
            made = finished_shard(out / shard["name"])
            if made is None:
                samples = list(read_tar((source / shard["name"]).read_bytes()))
                made = cache_shard(samples, out / shard["name"], encode, BATCH[source.name], bar)
            else:
                bar.update(made["num_samples"])
            shards.append(made)
    write_json(out / INDEX_NAME, {"kind": index["kind"], "num_samples": index["num_samples"], "shards": shards})


def prepare_folder(out: Path, record: dict[str, Any]) -> None:
    """Removes what was made with anything else, or left half done.

    Raises:
        ValueError: shards lie there that were not made by this command.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / RECORD_NAME
    ours = [*out.glob(INDEX_NAME), *out.glob("*.tar"), *out.glob(f"*.tar{OFFSETS_SUFFIX}")]
    if ours and not file.is_file():
        raise ValueError(f"{out} holds shards that are no cache ({RECORD_NAME} is missing): name another --out.")
    if ours and json.loads(file.read_text()) != record:
        logger.info("%s: made with another model or from other people, made anew.", out)
        for stale in ours:
            stale.unlink()
    for leftover in out.glob("*.tmp"):
        leftover.unlink()
    write_json(file, record)


def finished_shard(file: Path) -> dict[str, Any] | None:
    """The index's entry of a shard that an earlier run left whole."""
    if not file.is_file():
        return None
    header = json.loads(file.with_name(file.name + OFFSETS_SUFFIX).read_text().partition("\n")[0])
    return {"name": file.name} | {name: header[name] for name in ("num_samples", "num_bytes", "sha256")}


def cache_shard(
    samples: list[StoredSample], file: Path, encode: SampleEncoder, batch_size: int, bar: tqdm
) -> dict[str, Any]:
    """Returns the index's entry."""
    writer = TarWriter(file)
    try:
        for start in range(0, len(samples), batch_size):
            for sample in encode(samples[start : start + batch_size]):
                writer.add(sample.key, sample.fields)
                bar.update()
    except BaseException:
        writer.abort()
        raise
    return writer.close()


class SampleEncoder:
    """Samples of one kind -> the same with cached tensors.

    Args:
        made_with: the models' record, part by part.
        num_references: kept of each sample.
        queries: of every still, standardised.
    """

    def __init__(
        self, models: FrozenModels, made_with: dict[str, dict[str, Any]], num_references: int, queries: Queries
    ) -> None:
        self.models, self.made_with, self.num_references, self.queries = models, made_with, num_references, queries

    @torch.inference_mode()
    def __call__(self, samples: Sequence[StoredSample]) -> list[StoredSample]:
        samples = [keep_references(sample, self.num_references) for sample in samples]
        looks = [self.look(sample) for sample in samples]
        parts = {"latents": self.latents(looks), "text": self.text(looks), "face": self.face(samples, looks)}
        return [
            with_tensors(
                sample, {part: (rows[i], self.made_with[part] | shown(look, part)) for part, rows in parts.items()}
            )
            for i, (sample, look) in enumerate(zip(samples, looks, strict=True))
        ]

    def look(self, sample: StoredSample) -> Any:
        """The sample as training sees it."""
        meta = sample.meta
        transform = transform_for(meta["height"], meta["width"], meta["num_frames"], self.num_references)
        return transform({"__key__": sample.key, **sample.fields})

    def latents(self, looks: Sequence[Any]) -> list[dict[str, Tensor]]:
        """Mean and log-variance, (F', C, h, w) float32."""
        pixels = torch.stack([look.pixels for look in looks]).to(self.models.device)  # (B, F, 3, H, W)
        mean, logvar = self.models.backbone.encode_video(pixels).chunk(2, dim=2)
        return rows_of(mean=mean, logvar=logvar)

    def text(self, looks: Sequence[Any]) -> list[dict[str, Tensor]]:
        """States (T, D) and the positions of the class word (T,)."""
        return rows_of(**self.models.text_encoder([look.caption for look in looks])._asdict())

    def face(self, samples: Sequence[StoredSample], looks: Sequence[Any]) -> list[dict[str, Tensor]]:
        """Dense features (R, L, D) of every kept reference, and its stored query (R, 128)."""
        pictures = torch.cat([look.references[look.reference_mask] for look in looks])  # (n, 3, S, S)
        last, penultimate = self.models.see(pictures)
        rows, start = [], 0
        for sample in samples:
            keys = [reference["key"] for reference in sample.meta["references"]]
            own = slice(start, start + len(keys))
            tensors = {"last_hidden_state": last[own], "penultimate_hidden_state": penultimate[own]}
            rows.append(tensors | {"id_query": self.queries.of(keys)})
            start += len(keys)
        return rows


@functools.cache
def transform_for(height: int, width: int, num_frames: int, num_references: int) -> Callable[[dict], Any]:
    """What training looks at, without chance; references as large as the stills, as their queries are of that size."""
    sizes = {"height": height, "width": width, "num_frames": num_frames, "reference_size": min(height, width)}
    return get_class(TRANSFORM)(**sizes, num_references=num_references, random_window=False)


def rows_of(**tensors: Tensor) -> list[dict[str, Tensor]]:
    """Tensors of a batch -> those of each sample."""
    return [dict(zip(tensors, rows, strict=True)) for rows in zip(*tensors.values(), strict=True)]


def keep_references(sample: StoredSample, num_references: int) -> StoredSample:
    """The sample with its first references."""
    meta = sample.meta
    meta["references"] = meta["references"][:num_references]
    kept = {reference["file"] for reference in meta["references"]}
    fields = {name: data for name, data in sample.fields.items() if not name.startswith("ref") or name in kept}
    return StoredSample(sample.key, fields | {"json": to_bytes(meta)})


def with_tensors(sample: StoredSample, parts: dict[str, tuple[dict[str, Tensor], dict[str, Any]]]) -> StoredSample:
    """Adds each part's tensors, and what they were made with, to the sample and to its json."""
    files = {}
    for part, (tensors, record) in parts.items():
        stored = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
        files[f"{part}.safetensors"] = save(stored, {"cache": json.dumps(record, sort_keys=True)})
    meta = sample.meta | {"cache": {part: record for part, (_, record) in parts.items()}}
    return StoredSample(sample.key, sample.fields | files | {"json": to_bytes(meta)})


class FrozenModels:
    """What encodes, loaded when first used, on the accelerator where there is one.

    Args:
        folder: a backbone in diffusers' layout with image_encoder/.
        dtype: of T5.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.dtype = folder, dtype
        self.device = find_device()

    @cached_property
    def backbone(self) -> Backbone:
        return Backbone.from_pretrained(self.folder, self.dtype, components=("vae", "text_encoder")).to(self.device)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        max_length = self.backbone.transformer_config.max_text_seq_length
        return TextEncoder(self.backbone.text_encoder, IdentityTokenizer(self.backbone.tokenizer, max_length))

    @cached_property
    def vision(self) -> CLIPVisionModel:
        return load_vision(self.folder / "image_encoder").to(self.device)

    def see(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, S, S) in [-1, 1] -> last and penultimate states (n, L, D), as `FaceFeatureEncoder.encode`."""
        pixel_values = clip_pixel_values(pictures.to(self.device), self.vision.config.image_size)
        states = self.vision(pixel_values.to(self.vision.dtype), output_hidden_states=True).hidden_states
        return states[-1], states[-2]


if __name__ == "__main__":
    main()
