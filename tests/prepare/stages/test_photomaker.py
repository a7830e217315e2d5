import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mm_lightning.prepare.stages.photomaker import Fusion, PhotoMakerGenerator
from mm_lightning.prepare.stages.references import SynthesisedReferences, generator_for
from tests.prepare.stages.conftest import FACES, rejection
from tests.prepare.stages.tiny_sdxl import PERCEIVER, make_photomaker, make_sdxl

PROMPT = "a man img is talking"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photomaker")
    return make_sdxl(folder / "sdxl"), make_photomaker(folder / "photomaker-v2.bin")


@pytest.fixture(scope="module")
def make(weights):
    def build(**options) -> PhotoMakerGenerator:
        base, photomaker = weights
        fixed = {"recognizer": "dlib", "num_steps": 3, "size": 32, "perceiver_sizes": PERCEIVER, "merge_share": 0.34}
        return PhotoMakerGenerator(str(base), str(photomaker), **fixed | options)

    return build


def generated(generator: PhotoMakerGenerator, person, prompt: str = PROMPT) -> np.ndarray:
    return generator.generate(person.frames[0], person.meta["faces"][0], prompt, generator_for(0, "k"))


@pytest.mark.parametrize("place", ["base", "photomaker"])
def test_other_weights_are_another_stage(place, weights, tmp_path):
    base, photomaker = shutil.copytree(weights[0], tmp_path / "sdxl"), shutil.copy(weights[1], tmp_path)

    def models():
        generator = PhotoMakerGenerator(str(base), str(photomaker), recognizer="dlib")
        return SynthesisedReferences(generator, **FACES).models()

    before = models()
    file = sorted(base.rglob("*.safetensors"))[-1] if place == "base" else Path(photomaker)
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert models() != before


def test_a_picture_that_depends_on_the_person(make, person):
    generator = make()
    first = generated(generator, person)
    assert (first.shape, first.dtype) == ((32, 32, 3), np.uint8)
    assert np.array_equal(generated(generator, person), first)
    person.frames = [255 - person.frames[0]]
    assert not np.array_equal(generated(generator, person), first)


def test_before_the_merge_it_is_the_librarys_own_picture(make, person):
    generator = make(merge_share=2.0)
    expected = generator.pipeline(
        "a man is talking",
        negative_prompt=generator.negative_prompt,
        num_inference_steps=3,
        guidance_scale=5.0,
        height=32,
        width=32,
        generator=generator_for(0, "k"),
        output_type="np",
    ).images[0]
    assert np.abs(generated(generator, person) - expected * 255).max() <= 1


def test_prompts_are_encoded_as_the_library_does(make):
    generator = make()
    expected, _, pooled, _ = generator.pipeline.encode_prompt("a man", do_classifier_free_guidance=False)
    found = generator.encode("a man")
    assert torch.allclose(found.embeds, expected, atol=1e-6)
    assert torch.allclose(found.pooled, pooled, atol=1e-6)


def test_identity_stands_at_the_class_word(make):
    generator = make()
    tokens = torch.randn(2, 64)
    with torch.inference_mode():
        _, merged = generator.prompts(PROMPT, tokens)
        expected = generator.encode("a man man is talking")
    changed = (merged.embeds - expected.embeds).abs().sum(-1)[0] > 1e-5
    assert changed.nonzero().flatten().tolist() == [2, 3]  # behind the start token and "a"
    assert torch.equal(merged.pooled, expected.pooled)


def test_fusion_is_the_published_arithmetic():
    """Recomputed in float64 from the parameters, as PhotoMaker's paper and weights have it."""
    torch.manual_seed(0)
    fusion = Fusion(8).double()
    text, identity = torch.randn(2, 8).double(), torch.randn(2, 8).double()
    p = dict(fusion.named_parameters())

    def block(name: str, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(x, x.shape[-1:], p[f"{name}.layernorm.weight"], p[f"{name}.layernorm.bias"])
        x = F.gelu(x @ p[f"{name}.fc1.weight"].mT + p[f"{name}.fc1.bias"])
        return x @ p[f"{name}.fc2.weight"].mT + p[f"{name}.fc2.bias"]

    fused = block("mlp1", torch.cat([text, identity], -1)) + text
    fused = block("mlp2", fused) + fused
    expected = F.layer_norm(fused, (8,), p["layer_norm.weight"], p["layer_norm.bias"])
    assert torch.allclose(fusion.float()(text, identity), expected, atol=1e-5)


def test_lora_is_fused(weights, make, person, tmp_path):
    pytest.importorskip("peft")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"{name}.lora_A.weight": torch.randn(2, 32), f"{name}.lora_B.weight": torch.randn(32, 2)}
    changed = PhotoMakerGenerator(
        str(weights[0]), str(make_photomaker(tmp_path / "with-lora.bin", lora)), "dlib", perceiver_sizes=PERCEIVER
    )
    attention = changed.pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    found = getattr(attention.to_q, "base_layer", attention.to_q).weight
    base = make().pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight
    expected = base + lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
    assert torch.allclose(found, expected, atol=1e-5)


def test_random_weights_give_nobody(make, person):
    stage = SynthesisedReferences(make(), prompts=[PROMPT], attempts=1, **FACES)
    assert rejection(stage, person) == "no_similar_reference"


def test_trigger_is_needed(make, person):
    with pytest.raises(ValueError, match="'img' once"):
        generated(make(), person, "a man talks")


def test_missing_weights(weights, tmp_path):
    base, photomaker = (str(path) for path in weights)
    with pytest.raises(FileNotFoundError, match=r"No SDXL.*model_index\.json.*hf download"):
        PhotoMakerGenerator(str(tmp_path), photomaker, "dlib")
    with pytest.raises(FileNotFoundError, match=r"No PhotoMaker-V2 weights.*hf download"):
        PhotoMakerGenerator(base, str(tmp_path / "none.bin"), "dlib")
    with pytest.raises(FileNotFoundError, match="buffalo_l"):
        PhotoMakerGenerator(base, photomaker, root=str(tmp_path))
