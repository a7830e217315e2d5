"""Who lives in the miniature: shapes and colours of a person, drawn from a seed. Nothing is rendered here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

CLASS_WORDS = ("man", "woman", "elderly man", "elderly woman", "boy", "girl")
RGB = tuple[float, float, float]

# anny's local changes that concern the face; those with sides are given without "l-" and "r-". Moves to the side would
# only break the symmetry of the head.
PAIRED_CHANGES = (
    "cheek-trans-up", "cheek-volume-incr", "cheek-inner-incr", "cheek-bones-incr", "ear-lobe-incr", "ear-shape-round",
    "ear-trans-forward", "ear-rot-forward", "ear-trans-up", "ear-scale-vert-incr", "ear-flap-incr",
    "ear-shape-triangle", "ear-scale-incr", "ear-scale-depth-incr", "ear-wing-incr", "eye-corner1-up",
    "eye-height1-incr", "eye-scale-incr", "eye-push1-out", "eye-eyefold-up", "eye-height3-incr", "eye-height2-incr",
    "eye-bag-incr", "eye-push2-out", "eye-trans-up", "eye-bag-height-incr", "eye-epicanthus-out",
    "eye-eyefold-angle-up", "eye-bag-out", "eye-corner2-up", "eye-trans-out",
)  # fmt: skip
MIDDLE_CHANGES = (
    "chin-jaw-drop-incr", "chin-height-incr", "chin-prominent-incr", "chin-bones-incr", "chin-width-incr",
    "chin-cleft-incr", "chin-prognathism-incr", "eyebrows-angle-up", "eyebrows-trans-up", "eyebrows-trans-forward",
    "forehead-temple-incr", "forehead-trans-forward", "forehead-scale-vert-incr", "forehead-nubian-incr",
    "head-angle-out", "head-scale-vert-incr", "head-fat-incr", "head-back-scale-depth-incr", "head-age-incr",
    "head-scale-depth-incr", "head-scale-horiz-incr", "mouth-lowerlip-height-incr", "mouth-scale-horiz-incr",
    "mouth-cupidsbow-incr", "mouth-laugh-lines-out", "mouth-scale-depth-incr", "mouth-lowerlip-volume-incr",
    "mouth-angles-up", "mouth-upperlip-ext-up", "mouth-lowerlip-width-incr", "mouth-trans-forward",
    "mouth-upperlip-width-incr", "mouth-scale-vert-incr", "mouth-dimples-out", "mouth-upperlip-height-incr",
    "mouth-upperlip-volume-incr", "mouth-cupidsbow-width-incr", "mouth-lowerlip-ext-up", "mouth-upperlip-middle-up",
    "mouth-trans-up", "mouth-lowerlip-middle-up", "mouth-philtrum-volume-incr", "neck-double-incr",
    "neck-scale-horiz-incr", "nose-nostrils-angle-up", "nose-flaring-incr", "nose-curve-convex",
    "nose-scale-depth-incr", "nose-scale-vert-incr", "nose-point-width-incr", "nose-scale-horiz-incr",
    "nose-width1-incr", "nose-trans-forward", "nose-trans-up", "nose-hump-incr", "nose-nostrils-width-incr",
    "nose-greek-incr", "nose-point-up", "nose-width2-incr", "nose-width3-incr", "nose-septumangle-incr",
    "nose-base-up", "nose-compression-uncompress", "nose-volume-incr",
)  # fmt: skip
LOCAL_CHANGES = tuple(f"{side}-{name}" for name in PAIRED_CHANGES for side in "lr") + MIDDLE_CHANGES
# Standard deviation of a change; a child's smaller features take less before they look wrong.
SPREAD, CHILD_SPREAD = 0.6, 0.5
# Narrower where the extremes look broken: lids that no longer meet the eyeball, lips through teeth, pointed heads.
LIMITS = {
    "cheek-inner-incr": 0.7, "cheek-volume-incr": 0.5, "chin-cleft-incr": 0.6, "chin-height-incr": 0.3,
    "chin-jaw-drop-incr": 0.45, "chin-prognathism-incr": 0.7, "chin-width-incr": 0.7, "ear-scale-incr": 0.7,
    "ear-shape-triangle": 0.6, "ear-wing-incr": 0.6, "eye-epicanthus-out": 0.7, "eye-height1-incr": 0.6,
    "eye-height2-incr": 0.6, "eye-height3-incr": 0.6, "eye-push1-out": 0.5, "eye-push2-out": 0.5,
    "eye-scale-incr": 0.6, "eye-trans-out": 0.6, "eye-trans-up": 0.4, "eyebrows-angle-up": 0.6,
    "eyebrows-trans-forward": 0.4, "forehead-nubian-incr": 0.25, "forehead-scale-vert-incr": 0.25,
    "forehead-trans-forward": 0.7, "head-age-incr": 0.5, "head-angle-out": 0.4, "head-fat-incr": 0.5,
    "head-scale-depth-incr": 0.6, "head-scale-horiz-incr": 0.5, "head-scale-vert-incr": 0.35, "mouth-angles-up": 0.6,
    "mouth-laugh-lines-out": 0.6, "mouth-lowerlip-ext-up": 0.5, "mouth-lowerlip-middle-up": 0.5,
    "mouth-trans-forward": 0.5, "mouth-trans-up": 0.35, "mouth-upperlip-ext-up": 0.5, "mouth-upperlip-middle-up": 0.5,
    "neck-double-incr": 0.6, "nose-base-up": 0.6, "nose-compression-uncompress": 0.6, "nose-nostrils-angle-up": 0.6,
    "nose-scale-depth-incr": 0.6, "nose-scale-vert-incr": 0.6, "nose-septumangle-incr": 0.6,
    "nose-trans-forward": 0.6, "nose-trans-up": 0.4, "nose-volume-incr": 0.7,
}  # fmt: skip

SKIN = {"african": (0.53, 0.35, 0.255), "asian": (0.83, 0.63, 0.47), "caucasian": (0.93, 0.74, 0.64)}
HAIR = {
    "black": (0.06, 0.05, 0.05), "brown": (0.25, 0.14, 0.08), "chestnut": (0.40, 0.20, 0.11), "red": (0.62, 0.26, 0.10),
    "blond": (0.80, 0.62, 0.34), "grey": (0.55, 0.54, 0.53), "white": (0.86, 0.85, 0.83),
}  # fmt: skip
IRIS = {
    "brown": (0.28, 0.15, 0.07), "hazel": (0.45, 0.33, 0.14), "green": (0.28, 0.45, 0.26), "blue": (0.25, 0.45, 0.70),
    "grey": (0.48, 0.54, 0.58),
}  # fmt: skip
SHIRTS = (
    (0.20, 0.24, 0.34), (0.55, 0.18, 0.20), (0.22, 0.40, 0.33), (0.86, 0.86, 0.84), (0.32, 0.32, 0.34),
    (0.42, 0.30, 0.50),
)  # fmt: skip
HAIR_STYLES = {
    "man": ("bald", "buzzed", "short", "short", "curly", "parted"),
    "elderly man": ("bald", "receding", "receding", "short", "parted"),
    "boy": ("buzzed", "short", "fringe", "curly"),
    "woman": ("long", "long", "bob", "curly", "bun", "bob"),
    "elderly woman": ("bob", "bun", "curly", "parted"),
    "girl": ("long", "bob", "fringe", "bun"),
}
# Words of the attributes where they are fewer than the things themselves.
STYLE_WORDS = {"bald": "bald", "curly": "curly", "long": "long", "bob": "long"}
HAIR_WORDS, IRIS_WORDS = {"chestnut": "brown"}, {"hazel": "brown"}
SKIN_WORDS, SKIN_BRIGHTNESS = ("dark", "brown", "tan", "light", "pale"), (0.40, 0.50, 0.60, 0.70)
BEARDS = ("none", "none", "none", "stubble", "moustache", "beard")
AGES = {"boy": (0.30, 0.40), "girl": (0.30, 0.40), "man": (0.58, 0.78), "woman": (0.56, 0.74)}
ELDERLY_AGE = (0.86, 0.97)


@dataclass(frozen=True)
class Person:
    """One identity. Colours are RGB in [0, 1].

    Attributes:
        phenotypes, local_changes: what anny's mesh is built from, by anny's names.
        hair_volume: 0 flat to 1 full; hairline: -1 low to 1 high.
        brow_thickness, brow_arch: relative, about 1; brow_height: metres above the usual.
        freckles, wrinkles: 0 none to 1 strong.
        detail_seed: of the pattern of spots and strands.
    """

    index: int
    seed: int
    class_word: str
    phenotypes: dict[str, float]
    local_changes: dict[str, float]
    skin: RGB
    lips: RGB
    brows: RGB
    iris: RGB
    hair: RGB
    shirt: RGB
    hair_style: str
    hair_volume: float
    hairline: float
    beard: str
    brow_thickness: float
    brow_arch: float
    brow_height: float
    freckles: float
    wrinkles: float
    hair_name: str
    iris_name: str
    detail_seed: int

    @property
    def id(self) -> str:
        return f"p{self.index:05d}"

    @property
    def attributes(self) -> dict[str, str]:
        """Words for what tells people apart; they belong in the attribute-rich caption only."""
        style = STYLE_WORDS.get(self.hair_style, "short")
        return {"skin": self.skin_name, "hair": HAIR_WORDS.get(self.hair_name, self.hair_name)} | {
            "hair_style": style,
            "eyes": IRIS_WORDS.get(self.iris_name, self.iris_name),
        }

    @property
    def skin_name(self) -> str:
        return SKIN_WORDS[int(np.searchsorted(SKIN_BRIGHTNESS, sum(self.skin) / 3))]


def sample_person(index: int, seed: int = 0) -> Person:
    """Person number `index` of the world `seed`; class words take turns, so that any run of people is balanced.

    Raises:
        ValueError: a negative index.
    """
    if index < 0:
        raise ValueError(f"index must be 0 or more, got {index}")
    rng = person_rng(index, seed)
    class_word = CLASS_WORDS[index % len(CLASS_WORDS)]
    phenotypes = sample_phenotypes(class_word, rng)
    skin = sample_skin(phenotypes, rng)
    hair_name = sample_hair_name(class_word, phenotypes, rng)
    iris_name = sample_iris_name(phenotypes, rng)
    hair = jitter(HAIR[hair_name], 0.03 if hair_name in ("grey", "white") else 0.12, rng)
    return Person(
        index=index,
        seed=seed,
        class_word=class_word,
        phenotypes=phenotypes,
        local_changes=sample_local_changes(SPREAD if is_adult(phenotypes) else CHILD_SPREAD, rng),
        skin=skin,
        hair=hair,
        hair_name=hair_name,
        iris_name=iris_name,
        **sample_colours(phenotypes, skin, hair, iris_name, rng),
        **sample_cut(class_word, phenotypes, rng),
        **sample_details(class_word, phenotypes, rng),
    )


def is_male(phenotypes: dict[str, float]) -> bool:
    return phenotypes["gender"] < 0.5


def is_adult(phenotypes: dict[str, float]) -> bool:
    return phenotypes["age"] > 0.5


def sample_colours(
    phenotypes: dict[str, float], skin: RGB, hair: RGB, iris_name: str, rng: np.random.Generator
) -> dict[str, RGB]:
    """Colours of lips, brows, iris and shirt."""
    made_up = is_adult(phenotypes) and not is_male(phenotypes) and rng.random() < 0.5
    return {
        "lips": sample_lips(skin, made_up, rng),
        "brows": mix(hair, (0.1, 0.07, 0.05), rng.uniform(0.3, 0.75)),
        "iris": jitter(IRIS[iris_name], 0.15, rng),
        "shirt": SHIRTS[rng.integers(len(SHIRTS))],
    }


def sample_cut(class_word: str, phenotypes: dict[str, float], rng: np.random.Generator) -> dict[str, Any]:
    """Hair style, volume, hairline and beard."""
    return {
        "hair_style": str(rng.choice(HAIR_STYLES[class_word])),
        "hair_volume": float(rng.uniform(0, 1)),
        "hairline": float(rng.uniform(-1, 1)),
        "beard": str(rng.choice(BEARDS)) if is_male(phenotypes) and is_adult(phenotypes) else "none",
    }


def sample_details(class_word: str, phenotypes: dict[str, float], rng: np.random.Generator) -> dict[str, Any]:
    """Brows, freckles, wrinkles, and the seed of everything finer."""
    return {
        "brow_thickness": float(rng.uniform(0.7, 1.8) if is_male(phenotypes) else rng.uniform(0.5, 1.4)),
        "brow_arch": float(rng.uniform(0.0, 1.8)),
        "brow_height": float(rng.uniform(-0.003, 0.005)),
        "freckles": float(max(rng.uniform(-1, 1), 0)),
        "wrinkles": float(rng.uniform(0.6, 1)) if class_word.startswith("elderly") else 0.0,
        "detail_seed": int(rng.integers(2**31)),
    }


def person_rng(index: int, seed: int) -> np.random.Generator:
    """A stream of its own for each person, the same on every machine."""
    digest = hashlib.sha256(f"miniature person {seed} {index}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def sample_phenotypes(class_word: str, rng: np.random.Generator) -> dict[str, float]:
    """anny's phenotypes; its gender runs from 0 male to 1 female, its age 1/3 child, 2/3 young, 1 old."""
    male = class_word.split()[-1] in ("man", "boy")
    african, asian, caucasian = rng.dirichlet([0.3, 0.3, 0.3])
    return {
        "gender": 0.05 if male else 0.95,
        "age": float(rng.uniform(*AGES.get(class_word, ELDERLY_AGE))),
        "weight": float(rng.uniform(0.2, 0.75)),
        "muscle": float(rng.uniform(0.3, 0.7)),
        "african": float(african),
        "asian": float(asian),
        "caucasian": float(caucasian),
    }


