"""Text encoder and vision tower: tokens, losses against plain loops, batches, and that training learns."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPImageProcessor, T5EncoderModel

from mm_lightning.encoders.face import load_vision
from mm_lightning.encoders.text import IdentityTokenizer, TextEncoder
from mm_lightning.miniature.captions import BACKGROUNDS, CLASS_WORDS, VOCABULARY
from mm_lightning.miniature.contrastive import (
    ContrastiveDataModule,
    ContrastiveModule,
    LabelledPictures,
    PeopleBatches,
    ZeroShot,
    augment,
    contrastive_loss,
    hide_words,
    identity_loss,
    image_text_loss,
    nearest_person,
    paraphrase,
    word_loss,
)
from mm_lightning.miniature.data import Items, PeopleTensors, Words
from mm_lightning.miniature.image_text import ImageTextModel, Projections, build_model
from mm_lightning.miniature.judge import WORDS, labels_of, top_1
from mm_lightning.miniature.tokenizer import build_tokenizer
from tests.runs import compose_train

PROMPT = "A young woman img turns her head and smiles, in front of a green wall"
COLOURS = np.random.default_rng(5).integers(0, 256, (16, 3))  # of the people's faces
WALLS = {"grey": (128,) * 3, "white": (240,) * 3, "blue": (40, 60, 220), "green": (40, 180, 60), "red": (220, 60, 40)}


@pytest.fixture(scope="module")
def model() -> ImageTextModel:
    torch.manual_seed(0)
    return build_model().eval()


def draw(person: int, wall: str, rng: np.random.Generator) -> torch.Tensor:
    """(3, 64, 64): a face of the person's colour, somewhere near the centre, before a wall."""
    picture = np.empty((64, 64, 3), np.uint8)
    picture[:] = WALLS[wall]
    x, y = rng.integers(16, 24, 2)
    picture[y : y + 32, x : x + 28] = COLOURS[person]
    return torch.from_numpy(picture).permute(2, 0, 1)


def draw_items(num_people: int, per_person: int, num_frames: int, seed: int) -> Items:
    rng = np.random.default_rng(seed)
    pixels, words, person = [], [], torch.arange(num_people).repeat_interleave(per_person)
    for index in person.tolist():
        wall, light = str(rng.choice(list(WALLS))), str(rng.choice(["left", "warm"]))
        pixels.append(torch.stack([draw(index, wall, rng) for _ in range(num_frames)]))
        text = f"A {CLASS_WORDS[index % 2]} img nods, before a {wall} wall"
        said = f", lit from the {light}" if light == "left" else " in warm light"
        words.append(Words(text, text + said, CLASS_WORDS[index % 2], ("nod",), wall, light))
    zeros = torch.zeros(len(words), num_frames, 5, 2)
    keys = [f"{num_frames}-{i}" for i in range(len(words))]
    return Items(keys, torch.stack(pixels), zeros[..., :2, 0].repeat(1, 1, 2), zeros, person, words)


@pytest.fixture(scope="module")
def people() -> PeopleTensors:
    """Sixteen people with three stills and a clip each; the text says the wall, the face's colour says who it is."""
    names = [f"p{i:05d}" for i in range(len(COLOURS))]
    return PeopleTensors(names, draw_items(16, 3, 1, seed=1), draw_items(16, 1, 5, seed=2))


# Text -----------------------------------------------------------------------------------------------------------------


def test_every_word_of_the_grammar_is_one_token():
    tokenizer = build_tokenizer()
    words = [word for word in VOCABULARY if word != ","]
    assert all(tokenizer.tokenize(word) == [f"▁{word}"] for word in words)
    assert tokenizer.tokenize("head, in") == ["▁head", ",", "▁in"]
    assert len(tokenizer) == len(tokenizer.get_vocab()) < 300


def test_other_words_are_spelled():
    tokenizer = build_tokenizer()
    assert tokenizer.tokenize("yodels") == ["▁", *"yodels"]
    assert tokenizer.unk_token_id not in tokenizer("A man yodels!").input_ids
    assert tokenizer.unk_token_id in tokenizer("Größe").input_ids


