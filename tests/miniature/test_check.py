"""Whether the people can be told apart: figures against their definitions, the command on real renderings."""

from __future__ import annotations

import itertools
import shutil

import numpy as np
import pytest
from PIL import Image

from mm_lightning.miniature import check
from mm_lightning.miniature.check import nearest_share, pairwise_distances, verification_auc


@pytest.fixture
def cloud():
    """Distances and identities of 24 points, six to a person, that overlap; some stand at the same place."""
    rng = np.random.default_rng(0)
    identities = np.repeat(["a", "b", "c", "d"], 6)
    points = rng.normal(0, 1, (24, 3)) + np.repeat(rng.normal(0, 1.2, (4, 3)), 6, axis=0)
    points[3] = points[9] = points[4]
    return pairwise_distances(points), identities


def test_auc_is_the_share_of_pairs_in_the_right_order(cloud):
    distances, identities = cloud
    pairs = list(itertools.combinations(range(len(identities)), 2))
    same = [distances[i, j] for i, j in pairs if identities[i] == identities[j]]
    others = [distances[i, j] for i, j in pairs if identities[i] != identities[j]]
    wins = sum((a < b) + 0.5 * (a == b) for a in same for b in others)
    assert verification_auc(distances, identities) == pytest.approx(wins / len(same) / len(others), abs=1e-12)
    assert 0.6 < verification_auc(distances, identities) < 0.99


def test_nearest_share_leaves_the_still_itself_out(cloud):
    distances, identities = cloud
    right = 0
    for i in range(len(identities)):
        others = [j for j in range(len(identities)) if j != i]
        right += identities[min(others, key=lambda j: distances[i, j])] == identities[i]
    assert nearest_share(distances, identities) == right / len(identities)


def test_distances_are_euclidean():
    assert pairwise_distances(np.array([[0.0, 0.0], [3.0, 4.0]])).tolist() == [[0, 5], [5, 0]]


def test_command_prints_every_bar_and_its_status(few_people, tmp_path, capsys):
    sheet = tmp_path / "docs" / "people.png"
    with pytest.raises(SystemExit) as end:
        check.main(["--people", str(few_people), "--split", "test", "--sheet", str(sheet), "--rows", "2"])
    lines = capsys.readouterr().out.splitlines()
    names = [
        "face found, 9 stills",
        "dlib: verification",
        "dlib: nearest",
        "stored queries: ver",
        "stored queries: near",
    ]
    assert [line[: len(name)] for line, name in zip(lines, names, strict=True)] == names
    values = [float(line.split("bar")[0].split()[-1]) for line in lines]
    bars = [0.99, 0.995, 0.97, 0.995, 0.97]
    verdicts = [value >= bar for value, bar in zip(values, bars, strict=True)]
    assert [line.endswith("pass") for line in lines] == verdicts
    assert end.value.code == (0 if all(verdicts) else 1)
    assert min(values[1], values[3]) > 0.8  # three people, and none like another
    assert abs(values[1] - values[3]) < 0.2
    with Image.open(sheet) as picture:
        assert picture.height == 2 * (128 + check.SHEET_MARGIN) + check.SHEET_MARGIN
        assert picture.width == check.LABEL_WIDTH + 5 * (128 + check.SHEET_MARGIN)  # three stills, frames 0 and 4


def test_strangers_under_one_name_fail_the_bars(few_people):
    samples = list(check.read_samples(few_people / "train" / "images"))
    identities = np.array([sample.meta["identity"] for sample in samples])
    embeddings = check.load_queries(few_people / "train").of([sample.key for sample in samples]).double().numpy()
    right = check.compare("x", embeddings, identities)
    wrong = check.compare("x", embeddings, np.roll(identities, 1))
    assert all(a.value > b.value for a, b in zip(right, wrong, strict=True))
    assert not any(figure.passed for figure in wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "validation"], r"validation/images holds no finished shards \(index\.json is missing\)"),
        (["--workers", "0"], "--workers 0"),
        (["--sheet", "people.gif"], r"--sheet people\.gif: the name must end in \.jpg or \.png"),
        (["--sheet", "people.png", "--rows", "0"], "--rows 0: both must be at least 1"),
    ],
)
def test_wrong_input(arguments, message, few_people):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        check.main(["--people", str(few_people), *arguments])


def test_one_person_alone_cannot_be_told_apart(few_people, tmp_path):
    from mm_lightning.prepare.shards import ShardWriter

    shutil.copytree(few_people / "test" / "images", tmp_path / "people" / "test" / "images")
    samples = list(check.read_samples(tmp_path / "people" / "test" / "images"))
    with ShardWriter(tmp_path / "people" / "test" / "images", "image", prefix="test") as writer:
        for sample in samples[:3]:
            writer.write(sample.key, sample.fields)
    with pytest.raises(SystemExit, match="3 stills of 1 people: nobody to compare with"):
        check.main(["--people", str(tmp_path / "people")])
