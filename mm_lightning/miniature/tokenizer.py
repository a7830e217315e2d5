"""The miniature's T5 tokenizer: one piece per word of the captions' grammar, letters for all else."""

from __future__ import annotations

import math
import string

from transformers import T5Tokenizer

from mm_lightning.miniature.captions import MAX_TOKENS, VOCABULARY

SPECIAL = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -6.0}
LETTER_LOG_PROB = -10.0  # lower than any word's: a word is spelled only where the grammar lacks it


def tokenizer_vocabulary() -> list[tuple[str, float]]:
    """Pieces and log-probabilities of a unigram model: what is special, printable ASCII, the grammar's words."""
    letters = {chr(code): LETTER_LOG_PROB for code in range(33, 127)}
    words = {f"▁{word}": -math.log(len(VOCABULARY)) for word in VOCABULARY if word not in string.punctuation}
    return list((SPECIAL | letters | words).items())


def build_tokenizer(max_length: int = MAX_TOKENS) -> T5Tokenizer:
    """T5's tokenizer; what is neither a word of the grammar nor printable ASCII becomes `<unk>`."""
    return T5Tokenizer(vocab=tokenizer_vocabulary(), extra_ids=0, model_max_length=max_length)
