"""The protocol's jobs."""

import json
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from mm_lightning.encoders.text import IDENTITY_ADJECTIVES, IDENTITY_NOUNS
from mm_lightning.evaluation.protocol import find_people, plan
from mm_lightning.generate import Job, read_jobs
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def cfg():
    with initialize_config_dir(str(ROOT / "conf/evaluate"), version_base="1.3"):
        return compose("protocol")


@pytest.fixture
def people(tmp_path):
    for group, name in (("man", "adam"), ("elderly woman", "eve"), ("man", "abel")):
        folder = tmp_path / "people" / group / name
        folder.mkdir(parents=True)
        (folder / "1.jpg").touch()
    return tmp_path / "people"


def test_the_protocol_has_the_papers_numbers(cfg):
    assert len(cfg.groups) == 7
    assert {len(prompts) for prompts in cfg.groups.values()} == {4}
    assert len(set(cfg.single)) == len(set(cfg.action)) == 40
    prompts = [*cfg.single, *cfg.action, *(prompt for group in cfg.groups.values() for prompt in group)]
    assert all(prompt.count("{person}") == 1 for prompt in prompts)
    assert all(any(word in group.split() for word in (*IDENTITY_NOUNS, *IDENTITY_ADJECTIVES)) for group in cfg.groups)


def test_everybody_gets_the_groups_prompts_and_the_others_go_round(cfg, people):
    found = find_people(people, list(cfg.groups))
    assert [person.name for person in found] == ["man/abel", "man/adam", "elderly woman/eve"]
    jobs = plan(found, cfg.groups, 4, cfg.single, cfg.action, [0, 1])
    assert len(jobs) == (3 * 4 + 40 + 40) * 2
    assert len({job["name"] for job in jobs}) == len(jobs)
    single = [job["identity"] for job in jobs if "-single-" in job["name"] and job["seed"] == 0]
    assert [single.count(person.name) for person in found] == [14, 13, 13]
    assert all(f"{job['group']} img" in job["prompt"] for job in jobs)


def test_the_command_writes_what_generate_reads(people, tmp_path):
    command = [sys.executable, "-m", "mm_lightning.evaluation.protocol"]
    options = [f"people={people}", f"out={tmp_path}/jobs.json", "num_single=2", "num_action=0"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    jobs = read_jobs(tmp_path / "jobs.json", Job("", ()))
    assert len(jobs) == 14
    assert jobs[0].photos == (str(people / "man/abel/1.jpg"),)
    assert jobs[0].identity == json.loads((tmp_path / "jobs.json").read_text())[0]["identity"] == "man/abel"


def test_mistakes(cfg, people, tmp_path):
    groups = list(cfg.groups)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        find_people(tmp_path / "nowhere", groups)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds nobody"):
        find_people(tmp_path / "empty", groups)
    (people / "robot").mkdir()
    with pytest.raises(ValueError, match="groups without prompts: robot"):
        find_people(people, groups)
    (people / "robot").rmdir()
    with pytest.raises(ValueError, match="prompts_per_person=5, man has 4"):
        plan(find_people(people, groups), cfg.groups, 5, [], [], [0])
