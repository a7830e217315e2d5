"""The build: every command in order, made again only where something has changed, resumed where it was cut."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file, save_file

from mm_lightning.adapters.weights import AdapterWeights
from mm_lightning.miniature import build as command
from mm_lightning.miniature.build import (
    READS,
    STAGES,
    MissingPackageError,
    Settings,
    Stage,
    build,
    check_packages,
    is_done,
    plan,
    read_receipt,
    run_stage,
    take_few,
    write_receipt,
)
from mm_lightning.miniature.card import commit, copy_halved, draw_curves, read_curves
from mm_lightning.miniature.layout import read_samples
from mm_lightning.miniature.packing import is_finished
from mm_lightning.tiny import make_tiny
from tests.conftest import ROOT
from tests.miniature.real_people import write_people, write_settings


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(out=tmp_path / "build", people=tmp_path / "people", scale=0.1)


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """Everybody in every split: enough to run through."""
    folder = tmp_path_factory.mktemp("people")
    for split in ("train", "validation", "test"):
        write_people(folder / split)
    write_settings(folder)
    return folder


def digests(settings: Settings) -> dict[str, str]:
    return {stage.name: stage.made_from for stage in plan(settings)}


def finish(settings: Settings, *names: str) -> None:
    for stage in plan(settings):
        if stage.name in names:
            write_receipt(settings, stage, seconds=1.0, done=True)


# What is run


def test_stages_stand_after_those_they_read():
    assert tuple(READS) == STAGES
    for name, reads in READS.items():
        assert all(STAGES.index(read) < STAGES.index(name) for read in reads)


def test_commands_are_those_that_a_user_types(settings):
    stages = {stage.name: stage.command for stage in plan(settings)}
    for name in ("vae", "decoder", "clip", "backbone", "motion", "stage1", "stage2"):
        assert stages[name][:3] == ("train.py", f"experiment=miniature_{name}", "scale=0.1")
    for name in ("people", "quality", "cache", "table"):
        assert stages[name][0] == "-m"
    assert f"model.init_adapter={settings.run_dir('stage1')}/adapter" in stages["stage2"]
    assert str(settings.adapter) in stages["table"]


def test_every_part_is_written_and_read_in_the_folder_of_the_build(settings):
    """Nothing of a build lies where a user's own runs do."""
    for stage in plan(settings):
        if stage.command[0] == "train.py":
            config = command.training_config(stage.command)
            assert "outputs" not in config
            assert str(settings.out) in config
    model = str(settings.model)
    exports = [s for s in plan(settings) if s.name in ("vae", "decoder", "clip", "backbone", "motion")]
    assert all(f"folder: {model}\n" in command.training_config(stage.command) for stage in exports)


def test_a_gpu_changes_device_and_precision_and_nothing_else(settings):
    cpu, gpu = (plan(dataclasses.replace(settings, device=device)) for device in ("cpu", "cuda"))
    for one, other in zip(cpu, gpu, strict=True):
        added = set(other.command) - set(one.command)
        assert added <= {"trainer.accelerator=gpu", "trainer.precision=bf16-mixed", "data.num_workers=8", "cuda"}


def test_a_longer_training_is_another_one_and_so_is_all_that_reads_it(settings):
    before, after = digests(settings), digests(dataclasses.replace(settings, scale=0.2))
    assert before["people"] == after["people"]
    assert all(before[name] != after[name] for name in STAGES[1:])


# Receipts and resuming


def test_a_stage_leaves_a_receipt_with_command_seconds_and_hardware(settings):
    stage = Stage("table", ("-c", "import time; time.sleep(0.2)"), "digest")
    run_stage(settings, stage)
    receipt = read_receipt(settings, "table")
    assert receipt["done"]
    assert receipt["command"] == ["python", *stage.command]
    assert 0.2 <= receipt["seconds"] < 60
    assert "torch" in receipt["hardware"]
    assert is_done(settings, stage)
    assert not is_done(settings, stage._replace(made_from="another"))


def test_a_failure_names_the_stage_and_its_command_and_counts_its_time(settings):
    stage = Stage("table", ("-c", "import time; time.sleep(0.2); raise SystemExit(3)"), "digest")
    with pytest.raises(ValueError, match=r"Stage table ended with status 3, after `python -c .*goes on from here"):
        run_stage(settings, stage)
    first = read_receipt(settings, "table")
    assert not first["done"]
    with pytest.raises(ValueError, match="status 3"):
        run_stage(settings, stage)
    assert read_receipt(settings, "table")["seconds"] > first["seconds"]


def test_a_figure_below_its_bar_does_not_stop_the_build(settings):
    run_stage(settings, Stage("quality", ("-c", "raise SystemExit(1)"), "digest"))
    assert read_receipt(settings, "quality")["done"]
    with pytest.raises(ValueError, match="status 2"):
        run_stage(settings, Stage("quality", ("-c", "raise SystemExit(2)"), "digest"))


