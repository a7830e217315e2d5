"""`python -m mm_lightning.prepare`: every source composes, a run works, a mistake gets one short message."""

from __future__ import annotations

import base64
import io
import json
import os
import pty
import re
import subprocess
import sys
from array import array
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf
from PIL import Image

from mm_lightning.prepare.__main__ import CONF, main
from mm_lightning.prepare.engine import Preparation
from mm_lightning.prepare.report import Report, histogram, write_report
from mm_lightning.prepare.sources import ImageFolder
from mm_lightning.prepare.worker import StageCount
from tests.prepare.small_stages import HERE, draw_pictures
from tests.prepare.stages.tiny_sdxl import make_photomaker, make_sdxl

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(file.stem for file in (CONF / "source").glob("*.yaml"))
GIVEN = ["source.path=raw", "out=out"]
# The stages of the test instead of the real ones, which need faces.
SMALL = [
    "~stages",  # the group, steps over the set included
    f"+stages.decode._target_={HERE}.Decode",
    f"+stages.width._target_={HERE}.MinimumWidth",
    "+stages.width.least=20",
    f"+stages.fate._target_={HERE}.Fate",
]


def composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """The command in this process -> exit code and what it said."""

    def command(*arguments):
        GlobalHydra.instance().clear()
        folder = f"hydra.run.dir={tmp_path / 'log'}"
        monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments), folder, "hydra/job_logging=none"])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, said.out + said.err

    return command


def test_the_sources_that_are_asked_for():
    assert {"laion_face", "ffhq", "sfhq", "pexels", "mixkit", "images", "videos"} <= set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_composes_and_is_built(name, tmp_path):
    cfg = composed(f"source={name}", *GIVEN)
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, key, str(tmp_path))
    config = OmegaConf.to_container(cfg, resolve=True)
    source = instantiate(config["source"])
    assert source.name == name
    assert source.kind == ("video" if name in ("pexels", "mixkit", "videos") else "image")
    assert config["stages"]["decode"]["_target_"].endswith(
        {"image": "DecodePicture", "video": "DecodeClip"}[source.kind]
    )
    for stage in [*config["stages"].values(), *config["set_stages"].values()]:
        if stage is not None:
            assert callable(get_object(stage["_target_"]))


def composed_as_the_head_says(file):
    head = re.sub(r"\\\n# +", "", (CONF / file).read_text())
    (command,) = re.findall(r"# +python -m mm_lightning\.prepare (.*)", head)
    cfg = composed(*command.split())
    assert not OmegaConf.missing_keys(cfg)
    return cfg


@pytest.mark.parametrize("name", SOURCES)
def test_the_command_at_the_head_of_a_source_names_it(name):
    assert composed_as_the_head_says(f"source/{name}.yaml").source.name == name


@pytest.mark.parametrize(
    ("file", "stage"), [("cache/image", "cache"), ("cache/video", "cache"), ("references/photomaker", "synthesised")]
)
def test_stages_that_are_taken_in(file, stage, tmp_path):
    """By the command at their head; they stand where the list of stages has them, and say what is missing."""
    cfg = composed_as_the_head_says(f"{file}.yaml")
    listed = composed(f"stages={'video' if cfg.source.name == 'videos' else 'image'}", *GIVEN).stages
    assert listed[stage] is None
    assert list(cfg.stages) == list(listed)
    with pytest.raises(InstantiationException, match=r"FileNotFoundError.*weights/"):
        instantiate(cfg.stages[stage])


def test_taken_in_stages_are_built_with_models_that_are_there(tiny_folder, tmp_path):
    given = [f"stages.cache.base={tiny_folder}", f"stages.cache.vision={tiny_folder}/image_encoder"]
    for kind in ("image", "video"):
        stages = composed(f"stages={kind}", *GIVEN, f"+cache={kind}", *given, "stages.cache.recognizer=dlib").stages
        assert instantiate(stages.cache).transform.num_frames == {"image": 1, "video": 49}[kind]
    sdxl, photomaker = make_sdxl(tmp_path / "sdxl"), make_photomaker(tmp_path / "photomaker-v2.bin")
    given = [
        f"stages.synthesised.generator.{name}={path}" for name, path in (("base", sdxl), ("photomaker", photomaker))
    ]
    stages = composed(*GIVEN, "+references=photomaker", *given, "stages.synthesised.generator.recognizer=dlib").stages
    assert instantiate(stages.synthesised).generator.base == sdxl
    assert stages.own_crop is None


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_changes_only_stages_that_there_are(name):
    """A mistyped stage in a source's file would be added at the end."""
    kind = composed(f"source={name}", *GIVEN).source
    listed = "video" if "Video" in kind._target_ else "image"
    stages = composed(f"stages={listed}", *GIVEN).stages
    assert list(composed(f"source={name}", *GIVEN).stages) == list(stages)


def test_options_are_those_of_the_engine():
    cfg = composed(*GIVEN)
    fields = {name for name in Preparation.__dataclass_fields__ if name not in ("record", "source")}
    assert {name for name in cfg if name != "source"} == fields
    defaults = Preparation(ImageFolder("raw"), {"decode": {"_target_": f"{HERE}.Decode"}}, "out")
    for name in fields - {"stages", "set_stages", "out", "work"}:
        assert cfg[name] == getattr(defaults, name), name


