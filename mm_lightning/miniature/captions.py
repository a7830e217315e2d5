"""What is said of a clip: a small grammar in the style of the paper's prompts, and the way back from text to meaning.

    A young woman img turns her head and smiles, in front of a green wall

Beside the class word nothing in `caption` is about who is shown, so that the person can only be learned from the
reference photos; `rich_caption` says skin, hair and eyes too, for the backbone's own training. `VOCABULARY` is closed:
a tokenizer that knows these words needs one token for each.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

TRIGGER = "img"
MAX_TOKENS = 24
CLASS_WORDS = ("man", "woman", "elderly man", "elderly woman", "boy", "girl")
POSSESSIVES = {"man": "his", "woman": "her", "boy": "his", "girl": "her"}


class Phrase(NamedTuple):
    """One way to say an action; `their` stands for his or her."""

    finite: str
    gerund: str


ACTIONS: dict[str, tuple[Phrase, ...]] = {
    "neutral": (Phrase("looks at the camera", "looking at the camera"), Phrase("stays calm", "staying calm")),
    "smile": (Phrase("smiles", "smiling"), Phrase("looks happy", "looking happy")),
    "talk": (Phrase("talks", "talking"), Phrase("speaks", "speaking")),
    "frown": (Phrase("frowns", "frowning"), Phrase("looks angry", "looking angry")),
    "surprise": (Phrase("is surprised", "being surprised"), Phrase("looks surprised", "looking surprised")),
    "blink": (Phrase("blinks", "blinking"), Phrase("closes their eyes", "closing their eyes")),
    "look_around": (Phrase("looks around", "looking around"), Phrase("moves their eyes", "moving their eyes")),
    "turn_head": (Phrase("turns their head", "turning their head"), Phrase("turns", "turning")),
    "nod": (Phrase("nods", "nodding"), Phrase("nods their head", "nodding their head")),
}
BACKGROUNDS = ("grey", "white", "blue", "green", "red", "yellow")
PLACES = (", in front of a {} wall", ", against a {} wall", "before a {} background", "before a {} wall")
LIGHTS: dict[str, tuple[str, ...]] = {
    "frontal": ("in even light", "in soft light"),
    "left": (", lit from the left",),
    "right": (", lit from the right",),
    "warm": ("in warm light",),
    "cool": ("in cool light",),
}
ADJECTIVE, ADJECTIVE_CLASSES = "young", ("man", "woman", "boy", "girl")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "skin": ("pale", "light", "tan", "brown", "dark"),
    "hair": ("black", "brown", "blond", "red", "grey", "white"),
    "hair_style": ("short", "long", "curly", "bald"),
    "eyes": ("brown", "blue", "green", "grey"),
}
ARTICLES = ("A", "An", "a", "an")
ADJECTIVE_RATE, LIGHT_RATE, GERUND_RATE = 0.3, 0.3, 0.3


class Described(Protocol):
    """What a caption needs to know of a person."""

    class_word: str
    attributes: dict[str, str]


class Performed(Protocol):
    """What a caption needs to know of a performance."""

    names: Sequence[str]
    light: str
    background: str


class ParsedCaption(NamedTuple):
    """What a caption says; None, or empty, where it says nothing."""

    class_word: str | None
    actions: tuple[str, ...]  # in the order of ACTIONS
    background: str | None
    light: str | None


def caption(person: Described, performance: Performed, rng: np.random.Generator) -> str:
    """A prompt with trigger that says class, actions and background, and now and then the light.

    Raises:
        ValueError: the grammar has no word for one of these.
    """
    who = f"{describe_class(person.class_word, rng)} {TRIGGER}"
    did = describe_actions(performance.names, person.class_word, rng)
    places, lights = describe_scene(performance, rng)
    return extend(f"{who} {did} {places[0]}", [lights] if rng.random() < LIGHT_RATE else [])


def rich_caption(person: Described, performance: Performed, rng: np.random.Generator) -> str:
    """As `caption`, with skin, hair and eyes; background and light are left out where there is no room for them.

    Raises:
        ValueError: the grammar has no word for one of these.
    """
    who = f"{describe_class(person.class_word, rng)} {TRIGGER} {describe_attributes(person.attributes, rng)}"
    did = describe_actions(performance.names, person.class_word, rng)
    return extend(f"{who} {did}", describe_scene(performance, rng))


def describe_class(class_word: str, rng: np.random.Generator) -> str:
    known(class_word, CLASS_WORDS, "class word")
    if class_word in ADJECTIVE_CLASSES and rng.random() < ADJECTIVE_RATE:
        class_word = f"{ADJECTIVE} {class_word}"
    return f"{'An' if class_word[0] in 'aeiou' else 'A'} {class_word}"


def describe_actions(names: Sequence[str], class_word: str, rng: np.random.Generator) -> str:
    """One or two actions, in the order given: "talks and nods", "talks while nodding"."""
    if not 1 <= len(names) <= 2:
        raise ValueError(f"{len(names)} actions {tuple(names)}: a caption tells one or two.")
    phrases = [pick(ACTIONS[known(name, ACTIONS, "action")], rng) for name in names]
    if len(phrases) == 1:
        text = phrases[0].finite
    elif rng.random() < GERUND_RATE:
        text = f"{phrases[0].finite} while {phrases[1].gerund}"
    else:
        text = f"{phrases[0].finite} and {phrases[1].finite}"
    return text.replace("their", POSSESSIVES[class_word.split()[-1]])


def describe_attributes(attributes: dict[str, str], rng: np.random.Generator) -> str:
    """Skin, hair and eyes in any order."""
    words = {name: known(attributes[name], values, name) for name, values in ATTRIBUTES.items()}
    hair = "a bald head" if words["hair_style"] == "bald" else f"{words['hair_style']} {words['hair']} hair"
    parts = rng.permutation([f"{words['skin']} skin", hair, f"{words['eyes']} eyes"])
    return "with {}, {} and {}".format(*parts)


def describe_scene(performance: Performed, rng: np.random.Generator) -> list[list[str]]:
    """Ways to say the background, and ways to say the light, shuffled."""
    colour = known(performance.background, BACKGROUNDS, "background")
    places = [place.format(colour) for place in rng.permutation(PLACES)]
    return [places, [str(light) for light in rng.permutation(LIGHTS[known(performance.light, LIGHTS, "light")])]]


def extend(text: str, groups: Sequence[Sequence[str]]) -> str:
    """Adds, of each group, the first way to say it for which there is room."""
    for ways in groups:
        text = next((f"{text} {way}" for way in ways if num_tokens(f"{text} {way}") <= MAX_TOKENS), text)
    return text.replace(" ,", ",")


def known(word: str, words: Collection[str], what: str) -> str:
    if word not in words:
        raise ValueError(f"{what} {word!r}: the grammar knows {', '.join(words)}.")
    return word


def pick(values: Sequence, rng: np.random.Generator):
    return values[rng.integers(len(values))]


# Words


def words_of(text: str) -> list[str]:
    """Words and commas."""
    return re.findall(r"[\w'-]+|,", text)


def num_tokens(text: str) -> int:
    """Of a caption as the text encoder gets it: one per word, the trigger left out, the class word twice, `</s>`."""
    words = words_of(text)
    return len(words) - words.count(TRIGGER) + 2


def every_phrase() -> Iterator[str]:
    """Everything that the grammar puts together."""
    yield from ("A", "An", "a", "an", TRIGGER, ADJECTIVE, "and while with , skin hair head eyes", *CLASS_WORDS)
    for phrases in ACTIONS.values():
        for phrase in phrases:
            yield from (text.replace("their", word) for text in phrase for word in ("his", "her", "their"))
    yield from (place.format(colour) for place in PLACES for colour in BACKGROUNDS)
    for words in (*LIGHTS.values(), *ATTRIBUTES.values()):
        yield from words


VOCABULARY: tuple[str, ...] = tuple(sorted({word for phrase in every_phrase() for word in words_of(phrase)}))


# From text to meaning


def parse_caption(text: str) -> ParsedCaption:
    """What a caption, plain or rich, says of class, actions, background and light; any case, trigger or not."""
    text = " ".join(words_of(text)).lower()
    noun = re.search(r"\b(elderly )?(?:young )?(man|woman|boy|girl)\b", text)
    place = re.search(rf"\b({'|'.join(BACKGROUNDS)}) (?:wall|background)\b", text)
    lights = [name for name, ways in LIGHTS.items() if any(says(text, way.lstrip(", ")) for way in ways)]
    return ParsedCaption(
        class_word="".join(filter(None, noun.groups())) if noun else None,
        actions=tuple(name for name, phrases in ACTIONS.items() if any(says(text, w) for p in phrases for w in p)),
        background=place.group(1) if place else None,
        light=lights[0] if lights else None,
    )


def says(text: str, phrase: str) -> bool:
    """Whether the phrase stands in the text as whole words, whoever's head is turned."""
    return re.search(rf"\b{phrase.replace('their', '(?:his|her|their)')}\b", text) is not None
