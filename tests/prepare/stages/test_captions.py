import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from mm_lightning.backbone import T5Tokenizer
from mm_lightning.encoders.text import IdentityTokenizer
from mm_lightning.prepare.sample import Sample
from mm_lightning.prepare.stages.captions import (
    CaptionPictures,
    CaptionRules,
    InsertTrigger,
    StandardPrompt,
    black_borders,
    class_word,
)
from tests.prepare.stages.conftest import rejection


def captioned(caption: str | None, **fields) -> Sample:
    return Sample("k", "image", "test", caption=caption, **fields)


# Rules


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        (None, "empty_caption"),
        ("", "empty_caption"),
        (" \n", "empty_caption"),
        ("a man with the word hello on his shirt", "text_in_image"),
        ("A Watermark over a woman", "text_in_image"),
        ("a sign that says stop behind a boy", "text_in_image"),
        ("a brown dog on a beach", "no_identity_word"),
        ("a man-made lake", "no_identity_word"),
    ],
)
def test_rejected_captions(caption, reason):
    assert rejection(CaptionRules(), captioned(caption)) == reason


@pytest.mark.parametrize(
    "caption", ["a man reads a book", "a texting woman", "a boy with a toy phone", "an elderly couple"]
)
def test_accepted_captions(caption):
    assert CaptionRules()(captioned(caption))[0].caption == caption


def test_words_can_be_chosen():
    assert CaptionRules(text_words=["hat"])(captioned("a man with a logo"))
    assert rejection(CaptionRules(text_words=["hat"]), captioned("a man with a hat")) == "text_in_image"
    assert CaptionRules(extra_identity_words=["astronaut"])(captioned("an astronaut floats"))


def test_white_space_is_put_in_order():
    assert CaptionRules()(captioned(" a  man\n smiles "))[0].caption == "a man smiles"


# Trigger


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A woman smiles", "A woman img smiles"),
        ("A Woman, smiling", "A Woman img, smiling"),
        ("a child", "a child img"),
        ("a senior man and a girl", "a senior man img and a girl"),
        ("two elderly at a table", "two elderly img at a table"),
        ("a man img smiles", "a man img smiles"),
        ("a chef img and a man", "a chef img and a man"),
    ],
)
def test_trigger(caption, expected):
    assert InsertTrigger()(captioned(caption))[0].caption == expected


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a tree", "no_identity_word"),
        ("img of a man", "misplaced_trigger"),
        ("a man img and a boy img", "misplaced_trigger"),
    ],
)
def test_trigger_that_finds_no_place(caption, reason):
    assert rejection(InsertTrigger(), captioned(caption)) == reason


def test_training_finds_the_class_word_where_the_trigger_was_put(tiny_folder):
    tokenizer = IdentityTokenizer(T5Tokenizer.from_pretrained(tiny_folder / "tokenizer"), max_length=32)
    for caption in (
        "A woman smiles",
        "the old man, a lady",
        "a senior teen girl",
        "a toddler.",
        "my grandfather's hat",
    ):
        [sample] = InsertTrigger()(captioned(caption))
        found = tokenizer.find_class_word(sample.caption)
        assert found.prompt == caption
        assert (found.start, found.end) == class_word(caption).span()
        assert tokenizer.find_class_word(caption) == found


def test_trigger_must_be_one_word():
    with pytest.raises(ValueError, match="'the img' must be one word"):
        InsertTrigger("the img")


# SFHQ


def test_standard_prompt_and_borders():
    pixels = np.full((64, 64, 3), 200, np.uint8)
    face = {"box": [10, 12, 40, 44], "landmarks": [[20, 20]] * 5, "score": 1.0}
    sample = captioned("an old man", frames=[pixels], data=b"x", meta={"width": 64, "height": 64, "faces": [face]})
    [sample] = StandardPrompt(aspect=1.5)(sample)
    assert sample.caption == "A squared ID photo of a man, with pure black on two sides"
    assert (sample.meta["width"], sample.meta["height"], sample.data) == (96, 64, b"")
    framed = sample.frames[0]
    assert np.array_equal(framed[:, 16:80], pixels)
    assert framed[:, :16].max() == framed[:, 80:].max() == 0
    assert sample.meta["faces"][0]["box"] == [26, 12, 56, 44]
    assert sample.meta["faces"][0]["landmarks"] == [[36, 20]] * 5
    [trigger] = InsertTrigger()(sample)
    assert trigger.caption.startswith("A squared ID photo of a man img,")


