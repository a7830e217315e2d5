"""The protocol's jobs."""

import json
import re
import subprocess
import sys
import unicodedata

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from mm_lightning.encoders.text import IDENTITY_ADJECTIVES, IDENTITY_NOUNS, IdentityTokenizer
from mm_lightning.evaluation.protocol import check_options, find_people, plan, with_close_ups
from mm_lightning.evaluation.vbench import Prompt, read_prompts
from mm_lightning.jobs import Job, name_jobs, read_jobs
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


def test_the_command_writes_what_generate_reads(people, vbench, tmp_path):
    command = [sys.executable, "-m", "mm_lightning.evaluation.protocol"]
    options = [f"people={people}", f"out={tmp_path}/jobs.json", "num_single=2", "num_action=0"]
    options += [f"vbench={vbench}", "face_enhanced=true"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    jobs = read_jobs(tmp_path / "jobs.json", Job("", ()))
    assert len(jobs) == 2 * (14 + 2)
    assert [job.face_enhanced for job in jobs[:4]] == [False, True, False, True]
    assert jobs[-2].prompt == "A man img is {clapping}"
    assert jobs[-1].prompt == "A man img is {clapping}, close-up of the face, looking at the camera"
    assert len({job.name for job in jobs}) == len(jobs)
    assert jobs[0].photos == (str(people / "man/abel/1.jpg"),)
    assert jobs[0].identity == json.loads((tmp_path / "jobs.json").read_text())[0]["identity"] == "man/abel"


def test_any_folder_makes_names_that_generate_takes(cfg, tmp_path):
    names = ("O'Brien, Pat", unicodedata.normalize("NFD", "Zoé"), "a" * 200, "a" * 200 + "b")
    for name in names:
        (tmp_path / "man" / name).mkdir(parents=True)
        (tmp_path / "man" / name / "1.jpg").touch()
    jobs = plan(find_people(tmp_path, ["man"]), cfg.groups, 1, cfg.single, [], [0, 2**63 - 1])
    jobs = with_close_ups(jobs, cfg.face_phrase)
    assert len(name_jobs([Job("", (), name=job["name"]) for job in jobs], 1)) == len(jobs) == 4 * (4 + 40)
    made = {job["identity"]: job["name"] for job in jobs if "-group-" in job["name"] and job["seed"] == 0}
    assert made[f"man/{names[0]}"] == "000-group-man-O_Brien_Pat-0-face"
    assert made[f"man/{names[1]}"] == "001-group-man-Zoé-0-face"


def test_who_has_no_photo_is_told_and_what_systems_hide_is_nobody(people, caplog):
    for name in ("__MACOSX/man", ".git", "man/__MACOSX", "man/.abel", "man/heic"):
        (people / name).mkdir(parents=True)
    (people / "man/heic/1.heic").touch()
    (people / "man/abel/._1.jpg").touch()
    found = find_people(people, ["man", "woman", "elderly woman"])
    assert [(person.name, len(person.photos)) for person in found] == [
        ("man/abel", 1),
        ("man/adam", 1),
        ("elderly woman/eve", 1),
    ]
    (told,) = caplog.messages
    assert f"{people}/man/heic is left out: it holds no photo, which ends in .jpg, .jpeg, .png, .webp" in told


# VBench


ROWS = [
    ("A person is riding a bike", ["human_action"]),
    ("A person is {clapping}", ["human_action", "dynamic_degree"]),
    ("A person is riding a bike", ["dynamic_degree"]),
    ("An elderly person and a child are walking", ["human_action"]),
    ("A person is playing with kids", ["human_action"]),
    ("A man-made lake, a woman on a bench", ["scene"]),
    ("A personal computer", ["human_action"]),
    ("Two people dance", ["human_action"]),
    ("A Grandmother bakes bread", ["human_action"]),
]


@pytest.fixture
def vbench(tmp_path):
    file = tmp_path / "VBench_full_info.json"
    rows = [{"prompt_en": text, "dimension": names, "auxiliary_info": {}} for text, names in ROWS]
    file.write_text(json.dumps(rows))
    return file


def test_prompts_of_one_person_are_those_with_one_class_word(vbench):
    actions = [Prompt("A {person} is riding a bike", "person"), Prompt("A {person} is {{clapping}}", "person")]
    grandmother = Prompt("A {person} bakes bread", "grandmother")
    assert read_prompts(vbench, ["human_action"]) == [*actions, grandmother]
    assert read_prompts(vbench, ["dynamic_degree"]) == actions[::-1]
    lake = Prompt("A man-made lake, a {person} on a bench", "woman")
    assert read_prompts(vbench, None) == [*actions, lake, grandmother]


def test_class_words_are_those_that_the_tokenizer_finds(vbench, tiny_folder):
    tokenizer = IdentityTokenizer(AutoTokenizer.from_pretrained(tiny_folder / "tokenizer"))
    for prompt in read_prompts(vbench, None):
        text = prompt.template.format(person=prompt.word)
        word = tokenizer.find_class_word(text)
        assert prompt.template[: word.start].replace("{{", "{") == text[: word.start]
        assert text[word.start : word.end] == prompt.word


def test_prompts_go_to_those_whom_they_suit(vbench, people, cfg, caplog):
    found = find_people(people, list(cfg.groups))
    jobs = plan(found, cfg.groups, 0, [], [], [0], read_prompts(vbench, None))
    assert [(job["identity"], job["prompt"]) for job in jobs] == [
        ("man/abel", "A man img is riding a bike"),
        ("man/adam", "A man img is {clapping}"),
        ("elderly woman/eve", "A man-made lake, an elderly woman img on a bench"),
    ]
    assert "1 of VBench's 4 prompts suit nobody here" in caplog.text


def test_an_article_suits_its_word(people, cfg):
    jobs = plan(find_people(people, list(cfg.groups)), cfg.groups, 4, cfg.single, cfg.action, [0])
    prompts = [job["prompt"] for job in jobs if job["group"] == "elderly woman"]
    assert len(prompts) == 4 + 13 + 13
    assert not any(re.search(r"\b[Aa] elderly", prompt) for prompt in prompts)
    assert sum(bool(re.search(r"\b[Aa]n elderly", prompt)) for prompt in prompts) == len(prompts)


@pytest.mark.parametrize(
    ("content", "dimensions", "message"),
    [
        ("{", None, "is not VBench's VBench_full_info.json"),
        ("[]", None, "holds no list of prompts"),
        ('{"prompt_en": "A man"}', None, "holds no list of prompts"),
        ('[{"prompt_en": "A man", "dimension": ["a"]}, {"prompt_en": "A man"}]', None, "entry 2 is {'prompt_en'"),
        ('[{"prompt_en": "A man", "dimension": ["a"]}]', ["b"], "vbench_dimensions: b not in .*; it has a"),
        ('[{"prompt_en": "A cat", "dimension": ["a"]}]', ["a"], r"none of its 1 prompts of \['a'\] is of one person"),
    ],
)
def test_a_file_that_is_not_vbenchs(tmp_path, content, dimensions, message):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "list.json", dimensions)


