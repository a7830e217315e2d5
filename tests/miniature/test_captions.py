"""Captions: a closed vocabulary, nothing about who is shown, and everything else can be read back."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest

from mm_lightning.encoders.text import IdentityTokenizer
from mm_lightning.miniature import motion, people
from mm_lightning.miniature.captions import (
    ACTIONS,
    BACKGROUNDS,
    CLASS_WORDS,
    LIGHTS,
    MAX_TOKENS,
    VOCABULARY,
    caption,
    num_tokens,
    parse_caption,
    rich_caption,
)
from mm_lightning.miniature.motion import sample_clip
from mm_lightning.miniature.people import sample_person
from mm_lightning.miniature.tokenizer import build_tokenizer

NUM_SAMPLES = 1500
REVEALING = re.compile(
    r"\b(skin|hair|bald|curly|long|short|beard|pale|tan|dark|black|brown|blond|old|tall|round|"
    r"(?:grey|white|blue|green|red|yellow)(?! (?:wall|background)\b))\b"
)


@pytest.fixture(scope="module")
def told():
    """(person, performance, caption, rich caption) of many people and performances, as the world draws them."""
    rows = []
    for i in range(NUM_SAMPLES):
        person, performance = sample_person(i % 120), sample_clip(np.random.default_rng(i), num_frames=5)
        texts = (tell(person, performance, np.random.default_rng([i, 7])) for tell in (caption, rich_caption))
        rows.append((person, performance, *texts))
    return rows


def test_grammar_knows_every_word_of_people_and_performances():
    assert set(CLASS_WORDS) == set(people.CLASS_WORDS)
    assert set(ACTIONS) == set(motion.NAMES)
    assert set(BACKGROUNDS) == set(motion.BACKGROUNDS)
    assert set(LIGHTS) == set(motion.LIGHTS)


def test_vocabulary_is_closed_and_small(told):
    said = {word for *_, plain, rich in told for word in re.findall(r"[A-Za-z]+|,", f"{plain} {rich}")}
    assert said <= set(VOCABULARY)
    assert len(VOCABULARY) <= 120


def test_caption_says_nothing_about_who_is_shown(told):
    assert not [plain for *_, plain, _ in told if REVEALING.search(plain)]
    assert all(REVEALING.search(rich) for *_, rich in told)


def test_people_of_one_class_get_the_same_captions():
    performance = sample_clip(np.random.default_rng(3), num_frames=5)
    texts = {caption(sample_person(6 * i), performance, np.random.default_rng(0)) for i in range(30)}
    assert len(texts) == 1


def test_everything_can_be_read_back(told):
    for person, performance, plain, _ in told:
        parsed = parse_caption(plain)
        assert parsed.class_word == person.class_word
        assert set(parsed.actions) == set(performance.names)
        assert parsed.background == performance.background
        assert parsed.light in (None, performance.light)


def test_rich_caption_can_be_read_back_and_names_the_attributes(told):
    with_background = 0
    for person, performance, _, rich in told:
        parsed = parse_caption(rich)
        assert (parsed.class_word, set(parsed.actions)) == (person.class_word, set(performance.names))
        assert parsed.background in (None, performance.background)
        assert f"{person.attributes['skin']} skin" in rich
        assert f"{person.attributes['eyes']} eyes" in rich
        assert (
            "bald head" if person.attributes["hair_style"] == "bald" else f"{person.attributes['hair']} hair"
        ) in rich
        with_background += parsed.background is not None
    assert with_background > 0.8 * len(told)


def test_trigger_follows_the_class_word(told):
    for person, _, plain, rich in told:
        for text in (plain, rich):
            assert text.split().count("img") == 1
            assert re.search(rf"\b{person.class_word} img\b", text)
            assert re.match(r"An [aeiou]|A [^aeiou]", text)


def test_captions_fit_the_text_encoder_with_a_token_for_every_word(told):
    tokenizer = IdentityTokenizer(build_tokenizer(64), max_length=64)
    for text in itertools.chain.from_iterable(row[2:] for row in told[:300]):
        length = int(tokenizer([text]).attention_mask.sum())
        assert length == num_tokens(text) <= MAX_TOKENS


def test_worst_case_fits():
    pairs = itertools.product(ACTIONS, ACTIONS)
    for (first, second), colour, light, seed in itertools.product(pairs, ("yellow",), LIGHTS, range(4)):
        performance = SimpleNamespace(names=(first, second), background=colour, light=light)
        person = SimpleNamespace(class_word="elderly woman", attributes=sample_person(3).attributes)
        for tell in (caption, rich_caption):
            assert num_tokens(tell(person, performance, np.random.default_rng(seed))) <= MAX_TOKENS


def test_same_seed_same_caption_other_seed_other_words():
    person, performance = sample_person(1), sample_clip(np.random.default_rng(5), num_frames=5)
    texts = [caption(person, performance, np.random.default_rng(seed)) for seed in (0, 0, *range(1, 9))]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 3


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a WOMAN img smiles", ("woman", ("smile",), None, None)),
        (
            "An elderly man nods his head, against a blue background, lit from the left",
            ("elderly man", ("nod",), "blue", "left"),
        ),
        ("a girl with blue eyes looks around while talking", ("girl", ("talk", "look_around"), None, None)),
        ("A young boy turns his head and closes his eyes in warm light", ("boy", ("blink", "turn_head"), None, "warm")),
        ("a tree in front of a red wall", (None, (), "red", None)),
        ("", (None, (), None, None)),
    ],
)
def test_parsing_what_people_type(text, wanted):
    assert tuple(parse_caption(text)) == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_word": "robot"}, "class word 'robot': the grammar knows man, woman"),
        ({"names": ("fly",)}, "action 'fly'"),
        ({"names": ()}, "0 actions"),
        ({"names": ("smile", "talk", "nod")}, "3 actions"),
        ({"background": "pink"}, "background 'pink'"),
        ({"light": "dim"}, "light 'dim'"),
    ],
)
def test_words_that_the_grammar_lacks(change, message):
    fields = {"class_word": "man", "names": ("smile",), "background": "grey", "light": "warm"} | change
    with pytest.raises(ValueError, match=message):
        caption(SimpleNamespace(**fields, attributes={}), SimpleNamespace(**fields), np.random.default_rng(0))
