"""The pipeline on the smallest CogVideoX, with real photographs."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from mm_lightning.config import register_resolvers
from mm_lightning.encoders.detector import load_detector
from mm_lightning.encoders.photos import crop_face, find_faces, load_photo, read_references
from mm_lightning.generate import enable_tiling
from mm_lightning.pipeline import MagicMirrorPipeline
from mm_lightning.prepare.samples import packaged_file
from tests.conftest import ROOT

PROMPT = "A man img smiles"
SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """An adapter folder as training writes it, all its weights random, and the module that wrote it."""
    register_resolvers()
    folder = tmp_path_factory.mktemp("trained")
    overrides = ["experiment=stage1_image", "debug=tiny", f"model.base={tiny_folder}", f"paths.run_dir={folder}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=[*overrides, f"model.vision={tiny_folder}/image_encoder"])
    module = instantiate(cfg.model)
    module.configure_model()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in module.parameters() if p.requires_grad):
            parameter.normal_(std=0.3)
    module.save_adapter(folder / "adapter")
    return SimpleNamespace(adapter=folder / "adapter", module=module.eval())


@pytest.fixture(scope="module")
def pipe(tiny_folder, trained):
    pipe = MagicMirrorPipeline.from_pretrained(tiny_folder, adapter=trained.adapter, detector="dlib")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def plain(tiny_folder):
    pipe = CogVideoXPipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def group():
    return np.asarray(Image.open(packaged_file("insightface", "data/images/t1.jpg")).convert("RGB"))


@pytest.fixture(scope="module")
def astronaut():
    return skimage.data.astronaut()


def generate(pipe, prompt=PROMPT, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    options = {**SMALL, "generator": generator, "guidance_scale": 3.0, "output_type": "latent", **kwargs}
    return pipe(prompt, **options).frames


# The plain pipeline inside


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("num_frames", [1, 5])
def test_face_scale_zero_is_the_plain_pipeline_bit_for_bit(pipe, plain, astronaut, guidance_scale, num_frames):
    options = {"guidance_scale": guidance_scale, "num_frames": num_frames}
    length = plain.transformer.config.max_text_seq_length
    expected = generate(plain, "A man smiles", **options, max_sequence_length=length)
    for guided in ({}, {"identity_guidance_scale": 1.5}):
        assert torch.equal(generate(pipe, reference_images=astronaut, face_scale=0, **guided, **options), expected)
    assert torch.equal(generate(pipe, "A man smiles", face_scale=0, **options), expected)
    assert not torch.equal(generate(pipe, reference_images=astronaut, **options), expected)


def test_face_scale_zero_takes_scheduler_batch_and_negative_prompts_as_the_plain_pipeline(pipe, plain):
    schedulers = pipe.scheduler, plain.scheduler
    pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)
    plain.scheduler = CogVideoXDDIMScheduler.from_config(plain.scheduler.config)
    options = {"negative_prompt": "dark", "eta": 0.5, "use_dynamic_cfg": True, "max_sequence_length": 32}
    both = ["a dog", "a man"]
    try:
        ours = generate(pipe, both, face_scale=0, **options)
        options["negative_prompt"] = ["dark"] * 2
        assert torch.equal(ours, generate(plain, both, **options))
    finally:
        pipe.scheduler, plain.scheduler = schedulers


# The person


def test_it_is_the_module_that_was_trained(pipe, trained, astronaut):
    """The training module's own condition and preview of the same references, through the stock pipeline."""
    from mm_lightning.preview import build_pipeline, generate_latents

    module, references = trained.module, read_references([astronaut], load_detector("dlib"))
    with torch.no_grad():
        condition = module.front_end(module.features(*references), module.text([PROMPT]))
    shape = torch.Size((1, 2, module.backbone.vae_config.latent_channels, 4, 4))
    pipeline = build_pipeline(module.backbone, module.transformer)
    generator = [torch.Generator().manual_seed(0)]
    expected = generate_latents(pipeline, shape, condition, module.null_prompt_embeds(), 3, 3.0, generator)
    torch.testing.assert_close(generate(pipe, reference_images=astronaut), expected, rtol=1e-5, atol=1e-5)


