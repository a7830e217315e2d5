import random

import numpy as np
import pytest

from mm_lightning.prepare.stages.duplicates import DuplicateIdentities, DuplicatePictures, duplicates
from mm_lightning.prepare.stages.identity import SAME_PERSON


def summary(key: str, embedding, identity: str | None = None, size: float = 100.0, recognizer: str = "arc") -> dict:
    faces = [{"box": [0, 0, size, size]}]
    meta = {"identity": identity or key, "recognizer": {"name": recognizer}, "faces": faces}
    return {"key": key, "meta": meta, "embedding": embedding}


def people(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    """Unit vectors of which none is near another, then noisy copies of the first half."""
    random = np.random.default_rng(seed)
    vectors = np.linalg.qr(random.normal(size=(dim, dim)))[0][:count]
    copies = vectors[: count // 2] + 0.1 * random.normal(size=(count // 2, dim))
    return np.concatenate([vectors, copies]).astype(np.float32) * 7


def test_copies_go_and_the_larger_face_stays():
    vectors = people(8)
    summaries = [summary(f"{i:02d}", v, size=50 if i in (0, 1) else 100) for i, v in enumerate(vectors)]
    rejected = DuplicateIdentities()(summaries)
    assert set(rejected) == {"00", "01", "10", "11"}  # 08 and 09 copy 00 and 01 with larger faces
    assert {r.reason for r in rejected.values()} == {"duplicate_identity"}
    assert rejected["10"].detail.startswith("02, similarity ")


def test_order_does_not_matter():
    summaries = [summary(f"{i:02d}", v) for i, v in enumerate(people(12))]
    expected = {key: str(r) for key, r in DuplicateIdentities()(summaries).items()}
    for seed in range(4):
        random.Random(seed).shuffle(summaries)
        assert {key: str(r) for key, r in DuplicateIdentities()(summaries).items()} == expected
    assert set(expected) == {f"{i}" for i in range(12, 18)}


def test_agrees_with_every_pair_looked_at():
    vectors = np.random.default_rng(3).normal(size=(300, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kept, left_out = [], set()
    for i, vector in enumerate(vectors):
        if any(vector @ vectors[j] >= 0.8 for j in kept):
            left_out.add(i)
        else:
            kept.append(i)
    assert set(duplicates(vectors, 0.8)) == left_out
    assert len(left_out) > 50


def test_no_chain_swallows_strangers():
    """a is near b and b near c, but a and c are two people: both stay."""
    angles = np.deg2rad([0, 40, 80])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    summaries = [summary(name, v, size=s) for name, v, s in zip("abc", vectors, (300, 200, 100), strict=True)]
    assert set(DuplicateIdentities(min_similarity=0.7)(summaries)) == {"b"}


def test_windows_of_one_shot_are_one_person():
    vectors = people(4)
    summaries = [summary(f"a{i}", vectors[0] + 0.01 * i, identity="a", size=90) for i in range(3)]
    summaries += [summary(f"b{i}", vectors[0], identity="b", size=80) for i in range(2)]
    summaries += [summary("c", vectors[1])]
    assert set(DuplicateIdentities()(summaries)) == {"b0", "b1"}


def test_threshold_is_the_recognisers():
    first, second = np.array([1.0, 0.0]), np.array([0.8, 0.6])
    assert SAME_PERSON["arcface"] < 0.8 < SAME_PERSON["dlib"]
    for recognizer, count in (("buffalo_l/w600k_r50", 1), ("dlib", 0)):
        summaries = [summary("a", first, recognizer=recognizer), summary("b", second, recognizer=recognizer)]
        assert len(DuplicateIdentities()(summaries)) == count
    mixed = [summary("a", first, recognizer="dlib"), summary("b", second)]
    with pytest.raises(ValueError, match="several recognisers"):
        DuplicateIdentities()(mixed)


def test_nothing_to_compare():
    assert DuplicateIdentities()([]) == {}
    assert DuplicateIdentities()([summary("a", None), summary("b", None)]) == {}


def test_same_bytes_from_two_sources():
    def made(key: str, source: str, digest: str) -> dict:
        return {"key": key, "meta": {"source": source, "source_sha256": digest}, "embedding": None}

    summaries = [
        made("b-w1", "b.mp4", "1"),
        made("b-w0", "b.mp4", "1"),
        made("c", "c.mp4", "2"),
        made("a", "a.mp4", "1"),
    ]
    rejected = DuplicatePictures()(summaries)
    assert {key: r.detail for key, r in rejected.items()} == dict.fromkeys(("b-w0", "b-w1"), "the same bytes as a.mp4")
