"""The benchmark runs and compares what it says it does; no time is asserted."""

import math

import pytest
import torch

from mm_lightning import benchmark
from mm_lightning.benchmark import Sizes, count_flops, run_benchmark

SMALL = ["--dim", "64", "--layers", "2", "--frames", "1", "--height", "32", "--width", "32", "--repetitions", "1"]
ROWS = [
    "adapted block, fwd",
    "adapted block, fwd + bwd",
    "transformer + identity, fwd",
    "transformer + identity, fwd + bwd",
    "identity loss, fwd + bwd",
    "face-region loss, fwd + bwd, 4.5 MB",
    "noise per sample on the CPU, 4.5 MB",
]


@pytest.fixture(autouse=True)
def _briefly(monkeypatch):
    monkeypatch.setattr(benchmark, "MIN_SECONDS", 0.0)


def run_main(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    benchmark.main()


def test_the_table_has_its_rows(monkeypatch, capsys):
    run_main(monkeypatch, *SMALL)
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 120
    for name in (*ROWS, "D 64, 2 layers, 1x32x32"):
        assert name in printed


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_flops_are_those_of_the_layers(gradient_checkpointing):
    """Half precision goes another way: a frozen base in it, adapters in fp32, autocast."""
    sizes = Sizes(dim=64, num_layers=2, num_frames=5, height=32, width=32)
    rows = run_benchmark(sizes, dtype=torch.bfloat16, gradient_checkpointing=gradient_checkpointing, repetitions=2)
    assert [row.comparison.what for row in rows] == ROWS
    assert all(row.ratio > 0 and math.isfinite(row.ratio) and len(row.ratios) == 2 for row in rows)
    d, num_tokens, num_face, e_t = 64, 226 + 2 * 2 * 2, 32, 64 // 6
    stock = 24 * num_tokens * d**2 + 4 * num_tokens**2 * d + 2 * 2 * e_t * 6 * d
    full = num_tokens + num_face
    adapted = 24 * full * d**2 + 4 * full**2 * d + 4 * full * num_face * d + 2 * 2 * e_t * 6 * d
    adapted += 2 * e_t * 6 * d + 2 * ((e_t + e_t + d) * e_t + e_t * 12 * d) + 4 * num_face * d**2
    assert (rows[0].baseline_flops, rows[0].measured_flops) == (stock, adapted)
    # back: once more the products of the activations, and no weight gradient of what is frozen
    assert rows[1].baseline_flops == 2 * stock + 6 * num_tokens**2 * d
    recomputed = rows[2].measured_flops * gradient_checkpointing
    assert rows[3].measured_flops - recomputed > 2 * rows[2].measured_flops
    assert rows[3].measured_flops - recomputed < 3 * rows[2].measured_flops


def test_products_and_attention_are_counted_alike_on_the_cpu():
    query, key = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 7, 16)
    attended = count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(query, key, key))
    assert attended == count_flops(lambda: (query @ key.mT).softmax(-1) @ key) == 2 * 2 * 2 * 5 * 7 * 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dim", "100"], "--dim 100 is no multiple of 64"),
        (["--layers", "1"], "at least 2"),
        (["--frames", "4"], "--frames 4 is not 4k+1"),
        (["--width", "40"], "--width 40 is no multiple of 16"),
        (["--batch-size", "0"], "--batch-size 0 is not positive"),
        (["--repetitions", "0"], "--repetitions 0 is not positive"),
    ],
)
def test_wrong_sizes_are_named(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *arguments)
    assert message in capsys.readouterr().err