def test_several_photos_several_people_give_several_videos(pipe, astronaut, group):
    one, other = generate(pipe, reference_images=astronaut), generate(pipe, reference_images=group, face_index=0)
    both = generate(pipe, reference_images=[astronaut, Image.fromarray(astronaut[:, ::-1])])
    assert len({one.sum().item(), other.sum().item(), both.sum().item()}) == 3
    assert torch.equal(generate(pipe, reference_images=[astronaut]), one)


def test_features_can_be_computed_once(pipe, astronaut):
    identity = pipe.encode_references(astronaut)
    assert torch.equal(generate(pipe, identity=identity), generate(pipe, reference_images=astronaut))


def test_files_pictures_and_arrays_are_the_same(pipe, astronaut, tmp_path):
    Image.fromarray(astronaut).save(tmp_path / "her.png")
    expected = pipe.encode_references(astronaut)
    for photo in (tmp_path / "her.png", str(tmp_path / "her.png"), [Image.fromarray(astronaut)]):
        assert all(torch.equal(*pair) for pair in zip(pipe.encode_references(photo), expected, strict=True))


def test_several_prompts_and_videos_with_a_generator_each(pipe, astronaut):
    identity = pipe.encode_references(astronaut)
    prompts = [PROMPT, "In a garden a woman img laughs"]
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7, 8)]
    videos = pipe(prompts, identity=identity, num_videos_per_prompt=2, generator=generators, output_type="latent",
                  guidance_scale=3.0, **SMALL).frames  # fmt: skip
    for i, (prompt, seed) in enumerate(zip([p for p in prompts for _ in range(2)], (5, 6, 7, 8), strict=True)):
        alone = generate(pipe, prompt, seed, identity=identity)
        torch.testing.assert_close(videos[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_the_first_person_is_meant_without_trigger(pipe, astronaut):
    identity = pipe.encode_references(astronaut)
    assert torch.equal(generate(pipe, "A man smiles", identity=identity), generate(pipe, identity=identity))


def test_identity_guidance_is_instructpix2pix(pipe, astronaut):
    """One step against the sum written out, with the transformer called by hand."""
    identity, s, w = pipe.encode_references(astronaut), 2.5, 4.0
    seen = []
    handle = pipe.transformer.register_forward_hook(lambda m, a, k, out: seen.append((k, out[0])), with_kwargs=True)
    try:
        generate(pipe, identity=identity, guidance_scale=w, num_inference_steps=1)
        plain = generate(pipe, identity=identity, guidance_scale=w, num_inference_steps=1)
        contrasted = generate(
            pipe, identity=identity, guidance_scale=w, num_inference_steps=1, identity_guidance_scale=s
        )
    finally:
        handle.remove()
    kwargs, velocity = seen[0]
    nobody = pipe.encode_identity([PROMPT], identity, 1.0, drop_identity=True)
    told = {**kwargs, "hidden_states": kwargs["hidden_states"][:1], "timestep": kwargs["timestep"][:1]}
    told["encoder_hidden_states"] = pipe.encode_negative(None, 1)
    told["attention_kwargs"] = nobody.attention_kwargs()
    with torch.no_grad():
        v_nobody = pipe.transformer(**told)[0]
    v_who, v_text = velocity.chunk(2)
    wanted = v_nobody + s * (v_who - v_nobody) + w * (v_text - v_who)
    usual = v_who + w * (v_text - v_who)
    # From pure noise (alpha_bar = 0) a step of the sampler is linear in the velocity: x0 = -v.
    difference = contrasted - plain
    expected = (wanted - usual) * ((difference * (wanted - usual)).sum() / (wanted - usual).square().sum())
    torch.testing.assert_close(difference, expected, rtol=1e-3, atol=1e-4)
    assert difference.abs().max() > 1e-3
    assert torch.equal(generate(pipe, identity=identity, guidance_scale=w, num_inference_steps=1), plain)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_face_condition_is_computed_once_per_video(pipe, astronaut, guidance_scale, monkeypatch):
    calls = []
    for part in ("face_encoder", "front_end"):
        module = getattr(pipe, part)
        forward = module.forward
        monkeypatch.setattr(module, "forward", lambda *a, f=forward, p=part: calls.append(p) or f(*a))
    generate(pipe, reference_images=astronaut, guidance_scale=guidance_scale)
    assert calls == ["face_encoder", "front_end"]


# diffusers' habits


def test_callback_output_types_tiling_and_slicing(pipe, astronaut):
    steps = []

    def callback(pipeline, step, timestep, tensors):
        steps.append((step, tuple(tensors)))
        return tensors

    identity = pipe.encode_references(astronaut)
    [frames] = generate(pipe, identity=identity, output_type="pil", callback_on_step_end=callback)
    assert steps == [(i, ("latents",)) for i in range(3)]
    assert [frame.size for frame in frames] == [(32, 32)] * 5
    assert generate(pipe, identity=identity, output_type="np").shape == (1, 5, 32, 32, 3)
    assert isinstance(generate_tuple(pipe, identity), torch.Tensor)


@pytest.mark.parametrize("num_frames", [1, 5, 9])
def test_as_many_frames_as_asked_for(pipe, astronaut, num_frames):
    """diffusers' own decoding turns 5 into 8."""
    frames = generate(pipe, reference_images=astronaut, num_frames=num_frames, output_type="np")
    assert frames.shape == (1, num_frames, 32, 32, 3)


def test_tiling_and_slicing_are_the_vaes(pipe, plain):
    prompts, options = ["A man"] * 2, {"num_frames": 9, "output_type": "np"}
    try:
        for vae in (pipe.vae, plain.vae):
            vae.enable_slicing()
            enable_tiling(vae)
        ours = generate(pipe, prompts, face_scale=0, **options)
        assert ours.shape[2:4] == (32, 32)
        assert np.array_equal(ours, generate(plain, prompts, max_sequence_length=32, **options))
        pipe.vae.enable_tiling(tile_overlap_factor_height=1 / 6, tile_overlap_factor_width=1 / 5)
        with pytest.raises(ValueError, match=r"tiles make .* pixels of \(32, 32\): give `vae.enable_tiling` overlaps"):
            generate(pipe, prompts, face_scale=0, **options)
    finally:
        for vae in (pipe.vae, plain.vae):
            vae.disable_slicing()
            vae.disable_tiling()


def test_tiles_of_the_5b_are_diffusers_own():
    """30 by 45 latents, whose overlaps are whole already."""
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX(block_out_channels=(8, 8, 8, 8), norm_num_groups=2, layers_per_block=1)
    enable_tiling(vae)
    assert (vae.tile_overlap_factor_height, vae.tile_overlap_factor_width) == (1 / 6, 1 / 5)


def generate_tuple(pipe, identity):
    return pipe(PROMPT, identity=identity, **SMALL, output_type="latent", return_dict=False)[0]


def test_saved_and_loaded_it_is_the_same(pipe, plain, astronaut, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    loaded = MagicMirrorPipeline.from_pretrained(tmp_path / "saved", detector="dlib")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded, reference_images=astronaut), generate(pipe, reference_images=astronaut))
    base = CogVideoXPipeline.from_pretrained(tmp_path / "saved")
    base.set_progress_bar_config(disable=True)
    assert torch.equal(generate(base, "x", max_sequence_length=32), generate(plain, "x", max_sequence_length=32))


def test_bfloat16(tiny_folder, trained, astronaut):
    pipe = MagicMirrorPipeline.from_pretrained(
        tiny_folder, trained.adapter, torch_dtype=torch.bfloat16, detector="dlib"
    )
    pipe.set_progress_bar_config(disable=True)
    latents = generate(pipe, reference_images=astronaut)
    assert latents.dtype == torch.bfloat16
    assert latents.isfinite().all()


@pytest.mark.parametrize("identity_guidance_scale", [1.0, 2.0])
def test_offloading_changes_nothing(pipe, tiny_folder, trained, astronaut, identity_guidance_scale):
    """With the CPU in the accelerator's place: the hooks and moves are the real ones."""
    options = {"reference_images": astronaut, "identity_guidance_scale": identity_guidance_scale}
    offloaded = MagicMirrorPipeline.from_pretrained(tiny_folder, trained.adapter, detector="dlib")
    offloaded.set_progress_bar_config(disable=True)
    offloaded.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        torch.testing.assert_close(generate(offloaded, **options), generate(pipe, **options), rtol=0, atol=1e-5)


@pytest.mark.parametrize("identity_guidance_scale", [1.0, 2.0])
def test_weights_that_come_by_layer_change_nothing(pipe, tiny_folder, trained, astronaut, identity_guidance_scale):
    """What `enable_sequential_cpu_offload` does to transformer and VAE, with the CPU in the accelerator's place; T5's
    tied embedding accelerate cannot move from the CPU to the CPU.
    """
    options = {"reference_images": astronaut, "identity_guidance_scale": identity_guidance_scale}
    offloaded = MagicMirrorPipeline.from_pretrained(tiny_folder, trained.adapter, detector="dlib")
    offloaded.set_progress_bar_config(disable=True)
    for module in (offloaded.transformer, offloaded.vae):
        cpu_offload(module, "cpu")
        assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    torch.testing.assert_close(generate(offloaded, **options), generate(pipe, **options), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="accelerate cannot offload T5 from the CPU to the CPU")
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_from_a_gpu(pipe, tiny_folder, trained, astronaut, offload):
    offloaded = MagicMirrorPipeline.from_pretrained(tiny_folder, trained.adapter, detector="dlib")
    offloaded.set_progress_bar_config(disable=True)
    getattr(offloaded, offload)()
    expected = generate(pipe, reference_images=astronaut)
    torch.testing.assert_close(generate(offloaded, reference_images=astronaut).cpu(), expected, rtol=0, atol=1e-2)


# Photos


def test_exif_alpha_grey_and_cmyk_photos(astronaut, tmp_path):
    picture = Image.fromarray(astronaut)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right to see it upright
    picture.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load_photo(tmp_path / "turned.png"), astronaut)
    clear = picture.convert("RGBA")
    clear.putalpha(0)
    assert (load_photo(clear) == 255).all()
    for mode in ("L", "CMYK", "P", "I;16"):
        converted = picture.convert("L").convert("I;16") if mode == "I;16" else picture.convert(mode)
        assert load_photo(converted).shape == astronaut.shape