@pytest.mark.parametrize(("caption", "person"), [(None, "a person"), ("an infant", "an infant"), ("a cat", "a person")])
def test_class_word_of_the_standard_prompt(caption, person):
    [sample] = StandardPrompt()(captioned(caption, frames=[np.zeros((8, 8, 3), np.uint8)]))
    assert f" of {person}, " in sample.caption


@pytest.mark.parametrize(("size", "aspect", "shape"), [((64, 64), 0.5, (128, 64)), ((60, 90), 1.5, (60, 90))])
def test_borders_above_and_below_or_none(size, aspect, shape):
    framed, _ = black_borders(np.ones((*size, 3), np.uint8), aspect)
    assert framed.shape[:2] == shape
    assert framed.sum() == size[0] * size[1] * 3


# Captioners


def write_tokenizer(folder) -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[BOS]", "a", "man", "woman", "smiles", "photo", "of"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[BOS]", eos_token="[SEP]", **special)
    fast.save_pretrained(folder)
    return fast


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def encoder_decoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-captioner"
    torch.manual_seed(0)
    tokenizer = write_tokenizer(folder)
    decoder = BertConfig(vocab_size=len(tokenizer), is_decoder=True, add_cross_attention=True, **SMALL)
    model = VisionEncoderDecoderModel(
        encoder=ViTModel(ViTConfig(image_size=16, patch_size=8, **SMALL)), decoder=BertLMHeadModel(decoder)
    )
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 2
    model.config.pad_token_id = model.generation_config.pad_token_id = 0
    model.generation_config.bad_words_ids = [[0], [1], [2], [3], [4]]  # else a random model may say nothing
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-blip"
    torch.manual_seed(0)
    tokenizer = write_tokenizer(folder)
    text = {**SMALL, "vocab_size": len(tokenizer), "encoder_hidden_size": 16, "bos_token_id": 4, "sep_token_id": 3}
    text |= {"pad_token_id": 0, "eos_token_id": 3, "projection_dim": 16}
    config = BlipConfig(text_config=text, vision_config={**SMALL, "image_size": 16, "patch_size": 8}, projection_dim=16)
    model = BlipForConditionalGeneration(config)
    model.text_decoder.cls.predictions.bias.data[:5] = -1e4  # else a random model may say nothing
    model.save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


PICTURE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)


@pytest.mark.parametrize("name", ["encoder_decoder", "blip"])
def test_pictures_without_caption_are_captioned(name, request):
    folder = request.getfixturevalue(name)
    stage = CaptionPictures(str(folder), max_new_tokens=5)
    [first] = stage(captioned(None, frames=[PICTURE]))
    assert first.caption
    assert set(first.caption.split()) <= {"a", "man", "woman", "smiles", "photo", "of"}
    assert first.meta["captioner"]["name"] == folder.name
    [again] = CaptionPictures(str(folder), max_new_tokens=5)(captioned("  ", frames=[PICTURE]))
    assert again.caption == first.caption


def test_another_captioner_in_the_same_folder_is_another_stage(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = CaptionPictures(str(tmp_path)).models()
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert CaptionPictures(str(tmp_path)).models() != before


def test_captioned_pictures_are_left_alone():
    [sample] = CaptionPictures("nothing/there")(captioned("a man", frames=[PICTURE]))
    assert (sample.caption, sample.meta) == ("a man", {})


def test_clips_are_captioned_by_their_middle_frame(encoder_decoder, monkeypatch):
    from mm_lightning.prepare.stages import captions

    seen = []
    captioner = captions.load_captioner(str(encoder_decoder))
    inner = captioner.image_processor
    monkeypatch.setattr(captioner, "image_processor", lambda picture, **k: seen.append(picture) or inner(picture, **k))
    frames = [np.full((16, 16, 3), i, np.uint8) for i in range(5)]
    CaptionPictures(str(encoder_decoder), 4)(captioned(None, frames=frames))
    assert [np.asarray(picture).max() for picture in seen] == [2]


@pytest.mark.parametrize("content", [None, {}, {"model_type": "t5"}])
def test_missing_captioner(tmp_path, content):
    folder = tmp_path / "captioner"
    if content is not None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match=r"captioner.*cannot be loaded.*hf download"):
        CaptionPictures(str(folder))(captioned(None, frames=[PICTURE]))