def test_text_is_encoded_as_magicmirror_does(model):
    """Trigger left out, class word doubled, no attention mask."""
    encode = TextEncoder(model.text_encoder, IdentityTokenizer(model.tokenizer, 24))
    ids = model.tokenize([PROMPT])
    pieces = model.tokenizer.convert_ids_to_tokens(ids[0])
    assert pieces[:5] == ["▁A", "▁young", "▁woman", "▁woman", "▁turns"]
    assert "▁img" not in pieces
    assert torch.equal(model.text_states(ids), encode([PROMPT]).prompt_embeds)


def test_hidden_words_are_a_share_of_those_that_are_there():
    ids = torch.tensor([[5, 6, 7, 8, 1, 0, 0, 0]]).repeat(2000, 1)
    hidden = hide_words(ids, 0.3, pad=0, unknown=2, generator=torch.Generator().manual_seed(0))
    assert (hidden[:, 5:] == 0).all()
    assert (hidden[:, :5] == 2).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert ((hidden == ids) | (hidden == 2)).all()


def test_word_loss_is_a_cross_entropy_of_what_is_no_padding():
    generator = torch.Generator().manual_seed(0)
    states, table = (torch.randn(*shape, 8, generator=generator, dtype=torch.float64) for shape in ((2, 3), (5,)))
    ids = torch.tensor([[1, 4, 0], [2, 3, 1]])
    costs = []
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
        logits = [float(states[i, j] @ row) / 8**0.5 for row in table]
        costs.append(np.log(np.exp(logits).sum()) - logits[ids[i, j]])
    assert float(word_loss(states, table, ids, pad=0)) == pytest.approx(np.mean(costs), abs=1e-12)


# Losses ---------------------------------------------------------------------------------------------------------------


def test_clip_s_loss_with_different_captions_is_the_usual_one():
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(6, 4, generator=generator), dim=-1) for _ in "ab")
    ids, target = torch.arange(6)[:, None], torch.arange(6)
    logits = 7 * images @ texts.mT
    usual = (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target)) / 2
    assert image_text_loss(images, texts, ids, torch.tensor(7.0)).mean().item() == pytest.approx(usual.item(), abs=1e-6)


def test_equal_captions_are_no_negatives():
    """Two pictures of one caption: either answer is right, and both at once cost no more than a coin's toss."""
    texts = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=-1)
    ids = torch.tensor([[3, 1], [3, 1], [4, 1]])
    loss = image_text_loss(texts, texts, ids, torch.tensor(50.0))
    torch.testing.assert_close(loss, torch.tensor([np.log(2), np.log(2), 0.0], dtype=torch.float32))


def test_identity_loss_is_the_supervised_contrastive_loss():
    """Equation 2 of Khosla et al. 2020, by loops."""
    generator = torch.Generator().manual_seed(1)
    z = F.normalize(torch.randn(6, 3, generator=generator, dtype=torch.float64), dim=-1)
    person, costs = [0, 0, 1, 1, 1, 2], []
    for i in range(6):
        others = [a for a in range(6) if a != i]
        total = sum(float(torch.exp(z[i] @ z[a] / 0.2)) for a in others)
        same = [p for p in others if person[p] == person[i]]
        costs.append(-sum(float(z[i] @ z[p]) / 0.2 - np.log(total) for p in same) / max(len(same), 1))
    loss = identity_loss(z, torch.tensor(person), temperature=0.2)
    np.testing.assert_allclose(loss.numpy(), costs, atol=1e-12)


def test_a_row_without_a_right_answer_costs_and_teaches_nothing():
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = contrastive_loss(logits, torch.tensor([[False] * 3, [True, False, False]]))
    loss.sum().backward()
    assert loss[0] == 0
    assert loss[1] > 0
    assert not logits.grad[0].any()
    assert logits.grad[1].abs().min() > 0


# Pictures -------------------------------------------------------------------------------------------------------------


