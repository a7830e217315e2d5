import pytest
import torch
from diffusers import CogVideoXPipeline
from transformers import ByT5Tokenizer, T5Tokenizer

from mm_lightning.encoders.text import IdentityTokenizer, TextEncoder, drop_text
from mm_lightning.tiny import build_text_encoder, build_tokenizer
from mm_lightning.types import TextFeatures


@pytest.fixture(scope="module")
def t5_tokenizer() -> T5Tokenizer:
    return build_tokenizer(64)


@pytest.fixture
def tokenizer(t5_tokenizer) -> IdentityTokenizer:
    return IdentityTokenizer(t5_tokenizer, max_length=24)


def pieces(tokenizer: IdentityTokenizer, prompt: str) -> tuple[list[str], list[str]]:
    """The prompt's pieces up to its end, and those at the class word's positions."""
    tokens = tokenizer([prompt])
    names = tokenizer.tokenizer.convert_ids_to_tokens(tokens.input_ids[0].tolist())
    marked = [name for name, chosen in zip(names, tokens.id_token_mask[0], strict=True) if chosen]
    return names[: int(tokens.attention_mask.sum())], marked


@pytest.mark.parametrize(
    ("prompt", "expected", "marked"),
    [
        ("a woman img turns", "▁a ▁woman ▁woman ▁turns", "▁woman ▁woman"),
        ("a woman img, in a red dress", "▁a ▁woman ▁woman , ▁in ▁a ▁red ▁dress", "▁woman ▁woman"),
        ("the man in a hat and a dog img", "▁the ▁man ▁in ▁a ▁hat ▁and ▁a ▁dog ▁dog", "▁dog ▁dog"),
        ("a man  img\nis walking", "▁a ▁man ▁man ▁is ▁walking", "▁man ▁man"),
        ("a man IMG is walking", "▁a ▁man ▁man ▁is ▁walking", "▁man ▁man"),
        # A class word of several pieces: its last one stands for it.
        ("a policewoman img is", "▁a ▁ p o l i c e woman woman ▁is", "woman woman"),
    ],
)
def test_class_word_and_trigger(tokenizer, prompt, expected, marked):
    assert pieces(tokenizer, prompt) == ([*expected.split(), "</s>"], marked.split())


@pytest.mark.parametrize(
    ("prompt", "marked"),
    [
        ("An elderly MAN and a girl", "▁ M A N N"),
        ("two men and a woman", "▁woman"),
        ("the elderly in the park", "▁elderly"),
        ("a man-made park and a boy", "▁boy"),
        ("a he-man and a boy", "▁boy"),
        ("the womanly girl", "▁girl"),
        ("a woman's hat", "▁woman"),
        ("a girl, laughing", "▁girl"),
        ("girl", "▁girl"),
    ],
)
def test_first_identity_word_without_trigger(tokenizer, prompt, marked):
    last_piece = marked.split()[-1]
    assert pieces(tokenizer, prompt)[1] == [last_piece, last_piece]


def test_triggered_text_is_the_plain_text_with_a_repeated_piece(tokenizer):
    """Nothing of the trigger is left, neither its letters nor a lone space piece."""
    with_trigger, _ = pieces(tokenizer, "A young woman img turns her head")
    plain = tokenizer.tokenizer.convert_ids_to_tokens(tokenizer.tokenizer("A young woman turns her head").input_ids)
    position = plain.index("▁woman")
    assert with_trigger == [*plain[:position], "▁woman", *plain[position:]]


def test_extra_identity_words(t5_tokenizer):
    tokenizer = IdentityTokenizer(t5_tokenizer, max_length=24, extra_identity_words=("chef", "video singer", "men"))
    assert pieces(tokenizer, "the Chef and the man")[1] == ["f", "f"]
    assert pieces(tokenizer, "a video singer sits")[1] == ["▁singer", "▁singer"]
    assert pieces(tokenizer, "two men")[1][0] == "n"
    overlapping = IdentityTokenizer(t5_tokenizer, max_length=24, extra_identity_words=("singer", "singer man"))
    assert pieces(overlapping, "the singer man and the singer")[1] == ["▁man", "▁man"]


@pytest.mark.parametrize("num_id_tokens", [1, 2, 3])
def test_number_of_identity_positions(t5_tokenizer, num_id_tokens):
    tokenizer = IdentityTokenizer(t5_tokenizer, max_length=24, num_id_tokens=num_id_tokens)
    names, marked = pieces(tokenizer, "a man img smiles")
    assert marked == ["▁man"] * num_id_tokens
    assert names == ["▁a", *marked, "▁smiles", "</s>"]