def test_a_crop_moves_the_landmarks_with_the_face(astronaut):
    [face] = find_faces(astronaut, load_detector("dlib"))
    pixels, landmarks = crop_face(astronaut, face, 96)
    [again] = find_faces(((pixels + 1) * 127.5).round().byte().movedim(0, -1).numpy(), load_detector("dlib"))
    assert np.abs(again.landmarks - landmarks.numpy()).max() < 3  # of 96 pixels


def test_a_large_photo_is_searched_small(astronaut):
    large = np.asarray(Image.fromarray(astronaut).resize((4096, 4096)))
    [small], [found] = (find_faces(picture, load_detector("dlib")) for picture in (astronaut, large))
    assert np.abs(found.landmarks / 8 - small.landmarks).max() < 6


def test_the_largest_face_is_taken_with_a_warning(group, caplog):
    with caplog.at_level(logging.WARNING):
        chosen = read_references([group], load_detector("dlib"))
    assert "6 faces; the largest is taken" in caplog.text
    each = [read_references([group], load_detector("dlib"), index) for index in range(6)]
    assert sum(torch.equal(chosen.pixels, one.pixels) for one in each) == 1


# Mistakes


@pytest.mark.parametrize(
    ("photo", "message"),
    [
        (np.zeros((64, 64, 3), np.uint8), "No face found in photo 1"),
        (np.zeros((64, 64), np.uint8), r"RGB uint8 \(H, W, 3\), got uint8 \(64, 64\)"),
        (np.zeros((64, 64, 3)), "got float64"),
        ([], "No reference photo"),
        (None, "reference_images is missing"),
    ],
)
def test_unusable_photos(pipe, photo, message):
    with pytest.raises(ValueError, match=message):
        generate(pipe, reference_images=photo)


