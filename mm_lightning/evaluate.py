"""Judges videos, whoever made them, by the paper's metrics: table, charts, gallery.

    python -m mm_lightning.evaluate +videos.ours=outputs/generated
    python -m mm_lightning.evaluate +videos.ours=outputs/generated +videos.consisid=FOLDER out=outputs/evaluation
    python -m mm_lightning.evaluate --multirun part=0,1,2,3 num_parts=4 hydra/launcher=joblib +videos.ours=FOLDER
    python -m mm_lightning.evaluate ablation FOLDER...

A folder holds videos (mp4, webm, GIF) and a manifest.json that gives each its prompt and photos of the person, as
`mm_lightning.generate` writes it. Each video is judged once and kept by its contents; started again, it goes on.
With `part` a run judges only its share, at the same time as others, and a plain run after them writes the report.
Options stand in conf/evaluate/. `ablation` gathers runs that were judged: see `mm_lightning.evaluation.ablation`.
"""

from __future__ import annotations

import base64
import csv
import io
import itertools
import logging
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from mm_lightning.config import short_errors
from mm_lightning.devices import find_device
from mm_lightning.encoders.reader import FaceReader
from mm_lightning.evaluation import ablation
from mm_lightning.evaluation.cost import Cost, read_cost
from mm_lightning.evaluation.judge import Judge, Judged
from mm_lightning.evaluation.manifest import Entry, read_manifest
from mm_lightning.evaluation.report import FIGURES, Figure, render, to_json
from mm_lightning.evaluation.summary import Estimate, bootstrap
from mm_lightning.files import check_writable, write_text
from mm_lightning.metrics.arithmetic import mean_embedding
from mm_lightning.metrics.face_detection_rate import FaceDetectionRate
from mm_lightning.metrics.face_motion_inter import FaceMotionInter
from mm_lightning.metrics.face_motion_ref import FaceMotionRef
from mm_lightning.metrics.id_distance import AverageIDDistance
from mm_lightning.metrics.id_similarity import AverageIDSimilarity, frame_similarity
from mm_lightning.metrics.identity_retrieval import IdentityRetrieval
from mm_lightning.metrics.inception_score import InceptionScore
from mm_lightning.metrics.similarity_decay import SimilarityDecay
from mm_lightning.metrics.success_rates import SuccessRates

logger = logging.getLogger("mm_lightning.evaluate")

CONF = Path(__file__).resolve().parents[1] / "conf" / "evaluate"


# On videos whose prompt asks for the face, where a method has some
OF_SIMILARITY = ("similarity", "distance", "decay", "top1", "top5")


# Figures of one method's videos ---------------------------------------------------------------------------------------


def face_figures(judged: Sequence[Judged], people: Sequence[int]) -> dict[str, list[float]]:
    """Name -> a value for each video, NaN where unknown."""
    metrics = {
        "similarity": AverageIDSimilarity(),
        "distance": AverageIDDistance(),
        "decay": SimilarityDecay(),
        "face_found": FaceDetectionRate(),
        "fm_ref": FaceMotionRef(),
        "fm_inter": FaceMotionInter(),
    }
    ranks = {"top1": IdentityRetrieval(1), "top5": IdentityRetrieval(5)}
    for video, person in zip(judged, people, strict=True):
        for name, metric in metrics.items():
            alone = name in ("face_found", "fm_inter")
            metric.update(video.faces) if alone else metric.update(video.faces, video.references)
        for metric in ranks.values():
            metric.update(video.faces, video.references, torch.tensor([person]))
    return {name: metric.per_video().tolist() for name, metric in (metrics | ranks).items()}


def similarities(video: Judged) -> list[float | None]:
    """Of each sampled frame with the references; None where it shows no face, or no reference does."""
    reference = mean_embedding(video.references.embeddings, video.references.mask)
    values: Tensor = frame_similarity(video.faces.embeddings, reference)[0]
    known = video.faces.found[0] & ~values.isnan()
    return [float(value) if is_known else None for value, is_known in zip(values, known, strict=True)]


