"""What all metrics promise: batches, reset, counting of the unknown, plots, collections, copies, clear errors."""

from __future__ import annotations

import copy
import pickle

import matplotlib
import pytest
import torch
from torchmetrics import MetricCollection

from mm_lightning import metrics
from mm_lightning.metrics.base import PlottedMetric, VideoMetric
from tests.metrics.drawn import batch_of, every_metric, random_inputs, update

matplotlib.use("Agg")
NUM_VIDEOS = 5
NAMES = list(every_metric())


@pytest.fixture(scope="module")
def inputs() -> dict[str, object]:
    return random_inputs(NUM_VIDEOS)


def result(metric: PlottedMetric) -> torch.Tensor:
    """One tensor of all that a metric gives."""
    value = metric.compute()
    return torch.stack(list(value.values())) if isinstance(value, dict) else value


def test_every_metric_of_the_package_is_here():
    classes = {
        value for value in vars(metrics).values() if isinstance(value, type) and issubclass(value, PlottedMetric)
    }
    assert {type(metric) for metric in every_metric().values()} == classes


@pytest.mark.parametrize("name", NAMES)
def test_batches_do_not_matter(name, inputs):
    whole, parts = every_metric()[name], every_metric()[name]
    update(whole, inputs)
    for start, end in ((0, 1), (1, 4), (4, 5)):
        update(parts, batch_of(inputs, start, end))
    assert result(whole).isfinite().all()
    torch.testing.assert_close(result(parts), result(whole), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_reset_forgets_and_nothing_is_nan(name, inputs):
    metric = every_metric()[name]
    update(metric, inputs)
    before = result(metric)
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert result(metric).isnan().all()
    update(metric, batch_of(inputs, 1, 3))
    part = result(metric)
    assert not torch.allclose(part, before)
    metric.reset()
    update(metric, inputs)
    torch.testing.assert_close(result(metric), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_forward_gives_the_batch_and_accumulates(name, inputs):
    alone, metric = every_metric()[name], every_metric()[name]
    update(alone, batch_of(inputs, 0, 2))
    first = metric(**metric._filter_kwargs(**batch_of(inputs, 0, 2)))
    metric(**metric._filter_kwargs(**batch_of(inputs, 2, 5)))
    expected = alone.compute()
    torch.testing.assert_close(first, expected, rtol=0, atol=0, equal_nan=True)
    update(alone, batch_of(inputs, 2, 5))
    torch.testing.assert_close(result(metric), result(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_plots(name, inputs):
    metric = every_metric()[name]
    update(metric, inputs)
    figure, axes = metric.plot()
    assert len(axes.lines) >= result(metric).numel()
    matplotlib.pyplot.close(figure)
    figure, axes = metric.plot([metric.compute(), metric.compute()])
    assert all(len(line.get_xdata()) == 2 for line in axes.lines[: len(torch.atleast_1d(result(metric)))])
    matplotlib.pyplot.close(figure)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_keep_the_state(name, inputs):
    metric = every_metric()[name]
    update(metric, inputs)
    expected = result(metric)
    for other in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        other._computed = None
        torch.testing.assert_close(result(other), expected, rtol=0, atol=0)
        update(other, batch_of(inputs, 0, 2))


@pytest.mark.parametrize("name", NAMES)
def test_direction_and_bounds_are_said(name):
    metric = every_metric()[name]
    assert metric.higher_is_better is (name not in {"distance", "decay", "drift", "smoothness"})
    assert "igher is better" in type(metric).__doc__ or "ower is" in type(metric).__doc__


@pytest.mark.parametrize("name", [name for name, metric in every_metric().items() if isinstance(metric, VideoMetric)])
def test_mean_is_that_of_the_known_videos_and_the_others_are_counted(name, inputs):
    metric = every_metric()[name]
    update(metric, inputs)
    values = metric.per_video().double().numpy()
    known = values[values == values]
    assert len(values) == NUM_VIDEOS
    assert metric.num_unknown() == NUM_VIDEOS - len(known)
    assert float(metric.compute()) == pytest.approx(known.sum() / len(known), abs=1e-6)
    # The last video shows no face; only figures of faces miss it, and the rate of faces is 0 there.
    faceless = name in {"similarity", "distance", "decay", "fm_ref", "fm_inter"}
    assert (values[-1] != values[-1]) == faceless


def test_a_collection_equals_its_metrics_though_their_values_agree(inputs):
    """All rates are 1 and all drifts 0 in the first update; torchmetrics must not take such metrics for one."""
    names = ("rate", "dynamic", "drift", "decay", "fm_inter", "smoothness", "top1", "top2")

    def make() -> dict[str, PlottedMetric]:
        return {
            **{name: every_metric()[name] for name in names},
            "lively": metrics.DynamicDegree(threshold=1e-6),
            "stiff": metrics.DynamicDegree(threshold=1e6),
            "lax": metrics.SuccessRates(min_motion=0.0),
            "strict": metrics.SuccessRates(min_motion=0.999),
        }

    still = random_inputs(1)
    still["video"] = still["video"][:, :1].expand(-1, 9, -1, -1, -1)
    still["motion"] = torch.ones(1)
    collection, alone = MetricCollection(make()), make()
    for batch in (still, inputs):
        collection.update(**batch)
        for metric in alone.values():
            update(metric, batch)
    for name, value in collection.compute().items():
        # Success rates come flattened, criterion by criterion.
        if name in alone:
            torch.testing.assert_close(value, alone[name].compute(), rtol=0, atol=0, msg=name)
    assert float(collection["lively"].compute()) > float(collection["stiff"].compute())
    assert float(collection["lax"].compute()["motion"]) > float(collection["strict"].compute()["motion"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"found": torch.ones(5, 9)}, r"\(B, N\) bool, got torch.float32 \(5, 9\)"),
        ({"boxes": torch.ones(5, 9, 3)}, r"faces.boxes must be floats \(5, 9, 4\), got torch.float32 \(5, 9, 3\)"),
        ({"landmarks": torch.ones(5, 9, 68, 2)}, r"faces.landmarks must be floats \(5, 9, 5, 2\)"),
        ({"embeddings": torch.ones(5, 8, 6)}, r"faces.embeddings must be floats \(5, 9, E\)"),
        ({"embeddings": torch.full((5, 9, 6), torch.nan)}, "faces.embeddings has NaN"),
        ({"boxes": torch.zeros(5, 9, 4)}, "faces.boxes must be x0 y0 x1 y1"),
        ({"sizes": torch.ones(4, 2)}, "faces.sizes must be the height and width of each of 5 videos"),
    ],
)
@pytest.mark.parametrize("name", ["similarity", "distance", "rate", "decay", "fm_ref", "fm_inter", "top1"])
def test_faces_that_do_not_fit_are_named(name, change, message, inputs):
    metric = every_metric()[name]
    with pytest.raises(ValueError, match=message):
        update(metric, inputs | {"faces": inputs["faces"]._replace(**change)})


@pytest.mark.parametrize("name", ["similarity", "distance", "decay", "fm_ref", "top1"])
def test_references_that_do_not_fit_are_named(name, inputs):
    references = inputs["references"]
    wide = references._replace(embeddings=torch.ones(5, 3, 512))
    with pytest.raises(ValueError, match="width 512, videos of width 6: embed both with one recogniser"):
        update(every_metric()[name], inputs | {"references": wide})
    few = type(references)(*(tensor[:4] for tensor in references))
    with pytest.raises(ValueError, match="4 samples of references for 5 videos"):
        update(every_metric()[name], inputs | {"references": few})


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(2, 4, 32, 48, 3), r"\(B, F, 3, H, W\) floats, got torch.float32 \(2, 4, 32, 48, 3\)"),
        (torch.zeros(4, 3, 32, 48), r"got torch.float32 \(4, 3, 32, 48\)"),
        (torch.zeros(2, 4, 3, 32, 48, dtype=torch.uint8), "got torch.uint8"),
        (torch.full((1, 2, 3, 32, 48), 255.0), "from 255 to 255: scale them"),
        (torch.full((1, 2, 3, 32, 48), torch.nan), "from nan to nan"),
        (torch.zeros(1, 0, 3, 32, 48), r"got torch.float32 \(1, 0, 3, 32, 48\)"),
    ],
)
@pytest.mark.parametrize("name", ["drift", "dynamic", "smoothness", "inception", "text"])
def test_videos_of_another_shape_or_range_are_refused(name, video, message, inputs):
    metric = every_metric()[name]
    with pytest.raises(ValueError, match=message):
        update(metric, inputs | {"video": video, "prompts": ["abc"] * len(video)})


@pytest.mark.parametrize("kind", [metrics.SimilarityDecay, metrics.FaceMotionInter, metrics.FaceMotionRef])
def test_too_few_frames_are_refused(kind):
    with pytest.raises(ValueError, match="num_frames=0: give a number from"):
        kind(num_frames=0)
