"""The table's command on real faces and the tiny model: real clips are recognised, noise is not, mistakes are told."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline
from hydra.utils import instantiate
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mm_lightning.encoders.recognizer import load_recognizer
from mm_lightning.media import SheetRow, contact_sheet, encode_gif, to_uint8
from mm_lightning.miniature import table as command
from mm_lightning.miniature.measure import ClipFaces, ClipFigures, Gallery, clip_figures, measure_clips
from mm_lightning.miniature.sampling import (
    Sampling,
    compose_miniature,
    fingerprint,
    generate_clips,
    join_batches,
    load_miniature,
    read_subjects,
    split_references,
)
from mm_lightning.miniature.table import Cache, format_table, summarize
from mm_lightning.module import sample_generators
from tests.miniature.real_people import NUM_FRAMES, PAN, SIZE, STILLS, write_people

NUM_PEOPLE = 5


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("people")
    write_people(folder / "test")
    return folder


@pytest.fixture(scope="module")
def subjects(people):
    return read_subjects(people / "test/videos", NUM_PEOPLE)


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory) -> Path:
    """The miniature's adapter on the smallest base, off its zero initialisation."""
    module = load_miniature(tiny_folder, None)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    module.save_adapter(tmp_path_factory.mktemp("adapters") / "adapter")
    return next((tmp_path_factory.getbasetemp()).glob("adapters*/adapter"))


def arguments(people: Path, tiny_folder: Path, adapter: Path | str, out: Path, *more: str) -> list[str]:
    options = {"people": people, "model": tiny_folder, "adapter": adapter, "num-people": NUM_PEOPLE, "steps": 2}
    options |= {"out": out, "work": out / "work", "batch-size": 3, "device": "cpu", "workers": 1}
    return [f"--{name}={value}" for name, value in options.items()] + list(more)


@pytest.fixture(scope="module")
def finished(people, tiny_folder, adapter, tmp_path_factory) -> Path:
    """What the command leaves."""
    out = tmp_path_factory.mktemp("table")
    with redirect_stdout(io.StringIO()) as printed:
        command.main(arguments(people, tiny_folder, adapter, out, f"--log-dir={out / 'board'}"))
    (out / "stdout").write_text(printed.getvalue())
    return out


# What the command gives


def test_real_clips_are_recognised_and_noise_is_not(finished):
    rows = json.loads((finished / "results.json").read_text())["rows"]
    assert set(rows) == {"real clips", "through the VAE", "full model", "backbone alone"}
    real, noise = rows["real clips"], rows["backbone alone"]
    assert real["top1"] == real["top5"] == 1.0
    assert real["num_faceless"] == 0
    assert real["face_found"] > 0.9
    assert real["margin"] > 0.05
    # The crop travels by a quarter of a face box, which is 1 / 1.7 of the frame, in all five points.
    assert real["fm_inter"] == pytest.approx(5 * PAN / 1.7, rel=0.3)
    assert noise["top1"] == noise["top5"] == 0
    assert noise["num_faceless"] == NUM_PEOPLE
    assert noise["own"] is None


def test_through_the_vae_is_what_diffusers_makes_of_a_real_clip(finished, people, tiny_folder):
    stored = [np.load(file)["frames"] for file in sorted((finished / "work").glob("through-the-VAE-*/clips-*.npz"))]
    subject = read_subjects(people / "test" / "videos", NUM_PEOPLE)[3]
    vae = AutoencoderKLCogVideoX.from_pretrained(tiny_folder / "vae", torch_dtype=torch.float32)
    with torch.no_grad():
        latents = vae.encode(subject.batch.pixels.transpose(1, 2)).latent_dist.mode()
        expected = vae.decode(latents).sample.transpose(1, 2).clamp(-1, 1)
    found = torch.from_numpy(stored[1][:1]).movedim(-1, 2).float() / 127.5 - 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1.01 / 127.5)


def test_a_line_for_every_clip_and_the_settings_stand_beside_them(finished, tiny_folder):
    results = json.loads((finished / "results.json").read_text())
    people = [f"p{index:05d}" for index in range(NUM_PEOPLE)]
    assert [clip["person"] for clip in results["clips"]["full model"]] == people
    assert {clip["rank"] for clip in results["clips"]["real clips"]} == {1}
    settings = results["settings"]
    assert (settings["steps"], settings["references"], settings["num_people"]) == (2, 2, NUM_PEOPLE)
    assert settings["model_id"] == fingerprint(tiny_folder)