def test_a_run_and_its_report(run, tmp_path):
    raw = draw_pictures(tmp_path / "raw", 12, {3: "raise"})
    code, said = run("source=images", f"source.path={raw}", f"out={tmp_path / 'out'}", "workers=0", *SMALL)
    assert code == 0
    assert "12 items -> 9 samples, 3 rejected (2 width: narrow; 1 fate: error:KeyError)" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["stage"] for row in report["funnel"]] == ["read", "decode", "width", "fate", "finish"]
    assert (report["num_items"], report["num_accepted"]) == (12, 9)
    assert report["config"]["source"]["path"] == str(raw)
    assert report["versions"]["numpy"]
    assert json.loads((tmp_path / "out" / "index.json").read_text())["num_samples"] == 9


def test_a_dry_run(run, tmp_path):
    raw = draw_pictures(tmp_path / "raw", 12)
    code, _ = run(f"source.path={raw}", f"out={tmp_path / 'out'}", "limit=5", "workers=0", *SMALL)
    assert code == 0
    (page,) = (tmp_path / "out.work").glob("*/dry_run/report.html")
    assert "Dry run of images" in page.read_text()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"give source\.path=\.\.\."),
        (["source=pexels", "source.path=x"], r"give source\.captions=\.\.\."),
        (["source.path=nowhere"], r"source\.path=nowhere is not there"),
        (["source.path={raw}", "+source.extensions=[xyz]"], r"no file ends in xyz"),
        (["source.path={raw}", "workers=-2"], r"workers=-2: give at least 0"),
        (["source.path={raw}", "out={raw}/out"], r"lies in source\.path"),
        (["source.path={raw}", "stages.width.least=0"], r"least=0: give at least 1"),
        (["source.path={raw}", "stages.width.lest=1"], r"lest"),
        (["source=imgs", "source.path={raw}"], r"imgs"),
        (["source.path={raw}", "chunksize=3"], r"chunksize"),
    ],
)
def test_a_mistake_gets_one_short_message(overrides, message, run, tmp_path):
    raw = draw_pictures(tmp_path / "raw", 2)
    given = [override.replace("{raw}", str(raw)) for override in overrides]
    code, said = run(f"out={tmp_path / 'out'}", "workers=0", *SMALL, *given)
    assert code == 1
    assert re.search(message, said)
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.tar"))


def test_progress_is_shown_on_a_terminal(tmp_path):
    raw = draw_pictures(tmp_path / "raw", 8)
    script = (
        "import sys; from mm_lightning.prepare.engine import Preparation as P; from tests.prepare.small_stages import *"
    )
    script += "; from mm_lightning.prepare.sources import ImageFolder"
    script += "; P(ImageFolder(sys.argv[1]), STAGES, sys.argv[2], workers=0, chunk_size=2).run()"
    parent, child = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-c", script, str(raw), str(tmp_path / "out")]
    subprocess.run(command, env=environment, stdout=child, stderr=child, check=True, timeout=60)
    os.close(child)
    shown = os.read(parent, 1 << 16).decode()
    assert re.search(r"items.*8/8.*[\d.]+/s, \d+ samples.*0:00:0\d.*left", shown)


# The report


class Page(HTMLParser):
    """Checks that tags close in order and collects what is referred to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.tags = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)


def test_the_page_stands_alone(run, tmp_path):
    raw = draw_pictures(tmp_path / "raw", 12, {3: "raise"})
    run(f"source.path={raw}", f"out={tmp_path / 'out'}", "workers=0", *SMALL)
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.sources
    for source in page.sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/jpeg;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) <= 112
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "prefers-color-scheme: dark" in text
    assert "error: KeyError" in text
    assert "narrow" in text


def test_names_from_files_cannot_break_the_page(tmp_path):
    nasty = '<script>alert("x")</script>&<b>'
    report = Report(["read", nasty])
    report.add_counts({nasty: StageCount(1, 0)})
    report.counts[nasty].reasons[nasty] += 1
    report.add_rejected(
        {"key": nasty, "source": nasty, "stage": nasty, "reason": nasty, "detail": nasty, "trace": nasty}
    )
    facts = {"kind": nasty, "source": nasty, "dry_run": None, "seconds": 1.0, "num_done_before": 0, "index": None}
    write_report(tmp_path, report, facts | {"versions": {nasty: nasty}, "config": nasty, "stopped": nasty})
    page = Page((tmp_path / "report.html").read_text())
    assert page.open == []
    assert "script" not in page.tags


@pytest.mark.parametrize("values", [[3.0], [1.0] * 9, list(range(100)), [0, 1, 2, 1e6], [-1.0, 0.5]])
@pytest.mark.parametrize("name", ["face_size", "caption_words"])
def test_a_histogram_counts_every_value(name, values):
    drawn = histogram(name, array("d", values))
    assert sum(drawn["counts"]) == len(values) == drawn["num_samples"]
    assert len(drawn["edges"]) == len(drawn["counts"]) + 1 <= 27
    assert drawn["edges"] == sorted(set(drawn["edges"]))
    assert (drawn["min"], drawn["max"]) == (min(values), max(values))
