"""The people that the package ships are those of the recipe, as many and as small as was asked."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from mm_lightning.encoders.recognizer import load_recognizer
from mm_lightning.miniature.filming import person_samples
from mm_lightning.miniature.layout import FIRST_PERSON, KINDS, SPLITS, WorldSettings, read_samples
from mm_lightning.miniature.packing import ASSETS, read_manifest, unpack_split
from mm_lightning.miniature.people import sample_person
from mm_lightning.miniature.queries import QUERIES_NAME, load_queries, read_queries

MAX_BYTES = 20_000_000
NUM_PEOPLE = {"train": 1200, "validation": 64, "test": 64}


@pytest.fixture(scope="module")
def manifest():
    return read_manifest(ASSETS)


@pytest.fixture(scope="module")
def shipped(manifest, tmp_path_factory):
    """Shards of the test people."""
    folder = tmp_path_factory.mktemp("people") / "test"
    unpack_split(ASSETS / "test.tar.xz", manifest["archives"]["test"]["sha256"], folder)
    return folder


def test_they_are_as_many_and_take_as_little_room_as_asked(manifest):
    sizes = {split: (ASSETS / f"{split}.tar.xz").stat().st_size for split in SPLITS}
    assert sizes == {split: archive["num_bytes"] for split, archive in manifest["archives"].items()}
    assert sum(sizes.values()) < MAX_BYTES
    settings = WorldSettings(**manifest["people"]["settings"])
    assert {split: getattr(settings, split) for split in SPLITS} == NUM_PEOPLE
    assert (settings.stills, settings.clips, settings.num_frames, settings.fps, settings.size) == (4, 1, 17, 8, 64)


def test_everybody_has_stills_a_clip_and_queries(shipped):
    samples = {kind: list(read_samples(shipped / kind)) for kind in KINDS}
    people = {kind: {sample.meta["identity"] for sample in found} for kind, found in samples.items()}
    assert len(people["images"]) == NUM_PEOPLE["test"]
    assert people["images"] == people["videos"]
    assert {kind: len(found) for kind, found in samples.items()} == {"images": 4 * 64, "videos": 64}
    load_queries(shipped)  # of these very stills, or it raises
    assert read_queries(shipped / QUERIES_NAME)[0].shape == (4 * 64, 128)


def test_statistics_of_the_train_people_standardise_the_test_people(shipped):
    """dlib's embeddings of people who took no part in them have about mean 0, spread 1; strangers are at cosine 0."""
    queries = load_recognizer("dlib_standardized").standardize(load_queries(shipped).values).double()
    assert queries.mean(0).abs().mean() < 0.15
    assert queries.std(0).mean() == pytest.approx(1, abs=0.1)
    cosines = normalize(queries) @ normalize(queries).T
    people = torch.arange(len(queries)) // 4
    same = people[:, None] == people
    assert cosines[~same].mean().abs() < 0.05
    assert cosines[same & ~torch.eye(len(queries), dtype=torch.bool)].mean() > 0.6


def test_a_shipped_person_is_what_the_recipe_renders_now(shipped, manifest):
    """Byte for byte, pictures and clip too."""
    render = pytest.importorskip("mm_lightning.miniature.render", reason="needs the extra [miniature]")
    settings = WorldSettings(**manifest["people"]["settings"])
    person = sample_person(FIRST_PERSON["test"], settings.seed)
    rendered = person_samples(render.Renderer(settings.size), person, settings)
    stored = {(kind, sample.key): sample.fields for kind in KINDS for sample in read_samples(shipped / kind)}
    assert len(rendered) == 5
    for new in rendered:
        assert sorted(new.fields) == sorted(stored[new.folder, new.key])
        assert [name for name, data in new.fields.items() if data != stored[new.folder, new.key][name]] == []