def test_a_training_that_was_cut_goes_on_from_its_last_checkpoint(settings):
    stage = next(stage for stage in plan(settings) if stage.name == "vae")
    checkpoint = settings.run_dir("vae") / "checkpoints/last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    assert command.resume_overrides(settings, stage) == [f"ckpt_path={checkpoint}"]
    assert command.resume_overrides(settings, Stage("table", ("-m", "x"), "d")) == []


def test_what_was_made_with_other_settings_is_not_gone_on_with(settings):
    """The run's folder is emptied: its checkpoint belongs to another recipe."""
    stage = Stage("vae", ("-c", ""), "new")
    leftover = settings.run_dir("vae") / "checkpoints/last.ckpt"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    write_receipt(settings, stage, seconds=5.0, done=False)
    assert command.seconds_so_far(settings, stage) == 5.0
    assert leftover.exists()
    write_receipt(settings, stage._replace(made_from="old"), seconds=5.0, done=False)
    run_stage(settings, stage)
    assert not leftover.exists()
    assert read_receipt(settings, "vae")["seconds"] < 5.0


def test_done_stages_are_kept(settings, capsys, caplog):
    caplog.set_level("INFO")
    finish(settings, *STAGES)
    build(settings, STAGES)
    assert [record.message.split()[:2] for record in caplog.records] == [[name, "done,"] for name in STAGES]


@pytest.mark.slow
def test_ending_the_build_ends_its_training(settings, tmp_path):
    """A training that outlived its build would write into the folder of the next one."""
    training = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    script = f"""if True:
        import signal
        from pathlib import Path
        from mm_lightning.miniature import build

        signal.signal(signal.SIGTERM, build.end_with_children)
        settings = build.Settings(Path({str(settings.out)!r}), Path("people"))
        build.run_stage(settings, build.Stage("table", ("-c", {training!r}), "digest"))
    """
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    pid_file = tmp_path / "pid"
    deadline = time.monotonic() + 120
    while not (pid_file.is_file() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)
    assert read_receipt(settings, "table")["seconds"] > 0


# Mistakes


def test_a_missing_package_is_named_with_its_stage_before_anything_runs(monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"table needs dlib \(finds faces\)") as caught:
        check_packages(["vae", "clip", "table"])
    assert str(caught.value).endswith("--stages vae clip.")


def test_a_stage_without_what_it_reads_is_refused(settings):
    with pytest.raises(ValueError, match=r"Stage stage2 reads what stage1 make.*--stages stage1 stage2"):
        build(settings, ["stage2"])