def counted(name: str, enhanced: Sequence[bool]) -> list[bool]:
    """The videos by which a figure is judged.

    Args:
        enhanced: whose prompts ask for the face: they count for similarity, the others for all else. Without both
            kinds every video counts.
    """
    if len(set(enhanced)) < 2:
        return [True] * len(enhanced)
    return [is_enhanced == (name in OF_SIMILARITY) for is_enhanced in enhanced]


def choose(values: Sequence[Any], chosen: Sequence[bool]) -> list[Any]:
    return [value for value, is_chosen in zip(values, chosen, strict=True) if is_chosen]


def success(
    figures: Mapping[str, Sequence[float]], enhanced: Sequence[bool], rates: SuccessRates
) -> dict[str, float | None]:
    """Share of videos that pass each check, and the mean of the shares; None where nothing was measured."""
    columns = {"face_rate": "face_found", "similarity": "similarity", "motion": "fm_inter", "text": "text"}
    rates.reset()
    for name, column in columns.items():
        if column in figures:  # each check by itself: it has videos of its own
            rates.update(**{name: torch.tensor(choose(figures[column], counted(column, enhanced)))})
    return {name: known(float(share)) for name, share in rates.compute().items()}


# Everything -----------------------------------------------------------------------------------------------------------


class Evaluation:
    """Judges the videos of several methods and writes results.json, results.csv and report.html.

    Args:
        judge: of single videos.
        rates: with the thresholds of a success.
        description: for the report.
        cost: of generating, for the report.
    """

    def __init__(self, judge: Judge, rates: SuccessRates, description: str, cost: Cost | None = None) -> None:
        self.judge, self.success_rates, self.description, self.cost = judge, rates, description, cost

    def run(self, methods: Mapping[str, Sequence[Entry]], out: Path) -> dict[str, Any]:
        """The results, also written to `out`."""
        numbers: dict[str, int] = {}
        for entries in methods.values():
            for entry in entries:
                numbers.setdefault(entry.identity, len(numbers))
        all_judged = iter(judge_all(self.judge, list(itertools.chain(*methods.values())), "videos"))
        clips, estimates, rates = [], {}, {}
        for method, entries in methods.items():
            judged = list(itertools.islice(all_judged, len(entries)))
            figures = face_figures(judged, [numbers[entry.identity] for entry in entries])
            figures |= {name: [video.values[name] for video in judged] for name in judged[0].values}
            pairs = enumerate(zip(entries, judged, strict=True))
            clips += [describe_clip(method, entry, video, i, figures) for i, (entry, video) in pairs]
            enhanced = [entry.face_enhanced for entry in entries]
            estimates[method] = estimate(figures, [entry.identity for entry in entries], enhanced)
            estimates[method] |= set_figures(judged, enhanced, self.judge.set_metrics)
            rates[method] = success(figures, enhanced, self.success_rates)
        results = {"description": self.description, "judged_with": self.judge.settings, "num_people": len(numbers)}
        results |= {"methods": {method: as_numbers(found) for method, found in estimates.items()}}
        results |= {"success_rates": rates, "thresholds": self.success_rates.thresholds, "clips": clips}
        results |= {} if self.cost is None else {"cost": self.cost.as_dict()}
        write_results(results, estimates, out)
        return results


def judge_all(judge: Judge, entries: Sequence[Entry], title: str) -> list[Judged]:
    """In order, with a progress bar.

    Raises:
        ValueError: some cannot be judged; all of these are named, once the others are judged and kept.
    """
    judged, failures = [], []
    for entry in tqdm(entries, desc=title, unit="video"):
        try:
            judged.append(judge(entry))
        except ValueError as error:
            told = str(error)
            failures.append(told if str(entry.video) in told else f"{entry.video}: {told}")
    if failures:
        told = f"{len(failures)} of {len(entries)} videos cannot be judged; what was found in the others is kept."
        raise ValueError("\n  ".join([f"{told} Mend these, or take them out of the manifest:", *failures]))
    return judged