def test_augmentation_mirrors_moves_and_exposes(model):
    pixels = torch.rand(64, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    may_flip = torch.arange(64) % 2 == 0

    def augmented(shift: int, brightness: float) -> torch.Tensor:
        return augment(pixels, may_flip, shift, brightness, torch.Generator().manual_seed(3))

    flipped = (augmented(0, 0.0) - pixels.flip(-1)).abs().amax((1, 2, 3)) < 1e-6
    mirrored = torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)
    torch.testing.assert_close(augmented(0, 0.0), mirrored, atol=1e-6, rtol=0)
    assert not flipped[~may_flip].any()
    assert 0.3 < flipped[may_flip].float().mean() < 0.7
    moved, still = augmented(2, 0.0), augmented(0, 0.0)
    padded = np.pad(still.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    shifts = [(y, x) for y in range(5) for x in range(5)]
    matches = [[np.allclose(padded[i, :, y : y + 12, x : x + 12], moved[i]) for y, x in shifts] for i in range(64)]
    assert (np.sum(matches, axis=1) == 1).all()
    assert np.any(matches, axis=0).sum() > 15
    ratio = ((augmented(0, 0.1) + 1) / (still + 1)).flatten(1)
    assert ratio.std(1).max() < 1e-5
    assert ratio.min() > 0.9 - 1e-5
    assert ratio.max() < 1.1 + 1e-5
    assert torch.equal(augmented(2, 0.1), augmented(2, 0.1))


def test_pictures_reach_the_vision_tower_as_clip_s_processor_prepares_them(model):
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, do_center_crop=False)
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    with torch.no_grad():
        states = model.vision(processor(pictures, return_tensors="pt").pixel_values)
        features = model.image_features(pixels.float() / 127.5 - 1)
    torch.testing.assert_close(features.class_state, states.pooler_output, atol=1e-4, rtol=0)
    torch.testing.assert_close(features.patch_mean, states.last_hidden_state[:, 1:].mean(1), atol=1e-4, rtol=0)


def test_nearest_person_by_loops():
    generator = torch.Generator().manual_seed(2)
    person = torch.tensor([7, 3, 3, 9, 7, 9, 7])
    centres = torch.randn(10, 4, generator=generator)
    features = centres[person] + 1.2 * torch.randn(7, 4, generator=generator)
    centred, right = features - features.mean(0), 0
    for i in range(7):
        units = {
            int(p): F.normalize(centred, dim=-1)[[j for j in range(7) if j != i and person[j] == p]] for p in person
        }
        cosines = {p: float(F.cosine_similarity(centred[i], rows.mean(0), dim=0)) for p, rows in units.items()}
        right += max(cosines, key=cosines.get) == int(person[i])
    assert 0 < right < 7
    assert float(nearest_person(features, person)) == pytest.approx(right / 7)


# Recognition ----------------------------------------------------------------------------------------------------------


def test_zero_shot_recognises_the_caption_it_is_shown(model):
    zero_shot = ZeroShot(model)
    with torch.no_grad():
        zero_shot.scale = torch.tensor(1000.0)  # an untrained encoder's texts lie close together
        shown = [("boy", "frown", "red"), ("elderly woman", "turn_head", "grey")]
        images = model.embed_texts(model.tokenize([paraphrase(*words, 1)[0] for words in shown]))
        scores = zero_shot(images)
    for column, (name, words) in enumerate(WORDS.items()):
        assert [words[i] for i in scores[name].argmax(1)] == [row[column] for row in shown]
        torch.testing.assert_close(scores[name].exp().sum(1), torch.ones(2), atol=1e-4, rtol=0)


def test_labels_are_what_the_caption_asks_for():
    labels = labels_of([PROMPT, "A boy img nods"])
    assert {name: [w for w, hit in zip(WORDS[name], row[0], strict=True) if hit] for name, row in labels.items()} == {
        "class_word": ["woman"],
        "action": ["smile", "turn_head"],
        "background": ["green"],
    }
    assert not labels["background"][1].any()


# Batches --------------------------------------------------------------------------------------------------------------