def test_the_printed_table_is_the_stored_one(finished):
    text = (finished / "results.md").read_text()
    assert text in (finished / "stdout").read_text()
    header, _, *lines = text.split("\n\n")[0].splitlines()
    assert header.split(" | ")[1:3] == ["top-1", "top-5"]
    assert lines[0].startswith("| real clips | 100.0% | 100.0% |")
    assert f"{NUM_PEOPLE} people" in text
    assert "by chance 20.0%" in text


def test_sheet_and_animation_show_all_people(finished):
    sheet = Image.open(finished / "sheet.jpg")
    assert sheet.size[0] >= (1 + 2 * 4) * 2 * SIZE
    assert sheet.size[1] >= NUM_PEOPLE * 2 * SIZE
    gif = Image.open(finished / "clips.gif")
    assert sum(1 for _ in ImageSequence.Iterator(gif)) == NUM_FRAMES
    assert b"AI-generated" in gif.info["comment"]


def test_tensorboard_has_sheet_clips_and_table(finished):
    events = EventAccumulator(str(finished / "board"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"miniature/sheet", "miniature/clips"}
    assert "miniature/table/text_summary" in events.Tags()["tensors"]
    picture = Image.open(io.BytesIO(events.Images("miniature/clips")[0].encoded_image_string))
    assert picture.n_frames == NUM_FRAMES


def test_a_second_run_makes_nothing_again(finished, people, tiny_folder, adapter, monkeypatch, capsys):
    monkeypatch.setattr(command, "generate_clips", pytest.fail)
    monkeypatch.setattr(command, "measure_clips", pytest.fail)
    before = (finished / "results.json").read_bytes()
    command.main(arguments(people, tiny_folder, adapter, finished))
    assert (finished / "results.json").read_bytes() == before
    assert (finished / "results.md").read_text() in capsys.readouterr().out


def test_an_interrupted_run_goes_on_with_the_batch_that_is_missing(
    finished, people, tiny_folder, adapter, monkeypatch, capsys
):
    (row,) = (finished / "work").glob("full-model-*")
    clips = sorted(row.glob("clips-*.npz"))
    assert len(clips) == 2  # batches of three and two
    wanted = np.load(clips[1])["frames"]
    clips[1].unlink()
    made = []
    monkeypatch.setattr(command, "generate_clips", lambda *a, **k: made.append(a[2]) or generate_clips(*a, **k))
    command.main(arguments(people, tiny_folder, adapter, finished))
    assert made == [["p00003-c0/0", "p00004-c0/0"]]
    assert np.array_equal(np.load(clips[1])["frames"], wanted)


def test_another_setting_is_made_anew(people, tiny_folder, adapter, finished, monkeypatch):
    """What is kept under --work follows from model, adapter and sampling; real clips from the people alone,
    and those through the VAE from people and model."""
    _, args = command.parse(arguments(people, tiny_folder, adapter, finished, "--guidance=3"))
    table = command.build_table(args)
    assert not table.cache("full model").folder.exists()
    assert not table.cache("backbone alone").folder.exists()
    assert table.cache("real clips").folder.exists()
    assert table.cache("through the VAE").folder.exists()


def test_clips_alone_need_no_face_network(people, tiny_folder, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "measure_clips", pytest.fail)
    monkeypatch.setattr(command, "build_gallery", pytest.fail)
    command.main(arguments(people, tiny_folder, adapter, tmp_path, "--generate-only"))
    assert len(list((tmp_path / "work").glob("*/clips-*.npz"))) == 8
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--people=nowhere", ["nowhere/test/videos holds no finished shards", "miniature.world unpack"]),
        ("--split=nowhere", ["nowhere/videos holds no finished shards"]),
        ("--num-people=99", ["holds 7 people, --num-people asks for 99"]),
        ("--num-people=0", ["--num-people=0: give a number from 1"]),
        ("--references=4", ["has 4 reference stills", "at least one other"]),
        ("--references=0", ["--references=0 are shown"]),
        ("--adapter=nowhere", ["nowhere is not an adapter folder"]),
        ("--device=cudo", ["device=cudo: torch has none here"]),
        ("--model=nowhere", ["base model folder nowhere does not exist"]),
    ],
)
def test_mistakes_are_told(people, tiny_folder, tmp_path, capsys, change, words):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments(people, tiny_folder, "none", tmp_path, change))
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert [word for word in words if word not in message] == []


# Its parts


def test_subjects_have_their_person_prompt_and_stills(subjects):
    assert [subject.person for subject in subjects] == [f"p{index:05d}" for index in range(NUM_PEOPLE)]
    batch = subjects[0].batch
    assert batch.pixels.shape == (1, NUM_FRAMES, 3, SIZE, SIZE)
    assert batch.references.shape == (1, len(STILLS), 3, SIZE, SIZE)
    assert batch.captions == ["A man img smiles, in front of a green wall"]
    shown, compared = split_references(batch, 3)
    assert (shown.tolist(), compared.tolist()) == ([True] * 3 + [False], [False] * 3 + [True])