def describe_clip(
    method: str, entry: Entry, video: Judged, index: int, figures: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """A video's entry in results.json; `pictures` are for the page alone."""
    values = {name: known(values[index]) for name, values in figures.items()}
    return {
        "method": method,
        "video": entry.video.name,
        "prompt": entry.prompt,
        "identity": entry.identity,
        "group": entry.group,
        "face_enhanced": entry.face_enhanced,
        "references": [path.as_posix() for path in entry.references],
        **video.info,
        "figures": values,
        "similarities": similarities(video),
        "pictures": [data_uri(file) for file in video.thumbnails],
    }


def known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def estimate(
    figures: Mapping[str, Sequence[float]], identities: Sequence[str], enhanced: Sequence[bool]
) -> dict[str, Estimate]:
    """Of every column, over the videos that count for it; unknown where nobody measured it."""
    found, unknown = {}, [math.nan] * len(identities)
    for figure in FIGURES:
        chosen = counted(figure.name, enhanced)
        found[figure.name] = bootstrap(choose(figures.get(figure.name, unknown), chosen), choose(identities, chosen))
    return found


def set_figures(
    judged: Sequence[Judged], enhanced: Sequence[bool], metrics: Mapping[str, InceptionScore]
) -> dict[str, Estimate]:
    """Figures of a set of videos as a whole; without an interval."""
    found = {}
    for name, metric in metrics.items():
        chosen = choose(judged, counted(name, enhanced))
        score = float(metric.score(torch.cat([video.classes[name] for video in chosen])))
        found[name] = Estimate(score, math.nan, math.nan, len(chosen), 0)
    return found


def as_numbers(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float | int | None]]:
    return {
        name: {key: known(value) if isinstance(value, float) else value for key, value in found._asdict().items()}
        for name, found in estimates.items()
        if found.num_videos
    }


def measured(estimates: Mapping[str, Mapping[str, Estimate]]) -> list[Figure]:
    """The columns that some method has."""
    return [f for f in FIGURES if any(found[f.name].num_videos for found in estimates.values())]


def write_results(results: dict[str, Any], estimates: dict[str, dict[str, Estimate]], out: Path) -> None:
    figures = measured(estimates)
    write_text(out / "results.json", to_json(results))
    write_text(out / "results.csv", to_csv(results["clips"], figures))
    write_text(out / "report.html", render(results, estimates, figures))


def to_csv(clips: Sequence[dict[str, Any]], figures: Sequence[Figure]) -> str:
    """A line for each video."""
    text = io.StringIO()
    head = ["method", "video", "identity", "group", "prompt"]
    writer = csv.writer(text)
    writer.writerow([*head, *(figure.name for figure in figures)])
    for clip in clips:
        values = [clip["figures"].get(figure.name) for figure in figures]
        writer.writerow([*(clip[name] for name in head), *("" if value is None else value for value in values)])
    return text.getvalue()


def data_uri(file: Path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(file.read_bytes()).decode()}"


# The command ----------------------------------------------------------------------------------------------------------


def check_options(cfg: DictConfig) -> None:
    """
    Raises:
        ValueError: a folder or a threshold that is none, or a place where nothing can be written.
    """
    for name in ("out", "cache"):
        if not isinstance(cfg[name], str):
            raise ValueError(f"{name}={cfg[name]}: give a folder; one named 5 is ./5.")
        check_writable(Path(cfg[name]))
    if not isinstance(cfg.thresholds, Mapping):
        raise ValueError(f"thresholds={cfg.thresholds}: give numbers by name, such as thresholds.min_motion=0.4.")
    for name, value in cfg.thresholds.items():
        if not isinstance(value, int | float):
            raise ValueError(f"thresholds.{name}={value}: give a number.")


