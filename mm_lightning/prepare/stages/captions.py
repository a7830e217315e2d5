"""Captions: made where there is none, checked, and marked with the trigger word."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from mm_lightning.devices import find_device
from mm_lightning.encoders.text import IDENTITY_ADJECTIVES, IDENTITY_NOUNS, whole_words
from mm_lightning.files import fingerprint
from mm_lightning.prepare.sample import Rejected, Sample
from mm_lightning.prepare.stages.frames import UNREADABLE
from mm_lightning.prepare.stages.identity import one_thread

# A captioner that mentions one of these has seen writing in the picture. A book cover is text, a book is not.
TEXT_WORDS = (
    *("text", "texts", "caption", "captions", "subtitle", "subtitles", "logo", "logos", "watermark", "watermarks"),
    *("words", "lettering", "inscription", "typography", "font", "slogan", "quote", "headline", "title", "signature"),
    *("poster", "advertisement", "advert", "banner", "infographic", "screenshot", "website", "magazine cover"),
    *("the word", "that says", "that reads", "which says", "which reads", "written on", "the letters", "book cover"),
)


class CaptionRules:
    """Rejects captions that are empty, that mention writing in the picture, or that name no person.

    Args:
        text_words: words and phrases that tell of writing.
        extra_identity_words: class words besides `mm_lightning.encoders.text.IDENTITY_NOUNS`.
    """

    name = "captions"
    reasons = ("empty_caption", "text_in_image", "no_identity_word")

    def __init__(self, text_words: Iterable[str] = TEXT_WORDS, extra_identity_words: Iterable[str] = ()) -> None:
        self.text_words = whole_words(text_words)
        self.extra_identity_words = tuple(extra_identity_words)

    def __call__(self, sample: Sample) -> list[Sample]:
        caption = " ".join((sample.caption or "").split())
        if not caption:
            raise Rejected("empty_caption")
        if found := self.text_words.search(caption):
            raise Rejected("text_in_image", f"{found.group()!r} in {caption!r}")
        class_word(caption, self.extra_identity_words)
        sample.caption = caption
        return [sample]


class InsertTrigger:
    """Puts the trigger word after the class word, where the identity goes in: 'a man img is talking'.

    A caption that has the trigger in its right place stays as it is.

    Args:
        trigger: one word.
        extra_identity_words: as in `CaptionRules`.

    Raises:
        ValueError: the trigger is not one word.
    """

    name = "trigger"
    reasons = ("no_identity_word", "misplaced_trigger")

    def __init__(self, trigger: str = "img", extra_identity_words: Iterable[str] = ()) -> None:
        if not re.fullmatch(r"\w+", trigger):
            raise ValueError(f"trigger={trigger!r} must be one word, as the tokenizer looks for it.")
        self.trigger, self.extra_identity_words = trigger, tuple(extra_identity_words)

    def __call__(self, sample: Sample) -> list[Sample]:
        caption = sample.caption or ""
        word = class_word(caption, self.extra_identity_words)
        triggers = list(whole_words([self.trigger]).finditer(caption))
        if not triggers:
            sample.caption = f"{caption[: word.end()]} {self.trigger}{caption[word.end() :]}"
        elif len(triggers) > 1 or not re.search(r"[^\W_][\w'’-]*\s+$", caption[: triggers[0].start()]):
            raise Rejected("misplaced_trigger", repr(caption))
        return [sample]


class StandardPrompt:
    """SFHQ's studio faces: the square between black bars, and one prompt that says so.

    The class word is that of the sample's own caption, where it has one.

    Args:
        aspect: width / height of the target; 1.5 is CogVideoX's 720 x 480.
        class_word: where the caption does not tell.
        prompt: `{person}` stands for the class word.
    """

    name = "standard_prompt"
    reasons = ()

    def __init__(
        self,
        aspect: float = 1.5,
        class_word: str = "person",
        prompt: str = "A squared ID photo of a {person}, with pure black on two sides",
    ) -> None:
        self.aspect, self.class_word, self.prompt = aspect, class_word, prompt

    def __call__(self, sample: Sample) -> list[Sample]:
        try:
            person = class_word(sample.caption or "").group()
        except Rejected:
            person = self.class_word
        sample.caption = with_article(self.prompt, person)
        picture, (x, y) = black_borders(sample.frames[0], self.aspect)
        sample.frames, sample.data = [picture], b""
        sample.meta["height"], sample.meta["width"] = picture.shape[:2]
        for face in filter(None, sample.meta.get("faces", [])):
            face["box"] = [value + (x, y)[i % 2] for i, value in enumerate(face["box"])]
            face["landmarks"] = [[px + x, py + y] for px, py in face["landmarks"]]
        return [sample]


def black_borders(picture: np.ndarray, aspect: float) -> tuple[np.ndarray, tuple[int, int]]:
    """The picture in the middle of a black one of this aspect, and where its first pixel went."""
    height, width = picture.shape[:2]
    target_height, target_width = max(height, round(width / aspect)), max(width, round(height * aspect))
    x, y = (target_width - width) // 2, (target_height - height) // 2
    framed = np.zeros((target_height, target_width, 3), np.uint8)
    framed[y : y + height, x : x + width] = picture
    return framed, (x, y)


def with_article(prompt: str, person: str) -> str:
    """'a {person}' with the word, 'an' before a vowel."""
    article = "an" if person[0].lower() in "aeiou" else "a"
    return prompt.replace("a {person}", f"{article} {person}").replace("{person}", person)


def class_word(caption: str, extra_identity_words: Iterable[str] = ()) -> re.Match[str]:
    """The word for the person, found as `mm_lightning.encoders.text.IdentityTokenizer` finds it.

    Raises:
        Rejected: no_identity_word.
    """
    nouns, adjectives = whole_words((*IDENTITY_NOUNS, *extra_identity_words)), whole_words(IDENTITY_ADJECTIVES)
    word = nouns.search(caption) or adjectives.search(caption)
    if word is None:
        raise Rejected("no_identity_word", repr(caption[:120]))
    return word


class CaptionPictures:
    """Captions what has no caption, with an image-to-text model of transformers; of a clip, its middle frame.

    Args:
        model: a hub id or a folder: BLIP, GIT, a vision encoder-decoder, ...
        max_new_tokens: of the caption.

    Raises:
        FileNotFoundError: at the first sample without caption, if there are no such weights.
    """

    name = "captioner"
    reasons = (UNREADABLE, "empty_caption")

    def __init__(self, model: str, max_new_tokens: int = 60) -> None:
        self.model, self.max_new_tokens = model, max_new_tokens

    def models(self) -> dict[str, str]:
        """Of a folder; the weights of a hub id may not be here yet."""
        return fingerprint(sorted(Path(self.model).glob("*.safetensors")))

    def __call__(self, sample: Sample) -> list[Sample]:
        if sample.caption and sample.caption.strip():
            return [sample]
        captioner = load_captioner(self.model)
        caption = captioner(sample.frames[len(sample.frames) // 2], self.max_new_tokens)
        if not caption:
            raise Rejected("empty_caption", f"{self.model} said nothing")
        sample.caption, sample.meta["captioner"] = caption, captioner.info
        return [sample]


class Captioner:
    """A vision-to-text model with what turns pictures into its input and its output into text."""

    def __init__(self, name: str, model: PreTrainedModel, image_processor, tokenizer) -> None:
        self.model, self.image_processor, self.tokenizer = model.eval(), image_processor, tokenizer
        self.info = {"name": name, "version": f"transformers {importlib.metadata.version('transformers')}"}

    def __call__(self, picture: np.ndarray, max_new_tokens: int) -> str:
        """RGB uint8 (H, W, 3) -> a caption; greedy, so that it is the same every time."""
        inputs = self.image_processor(Image.fromarray(picture), return_tensors="pt").to(self.model.device)
        with one_thread(), torch.inference_mode():
            tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        return " ".join(self.tokenizer.decode(tokens[0], skip_special_tokens=True).split())


@lru_cache(maxsize=1)
def load_captioner(name_or_folder: str) -> Captioner:
    """Raises FileNotFoundError, with what to do, if the model is neither a folder nor to be had from the hub."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
        image_processor = AutoImageProcessor.from_pretrained(name_or_folder, backend="pil")
        model = AutoModelForImageTextToText.from_pretrained(name_or_folder, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise FileNotFoundError(
            f"The captioning model {name_or_folder!r} cannot be loaded ({str(error).splitlines()[0]}). Give the folder "
            "of an image-to-text model, for instance of `hf download Salesforce/blip-image-captioning-large "
            "--local-dir FOLDER`, or leave the captioner out: pictures without caption are then rejected."
        ) from error
    return Captioner(Path(name_or_folder).name, model.to(find_device()), image_processor, tokenizer)
