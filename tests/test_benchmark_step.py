"""The step that is measured is a training step at the size that it says; no time is asserted."""

import math

import pytest
import torch

from mm_lightning import benchmark, benchmark_step
from mm_lightning.adapters.size import COGVIDEOX_5B, build_networks, read_preset
from mm_lightning.benchmark import Sizes, count_flops
from mm_lightning.benchmark_step import (
    STAGES,
    Case,
    build_module,
    check_memory,
    count_bytes,
    run_cases,
    trained_parameters,
)
from mm_lightning.checkpoint import trainable_state_dict

SMALL = Sizes(num_frames=5, height=32, width=32, batch_size=2)
OPTIONS = ["--device", "cpu", "--preset", "tiny", "--frames", "5", "--height", "32", "--width", "32", "--steps", "1"]


def run_main(*arguments: str) -> None:
    benchmark.main(["step", *OPTIONS, *arguments])


@pytest.fixture
def module(tiny_folder):
    torch.manual_seed(0)
    return build_module("tiny", str(tiny_folder))


def test_the_table_has_its_rows(tiny_folder, capsys):
    run_main("--base", str(tiny_folder), "--batch-size", "1")
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 120
    rows = [line.split() for line in printed.splitlines() if line.startswith((" image ", " video "))]
    assert [row[:5] for row in rows] == [
        ["image", "1", "1x32x32", "4+32+8", "off"],
        ["image", "1", "1x32x32", "4+32+8", "on"],
        ["video", "1", "5x32x32", "8+32+8", "off"],
        ["video", "1", "5x32x32", "8+32+8", "on"],
    ]
    assert [len(row) for row in rows] == [11, 12, 11, 12]
    assert all(float(value) > 0 for row in rows for value in (row[5], *row[7:11]))


def test_what_trains_moves_and_nothing_else_does(module):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    rows = list(run_cases(module, [Case("image", SMALL._replace(num_frames=1), on) for on in (False, True)], 1))
    assert [math.isfinite(row.identity) for row in rows] == [False, True]
    assert all(row.is_finite and len(row.seconds) == 1 for row in rows)
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    # no sample lost its identity, so the tokens that would stand for it may stay
    assert moved | {"front_end.null_face_tokens"} == set(trainable_state_dict(module))
    assert {p.dtype for p in trained_parameters(module)} == {torch.float32}


def test_every_face_is_decoded_and_embedded_once(module):
    """At all timesteps: the recogniser passes the face forth and back; the condition embedded the references."""
    face = torch.zeros(1, 3, 112, 112)
    recognized = count_flops(lambda: module.face_decoder.recognizer(face))
    for stage, batch_size in (("image", 2), ("video", 1)):
        sizes = SMALL._replace(num_frames=STAGES[stage].num_frames or 5, batch_size=batch_size)
        off, on = run_cases(module, [Case(stage, sizes, switch) for switch in (False, True)], 1)
        recognitions = (on.flops - off.flops) / recognized / batch_size  # the rest is the tiny VAE's
        assert 2 < recognitions < 2.5


def test_checkpointing_computes_the_blocks_anew(tiny_folder):
    case = Case("video", SMALL, identity_loss=False)
    modules = [build_module("tiny", str(tiny_folder), gradient_checkpointing=on) for on in (False, True)]
    plain, checkpointed = (next(run_cases(module, [case], 1)).flops for module in modules)
    assert plain < checkpointed < 1.5 * plain


@pytest.mark.parametrize("preset", ["base", "light"])
def test_at_5b_size_the_same_code_builds_the_5b(preset):
    module = build_module(preset, device="meta", vae_dtype=torch.bfloat16)
    base = [p for name, p in module.transformer.named_parameters() if ".adapter." not in name]
    assert sum(p.numel() for p in base) == 5_570_283_072
    assert {p.dtype for p in base} == {torch.bfloat16} == {p.dtype for p in module.backbone.vae.parameters()}
    num_trained = sum(p.numel() for p in trained_parameters(module))
    with torch.device("meta"):
        networks = build_networks(read_preset(preset), COGVIDEOX_5B)
    assert num_trained == sum(p.numel() for network in networks for p in network.parameters() if p.requires_grad)
    vae, vision, recognizer, tau_id = 215_583_907, 303_179_776, 43_590_976, 217_122_816
    weights = 2 * (5_570_283_072 + vae) + 4 * (vision + 2 * recognizer + tau_id)
    dead = sum(p.nbytes for name, p in module.transformer.named_parameters() if "40.adapter.face.norm2" in name)
    assert count_bytes(module) == pytest.approx(weights + dead + 16 * num_trained, rel=1e-3)
    assert torch.get_default_dtype() == torch.float32


def test_1_5_takes_frames_in_pairs(tiny_1_5_folder):
    module = build_module("tiny", str(tiny_1_5_folder))
    row = next(run_cases(module, [Case("image", SMALL._replace(num_frames=1), False)], 1))
    assert row.num_tokens[0] == 4
    assert row.is_finite


def test_what_was_measured_is_shown_when_memory_runs_out(tiny_folder, capsys, monkeypatch):
    measure = benchmark_step.measure

    def run_out(module, optimizer, case, num_steps):
        if case.identity_loss:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return measure(module, optimizer, case, num_steps)

    monkeypatch.setattr(benchmark_step, "measure", run_out)
    with pytest.raises(SystemExit, match=r"memory does not hold the next row: CUDA out of memory\.$"):
        run_main("--base", str(tiny_folder), "--stage", "image", "--batch-size", "1")
    assert " image      1" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_fails(tiny_folder, monkeypatch):
    measure = benchmark_step.measure
    monkeypatch.setattr(benchmark_step, "measure", lambda *args: measure(*args)._replace(loss=math.nan))
    with pytest.raises(SystemExit, match="not finite"):
        run_main("--base", str(tiny_folder), "--stage", "video", "--identity-loss", "off")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frames", "4"], "A clip of 4 frames does not fit the VAE"),
        (["--width", "40"], "width=40 is no multiple of 16"),
        (["--steps", "0"], "--steps 0 is not positive"),
        (["--batch-size", "0"], "--batch-size 0 is not positive"),
        (["--base", "nowhere"], "base model folder nowhere does not exist"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--stage", "audio"], "invalid choice: 'audio'"),
    ],
)
def test_wrong_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit):
        run_main(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        run_main("--device", "cuda")
    assert "this torch sees no GPU" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused_before_it_is_made():
    with pytest.raises(ValueError, match=r"take 931322\.6 GiB, there are .* memory in this machine\. Give a smaller"):
        check_memory(10**15, "cpu")
