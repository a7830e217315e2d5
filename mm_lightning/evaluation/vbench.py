"""VBench's list of prompts (Huang et al., CVPR 2024), where the user has it: those of one person, for the protocol."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mm_lightning.encoders.text import IDENTITY_ADJECTIVES, IDENTITY_NOUNS, whole_words

EXAMPLE = '[{"prompt_en": "A person is riding a bike", "dimension": ["human_action"]}]'
NEUTRAL = ("person",)  # may be anybody's word
# A prompt with one of these has more than one person in it.
SEVERAL = whole_words(
    (
        *("people", "persons", "men", "women", "boys", "girls", "children", "kids", "babies", "guys", "ladies"),
        *("gentlemen", "toddlers", "infants", "teenagers", "grandparents", "parents", "twins", "friends", "students"),
        *("couple", "crowd", "group", "family", "team", "band", "audience", "everyone", "everybody", "together"),
    )
)


class Prompt(NamedTuple):
    """A prompt of one person."""

    template: str  # {person} in place of the class word
    word: str  # the class word, lower case


def read_prompts(file: Path, dimensions: Sequence[str] | None) -> list[Prompt]:
    """The prompts of VBench_full_info.json that show one person, each once, in order.

    Args:
        dimensions: such as human_action; None takes all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a dimension that is not in it, or no prompt of one person.
    """
    rows = read_rows(file)
    known = sorted({name for row in rows for name in row["dimension"]})
    unknown = sorted(set(dimensions or ()) - set(known))
    if unknown:
        raise ValueError(f"vbench_dimensions: {', '.join(unknown)} not in {file}; it has {', '.join(known)}.")
    chosen = [row["prompt_en"] for row in rows if dimensions is None or set(dimensions) & set(row["dimension"])]
    prompts = [prompt for text in dict.fromkeys(chosen) if (prompt := of_one_person(text)) is not None]
    if not prompts:
        raise ValueError(f"vbench={file}: none of its {len(chosen)} prompts of {dimensions or 'all'} is of one person.")
    return prompts


def read_rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise FileNotFoundError(f"vbench={file} is not there: give VBench's VBench_full_info.json.")
    wrong = f"vbench={file} is not VBench's VBench_full_info.json, such as {EXAMPLE}"
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{wrong}: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{wrong}: it holds no list of prompts.")
    for i, row in enumerate(rows):
        fits = isinstance(row, dict) and isinstance(row.get("prompt_en"), str)
        if not fits or not isinstance(row.get("dimension"), list):
            raise ValueError(f"{wrong}: entry {i + 1} is {row!r}.")
    return rows


def of_one_person(text: str) -> Prompt | None:
    """None where no class word stands, or several, or a word for several people.

    The class word is the one that `IdentityTokenizer` finds: a noun, else an adjective that stands for one.
    """
    words = list(whole_words(IDENTITY_NOUNS).finditer(text)) or list(whole_words(IDENTITY_ADJECTIVES).finditer(text))
    if len(words) != 1 or SEVERAL.search(text):
        return None
    [word] = words
    before, after = (part.replace("{", "{{").replace("}", "}}") for part in (text[: word.start()], text[word.end() :]))
    return Prompt(f"{before}{{person}}{after}", word.group().lower())
