import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel, T5Config
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mm_lightning.encoders.face import FaceFeatureEncoder, clip_pixel_values, load_vision

VISION = {
    "hidden_size": 128,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


class Recognizer(nn.Module):
    """A recogniser of 6 dimensions whose batch norm and dropout show when it is not in evaluation mode."""

    embed_dim = 6

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(13, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))

    def embed(self, pixels, landmarks):
        return self.net(torch.cat([pixels.mean(dim=(2, 3)), landmarks.flatten(1)], dim=1))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def vision() -> CLIPVisionModel:
    return CLIPVisionModel(CLIPVisionConfig(**VISION)).eval()


@pytest.fixture
def encoder(vision) -> FaceFeatureEncoder:
    return FaceFeatureEncoder(vision, Recognizer())


@pytest.fixture
def references():
    """Two samples of two references, of which the second sample lacks the first."""
    pictures, landmarks = torch.rand(2, 2, 3, 40, 40) * 2 - 1, torch.rand(2, 2, 5, 2)
    return pictures, landmarks, torch.tensor([[True, True], [False, True]])


def test_features_are_the_libraries_own(encoder, references):
    pictures, landmarks, mask = references
    features = encoder(*references)
    tower = encoder.vision
    with torch.no_grad():
        pixel_values = clip_pixel_values(pictures.flatten(0, 1), 32)
        states = tower.pre_layrnorm(tower.embeddings(pixel_values))
        for layer in tower.encoder.layers[:-1]:
            states = layer(states, attention_mask=None)
        last = tower(pixel_values).last_hidden_state
        query = encoder.recognizer.embed(pictures.flatten(0, 1), landmarks.flatten(0, 1))
    for feature, expected in [
        (features.last_hidden_state, last),
        (features.penultimate_hidden_state, states),
        (features.id_query, query),
    ]:
        torch.testing.assert_close(feature[mask], expected.unflatten(0, (2, 2))[mask], rtol=1e-5, atol=1e-5)
    assert features.last_hidden_state.shape == (2, 2, 17, 128)
    assert features.reference_mask is mask
    assert not torch.allclose(features.last_hidden_state[mask], features.penultimate_hidden_state[mask], atol=1e-3)


def test_absent_references_are_not_encoded(encoder, references):
    pictures, landmarks, mask = references
    expected = encoder(*references)
    pictures[1, 0] = landmarks[1, 0] = float("nan")
    seen = []
    encoder.vision.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    features = encoder(pictures, landmarks, mask)
    assert seen == [3]
    for feature, reference in zip(features, expected, strict=True):
        assert torch.equal(feature, reference)
    assert not any(feature[1, 0].any() for feature in features)


def test_a_batch_without_references_gives_zeros(encoder, references):
    pictures, landmarks, _ = references
    features = encoder(pictures, landmarks, torch.zeros(2, 2, dtype=torch.bool))
    expected = encoder(*references)
    for feature, reference in zip(features, expected, strict=True):
        assert feature.shape == reference.shape
        assert feature.dtype == reference.dtype
        assert not feature.any()


