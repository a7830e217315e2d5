"""Prompts -> T5 states and the positions of the class word, where the identity goes in.

Letters: B batch, T text tokens, D_txt width of T5.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from mm_lightning.types import TextFeatures

IDENTITY_NOUNS = (
    *("man", "woman", "boy", "girl", "person", "child", "baby", "guy", "lady", "gentleman", "kid", "toddler", "infant"),
    *("teenager", "grandmother", "grandfather", "grandma", "grandpa", "mother", "father"),
)
IDENTITY_ADJECTIVES = ("elderly", "senior", "teen")  # class words only where there is no noun: an elderly man is a man


class ClassWord(NamedTuple):
    """A prompt without its trigger and where its class word stands."""

    prompt: str
    start: int  # character
    end: int  # character, exclusive


class TokenizedPrompts(NamedTuple):
    """All (B, T)."""

    input_ids: Tensor  # int64
    attention_mask: Tensor  # int64, 1 up to the end-of-sequence token
    id_token_mask: Tensor  # bool, the positions of the class word


class IdentityTokenizer:
    """T5's tokenizer, with room for the identity at the class word (after PhotoMaker's stacked class token).

    The class word is the word before the trigger, else the first identity word. The trigger is taken out of the text:
    taken out of the tokens, it would leave a lone space behind. The class word's last piece is repeated so that each
    identity token has a position of its own; whatever exceeds `max_length` is cut off after that.

    Args:
        tokenizer: T5's, a fast one (it gives character offsets).
        max_length: T, tokens with the end-of-sequence token (226 for CogVideoX).
        num_id_tokens: positions of the class word.
        trigger: marks the word before it as the class word, in any case.
        extra_identity_words: class words besides IDENTITY_NOUNS, singular or plural, possibly of several words.

    Raises ValueError for a slow tokenizer, a trigger that is not one word, or `num_id_tokens` below 1.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 226,
        num_id_tokens: int = 2,
        trigger: str = "img",
        extra_identity_words: Iterable[str] = (),
    ):
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} gives no character offsets: load a fast tokenizer, as AutoTokenizer does."
            )
        if not re.fullmatch(r"\w+", trigger) or num_id_tokens < 1:
            raise ValueError(
                f"trigger must be one word and num_id_tokens at least 1, not {trigger!r}, {num_id_tokens}."
            )
        self.tokenizer, self.max_length, self.num_id_tokens, self.trigger = (
            tokenizer,
            max_length,
            num_id_tokens,
            trigger,
        )
        self.identity_words = (*IDENTITY_NOUNS, *extra_identity_words)

    def __call__(self, prompts: list[str]) -> TokenizedPrompts:
        """Raises ValueError, showing the prompt, if one has no class word, several triggers, or its class word only
        beyond `max_length`.
        """
        rows = [self.tokenize(prompt) for prompt in prompts]
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        input_ids = torch.full((len(rows), self.max_length), self.tokenizer.pad_token_id)
        id_token_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        for row, (ids, first) in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            id_token_mask[row, first : first + self.num_id_tokens] = True
        return TokenizedPrompts(input_ids, (torch.arange(self.max_length) < lengths[:, None]).long(), id_token_mask)

    def plain(self, prompts: list[str]) -> TokenizedPrompts:
        """As CogVideoXPipeline does it, for negative and empty prompts: no class word, a trigger is text."""
        tokens = self.tokenizer(
            prompts, padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        return TokenizedPrompts(tokens.input_ids, tokens.attention_mask, torch.zeros_like(tokens.input_ids).bool())

    def tokenize(self, prompt: str) -> tuple[list[int], int]:
        """Token ids, at most `max_length`, and the first of the class word's `num_id_tokens` positions."""
        word = self.find_class_word(prompt)
        tokens = self.tokenizer(word.prompt, return_offsets_mapping=True, verbose=False)
        *ids, end_of_sequence = tokens["input_ids"]
        pieces = [i for i, (start, end) in enumerate(tokens["offset_mapping"]) if start < word.end and end > word.start]
        last = pieces[-1]
        ids[last:last] = [ids[last]] * (self.num_id_tokens - 1)
        if last + self.num_id_tokens > self.max_length - 1:
            raise ValueError(
                f"The class word {word.prompt[word.start : word.end]!r} stands beyond the {self.max_length} tokens "
                f"that the text encoder sees: shorten the prompt or move the word forward. Prompt: {prompt!r}"
            )
        return [*ids[: self.max_length - 1], end_of_sequence], last

    def find_class_word(self, prompt: str) -> ClassWord:
        """Raises ValueError as `__call__` does."""
        triggers = list(whole_words([self.trigger]).finditer(prompt))
        if len(triggers) > 1:
            raise ValueError(
                f"{len(triggers)} trigger words {self.trigger!r}, only one person can be given. Prompt: {prompt!r}"
            )
        return self.word_before(prompt, triggers[0]) if triggers else self.first_identity_word(prompt)

    def word_before(self, prompt: str, trigger: re.Match[str]) -> ClassWord:
        word = re.search(r"([^\W_][\w'’-]*)\s+$", prompt[: trigger.start()])
        if word is None:
            raise ValueError(
                f"The trigger word {self.trigger!r} must directly follow the word for the person, as in "
                f"'a woman {self.trigger} smiles'. Prompt: {prompt!r}"
            )
        return ClassWord(prompt[: word.end(1)] + prompt[trigger.end() :], word.start(1), word.end(1))

    def first_identity_word(self, prompt: str) -> ClassWord:
        word = whole_words(self.identity_words).search(prompt) or whole_words(IDENTITY_ADJECTIVES).search(prompt)
        if word is None:
            looked_for = ", ".join((*self.identity_words, *IDENTITY_ADJECTIVES))
            raise ValueError(
                f"No word for a person in the prompt {prompt!r}. Put {self.trigger!r} after the word that means the "
                f"person, add that word to extra_identity_words, or use one of: {looked_for}."
            )
        return ClassWord(prompt, word.start(), word.end())


def whole_words(words: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the words in any case, the longest first, neither inside a word nor in a compound (man-made)."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w-])", re.IGNORECASE)


class TextEncoder(nn.Module):
    """The frozen T5, called as CogVideoXPipeline does: all positions, no attention mask, in T5's own precision.

    Args:
        text_encoder: T5's encoder; stays in evaluation mode.
        tokenizer: finds the class word.
    """

    def __init__(self, text_encoder: T5EncoderModel, tokenizer: IdentityTokenizer):
        super().__init__()
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.register_buffer("cached_null_embeds", None, persistent=False)
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> TextEncoder:
        """Frozen: evaluation mode whatever is asked for (T5 has dropout)."""
        return super().train(False)

    def forward(self, prompts: list[str]) -> TextFeatures:
        """Prompts with a class word -> states (B, T, D_txt) and its positions. Raises what IdentityTokenizer raises."""
        tokens = self.tokenizer(prompts)
        prompt_embeds = self.encode(tokens.input_ids)
        return TextFeatures(prompt_embeds, tokens.id_token_mask.to(prompt_embeds.device))

    def encode_plain(self, prompts: list[str]) -> Tensor:
        """Prompts without a class word, such as negative ones -> (B, T, D_txt)."""
        return self.encode(self.tokenizer.plain(prompts).input_ids)

    def null_prompt_embeds(self) -> Tensor:
        """States (1, T, D_txt) of the empty prompt, computed once."""
        if self.cached_null_embeds is None:
            # A tensor made in inference mode (Lightning's validation) could not be used in training afterwards.
            with torch.inference_mode(False):
                self.cached_null_embeds = self.encode_plain([""])
        return self.cached_null_embeds

    @torch.no_grad()
    def encode(self, input_ids: Tensor) -> Tensor:
        device = self.text_encoder.device
        with torch.autocast(device.type, enabled=False):
            return self.text_encoder(input_ids.to(device))[0]


def drop_text(text: TextFeatures, null_embeds: Tensor, drop: Tensor) -> TextFeatures:
    """Put the empty prompt in place of the dropped ones, for guidance; there is no class word in it.

    text: (B, T, D_txt); null_embeds: (1, T, D_txt) or (T, D_txt); drop: (B,) bool.
    Raises ValueError if the empty prompt was encoded to another length or width.
    """
    prompt_embeds, id_token_mask = text
    if null_embeds.shape[-2:] != prompt_embeds.shape[-2:]:
        raise ValueError(
            f"The empty prompt has {tuple(null_embeds.shape[-2:])} (tokens, width), the prompts "
            f"{tuple(prompt_embeds.shape[-2:])}: encode both with the same text encoder and max_length."
        )
    drop = drop.to(prompt_embeds.device)
    null_embeds = null_embeds.to(prompt_embeds)
    return TextFeatures(
        prompt_embeds=torch.where(drop[:, None, None], null_embeds, prompt_embeds),
        id_token_mask=id_token_mask & ~drop[:, None],
    )
