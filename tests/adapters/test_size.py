"""The presets of conf/model/ on CogVideoX-5B, on the meta device, against arithmetic from the layers' widths."""

import pytest
import torch

from mm_lightning.adapters import size
from mm_lightning.adapters.size import COGVIDEOX_5B, build_networks, measure_size, read_configs, read_preset
from tests.adapters.test_transformer import CAN_NAMES, FACE_NAMES

D, E_T, D_TXT, D_ID, D_VIT = 3072, 512, 4096, 2048, 1024
LAYERS = range(0, 42, 2)
# What conf/model/ must say: c1, hidden widths of phi_cond and phi_face, rank of K and V, width and depth of tau_face.
WIDTHS = {
    "paper": {"c1": 3072, "cond": 512, "face": 512, "rank": None, "tau_face": 3072},
    "base": {"c1": 512, "cond": 512, "face": None, "rank": None, "tau_face": 1024},
    "light": {"c1": 256, "cond": 128, "face": 128, "rank": 256, "tau_face": 768},
}
PIPELINE = {"transformer": 5_570_283_072, "text_encoder": 4_762_310_656, "vae": 215_583_907}


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + bias * outputs


def norm(dim: int) -> int:
    return 2 * dim


def resampler(dim: int, depth: int = 4) -> int:
    attention = 2 * norm(dim) + 4 * linear(dim, dim, bias=False)  # q, kv (twice as wide), out; heads fill the width
    feed_forward = norm(dim) + 2 * linear(dim, 4 * dim, bias=False)
    return linear(D_VIT, dim) + depth * (attention + feed_forward) + linear(dim, dim) + norm(dim)


def tau_face(dim: int) -> int:
    return 32 * dim + resampler(dim) + (linear(dim, D) if dim != D else 0)


def fusion(preset: str) -> int:
    if preset == "paper":
        first = norm(2 * D_TXT) + linear(2 * D_TXT, 4096) + linear(4096, D_TXT)
        second = norm(D_TXT) + linear(D_TXT, 4096) + linear(4096, D_TXT)
        return linear(D_ID, D_TXT) + norm(D_TXT) + first + second
    hidden = {"base": 2048, "light": 1024}[preset]
    return norm(D_TXT + D_ID) + linear(D_TXT + D_ID, hidden) + linear(hidden, D_TXT)


def phi_face(hidden: int | None) -> int:
    return linear(E_T, 6 * D) if hidden is None else linear(E_T, hidden) + linear(hidden, 6 * D)


def key_value(rank: int | None) -> int:
    matrix = linear(D, D) if rank is None else linear(D, rank, bias=False) + linear(rank, D)
    return 2 * matrix + norm(64)


def expected_rows(preset: str) -> dict[str, int]:
    w, num_layers = WIDTHS[preset], len(LAYERS)
    return {
        "CLIP ViT-L/14 (F_feat)": 303_179_776,  # PhotoMaker-V2's vision_model.*
        "identity perceiver (tau_id)": linear(512, 2048)
        + linear(2048, 2 * D_ID)
        + norm(D_ID)
        + resampler(D_ID),  # 217,122,816 in PhotoMaker-V2's file
        "face perceiver (tau_face)": tau_face(w["tau_face"]),
        "null face tokens": 32 * D,
        "fusion (MLP_fuse)": fusion(preset),
        "projection of x_id": linear(2 * D_ID, w["c1"]),
        "face modulation (phi_face)": num_layers * phi_face(w["face"]),
        "CAN (phi_cond)": num_layers * (linear(w["c1"] + E_T + D, w["cond"]) + linear(w["cond"], 12 * D)),
        "cross-attention K, V": num_layers * key_value(w["rank"]),
        "face norms": num_layers * 2 * norm(D),
    }


@pytest.fixture(scope="module")
def networks() -> dict[str, size.Networks]:
    with torch.device("meta"):
        return {preset: build_networks(read_preset(preset), COGVIDEOX_5B) for preset in size.PRESETS}


@pytest.fixture(scope="module")
def paper() -> size.Size:
    return measure_size("paper")


def count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def rows_of(networks: size.Networks) -> dict[str, size.Part]:
    """The rows that depend on the preset, without counting a FLOP."""
    step = size.StepFlops(1, 1)
    with torch.device("meta"):
        parts = [*size.front_end_parts(networks), *size.adapter_parts(networks.transformer, {}, step)]
    return {part.name: part for part in parts}


@pytest.mark.parametrize("preset", WIDTHS)
def test_every_row_equals_the_arithmetic(networks, preset):
    rows = rows_of(networks[preset])
    expected = expected_rows(preset)
    assert {name: rows[name].num_parameters for name in expected} == expected
    assert rows.keys() - expected.keys() == {"IResNet-50 (F_id)", "face tokens: attention, FFN"}
    assert read_preset(preset).recognizer == "buffalo_l"  # whose network an IResNet-50 is


def test_rows_hold_every_parameter_once(networks, paper):
    everything = sum(count(network.parameters()) for network in networks["paper"])
    trained = sum(count(p for p in network.parameters() if p.requires_grad) for network in networks["paper"])
    assert sum(part.num_parameters for part in (*paper.pipeline, *paper.added)) == everything
    assert paper.num_trained == trained