def sample_local_changes(spread: float, rng: np.random.Generator) -> dict[str, float]:
    """Every change of the face, normal and clipped; left and right share a value."""
    changes = {}
    for name in PAIRED_CHANGES + MIDDLE_CHANGES:
        limit = LIMITS.get(name, 1.0)
        value = float(np.clip(rng.normal(0, spread), -limit, limit))
        changes |= {f"l-{name}": value, f"r-{name}": value} if name in PAIRED_CHANGES else {name: value}
    return changes


def sample_skin(phenotypes: dict[str, float], rng: np.random.Generator) -> RGB:
    tone = sum(phenotypes[name] * np.array(colour) for name, colour in SKIN.items())
    return jitter(tuple(tone * rng.uniform(0.84, 1.08)), 0.025, rng)


def sample_lips(skin: RGB, made_up: bool, rng: np.random.Generator) -> RGB:
    natural = mix(skin, (0.62, 0.22, 0.22), rng.uniform(0.3, 0.6))
    return mix(natural, jitter((0.70, 0.10, 0.16), 0.2, rng), 0.6) if made_up else natural


def sample_hair_name(class_word: str, phenotypes: dict[str, float], rng: np.random.Generator) -> str:
    if class_word.startswith("elderly") and rng.random() < 0.8:
        return str(rng.choice(["grey", "white"]))
    fair = phenotypes["caucasian"] ** 2
    chances = np.array([1.2 - fair, 0.4, 0.1 + 0.3 * fair, 0.5 * fair, 1.0 * fair])
    return str(rng.choice(["black", "brown", "chestnut", "red", "blond"], p=chances / chances.sum()))


def sample_iris_name(phenotypes: dict[str, float], rng: np.random.Generator) -> str:
    fair = phenotypes["caucasian"] ** 2
    chances = np.array([1.3 - fair, 0.3, 0.05 + 0.5 * fair, 0.05 + 0.8 * fair, 0.05 + 0.4 * fair])
    return str(rng.choice(list(IRIS), p=chances / chances.sum()))


def mix(first: RGB, second: RGB, share: float) -> RGB:
    """`first` with a share of `second` in it."""
    return tuple(float((1 - share) * a + share * b) for a, b in zip(first, second, strict=True))


def jitter(colour: RGB, amount: float, rng: np.random.Generator) -> RGB:
    """A colour near `colour`: each channel and the whole changed by factors of up to `amount`."""
    factors = rng.uniform(1 - amount, 1 + amount, 3) * rng.uniform(1 - amount, 1 + amount)
    return tuple(float(value) for value in np.clip(np.array(colour) * factors, 0.02, 0.97))
