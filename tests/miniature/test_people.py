"""People are the same for a seed, balanced over class words, symmetric, and within what was found to look right."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from mm_lightning.miniature import people
from mm_lightning.miniature.captions import ATTRIBUTES
from mm_lightning.miniature.people import CLASS_WORDS, LIMITS, MIDDLE_CHANGES, PAIRED_CHANGES, sample_person

MANY = [sample_person(index) for index in range(300)]


def test_a_person_follows_from_index_and_seed():
    assert sample_person(17, 3) == sample_person(17, 3)
    assert sample_person(17, 3) != sample_person(17, 4)
    assert sample_person(17).id == "p00017"


def test_no_two_people_share_a_face():
    faces = np.array([list(person.local_changes.values()) for person in MANY])
    distances = np.linalg.norm(faces[:, None] - faces[None], axis=-1) + 99 * np.eye(len(faces))
    assert distances.min() > 3


def test_class_words_are_balanced_in_any_run_of_people():
    for start in (0, 7, 200):
        counts = collections.Counter(person.class_word for person in MANY[start : start + 60])
        assert counts == dict.fromkeys(CLASS_WORDS, 10)


@pytest.mark.parametrize("word", CLASS_WORDS)
def test_age_and_gender_agree_with_the_class_word(word: str):
    group = [person.phenotypes for person in MANY if person.class_word == word]
    ages, genders = (np.array([phenotypes[name] for phenotypes in group]) for name in ("age", "gender"))
    # anny: 0 is male; 1/3 is a child, 2/3 a young adult, 1 an old one.
    assert ((genders < 0.5) == ((word.endswith("man") and "woman" not in word) or word == "boy")).all()
    low, high = (0.8, 1) if word.startswith("elderly") else (0.2, 0.5) if word in ("boy", "girl") else (0.5, 0.8)
    assert ((ages >= low) & (ages <= high)).all()


def test_local_changes_are_symmetric_and_limited():
    for person in MANY:
        changes = person.local_changes
        assert len(changes) == 2 * len(PAIRED_CHANGES) + len(MIDDLE_CHANGES)
        assert all(changes[f"l-{name}"] == changes[f"r-{name}"] for name in PAIRED_CHANGES)
        for name in MIDDLE_CHANGES:
            assert abs(changes[name]) <= LIMITS.get(name, 1.0)


def test_limits_name_changes_that_exist():
    assert set(LIMITS) <= set(PAIRED_CHANGES + MIDDLE_CHANGES)


def test_changes_and_phenotypes_are_those_of_anny():
    pytest.importorskip("anny")
    from mm_lightning.miniature.anatomy import PHENOTYPES, load_anatomy

    assert set(people.LOCAL_CHANGES) == set(load_anatomy().local_change_rows)
    assert all(set(person.phenotypes) <= set(PHENOTYPES) for person in MANY)


def test_attributes_speak_the_words_of_captions():
    found = {name: {person.attributes[name] for person in MANY} for name in ATTRIBUTES}
    assert set(MANY[0].attributes) == set(ATTRIBUTES)
    for name, words in found.items():
        assert words <= set(ATTRIBUTES[name])
        assert len(words) > 1


def test_colours_are_colours():
    for person in MANY:
        for colour in (person.skin, person.lips, person.brows, person.iris, person.hair, person.shirt):
            assert len(colour) == 3
            assert min(colour) >= 0
            assert max(colour) <= 1


def test_nobody_has_a_negative_index():
    with pytest.raises(ValueError, match="index must be 0 or more, got -1"):
        sample_person(-1)