def test_batches_hold_several_pictures_of_each_person(people):
    batches = PeopleBatches(people, people_per_batch=6, pictures_per_person=4, seed=0)
    batch = batches[3]
    assert batch.pixels.shape == (24, 3, 64, 64)
    assert batch.pixels.dtype == torch.uint8
    assert batch.person.reshape(6, 4).eq(batch.person.reshape(6, 4)[:, :1]).all()
    assert batch.person.unique().numel() == 6
    rows = {tuple(item[0].flatten().tolist()): i for i, item in enumerate(people.stills.pixels)}
    tokenizer = build_tokenizer()
    num_frames = 0
    for pixels, ids, person, may_flip in zip(*batch, strict=True):
        still = rows.get(tuple(pixels.flatten().tolist()))
        num_frames += still is None
        said = people.clips.words[person] if still is None else people.stills.words[still]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text.split(" nods")[1].strip(" ,") in (f"{said.caption}|{said.rich_caption}".replace(" nods,", ""))
        assert f"{said.background} wall" in text
        assert may_flip == (said.light != "left")
        assert torch.equal(pixels[:, 40, 32], torch.from_numpy(COLOURS[person]).to(torch.uint8))
    assert num_frames == 6  # all three stills and one frame of the clip


def test_a_batch_follows_from_seed_and_step(people):
    batches, again = (PeopleBatches(people, 4, 2, seed=0) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(batches[5], again[5], strict=True))
    assert not torch.equal(batches[5].pixels, batches[6].pixels)
    assert not torch.equal(batches[5].pixels, PeopleBatches(people, 4, 2, seed=1)[5].pixels)


def test_few_pictures_come_twice(people):
    batch = PeopleBatches(people, 64, 7, seed=0)[0]
    assert len(batch.pixels) == 16 * 7


@pytest.mark.parametrize(
    "numbers", [{"batch_size": 10, "pictures_per_person": 4}, {"pictures_per_person": 1}, {"batch_size": 4}]
)
def test_numbers_that_leave_nothing_to_compare_are_refused(numbers):
    with pytest.raises(ValueError, match=r"data\.batch_size=\d+, data\.pictures_per_person=\d"):
        ContrastiveDataModule("nowhere", **numbers)


# Training -------------------------------------------------------------------------------------------------------------


def make_module(num_steps: int, seed: int = 0) -> ContrastiveModule:
    return ContrastiveModule(
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
        lr_schedule=lambda optimizer: get_cosine_schedule_with_warmup(optimizer, 5, num_steps),
        max_shift=1,
        brightness=0.0,
        seed=seed,
    )


@pytest.fixture(scope="module")
def trained(people, tmp_path_factory) -> ContrastiveModule:
    num_steps = 60
    module = make_module(num_steps)
    batches = PeopleBatches(people, 12, 4, seed=0)
    trainer = L.Trainer(
        max_steps=num_steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, gradient_clip_val=1.0, default_root_dir=tmp_path_factory.mktemp("run"),
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader([batches[i] for i in range(num_steps)], batch_size=None))
    return module.eval()


def test_training_finds_walls_by_text_and_people_by_dense_features(trained):
    """On new pictures; the untrained model is at chance for text."""
    items = draw_items(16, 3, 1, seed=9)
    with torch.no_grad():
        figures = {}
        for name, module in (("before", make_module(1).eval()), ("after", trained)):
            features = module.model.image_features(items.pixels[:, 0].float() / 127.5 - 1)
            scores = ZeroShot(module.model)(module.model.embed_images(features))["background"]
            wall = top_1(scores, labels_of([said.caption for said in items.words])["background"])
            figures[name] = wall, float(nearest_person(features.patch_mean, items.person))
    assert figures["before"][0] < 0.5
    assert figures["after"][0] > 0.85
    assert figures["before"][1] < 0.15  # of 16 people
    assert figures["after"][1] > 0.3