def test_several_clips_of_a_person_have_noise_of_their_own(people, tiny_folder, adapter, tmp_path):
    given = arguments(people, tiny_folder, adapter, tmp_path, "--clips-per-person=2", "--num-people=1")
    table = command.build_table(command.parse(given)[1])
    assert table.names == ["p00000-c0/0", "p00000-c0/1"]
    one, two = table.clips("full model")
    assert not np.array_equal(one, two)


def test_clips_depend_on_the_adapter_the_stills_that_are_shown_and_the_noise(subjects, tiny_folder, adapter):
    module = load_miniature(tiny_folder, adapter)
    batch = join_batches([subject.batch for subject in subjects[:2]])
    sampling = Sampling(steps=2, num_references=1)

    def generate(batch=batch, names=("a", "b"), with_identity=True):
        return generate_clips(module, batch, names, sampling, with_identity)

    clips = generate()
    assert clips.shape == (2, NUM_FRAMES, SIZE, SIZE, 3)
    assert np.array_equal(generate(), clips)
    assert not np.array_equal(generate(names=("c", "b"))[0], clips[0])
    hidden, shown = batch.references.clone(), batch.references.clone()
    hidden[:, 1:], shown[:, :1] = 0, shown[:, 1:2]
    assert np.array_equal(generate(batch._replace(references=hidden)), clips)
    assert not np.array_equal(generate(batch._replace(references=shown)), clips)
    alone = generate(with_identity=False)
    assert not np.array_equal(alone, clips)
    assert np.array_equal(generate(batch._replace(references=shown), with_identity=False), alone)


@pytest.mark.parametrize("identity_guidance", [1.0, 3.0])
def test_clips_are_those_of_the_pipeline_that_people_use(subjects, tiny_folder, adapter, identity_guidance):
    module, batch = load_miniature(tiny_folder, adapter), subjects[0].batch
    sampling = Sampling(steps=2, num_references=2, identity_guidance=identity_guidance)
    clip = generate_clips(module, batch, ["a"], sampling, with_identity=True)[0]
    shown, _ = split_references(batch, 2)
    features = module.features(batch.references, batch.reference_landmarks, shown[None])
    options = {"num_frames": NUM_FRAMES, "height": SIZE, "width": SIZE, "num_inference_steps": 2, "output_type": "np"}
    options |= {"guidance_scale": sampling.guidance, "identity_guidance_scale": identity_guidance}
    generator = sample_generators(0, -1, ["a"])
    [frames] = module.build_pipeline()(batch.captions, identity=features, generator=generator, **options).frames
    assert np.abs(clip.astype(int) - np.round(255 * frames)).max() <= 1


def test_alone_is_the_stock_pipeline_bit_for_bit(subjects, tiny_folder, adapter):
    """The backbone without any adapter, by diffusers' own pipeline and its own reading of the prompt."""
    module = load_miniature(tiny_folder, adapter)
    batch = subjects[0].batch
    clip = generate_clips(module, batch, ["a"], Sampling(steps=2), with_identity=False)[0]
    pipeline = CogVideoXPipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline(
        prompt_embeds=module.text(batch.captions).prompt_embeds,
        negative_prompt_embeds=module.text.encode_plain([""]),
        num_frames=NUM_FRAMES,
        height=SIZE,
        width=SIZE,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=sample_generators(0, -1, ["a"]),
        output_type="pt",
    ).frames[0]
    assert np.abs(clip.astype(int) - to_uint8(frames * 2 - 1).astype(int)).max() <= 1


def test_an_adapter_of_an_ablation_is_rebuilt_from_its_record(tiny_folder, tmp_path, subjects):
    cfg = compose_miniature(f"model.base={tiny_folder}", "model.init_adapter=null", "ablation=[id_branch_only]")
    ablated = instantiate(cfg.model)
    ablated.configure_model()
    ablated.save_adapter(tmp_path / "adapter")
    module = load_miniature(tiny_folder, tmp_path / "adapter")
    assert module.adapter_config.face_attention == "none"
    assert {name: p.shape for name, p in module.named_parameters() if p.requires_grad} == {
        name: p.shape for name, p in ablated.named_parameters() if p.requires_grad
    }
    batch = subjects[0].batch
    assert generate_clips(module, batch, ["a"], Sampling(steps=1), True).shape[1] == NUM_FRAMES


def test_an_adapter_of_another_base_is_refused(tiny_2b_folder, adapter):
    with pytest.raises(Exception, match="another base model"):
        load_miniature(tiny_2b_folder, adapter)


