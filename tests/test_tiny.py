"""The tiny model is whole, the same every time, and never costs anybody a file."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline
from transformers import CLIPVisionModel

from mm_lightning.tiny import make_tiny


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def generate(folder: Path, num_frames: int, max_sequence_length: int) -> torch.Tensor:
    pipeline = CogVideoXPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(
        "a man is speaking to the camera",
        height=32,
        width=32,
        num_frames=num_frames,
        num_inference_steps=2,
        max_sequence_length=max_sequence_length,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    return output.frames


@pytest.mark.parametrize("fixture", ["tiny_folder", "tiny_2b_folder", "tiny_1_5_folder"])
def test_stock_pipeline_loads_and_generates(fixture, small_settings, request):
    frames = generate(request.getfixturevalue(fixture), 9, small_settings["max_text_seq_length"])
    assert frames.shape == (1, 9, 3, 32, 32)
    assert frames.isfinite().all()
    assert frames.std() > 0.05  # pictures are in [0, 1]; a flat one would hide every mistake downstream


def test_same_seed_same_bytes_whatever_was_drawn_before(tiny_folder, tmp_path, small_settings):
    torch.manual_seed(7)
    expected_next = torch.rand(3)
    torch.manual_seed(7)
    again = make_tiny(tmp_path / "elsewhere", **small_settings)
    assert torch.equal(torch.rand(3), expected_next)
    assert digests(again) == digests(tiny_folder)


def test_other_seed_other_weights_in_every_part(tiny_folder, tmp_path, small_settings):
    other = digests(make_tiny(tmp_path / "other", seed=1, **small_settings))
    changed = {name for name, digest in digests(tiny_folder).items() if other[name] != digest}
    weights = {name for name in other if name.endswith(".safetensors")}
    assert len(weights) == 4
    assert changed == weights | {"tiny.json"}


def test_complete_folder_is_kept_and_damaged_one_is_mended(tmp_path, small_settings):
    folder = make_tiny(tmp_path / "base", **small_settings)
    before, inode = digests(folder), folder.stat().st_ino
    assert make_tiny(folder, **small_settings).stat().st_ino == inode
    (folder / "vae" / "config.json").unlink()
    make_tiny(folder, **small_settings)
    assert digests(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_other_settings_replace_the_folder(tmp_path, small_settings):
    folder = make_tiny(tmp_path / "base", **small_settings)
    before = digests(folder)
    make_tiny(folder, seed=3, **small_settings)
    assert digests(folder) != before
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_folder_of_somebody_else_is_left_alone(tmp_path, small_settings):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds something else.*Name another folder"):
        make_tiny(tmp_path, **small_settings)
    with pytest.raises(FileExistsError, match=r"thesis\.txt exists"):
        make_tiny(tmp_path / "thesis.txt", **small_settings)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_empty_folder_is_filled(tmp_path, small_settings):
    assert (make_tiny(tmp_path, **small_settings) / "model_index.json").is_file()


def test_tokenizer_reports_where_each_piece_stands(tiny_folder):
    tokenizer = CogVideoXPipeline.from_pretrained(tiny_folder, transformer=None, vae=None, text_encoder=None).tokenizer
    text = "The firefighter, a man of 42 from Zürich."
    encoding = tokenizer(text, return_offsets_mapping=True)
    pieces = tokenizer.convert_ids_to_tokens(encoding.input_ids)
    spans = [text[start:end] for start, end in encoding.offset_mapping]
    assert pieces[-1] == "</s>"
    assert spans[pieces.index("▁man")] == "man"
    assert "".join(span for piece, span in zip(pieces, spans, strict=True) if piece != "▁") == text.replace(" ", "")
    assert [span for piece, span in zip(pieces, spans, strict=True) if piece == "<unk>"] == ["ü"]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)


def test_scheduler_carries_the_5b_settings(tiny_folder):
    scheduler = CogVideoXPipeline.from_pretrained(tiny_folder, transformer=None, vae=None, text_encoder=None).scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.alphas_cumprod[500] == pytest.approx(0.241, abs=1e-3)  # 0.095 with the snr shift of 2B


def test_image_encoder_gives_every_layer(tiny_folder, small_settings):
    encoder = CLIPVisionModel.from_pretrained(tiny_folder / "image_encoder")
    output = encoder(torch.zeros(2, 3, 32, 32), output_hidden_states=True)
    assert output.last_hidden_state.shape == (2, 1 + 16, small_settings["image_encoder_dim"])
    assert len(output.hidden_states) == 1 + 3


def test_latents_have_about_unit_scale_and_depend_on_the_picture(tiny_folder):
    vae = CogVideoXPipeline.from_pretrained(tiny_folder, transformer=None, text_encoder=None, tokenizer=None).vae
    pixels = torch.rand(2, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    latents = posterior.mean * vae.config.scaling_factor
    assert 0.3 < latents.std() < 3
    assert posterior.std.mean() < 0.2
    assert torch.corrcoef(latents.flatten(1))[0, 1] < 0.8


def test_command_prints_what_it_made(tmp_path):
    command = [sys.executable, "-m", "mm_lightning.tiny", str(tmp_path / "base"), "--seed", "5"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    num_parameters = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in output.splitlines()[1:]}
    assert set(num_parameters) == {"image_encoder", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"}
    pipeline = CogVideoXPipeline.from_pretrained(tmp_path / "base")
    for part in ("transformer", "vae", "text_encoder"):
        assert num_parameters[part] == getattr(pipeline, part).num_parameters()
    assert sum(num_parameters.values()) < 5e6
