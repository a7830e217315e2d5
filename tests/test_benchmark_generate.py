"""`python -m mm_lightning.benchmark generate` on the smallest CogVideoX."""

import re

import pytest
import skimage.data
from PIL import Image

from mm_lightning.benchmark import main
from mm_lightning.benchmark_generate import parameters
from mm_lightning.evaluation.cost import read_cost
from mm_lightning.evaluation.report import cost_section
from mm_lightning.pipeline import MagicMirrorPipeline
from tests.test_pipeline import trained  # noqa: F401


@pytest.fixture
def arguments(tiny_folder, trained, tmp_path):  # noqa: F811
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "her.png")
    sizes = ["--num-frames", "5", "--height", "32", "--width", "32", "--num-inference-steps", "1"]
    weights = ["--base", str(tiny_folder), "--adapter", str(trained.adapter), "--detector", "dlib"]
    return ["generate", "--photos", str(tmp_path / "her.png"), *sizes, *weights, "--repetitions", "1"]


def test_a_row_for_each_and_ratios_to_the_first(arguments, capsys):
    main(arguments)
    rows = re.findall(r"^ +(.+?) {2,}([\d.]+) +([\d.]+) +[\d.]+ +([\d,]+) +[\d.]+ GiB", capsys.readouterr().out, re.M)
    names = [row[0] for row in rows]
    assert names == ["backbone alone", "ours", "of which photos -> face", "ours, identity guidance 2"]
    seconds, ratios = ([float(row[i]) for row in rows] for i in (1, 2))
    assert ratios == pytest.approx([second / seconds[0] for second in seconds], abs=0.2)
    assert ratios[0] == 1


def test_what_is_written_is_what_was_printed_and_the_report_shows_it(arguments, tmp_path, capsys):
    file = tmp_path / "new/cost.json"
    main([*arguments, "--out", str(file)])
    printed = capsys.readouterr().out
    cost = read_cost(file)
    assert [row.name for row in cost.rows][:2] == ["backbone alone", "ours"]
    for row in cost.rows:
        memory = f"{row.peak_bytes / 2**30:.2f} GiB"
        assert re.search(rf"{row.name} +{row.seconds:.3f} .* {row.parameters:,} +{memory}", printed)
    sizes = {name: cost.settings[name] for name in ("num_frames", "height", "width", "num_inference_steps", "dtype")}
    assert list(sizes.values()) == [5, 32, 32, 1, "float32"]
    assert cost.machine.startswith("CPU")
    shown = cost_section(cost.as_dict())
    assert f"{cost.rows[1].parameters:,}" in shown
    assert f"<td>{cost.rows[1].seconds / cost.rows[0].seconds:.3f}</td>" in shown


def test_sizes_that_are_not_given_are_the_bases_own(arguments, tmp_path):
    names = ("--num-frames", "--height", "--width")
    given = [a for i, a in enumerate(arguments) if a not in names and arguments[i - 1] not in names]
    main([*given, "--out", str(tmp_path / "cost.json")])
    settings = read_cost(tmp_path / "cost.json").settings
    assert (settings["num_frames"], settings["height"], settings["width"]) == (9, 32, 32)


def test_parameters_are_those_of_the_parts(tiny_folder, trained):  # noqa: F811
    pipe = MagicMirrorPipeline.from_pretrained(tiny_folder, trained.adapter, detector="dlib")
    sizes = parameters(pipe)
    base = sum(p.numel() for part in (pipe.vae, pipe.text_encoder) for p in part.parameters())
    adapted = sum(p.numel() for p in pipe.transformer.parameters())
    added = sum(p.numel() for name, p in pipe.transformer.named_parameters() if ".adapter." in name)
    assert sizes["backbone alone"] == base + adapted - added
    face = sum(p.numel() for part in (pipe.face_encoder, pipe.front_end) for p in part.parameters())
    assert sizes["ours"] - sizes["backbone alone"] == added + face


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--repetitions", "0"], "--repetitions 0"), (["--base", "/nowhere"], "/nowhere does not exist")],
)
def test_mistakes(arguments, capsys, more, message):
    with pytest.raises(SystemExit):
        main([*arguments, *more])
    assert message in capsys.readouterr().err