# Figures of clips


@pytest.fixture(scope="module")
def recognizer():
    return load_recognizer("dlib")


def test_faces_lie_where_the_crop_has_moved_them(subjects, recognizer):
    subject = subjects[0]
    (faces,) = measure_clips([to_uint8(subject.batch.pixels)[0]], recognizer, num_embedded=4)
    assert faces.landmarks.shape == (16, 5, 2)
    assert faces.embedded.sum() == 4
    assert (~np.isnan(faces.embeddings[:, 0])).tolist() == (faces.embedded & faces.found).tolist()
    known = subject.batch.face_landmarks[0].numpy()[[*range(8), *range(9, 17)]][faces.found]
    assert np.abs(faces.landmarks[faces.found] - known).mean() < 2.0


def test_noise_shows_no_face(recognizer):
    clip = np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, SIZE, SIZE, 3), np.uint8)
    (faces,) = measure_clips([clip], recognizer, num_embedded=4)
    assert not faces.found.any()
    gallery = Gallery(["a", "b"], np.eye(2, 128), np.zeros((2, 5, 2)), np.tile([0, 0, 4, 4], (2, 1)), 0)
    found = clip_figures(clip, faces, gallery, "b")
    assert (found.rank, found.face_found) == (None, 0)
    assert np.isnan([found.own, found.margin, found.fm_ref, found.fm_inter]).all()


def figures_of(rank: int | None, found: float, own: float) -> ClipFigures:
    return ClipFigures(rank, own, own, own, own, own, found, 1.0)


def test_a_clip_without_a_face_is_a_miss_in_the_shares_and_left_out_of_the_means():
    nan = float("nan")
    summary = summarize([figures_of(1, 1.0, 0.8), figures_of(3, 0.5, 0.6), figures_of(None, 0.0, nan)])
    assert summary["top1"] == pytest.approx(1 / 3)
    assert summary["top5"] == pytest.approx(2 / 3)
    assert summary["own"] == pytest.approx(0.7)
    assert summary["face_found"] == pytest.approx(0.5)
    assert (summary["num_clips"], summary["num_faceless"]) == (3, 1)
    assert "| - |" in format_table({"row": summarize([figures_of(None, 0.0, nan)])}, "note")


def test_faces_that_were_not_embedded_do_not_count_as_lost(recognizer):
    clip = np.zeros((2, 8, 8, 3), np.uint8)
    embeddings = np.full((2, 128), np.nan)
    embeddings[0] = 1.0
    faces = ClipFaces(np.zeros((2, 5, 2)), np.tile([0.0, 0.0, 4.0, 4.0], (2, 1)), embeddings, np.array([True, False]))
    gallery = Gallery(
        ["a", "b"], np.stack([np.ones(128), np.zeros(128) + 9]), np.zeros((2, 5, 2)), np.tile([0, 0, 4, 4], (2, 1)), 0
    )
    found = clip_figures(clip, faces, gallery, "a")
    assert (found.rank, found.face_found) == (1, 1.0)
    assert found.own == pytest.approx(1.0)


# Files and pictures


def test_what_is_kept_is_made_once_and_whole(tmp_path):
    cache, calls = Cache(tmp_path / "cache"), []

    def make():
        calls.append(1)
        return {"a": np.arange(3)}

    assert [cache.get("x", make)["a"].tolist() for _ in range(2)] == [[0, 1, 2]] * 2
    assert len(calls) == 1

    def fail():
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        cache.get("y", fail)
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["x.npz"]


def test_the_sheet_places_reference_and_frames():
    red, green = (np.zeros((4, 8, 8, 3), np.uint8) for _ in range(2))
    red[..., 0], green[..., 1] = 255, 255
    row = SheetRow("A man", np.full((8, 8, 3), 90, np.uint8), (red, green))
    sheet = np.asarray(contact_sheet([row, row], ["full", "alone"], [0, 3], height=32))
    side = 32
    for colour, count in (((90, 90, 90), 1), ((255, 0, 0), 2), ((0, 255, 0), 2)):
        assert (sheet == colour).all(-1).sum() == 2 * count * side * side


def test_the_animation_moves_and_says_what_it_is():
    pictures = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 120, 240)]
    gif = Image.open(io.BytesIO(encode_gif(pictures, fps=8)))
    assert (gif.n_frames, gif.info["loop"], gif.info["duration"]) == (3, 0, 120)  # in hundredths, of 125


def test_fingerprint_follows_contents_not_places(tmp_path):
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    a, b, c = (fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
    assert fingerprint(1, "x") != fingerprint(1, "y")