def test_no_people_and_nothing_to_render_them_is_told(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "PEOPLE_ASSETS", tmp_path / "none")
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"holds no people.*anny and pyvista"):
        command.prepare_people(settings)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scale=0"], ["--scale=0.0: give a positive number"]),
        (["--stages", "stage3"], ["invalid choice: 'stage3'", "stage2"]),
        pytest.param(
            ["--device=cuda"],
            ["torch sees no CUDA device"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_mistakes_are_told(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    message = f"{caught.value} {capsys.readouterr().err}"
    assert [word for word in words if word not in message] == []


# People


def test_a_few_people_are_a_set_of_their_own(people, tmp_path):
    few = take_few(people, tmp_path / "few", {"train": 3, "validation": 1, "test": 2})
    assert is_finished(few)
    for split, count in (("train", 3), ("validation", 1), ("test", 2)):
        stills, clips = (list(read_samples(few / split / kind)) for kind in ("images", "videos"))
        assert len({sample.meta["identity"] for sample in stills}) == len(clips) == count
        assert len(stills) == 4 * count
    first = next(read_samples(few / "train/images"))
    assert first == next(read_samples(people / "train/images"))


# What is kept


@pytest.fixture
def finished(settings, people, tmp_path) -> Settings:
    """A build of which everything is done, with small weights."""
    settings = dataclasses.replace(settings, people=people)
    make_tiny(settings.model, num_layers=2)
    save_judge(settings.out / "judge")
    record = {"base": {"name": "x", "config_sha256": "y"}, "adapter": {}, "front_end": {}}
    AdapterWeights(record, {"w": torch.randn(8, 8)}).save_pretrained(settings.adapter)
    for name in ("vae", "decoder", "clip", "backbone", "motion", "stage1", "stage2"):
        log_losses(settings.run_dir(name))
    finish(settings, *STAGES)
    (settings.out / "table").mkdir()
    (settings.out / "table/results.md").write_text("| | top-1 |\n|---|---|\n| full model | 61.0% |\n")
    return settings


def save_judge(folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file({"image_projection.weight": torch.randn(4, 4)}, folder / "projections.safetensors")


def log_losses(run_dir: Path) -> None:
    logger = TensorBoardLogger(run_dir, name="tensorboard", version="")
    for step in range(5):
        logger.log_metrics({"val/loss": 1 / (step + 1), "train/loss": 2 / (step + 1)}, step)
    logger.finalize("success")


def test_weights_are_committed_in_half_precision_with_a_card(finished, tmp_path):
    assets = tmp_path / "assets"
    commit(finished, assets)
    assert {path.name for path in assets.iterdir()} == {"model", "judge", "adapter", "MODEL_CARD.md", "curves.svg"}
    weights = load_file(assets / "adapter/adapter.safetensors")
    assert weights["w"].dtype == torch.float16
    original = load_file(finished.adapter / "adapter.safetensors")["w"]
    torch.testing.assert_close(weights["w"].float(), original, rtol=1e-3, atol=1e-6)
    assert (assets / "model/scheduler/scheduler_config.json").is_file()
    card = (assets / "MODEL_CARD.md").read_text()
    for words in ("7 for training", "| transformer | 1 |", "experiment=miniature_vae scale=0.1", "61.0%", "curves.svg"):
        assert words in card
    assert str(finished.out) not in card
    assert "Not measured in this build" in card  # of the backbone, whose report is not there


def test_a_larger_result_than_may_be_committed_is_refused(finished, tmp_path):
    big = {"w": torch.zeros(3_100_000)}
    save_file(big, finished.adapter / "adapter.safetensors")
    with pytest.raises(ValueError, match=r"takes 6,200,.* bytes in half precision, at most 6,000,000"):
        commit(finished, tmp_path / "assets")
    assert not (tmp_path / "assets/adapter").exists()


def test_an_unfinished_or_dry_build_is_not_committed(finished, tmp_path):
    with pytest.raises(ValueError, match="dry build"):
        commit(dataclasses.replace(finished, dry=True), tmp_path / "assets")
    (finished.out / "receipts/stage2.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished stage2"):
        commit(finished, tmp_path / "assets")


def test_halving_keeps_integers_and_other_files(tmp_path):
    source = tmp_path / "a"
    (source / "sub").mkdir(parents=True)
    save_file({"f": torch.tensor([1.5]), "i": torch.tensor([7])}, source / "sub/x.safetensors")
    (source / "config.json").write_text("{}")
    size = copy_halved(source, tmp_path / "b")
    found = load_file(tmp_path / "b/sub/x.safetensors")
    assert (found["f"].dtype, found["i"].item()) == (torch.float16, 7)
    assert size == sum(file.stat().st_size for file in (tmp_path / "b").rglob("*") if file.is_file())


def test_halved_weights_load_as_the_single_ones(tmp_path, tiny_folder):
    """A vision tower is loaded in the precision that its config names, not in that of the file."""
    from mm_lightning.encoders.face import load_vision

    copy_halved(tiny_folder, tmp_path / "half")
    whole, half = load_vision(tiny_folder / "image_encoder"), load_vision(tmp_path / "half/image_encoder")
    assert half.dtype == torch.float32
    for one, other in zip(whole.parameters(), half.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-6)


def test_curves_show_the_validation_loss(tmp_path):
    log_losses(tmp_path)
    (curve,) = read_curves(tmp_path)
    assert curve.tag == "val/loss"
    assert curve.values == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    drawn = draw_curves({"vae": [curve], "clip": []})
    assert drawn.startswith(b"<?xml")
    assert b"val/loss" in drawn
    assert draw_curves({"vae": [curve], "clip": []}) == drawn


# Dry


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("-m", "mm_lightning.config", "nowhere"), 0),
        (("-m", "mm_lightning.miniature.table", "--nothing"), 2),
        (("-m", "mm_lightning.miniature.cache", "--people", "nowhere"), 1),
        (("train.py", "experiment=nothing"), 1),
        (("train.py", "--cfg", "job"), 0),
    ],
)
def test_a_dry_stage_has_its_commands_status(arguments, status):
    assert command.run_dry(arguments) == status
    assert Path(sys.argv[0]).name not in ("config.py", "train.py")


def test_only_a_dry_build_on_the_cpu_copies_itself(settings):
    dry = dataclasses.replace(settings, dry=True)
    assert command.can_copy(dry) == (sys.platform == "linux")
    assert not command.can_copy(settings)
    assert not command.can_copy(dataclasses.replace(dry, device="cuda"))


# Everything


@pytest.mark.slow
def test_a_dry_build_runs_everything_and_a_second_one_nothing(people, tmp_path):
    arguments = ["-m", "mm_lightning.miniature.build", "--dry", "--people", str(people), "--out", str(tmp_path / "b")]
    run = subprocess.run([sys.executable, *arguments, "--device=cpu"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    receipts = [json.loads(file.read_text()) for file in (tmp_path / "b/receipts").glob("*.json")]
    assert {receipt["stage"] for receipt in receipts if receipt["done"]} == set(STAGES)
    assert "| full model |" in (tmp_path / "b/table/results.md").read_text()
    again = subprocess.run([sys.executable, *arguments, "--device=cpu"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0
    assert again.stderr.count("done, kept") == len(STAGES)