def test_the_pipeline_is_the_paper_s(networks, paper):
    """10.5B in the paper's table is the whole pipeline; the recogniser is its 43.6M but for the folded batch norms."""
    transformer, text_encoder, vae = (networks["paper"][i] for i in range(3))
    bare = count(transformer.parameters()) - count(p for n, p in transformer.named_parameters() if ".adapter." in n)
    counted = {"transformer": bare, "text_encoder": count(text_encoder.parameters()), "vae": count(vae.parameters())}
    assert counted == PIPELINE
    assert sum(part.num_parameters for part in paper.pipeline) == 10_548_177_635
    assert count(networks["paper"].recognizer.parameters()) == pytest.approx(43.59e6, rel=1e-3)


@pytest.mark.parametrize(
    ("preset", "added", "trained"),
    [
        ("paper", (2.20e9, 2.30e9), (1.55e9, 1.65e9)),
        ("base", (1.6e9, 1.8e9), (1.0e9, 1.2e9)),
        ("light", (0.8e9, 0.9e9), (0.2e9, 0.30e9)),
    ],
)
def test_presets_have_their_size(networks, preset, added, trained):
    rows = rows_of(networks[preset]).values()
    assert added[0] <= sum(part.num_parameters for part in rows) <= added[1]
    assert trained[0] <= sum(part.num_trained for part in rows) <= trained[1]


def test_exactly_these_names_train_in_the_base_preset(networks):
    trained = {
        f"{part}.{name}"
        for part, network in networks["base"]._asdict().items()
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }
    perceiver = "front_end.face_perceiver"
    attention = [f"0.{name}.weight" for name in ("norm1", "norm2", "to_q", "to_kv", "to_out")] + ["0.norm1.bias"]
    layer = [*attention, "0.norm2.bias", "1.0.weight", "1.0.bias", "1.1.weight", "1.3.weight"]
    expected = {f"transformer.transformer_blocks.{i}.adapter.{name}" for i in LAYERS for name in FACE_NAMES + CAN_NAMES}
    expected -= {f"transformer.transformer_blocks.40.adapter.face.norm2.{kind}" for kind in ("weight", "bias")}
    expected |= {f"{perceiver}.perceiver_resampler.layers.{i}.{name}" for i in range(4) for name in layer}
    both = [f"{perceiver}.perceiver_resampler.{name}" for name in ("proj_in", "proj_out", "norm_out")]
    both += [f"{perceiver}.projection", "front_end.id_projection.proj"]
    both += [f"front_end.fusion.mlp.{i}" for i in (0, 1, 3)]
    expected |= {f"{name}.{kind}" for name in both for kind in ("weight", "bias")}
    assert trained == expected | {"front_end.null_face_tokens", f"{perceiver}.queries"}


def step_flops(num_latent_frames: int) -> int:
    num_tokens = 226 + num_latent_frames * 30 * 45
    num_video_tokens = num_tokens - 226
    block = 2 * num_tokens * 12 * D**2 + 4 * num_tokens**2 * D + 2 * 2 * E_T * 6 * D  # 4 D^2 attention, 8 D^2 FFN
    patches = 2 * 226 * D_TXT * D + 2 * num_video_tokens * 16 * 2 * 2 * D + 2 * num_video_tokens * D * 16 * 2 * 2
    return 42 * block + patches + 2 * (D * E_T + E_T * E_T) + 2 * E_T * 2 * D


def test_flops_of_a_step_equal_the_arithmetic(paper):
    assert paper.video.base == step_flops(13)
    assert paper.image.base == step_flops(1)
    assert paper.video.base == pytest.approx(332.2e12, rel=1e-3)
    flops = {part.name: part.flops for part in paper.added}
    num_tokens, num_face = 17776, 32
    longer = 2 * num_face * 12 * D**2 + 4 * D * ((num_tokens + num_face) ** 2 - num_tokens**2)
    crossed = 4 * D * num_face * (num_tokens + num_face)
    assert flops["face tokens: attention, FFN"] == len(LAYERS) * (longer + crossed)
    assert flops["cross-attention K, V"] == len(LAYERS) * 2 * 2 * num_face * D * D
    assert flops["CAN (phi_cond)"] == len(LAYERS) * 2 * ((3072 + E_T + D) * 512 + 512 * 12 * D)
    assert flops["face modulation (phi_face)"] == len(LAYERS) * 2 * (E_T * 512 + 512 * 6 * D)
    every_step = sum(part.flops for part in paper.added if part.runs == "every step")
    assert every_step == paper.video.adapted - paper.video.base


@pytest.mark.parametrize("folder", ["tiny_folder", "tiny_2b_folder", "tiny_1_5_folder"])
def test_another_base_is_measured_from_its_configs_alone(folder, request):
    measured = measure_size("light", read_configs(request.getfixturevalue(folder)))
    assert measured.pipeline[0].num_parameters < 1e6
    assert measured.video.adapted > measured.video.base > 5 * measured.image.base


def test_the_command_prints_the_table(monkeypatch, capsys, tiny_folder):
    monkeypatch.setattr("sys.argv", ["size", "--preset", "light", "--base", str(tiny_folder)])
    size.main()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    assert "…" not in printed
    for name in ("model=light", "transformer", "added by MagicMirror", "303,179,776", "Image stage"):
        assert name in printed


def test_what_is_missing_is_named(monkeypatch, capsys, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no preset .*model/paper\.yaml.*checkout"):
        read_preset("paper", tmp_path / "conf")
    monkeypatch.setattr("sys.argv", ["size", "--base", str(tmp_path)])
    with pytest.raises(SystemExit):
        size.main()
    assert "model_index.json" in capsys.readouterr().err