def test_mistakes(cfg, people, tmp_path):
    groups = list(cfg.groups)
    with pytest.raises(FileNotFoundError, match=r"vbench=.*nowhere is not there"):
        read_prompts(tmp_path / "nowhere", None)
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


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("seeds=3", "seeds=3: give a list of different whole numbers from 0, such as [0,1]"),
        ("seeds=[0,a]", "seeds=[0, 'a']: give a list"),
        ("seeds=[1,1]", "seeds=[1, 1]: give a list"),
        ("seeds=[-1]", "seeds=[-1]: give a list"),
        ("num_single=abc", "num_single=abc: give a whole number from 0"),
        ("num_action=-1", "num_action=-1: give a whole number from 0"),
        ("prompts_per_person=1.5", "prompts_per_person=1.5: give a whole number from 0"),
        ("out={folder}", "out={folder}: give a file to write"),
        ("out=null", "out=None: give a file to write"),
        ("out={folder}/man/abel/1.jpg/jobs.json", "1.jpg is a file"),
    ],
)
def test_options_that_are_none(people, option, message):
    with initialize_config_dir(str(ROOT / "conf/evaluate"), version_base="1.3"):
        cfg = compose("protocol", overrides=[option.format(folder=people)])
    with pytest.raises(ValueError, match=re.escape(message.format(folder=people))):
        check_options(cfg)


@pytest.mark.parametrize("prompt", ["A person smiles", "A {person} {smiles}", "A {person} {", "{person}, {person}", 5])
def test_prompts_name_the_person_once(cfg, people, prompt):
    found = find_people(people, list(cfg.groups))
    given = {"groups": cfg.groups, "single": [], "action": []}
    for setting, changed in (
        ("single", {"single": OmegaConf.create([prompt])}),
        ("action", {"action": [prompt]}),
        ("groups.man", {"groups": {**cfg.groups, "man": [prompt]}}),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{setting}: the prompt {prompt!r}: write {{person}} once")):
            plan(found, **(given | changed), prompts_per_person=1, seeds=[0])
    with pytest.raises(ValueError, match=r"single=A \{person\}: give a list of prompts"):
        plan(found, cfg.groups, 1, "A {person}", [], [0])


def test_doubled_braces_are_single_ones_in_the_prompt(cfg, people):
    jobs = plan(find_people(people, list(cfg.groups)), cfg.groups, 0, ["A {person} says {{hello}}"], [], [0])
    assert [job["prompt"] for job in jobs] == ["A man img says {hello}"]


def test_an_option_that_is_none_is_one_line(people, tmp_path):
    command = [sys.executable, "-m", "mm_lightning.evaluation.protocol", f"people={people}", "seeds=3"]
    done = subprocess.run([*command, f"out={tmp_path}/jobs.json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "seeds=3: give a list" in done.stderr
    assert "Traceback" not in done.stderr