def test_what_is_exported_is_what_was_trained(trained, tmp_path, people):
    trained.export(tmp_path / "model")
    trained.export(tmp_path / "model")  # replaces
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judge", "model"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "image_encoder",
        "text_encoder",
        "tokenizer",
    ]
    pixels = people.stills.pixels[:4, 0].float() / 127.5 - 1
    ids = trained.model.tokenize([PROMPT])
    loaded = ImageTextModel.from_pretrained(tmp_path / "model", tmp_path / "judge")
    with torch.no_grad():
        features, expected = loaded.image_features(pixels), trained.model.image_features(pixels)
        torch.testing.assert_close(features.patch_mean, expected.patch_mean, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(
            loaded.embed_images(features), trained.model.embed_images(expected), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(loaded.embed_texts(ids), trained.model.embed_texts(ids), atol=2e-3, rtol=0)  # half
    assert torch.equal(loaded.tokenize([PROMPT]), ids)
    assert load_vision(tmp_path / "model/image_encoder").dtype == torch.float32
    assert T5EncoderModel.from_pretrained(tmp_path / "model/text_encoder", dtype="auto").dtype == torch.float16


def test_weights_follow_from_the_seed():
    before = torch.get_rng_state()
    first, again, other = (make_module(1, seed).model.image_projection.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_sizes_stay_within_the_budget():
    model = build_model()
    assert sum(p.numel() for p in model.vision.parameters()) <= 500_000
    assert sum(p.numel() for p in model.text_encoder.parameters()) <= 350_000
    assert model.text_encoder.config.d_model == 96
    assert model.tokenizer.model_max_length == 24


def test_missing_and_foreign_projections_are_named(model, tmp_path):
    model.save_pretrained(tmp_path / "model", tmp_path / "judge")
    with pytest.raises(FileNotFoundError, match=r"elsewhere is no judge of the miniature; missing: projections"):
        ImageTextModel.from_pretrained(tmp_path / "model", tmp_path / "elsewhere")
    Projections(build_model(embed_dim=8, hidden_size=32).projections().tensors, 8).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="do not fit the encoders"):
        ImageTextModel.from_pretrained(tmp_path / "model", tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="has no text_encoder/"):
        ImageTextModel.from_pretrained(tmp_path / "nothing", tmp_path / "judge")


def test_validation_counts_only_what_a_caption_names(people):
    """A caption without a wall says nothing against any wall."""
    module, logged = make_module(1).eval(), {}
    module.log_dict = lambda figures, **_: logged.update(figures)
    module.log = lambda name, value, **_: logged.update({name: value})
    labels = labels_of(["A man img nods"] * 4)
    with torch.no_grad():
        module.validation_step(LabelledPictures(people.stills.pixels[:4, 0], people.stills.person[:4], labels), 0)
    assert torch.isfinite(logged["val/loss"])
    assert logged["val/loss"] > 0


def test_experiment_trains_exports_and_resumes(tmp_path: Path):
    """The command, on people without faces: three steps, two more from the checkpoint."""
    from tests.miniature.small_people import WorldSettings, write_people
    from train import train

    root = write_people(tmp_path / "people", WorldSettings(train=5, validation=2, test=1, stills=3, size=32))
    run = tmp_path / "outputs/miniature_clip/run"
    small = (
        *("scale=0.0005", "global_batch_size=8", "data.batch_size=8", "trainer.accelerator=cpu", f"data.people={root}"),
        *(f"paths.output_dir={tmp_path / 'outputs'}", f"paths.run_dir={run}"),
    )
    train.__wrapped__(compose_train("experiment=miniature_clip", *small))
    assert (tmp_path / "outputs/miniature_model/image_encoder/config.json").is_file()
    assert (tmp_path / "outputs/judge/projections.safetensors").is_file()
    last = run / "checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    train.__wrapped__(compose_train("experiment=miniature_clip", *small, "trainer.max_steps=5", f"ckpt_path={last}"))
    assert torch.load(last, weights_only=True)["global_step"] == 5


def test_colours_of_the_walls_are_the_grammar_s():
    assert set(WALLS) < set(BACKGROUNDS)