def test_photo_files_that_are_none(pipe, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"text.jpg cannot be read as a picture"):
        generate(pipe, reference_images=tmp_path / "text.jpg")
    with pytest.raises(FileNotFoundError, match=r"No photo at .*absent.png"):
        generate(pipe, reference_images=tmp_path / "absent.png")


def test_a_face_too_small_and_one_that_is_not_there(pipe, astronaut, group):
    tiny = np.full((256, 256, 3), 128, np.uint8)
    tiny[100:156, 100:156] = np.asarray(Image.fromarray(astronaut).resize((56, 56)))
    with pytest.raises(ValueError, match=r"No face found|measures 1\d pixels, at least 20"):
        generate(pipe, reference_images=tiny)
    with pytest.raises(ValueError, match=r"face_index=6, but photo 1 shows 6 faces, from the left 0 to 5"):
        generate(pipe, reference_images=group, face_index=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "A dog runs"}, "No word for a person in the prompt 'A dog runs'"),
        ({"prompt": []}, "0 prompts"),
        ({"num_frames": 6}, r"6 frames does not fit.*5 and 9"),
        ({"num_frames": 0}, r"0 frames does not fit"),
        ({"height": 33}, "height=33 is no multiple of 16"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0"),
        ({"prompt": [PROMPT] * 3, "negative_prompt": ["a", "b"]}, "2 negative prompts for 3 prompts"),
    ],
)
def test_arguments_that_cannot_be_are_told_before_the_photo_is_read(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        generate(pipe, **{"reference_images": "/nowhere.jpg", **options})


def rewrite(source, folder, **changes):
    folder.mkdir()
    (folder / "adapter.safetensors").write_bytes((source / "adapter.safetensors").read_bytes())
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_adapters_that_do_not_fit(tiny_folder, tiny_2b_folder, trained, tmp_path):
    with pytest.raises(ValueError, match="another base model"):
        MagicMirrorPipeline.from_pretrained(tiny_2b_folder, trained.adapter)
    with pytest.raises(FileNotFoundError, match="give adapter="):
        MagicMirrorPipeline.from_pretrained(tiny_folder)
    with pytest.raises(FileNotFoundError, match="No adapter folder at /nowhere"):
        MagicMirrorPipeline.from_pretrained(tiny_folder, "/nowhere")
    record = json.loads((trained.adapter / "config.json").read_text())
    changed = rewrite(trained.adapter, tmp_path / "wide", adapter={**record["adapter"], "hidden_dim": 24})
    with pytest.raises(ValueError, match="of another shape"):
        MagicMirrorPipeline.from_pretrained(tiny_folder, changed, detector="dlib")


@pytest.mark.parametrize(
    "target",
    ["os.system", *(f"mm_lightning.encoders.{n}" for n in ("perceiver.torch.load", "packs.os.system", "face.nothing"))],
)
def test_an_adapter_cannot_name_what_is_no_part(tiny_folder, trained, tmp_path, target):
    record = json.loads((trained.adapter / "config.json").read_text())
    front_end = {**record["front_end"], "fusion": {"_target_": target}}
    folder = rewrite(trained.adapter, tmp_path / "odd", front_end=front_end)
    with pytest.raises(ValueError, match="names"):
        MagicMirrorPipeline.from_pretrained(tiny_folder, folder, detector="dlib")