def test_one_position_is_the_librarys_own_tokenisation(t5_tokenizer):
    tokenizer = IdentityTokenizer(t5_tokenizer, max_length=12, num_id_tokens=1)
    prompts = ["a man is", "the woman turns her head slowly to the left and then to the camera, and smiles", "girl"]
    expected = t5_tokenizer(prompts, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    for tokens in (tokenizer(prompts), tokenizer.plain(prompts)):
        assert torch.equal(tokens.input_ids, expected.input_ids)
        assert torch.equal(tokens.attention_mask, expected.attention_mask)


def test_truncation_follows_the_repetition(t5_tokenizer):
    tokenizer = IdentityTokenizer(t5_tokenizer, max_length=6)
    assert pieces(tokenizer, "a man is speaking to the camera")[0] == ["▁a", "▁man", "▁man", "▁is", "▁speaking", "</s>"]


def test_class_word_must_survive_truncation(t5_tokenizer):
    exact = IdentityTokenizer(t5_tokenizer, max_length=7)
    assert pieces(exact, "the camera is a man img")[0] == ["▁the", "▁camera", "▁is", "▁a", "▁man", "▁man", "</s>"]
    short = IdentityTokenizer(t5_tokenizer, max_length=6)
    with pytest.raises(ValueError, match=r"class word 'man' stands beyond the 6 tokens .* 'the camera is a man img'"):
        short(["a man", "the camera is a man img"])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a man img and a woman img", r"2 trigger words 'img'.*'a man img and a woman img'"),
        ("img smiles at a man", r"must directly follow.*'a woman img smiles'.*'img smiles at a man'"),
        ("a man, img smiles", "must directly follow"),
        (
            "a dog runs",
            r"No word for a person in the prompt 'a dog runs'.*extra_identity_words.*man, woman, boy.*elderly",
        ),
        ("a fireman runs", "No word for a person"),
        ("", "No word for a person in the prompt ''"),
    ],
)
def test_prompts_that_name_nobody_or_too_many(tokenizer, prompt, message):
    with pytest.raises(ValueError, match=message):
        tokenizer([prompt])


def test_unusable_tokenizers_are_refused(t5_tokenizer):
    for arguments in ({"trigger": "i m"}, {"trigger": ""}, {"num_id_tokens": 0}):
        with pytest.raises(ValueError, match="trigger must be one word"):
            IdentityTokenizer(t5_tokenizer, **arguments)
    with pytest.raises(ValueError, match="ByT5Tokenizer gives no character offsets"):
        IdentityTokenizer(ByT5Tokenizer())


@pytest.fixture
def encoder(tokenizer) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(build_text_encoder(len(tokenizer.tokenizer), 16), tokenizer)


def pipeline_embeds(encoder: TextEncoder, prompt: str) -> torch.Tensor:
    parts = dict.fromkeys(("vae", "transformer", "scheduler"))
    pipeline = CogVideoXPipeline(tokenizer=encoder.tokenizer.tokenizer, text_encoder=encoder.text_encoder, **parts)
    with torch.no_grad():
        return pipeline._get_t5_prompt_embeds(prompt, max_sequence_length=24, device="cpu")


@pytest.mark.parametrize("prompt", ["a man is speaking", "a woman " + "smiles and turns " * 20])
def test_states_are_those_of_the_pipeline(encoder, prompt):
    expected = pipeline_embeds(encoder, prompt)
    encoder.tokenizer.num_id_tokens = 1
    assert torch.equal(encoder([prompt]).prompt_embeds, expected)
    assert torch.equal(encoder.encode_plain([prompt]), expected)


def test_null_prompt_is_the_pipelines_and_computed_once(encoder):
    calls = []
    encoder.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        null = encoder.null_prompt_embeds()
    assert encoder.null_prompt_embeds() is null
    assert len(calls) == 1
    assert not null.is_inference()
    assert torch.equal(null, pipeline_embeds(encoder, ""))
    assert null.shape == (1, 24, 16)
    assert not any("null" in name for name in encoder.state_dict())


def test_features_of_a_batch(encoder):
    text = encoder(["a man img is speaking", "the girl img"])
    assert text.prompt_embeds.shape == (2, 24, 16)
    assert text.id_token_mask.dtype == torch.bool
    assert [row.nonzero().flatten().tolist() for row in text.id_token_mask] == [[1, 2], [1, 2]]
    assert not text.prompt_embeds.requires_grad


def test_encoder_stays_frozen_and_out_of_autocast(encoder):
    expected = encoder(["a man img"]).prompt_embeds
    torch.nn.Sequential(encoder).train()
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(["a man img"]).prompt_embeds, expected)


def test_dropped_text_becomes_the_empty_prompt(encoder):
    text, null = encoder(["a man img", "a girl img"]), encoder.null_prompt_embeds()
    for null_embeds in (null, null[0]):
        dropped = drop_text(text, null_embeds, torch.tensor([False, True]))
        assert torch.equal(dropped.prompt_embeds[0], text.prompt_embeds[0])
        assert torch.equal(dropped.prompt_embeds[1], null[0])
        assert dropped.id_token_mask.sum(dim=1).tolist() == [2, 0]
    half = drop_text(TextFeatures(text.prompt_embeds.bfloat16(), text.id_token_mask), null, torch.tensor([True, True]))
    assert half.prompt_embeds.dtype == torch.bfloat16


def test_empty_prompt_of_another_length_is_refused(encoder):
    text = encoder(["a man img"])
    with pytest.raises(ValueError, match=r"empty prompt has \(23, 16\).*prompts \(24, 16\)"):
        drop_text(text, encoder.null_prompt_embeds()[:, 1:], torch.tensor([True]))
