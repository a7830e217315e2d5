"""What a finished build leaves in the package: weights in half precision, the adapter, a card with its figures."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import load_file, save_file

from mm_lightning.checkpoint import remove_path, replace_path
from mm_lightning.files import write_bytes
from mm_lightning.miniature.judge import judge_folder_of
from mm_lightning.miniature.packing import read_settings
from mm_lightning.miniature.table import ASSETS

if TYPE_CHECKING:
    from mm_lightning.miniature.build import Settings

logger = logging.getLogger(__name__)

MAX_BYTES = {"model": 14_000_000, "adapter": 6_000_000}
WEIGHTS = ".safetensors"
TRAININGS = {
    "vae": "video VAE",
    "decoder": "decoder of the VAE, on whose face it is",
    "clip": "text encoder and vision tower",
    "backbone": "transformer",
    "motion": "transformer once more, on clips",
    "stage1": "adapter, stage 1 (stills)",
    "stage2": "adapter, stage 2 (clips)",
}
REPORTS = {
    "quality/quality.md": "The backbone, on held-out people",
    "table/results.md": "Whose face it is, on people never seen",
}
CARD, CURVES = "MODEL_CARD.md", "curves.svg"
MAX_CURVES = 3


class Curve(NamedTuple):
    """One scalar over a training."""

    tag: str
    steps: list[int]
    values: list[float]


def commit(settings: Settings, assets: Path = ASSETS) -> None:
    """Write `assets/{model,judge,adapter}`, the model card and its curves, from a build of which all is done.

    Raises:
        FileNotFoundError: a training has not been run.
        ValueError: the build is a dry one, or the result is larger than what may be committed.
    """
    if settings.dry:
        raise ValueError("A dry build is not worth keeping: --commit goes with a whole one.")
    receipts = read_receipts(settings)
    parts = {"model": settings.model, "judge": judge_folder_of(settings.model), "adapter": settings.adapter}
    assets.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for name, folder in parts.items():
        fresh = assets / f".{name}.new"
        sizes[name] = copy_halved(folder, fresh)
        if sizes[name] > MAX_BYTES.get(name, sizes[name]):
            remove_path(fresh)
            raise ValueError(f"{folder} takes {sizes[name]:,} bytes in half precision, at most {MAX_BYTES[name]:,}.")
        replace_path(fresh, assets / name)
    reports = {name: read_report(settings.out / name) for name in REPORTS}
    write_bytes(assets / CURVES, draw_curves({name: read_curves(settings.run_dir(name)) for name in TRAININGS}))
    write_bytes(assets / CARD, model_card(settings, receipts, sizes, reports).encode())
    logger.info("%s: %s", assets, ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items()))


def read_receipts(settings: Settings) -> dict[str, dict[str, Any]]:
    """Of every stage that has been run to its end."""
    receipts = {}
    for file in sorted((settings.out / "receipts").glob("*.json")):
        receipt = json.loads(file.read_text())
        if receipt["done"]:
            receipts[file.stem] = receipt
    missing = [name for name in TRAININGS if name not in receipts]
    if missing:
        raise FileNotFoundError(f"{settings.out} has no finished {', '.join(missing)}: run the build to its end first.")
    return receipts


def copy_halved(source: Path, target: Path) -> int:
    """Copy a folder of weights, single precision as half; returns its bytes. Loaders give back the single ones."""
    remove_path(target)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == WEIGHTS:
            halved = {name: t.half() if t.is_floating_point() else t for name, t in load_file(file).items()}
            save_file(halved, copy, metadata={"format": "pt"})
        else:
            shutil.copyfile(file, copy)
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())


# The card -------------------------------------------------------------------------------------------------------------


def model_card(
    settings: Settings, receipts: dict[str, dict[str, Any]], sizes: dict[str, int], reports: dict[str, str | None]
) -> str:
    """Data, commands, hardware and seconds of every training, sizes and figures, as Markdown."""
    people = read_settings(settings.people)["settings"]
    lines = [
        "# The miniature's weights",
        "",
        "A small CogVideoX in diffusers' layout, trained from scratch, and a MagicMirror adapter on it.",
        f"Rendered people only: {people['train']} for training, {people['validation']} for validation, "
        f"{people['test']} for the figures below; of each {people['stills']} stills and {people['clips']} clip of "
        f"{people['num_frames']} frames, {people['size']} pixels, seed {people['seed']}.",
        "dlib's face recogniser, which real people's photos taught, conditions the adapter, takes part in its loss and",
        "judges it. Fit for trying the method out, and for nothing else.",
        "",
        *receipt_lines(receipts),
        "",
        "| folder | bytes, in half precision |",
        "|---|---|",
        *(f"| {name} | {size:,} |" for name, size in sizes.items()),
        "",
        f"![Loss over the steps of each training]({CURVES})",
        "",
    ]
    for name, heading in REPORTS.items():
        lines += [f"## {heading}", "", reports[name] or "Not measured in this build.", ""]
    return "\n".join(lines)


def receipt_lines(receipts: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| training | seconds | hardware | command |", "|---|---|---|---|"]
    for name, title in TRAININGS.items():
        receipt = receipts[name]
        command = " ".join(part for part in receipt["command"] if not is_place(part))
        lines.append(f"| {title} | {receipt['seconds']:.0f} | {receipt['hardware']} | `{command}` |")
    return lines


def is_place(override: str) -> bool:
    """Whether an override only says where something lies."""
    name = override.partition("=")[0]
    places = ("hydra.", "paths.", "data.people", "data.cache", "data.val_shards", "model.base", "model.init_adapter")
    return name.startswith(places)


def read_report(file: Path) -> str | None:
    return file.read_text().strip() if file.is_file() else None


# Curves ---------------------------------------------------------------------------------------------------------------


def read_curves(run_dir: Path) -> list[Curve]:
    """The validation losses of a training, at most three; the training loss where there are none."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    tags = sorted(events.Tags()["scalars"])
    chosen = [tag for tag in tags if tag.startswith("val/loss")][:MAX_CURVES] or [t for t in tags if t == "train/loss"]
    scalars = {tag: events.Scalars(tag) for tag in chosen}
    return [Curve(tag, [e.step for e in found], [e.value for e in found]) for tag, found in scalars.items()]


def draw_curves(curves: dict[str, Sequence[Curve]]) -> bytes:
    """A panel for each training, as SVG; the same curves give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "miniature", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(3 * len(curves), 2.4), layout="constrained")
        for axes, (name, found) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
            for curve in found:
                axes.plot(curve.steps, curve.values, label=curve.tag, linewidth=1)
            axes.set_title(TRAININGS.get(name, name))
            axes.set_xlabel("step")
            if found:
                axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