def read_methods(videos: Mapping[str, str | None]) -> dict[str, list[Entry]]:
    """
    Raises:
        ValueError: no videos were named, or what was given is no path.
        FileNotFoundError, ValueError: as `read_manifest`.
    """
    given = {method: path for method, path in videos.items() if path} if isinstance(videos, Mapping) else {}
    if not given:
        raise ValueError("Nothing to judge: give +videos.NAME=FOLDER, the name as it shall stand in the table.")
    for method, path in given.items():
        if not isinstance(path, str):
            told = "one folder or manifest as +videos.NAME=FOLDER, without a dot in NAME; a folder named 5 is ./5"
            raise ValueError(f"videos.{method}={path}: give {told}.")
    return {method: read_manifest(path) for method, path in given.items()}


def part_of(methods: Mapping[str, Sequence[Entry]], part: int, num_parts: int) -> list[Entry]:
    """Every `num_parts`-th video of all methods together, from the `part`-th.

    Raises:
        ValueError: no such part.
    """
    if not (isinstance(part, int) and isinstance(num_parts, int) and 0 <= part < num_parts):
        raise ValueError(f"part={part} of num_parts={num_parts}: give whole numbers, part from 0 to num_parts - 1.")
    return [entry for entries in methods.values() for entry in entries][part::num_parts]


def make_judge(cfg: DictConfig) -> Judge:
    """Raises what the metrics, `FaceReader` and `Judge` raise."""
    given: dict[str, Any] = OmegaConf.to_container(cfg.metrics, resolve=True) if cfg.metrics else {}
    given = {name: metric for name, metric in given.items() if metric}
    metrics = {name: instantiate(metric) for name, metric in given.items()}
    reader = FaceReader(cfg.detector, cfg.recognizer, cfg.root, find_device(cfg.device))
    return Judge(reader, Path(cfg.cache), cfg.num_frames, metrics, {"metrics": given})


def judge_part(cfg: DictConfig) -> int:
    """Judges a part of the videos into the cache, and writes no report; how many videos.

    Raises:
        FileNotFoundError, ValueError: as `run` and `part_of`.
    """
    check_options(cfg)
    entries = part_of(read_methods(cfg.videos), cfg.part, cfg.num_parts)
    judge = make_judge(cfg)
    return len(judge_all(judge, entries, f"part {cfg.part}"))


def run(cfg: DictConfig) -> dict[str, Any]:
    """Judges all videos and writes results and report; the results.

    Raises:
        FileNotFoundError, ValueError: as `check_options`, `read_methods`, `read_cost`, `FaceReader` and `Judge`.
    """
    check_options(cfg)
    if cfg.num_parts != 1:
        raise ValueError(f"num_parts={cfg.num_parts} without a part: give part=0 and so on, or leave num_parts out.")
    methods = read_methods(cfg.videos)
    cost = None if cfg.cost is None else read_cost(Path(cfg.cost))
    judge, rates = make_judge(cfg), SuccessRates(**cfg.thresholds)
    return Evaluation(judge, rates, describe(judge.reader, cfg.num_frames), cost).run(methods, Path(cfg.out))


def finishing_command(overrides: Sequence[str]) -> str:
    """The plain run after the parts."""
    kept = [text for text in overrides if text.split("=")[0] not in ("part", "num_parts")]
    return shlex.join(["python", "-m", "mm_lightning.evaluate", *kept])


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def evaluate(cfg: DictConfig) -> None:
    with short_errors():
        if cfg.part is None:
            run(cfg)
            logger.info("Report: %s", Path(cfg.out) / "report.html")
            return
        num_videos = judge_part(cfg)
        told = (cfg.part, cfg.num_parts, num_videos, cfg.cache, finishing_command(HydraConfig.get().overrides.task))
        logger.info("Part %d of %d: %d videos judged into %s, no report yet. After all parts: %s", *told)


def main() -> None:
    if sys.argv[1:2] == ["ablation"]:
        ablation.main(sys.argv[2:])
    else:
        evaluate()


def describe(reader: FaceReader, num_frames: int) -> str:
    info = reader.info
    return (
        f"Faces found by {info['detector']} and compared by {info['recognizer']} in {num_frames} frames of each video, "
        "with the average of the person's photos. A method trained with the same recogniser is flattered by it."
    )


if __name__ == "__main__":
    main()