@pytest.mark.parametrize("size", [32, 40, 224, 500])
def test_pixel_values_equal_clip_image_processors(size):
    generator = np.random.default_rng(size)
    coarse = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((size, size), Image.BILINEAR))
    picture = (60 + 0.5 * picture + generator.integers(-20, 20, picture.shape)).astype(np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    expected = processor(Image.fromarray(picture), return_tensors="pt").pixel_values
    tensor = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    # The library rounds to 8 bits after each of the two axes; CLIP divides by deviations of 0.26 and more.
    torch.testing.assert_close(clip_pixel_values(tensor, 32), expected, rtol=0, atol=1.5 / 255 / 0.26)


def test_pixel_values_do_not_overshoot():
    picture = torch.ones(1, 3, 100, 100)
    picture[..., 50:] = -1
    mean, std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    pixel_values = clip_pixel_values(picture, 32)[0]
    torch.testing.assert_close(pixel_values.amin(dim=(1, 2)), -mean / std)
    torch.testing.assert_close(pixel_values.amax(dim=(1, 2)), (1 - mean) / std)


def test_not_square_pictures_are_refused():
    with pytest.raises(ValueError, match="these are 50x40"):
        clip_pixel_values(torch.zeros(1, 3, 40, 50), 32)


def test_the_encoder_stays_frozen(encoder, references):
    expected = encoder(*references)
    nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    references[0].requires_grad_()
    features = encoder(*references)
    assert not any(feature.requires_grad for feature in features)
    for feature, reference in zip(features, expected, strict=True):
        assert torch.equal(feature, reference)


def test_autocast_does_not_change_the_features(encoder, references):
    expected = encoder(*references)
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(*references)
    for feature, reference in zip(features, expected, strict=True):
        assert feature.dtype == reference.dtype
        assert torch.equal(feature, reference)


def test_a_half_precision_tower_leaves_the_recogniser_alone(encoder, references):
    expected = encoder(*references)
    encoder.vision.to(torch.bfloat16)
    features = encoder(*references)
    assert features.last_hidden_state.dtype == torch.bfloat16
    assert torch.equal(features.id_query, expected.id_query)
    difference = features.last_hidden_state.float() - expected.last_hidden_state
    assert difference.norm() < 0.05 * expected.last_hidden_state.norm()


def assert_same_tower(loaded, vision):
    pixel_values = torch.randn(2, 3, 32, 32)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values).last_hidden_state, vision(pixel_values).last_hidden_state)


def test_load_vision_from_a_folder_of_the_tower(vision, tmp_path):
    vision.save_pretrained(tmp_path)
    assert_same_tower(load_vision(tmp_path), vision)


def test_load_vision_from_a_folder_of_the_whole_clip(tmp_path):
    text = CLIPTextConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=VISION)).eval()
    clip.save_pretrained(tmp_path)
    vision = clip.vision_model
    assert_same_tower(load_vision(tmp_path), vision)


@pytest.fixture
def photomaker(vision, tmp_path):
    """photomaker-v2.bin's layout; older transformers also saved the constant position_ids."""
    id_encoder = {f"vision_model.{name}": tensor for name, tensor in vision.state_dict().items()}
    id_encoder["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    id_encoder["qformer_perceiver.token_norm.weight"] = torch.ones(2)
    torch.save({"id_encoder": id_encoder, "lora_weights": {}}, tmp_path / "photomaker-v2.bin")
    return tmp_path / "photomaker-v2.bin", id_encoder


def test_load_vision_from_photomakers_file(vision, photomaker):
    loaded = load_vision(photomaker[0])
    assert {name: getattr(loaded.config, name) for name in VISION} == VISION
    assert_same_tower(loaded, vision)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("encoder.layers.1.mlp.fc2.bias", r"does not fit CLIPVisionModel: missing \[.*encoder.layers.1.mlp.fc2.bias"),
        ("embeddings.patch_embedding.weight", "lacks the vision tower's tensor 'embeddings.patch_embedding.weight'"),
    ],
)
def test_load_vision_from_an_incomplete_file(photomaker, name, message):
    path, id_encoder = photomaker
    del id_encoder[f"vision_model.{name}"]
    torch.save({"id_encoder": id_encoder}, path)
    with pytest.raises(ValueError, match=message):
        load_vision(path)


def test_load_vision_refuses_what_is_no_clip(vision, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No CLIP vision encoder at .*nowhere.*hf download openai/clip"):
        load_vision(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_vision(tmp_path)
    vision.config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has a config\.json but no weights"):
        load_vision(tmp_path)
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="describes a 't5', not a CLIP"):
        load_vision(tmp_path)


def test_load_vision_refuses_weights_that_lack_tensors(vision, tmp_path):
    vision.save_pretrained(tmp_path)
    vision.config.num_hidden_layers = 4
    vision.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack 16 tensors of the vision tower, such as .*encoder\.layers\.3"):
        load_vision(tmp_path)
